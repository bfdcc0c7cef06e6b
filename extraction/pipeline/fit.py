"""Stage 3: fit a trait's directions to the activations of its kept responses.

Activations are read some layers at a time, so that memory holds the rows of those layers alone.

Shapes: L layers, k of them in a block, D hidden, N positive rows, M negative rows, n of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import parse_layers
from extraction.core.errors import ConfigError, StoreError, TraitError
from extraction.core.records import LAYER_CONVENTION, POLARITIES
from extraction.core.text import show_path
from extraction.judging.filtering import KeptResponses
from extraction.pipeline.plan import MODES, RunPlan
from extraction.pipeline.score import score_responses, usable_kept_responses
from extraction.pipeline.session import TraitContext, TraitResult
from extraction.pipeline.shards import is_done
from extraction.storage.atomic import digest
from extraction.storage.trait_run import TraitRun
from extraction.vectors.method_table import DEFAULT_METHODS, find_method

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.storage.lazy_tensors import LazyRows, LazyTensor
    from extraction.vectors.chunked import LayerBlock


@dataclass(frozen=True)
class VectorOptions:
    """Options of stage 3. None: the default methods, all captured layers, the first captured site and pooling."""

    methods: tuple[str, ...] | None = None
    layers: str | None = None
    site: str | None = None
    pooling: str | None = None


def check_options(plan: RunPlan, options: VectorOptions) -> None:
    """Raise ConfigError for a method, site or pooling that stage 3 would refuse after hours of generation."""
    for name in options.methods or ():
        find_method(name)
    settings = plan.experiment.capture
    pooled = [pooling for pooling in settings.poolings if pooling != "all"]
    tensor_name(plan, {f"{site}.{pooling}": None for site in settings.sites for pooling in pooled}, options)


def fit_trait(context: TraitContext, options: VectorOptions) -> tuple[FitInputs, TraitResult]:
    """Fit and write a direction for each method, all layers; the run must be locked.

    A vector file whose header says that it was made from the same activations, responses and layers is left as it is.
    A method without enough examples is an error (TraitError) if it was named, else a note.
    """
    inputs, run = fit_inputs(context, options), context.run
    headers = {method: run.vectors_header(method) for method in {*run.methods(), *inputs.methods}}
    stale = [method for method in inputs.methods if headers[method] != inputs.header(method)]
    fitted = _fit_methods(inputs, stale) if stale else {}
    written = _write_directions(inputs, fitted, are_named=options.methods is not None)
    current = [method for method, header in headers.items() if header and header["sources"] == inputs.sources]
    methods = tuple(sorted({*current, *written}))
    return inputs, TraitResult(context, inputs.kept, inputs.sources, methods, n_new=len(written))


@dataclass(frozen=True)
class StoredRows:
    """Stored activations [n, L, D], read as float32."""

    picked: LazyRows

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape [n, L, D]."""
        return self.picked.shape

    def read_layers(self, layers: slice) -> Tensor:
        """Return some layers of all rows: [n, k, D]."""
        return self.picked.read_layers(layers).float()


@dataclass(frozen=True)
class FitInputs:
    """The activations that a trait's vectors are fitted to, and how.

    `layers` are fitted, of those that were `captured`; `tensor` is the name of the activations, `site.pooling`.
    """

    context: TraitContext
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    captured: tuple[int, ...]
    tensor: str
    kept: KeptResponses

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.context.plan.experiment.seed

    @cached_property
    def sources(self) -> str:
        """The checksum of the activations and the kept responses."""
        return sources_digest(self.context.run, self.kept)

    @property
    def n_positive(self) -> int:
        """Number of positive rows, which come first."""
        return len(self.kept.ids["pos"])

    @property
    def ids(self) -> list[str]:
        """The ids of the kept responses, positive ones first."""
        return [example_id for polarity in POLARITIES for example_id in self.kept.ids[polarity]]

    @cached_property
    def stored(self) -> LazyTensor:
        """The activations of all examples."""
        return self.context.run.open_activations(self.tensor)

    @property
    def rows(self) -> StoredRows:
        """The activations [N + M, L, D] of the kept responses."""
        return self.pick(self.ids, self.stored)

    @property
    def rows_without_instruction(self) -> StoredRows:
        """The activations [N + M, L, D] of the same responses to prompts without the instruction."""
        return self.pick(self.ids, self.context.run.open_activations(self.tensor, stage="stripped"))

    def pick(self, ids: Sequence[str], stored: LazyTensor) -> StoredRows:
        """Return some examples' rows, in the order of `ids`."""
        return StoredRows(stored.pick(ids, [self.captured.index(layer) for layer in self.layers]))

    def header(self, method: str) -> dict[str, Any]:
        """Return the header of a method's vector file; equal headers mean equal vectors."""
        return {
            "trait": self.context.trait.name,
            "model": self.context.plan.spec.name,
            "method": method,
            "layers": list(self.layers),
            "activations": self.tensor,
            "seed": self.seed,
            "examples": self.kept.facts(),
            "sources": self.sources,
            "layer_convention": LAYER_CONVENTION,
        }


def fit_inputs(context: TraitContext, options: VectorOptions, *, like_stored: bool = False) -> FitInputs:
    """Return what a trait's vectors are fitted to; score responses that are not scored yet.

    `like_stored`: at the layers of the stored vectors, if there are any; ConfigError for layers that these lack.
    Raises StoreError for missing activations, ConfigError for an option that they do not fit, TraitError for a judge
    that keeps too little.
    """
    plan, run = context.plan, context.run
    for name in options.methods or ():
        find_method(name)
    count = len(plan.shards(context.trait))
    missing = [i for i in range(count) if not is_done(run, i, MODES["batched"])]
    if missing:
        raise StoreError(
            f"{show_path(run.path)}: {len(missing)} of {count} shards have no activations yet; "
            "run 1_generate_batched_simple.py first (`traitline extract` does all)"
        )
    receipt = run.shard_receipt("activations", 0)
    captured = tuple(receipt["meta"]["layers"])
    layers = _chosen_layers(options.layers, captured)
    methods = options.methods or DEFAULT_METHODS
    if like_stored:
        layers = _layers_of_vectors(run, methods, options.layers, layers)
    tensor = tensor_name(plan, receipt["tensors"], options)
    score_responses(context, again=False)
    return FitInputs(context, methods, layers, captured, tensor, usable_kept_responses(context))


def sources_digest(run: TraitRun, kept: KeptResponses) -> str:
    """Return the checksum of what vectors are made from: the activations, and the ids of the kept responses."""
    return digest([run.shard_checksums("activations"), kept.ids])


def _chosen_layers(spec: str | None, captured: tuple[int, ...]) -> tuple[int, ...]:
    if spec is None or spec.strip().lower() == "all":
        return captured
    layers = parse_layers(spec, max(captured) + 1)
    absent = sorted(set(layers) - set(captured))
    if absent:
        raise ConfigError(f"--layers {spec!r}: layer {absent[0]} was not captured; this run has {list(captured)}")
    return layers


def _layers_of_vectors(
    run: TraitRun, methods: Sequence[str], spec: str | None, chosen: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the layers that all stored vectors of these methods have; the chosen ones without stored vectors.

    Raises ConfigError if `spec` names others, or if the methods' vectors have no layer in common.
    """
    headers = {method: run.vectors_header(method) for method in methods if method in run.methods()}
    stored = {method: header["layers"] for method, header in headers.items() if header}
    common = tuple(layer for layer in chosen if all(layer in layers for layers in stored.values()))
    if common and (spec is None or common == chosen):
        return common
    if spec is None:
        has = "; ".join(f"{method} {layers}" for method, layers in stored.items())
        problem = f"the vectors have no layer in common: {has}"
    else:
        method, layer = next((name, layer) for layer in chosen for name in stored if layer not in stored[name])
        problem = f"--layers {spec!r}: the {method} vector has layers {stored[method]}, not {layer}"
    remedy = "give --layers that the vectors have, or make them at the same layers first (`traitline vectors`)"
    raise ConfigError(f"{show_path(run.path)}: {problem}; {remedy}")


def tensor_name(plan: RunPlan, stored: Mapping[str, Any], options: VectorOptions) -> str:
    """Return the name of the activations to read, `site.pooling`. Raises ConfigError if they are not `stored`."""
    settings = plan.experiment.capture
    pooled = [pooling for pooling in settings.poolings if pooling != "all"]
    name = f"{options.site or settings.sites[0]}.{options.pooling or next(iter(pooled), 'all')}"
    if name not in stored:
        raise ConfigError(
            f"--site/--pooling: this run has no activations {name!r}; it has "
            f"{', '.join(sorted(key for key in stored if '/' not in key)) or 'only every token (pooling all)'}"
        )
    return name


def _fit_methods(inputs: FitInputs, methods: Sequence[str]) -> dict[str, Tensor | TraitError]:
    """Fit all methods in one pass over the layers: directions [L, D], or the error of a method that has none."""
    import torch

    from extraction.vectors.chunked import layer_blocks

    fitted: dict[str, list[Tensor]] = {name: [] for name in methods}
    failed: dict[str, TraitError] = {}
    rows = inputs.rows
    for block in layer_blocks(rows.shape):
        rows_nkD = rows.read_layers(block.layers)
        sides = rows_nkD[: inputs.n_positive], rows_nkD[inputs.n_positive :]
        for name in [name for name in methods if name not in failed]:
            try:
                fitted[name].append(_fit_block(inputs, name, sides, block))
            except TraitError as failure:
                failed[name] = failure
        del rows_nkD, sides  # free this block before the next one is read
    return {name: failed[name] if name in failed else torch.cat(parts) for name, parts in fitted.items()}


def _fit_block(inputs: FitInputs, method: str, sides: tuple[Tensor, Tensor], block: LayerBlock) -> Tensor:
    from extraction.vectors.methods import fit_block
    from extraction.vectors.prepare import check_sides

    check_sides(*sides, layers=inputs.layers[block.layers])
    return fit_block(method, *sides, block, seed=inputs.seed)


def _write_directions(inputs: FitInputs, fitted: Mapping[str, Tensor | TraitError], *, are_named: bool) -> list[str]:
    """Write the directions; return their methods. Methods without one are an error if they were named, else a note."""
    trait, causes, written = inputs.context.trait.name, dict[str, list[str]](), list[str]()
    for method, direction in fitted.items():
        if isinstance(direction, TraitError):
            causes.setdefault(str(direction), []).append(method)
    missing = [f"{', '.join(methods)}: {cause}" for cause, methods in causes.items()]
    n_missing = sum(isinstance(direction, TraitError) for direction in fitted.values())
    if n_missing and (are_named or n_missing == len(inputs.methods)):
        raise TraitError(f"trait {trait}: no vector by {'; '.join(missing)}")
    for line in missing:
        inputs.context.progress.note(f"{trait}: no vector by {line}")
    for method, direction in fitted.items():
        if not isinstance(direction, TraitError):
            inputs.context.run.write_vectors(method, {"direction": direction}, inputs.header(method))
            written.append(method)
    return written
