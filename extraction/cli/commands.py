"""The command line: one command for every stage, and the `traitline` group."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from extraction.cli.capture_options import TIER_2, TIER_3
from extraction.cli.options import (
    BATCH,
    CAPTURE,
    CHECK,
    DEVICE,
    EVIDENCE,
    GENERATION,
    INPUTS,
    JUDGE,
    LOADING,
    LOOK,
    PAGE,
    RUN,
    SETTINGS,
    STORED,
    STUDY,
    THREADS,
    VECTORS,
    RunOptions,
    command,
    eval_options_of,
    how_of,
    job_of,
    main,
    options,
    prepare,
    settings_of,
    show,
    steer_options_of,
    stored_jobs,
    take,
    wanted_of,
)
from extraction.cli.server_options import MODELS, SERVER, server_of
from extraction.cli.terminal import Command, Serving, Study, Terminal, complain
from extraction.core.text import one_line

if TYPE_CHECKING:
    from extraction.pipeline.plan import RunPlan

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
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(how.threads)
    result = stages.capture(jobs, Terminal())
    show(summaries.of_generation(result, how.seconds, how.gpu_price))


@command("vectors", INPUTS, VECTORS, STORED)
def vectors_command(**given: Any) -> None:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps."""
    wanted = wanted_of(given)
    jobs = stored_jobs(given)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    show(summaries.of_vectors(stages.fit_vectors(jobs, wanted, Terminal())))


@command("validate", INPUTS, VECTORS, STORED, EVIDENCE, BATCH, DEVICE, THREADS)
def validate_command(**given: Any) -> None:
    """Stage 4: what each method and layer is worth on questions that it has not seen, and whether it steers."""
    wanted, checks, (threads,) = wanted_of(given), eval_options_of(given), take(given, "threads")
    jobs = stored_jobs(given, loads_model=not checks.quick)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(threads)
    show(summaries.of_cards(stages.validate(jobs, wanted, checks, Terminal())))


@command("extract", INPUTS, GENERATION, CAPTURE, BATCH, VECTORS, EVIDENCE, DEVICE, CHECK, RUN)
def extract_command(**given: Any) -> None:
    """The whole job: responses, activations, vectors and what they are worth."""
    how, wanted, checks = how_of(given), wanted_of(given, takes_layers=False), eval_options_of(given)
    job = job_of(given)
    if how.dry_run:
        return _print_plans([job], "batched", how, steered=None if checks.quick else checks.answers)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(how.threads)
    result = stages.extract(job, wanted, checks, Terminal())
    summary = summaries.of_job if job.is_whole else summaries.of_generation
    show(summary(result, how.seconds, how.gpu_price))


@command("steer", INPUTS, LOOK, DEVICE, THREADS)
def steer_command(**given: Any) -> None:
    """A look at steering: answers to PROMPT with a trait's vector added, beside the unsteered one."""
    look, (threads,) = steer_options_of(given), take(given, "threads")
    jobs = stored_jobs(given, loads_model=True)
    from extraction.cli import summaries
    from extraction.pipeline import steer_preview
    from extraction.pipeline.session import ModelSession, TraitContext

    prepare(threads)
    for job in jobs:
        context = TraitContext(ModelSession(job), job.traits[0], Terminal())
        place = steer_preview.steer_site(context.run, look, int(job.model_config.num_hidden_layers))
        show(summaries.of_steer_preview(job, place, steer_preview.steer_preview(context, place, look)))


@main.command("amplify", cls=Study, context_settings=SETTINGS)
@options(STUDY, THREADS)
def amplify_command(threads: int | None, **given: Any) -> None:
    """How often a hidden behaviour shows when the difference of two models is amplified.

    Every prompt is answered at every alpha, by after + alpha * (after - before). Exit code 1 if an answer failed.
    """
    from extraction.amplification.study_plan import plan_study

    prepare(threads)
    plan = plan_study(given)
    for note in plan.notes:
        click.echo(one_line(note), err=True)
    outcome, lines = plan.run(Terminal())
    show(lines)
    if outcome.n_failed:
        complain(f"{outcome.n_failed} of {len(outcome.trials)} answers failed; the first: {outcome.first_failure}")
        sys.exit(1)


@command("read", *TIER_2)
def read_command(**given: Any) -> None:
    """Tier 2: where in a text does a trait show? Projections of every token of new prompts and their answers.

    At every layer and three points of it, for all traits in one pass; with attention, head means. Each prompt file is
    a set of its own below experiments/NAME/captures, with a page to look at. The same command again goes on.
    """
    _read_tokens(2, given)


@command("internals", *TIER_3)
def internals_command(**given: Any) -> None:
    """Tier 3: one layer from within, of every token of new prompts and their answers.

    Queries, keys, values and attention of every head; the MLP's parts; the residual stream at three points. Each prompt
    file is a set of its own below experiments/NAME/captures. The same command again goes on.
    """
    _read_tokens(3, given)


@command("report", INPUTS, JUDGE, PAGE)
def report_command(opens: bool, **given: Any) -> None:
    """A page for each trait: what its vector is worth, what steering does, every response; and an index of them."""
    jobs = stored_jobs(given)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    pages, index = stages.report(jobs, Terminal())
    show(summaries.of_reports(pages, index))
    if opens:
        click.launch(str(pages[0] if len(pages) == 1 else index))


@main.command("serve", cls=Serving, context_settings=SETTINGS)
@options(MODELS, SERVER, LOADING, THREADS)
def serve_command(**given: Any) -> None:
    """Answer over HTTP: plain, amplified and speculated generation, in batches of whoever asks. See docs/server.md.

    The bundled models are served where none is named. Without a token, only this machine is answered.
    """
    (threads,) = take(given, "threads")
    settings, choice = server_of(given)
    from extraction.serving.server import serve

    prepare(threads)
    serve(settings, choice, Terminal().note)


@main.command("verify", cls=Command, context_settings=SETTINGS)
@click.argument("folder", required=False, type=click.Path())
@click.option("--root", metavar="DIR", help="Where experiments/ is; default: here, or the checkout.")
def verify_command(folder: str | None, root: str | None) -> None:
    """Check every file of a run (or of all of experiments/) against its receipt. Exit code 1 if anything is wrong."""
    from pathlib import Path

    from extraction.config.experiments import find_root
    from extraction.core.errors import StoreError
    from extraction.storage.experiment_dir import verify_tree

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
    from extraction.config.experiments import find_root
    from extraction.config.traits import list_traits, load_trait

    folder = find_root(root)
    for name in list_traits(folder):
        click.echo(f"{name}\n    {one_line(load_trait(name, folder).description)}")


@main.command("export", cls=Command, context_settings=SETTINGS)
@click.option("--experiment", metavar="NAME", help="Whose run; 'imported' for vectors of `traitline import`.")
@click.option("--trait", required=True, metavar="NAME", help="Which of its traits.")
@click.option("--method", default="mean_diff", show_default=True, metavar="NAME", help="Which of its vectors.")
@click.option(
    "--to",
    metavar="FORMAT",
    help="Format of the file, such as gguf: one of those in docs/exchange.md.",
)
@click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0; default: all of the vector.")
@click.option(
    "--normalise",
    type=click.Choice(["unit", "typical-norm"]),
    help="Length 1, or that of the activations of each layer.",
)
@click.option("--scale", type=float, default=1.0, show_default=True, metavar="X", help="Times this, at the end.")
@click.option("--model", metavar="NAME", help="For forms that ask about the model; default: the run's.")
@click.option("--trait-json", is_flag=True, help="Write the trait itself, as a persona_vectors trait.")
@click.option("--output", metavar="FILE", help="Where to; default: a name made of trait and method, here.")
@click.option("--force", is_flag=True, help="Replace another file.")
@click.option("--root", metavar="DIR", help="Where configs/ and experiments/ are; default: here, or the checkout.")
def export_command(**given: Any) -> None:
    """Write a vector for other programs, or a trait (--trait-json). See docs/exchange.md."""
    from extraction.exchange.trait_transfer import export_trait
    from extraction.exchange.vector_transfer import ExportOptions, export_vectors

    as_trait, experiment = take(given, "trait_json", "experiment")
    where = {key: given.pop(key) for key in ("root", "output", "force")}
    if experiment is None if given["to"] is not None else not as_trait:
        raise click.UsageError("give --experiment and --to for a vector, or --trait-json for the trait")
    if as_trait and given["to"] is not None and where["output"] is not None:
        raise click.UsageError("--output names one file; give --to and --trait-json one at a time")
    if given["to"] is not None:
        show(map(one_line, export_vectors(ExportOptions(experiment, **given), **where)))
    if as_trait:
        show(map(one_line, export_trait(given["trait"], **where)))


@main.command("import", cls=Command, context_settings=SETTINGS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.option("--as", "name", required=True, metavar="NAME", help="What the vector or the trait is called here.")
@click.option("--format", metavar="FORMAT", help="Default: by the content. See docs/exchange.md for all of them.")
@click.option("--base", type=click.IntRange(0), metavar="N", help="The number that the file gives to decoder block 0.")
@click.option("--model", metavar="NAME", help="Of which model the vector is.")
@click.option("--force", is_flag=True, help="Replace what is there under this name.")
@click.option("--root", metavar="DIR", help="Where configs/ and experiments/ are; default: here, or the checkout.")
def import_command(files: tuple[str, ...], **given: Any) -> None:
    """Read a vector, or a trait (one file, two sides, or a folder of them), of another program."""
    from extraction.exchange.import_command import import_files

    show(map(one_line, import_files(files, **given)))


def _make_responses(mode: str, given: dict[str, Any]) -> None:
    """The body of stage 1's commands."""
    from extraction.pipeline.plan import MODES

    how = how_of(given)
    job = job_of(given)
    if how.dry_run:
        return _print_plans([job], mode, how)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(how.threads)
    result = stages.generate(job, MODES[mode], Terminal())
    show(summaries.of_generation(result, how.seconds, how.gpu_price))


def _read_tokens(tier: int, given: dict[str, Any]) -> None:
    """The body of tiers 2 and 3. With --keep-going, exit code 1 where something failed."""
    import time

    from extraction.cli import capture_summary
    from extraction.monitoring.plan import build_plan
    from extraction.monitoring.postprocess import postprocess_sets
    from extraction.monitoring.run import run_sets

    started = time.perf_counter()
    threads, dry_run = take(given, "threads", "dry_run")
    prepare(threads)
    plan = build_plan(tier, settings_of(given))
    for note in plan.notes:
        click.echo(one_line(note), err=True)
    if dry_run:
        return show(capture_summary.of_plan(plan))
    terminal = Terminal()
    session = run_sets(plan, terminal)
    show(capture_summary.of_sets(session, postprocess_sets(session, terminal), time.perf_counter() - started))
    if session.failures:
        complain(f"{len(session.failures)} failed; the first: {session.failures[0]}")
        sys.exit(1)


def _print_plans(jobs: Iterable[RunPlan], work: str, how: RunOptions, *, steered: int | None = None) -> None:
    from extraction.cli import summaries
    from extraction.pipeline.forecast import forecast

    prepare(how.threads)
    for job in jobs:
        show(summaries.of_plan(job, forecast(job, work, gpu_price=how.gpu_price), steered=steered))
