"""Stage 3: a run's vectors, from the responses that count.

Shapes: L layers, D hidden, N positive rows, M negative rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.atomic import digest
from extraction.configs import parse_layers
from extraction.errors import ConfigError, StoreError, TraitError
from extraction.jobs import MODES, Job
from extraction.judging import assemble, usable_kept_of
from extraction.kept import Kept
from extraction.records import POLARITIES, Trait
from extraction.runners import Listener, is_done, working_in
from extraction.schema import show_path
from extraction.store import LAYER_CONVENTION, RunFolder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Vectors:
    """What stage 3 is asked for: methods (None: all), layers (None: all captured), and which activations to read."""

    methods: tuple[str, ...] | None = None
    layers: str | None = None
    site: str | None = None
    pooling: str | None = None


def make_vectors(job: Job, wanted: Vectors, listener: Listener) -> int:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps. Returns how many are new.

    A file that was made from the same activations, examples and layers is left as it is. A method that the examples
    are too few for is an error when it was named, a note when it was not.
    """
    return sum(_of_trait(job, trait, wanted, listener) for trait in job.traits)


def _of_trait(job: Job, trait: Trait, wanted: Vectors, listener: Listener) -> int:
    folder = job.folder(trait)
    with working_in(folder, job, trait):
        plan = plan_vectors(job, trait, folder, wanted, listener)
        stale = [name for name in plan.methods if folder.vectors_header(name) != plan.header(name)]
        return sum(_write_vector(plan, name, listener, named=wanted.methods is not None) for name in stale)


@dataclass(frozen=True)
class Fit:
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


def plan_vectors(job: Job, trait: Trait, folder: RunFolder, wanted: Vectors, listener: Listener) -> Fit:
    """What a trait's vectors are to be made from. Raises StoreError, ConfigError where that is not there."""
    from extraction.vectors.methods import DEFAULT_METHODS, find_method

    for name in wanted.methods or ():
        find_method(name)
    count = len(job.shards(trait))
    missing = [i for i in range(count) if not is_done(folder, i, MODES["batched"])]
    if missing:
        raise StoreError(
            f"{show_path(folder.path)}: {len(missing)} of {count} shards have no activations yet; "
            "run 1_generate_batched_simple.py first (`traitline extract` does all)"
        )
    facts = folder.shard_facts("activations", 0)
    captured = tuple(facts["meta"]["layers"])
    layers = _chosen_layers(wanted.layers, captured)
    tensor = chosen_tensor(job, facts["tensors"], wanted)
    assemble(job, trait, folder, listener, again=False)
    return Fit(
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


def chosen_tensor(job: Job, stored: Mapping[str, Any], wanted: Vectors) -> str:
    """The name of the tensor that is asked for. Raises ConfigError where the run has no such activations."""
    settings = job.experiment.capture
    pooled = [pooling for pooling in settings.poolings if pooling != "all"]
    name = f"{wanted.site or settings.sites[0]}.{wanted.pooling or next(iter(pooled), 'all')}"
    if name not in stored:
        raise ConfigError(
            f"--site/--pooling: this run has no activations {name!r}; it has "
            f"{', '.join(sorted(key for key in stored if '/' not in key)) or 'only every token (pooling all)'}"
        )
    return name


def _write_vector(plan: Fit, method: str, listener: Listener, *, named: bool) -> int:
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
