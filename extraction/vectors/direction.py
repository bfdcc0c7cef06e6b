"""Direction: one vector a layer as a value that can be added, scaled and compared.

Layer k is the output of decoder block k, counted from 0. Shapes: L layers, D hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extraction.core.errors import VectorError
from extraction.core.records import LAYER_CONVENTION
from extraction.storage.trait_run import TraitRun

LABELS = ("trait", "method", "model")


@dataclass(frozen=True, eq=False)
class Direction:
    """float32 [L, D], row i of decoder block layers[i]. Labels are None where they are not known.

    Only directions of the same hidden size, layers and model can be added or compared: a union of unequal layers would
    be a sum at some layers and not at others. Choose common layers with `select` first. Equal directions have the same
    layers, model and float32 values; the labels `trait` and `method` do not count.
    """

    direction_LD: Tensor
    layers: tuple[int, ...]
    trait: str | None = None
    method: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _check_layers(self.layers))
        object.__setattr__(self, "direction_LD", _copy_values(self.direction_LD, self.layers))

    # Making

    @classmethod
    def from_layers(cls, vectors: Mapping[int, Tensor], **labels: str | None) -> Direction:
        """Make a direction from one vector [D] a layer, in any order."""
        layers = sorted(vectors)
        sizes = sorted({tuple(vectors[layer].shape) for layer in layers})
        if len(sizes) > 1 or not sizes or len(sizes[0]) != 1:
            raise VectorError(f"vectors of shapes {sizes}: a direction needs one vector a layer, all of one length")
        return cls(torch.stack([vectors[layer].float() for layer in layers]), tuple(layers), **labels)

    @classmethod
    def from_run(cls, folder: TraitRun | str | os.PathLike[str], method: str) -> Direction:
        """Read a run's vectors of one method. Raises VectorError where it has none."""
        run = folder if isinstance(folder, TraitRun) else TraitRun(Path(folder))
        known = run.methods()
        if method not in known:
            remedy = f"it has {', '.join(known)}" if known else "make them first (`traitline extract` does all)"
            raise VectorError(f"{run.path}: no vectors of {method!r}; {remedy}")
        tensors, header = run.read_vectors(method)
        return cls.from_file(tensors, header, str(run.vectors_path(method)))

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> Direction:
        """Make a direction from the content of a vectors file of Traitline's. Raises VectorError for another file."""
        if header.get("layer_convention") != LAYER_CONVENTION or "direction" not in tensors:
            raise VectorError(f"{source}: not a vectors file of Traitline: no 'direction' or no layer convention in it")
        labels = {label: header.get(label) for label in LABELS}
        return cls(tensors["direction"], tuple(header.get("layers", ())), **labels)

    # Reading

    @property
    def hidden_size(self) -> int:
        """Number of values of each vector, D."""
        return int(self.direction_LD.shape[1])

    @property
    def norms_L(self) -> Tensor:
        """Norm of each layer's vector, float64 [L]."""
        norms_L: Tensor = self.direction_LD.double().norm(dim=1)
        return norms_L

    def at(self, layer: int) -> Tensor:
        """Return a copy of one layer's vector, [D]."""
        if layer not in self.layers:
            raise VectorError(f"layer {layer}: this direction has {format_layers(self.layers)}")
        return self.direction_LD[self.layers.index(layer)].clone()

    def select(self, layers: Sequence[int]) -> Direction:
        """Return the direction at some of its layers."""
        return replace(self, direction_LD=torch.stack([self.at(layer) for layer in layers]), layers=tuple(layers))

    def check_fits(self, n_layers: int, hidden_size: int, model: str) -> None:
        """Raise VectorError unless a model of this size can be steered along this direction."""
        if self.hidden_size != hidden_size:
            raise VectorError(f"a direction of {self.hidden_size} values; model {model} has hidden size {hidden_size}")
        if self.layers[-1] >= n_layers:
            raise VectorError(
                f"a direction at layer {self.layers[-1]}; the last layer of model {model} is {n_layers - 1}"
            )

    def cosine(self, other: Direction) -> Tensor:
        """Compute the cosine with another direction at every layer, float64 [L]; NaN where either is zero."""
        self._check_compatible(other)
        products_L = (self.direction_LD.double() * other.direction_LD.double()).sum(1)
        return products_L / (self.norms_L * other.norms_L)

    # Arithmetic

    def __add__(self, other: object) -> Direction:
        total: Direction = self._combine(other, +1, "+")
        return total

    def __sub__(self, other: object) -> Direction:
        difference: Direction = self._combine(other, -1, "-")
        return difference

    def __neg__(self) -> Direction:
        return replace(self, direction_LD=-self.direction_LD)

    def __mul__(self, factor: object) -> Direction:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise VectorError(f"{factor} times a direction; give a finite number")
        return replace(self, direction_LD=self.direction_LD * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Direction:
        if isinstance(divisor, bool) or not isinstance(divisor, int | float):
            return NotImplemented
        if divisor == 0 or not math.isfinite(divisor):
            raise VectorError(f"a direction over {divisor}; give a finite number that is not 0")
        return replace(self, direction_LD=self.direction_LD / divisor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        same_kind = (self.layers, self.model) == (other.layers, other.model)
        return same_kind and torch.equal(self.direction_LD, other.direction_LD)

    __hash__ = None  # type: ignore[assignment]

    def normalised(self, length_L: Sequence[float] | None = None) -> Direction:
        """Scale every layer's vector to norm 1, or to `length_L`. Raises VectorError for a zero vector."""
        zero = [layer for layer, norm in zip(self.layers, self.norms_L.tolist(), strict=True) if norm == 0]
        if zero:
            raise VectorError(f"layer {zero[0]} is zero, so it has no direction to normalise; leave it out")
        lengths_L = torch.ones(len(self.layers)) if length_L is None else torch.tensor(length_L)
        scaled_LD = self.direction_LD.double() * (lengths_L.double() / self.norms_L).unsqueeze(1)
        return replace(self, direction_LD=scaled_LD)

    def _combine(self, other: object, sign: int, operator: str) -> Any:
        if not isinstance(other, Direction):
            return NotImplemented
        self._check_compatible(other)
        return Direction(
            self.direction_LD + sign * other.direction_LD,
            self.layers,
            trait=_combine_labels(self.trait, other.trait, operator),
            method=_combine_labels(self.method, other.method, operator),
            model=self.model or other.model,
        )

    def _check_compatible(self, other: Direction) -> None:
        """Raise VectorError unless the two can be added. An unknown model matches any."""
        if self.hidden_size != other.hidden_size:
            raise VectorError(f"directions of {self.hidden_size} and {other.hidden_size} values are not of one model")
        if self.model and other.model and self.model != other.model:
            raise VectorError(f"directions of two models, {self.model} and {other.model}, have nothing in common")
        if self.layers != other.layers:
            spans = f"{format_layers(self.layers)} and at {format_layers(other.layers)}"
            raise VectorError(f"directions at {spans}: select the layers that both have first")


def _combine_labels(one: str | None, other: str | None, operator: str) -> str | None:
    return one if one == other else f"{one or 'unknown'} {operator} {other or 'unknown'}"


def format_layers(layers: Sequence[int]) -> str:
    """Format layers for a message: `layers 1-3, 7`."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer - 1]
    ends = [*starts[1:], len(layers)]
    runs = [(layers[start], layers[end - 1]) for start, end in zip(starts, ends, strict=True)]
    return "layers " + ", ".join(f"{low}-{high}" if low < high else f"{low}" for low, high in runs)


def _check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if not layers or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
        raise VectorError(f"layers {list(layers)}: a direction needs layer numbers, counted from 0")
    if list(layers) != sorted(set(layers)):
        raise VectorError(f"layers {list(layers)}: each layer once, in increasing order")
    return tuple(layers)


def _copy_values(values: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Return a float32 copy, which no other holder of the tensor can change."""
    if values.ndim != 2 or len(values) != len(layers) or values.shape[1] == 0 or not values.is_floating_point():
        kind = f"{values.dtype} {list(values.shape)}".removeprefix("torch.")
        raise VectorError(f"a direction of {kind} at {len(layers)} layers; floats [layers, hidden] are needed")
    copy_LD = values.detach().to("cpu", torch.float32, copy=True)
    broken = [layer for layer, row in zip(layers, copy_LD, strict=True) if not row.isfinite().all()]
    if broken:
        raise VectorError(f"layer {broken[0]} holds NaN or Inf, or a value too large for float32")
    return copy_LD
