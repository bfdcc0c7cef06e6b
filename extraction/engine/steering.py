"""Steering: vectors added to, or removed from, the residual stream of single rows of a running batch.

Every row of a batch has its own steering (or none), so a whole sweep of coefficients runs as one batch. A row's result
does not depend on its neighbours' steering, and a vector of zeros changes no bit of it.

Shapes: B rows, T tokens, K steered layers, D hidden, R rows that enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.core.errors import ConfigError
from extraction.model.hooks import steer

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

POSITIONS = ("all", "response")


@dataclass(frozen=True)
class Steering:
    """Steering vectors of one row: layer -> vector [D], where layer k is the output of decoder block k, from 0.

    `add` is added to the stream (activation addition; Turner et al. 2023, arXiv 2308.10248; Rimsky et al. 2023, arXiv
    2312.06681). `ablate` is the unit vector whose component is removed, x - r r^T x, before anything is added
    (directional ablation; Arditi et al. 2024, arXiv 2406.11717, equation 4). `positions`: `all` tokens of prompt and
    response, or `response`: those that a response token is predicted from, the prompt's last and every later one.
    """

    add: Mapping[int, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    ablate: Mapping[int, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    positions: str = "all"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ConfigError(f"steering positions {self.positions!r}: use one of {', '.join(POSITIONS)}")

    @property
    def layers(self) -> frozenset[int]:
        """Layers whose output is changed."""
        return frozenset(self.add) | frozenset(self.ablate)


NO_STEERING = Steering()


def check_steering(steering: Steering, lm: LanguageModel) -> None:
    """Raise ConfigError for a layer that the model lacks, a vector of another width, or one that is not finite."""
    for layer, vector_D in [*steering.add.items(), *steering.ablate.items()]:
        if not 0 <= layer < lm.n_layers:
            raise ConfigError(f"steering at layer {layer}: the model has layers 0 to {lm.n_layers - 1}")
        if tuple(vector_D.shape) != (lm.hidden_size,):
            raise ConfigError(
                f"steering at layer {layer}: a vector of shape {list(vector_D.shape)}, where the model's hidden size is"
                f" {lm.hidden_size}; use a vector that was made with this model"
            )
        if not vector_D.isfinite().all():
            raise ConfigError(f"steering at layer {layer}: the vector is NaN or infinite; use a smaller coefficient")


class SteeringHook:
    """Holds every slot's steering vectors on the device and applies them to the residual stream."""

    def __init__(self, lm: LanguageModel, steerings: Sequence[Steering], slots: int) -> None:
        self.layers = tuple(sorted(frozenset[int]().union(*(steering.layers for steering in steerings))))
        self.modules = {point: lm.layers[layer] for point, layer in enumerate(self.layers)}
        wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
        shape = (len(self.layers), slots, lm.hidden_size)
        self.add_KBD = torch.zeros(shape, dtype=wide, device=lm.device)
        ablates = any(steering.ablate for steering in steerings)
        self.unit_KBD = torch.zeros(shape, dtype=wide, device=lm.device) if ablates else None
        self.prompts_B11 = torch.ones(slots, 1, 1, dtype=torch.bool, device=lm.device)
        self._change: Callable[[int, Tensor], Tensor] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Register the hooks for a whole run; they change nothing outside of `during_prefill` and `during_step`."""

        def change(point: int, hidden: Tensor) -> Tensor:
            return hidden if self._change is None else self._change(point, hidden)

        with steer(self.modules, change):
            yield

    def assign(self, rows_R: Tensor, steerings: Sequence[Steering]) -> None:
        """Give rows the steering of the requests that they take."""
        self.prompts_B11[rows_R, 0, 0] = torch.tensor([s.positions == "all" for s in steerings]).to(rows_R.device)
        for buffer_KBD, vectors in self._buffers(steerings):
            for point, layer in enumerate(self.layers):
                zero_D = torch.zeros_like(buffer_KBD[point, 0])
                rows_D = [by_layer[layer].to(zero_D) if layer in by_layer else zero_D for by_layer in vectors]
                buffer_KBD[point, rows_R] = torch.stack(rows_D)

    def _buffers(self, steerings: Sequence[Steering]) -> Iterator[tuple[Tensor, list[Mapping[int, Tensor]]]]:
        yield self.add_KBD, [steering.add for steering in steerings]
        if self.unit_KBD is not None:
            yield self.unit_KBD, [steering.ablate for steering in steerings]

    @contextmanager
    def during_prefill(self, rows_R: Tensor, mask_RP: Tensor) -> Iterator[None]:
        """Apply the rows' steering during their left-padded prefill."""
        live_R1 = self.prompts_B11[rows_R]
        last_1P1 = (torch.arange(mask_RP.shape[1], device=mask_RP.device) == mask_RP.shape[1] - 1)[None, :, None]
        with self._applying(lambda point: self._vectors(point, rows_R), mask_RP.shape, live_R1 | last_1P1):
            yield

    @contextmanager
    def during_text(self, n_prompt: int, width: int) -> Iterator[None]:
        """Apply steering during one pass of every slot over a whole text of `width` tokens, without padding."""
        later_1T1 = (torch.arange(width, device=self.prompts_B11.device) >= n_prompt - 1)[None, :, None]
        shape_BT = (len(self.prompts_B11), width)
        with self._applying(lambda point: self._vectors(point, None), shape_BT, self.prompts_B11 | later_1T1):
            yield

    @contextmanager
    def during_step(self, width: int) -> Iterator[None]:
        """Apply steering during one decode step, `width` tokens of every slot."""
        with self._applying(lambda point: self._vectors(point, None), (len(self.prompts_B11), width), None):
            yield

    def select_rows(self, rows_B: Tensor) -> None:
        """Make the rows these ones."""
        self.add_KBD, self.prompts_B11 = self.add_KBD[:, rows_B], self.prompts_B11[rows_B]
        self.unit_KBD = None if self.unit_KBD is None else self.unit_KBD[:, rows_B]

    def _vectors(self, point: int, rows_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors that are added and ablated at a point, [B, D] each."""
        add_BD = self.add_KBD[point]
        unit_BD = None if self.unit_KBD is None else self.unit_KBD[point]
        if rows_R is None:
            return add_BD, unit_BD
        return add_BD[rows_R], None if unit_BD is None else unit_BD[rows_R]

    @contextmanager
    def _applying(
        self,
        vectors: Callable[[int], tuple[Tensor, Tensor | None]],
        shape_BT: tuple[int, ...],
        live_BT1: Tensor | None,
    ) -> Iterator[None]:
        def change(point: int, hidden: Tensor) -> Tensor:
            hidden_BTD = hidden.reshape(*shape_BT, hidden.shape[-1])  # some blocks work on flattened tokens
            changed_BTD = steer_hidden(hidden_BTD, *vectors(point))
            if live_BT1 is not None:
                changed_BTD = torch.where(live_BT1.to(hidden.device), changed_BTD, hidden_BTD)
            return changed_BTD.reshape(hidden.shape)

        self._change = change
        try:
            yield
        finally:
            self._change = None


def steer_hidden(hidden_BTD: Tensor, add_BD: Tensor, unit_BD: Tensor | None) -> Tensor:
    """Return the hidden states less their component along `unit`, plus `add`; computed in float32 or wider."""
    wide_BTD = hidden_BTD.to(add_BD.dtype)
    device = hidden_BTD.device
    if unit_BD is not None:
        unit_B1D = unit_BD.to(device).unsqueeze(1)
        wide_BTD = wide_BTD - (wide_BTD * unit_B1D).sum(-1, keepdim=True) * unit_B1D
    return (wide_BTD + add_BD.to(device).unsqueeze(1)).to(hidden_BTD.dtype)
