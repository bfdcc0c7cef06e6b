"""Stage 3: a run's vectors, from the responses that count.

Rows are read some layers at a time, so that memory holds what one layer needs and not what all do.

Shapes: L layers, k of them, D hidden, N positive rows, M negative rows, n of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import parse_layers
from extraction.core.errors import ConfigError, StoreError, TraitError
from extraction.core.progress import ProgressReporter
from extraction.core.records import LAYER_CONVENTION, POLARITIES, Trait
from extraction.core.text import show_path
from extraction.judging.filtering import KeptResponses
from extraction.pipeline.plan import MODES, RunPlan
from extraction.pipeline.score import score_responses, usable_kept_responses
from extraction.pipeline.session import is_done, locked_run
from extraction.storage.atomic import digest
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.storage.lazy_tensors import LazyRows, LazyTensor
    from extraction.vectors.chunked import LayerBlock


@dataclass(frozen=True)
class VectorOptions:
    """What stage 3 is asked for: methods (None: all), layers (None: all captured), and which activations to read."""

    methods: tuple[str, ...] | None = None
    layers: str | None = None
    site: str | None = None
    pooling: str | None = None


def fit_vectors(job: RunPlan, wanted: VectorOptions, listener: ProgressReporter) -> int:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps. Returns how many are new.

    A file that was made from the same activations, examples and layers is left as it is. A method that the examples
    are too few for is an error when it was named, a note when it was not.
    """
    return sum(_of_trait(job, trait, wanted, listener) for trait in job.traits)


def _of_trait(job: RunPlan, trait: Trait, wanted: VectorOptions, listener: ProgressReporter) -> int:
    folder = job.folder(trait)
    with locked_run(folder, job, trait):
        plan = fit_inputs(job, trait, folder, wanted, listener)
        stale = [name for name in plan.methods if folder.vectors_header(name) != plan.header(name)]
        found = _find_directions(plan, stale) if stale else {}
        return sum(_write_vector(plan, *each, listener, named=wanted.methods is not None) for each in found.items())


@dataclass(frozen=True)
class StoredRows:
    """Stored rows [n, L, D] in float32."""

    picked: LazyRows

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""
        return self.picked.shape

    def read_layers(self, layers: slice) -> Tensor:
        """Some layers of all rows: [n, k, D]."""
        return self.picked.read_layers(layers).float()


@dataclass(frozen=True)
class FitInputs:
    """One trait's activations and what to make of them."""

    folder: TraitRun
    trait: str
    model: str
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    captured: tuple[int, ...]
    tensor: str
    seed: int
    kept: KeptResponses

    @cached_property
    def sources(self) -> str:
        """What these vectors are made from."""
        return sources_digest(self.folder, self.kept)

    @property
    def n_positive(self) -> int:
        """How many of the rows are positive: those come first."""
        return len(self.kept.ids["pos"])

    @cached_property
    def stored(self) -> LazyTensor:
        """The activations of all examples."""
        return self.folder.open_activations(self.tensor)

    @property
    def rows(self) -> StoredRows:
        """The activations [N + M, L, D] of the examples that count."""
        return self.pick(self._ids, self.stored)

    @property
    def stripped(self) -> StoredRows:
        """The same rows without the instruction in their context."""
        return self.pick(self._ids, self.folder.open_activations(self.tensor, stage="stripped"))

    def pick(self, ids: Sequence[str], stored: LazyTensor) -> StoredRows:
        """Some examples' rows, in the order of their ids."""
        return StoredRows(stored.pick(ids, [self.captured.index(layer) for layer in self.layers]))

    @property
    def _ids(self) -> list[str]:
        return [example_id for polarity in POLARITIES for example_id in self.kept.ids[polarity]]

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


def fit_inputs(
    job: RunPlan, trait: Trait, folder: TraitRun, wanted: VectorOptions, listener: ProgressReporter
) -> FitInputs:
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
    facts = folder.shard_receipt("activations", 0)
    captured = tuple(facts["meta"]["layers"])
    layers = _chosen_layers(wanted.layers, captured)
    tensor = chosen_tensor(job, facts["tensors"], wanted)
    score_responses(job, trait, folder, listener, again=False)
    return FitInputs(
        folder=folder,
        trait=trait.name,
        model=job.spec.name,
        methods=wanted.methods or DEFAULT_METHODS,
        layers=layers,
        captured=captured,
        tensor=tensor,
        seed=job.experiment.seed,
        kept=usable_kept_responses(job, trait, folder),
    )


def sources_digest(folder: TraitRun, kept: KeptResponses) -> str:
    """The digest of what vectors are made from: the activations, and which of them count."""
    return digest([folder.shard_checksums("activations"), kept.ids])


def _chosen_layers(spec: str | None, captured: tuple[int, ...]) -> tuple[int, ...]:
    if spec is None or spec.strip().lower() == "all":
        return captured
    layers = parse_layers(spec, max(captured) + 1)
    absent = sorted(set(layers) - set(captured))
    if absent:
        raise ConfigError(f"--layers {spec!r}: layer {absent[0]} was not captured; this run has {list(captured)}")
    return layers


def chosen_tensor(job: RunPlan, stored: Mapping[str, Any], wanted: VectorOptions) -> str:
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


def _find_directions(plan: FitInputs, methods: Sequence[str]) -> dict[str, Tensor | TraitError]:
    """Each method's directions [L, D], or why there are none; all methods in one pass over the layers."""
    import torch

    from extraction.vectors.chunked import layer_blocks

    found: dict[str, list[Tensor]] = {name: [] for name in methods}
    failed: dict[str, TraitError] = {}
    rows = plan.rows
    for block in layer_blocks(rows.shape):
        rows_nkD = rows.read_layers(block.layers)
        sides = rows_nkD[: plan.n_positive], rows_nkD[plan.n_positive :]
        for name in [name for name in methods if name not in failed]:
            try:
                found[name].append(_fit(plan, name, sides, block))
            except TraitError as failure:
                failed[name] = failure
        del rows_nkD, sides  # before the next ones are read
    return {name: failed[name] if name in failed else torch.cat(parts) for name, parts in found.items()}


def _fit(plan: FitInputs, method: str, sides: tuple[Tensor, Tensor], block: LayerBlock) -> Tensor:
    from extraction.vectors.methods import fit_block
    from extraction.vectors.prepare import check_sides

    check_sides(*sides, layers=plan.layers[block.layers])
    return fit_block(method, *sides, block, seed=plan.seed)


def _write_vector(
    plan: FitInputs, method: str, found: Tensor | TraitError, listener: ProgressReporter, *, named: bool
) -> int:
    if isinstance(found, TraitError):
        if named:
            raise TraitError(f"trait {plan.trait}: no {method} vector: {found}") from found
        listener.note(f"{plan.trait}: no {method} vector: {found}")
        return 0
    plan.folder.write_vectors(method, {"direction": found}, plan.header(method))
    return 1
