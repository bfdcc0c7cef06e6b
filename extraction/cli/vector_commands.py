"""Commands that make vectors: one for each stage, and `extract` for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from extraction.cli.arguments import (
    RunOptions,
    eval_options,
    new_plan,
    prepare,
    print_lines,
    run_options,
    stored_runs,
    take,
    vector_options,
)
from extraction.cli.option_types import command
from extraction.cli.options import (
    BATCH,
    CAPTURE,
    CHECK,
    DEVICE,
    EVALUATION,
    GENERATION,
    INPUTS,
    JUDGE,
    PAGE,
    RUN,
    STORED,
    THREADS,
    VECTORS,
)
from extraction.cli.terminal import Terminal

if TYPE_CHECKING:
    from extraction.pipeline.plan import RunPlan

Result = TypeVar("Result")


@command("extract", INPUTS, GENERATION, CAPTURE, BATCH, VECTORS, EVALUATION, DEVICE, CHECK, RUN)
def extract_command(**given: Any) -> None:
    """Run all stages: responses, activations, vectors, tests and the report."""
    run, wanted, checks = run_options(given), vector_options(given, takes_layers=False), eval_options(given)
    plan = new_plan(given)
    if run.dry_run:
        return _print_plans([plan], "batched", run, steered=None if checks.quick else checks.answers)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(run.threads)
    summary = summaries.of_run if plan.is_whole else summaries.of_generation
    _print_result(
        lambda: stages.extract(plan, wanted, checks, Terminal()),
        lambda result: summary(result, run.seconds, run.gpu_price),
    )


@command("generate", INPUTS, GENERATION, CAPTURE, DEVICE, CHECK, RUN)
def generate_command(**given: Any) -> None:
    """Stage 1: generate responses one at a time, without activations.

    The slow reference for `batched`. The options of capture are given here, since they are part of the run.
    """
    _make_responses("responses", given)


@command("combined", INPUTS, GENERATION, CAPTURE, DEVICE, CHECK, RUN)
def combined_command(**given: Any) -> None:
    """Stage 1: generate responses one at a time, and capture activations."""
    _make_responses("combined", given)


@command("batched", INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, CHECK, RUN)
def batched_command(**given: Any) -> None:
    """Stage 1: generate responses in batches, and capture activations."""
    _make_responses("batched", given)


@command("capture", INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, RUN)
def capture_command(**given: Any) -> None:
    """Stage 2: capture the activations of stored responses.

    In a teacher-forced pass over their token ids. Settings of stage 1 are read from the run.
    """
    run = run_options(given)
    plans = stored_runs(given, loads_model=True)
    if run.dry_run:
        return _print_plans(plans, "capture", run)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(run.threads)
    _print_result(
        lambda: stages.capture(plans, Terminal()),
        lambda result: summaries.of_generation(result, run.seconds, run.gpu_price),
    )


@command("vectors", INPUTS, VECTORS, STORED)
def vectors_command(**given: Any) -> None:
    """Stage 3: fit a vector for every method and layer.

    From the responses that count for the judge.
    """
    wanted = vector_options(given)
    plans = stored_runs(given)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    _print_result(lambda: stages.fit_vectors(plans, wanted, Terminal()), summaries.of_vectors)


@command("validate", INPUTS, VECTORS, STORED, EVALUATION, BATCH, DEVICE, THREADS)
def validate_command(**given: Any) -> None:
    """Stage 4: test the vectors on held-out questions, and steer with them."""
    wanted, checks, (threads,) = vector_options(given), eval_options(given), take(given, "threads")
    plans = stored_runs(given, loads_model=not checks.quick)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(threads)
    _print_result(lambda: stages.validate(plans, wanted, checks, Terminal()), summaries.of_cards)


@command("report", INPUTS, JUDGE, PAGE)
def report_command(opens: bool, **given: Any) -> None:
    """Write a page for each trait: tests, steering and every response."""
    plans = stored_runs(given)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    pages, index = stages.report(plans, Terminal())
    print_lines(summaries.of_reports(pages, index))
    if opens:
        click.launch(str(pages[0] if len(pages) == 1 else index))


def _make_responses(mode: str, given: dict[str, Any]) -> None:
    """Generate responses in one of stage 1's modes, and print the summary."""
    from extraction.pipeline.plan import MODES

    run = run_options(given)
    plan = new_plan(given)
    if run.dry_run:
        return _print_plans([plan], mode, run)
    from extraction.cli import summaries
    from extraction.pipeline import stages

    prepare(run.threads)
    _print_result(
        lambda: stages.generate(plan, MODES[mode], Terminal()),
        lambda result: summaries.of_generation(result, run.seconds, run.gpu_price),
    )


def _print_result(work: Callable[[], Result], summary: Callable[[Result], Iterable[str]]) -> None:
    """Print the summary of a stage; where some traits failed, that of the others before the error is raised."""
    from extraction.core.errors import TraitFailures

    try:
        print_lines(summary(work()))
    except TraitFailures as failure:
        if failure.has_result:
            print_lines(summary(cast("Result", failure.result)))
        raise


def _print_plans(plans: Iterable[RunPlan], work: str, run: RunOptions, *, steered: int | None = None) -> None:
    from extraction.cli import summaries
    from extraction.pipeline.forecast import forecast

    prepare(run.threads)
    for plan in plans:
        print_lines(summaries.of_plan(plan, forecast(plan, work, gpu_price=run.gpu_price), steered=steered))
