"""The doors' bodies, and the only room that knows the order of the work: generate, capture, vectors, validate, report.

Each stage reads earlier folders of a run and writes its own. What is done is not done again; torch is imported only
when there is something to compute. A run is pinned when its first shard is due: a start that fails before leaves
nothing behind that another start would have to agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from extraction.errors import MissingPackage, StoreError, TraitError
from extraction.fitting import Vectors, chosen_tensor, make_vectors
from extraction.jobs import MODES, Job, Mode
from extraction.judging import assemble, check_reader
from extraction.records import Example, Trait
from extraction.reporting import index, report
from extraction.runners import Engine, Listener, capture_shard, is_done, load_once, make_shard, working_in
from extraction.schema import show_path
from extraction.store import RunFolder
from extraction.validating import Checks, validate_trait

Row = dict[str, Any]


def generate(job: Job, mode: Mode, listener: Listener) -> Engine:
    """Make the responses of every trait (and, as the mode says, their activations); judge them; write both."""
    engine = Engine(job)
    check_reader(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with working_in(folder, job, trait):
            _make_shards(engine, trait, folder, mode, listener)
            if job.is_whole:
                assemble(job, trait, folder, listener)
    return engine


def _make_shards(engine: Engine, trait: Trait, folder: RunFolder, mode: Mode, listener: Listener) -> None:
    job, mine = engine.job, engine.job.own_shards(trait)
    pending = {i: shard for i, shard in mine.items() if not is_done(folder, i, mode)}
    if not pending:
        return
    _ = job.layers  # refused before the weights are loaded
    load_once(engine, listener)
    for shard in pending.values():
        engine.prompts(shard)  # every prompt is checked before the first is answered
    _self_check_once(engine, next(iter(pending.values())), listener)
    folder.open(job.config(trait))
    with _progress(listener, f"{trait.name}: {mode.title}", mine, pending):
        for i, shard in pending.items():
            if mode.captures and _lacks_activations_alone(folder, i):
                capture_shard(engine, folder, i, listener)
            else:
                make_shard(engine, shard, i, folder, mode, listener)


def _lacks_activations_alone(folder: RunFolder, index: int) -> bool:
    """True for responses that were made without a capture: they are not made again, but read."""
    return folder.shard_done("responses", index) and not folder.shard_facts("responses", index)["meta"]["captured"]


@contextmanager
def _progress(
    listener: Listener, title: str, mine: Mapping[int, Sequence[Example]], pending: Mapping[int, Sequence[Example]]
) -> Iterator[None]:
    n_examples, n_pending = (sum(map(len, shards.values())) for shards in (mine, pending))
    listener.begin(title, n_examples, n_examples - n_pending)
    try:
        yield
    finally:
        listener.end()


def _self_check_once(engine: Engine, examples: Sequence[Example], listener: Listener) -> None:
    """Before the first shard of a process: a few examples, in a batch and alone, must agree."""
    from extraction.self_check import self_check

    if engine.job.self_check and not engine.checked:
        prompts = engine.prompts(examples[: engine.job.self_check])
        deviation = self_check(engine.lm, prompts, engine.job.layers)
        listener.note(f"self-check: {len(prompts)} examples alone and in a batch agree within {deviation:.0e}")
    engine.checked = True


def capture(job: Job, listener: Listener, engine: Engine) -> Engine:
    """Stage 2: activations of the responses that stage 1 stored, teacher-forced from their token ids.

    `engine` is that of an earlier job, whose loaded model is used again where the two jobs have the same.
    """
    engine = engine.turned_to(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with working_in(folder, job, trait):
            mine = job.own_shards(trait)
            absent = [i for i in mine if not folder.shard_done("responses", i)]
            if absent:
                raise StoreError(
                    f"{show_path(folder.path)}: {len(absent)} of {len(mine)} shards have no responses yet; "
                    "run 1_generate_responses.py first (`traitline generate`)"
                )
            pending = {i: shard for i, shard in mine.items() if not folder.shard_done("activations", i)}
            if pending:
                _capture_shards(engine, trait, folder, pending, listener)
    return engine


def _capture_shards(
    engine: Engine, trait: Trait, folder: RunFolder, pending: Mapping[int, Sequence[Example]], listener: Listener
) -> None:
    _ = engine.job.layers  # refused before the weights are loaded
    load_once(engine, listener)
    with _progress(listener, f"{trait.name}: capturing stored responses", engine.job.own_shards(trait), pending):
        for i in pending:
            capture_shard(engine, folder, i, listener)


# --- the whole job --------------------------------------------------------------------------------------------------


def extract(job: Job, wanted: Vectors, checks: Checks, listener: Listener) -> tuple[Engine, int]:
    """All stages. Returns the engine, and how many results are new; a second run finds nothing to do."""
    _check_wanted(job, wanted)
    engine = generate(job, MODES["batched"], listener)
    if not job.is_whole:
        return engine, 0
    n_new = make_vectors(job, wanted, listener)
    stale: list[Trait] = []
    for trait in job.traits:
        try:
            n_found = validate_trait(engine, trait, wanted, checks, listener)
        except TraitError as failure:
            listener.note(f"{trait.name}: no held-out figures: {failure}")
            continue
        n_new += n_found
        if n_found or not job.folder(trait).report_path().exists():
            stale.append(trait)
    _report(job, stale, listener)
    return engine, n_new


def _report(job: Job, traits: Sequence[Trait], listener: Listener) -> None:
    """Pages of the traits that have news, and the index; a note where plots can't be made."""
    try:
        for trait in traits:
            report(job, trait)
        if traits:
            index(job)
    except MissingPackage as failure:
        listener.note(f"no report: {failure}")


def _check_wanted(job: Job, wanted: Vectors) -> None:
    """What stage 3 would refuse hours later is refused now."""
    if wanted.methods is not None:
        from extraction.vectors.methods import find_method

        for name in wanted.methods:
            find_method(name)
    settings = job.experiment.capture
    chosen_tensor(job, {f"{s}.{p}": None for s in settings.sites for p in settings.poolings if p != "all"}, wanted)
