"""Per-token capture: tensors of every token of prompt and response, read in the same pass that generates.

Row i of a tensor is the state where token i is the INPUT. `TokenProjections` captures projections on unit directions,
computed on the device, so their size does not grow with the hidden size. `TokenInternals` captures the parts of one
layer, on the host. Both are a `TokenCapture` with a `TokenReader` per kind of tensor.

Shapes: B rows of a pass, T tokens of a pass (or of a text: prompt and response), R response tokens, L layers, P stream
points, M = L P taps, K directions, D hidden, H heads, S columns of the KV cache.
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
from extraction.activations.sites import Tap, stream_points, watch_taps
from extraction.core.errors import ActivationError, ConfigError
from extraction.core.records import POINTS
from extraction.model.attention_weights import AttentionReading, watch_attention

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

TokenRecord = dict[str, Tensor]


@dataclass(frozen=True)
class TokenProjections:
    """Capture every token's projections on K unit directions at the three stream points of each layer.

    `unit_LDK[l]` holds the directions of layer `layers[l]`. A completion gets `projections` [T, L, 3, K] in float32
    and, with `attention`, `attention` [R, L, T]: the weights of the response's tokens, averaged over heads, 0 to the
    right of a row's own token.
    """

    layers: tuple[int, ...]
    unit_LDK: Tensor
    attention: bool = True

    def hook(self, lm: LanguageModel, slots: int, width: int) -> TokenCapture:
        """Make the hook for a running batch. Raises ModelError or ConfigError if the model can't be captured so."""
        readers: list[TokenReader] = [ProjectionReader(lm, self.layers, self.unit_LDK)]
        if self.attention:
            readers.append(MeanAttentionReader(lm, self.layers))
        return TokenCapture(lm, readers, slots, width)


@dataclass(frozen=True)
class TokenInternals:
    """Capture the parts of one layer of every token; `extraction.activations.internals` lists them.

    A completion gets each part by name, [T, ...] in float32. With `attention` it also gets `attention` [T, H, T], 0 to
    the right of a row's own token, and `rot_q` and `rot_k`, after the rotary embedding; without, no `q`, `k`, `v`.
    """

    layer: int
    attention: bool = True

    def hook(self, lm: LanguageModel, slots: int, width: int) -> TokenCapture:
        """Make the hook for a running batch. Raises ModelError or ConfigError if the model can't be captured so."""
        readers: list[TokenReader] = [InternalsReader(lm, self.layer, attention=self.attention)]
        if self.attention:
            readers.append(HeadAttentionReader(lm, (self.layer,)))
        return TokenCapture(lm, readers, slots, width)


# --- readers --------------------------------------------------------------------------------------------------------


class TokenReader(Protocol):
    """Reads one kind of tensor of the tokens of a pass. `reads_prompts`: prefills are read too, not only steps."""

    reads_prompts: bool

    def attached(self) -> AbstractContextManager[None]:
        """Attach the hooks. They store nothing until `begin_pass`."""

    def begin_pass(self, n_rows: int, width: int) -> None:
        """Start to store a pass of this many rows and tokens."""

    def end_pass(self) -> TokenRecord:
        """Return what the pass stored, [B, T, ...] by name, and stop storing."""

    def select_row(self, stored: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Return a row's last `n_new` tokens, [n_new, ...]; `n_before` tokens of its text precede them."""

    def join(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Join the results of `select_row`, pass by pass, to a text of `n_tokens`. ActivationError if not finite."""


class ProjectionReader:
    """Projections [B, T, M, K], one matrix product per tap; on the device until the text ends."""

    reads_prompts = True

    def __init__(self, lm: LanguageModel, layers: tuple[int, ...], unit_LDK: Tensor) -> None:
        if unit_LDK.ndim != 3 or unit_LDK.shape[:2] != (len(layers), lm.hidden_size):
            raise ConfigError(
                f"directions of shape {list(unit_LDK.shape)}: {len(layers)} layers of {lm.hidden_size} values are "
                "needed; use vectors of this model"
            )
        self.device, self.layers = lm.device, layers
        self.dtype = torch.float64 if lm.dtype == torch.float64 else torch.float32
        self.n_units = unit_LDK.shape[2]
        self.units_DK: dict[tuple[int, torch.device], Tensor] = {
            (i, lm.device): unit_DK.to(lm.device, self.dtype) for i, unit_DK in enumerate(unit_LDK)
        }
        self.stream = stream_points(lm, layers)
        self.pass_BTMK: Tensor | None = None

    def attached(self) -> AbstractContextManager[None]:
        """Attach a hook at every stream point."""
        return watch_taps(self.stream.taps, self._note)

    def _note(self, tap: int, hidden: Tensor) -> None:
        if self.pass_BTMK is not None:
            unit_DK = self._unit(tap // len(POINTS), hidden.device)
            hidden_BTD = reshape_hidden(hidden, (*self.pass_BTMK.shape[:2], len(unit_DK)))
            self.pass_BTMK[:, :, tap] = hidden_BTD.to(unit_DK.dtype) @ unit_DK

    def _unit(self, i: int, device: torch.device) -> Tensor:
        """Return a layer's directions on the device of that layer, copied there once."""
        if (i, device) not in self.units_DK:
            self.units_DK[i, device] = self.units_DK[i, self.device].to(device)
        return self.units_DK[i, device]

    def begin_pass(self, n_rows: int, width: int) -> None:
        """Allocate the pass."""
        shape = (n_rows, width, len(self.stream.taps), self.n_units)
        self.pass_BTMK = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def end_pass(self) -> TokenRecord:
        """Return the projections."""
        stored, self.pass_BTMK = self.pass_BTMK, None
        assert stored is not None
        return {"projections": stored}

    def select_row(self, stored: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Select the last tokens: rows are left-padded."""
        return last_tokens(stored, row, n_new)

    def join(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Return the projections by layer and stream point."""
        tapped_TMK = torch.cat([part["projections"] for part in parts]).cpu()
        tapped_TLPK = tapped_TMK.unflatten(1, (len(self.layers), len(POINTS)))
        projected_TLPK = self.stream.from_taps(tapped_TLPK).float()
        bad_LP = (~projected_TLPK.isfinite()).any(-1).any(0).nonzero()
        if len(bad_LP):
            layer, point = bad_LP[0].tolist()
            raise ActivationError(f"the {POINTS[point]} at layer {self.layers[layer]} is NaN or infinite")
        return {"projections": projected_TLPK}


class AttentionReader:
    """Base of the readers of attention. Weights are kept on the host: they grow with the square of the text."""

    reads_prompts = False

    def __init__(self, lm: LanguageModel, layers: tuple[int, ...]) -> None:
        self.lm, self.layers = lm, layers
        self.stored: dict[int, AttentionReading] | None = None

    def attached(self) -> AbstractContextManager[None]:
        """Observe the attention of every layer."""
        return watch_attention(self.lm, self.layers, self._note)

    def _note(self, layer: int, reading: AttentionReading) -> None:
        if self.stored is not None:
            self.stored[layer] = reading

    def begin_pass(self, n_rows: int, width: int) -> None:
        """Start to store readings."""
        self.stored = {}

    def _take_stored(self) -> list[AttentionReading]:
        stored, self.stored = self.stored, None
        assert stored is not None
        return [stored[layer] for layer in self.layers]


class MeanAttentionReader(AttentionReader):
    """Attention weights of response tokens, averaged over heads: [B, T, L, S]."""

    def _note(self, layer: int, reading: AttentionReading) -> None:
        mean_BTS = reading.weights_BHTS.mean(1, dtype=torch.float32)
        super()._note(layer, replace(reading, weights_BHTS=mean_BTS))

    def end_pass(self) -> TokenRecord:
        """Return the weights of all layers."""
        weights = [reading.weights_BHTS.to(self.lm.device) for reading in self._take_stored()]
        return {"attention": torch.stack(weights, dim=2).cpu()}

    def select_row(self, stored: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Select the columns of the row's text, which are the last ones."""
        return {"attention": stored["attention"][row, :, :, -n_before - n_new :]}

    def join(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Stack the rows, padded with zeros to the width of the text."""
        empty = torch.zeros(0, len(self.layers), n_tokens)
        return {"attention": stack_padded([empty, *(part["attention"] for part in parts)], n_tokens)}


class HeadAttentionReader(AttentionReader):
    """Attention weights of every head of one layer, [B, T, H, S], and the rotated queries and keys."""

    reads_prompts = True

    def end_pass(self) -> TokenRecord:
        """Return weights, queries and keys."""
        (reading,) = self._take_stored()
        return {
            "attention": _to_host(reading.weights_BHTS.transpose(1, 2)),
            "rot_q": _to_host(reading.q_BTHC),
            "rot_k": _to_host(reading.k_BTGC),
        }

    def select_row(self, stored: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Select the last tokens, and of their weights the columns of the row's text."""
        tokens = last_tokens(stored, row, n_new)
        return tokens | {"attention": tokens["attention"][..., -n_before - n_new :]}

    def join(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Join the tokens; weights are padded with zeros to the width of the text."""
        joined = {name: torch.cat([part[name] for part in parts]) for name in ("rot_q", "rot_k")}
        return {"attention": stack_padded([part["attention"] for part in parts], n_tokens), **joined}


class InternalsReader:
    """The parts of one layer (`extraction.activations.internals`), on the host."""

    reads_prompts = True

    def __init__(self, lm: LanguageModel, layer: int, *, attention: bool) -> None:
        self.layer, self.device, self.parts = layer, lm.device, parts_of(lm, layer, attention=attention)
        taps = [tap for part in self.parts for tap in (part.tap, part.added) if tap is not None]
        self.taps = tuple(dict.fromkeys(taps))
        self.shape: tuple[int, int] = (0, 0)
        self.stored: dict[Tap, Tensor] | None = None

    def attached(self) -> AbstractContextManager[None]:
        """Attach a hook at every tap."""
        return watch_taps(self.taps, self._note)

    def _note(self, tap: int, hidden: Tensor) -> None:
        if self.stored is not None:  # a copy: models may change it in place later
            self.stored[self.taps[tap]] = hidden.to(self.device, copy=True)

    def begin_pass(self, n_rows: int, width: int) -> None:
        """Start to store tapped tensors."""
        self.shape, self.stored = (n_rows, width), {}

    def end_pass(self) -> TokenRecord:
        """Return the parts, read from the tapped tensors."""
        stored, self.stored = self.stored, None
        assert stored is not None
        by_tap = {tap: hidden.reshape(*self.shape, hidden.shape[-1]) for tap, hidden in stored.items()}
        tapped = {part.name: by_tap[part.tap] for part in self.parts}
        sums = {part.name: tapped[part.name] + by_tap[part.added] for part in self.parts if part.added is not None}
        return {part.name: _to_host(part.read((tapped | sums)[part.name])) for part in self.parts}

    def select_row(self, stored: TokenRecord, row: int, n_new: int, n_before: int) -> TokenRecord:
        """Select the last tokens: rows are left-padded."""
        return last_tokens(stored, row, n_new)

    def join(self, parts: Sequence[TokenRecord], n_tokens: int) -> TokenRecord:
        """Join the tokens of a text."""
        joined = {part.name: torch.cat([tokens[part.name] for tokens in parts]) for part in self.parts}
        for name, tensor in joined.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ActivationError(f"the {name} at layer {self.layer} is NaN or infinite")
        return joined


def last_tokens(stored: TokenRecord, row: int, n_new: int) -> TokenRecord:
    """Return the last tokens of one row of tensors [B, T, ...]."""
    return {name: tensor[row, tensor.shape[1] - n_new :] for name, tensor in stored.items()}


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, floating-point numbers as float32."""
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def stack_padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Concatenate rows [n, ..., S], each padded with zeros on the right to `width` columns."""
    return torch.cat([pad(row, (0, width - row.shape[-1])) for row in rows])


# --- the hook -------------------------------------------------------------------------------------------------------


def _clone_tensors(record: TokenRecord) -> TokenRecord:
    """Copy tensors: a view of one row would keep the whole pass in memory."""
    return {name: tensor.clone() for name, tensor in record.items()}


@dataclass
class _SlotText:
    """The text in one slot: the number of tokens read, and every reader's records in order of passes."""

    n_prompt: int = 0
    n_read: int = 0
    live: bool = False
    parts: list[list[TokenRecord]] = field(default_factory=list)


class TokenCapture:
    """A `CaptureHook` that collects what its readers read of every token of every slot."""

    def __init__(self, lm: LanguageModel, readers: Sequence[TokenReader], slots: int, width: int) -> None:
        if width > 1:
            raise ConfigError("per-token capture reads one token per step: generate without speculative decoding")
        self.readers, self.dtype = readers, lm.dtype
        self.slots = [_SlotText() for _ in range(slots)]
        self.step: list[TokenRecord] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks for a whole run. Outside of `during_prefill` and `during_step` they store nothing."""
        with ExitStack() as stack:
            for reader in self.readers:
                stack.enter_context(reader.attached())
            yield

    @contextmanager
    def during_prefill(self, rows_R: Tensor, mask_RP: Tensor) -> Iterator[None]:
        """Capture a prefill of these rows."""
        for row, n_prompt in zip(rows_R.tolist(), mask_RP.sum(1).tolist(), strict=True):
            self.slots[row] = _SlotText(n_prompt=n_prompt, n_read=n_prompt, live=True, parts=[[] for _ in self.readers])
        readers = [reader for reader in self.readers if reader.reads_prompts]
        for reader in readers:
            reader.begin_pass(*mask_RP.shape)
        yield
        for i, reader in enumerate(self.readers):
            if reader.reads_prompts:
                stored = reader.end_pass()
                for index, row in enumerate(rows_R.tolist()):
                    text = self.slots[row]
                    text.parts[i].append(_clone_tensors(reader.select_row(stored, index, text.n_prompt, 0)))

    @contextmanager
    def during_step(self, width: int) -> Iterator[None]:
        """Capture one decode step. Its tokens count once `commit_tokens` is called."""
        for reader in self.readers:
            reader.begin_pass(len(self.slots), width)
        yield
        self.step = [reader.end_pass() for reader in self.readers]

    def commit_tokens(self, age_B: Tensor, counts: Sequence[int] | None = None) -> None:
        """Add the step's token to every slot that holds a text."""
        for row, text in enumerate(self.slots):
            if text.live:
                for reader, stored, parts in zip(self.readers, self.step, text.parts, strict=True):
                    parts.append(_clone_tensors(reader.select_row(stored, row, 1, text.n_read)))
                text.n_read += 1
        self.step = []

    def emit(self, ended: Sequence[EndedRow]) -> list[TokenRecord | ActivationError]:
        """Return each ended slot's tensors by name, or an ActivationError if they are not finite."""
        records: list[TokenRecord | ActivationError] = []
        for row in ended:
            try:
                records.append(self._take_record(row))
            except ActivationError as fault:
                short = str(self.dtype).removeprefix("torch.")
                remedy = "load the model with --dtype bfloat16 or float32"
                records.append(ActivationError(f"{row.example_id}: {fault} in {short}: {remedy}"))
        return records

    def _take_record(self, ended: EndedRow) -> TokenRecord:
        text, self.slots[ended.slot] = self.slots[ended.slot], _SlotText()
        record: TokenRecord = {}
        for reader, parts in zip(self.readers, text.parts, strict=True):
            committed = parts[: ended.n_tokens + int(reader.reads_prompts)]
            record |= reader.join(committed, text.n_prompt + ended.n_tokens)
        return record

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep only these slots; the second mention of a slot is an empty one."""
        rows = rows_B.tolist()
        self.slots = [self.slots[row] if row not in rows[:i] else _SlotText() for i, row in enumerate(rows)]
