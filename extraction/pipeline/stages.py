"""The stages of a run in their order: responses, activations, vectors, evaluation, report. Each function is a command.

A stage does what is missing and returns results, which the next stage, the report and the summary use; torch is
imported only when there is something to compute. A stage holds the locks of the runs that it works on. run.json is
written when the first shard of a run is due: a start that fails earlier leaves nothing that pins the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from extraction.core.errors import MissingPackage, StoreError, TraitError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.judging.registry import check_judge_model
from extraction.pipeline.evaluate import EvalOptions, evaluate_trait, note_of_steering
from extraction.pipeline.executors.base import Executor
from extraction.pipeline.executors.local import LocalExecutor
from extraction.pipeline.executors.slice import empty_slice_note, groups_of_slice, shards_of_slice
from extraction.pipeline.fit import VectorOptions, check_options, fit_inputs, fit_trait
from extraction.pipeline.lazy_model import load_model
from extraction.pipeline.plan import MODES, GenerationMode, RunPlan
from extraction.pipeline.report import stored_result, write_index, write_report
from extraction.pipeline.score import score_responses, stored_kept_responses
from extraction.pipeline.session import (
    ModelSession,
    RunResult,
    TraitContext,
    TraitResult,
    locked_runs,
    trait_contexts,
)
from extraction.pipeline.shards import capture_shard

ExecutorFactory = Callable[[ModelSession, GenerationMode, ProgressReporter], Executor]


# --- stage 1 and 2: responses and activations -----------------------------------------------------------------------


def generate(
    plan: RunPlan, mode: GenerationMode, progress: ProgressReporter, *, make_executor: ExecutorFactory = LocalExecutor
) -> RunResult:
    """Stage 1: make the responses of every trait, with activations if the mode captures them, and judge them."""
    session = ModelSession(plan)
    contexts = trait_contexts(session, progress)
    check_judge_model(plan.experiment, plan.root)
    with locked_runs(contexts):
        _run_groups(contexts, session, mode, progress, make_executor)
        return _generation_result(session, contexts)


def _generation_result(session: ModelSession, contexts: Sequence[TraitContext]) -> RunResult:
    return RunResult(session, tuple(TraitResult(context, stored_kept_responses(context)) for context in contexts))


def _run_groups(
    contexts: Sequence[TraitContext],
    session: ModelSession,
    mode: GenerationMode,
    progress: ProgressReporter,
    make_executor: ExecutorFactory,
) -> None:
    """Run the groups of this slice; judge a trait as soon as its last group is done, unless other slices have some."""
    plan = session.plan
    groups = groups_of_slice(plan, mode)
    if not groups:
        progress.note(empty_slice_note(plan, mode))
    by_name = {context.trait.name: context for context in contexts}

    def judge(trait: Trait) -> None:
        score_responses(by_name[trait.name])

    make_executor(session, mode, progress).run(groups, judge if plan.is_whole else None)


def capture(plans: Iterable[RunPlan], progress: ProgressReporter) -> RunResult:
    """Stage 2: read the stored responses by teacher forcing, and write their activations.

    Plans with the same model share it.
    """
    session: ModelSession | None = None
    results: list[TraitResult] = []
    for plan in plans:
        session = session.for_plan(plan) if session else ModelSession(plan)
        for context in trait_contexts(session, progress):
            with locked_runs([context]):
                _capture_trait(context)
                results.append(TraitResult(context, stored_kept_responses(context)))
    assert session is not None
    return RunResult(session, tuple(results))


def _capture_trait(context: TraitContext) -> None:
    run = context.run
    shards = shards_of_slice(context.plan, context.trait, MODES["responses"])  # as `generate` slices them
    absent = [i for i in shards if not run.shard_done("responses", i)]
    if absent:
        raise StoreError(
            f"{show_path(run.path)}: {len(absent)} of {len(shards)} shards have no responses yet; "
            "run 1_generate_responses.py first (`traitline generate`)"
        )
    pending = {i: shard for i, shard in shards.items() if not run.shard_done("activations", i)}
    if pending:
        _capture_shards(context, shards, pending)


def _capture_shards(
    context: TraitContext, shards: Mapping[int, Sequence[Example]], pending: Mapping[int, Sequence[Example]]
) -> None:
    session, progress = context.session, context.progress
    _ = context.plan.layers  # a layer out of range is an error before the weights are loaded
    load_model(session, progress)
    n_examples, n_pending = (sum(map(len, some.values())) for some in (shards, pending))
    progress.begin(f"{context.trait.name}: capturing stored responses", n_examples, n_examples - n_pending)
    try:
        for i in pending:
            capture_shard(session, context.run, i, progress)
    finally:
        progress.end()


# --- stage 3 and 4: vectors and their evaluation --------------------------------------------------------------------


def fit_vectors(plans: Iterable[RunPlan], options: VectorOptions, progress: ProgressReporter) -> list[TraitResult]:
    """Stage 3: fit a direction for each method and layer to the kept responses of every trait."""
    results: list[TraitResult] = []
    for plan in plans:
        for context in trait_contexts(ModelSession(plan), progress):
            with locked_runs([context]):
                results.append(fit_trait(context, options)[1])
    return results


def validate(
    plans: Iterable[RunPlan], options: VectorOptions, eval_options: EvalOptions, progress: ProgressReporter
) -> list[TraitResult]:
    """Stage 4: evaluate each method and layer on held-out questions, and by steering. Plans of one model share it."""
    session: ModelSession | None = None
    results: list[TraitResult] = []
    for plan in plans:
        session = session.for_plan(plan) if session else ModelSession(plan)
        for context in trait_contexts(session, progress):
            with locked_runs([context]):
                inputs = fit_inputs(context, options, like_stored=True)
                result = TraitResult(context, inputs.kept, inputs.sources)
                results.append(evaluate_trait(inputs, result, eval_options))
    return results


def report(plans: Sequence[RunPlan], progress: ProgressReporter) -> tuple[list[Path], Path]:
    """Write the report page of every trait and the index; return their paths."""
    pages = []
    for plan in plans:
        for context in trait_contexts(ModelSession(plan), progress):
            with context.run.lock(shared=True):
                pages.append(write_report(stored_result(context)))
    return pages, write_index(plans[0])


# --- all stages -----------------------------------------------------------------------------------------------------


def extract(
    plan: RunPlan,
    options: VectorOptions,
    eval_options: EvalOptions,
    progress: ProgressReporter,
    *,
    make_executor: ExecutorFactory = LocalExecutor,
) -> RunResult:
    """Run all stages; a second run finds nothing to do. One slice of several ends after the responses."""
    check_options(plan, options)
    session = ModelSession(plan)
    contexts = trait_contexts(session, progress)
    check_judge_model(plan.experiment, plan.root)
    with locked_runs(contexts):
        if note := note_of_steering(plan, eval_options):
            progress.note(note)
        _run_groups(contexts, session, MODES["batched"], progress, make_executor)
        if not plan.is_whole:
            return _generation_result(session, contexts)
        fitted = [fit_trait(context, options) for context in contexts]
        results: list[TraitResult] = []
        to_report: list[TraitResult] = []
        for inputs, result in fitted:
            try:
                evaluated = evaluate_trait(inputs, result, eval_options)
            except TraitError as failure:
                progress.note(f"{inputs.context.trait.name}: no held-out figures: {failure}")
                evaluated = result
            else:
                if evaluated.n_new > result.n_new or not inputs.context.run.report_path().exists():
                    to_report.append(evaluated)
            results.append(evaluated)
        _write_reports(plan, to_report, progress)
    return RunResult(session, tuple(results))


def _write_reports(plan: RunPlan, results: Sequence[TraitResult], progress: ProgressReporter) -> None:
    """Write the pages of these traits and the index; a note where plots can't be drawn."""
    try:
        for result in results:
            write_report(result)
        if results:
            write_index(plan)
    except MissingPackage as failure:
        progress.note(f"no report: {failure}")
