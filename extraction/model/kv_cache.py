"""The cache of a running batch: slots that share one window of columns, and the state that a slot has besides.

Every slot writes the same column, the cursor, so a slot's tokens END there (left padding). New rows are prefilled to
the left of the cursor, and what they leave goes straight into their slots. Works with every model that keeps its
cache in a transformers `Cache`.

`make_cache` is the only place where a cache is built. There is one kind of layer for all models, `SlotLayer`: a layer
may keep keys and values, which have columns; convolution and recurrent states (Mamba, gated delta nets), which have
none; or both. What it keeps is allocated at the first use, so no table of layer types is needed.

Shapes: B slots, H heads, S columns, C head dimension, R rows of a prefill, P prompt columns.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers before 5.10 or so has no such layers; a model that needs them is refused there by the check at load
_StateLayer: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", object)


# --- the window -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphCursor:
    """The cursor of a step that is captured as a graph and replayed at other cursors.

    `cursor_1` [1] lives on the device. The step attends to all of the first `columns` columns; the mask leaves out
    those past the cursor.
    """

    cursor_1: Tensor
    columns: int


@dataclass
class CacheWindow:
    """The columns in use: `[start, cursor)` hold live tokens.

    `prefilled` holds the slots that the current prefill writes (None: a decode step); `recorded` the cursor of a step
    that is being captured as a graph.
    """

    slots: int
    columns: int
    cursor: int = 0
    start: int = 0
    prefilled: Tensor | None = None
    recorded: GraphCursor | None = None

    @contextmanager
    def prefilling(self, rows: Tensor, cursor: int) -> Iterator[None]:
        """Write a prefill into these slots, its last column just before `cursor`."""
        self.prefilled, self.cursor = rows, cursor
        try:
            yield
        finally:
            self.prefilled = None

    @contextmanager
    def recording(self, recorded: GraphCursor) -> Iterator[None]:
        """Read the cursor from the device, so that the step can be captured as a graph."""
        self.recorded = recorded
        try:
            yield
        finally:
            self.recorded = None

    @contextmanager
    def cursor_at(self, cursor: int) -> Iterator[None]:
        """Write from another column on, and restore the cursor afterwards."""
        previous, self.cursor = self.cursor, cursor
        try:
            yield
        finally:
            self.cursor = previous


@dataclass(frozen=True)
class ColumnMove:
    """Move `width` columns, from column `start` on, to the columns from `to` on."""

    start: int
    width: int
    to: int = 0


# --- per-slot state of one layer ------------------------------------------------------------------------------------


class SlotLayer(CacheLayerMixin, _StateLayer):
    """One layer's state in slots: what has columns, [B, H, S, C], and states [B, ...] without columns.

    Columns hold keys, values and the indexer's keys (DeepSeek V3.2's sparse attention; H = 1). A prefill writes the
    slots that it fills. A decode step writes all slots at the same addresses, so that it can be captured as a graph.
    `conv_states` and `recurrent_states` are by number: a layer may have several of each.
    """

    is_sliding = False

    def __init__(self, window: CacheWindow) -> None:
        super().__init__()
        self.window = window
        self.indexer_keys: Tensor | None = None
        self.conv_states: dict[int, Tensor] = {}
        self.recurrent_states: dict[int, Tensor] = {}

    @property
    def columned(self) -> dict[str, Tensor]:
        """The buffers with columns that the layer has, by attribute."""
        buffers = {"keys": self.keys, "values": self.values, "indexer_keys": self.indexer_keys}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = map(self._allocate, (key_states, value_states))
        self.is_initialized = True

    def _allocate(self, states: Tensor) -> Tensor:
        """Return zeros, not uninitialised memory: a masked NaN is still a NaN."""
        return states.new_zeros(self.window.slots, states.shape[1], self.window.columns, states.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those to attend to."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store new keys [B, T, C] of a sparse attention's indexer; return those to choose columns by."""
        states_B1TC = indexer_key_states.unsqueeze(1)
        if self.indexer_keys is None:
            self.indexer_keys = self._allocate(states_B1TC)
        return self._write(self.indexer_keys, states_B1TC).squeeze(1)

    def _write(self, stored: Tensor, states: Tensor) -> Tensor:
        """Write new columns and return those to read.

        A prefill writes its rows into their slots and reads itself; a decode step writes the cursor's column and reads
        all live columns.
        """
        window, width = self.window, states.shape[2]
        if window.prefilled is not None:
            stored[window.prefilled.to(stored.device), :, window.cursor - width : window.cursor] = states
            return states
        if window.recorded is not None:
            stored.index_copy_(2, window.recorded.cursor_1, states)
            return stored[:, :, : window.recorded.columns]
        stored[:, :, window.cursor : window.cursor + width] = states
        return stored[:, :, window.start : window.cursor + width]

    def select_rows(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Keep these slots, in this order (None: all as they are), and move the live columns."""
        for name, buffer in self.columned.items():
            setattr(self, name, _select_rows(buffer, rows, move))
        for states in (self.conv_states, self.recurrent_states) if rows is not None else ():
            for i, state in states.items():
                states[i] = state[cast(Tensor, rows).to(state.device)]

    def gather_columns(self, source_BS: Tensor) -> None:
        """Fill each row's live columns from its columns `source_BS`, counted from the window's start."""
        live = slice(self.window.start, self.window.cursor)
        for buffer in self.columned.values():
            rows_B11 = torch.arange(len(source_BS), device=buffer.device)[:, None, None]
            heads_1H1 = torch.arange(buffer.shape[1], device=buffer.device)[None, :, None]
            source_B1S = (source_BS + self.window.start).unsqueeze(1).to(buffer.device)
            buffer[:, :, live] = buffer[rows_B11, heads_1H1, source_B1S]

    def clear(self, rows: Tensor) -> None:
        """Zero these slots: what is masked must still be finite."""
        for buffer in (*self.columned.values(), *self.states):
            buffer[rows.to(buffer.device)] = 0

    # -- states without columns ---------------------------------------------------------------------------------------

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """By number of a state: True in a decode step; a prefill starts anew."""
        return defaultdict(lambda: self.window.prefilled is None)

    @property
    def states(self) -> list[Tensor]:
        """All convolution and recurrent states."""
        return [*self.conv_states.values(), *self.recurrent_states.values()]

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Store the last inputs of a convolution; return them with the inputs before them, for the convolution to read.

        `conv_states` [R or B, ..., T] are new inputs; the last `conv_kernel_size` of a slot are kept (None: all of the
        first prefill's). A prompt that is shorter gets zeros on its left.
        """
        kernel = self.conv_states[state_idx].shape[-1] if state_idx in self.conv_states else conv_kernel_size
        kernel = conv_states.shape[-1] if kernel is None else kernel
        if self.window.prefilled is None:
            full = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        else:
            full = torch.nn.functional.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        self._store(self.conv_states, state_idx, full[..., full.shape[-1] - kernel :])
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Store a recurrent state [R or B, ...] and return it."""
        self._store(self.recurrent_states, state_idx, recurrent_states)
        return recurrent_states if self.window.prefilled is not None else self.recurrent_states[state_idx]

    def _store(self, states: dict[int, Tensor], number: int, new: Tensor) -> None:
        if self.window.prefilled is None:
            states[number].copy_(new)
            return
        if number not in states:
            states[number] = new.new_zeros(self.window.slots, *new.shape[1:])
        states[number][self.window.prefilled.to(new.device)] = new.to(states[number].dtype)

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as transformers' own static layers do
        """Number of columns that a decode step attends to besides its own: 0 in a prefill, a tensor in a graph."""
        if self.window.recorded is not None:
            return self.window.recorded.cursor_1[0]
        return 0 if self.window.prefilled is not None else self.window.cursor - self.window.start

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(columns, offset) of the mask. Older transformers pass the cache positions instead of their number."""
        if self.window.recorded is not None:
            return self.window.recorded.columns, 0
        width = query_length if isinstance(query_length, int) else query_length.shape[0]
        return int(self.get_seq_length()) + width, 0

    def get_max_length(self) -> int:
        """Maximal length, -1 for none: the engine rolls the window."""
        return -1

    get_max_cache_shape = get_max_length


def _select_rows(states: Tensor, rows: Tensor | None, move: ColumnMove) -> Tensor:
    live = slice(move.start, move.start + move.width)
    moved = states[:, :, live].clone() if rows is None else states[rows.to(states.device), :, live]
    packed = states if rows is None else states.new_zeros(len(rows), *states.shape[1:])
    packed[:, :, move.to : move.to + move.width] = moved
    return packed


# --- the cache ------------------------------------------------------------------------------------------------------


def make_cache(model: PreTrainedModel, window: CacheWindow) -> SlotCache:
    """Build an empty cache of slots for a model. Several models that read the same tokens may share one window."""
    own = _own_cache_class(model)
    cache_class: type[SlotCache] = SlotCache if own is None else type(f"Slot{own.__name__}", (SlotCache, own), {})
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    return cache_class([SlotLayer(window) for _ in range(n_layers)], window)


def _own_cache_class(model: PreTrainedModel) -> type[Cache] | None:
    """Return the class of cache that a model insists on (as MiniMax does), by its annotation; None for any."""
    forward = inspect.unwrap(type(model.base_model).forward)
    annotation = forward.__annotations__.get("past_key_values")
    if isinstance(annotation, str):
        annotation = [getattr(sys.modules[forward.__module__], name.strip(), None) for name in annotation.split("|")]
    known = annotation if isinstance(annotation, list) else get_args(annotation)
    return next(
        (
            kind
            for kind in known
            if isinstance(kind, type) and issubclass(kind, DynamicCache) and kind is not DynamicCache
        ),
        None,
    )


def cache_argument(inputs: Collection[str]) -> str:
    """Return the name of the argument that takes the cache, of a forward with these arguments."""
    return "cache_params" if "cache_params" in inputs else "past_key_values"  # a model without attention calls it so


class SlotCache(Cache):
    """A transformers cache whose layers keep their state in slots. Built by `make_cache`."""

    def __init__(self, layers: Sequence[SlotLayer], window: CacheWindow) -> None:
        self.window = window
        self.slot_layers = list(layers)
        Cache.__init__(self, layers=cast(Any, self.slot_layers))  # not that of a model's own class

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.slot_layers)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return a layer's recurrent state, None in a prefill: MiniMax's own cache has this method."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Store a layer's recurrent state."""
        self.slot_layers[layer_idx].update_recurrent_state(linear_cache)

    @property
    def state_bytes(self) -> int:
        """Bytes of one slot's convolution and recurrent states."""
        return sum(s.nbytes // len(s) for layer in self.slot_layers for s in layer.states)

    def save_states(self) -> list[Tensor]:
        """Return copies of all convolution and recurrent states; the cursor can be moved back, they can't."""
        return [state.clone() for layer in self.slot_layers for state in layer.states]

    def restore_states(self, saved: Sequence[Tensor]) -> None:
        """Make the states those that `save_states` returned."""
        for state, copy in zip((s for layer in self.slot_layers for s in layer.states), saved, strict=True):
            state.copy_(copy)

    def select_rows(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Keep these slots (None: all as they are), and move the live columns. The caller updates the window."""
        for layer in self.slot_layers:
            layer.select_rows(rows, move)

    def gather_columns(self, source_BS: Tensor) -> None:
        """Close gaps: fill every row's live columns from its columns `source_BS`, counted from the window's start."""
        for layer in self.slot_layers:
            layer.gather_columns(source_BS)

    def clear(self, rows: Tensor) -> None:
        """Zero these slots."""
        for layer in self.slot_layers:
            layer.clear(rows)
