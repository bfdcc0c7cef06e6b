"""The stages of a run in their order: responses, activations, vectors, evaluation, report. Each function is a command.

A stage does what is missing and returns results, which the next stage, the report and the summary use; torch is
imported only when there is something to compute. A stage holds the locks of the runs that it works on. run.json is
written when the first shard of a run is due: a start that fails earlier leaves nothing that pins the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from extraction.core.errors import ONE_TRAIT, MissingPackage, StoreError, TraitError, TraitFailures, TraitlineError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.judging.registry import check_judge_model
from extraction.pipeline.evaluate import EvalOptions, evaluate_trait, note_of_steering
from extraction.pipeline.executors.base import Executor
from extraction.pipeline.executors.local import LocalExecutor
from extraction.pipeline.executors.slice import empty_slice_note, groups_of_slice, shards_of_slice
from extraction.pipeline.fit import FitInputs, VectorOptions, check_options, fit_inputs, fit_trait
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

Result = TypeVar("Result", RunResult, list[TraitResult])
ExecutorFactory = Callable[[ModelSession, GenerationMode, ProgressReporter], Executor]


@dataclass
class _Attempts:
    """The traits of a command that failed, by name: the others go on. The error of a single trait is raised at once."""

    n_traits: int
    failures: dict[str, TraitlineError] = field(default_factory=dict)

    @contextmanager
    def at(self, trait: Trait) -> Iterator[None]:
        """Keep an error of the block that is about this trait."""
        try:
            yield
        except ONE_TRAIT as failure:
            if self.n_traits == 1:
                raise
            self.failures[trait.name] = failure

    def remaining(self, contexts: Iterable[TraitContext]) -> list[TraitContext]:
        """Return the contexts of traits that have not failed."""
        return [context for context in contexts if context.trait.name not in self.failures]

    def finish(self, result: Result) -> Result:
        """Return the result of the other traits. Raises TraitFailures, or the one error that all traits have."""
        texts = {str(failure) for failure in self.failures.values()}
        if len(self.failures) == self.n_traits and len(texts) == 1:
            raise next(iter(self.failures.values()))
        if self.failures:
            has_result = bool(result if isinstance(result, list) else result.traits)
            raise TraitFailures(self.failures, result, has_result=has_result)
        return result


# --- stage 1 and 2: responses and activations -----------------------------------------------------------------------


def generate(
    plan: RunPlan, mode: GenerationMode, progress: ProgressReporter, *, make_executor: ExecutorFactory = LocalExecutor
) -> RunResult:
    """Stage 1: make the responses of every trait, with activations if the mode captures them, and judge them."""
    session = ModelSession(plan)
    contexts = trait_contexts(session, progress)
    check_judge_model(plan.experiment, plan.root)
    attempts = _Attempts(len(contexts))
    with locked_runs(contexts):
        _run_all_groups(attempts, contexts, session, mode, progress, make_executor)
        return attempts.finish(_generation_result(session, attempts.remaining(contexts)))


def _generation_result(session: ModelSession, contexts: Sequence[TraitContext]) -> RunResult:
    return RunResult(session, tuple(TraitResult(context, stored_kept_responses(context)) for context in contexts))


def _run_all_groups(
    attempts: _Attempts,
    contexts: Sequence[TraitContext],
    session: ModelSession,
    mode: GenerationMode,
    progress: ProgressReporter,
    make_executor: ExecutorFactory,
) -> None:
    """Run the groups of this slice. If a trait fails, run what is left of a whole plan one trait at a time."""
    try:
        return _run_groups(contexts, session, mode, progress, make_executor)
    except ONE_TRAIT:
        if len(contexts) == 1 or not session.plan.is_whole:
            raise
    progress.note("a trait failed: the traits now run one at a time")
    last = session
    for context in contexts:
        last = last.for_plan(replace(session.plan, traits=(context.trait,)))
        with attempts.at(context.trait):
            _run_groups([context], last, mode, progress, make_executor)
    session.take_counters(last)


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
    attempts = _attempts(plans := list(plans))
    for plan in plans:
        session = session.for_plan(plan) if session else ModelSession(plan)
        for context in trait_contexts(session, progress):
            with attempts.at(context.trait), locked_runs([context]):
                _capture_trait(context)
                results.append(TraitResult(context, stored_kept_responses(context)))
    assert session is not None
    return attempts.finish(RunResult(session, tuple(results)))


def _attempts(plans: Sequence[RunPlan]) -> _Attempts:
    return _Attempts(sum(len(plan.traits) for plan in plans))


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
    attempts = _attempts(plans := list(plans))
    for plan in plans:
        for context in trait_contexts(ModelSession(plan), progress):
            with attempts.at(context.trait), locked_runs([context]):
                results.append(fit_trait(context, options)[1])
    return attempts.finish(results)


def validate(
    plans: Iterable[RunPlan], options: VectorOptions, eval_options: EvalOptions, progress: ProgressReporter
) -> list[TraitResult]:
    """Stage 4: evaluate each method and layer on held-out questions, and by steering. Plans of one model share it."""
    session: ModelSession | None = None
    results: list[TraitResult] = []
    attempts = _attempts(plans := list(plans))
    for plan in plans:
        session = session.for_plan(plan) if session else ModelSession(plan)
        for context in trait_contexts(session, progress):
            with attempts.at(context.trait), locked_runs([context]):
                inputs = fit_inputs(context, options, like_stored=True)
                result = TraitResult(context, inputs.kept, inputs.sources)
                results.append(evaluate_trait(inputs, result, eval_options))
    return attempts.finish(results)


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
        attempts = _Attempts(len(contexts))
        _run_all_groups(attempts, contexts, session, MODES["batched"], progress, make_executor)
        if not plan.is_whole:
            return _generation_result(session, contexts)
        fitted = []
        for context in attempts.remaining(contexts):
            with attempts.at(context.trait):
                fitted.append(fit_trait(context, options))
        results: list[TraitResult] = []
        to_report: list[TraitResult] = []
        for inputs, result in fitted:
            with attempts.at(inputs.context.trait):
                evaluated = _evaluate(inputs, result, eval_options)
                results.append(evaluated or result)
                if evaluated and (evaluated.n_new > result.n_new or not inputs.context.run.report_path().exists()):
                    to_report.append(evaluated)
        _write_reports(plan, to_report, progress)
    return attempts.finish(RunResult(session, tuple(results)))


def _evaluate(inputs: FitInputs, result: TraitResult, options: EvalOptions) -> TraitResult | None:
    """Return the result with stage 4's; None, with a note, where the trait has too few responses."""
    try:
        return evaluate_trait(inputs, result, options)
    except TraitError as failure:
        inputs.context.progress.note(f"{inputs.context.trait.name}: no held-out figures: {failure}")
        return None


def _write_reports(plan: RunPlan, results: Sequence[TraitResult], progress: ProgressReporter) -> None:
    """Write the pages of these traits and the index; a note where plots can't be drawn."""
    try:
        for result in results:
            write_report(result)
        if results:
            write_index(plan)
    except MissingPackage as failure:
        progress.note(f"no report: {failure}")
