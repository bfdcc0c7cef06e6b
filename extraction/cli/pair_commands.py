"""Commands about two models: amplify their difference, and serve them."""

from __future__ import annotations

import sys
from typing import Any

import click

from extraction.cli.arguments import prepare, print_lines, server_of, take
from extraction.cli.option_types import command
from extraction.cli.options import LOADING, MODELS, SERVER, STUDY, THREADS
from extraction.cli.terminal import Serving, Study, Terminal, complain
from extraction.core.text import one_line


@command("amplify", STUDY, THREADS, cls=Study)
def amplify_command(threads: int | None, **given: Any) -> None:
    """Amplify what a training changed, and count how often a behaviour shows.

    Every prompt is answered at every alpha, from the logits after + alpha * (after - before). Exit code 1 if a response
    failed.
    """
    from extraction.amplification.study_plan import plan_study

    prepare(threads)
    plan = plan_study(given)
    for note in plan.notes:
        click.echo(one_line(note), err=True)
    outcome, lines = plan.run(Terminal())
    print_lines(lines)
    if outcome.n_failed:
        complain(f"{outcome.n_failed} of {len(outcome.trials)} answers failed; the first: {outcome.first_failure}")
        sys.exit(1)


@command("serve", MODELS, SERVER, LOADING, THREADS, cls=Serving)
def serve_command(**given: Any) -> None:
    """Serve generation over HTTP: plain, amplified and speculative.

    Requests of all clients share running batches. The bundled models are served if none is named. Without a token,
    only this machine is answered. See docs/server.md.
    """
    (threads,) = take(given, "threads")
    settings, choice = server_of(given)
    from extraction.serving.server import serve

    prepare(threads)
    serve(settings, choice, Terminal().note)
