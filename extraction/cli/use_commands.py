"""Commands that use vectors: on new prompts, in generation, and in other programs."""

from __future__ import annotations

import sys
from typing import Any

import click

from extraction.cli.arguments import prepare, print_lines, steer_options, stored_runs, take
from extraction.cli.option_types import command
from extraction.cli.options import DEVICE, EXPORT, IMPORT, INPUTS, INTERNALS, READ, STEER, THREADS
from extraction.cli.terminal import Terminal, complain
from extraction.core.text import one_line


@command("steer", INPUTS, STEER, DEVICE, THREADS)
def steer_command(**given: Any) -> None:
    """Answer PROMPT with a trait's vector added to the activations, and without.

    Shows the responses at every coefficient under each other, with judge score and perplexity.
    """
    steering, (threads,) = steer_options(given), take(given, "threads")
    plans = stored_runs(given, loads_model=True)
    from extraction.cli import summaries
    from extraction.pipeline import steer_preview
    from extraction.pipeline.session import ModelSession, TraitContext

    prepare(threads)
    for plan in plans:
        context = TraitContext(ModelSession(plan), plan.traits[0], Terminal())
        place = steer_preview.steer_site(context.run, steering, int(plan.model_config.num_hidden_layers))
        print_lines(summaries.of_steer_preview(plan, place, steer_preview.steer_preview(context, place, steering)))


@command("read", READ)
def read_command(**given: Any) -> None:
    """Project every token of new prompts and their responses onto vectors.

    At every layer and three points of it, for all traits in one pass; with attention, averaged over heads. Each prompt
    file is a set of its own below experiments/NAME/captures, with a page. The same command again goes on.
    """
    _read_tokens(2, given)


@command("internals", INTERNALS)
def internals_command(**given: Any) -> None:
    """Capture the internals of one layer for every token of new prompts.

    Queries, keys, values and attention of every head; the parts of the MLP; the residual stream at three points, for
    prompts and responses. Each prompt file is a set of its own below experiments/NAME/captures. The same command again
    goes on.
    """
    _read_tokens(3, given)


@command("export", EXPORT)
def export_command(**given: Any) -> None:
    """Write a vector or a trait in the format of another program.

    A vector with --experiment and --to, a trait with --trait-json. See docs/exchange.md.
    """
    from extraction.exchange.trait_transfer import export_trait
    from extraction.exchange.vector_transfer import ExportOptions, export_vectors

    as_trait, experiment = take(given, "trait_json", "experiment")
    where = {key: given.pop(key) for key in ("root", "output", "force")}
    if experiment is None if given["to"] is not None else not as_trait:
        raise click.UsageError("give --experiment and --to for a vector, or --trait-json for the trait")
    if as_trait and given["to"] is not None and where["output"] is not None:
        raise click.UsageError("--output names one file; give --to and --trait-json one at a time")
    if given["to"] is not None:
        print_lines(map(one_line, export_vectors(ExportOptions(experiment, **given), **where)))
    if as_trait:
        print_lines(map(one_line, export_trait(given["trait"], **where)))


@command("import", IMPORT)
def import_command(files: tuple[str, ...], **given: Any) -> None:
    """Read a vector or a trait from a file of another program.

    A trait may be one file, two files (its sides), or a folder of traits.
    """
    from extraction.exchange.import_command import import_files

    print_lines(map(one_line, import_files(files, **given)))


def _read_tokens(tier: int, given: dict[str, Any]) -> None:
    """Capture tokens of prompts, at tier 2 (all layers) or 3 (one). With --keep-going, exit code 1 on a failure."""
    import time

    from extraction.cli import capture_summary
    from extraction.monitoring.plan import build_plan
    from extraction.monitoring.postprocess import postprocess_sets
    from extraction.monitoring.run import run_sets

    started = time.perf_counter()
    threads, dry_run = take(given, "threads", "dry_run")
    prepare(threads)
    plan = build_plan(tier, given)
    for note in plan.notes:
        click.echo(one_line(note), err=True)
    if dry_run:
        return print_lines(capture_summary.of_plan(plan))
    terminal = Terminal()
    session = run_sets(plan, terminal)
    print_lines(capture_summary.of_sets(session, postprocess_sets(session, terminal), time.perf_counter() - started))
    if session.failures:
        complain(f"{len(session.failures)} failed; the first: {session.failures[0]}")
        sys.exit(1)
