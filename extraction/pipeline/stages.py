"""The doors' bodies, and the only room that knows the order of the work: generate, capture, vectors, validate, report.

Each stage reads earlier folders of a run and writes its own. What is done is not done again; torch is imported only
when there is something to compute. A run is pinned when its first shard is due: a start that fails before leaves
nothing behind that another start would have to agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from extraction.core.errors import MissingPackage, StoreError, TraitError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.engine.lazy_model import load_model
from extraction.judging.registry import check_judge_model
from extraction.pipeline.evaluate import EvalOptions, evaluate_trait
from extraction.pipeline.fit import VectorOptions, chosen_tensor, fit_vectors
from extraction.pipeline.pace import Pace
from extraction.pipeline.plan import MODES, GenerationMode, RunGroup, RunPlan
from extraction.pipeline.report import index, report
from extraction.pipeline.run_groups import pending_shards, run_group, shards_to_run
from extraction.pipeline.score import score_responses
from extraction.pipeline.session import ModelSession, capture_shard, locked_run

Row = dict[str, Any]


def generate(job: RunPlan, mode: GenerationMode, listener: ProgressReporter) -> ModelSession:
    """Make the responses of every trait (and, as the mode says, their activations); judge them; write both."""
    engine = ModelSession(job)
    check_judge_model(job.experiment, job.root)
    with ExitStack() as held:
        for trait in job.traits:
            held.enter_context(locked_run(job.folder(trait), job, trait))
        _make_queues(engine, mode, listener)
    return engine


def _make_queues(engine: ModelSession, mode: GenerationMode, listener: ProgressReporter) -> None:
    """Queue after queue; a trait is judged as soon as the last queue that has some of it is there."""
    job = engine.job
    queues = job.own_queues(mode)
    if not queues:
        listener.note(_nothing_for(job, mode))
    pending = [queue for queue in queues if pending_shards(job, queue, mode)]
    pace = _make_ready(engine, pending, mode, listener) if pending else None
    for stretch in _stretches(job, queues):
        if pace is not None:
            _make_stretch(engine, stretch, mode, pace, listener)
        for trait in stretch.ended if job.is_whole else ():
            score_responses(job, trait, job.folder(trait), listener)


@dataclass(frozen=True)
class _Stretch:
    """Queues of the same traits, one after the other; those that begin with them, and those that end."""

    title: str
    queues: Sequence[RunGroup]
    begun: Sequence[Trait]
    ended: Sequence[Trait]


def _stretches(job: RunPlan, queues: Sequence[RunGroup]) -> Iterator[_Stretch]:
    found = [(names, list(stretch)) for names, stretch in groupby(queues, _names_in)]
    last = {name: i for i, (names, _) in enumerate(found) for name in names}
    first = {name: i for i, (names, _) in reversed(list(enumerate(found))) for name in names}
    for i, (names, stretch) in enumerate(found):
        title = names[0] if len(names) == 1 else f"{len(names)} traits"
        begun, ended = ([trait for trait in job.traits if place.get(trait.name) == i] for place in (first, last))
        yield _Stretch(title, stretch, begun, ended)


def _names_in(queue: RunGroup) -> tuple[str, ...]:
    """The names of the traits in a queue."""
    return tuple(dict.fromkeys(shard.trait.name for shard in queue))


def _nothing_for(job: RunPlan, mode: GenerationMode) -> str:
    index, count = job.slice
    size = "shard" if mode.serial else "queue"
    return (
        f"--slice {index + 1}/{count}: nothing to do, since the job has {len(job.queues(mode))} {size}s: take fewer "
        f"slices or, for a run that has not begun, give all of them a lower --{size}-size"
    )


def _make_ready(
    engine: ModelSession, pending: Sequence[RunGroup], mode: GenerationMode, listener: ProgressReporter
) -> Pace:
    """The model in memory, and every prompt checked before the first is answered."""
    _ = engine.job.layers  # refused before the weights are loaded
    load_model(engine, listener)
    ahead = [shard for queue in pending for shard in shards_to_run(engine.job, queue, mode)]
    lengths = [len(prompt.token_ids) for shard in ahead for prompt in engine.prompts(shard.examples)]
    first = pending_shards(engine.job, pending[0], mode)[0]
    _self_check_once(engine, first.examples, listener)
    return Pace(len(lengths), sum(lengths), engine.lm.device.type)


def _make_stretch(
    engine: ModelSession, stretch: _Stretch, mode: GenerationMode, pace: Pace, listener: ProgressReporter
) -> None:
    """Some queues under one bar."""
    job, shards = engine.job, [shard for queue in stretch.queues for shard in queue]
    pending = pending_shards(job, shards, mode)
    if not pending:
        return
    for trait in stretch.begun:
        job.folder(trait).open(job.config(trait))
    n_examples, n_pending = (sum(len(shard.examples) for shard in some) for some in (shards, pending))
    with _progress(listener, f"{stretch.title}: {mode.title}", n_examples, n_pending):
        for queue in stretch.queues:
            run_group(engine, queue, mode, pace, listener)


@contextmanager
def _progress(listener: ProgressReporter, title: str, n_examples: int, n_pending: int) -> Iterator[None]:
    listener.begin(title, n_examples, n_examples - n_pending)
    try:
        yield
    finally:
        listener.end()


def _self_check_once(engine: ModelSession, examples: Sequence[Example], listener: ProgressReporter) -> None:
    """Before the first shard of a process: a few examples, in a batch and alone, must agree."""
    from extraction.pipeline.self_check import self_check

    if engine.job.self_check and not engine.checked:
        prompts = engine.prompts(examples[: engine.job.self_check])
        deviation = self_check(engine.lm, prompts, engine.job.layers)
        listener.note(f"self-check: {len(prompts)} examples alone and in a batch agree within {deviation:.0e}")
    engine.checked = True


def capture(job: RunPlan, listener: ProgressReporter, engine: ModelSession) -> ModelSession:
    """Stage 2: activations of the responses that stage 1 stored, teacher-forced from their token ids.

    `engine` is that of an earlier job, whose loaded model is used again where the two jobs have the same.
    """
    engine = engine.turned_to(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with locked_run(folder, job, trait):
            mine = job.own_shards(trait, MODES["responses"])  # which made them
            absent = [i for i in mine if not folder.shard_done("responses", i)]
            if absent:
                raise StoreError(
                    f"{show_path(folder.path)}: {len(absent)} of {len(mine)} shards have no responses yet; "
                    "run 1_generate_responses.py first (`traitline generate`)"
                )
            pending = {i: shard for i, shard in mine.items() if not folder.shard_done("activations", i)}
            if pending:
                _capture_shards(engine, trait, mine, pending, listener)
    return engine


def _capture_shards(
    engine: ModelSession,
    trait: Trait,
    mine: Mapping[int, Sequence[Example]],
    pending: Mapping[int, Sequence[Example]],
    listener: ProgressReporter,
) -> None:
    _ = engine.job.layers  # refused before the weights are loaded
    load_model(engine, listener)
    n_examples, n_pending = (sum(map(len, some.values())) for some in (mine, pending))
    with _progress(listener, f"{trait.name}: capturing stored responses", n_examples, n_pending):
        for i in pending:
            capture_shard(engine, engine.job.folder(trait), i, listener)


# --- the whole job --------------------------------------------------------------------------------------------------


def extract(
    job: RunPlan, wanted: VectorOptions, checks: EvalOptions, listener: ProgressReporter
) -> tuple[ModelSession, int]:
    """All stages. Returns the engine, and how many results are new; a second run finds nothing to do."""
    _check_wanted(job, wanted)
    engine = generate(job, MODES["batched"], listener)
    if not job.is_whole:
        return engine, 0
    n_new = fit_vectors(job, wanted, listener)
    stale: list[Trait] = []
    for trait in job.traits:
        try:
            n_found = evaluate_trait(engine, trait, wanted, checks, listener)
        except TraitError as failure:
            listener.note(f"{trait.name}: no held-out figures: {failure}")
            continue
        n_new += n_found
        if n_found or not job.folder(trait).report_path().exists():
            stale.append(trait)
    _report(job, stale, listener)
    return engine, n_new


def _report(job: RunPlan, traits: Sequence[Trait], listener: ProgressReporter) -> None:
    """Pages of the traits that have news, and the index; a note where plots can't be made."""
    try:
        for trait in traits:
            report(job, trait)
        if traits:
            index(job)
    except MissingPackage as failure:
        listener.note(f"no report: {failure}")


def _check_wanted(job: RunPlan, wanted: VectorOptions) -> None:
    """What stage 3 would refuse hours later is refused now."""
    if wanted.methods is not None:
        from extraction.vectors.methods import find_method

        for name in wanted.methods:
            find_method(name)
    settings = job.experiment.capture
    chosen_tensor(job, {f"{s}.{p}": None for s in settings.sites for p in settings.poolings if p != "all"}, wanted)
