"""The doors' bodies, and the only room that knows the order of the work: generate, capture, vectors, validate.

Each stage reads earlier folders of a run and writes its own. What is done is not done again; torch is imported only
when there is something to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction.atomic import digest
from extraction.configs import parse_layers
from extraction.errors import ConfigError, StoreError, TraitError
from extraction.jobs import MODES, Job, Mode
from extraction.judges import resolve_judge
from extraction.kept import Kept, kept_examples
from extraction.records import POLARITIES, Example, Trait
from extraction.runners import Engine, Listener, capture_shard, make_shard
from extraction.store import LAYER_CONVENTION, RunFolder

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]


def generate(job: Job, mode: Mode, listener: Listener, engine: Engine | None = None) -> Engine:
    """Make the responses of every trait (and, as the mode says, their activations); judge them; write both."""
    engine = engine or Engine(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with _opened(folder, job, trait):
            stage = "activations" if mode.captures else "responses"
            _make_shards(engine, trait, folder, mode, listener, stage)
            if job.slice[1] == 1:
                _assemble(job, trait, folder)
    return engine


@contextmanager
def _opened(folder: RunFolder, job: Job, trait: Trait) -> Iterator[None]:
    with folder.lock(shared=job.slice[1] > 1):
        folder.open(job.config(trait))
        yield


def _make_shards(engine: Engine, trait: Trait, folder: RunFolder, mode: Mode, listener: Listener, stage: str) -> None:
    job, shards = engine.job, engine.job.shards(trait)
    index, count = job.slice
    mine = [i for i in range(len(shards)) if i % count == index]
    pending = [i for i in mine if not (folder.shard_done(stage, i) and folder.shard_done("responses", i))]
    if not pending:
        return
    if mode.captures:
        _ = job.layers  # refused before the weights are loaded
    n_examples = sum(len(shards[i]) for i in mine)
    listener.begin(f"{trait.name}: {mode.title}", n_examples, n_examples - sum(len(shards[i]) for i in pending))
    try:
        _self_check_once(engine, shards[pending[0]], listener)
        for i in pending:
            make_shard(engine, shards[i], i, folder, mode, listener)
    finally:
        listener.end()


def _self_check_once(engine: Engine, examples: Sequence[Example], listener: Listener) -> None:
    """Before the first shard of a process: a few examples, in a batch and alone, must agree."""
    from extraction.self_check import self_check

    if engine.job.self_check and not engine.checked:
        deviation = self_check(engine.lm, engine.prompts(examples[: engine.job.self_check]), engine.job.layers)
        listener.note(f"self-check: {engine.job.self_check} examples alone and in a batch agree within {deviation:.0e}")
    engine.checked = True


def capture(job: Job, listener: Listener, engine: Engine | None = None) -> Engine:
    """Stage 2: activations of the responses that stage 1 stored, teacher-forced from their token ids."""
    engine = engine or Engine(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with _opened(folder, job, trait):
            count = len(job.shards(trait))
            absent = [i for i in range(count) if not folder.shard_done("responses", i)]
            if absent:
                raise StoreError(
                    f"{folder.path}: {len(absent)} of {count} shards have no responses yet; "
                    "run 1_generate_responses.py first (`traitline generate`)"
                )
            pending = [i for i in range(count) if not folder.shard_done("activations", i)]
            if pending:
                _capture_shards(engine, trait, folder, pending, listener)
    return engine


def _capture_shards(
    engine: Engine, trait: Trait, folder: RunFolder, pending: Sequence[int], listener: Listener
) -> None:
    sizes = [len(shard) for shard in engine.job.shards(trait)]
    _ = engine.job.layers  # refused before the weights are loaded
    n_done = sum(sizes) - sum(sizes[i] for i in pending)
    listener.begin(f"{trait.name}: capturing stored responses", sum(sizes), n_done)
    try:
        for i in pending:
            capture_shard(engine, folder, i, listener)
    finally:
        listener.end()


def _assemble(job: Job, trait: Trait, folder: RunFolder) -> None:
    """responses/pos.jsonl and neg.jsonl: every shard's rows with their scores, once all shards are there."""
    count = len(job.shards(trait))
    if not all(folder.shard_done("responses", i) for i in range(count)):
        return
    if folder.assembled_from() == folder.sources("responses"):
        return
    name, judge = resolve_judge(job.experiment.judge, trait)
    by_polarity: dict[str, list[Row]] = {polarity: [] for polarity in POLARITIES}
    for i in range(count):
        for row in folder.read_responses_shard(i):
            scores = {} if name == "none" else {name: judge(row["question"], row["response"], trait)}
            by_polarity[row["polarity"]].append({**row, "scores": scores})
    folder.write_responses(by_polarity, folder.sources("responses"))


# --- vectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What stage 3 is asked for: methods (None: all), layers (None: all captured), and which activations to read."""

    methods: tuple[str, ...] | None = None
    layers: str | None = None
    site: str | None = None
    pooling: str | None = None


def vectors(job: Job, wanted: Vectors, listener: Listener) -> int:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps. Returns how many files are new.

    A file that was made from the same activations, examples and layers is left as it is. A method that the examples are
    too few for is an error when it was named, a note when it was not.
    """
    written = 0
    for trait in job.traits:
        folder = job.folder(trait)
        with _opened(folder, job, trait):
            plan = _plan_vectors(job, trait, folder, wanted)
            stale = [name for name in plan.methods if folder.vectors_header(name) != plan.header(name)]
            for name in stale:
                written += _write_vector(folder, plan, name, listener, named=wanted.methods is not None)
    return written


@dataclass(frozen=True)
class _Plan:
    """One trait's activations and what to make of them."""

    trait: str
    model: str
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    captured: tuple[int, ...]
    tensor: str
    seed: int
    kept: Kept
    sources: str

    def header(self, method: str) -> dict[str, Any]:
        """What a vector file tells of itself; equal headers mean equal vectors."""
        return {
            "trait": self.trait,
            "model": self.model,
            "method": method,
            "layers": list(self.layers),
            "activations": self.tensor,
            "seed": self.seed,
            "examples": self.kept.facts(),
            "sources": self.sources,
            "layer_convention": LAYER_CONVENTION,
        }


def _plan_vectors(job: Job, trait: Trait, folder: RunFolder, wanted: Vectors) -> _Plan:
    from extraction.vectors.methods import DEFAULT_METHODS, find_method

    for name in wanted.methods or ():
        find_method(name)
    missing = [i for i in range(len(job.shards(trait))) if not folder.shard_done("activations", i)]
    if missing or not folder.assembled_from():
        raise StoreError(
            f"{folder.path}: {len(missing)} shards have no activations yet; run 1_generate_batched_simple.py first "
            "(`traitline extract` does all)"
        )
    facts = folder.activation_facts()
    captured = tuple(facts["meta"]["layers"])
    layers = _chosen_layers(wanted.layers, captured)
    kept = kept_of(job, trait, folder)
    sources = digest([folder.sources("activations"), kept.ids])
    return _Plan(
        trait=trait.name,
        model=job.spec.name,
        methods=wanted.methods or DEFAULT_METHODS,
        layers=layers,
        captured=captured,
        tensor=_chosen_tensor(job, facts["tensors"], wanted),
        seed=job.experiment.seed,
        kept=kept,
        sources=sources,
    )


def _chosen_layers(spec: str | None, captured: tuple[int, ...]) -> tuple[int, ...]:
    if spec is None or spec == "all":
        return captured
    layers = parse_layers(spec, max(captured) + 1)
    absent = sorted(set(layers) - set(captured))
    if absent:
        raise ConfigError(f"--layers {spec!r}: layer {absent[0]} was not captured; this run has {list(captured)}")
    return layers


def _chosen_tensor(job: Job, stored: Mapping[str, Any], wanted: Vectors) -> str:
    settings = job.experiment.capture
    pooled = [pooling for pooling in settings.poolings if pooling != "all"]
    name = f"{wanted.site or settings.sites[0]}.{wanted.pooling or next(iter(pooled), 'all')}"
    if name not in stored:
        raise ConfigError(
            f"--site/--pooling: this run has no activations {name!r}; it has "
            f"{', '.join(sorted(key for key in stored if '/' not in key)) or 'only every token (pooling all)'}"
        )
    return name


def kept_of(job: Job, trait: Trait, folder: RunFolder) -> Kept:
    """Which responses of a finished stage 1 count."""
    name, _ = resolve_judge(job.experiment.judge, trait)
    rows = {polarity: folder.read_responses(polarity) for polarity in POLARITIES}
    return kept_examples(rows, name, job.experiment.threshold)


def _write_vector(folder: RunFolder, plan: _Plan, method: str, listener: Listener, *, named: bool) -> int:
    from extraction.vectors.methods import find_method
    from extraction.vectors.sides import check_sides

    positive, negative = _sides(folder, plan)
    try:
        check_sides(positive, negative, layers=plan.layers)
        direction_LD = find_method(method)(positive, negative, seed=plan.seed)
    except TraitError as failure:
        if named:
            raise
        listener.note(f"{plan.trait}: no {method} vector: {failure}")
        return 0
    folder.write_vectors(method, {"direction": direction_LD}, plan.header(method))
    return 1


def _sides(folder: RunFolder, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Positive [N, L, D] and negative [M, L, D] activations of the examples that count."""
    ids, activations_nLD = folder.load_activations(plan.tensor)
    row_of = {example_id: row for row, example_id in enumerate(ids)}
    columns = [plan.captured.index(layer) for layer in plan.layers]
    positive, negative = (
        activations_nLD[[row_of[example_id] for example_id in plan.kept.ids[polarity]]][:, columns].float()
        for polarity in POLARITIES
    )
    return positive, negative


# --- validation -----------------------------------------------------------------------------------------------------


def validate(job: Job, wanted: Vectors, listener: Listener) -> int:
    """Stage 4: vectors/card.json, what each method and layer is worth on questions it has not seen. Returns how many are new."""
    return sum(_validate_trait(job, trait, wanted, listener) for trait in job.traits)


def _validate_trait(job: Job, trait: Trait, wanted: Vectors, listener: Listener) -> int:
    import torch

    from extraction.vectors.validation import build_card

    folder = job.folder(trait)
    with _opened(folder, job, trait):
        plan = _plan_vectors(job, trait, folder, wanted)
        made_of = {**plan.header("card"), "methods": list(plan.methods)}
        if folder.has_card() and folder.read_card().get("made_of") == made_of:
            return 0
        positive, negative = _sides(folder, plan)
        ids = [example_id for polarity in POLARITIES for example_id in plan.kept.ids[polarity]]
        card = build_card(
            torch.cat([positive, negative]),
            [True] * len(positive) + [False] * len(negative),
            [plan.kept.questions[example_id] for example_id in ids],
            layers=plan.layers,
            seed=plan.seed,
            methods=plan.methods,
            example_ids=ids,
        )
        folder.write_card({**card, "made_of": made_of})
    return 1


# --- the whole job --------------------------------------------------------------------------------------------------


def extract(job: Job, wanted: Vectors, listener: Listener) -> tuple[Engine, int]:
    """All stages. Returns the engine, and how many vectors and cards are new; a second run finds nothing to do."""
    engine = generate(job, MODES["batched"], listener)
    n_new = vectors(job, wanted, listener)
    for trait in job.traits:
        try:
            n_new += _validate_trait(job, trait, wanted, listener)
        except TraitError as failure:
            listener.note(f"{trait.name}: no held-out figures: {failure}")
    return engine, n_new
