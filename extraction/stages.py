"""The doors' bodies, and the only room that knows the order of the work: generate, capture, vectors, validate.

Each stage reads earlier folders of a run and writes its own. What is done is not done again; torch is imported only
when there is something to compute. A run is pinned when its first shard is due: a start that fails before leaves
nothing behind that another start would have to agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.atomic import digest
from extraction.configs import parse_layers
from extraction.errors import ConfigError, StoreError, TraitError
from extraction.evidence import (
    SWEEP_FORM,
    Material,
    capture_stripped,
    first_token_ratio,
    has_stripped,
    steering_evidence,
)
from extraction.jobs import MODES, Job, Mode
from extraction.judging import assemble, check_reader, scorer, usable_kept_of
from extraction.kept import Kept
from extraction.records import POLARITIES, Example, Trait
from extraction.runners import Engine, Listener, capture_shard, make_shard
from extraction.schema import show_path
from extraction.store import LAYER_CONVENTION, RunFolder

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]


def generate(job: Job, mode: Mode, listener: Listener) -> Engine:
    """Make the responses of every trait (and, as the mode says, their activations); judge them; write both."""
    engine = Engine(job)
    check_reader(job)
    for trait in job.traits:
        folder = job.folder(trait)
        with _working_in(folder, job, trait):
            _make_shards(engine, trait, folder, mode, listener)
            if job.is_whole:
                assemble(job, trait, folder, listener)
    return engine


@contextmanager
def _working_in(folder: RunFolder, job: Job, trait: Trait) -> Iterator[None]:
    """Hold the run's lock; refuse a run with another config at once, and a folder that can't be written to."""
    with folder.lock(shared=not job.is_whole):
        begun = folder.stored_config() is not None
        if begun or any(folder.shard_done("responses", i) for i in range(len(job.shards(trait)))):
            folder.open(job.config(trait))
        yield


def _make_shards(engine: Engine, trait: Trait, folder: RunFolder, mode: Mode, listener: Listener) -> None:
    job, mine = engine.job, engine.job.own_shards(trait)
    pending = {i: shard for i, shard in mine.items() if not _is_done(folder, i, mode)}
    if not pending:
        return
    _ = job.layers  # refused before the weights are loaded
    _load(engine, listener)
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


def _is_done(folder: RunFolder, index: int, mode: Mode) -> bool:
    return folder.shard_done("responses", index) and (not mode.captures or folder.shard_done("activations", index))


def _lacks_activations_alone(folder: RunFolder, index: int) -> bool:
    """True for responses that were made without a capture: they are not made again, but read."""
    return folder.shard_done("responses", index) and not folder.shard_facts("responses", index)["meta"]["captured"]


def _load(engine: Engine, listener: Listener) -> None:
    if not engine.is_loaded:
        listener.note(f"loading {engine.job.spec.name}")
        _ = engine.lm


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
        with _working_in(folder, job, trait):
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
    _load(engine, listener)
    with _progress(listener, f"{trait.name}: capturing stored responses", engine.job.own_shards(trait), pending):
        for i in pending:
            capture_shard(engine, folder, i, listener)


# --- vectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What stage 3 is asked for: methods (None: all), layers (None: all captured), and which activations to read."""

    methods: tuple[str, ...] | None = None
    layers: str | None = None
    site: str | None = None
    pooling: str | None = None


def vectors(job: Job, wanted: Vectors, listener: Listener) -> int:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps. Returns how many are new.

    A file that was made from the same activations, examples and layers is left as it is. A method that the examples
    are too few for is an error when it was named, a note when it was not.
    """
    return sum(_make_vectors(job, trait, wanted, listener) for trait in job.traits)


def _make_vectors(job: Job, trait: Trait, wanted: Vectors, listener: Listener) -> int:
    folder = job.folder(trait)
    with _working_in(folder, job, trait):
        plan = _plan_vectors(job, trait, folder, wanted, listener)
        stale = [name for name in plan.methods if folder.vectors_header(name) != plan.header(name)]
        return sum(_write_vector(plan, name, listener, named=wanted.methods is not None) for name in stale)


@dataclass(frozen=True)
class _Plan:
    """One trait's activations and what to make of them."""

    folder: RunFolder
    trait: str
    model: str
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    captured: tuple[int, ...]
    tensor: str
    seed: int
    kept: Kept

    @cached_property
    def sources(self) -> str:
        """What these vectors are made from."""
        return sources_of(self.folder, self.kept)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Positive [N, L, D] and negative [M, L, D] activations of the examples that count."""
        return self.sides_of("activations")

    def sides_of(self, stage: str) -> tuple[Tensor, Tensor]:
        """The same rows of another stage's files."""
        ids, activations_nLD = self.folder.load_activations(self.tensor, stage=stage)
        row_of = {example_id: row for row, example_id in enumerate(ids)}
        columns = [self.captured.index(layer) for layer in self.layers]
        rows = {polarity: [row_of[example_id] for example_id in self.kept.ids[polarity]] for polarity in POLARITIES}
        positive, negative = (activations_nLD[rows[polarity]][:, columns].float() for polarity in POLARITIES)
        return positive, negative

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


def _plan_vectors(job: Job, trait: Trait, folder: RunFolder, wanted: Vectors, listener: Listener) -> _Plan:
    from extraction.vectors.methods import DEFAULT_METHODS, find_method

    for name in wanted.methods or ():
        find_method(name)
    count = len(job.shards(trait))
    missing = [i for i in range(count) if not _is_done(folder, i, MODES["batched"])]
    if missing:
        raise StoreError(
            f"{show_path(folder.path)}: {len(missing)} of {count} shards have no activations yet; "
            "run 1_generate_batched_simple.py first (`traitline extract` does all)"
        )
    facts = folder.shard_facts("activations", 0)
    captured = tuple(facts["meta"]["layers"])
    layers = _chosen_layers(wanted.layers, captured)
    tensor = _chosen_tensor(job, facts["tensors"], wanted)
    assemble(job, trait, folder, listener, again=False)
    return _Plan(
        folder=folder,
        trait=trait.name,
        model=job.spec.name,
        methods=wanted.methods or DEFAULT_METHODS,
        layers=layers,
        captured=captured,
        tensor=tensor,
        seed=job.experiment.seed,
        kept=usable_kept_of(job, trait, folder),
    )


def sources_of(folder: RunFolder, kept: Kept) -> str:
    """The digest of what vectors are made from: the activations, and which of them count."""
    return digest([folder.sources("activations"), kept.ids])


def _chosen_layers(spec: str | None, captured: tuple[int, ...]) -> tuple[int, ...]:
    if spec is None or spec.strip().lower() == "all":
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


def _write_vector(plan: _Plan, method: str, listener: Listener, *, named: bool) -> int:
    from extraction.vectors.methods import find_method
    from extraction.vectors.sides import check_sides

    positive, negative = plan.sides
    try:
        check_sides(positive, negative, layers=plan.layers)
        direction_LD = find_method(method)(positive, negative, seed=plan.seed)
    except TraitError as failure:
        if named:
            raise TraitError(f"trait {plan.trait}: no {method} vector: {failure}") from failure
        listener.note(f"{plan.trait}: no {method} vector: {failure}")
        return 0
    plan.folder.write_vectors(method, {"direction": direction_LD}, plan.header(method))
    return 1


# --- validation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checks:
    """How much stage 4 asks. `quick`: of stored activations alone; else also of the model, `answers` a coefficient."""

    quick: bool = False
    answers: int = 24


def validate(job: Job, wanted: Vectors, checks: Checks, listener: Listener, engine: Engine) -> tuple[Engine, int]:
    """Stage 4: what each method and layer is worth on questions it has not seen. Returns how many files are new.

    `engine` is that of an earlier job, whose loaded model is used again where the two jobs have the same.
    """
    engine = engine.turned_to(job)
    return engine, sum(_validate_trait(engine, trait, wanted, checks, listener) for trait in job.traits)


def _validate_trait(engine: Engine, trait: Trait, wanted: Vectors, checks: Checks, listener: Listener) -> int:
    folder = engine.job.folder(trait)
    with _working_in(folder, engine.job, trait):
        plan = _plan_vectors(engine.job, trait, folder, wanted, listener)
        if not checks.quick:
            _load_if(
                not trait.is_natural and not has_stripped(engine.job, trait, folder, plan.tensor), engine, listener
            )
            capture_stripped(engine, trait, folder, plan.tensor, listener)
        n_new = _write_card(engine, trait, plan, checks, listener)
        n_new += 0 if checks.quick else _write_steering(engine, trait, plan, checks, listener)
        return max(n_new, _settle_verdict(plan))


def _load_if(needed: bool, engine: Engine, listener: Listener) -> None:
    if needed:
        _load(engine, listener)


def _write_card(engine: Engine, trait: Trait, plan: _Plan, checks: Checks, listener: Listener) -> int:
    import torch

    from extraction.vectors.validation import CARD_FORM, build_card

    folder = plan.folder
    stripped = has_stripped(engine.job, trait, folder, plan.tensor)
    old = folder.read_card() if folder.has_card() else {}
    ratio_L = _token_0(engine, plan, old, checks, listener)
    made_of = {
        **plan.header("card"),
        "methods": list(plan.methods),
        "form": CARD_FORM,
        "stripped": folder.sources("stripped") if stripped else None,
        "token_0": ratio_L is not None,
    }
    if old.get("made_of") == made_of:
        return 0
    ids = [example_id for polarity in POLARITIES for example_id in plan.kept.ids[polarity]]
    instruction_of = {
        row["id"]: row["instruction_id"] for polarity in POLARITIES for row in folder.read_responses(polarity)
    }
    card = build_card(
        torch.cat(plan.sides),
        [True] * len(plan.kept.ids["pos"]) + [False] * len(plan.kept.ids["neg"]),
        [plan.kept.questions[example_id] for example_id in ids],
        instruction_ids=[instruction_of[example_id] for example_id in ids],
        layers=plan.layers,
        seed=plan.seed,
        methods=plan.methods,
        example_ids=ids,
        stripped_nLD=torch.cat(plan.sides_of("stripped")) if stripped else None,
        token_0_ratio_L=ratio_L,
        facts=plan.kept.facts(),
    )
    folder.write_card({**card, "made_of": made_of})
    return 1


def _token_0(
    engine: Engine, plan: _Plan, old: Mapping[str, Any], checks: Checks, listener: Listener
) -> list[float] | None:
    """The first token's norm over the others', by layer; from the card where it was measured for these layers."""
    measured = old.get("token_0")
    if measured is not None and old["layers"] == list(plan.layers):
        return list(measured["ratio"])
    if checks.quick:
        return None
    _load(engine, listener)
    return first_token_ratio(engine, plan.folder, plan.layers)


def _write_steering(engine: Engine, trait: Trait, plan: _Plan, checks: Checks, listener: Listener) -> int:
    """vectors/steering.json, by directions that are fitted without the questions that are reported on."""
    folder, judge = plan.folder, plan.kept.judge
    if judge == "none":
        listener.note(f"{trait.name}: no steering sweep: without a judge there is no telling what it does")
        return 0
    chosen = folder.read_card()["chosen"]["method"]
    made_of = {**plan.header("steering"), "form": SWEEP_FORM, "chosen": chosen, "answers": checks.answers}
    if folder.has_steering() and folder.read_steering().get("made_of") == made_of:
        return 0
    _load(engine, listener)
    material = _material(plan, ("mean_diff", chosen), checks.answers)
    found = steering_evidence(engine, trait, material, scorer(engine.job, trait, listener, folder=folder), listener)
    folder.write_steering({**found, "judge": judge, "made_of": made_of})
    return 1


def _settle_verdict(plan: _Plan) -> int:
    """The card's verdict, with what steering did where that is of these vectors. 1 where the card had another."""
    from extraction.vectors.verdict import verdict

    folder = plan.folder
    card = folder.read_card()
    steering = folder.read_steering() if folder.has_steering() else None
    if steering is not None and steering["made_of"]["sources"] != plan.sources:
        steering = None
    settled = verdict(card, steering)
    if settled == card["verdict"]:
        return 0
    folder.write_card({**card, "verdict": settled})
    return 1


def _material(plan: _Plan, methods: Sequence[str], answers: int) -> Material:
    """Rows about the questions that steering is not reported on."""
    import torch

    from extraction.vectors.splits import PARTS, deal_questions

    questions = {side: [plan.kept.questions[i] for i in plan.kept.ids[side]] for side in POLARITIES}
    both = [*questions["pos"], *questions["neg"]]
    labels_n = torch.tensor([True] * len(questions["pos"]) + [False] * len(questions["neg"]))
    fit, validation, test = deal_questions(both, labels_n, tuple(PARTS.values()), seed=plan.seed)
    choose_on, report_on = sorted(fit | validation), sorted(test)  # the card's own parts
    positive, negative = (
        rows[[question in choose_on for question in questions[side]]]
        for side, rows in zip(POLARITIES, plan.sides, strict=True)
    )
    norms_L = torch.cat([positive, negative]).norm(dim=-1).mean(0).tolist()
    return Material(
        positive, negative, norms_L, plan.layers, tuple(dict.fromkeys(methods)), choose_on, report_on, answers
    )


# --- the whole job --------------------------------------------------------------------------------------------------


def extract(job: Job, wanted: Vectors, checks: Checks, listener: Listener) -> tuple[Engine, int]:
    """All stages. Returns the engine, and how many results are new; a second run finds nothing to do."""
    _check_wanted(job, wanted)
    engine = generate(job, MODES["batched"], listener)
    if not job.is_whole:
        return engine, 0
    n_new = vectors(job, wanted, listener)
    for trait in job.traits:
        try:
            n_new += _validate_trait(engine, trait, wanted, checks, listener)
        except TraitError as failure:
            listener.note(f"{trait.name}: no held-out figures: {failure}")
    return engine, n_new


def _check_wanted(job: Job, wanted: Vectors) -> None:
    """What stage 3 would refuse hours later is refused now."""
    if wanted.methods is not None:
        from extraction.vectors.methods import find_method

        for name in wanted.methods:
            find_method(name)
    settings = job.experiment.capture
    _chosen_tensor(job, {f"{s}.{p}": None for s in settings.sites for p in settings.poolings if p != "all"}, wanted)
