"""Something of every token, prompt and response, read through hooks in the same pass that generates.

Row i is the state where token i is the INPUT. `Projecting` keeps projections on unit directions, made on the device, so
that what is kept does not grow with the hidden size; `Internals` keeps the parts of one layer, on the host.

Shapes: B rows of a pass, T its tokens (of a text: prompt and response), R response tokens, L layers, M taps,
K directions, D hidden, H heads, S columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from extraction.activations.internals import parts_of
from extraction.activations.pooled import EndedRow, reshape_hidden
from extraction.activations.sites import Tap, points_of, watch_taps
from extraction.core.errors import ActivationError, ConfigError
from extraction.core.records import POINTS
from extraction.model.attention_weights import AttentionReading, watch_attention

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

TokenRecord = dict[str, Tensor]


@dataclass(frozen=True)
class TokenProjections:
    """Every token's projections on K unit directions at the three POINTS of every layer, float32.

    `unit_LDK`: row l is of layer `layers[l]`. With `attention`, the head mean of the response's rows too. A completion
    has `projections` [T, L, 3, K] and `attention` [R, L, T], zeros to the right of a row's own token.
    """

    layers: tuple[int, ...]
    unit_LDK: Tensor
    attention: bool = True

    def hook(self, lm: LanguageModel, slots: int, width: int) -> TokenCapture:
        """What keeps it for a running batch. Raises ModelError or ConfigError where the model can't be read so."""
        streams: list[TokenReader] = [ProjectionReader(lm, self.layers, self.unit_LDK)]
        if self.attention:
            streams.append(MeanAttentionReader(lm, self.layers))
        return TokenCapture(lm, streams, slots, width)


@dataclass(frozen=True)
class TokenInternals:
    """The parts of one layer, of every token: see `extraction.activations.internals` for what they are.

    A completion has each part by its name, [T, ...] in float32; with `attention` (without it, no `q`, `k`, `v` either)
    also `attention` [T, H, T], zeros to the right of a row's own token, and `rot_q` and `rot_k` as attention compares
    them, after rotary embedding.
    """

    layer: int
    attention: bool = True

    def hook(self, lm: LanguageModel, slots: int, width: int) -> TokenCapture:
        """What keeps it for a running batch. Raises ModelError or ConfigError where the model can't be read so."""
        streams: list[TokenReader] = [InternalsReader(lm, self.layer, attention=self.attention)]
        if self.attention:
            streams.append(HeadAttentionReader(lm, (self.layer,)))
        return TokenCapture(lm, streams, slots, width)


# --- what a pass gives ----------------------------------------------------------------------------------------------


class TokenReader(Protocol):
    """One kind of thing that is read of the tokens of a pass."""

    reads_prompts: bool

    def watching(self) -> AbstractContextManager[None]:
        """Its hooks, which note nothing before a pass is opened."""

    def open(self, n_rows: int, width: int) -> None:
        """A pass of so many rows and tokens begins."""

    def close(self) -> TokenRecord:
        """What the pass gave, [B, T, ...] by name."""

    def of_row(self, given: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """A row's last `n_new` tokens, [n_new, ...]; before them, its text had `n_before`."""

    def finish(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """What a text of `n_tokens` has, out of what `of_row` gave pass by pass. ActivationError where not finite."""


class ProjectionReader:
    """[B, T, M, K], a matrix product a tap; they stay on the device until a text is whole."""

    reads_prompts = True

    def __init__(self, lm: LanguageModel, layers: tuple[int, ...], unit_LDK: Tensor) -> None:
        if unit_LDK.ndim != 3 or unit_LDK.shape[:2] != (len(layers), lm.hidden_size):
            raise ConfigError(
                f"directions of shape {list(unit_LDK.shape)}: {len(layers)} layers of {lm.hidden_size} values are "
                "needed; take vectors of this model"
            )
        self.device, self.layers = lm.device, layers
        self.wide = torch.float64 if lm.dtype == torch.float64 else torch.float32
        self.n_units = unit_LDK.shape[2]
        self.units_DK: dict[tuple[int, torch.device], Tensor] = {
            (i, lm.device): unit_DK.to(lm.device, self.wide) for i, unit_DK in enumerate(unit_LDK)
        }
        self.points = points_of(lm, layers)
        self.pass_BTMK: Tensor | None = None

    def watching(self) -> AbstractContextManager[None]:
        """Hooks at every point."""
        return watch_taps(self.points.taps, self._note)

    def _note(self, tap: int, hidden: Tensor) -> None:
        if self.pass_BTMK is not None:
            unit_DK = self._unit(tap // len(POINTS), hidden.device)
            hidden_BTD = reshape_hidden(hidden, (*self.pass_BTMK.shape[:2], len(unit_DK)))
            self.pass_BTMK[:, :, tap] = hidden_BTD.to(unit_DK.dtype) @ unit_DK

    def _unit(self, i: int, device: torch.device) -> Tensor:
        """A layer's directions on the device where that layer is, once copied."""
        if (i, device) not in self.units_DK:
            self.units_DK[i, device] = self.units_DK[i, self.device].to(device)
        return self.units_DK[i, device]

    def open(self, n_rows: int, width: int) -> None:
        """Room for the pass."""
        shape = (n_rows, width, len(self.points.taps), self.n_units)
        self.pass_BTMK = torch.zeros(shape, dtype=self.wide, device=self.device)

    def close(self) -> TokenRecord:
        """What was noted."""
        given, self.pass_BTMK = self.pass_BTMK, None
        assert given is not None
        return {"projections": given}

    def of_row(self, given: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Its tokens end at the right edge."""
        return last_tokens(given, row, n_new)

    def finish(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """By layer and point; where blocks run side by side, the middle is a sum."""
        found_TMK = torch.cat([part["projections"] for part in parts]).cpu()
        found_TLPK = self.points.summed(found_TMK.unflatten(1, (len(self.layers), len(POINTS)))).float()
        bad_LP = (~found_TLPK.isfinite()).any(-1).any(0).nonzero()
        if len(bad_LP):
            layer, point = bad_LP[0].tolist()
            raise ActivationError(f"the {POINTS[point]} at layer {self.layers[layer]} is NaN or infinite")
        return {"projections": found_TLPK}


class AttentionReader:
    """Attention of some layers, on the host, since it grows with the square of a text."""

    reads_prompts = False

    def __init__(self, lm: LanguageModel, layers: tuple[int, ...]) -> None:
        self.lm, self.layers = lm, layers
        self.noted: dict[int, AttentionReading] | None = None

    def watching(self) -> AbstractContextManager[None]:
        """Every layer's attention."""
        return watch_attention(self.lm, self.layers, self._note)

    def _note(self, layer: int, attended: AttentionReading) -> None:
        if self.noted is not None:
            self.noted[layer] = attended

    def open(self, n_rows: int, width: int) -> None:
        """Nothing noted yet."""
        self.noted = {}

    def _noted(self) -> list[AttentionReading]:
        noted, self.noted = self.noted, None
        assert noted is not None
        return [noted[layer] for layer in self.layers]


class MeanAttentionReader(AttentionReader):
    """Weights of the response's rows, averaged over heads: [B, T, L, S] of a pass."""

    def _note(self, layer: int, attended: AttentionReading) -> None:
        mean_BTS = attended.weights_BHTS.mean(1, dtype=torch.float32)
        super()._note(layer, replace(attended, weights_BHTS=mean_BTS))

    def close(self) -> TokenRecord:
        """What was noted, layer by layer."""
        rows = [attended.weights_BHTS.to(self.lm.device) for attended in self._noted()]
        return {"attention": torch.stack(rows, dim=2).cpu()}

    def of_row(self, given: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """The columns of its text, which end at the right edge."""
        return {"attention": given["attention"][row, :, :, -n_before - n_new :]}

    def finish(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Rows as wide as the text, with zeros to the right."""
        none = torch.zeros(0, len(self.layers), n_tokens)
        return {"attention": stacked([none, *(part["attention"] for part in parts)], n_tokens)}


class HeadAttentionReader(AttentionReader):
    """Every head's weights of one layer, [B, T, H, S] of a pass, and the queries and keys that they come from."""

    reads_prompts = True

    def close(self) -> TokenRecord:
        """What was noted."""
        (attended,) = self._noted()
        return {
            "attention": _on_host(attended.weights_BHTS.transpose(1, 2)),
            "rot_q": _on_host(attended.q_BTHC),
            "rot_k": _on_host(attended.k_BTGC),
        }

    def of_row(self, given: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Its tokens, and the columns of its text, end at the right edge."""
        kept = last_tokens(given, row, n_new)
        return kept | {"attention": kept["attention"][..., -n_before - n_new :]}

    def finish(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Rows as wide as the text, with zeros to the right."""
        joined = {name: torch.cat([part[name] for part in parts]) for name in ("rot_q", "rot_k")}
        return {"attention": stacked([part["attention"] for part in parts], n_tokens), **joined}


class InternalsReader:
    """The parts of one layer, on the host."""

    reads_prompts = True

    def __init__(self, lm: LanguageModel, layer: int, *, attention: bool) -> None:
        self.layer, self.device, self.parts = layer, lm.device, parts_of(lm, layer, attention=attention)
        taps = [tap for part in self.parts for tap in (part.tap, part.added) if tap is not None]
        self.taps = tuple(dict.fromkeys(taps))
        self.shape: tuple[int, int] = (0, 0)
        self.noted: dict[Tap, Tensor] | None = None

    def watching(self) -> AbstractContextManager[None]:
        """Hooks at every part."""
        return watch_taps(self.taps, self._note)

    def _note(self, tap: int, hidden: Tensor) -> None:
        if self.noted is not None:  # a copy: models may change it in place later
            self.noted[self.taps[tap]] = hidden.to(self.device, copy=True)

    def open(self, n_rows: int, width: int) -> None:
        """Nothing noted yet."""
        self.shape, self.noted = (n_rows, width), {}

    def close(self) -> TokenRecord:
        """What was noted, part by part."""
        noted, self.noted = self.noted, None
        assert noted is not None
        as_tokens = {tap: hidden.reshape(*self.shape, hidden.shape[-1]) for tap, hidden in noted.items()}
        given = {part.name: as_tokens[part.tap] for part in self.parts}
        sums = {part.name: given[part.name] + as_tokens[part.added] for part in self.parts if part.added is not None}
        return {part.name: _on_host(part.read((given | sums)[part.name])) for part in self.parts}

    def of_row(self, given: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Its tokens end at the right edge."""
        return last_tokens(given, row, n_new)

    def finish(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """All tokens of a text."""
        joined = {part.name: torch.cat([kept[part.name] for kept in parts]) for part in self.parts}
        for name, tensor in joined.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ActivationError(f"the {name} at layer {self.layer} is NaN or infinite")
        return joined


def last_tokens(given: TokenRecord, row: int, n_new: int) -> TokenRecord:
    """A row's last tokens of everything [B, T, ...]."""
    return {name: tensor[row, tensor.shape[1] - n_new :] for name, tensor in given.items()}


def _on_host(tensor: Tensor) -> Tensor:
    """A copy there: numbers in float32 (whole ones as they are)."""
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows [n, ..., S], one below the other, with zeros to the right."""
    return torch.cat([pad(row, (0, width - row.shape[-1])) for row in rows])


# --- the observer ---------------------------------------------------------------------------------------------------


def _owned(kept: TokenRecord) -> TokenRecord:
    """Copies: a view of one row would keep its neighbours' share of the pass alive, however soon those have ended."""
    return {name: part.clone() for name, part in kept.items()}


@dataclass
class _Text:
    """What is kept of the request in one slot: the tokens read so far, and what every stream gave, pass by pass."""

    n_prompt: int = 0
    n_read: int = 0
    live: bool = False
    parts: list[list[TokenRecord]] = field(default_factory=list)


class TokenCapture:
    """Watches a model while it generates, and keeps what its streams give of every token of every slot."""

    def __init__(self, lm: LanguageModel, streams: Sequence[TokenReader], slots: int, width: int) -> None:
        if width > 1:
            raise ConfigError("tokens are read one at a time: generate without speculation")
        self.streams, self.dtype = streams, lm.dtype
        self.texts = [_Text() for _ in range(slots)]
        self.given: list[TokenRecord] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks stay on for a whole run; outside of `during_prefill` and `during_step` they note nothing."""
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(stream.watching())
            yield

    @contextmanager
    def during_prefill(self, rows_R: Tensor, mask_RP: Tensor) -> Iterator[None]:
        """Around the prefill of the rows that enter."""
        for row, n_prompt in zip(rows_R.tolist(), mask_RP.sum(1).tolist(), strict=True):
            self.texts[row] = _Text(n_prompt=n_prompt, n_read=n_prompt, live=True, parts=[[] for _ in self.streams])
        readers = [stream for stream in self.streams if stream.reads_prompts]
        for stream in readers:
            stream.open(*mask_RP.shape)
        yield
        for i, stream in enumerate(self.streams):
            if stream.reads_prompts:
                given = stream.close()
                for place, row in enumerate(rows_R.tolist()):
                    text = self.texts[row]
                    text.parts[i].append(_owned(stream.of_row(given, place, text.n_prompt, 0)))

    @contextmanager
    def during_step(self, width: int) -> Iterator[None]:
        """Around one decode step. It counts when it is credited."""
        for stream in self.streams:
            stream.open(len(self.texts), width)
        yield
        self.given = [stream.close() for stream in self.streams]

    def commit_tokens(self, age_B: Tensor, counts: Sequence[int] | None = None) -> None:
        """Count the step: a token of every slot that holds a text."""
        for row, text in enumerate(self.texts):
            if text.live:
                for stream, given, parts in zip(self.streams, self.given, text.parts, strict=True):
                    parts.append(_owned(stream.of_row(given, row, 1, text.n_read)))
                text.n_read += 1
        self.given = []

    def emit(self, ended: Sequence[EndedRow]) -> list[TokenRecord | ActivationError]:
        """All of each slot that has ended, with the response's tokens that count, or what is wrong with it."""
        found: list[TokenRecord | ActivationError] = []
        for each in ended:
            try:
                found.append(self._finished(each))
            except ActivationError as fault:
                short = str(self.dtype).removeprefix("torch.")
                remedy = "load the model with --dtype bfloat16 or float32"
                found.append(ActivationError(f"{each.example_id}: {fault} in {short}: {remedy}"))
        return found

    def _finished(self, ended: EndedRow) -> TokenRecord:
        text, self.texts[ended.slot] = self.texts[ended.slot], _Text()
        kept: TokenRecord = {}
        for stream, parts in zip(self.streams, text.parts, strict=True):
            counted = parts[: ended.n_tokens + int(stream.reads_prompts)]
            kept |= stream.finish(counted, text.n_prompt + ended.n_tokens)
        return kept

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep only these slots; one that is named again is an empty one."""
        rows = rows_B.tolist()
        self.texts = [self.texts[row] if row not in rows[:i] else _Text() for i, row in enumerate(rows)]
