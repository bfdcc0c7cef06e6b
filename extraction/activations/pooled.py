"""Pooled activations of a running batch, read through hooks in the same pass that generates.

A token's activation is a layer's output at the position where that token is the INPUT. Sums run on the device in
float32 (float64 for float64 models), one vector per slot; a half-precision running sum would stick.

Shapes: K points (site by layer), B slots, R rows that enter, P prompt columns, L layers, D hidden, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from extraction.activations.sites import taps_of, watch_taps
from extraction.core.errors import ActivationError, ModelError
from extraction.core.pooling import parse_pooling, pool_mean
from extraction.model.devices import to_host
from extraction.model.hooks import StopForward, watch

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel


class CaptureHook(Protocol):
    """Captures activations of a running batch, slot by slot."""

    def attached(self) -> AbstractContextManager[None]:
        """Register forward hooks for a whole run."""

    def during_prefill(self, rows_R: Tensor, mask_RP: Tensor) -> AbstractContextManager[None]:
        """Capture the prefill of the rows that enter."""

    def during_step(self, width: int) -> AbstractContextManager[None]:
        """Capture one decode step, `width` tokens of every slot."""

    def commit_tokens(self, age_B: Tensor, counts: Sequence[int] | None = None) -> None:
        """Count the first `counts[slot]` tokens of the step (None: the only one), the first of them aged `age_B`."""

    def emit(self, ended: Sequence[EndedRow]) -> list[dict[str, Tensor] | ActivationError]:
        """Return the activations of each slot that has ended, by name; an error for one that has NaN or Inf."""

    def select_rows(self, rows_B: Tensor) -> None:
        """Make the slots these rows; one that is named again is a free slot."""


@dataclass(frozen=True)
class EndedRow:
    """A slot whose response has ended, and its number of tokens."""

    slot: int
    n_tokens: int
    example_id: str


class CaptureSpec(Protocol):
    """Specification of the activations to capture."""

    def hook(self, lm: LanguageModel, slots: int, width: int) -> CaptureHook:
        """Make the hook for a running batch. Raises ModelError if the model lacks the site."""


@dataclass(frozen=True)
class Capture:
    """Layers (from 0), sites and poolings to capture of every example."""

    layers: tuple[int, ...]
    sites: tuple[str, ...] = ("residual",)
    poolings: tuple[str, ...] = ("response_mean",)

    def hook(self, lm: LanguageModel, slots: int, width: int) -> PooledCapture:
        """Make the hook for a running batch."""
        return PooledCapture(lm, self, slots, width)

    def by_site(self, pooled: dict[str, Tensor], example_id: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Split {pooling: [.., K, D]} into {`site.pooling`: [.., L, D]}. Raises ActivationError on NaN or Inf."""
        n_layers = len(self.layers)
        split = {
            f"{site}.{pooling}": points.narrow(-2, i * n_layers, n_layers).contiguous()
            for pooling, points in pooled.items()
            for i, site in enumerate(self.sites)
        }
        for name, hidden_LD in split.items():
            self._refuse_non_finite(name, hidden_LD, example_id, dtype)
        return split

    def _refuse_non_finite(self, name: str, hidden_LD: Tensor, example_id: str, dtype: torch.dtype) -> None:
        if hidden_LD.isfinite().all():
            return
        bad_L = ~hidden_LD.isfinite().all(-1).reshape(-1, len(self.layers)).all(0)
        layer = self.layers[int(bad_L.nonzero()[0, 0])]
        raise ActivationError(
            f"{example_id}: the {name} activation at layer {layer} is NaN or infinite in {_dtype_name(dtype)}: "
            "load the model with --dtype bfloat16 or float32"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Accumulator:
    """One pooling of a running batch, accumulated on the device.

    `step` receives the hidden states [K, B, D] of the tokens just fed, and their positions in the response [B], from 0.
    `in_place`: True if a step only writes a buffer at a fixed address.
    """

    in_place = True

    def __init__(self, shape_KBD: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.sum_KBD = torch.zeros(shape_KBD, dtype=dtype, device=device)

    def enter(self, rows_R: Tensor) -> None:
        """Reset these rows for new examples."""
        self.sum_KBD[:, rows_R] = 0

    def prompt(self, point: int, rows_R: Tensor, hidden_RPD: Tensor, mask_RP: Tensor) -> None:
        """Add the left-padded prompts of the rows that enter, at one point."""

    def step(self, hidden_KBD: Tensor, age_B: Tensor, live_B: Tensor | None) -> None:
        """Add one token of every slot, or of the slots in `live_B` alone."""

    def emit(self, slot: int, n_tokens: int) -> Tensor:
        """Return the pooled vectors [K, D] of a slot whose response has `n_tokens` tokens."""
        return self.sum_KBD[:, slot].clone()

    def select_rows(self, rows_B: Tensor) -> None:
        """Make the slots these rows."""
        self.sum_KBD = self.sum_KBD[:, rows_B]


class ResponseMean(Accumulator):
    """Mean over the response's tokens."""

    def step(self, hidden_KBD: Tensor, age_B: Tensor, live_B: Tensor | None) -> None:
        self.sum_KBD += hidden_KBD if live_B is None else hidden_KBD.where(live_B[None, :, None], 0)

    def emit(self, slot: int, n_tokens: int) -> Tensor:
        return self.sum_KBD[:, slot] / n_tokens


class ResponseFirst(Accumulator):
    """Mean over the response's first `count` tokens (or all, if it has fewer)."""

    def __init__(self, *args: Any, count: int) -> None:
        super().__init__(*args)
        self.count = count

    def step(self, hidden_KBD: Tensor, age_B: Tensor, live_B: Tensor | None) -> None:
        early_B = age_B < self.count if live_B is None else live_B & (age_B < self.count)
        self.sum_KBD += hidden_KBD.where(early_B[None, :, None], 0)

    def emit(self, slot: int, n_tokens: int) -> Tensor:
        return self.sum_KBD[:, slot] / min(n_tokens, self.count)


class ResponseLast(Accumulator):
    """The response's last token."""

    def step(self, hidden_KBD: Tensor, age_B: Tensor, live_B: Tensor | None) -> None:
        last_KBD = hidden_KBD if live_B is None else hidden_KBD.where(live_B[None, :, None], self.sum_KBD)
        self.sum_KBD.copy_(last_KBD)


class ResponseAll(Accumulator):
    """Every token of the response: emits [T, K, D]."""

    in_place = False

    def __init__(self, shape_KBD: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.rows: list[list[Tensor]] = [[] for _ in range(shape_KBD[1])]

    def enter(self, rows_R: Tensor) -> None:
        for row in rows_R.tolist():
            self.rows[row] = []

    def step(self, hidden_KBD: Tensor, age_B: Tensor, live_B: Tensor | None) -> None:
        live = [True] * len(self.rows) if live_B is None else live_B.tolist()
        for row, kept, is_live in zip(hidden_KBD.to(self.dtype).unbind(1), self.rows, live, strict=True):
            if is_live:
                kept.append(row.clone())

    def emit(self, slot: int, n_tokens: int) -> Tensor:
        return torch.stack(self.rows[slot][:n_tokens])

    def select_rows(self, rows_B: Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows_B.tolist()]


class PromptMean(Accumulator):
    """Mean over the prompt's tokens."""

    def prompt(self, point: int, rows_R: Tensor, hidden_RPD: Tensor, mask_RP: Tensor) -> None:
        self.sum_KBD[point, rows_R] = pool_mean(hidden_RPD, mask_RP).to(self.sum_KBD)


class PromptLast(Accumulator):
    """The prompt's last token."""

    def prompt(self, point: int, rows_R: Tensor, hidden_RPD: Tensor, mask_RP: Tensor) -> None:
        self.sum_KBD[point, rows_R] = hidden_RPD[:, -1].to(self.sum_KBD)


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "response_mean": ResponseMean,
    "response_first": ResponseFirst,
    "response_last": ResponseLast,
    "all": ResponseAll,
    "prompt_mean": PromptMean,
    "prompt_last": PromptLast,
}


def accumulator_of(pooling: str) -> Callable[..., Accumulator]:
    """Return the accumulator of a pooling such as `response_first:5`. Raises ConfigError for an unknown one."""
    asked = parse_pooling(pooling)
    kind: Callable[..., Accumulator] = ACCUMULATORS[asked.name]
    return kind if asked.count is None else partial(kind, count=asked.count)


class PooledCapture:
    """Captures pooled activations while a model generates: one accumulator for each pooling."""

    def __init__(self, lm: LanguageModel, capture: Capture, slots: int, width: int = 1) -> None:
        self.capture, self.device, self.dtype = capture, lm.device, lm.dtype
        self.taps = taps_of(lm, capture.sites, capture.layers)
        wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
        shape = (len(self.taps), slots, lm.hidden_size)
        self.hidden_size = lm.hidden_size
        self.fed_TKBD = torch.zeros(width, *shape, dtype=lm.dtype, device=lm.device)
        self.poolings = {name: accumulator_of(name)(shape, wide, lm.device) for name in capture.poolings}
        self.reads_prompts = any(parse_pooling(pooling).part == "prompt" for pooling in capture.poolings)
        self._note: Callable[[int, Tensor], None] = _ignore

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Register the hooks for a whole run; they record nothing outside of `during_prefill` and `during_step`."""

        def note(point: int, hidden_BTD: Tensor) -> None:
            self._note(point, hidden_BTD)  # the recorder of the current pass

        with watch_taps(self.taps, note):
            yield

    @contextmanager
    def during_prefill(self, rows_R: Tensor, mask_RP: Tensor) -> Iterator[None]:
        """Capture the prefill of the rows that enter."""
        for accumulator in self.poolings.values():
            accumulator.enter(rows_R)

        def note(point: int, hidden: Tensor) -> None:
            hidden_RPD = reshape_hidden(hidden, (*mask_RP.shape, self.hidden_size)).to(self.device)
            for accumulator in self.poolings.values():
                accumulator.prompt(point, rows_R, hidden_RPD, mask_RP)

        with self._noting(note if self.reads_prompts else _ignore):
            yield

    @contextmanager
    def during_step(self, width: int) -> Iterator[None]:
        """Capture one decode step, `width` tokens of every slot; `commit_tokens` then counts them."""
        fed_TKBD = self.fed_TKBD[:width]

        def note(point: int, hidden: Tensor) -> None:
            # a copy: models may change it in place later
            fed_TKBD[:, point].copy_(
                reshape_hidden(hidden, (fed_TKBD.shape[2], width, self.hidden_size)).transpose(0, 1)
            )

        with self._noting(note):
            yield

    def commit_tokens(self, age_B: Tensor, counts: Sequence[int] | None = None) -> None:
        """Count the first `counts[slot]` tokens of the step (None: the only one), the first of them aged `age_B`."""
        for t in range(1 if counts is None else max(counts, default=0)):
            live_B = None if counts is None else torch.tensor([t < count for count in counts], device=age_B.device)
            self.accumulate(age_B + t, live_B, t)

    def accumulate(self, age_B: Tensor, live_B: Tensor | None, t: int = 0) -> None:
        """Add the step's token `t` of the live slots (None: of all) to every pooling."""
        for accumulator in self.poolings.values():
            accumulator.step(self.fed_TKBD[t], age_B, live_B)

    @property
    def in_place(self) -> bool:
        """True if a step only writes buffers at fixed addresses."""
        return all(accumulator.in_place for accumulator in self.poolings.values())

    def emit(self, ended: Sequence[EndedRow]) -> list[dict[str, Tensor] | ActivationError]:
        """Return `site.pooling` -> [L, D] (`all`: [T, L, D]) of each slot that has ended, or its error."""
        pooled = [
            {name: acc.emit(each.slot, each.n_tokens) for name, acc in self.poolings.items()} if each.n_tokens else {}
            for each in ended
        ]
        copies = iter(to_host([kept for by_name in pooled for kept in by_name.values()]))
        return [
            self._checked({name: next(copies) for name in by_name}, each.example_id)
            for by_name, each in zip(pooled, ended, strict=True)
        ]

    def _checked(self, pooled: dict[str, Tensor], example_id: str) -> dict[str, Tensor] | ActivationError:
        try:
            return self.capture.by_site(pooled, example_id, self.dtype)
        except ActivationError as fault:
            return fault

    def select_rows(self, rows_B: Tensor) -> None:
        """Make the slots these rows."""
        self.fed_TKBD = self.fed_TKBD[:, :, rows_B]
        for accumulator in self.poolings.values():
            accumulator.select_rows(rows_B)

    @contextmanager
    def _noting(self, note: Callable[[int, Tensor], None]) -> Iterator[None]:
        self._note = note
        try:
            yield
        finally:
            self._note = _ignore


def first_non_finite_layer(lm: LanguageModel, token_ids: Sequence[int]) -> int | None:
    """Return the first layer whose output is NaN or infinite for a text alone; None if all are finite."""
    found: list[int] = []

    def note(layer: int, hidden_BTD: Tensor) -> None:
        if not hidden_BTD.isfinite().all():
            found.append(layer)
            raise StopForward

    with suppress(StopForward), watch(dict(enumerate(lm.layers)), note):
        lm.hidden_states(torch.tensor([list(token_ids)], device=lm.device))
    return found[0] if found else None


def reshape_hidden(hidden: Tensor, shape_BTD: tuple[int, ...]) -> Tensor:
    """Return hidden states as [B, T, D], also from modules that flatten tokens. ModelError for any other shape."""
    if hidden.shape[-1] != shape_BTD[-1] or hidden.numel() != math.prod(shape_BTD):
        raise ModelError(
            f"an activation has shape {list(hidden.shape)} where {list(shape_BTD)} is expected: "
            "this architecture's blocks can't be captured; generate without activations (`traitline generate`)"
        )
    return hidden.reshape(shape_BTD)


def _ignore(_point: int, _hidden_BTD: Tensor) -> None:
    """Record nothing, between passes."""
