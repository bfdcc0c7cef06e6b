"""The command line: one command for every stage, and the `traitline` group."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from extraction.options import (
    BATCH,
    CAPTURE,
    CHECK,
    DEVICE,
    GENERATION,
    INPUTS,
    RUN,
    SETTINGS,
    STORED,
    VECTORS,
    How,
    command,
    how_of,
    job_of,
    main,
    options,
    prepare,
    show,
    stored_jobs,
    wanted_of,
)
from extraction.terminal import Command, Terminal, one_line

if TYPE_CHECKING:
    from extraction.jobs import Job

# --- commands -------------------------------------------------------------------------------------------------------


@command("generate", INPUTS, GENERATION, CAPTURE, DEVICE, CHECK, RUN)
def generate_command(**given: Any) -> None:
    """Stage 1, the yardstick: responses, one prompt at a time, without activations.

    What stage 2 shall capture is said here, since it is part of the run's config.
    """
    _make_responses("responses", given)


@command("combined", INPUTS, GENERATION, CAPTURE, DEVICE, CHECK, RUN)
def combined_command(**given: Any) -> None:
    """Stage 1, one prompt at a time, with activations captured in the same pass."""
    _make_responses("combined", given)


@command("batched", INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, CHECK, RUN)
def batched_command(**given: Any) -> None:
    """Stage 1, the fast one: batched responses with activations captured in the same pass."""
    _make_responses("batched", given)


@command("capture", INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, RUN)
def capture_command(**given: Any) -> None:
    """Stage 2: activations of stored responses, in a teacher-forced pass over their token ids.

    Settings of stage 1 are read from the run, and need not be given again.
    """
    how = how_of(given)
    jobs = stored_jobs(given, loads_model=True)
    if how.dry_run:
        return _print_plans(jobs, "capture", how)
    from extraction import stages, summary
    from extraction.runners import Engine

    prepare(how.threads)
    engine = Engine(jobs[0])
    for job in jobs:
        engine = stages.capture(job, Terminal(), engine)
    show(summary.of_generation(jobs, engine, how.seconds, how.gpu_price))


@command("vectors", INPUTS, VECTORS, STORED)
def vectors_command(**given: Any) -> None:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps."""
    wanted = wanted_of(given)
    jobs = stored_jobs(given)
    from extraction import stages, summary

    n_written = sum(stages.vectors(job, wanted, Terminal()) for job in jobs)
    show(summary.of_vectors(jobs, n_written))


@command("validate", INPUTS, VECTORS, STORED)
def validate_command(**given: Any) -> None:
    """Stage 4: what each method and layer is worth on questions that it has not seen."""
    wanted = wanted_of(given)
    jobs = stored_jobs(given)
    from extraction import stages, summary

    n_written = sum(stages.validate(job, wanted, Terminal()) for job in jobs)
    show(summary.of_cards(jobs, n_written))


@command("extract", INPUTS, GENERATION, CAPTURE, BATCH, VECTORS, DEVICE, CHECK, RUN)
def extract_command(**given: Any) -> None:
    """The whole job: responses, activations, vectors and what they are worth."""
    how, wanted = how_of(given), wanted_of(given, takes_layers=False)
    job = job_of(given)
    if how.dry_run:
        return _print_plans([job], "batched", how)
    from extraction import stages, summary

    prepare(how.threads)
    engine, n_new = stages.extract(job, wanted, Terminal())
    if job.is_whole:
        show(summary.of_job(job, engine, n_new, how.seconds, how.gpu_price))
    else:
        show(summary.of_generation([job], engine, how.seconds, how.gpu_price))


@main.command("report", cls=Command, context_settings=SETTINGS)
@options(INPUTS)
@click.option("--judge", metavar="NAME", help="auto, lexical or none; default: the run's.")
@click.option("--threshold", metavar="X", help="Where the judge divides; default: the run's.")
@click.option("--open", "opens", is_flag=True, help="Show it in the browser.")
def report_command(opens: bool, **given: Any) -> None:
    """A page for each trait: what its vector is worth, what steering does, every response; and an index of them."""
    jobs = stored_jobs(given)
    from extraction import reporting, summary

    pages = [reporting.report(job, trait) for job in jobs for trait in job.traits]
    index = reporting.index(jobs[0])
    show(summary.of_reports(pages, index))
    if opens:
        click.launch(str(pages[0] if len(pages) == 1 else index))


@main.command("verify", cls=Command, context_settings=SETTINGS)
@click.argument("folder", required=False, type=click.Path())
@click.option("--root", metavar="DIR", help="Where experiments/ is; default: here, or the checkout.")
def verify_command(folder: str | None, root: str | None) -> None:
    """Check every file of a run (or of all of experiments/) against its receipt. Exit code 1 if anything is wrong."""
    from pathlib import Path

    from extraction.configs import find_root
    from extraction.errors import StoreError
    from extraction.shelf import verify_tree

    top = Path(folder) if folder else find_root(root) / "experiments"
    if not top.is_dir():
        raise StoreError(f"{top}: no such folder; give a run's folder, or run a job first")
    findings = verify_tree(top)
    for finding in findings:
        click.echo(one_line(finding))
    verdict = f"{len(findings)} findings" if findings else "every file is what its receipt says"
    click.echo(one_line(f"{top}: {verdict}"))
    sys.exit(1 if findings else 0)


@main.command("traits", cls=Command, context_settings=SETTINGS)
@click.option("--root", metavar="DIR", help="Where configs/ is; default: here, or the checkout.")
def traits_command(root: str | None) -> None:
    """List the traits that can be named, with what their positive side is."""
    from extraction.configs import find_root
    from extraction.traits import list_traits, load_trait

    folder = find_root(root)
    for name in list_traits(folder):
        click.echo(f"{name}\n    {one_line(load_trait(name, folder).description)}")


def _make_responses(mode: str, given: dict[str, Any]) -> None:
    """The body of stage 1's commands."""
    from extraction.jobs import MODES

    how = how_of(given)
    job = job_of(given)
    if how.dry_run:
        return _print_plans([job], mode, how)
    from extraction import stages, summary

    prepare(how.threads)
    engine = stages.generate(job, MODES[mode], Terminal())
    show(summary.of_generation([job], engine, how.seconds, how.gpu_price))


def _print_plans(jobs: Iterable[Job], work: str, how: How) -> None:
    from extraction import summary
    from extraction.forecast import forecast

    prepare(how.threads)
    for job in jobs:
        show(summary.of_plan(job, forecast(job, work, gpu_price=how.gpu_price)))
