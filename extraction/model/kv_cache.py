"""The key-value cache of a running batch: slots that share one window of columns.

Every slot writes the same column, the cursor, so a slot's tokens END there (left padding). New rows enter to the left
of the cursor, in one prefill whose keys and values go straight into their slots. Works with every model that keeps its
cache in a transformers `Cache`.

Shapes: B slots, H heads, S columns, C head dimension, R rows that enter, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class GraphCursor:
    """Of a step that is recorded, to be replayed at other cursors: the cursor [1] on the device, columns to attend to.

    All of the first `columns` are read; what lies past the cursor is for the mask to leave out.
    """

    cursor_1: Tensor
    columns: int


@dataclass
class CacheWindow:
    """The columns in use: `[start, cursor)` hold live tokens; `prefilled` names the slots that a prefill fills."""

    slots: int
    columns: int
    cursor: int = 0
    start: int = 0
    prefilled: Tensor | None = None
    recorded: GraphCursor | None = None

    @contextmanager
    def entering(self, rows: Tensor, cursor: int) -> Iterator[None]:
        """Around a prefill: its keys and values go into these slots, and end at the cursor."""
        self.prefilled, self.cursor = rows, cursor
        try:
            yield
        finally:
            self.prefilled = None

    @contextmanager
    def recording(self, recorded: GraphCursor) -> Iterator[None]:
        """Around a step that is to be replayed."""
        self.recorded = recorded
        try:
            yield
        finally:
            self.recorded = None

    @contextmanager
    def at(self, cursor: int) -> Iterator[None]:
        """Around a pass that writes from another column on."""
        was, self.cursor = self.cursor, cursor
        try:
            yield
        finally:
            self.cursor = was


@dataclass(frozen=True)
class ColumnMove:
    """`width` columns from `start` on go to the columns from `to` on."""

    start: int
    width: int
    to: int = 0


class SlotKVLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, S, C], written in place."""

    is_sliding = False

    def __init__(self, window: CacheWindow) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros, not garbage: a masked NaN is still a NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.window.slots, states.shape[1], self.window.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prefill: rows go into their slots, and see themselves. Decode: write the cursor's column, see all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        window, width = self.window, key_states.shape[2]
        if window.prefilled is not None:
            rows, columns = window.prefilled.to(self.keys.device), slice(window.cursor - width, window.cursor)
            self.keys[rows, :, columns] = key_states
            self.values[rows, :, columns] = value_states
            return key_states, value_states
        if window.recorded is not None:
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                kept.index_copy_(2, window.recorded.cursor_1, states)
            return self.keys[:, :, : window.recorded.columns], self.values[:, :, : window.recorded.columns]
        self.keys[:, :, window.cursor : window.cursor + width] = key_states
        self.values[:, :, window.cursor : window.cursor + width] = value_states
        live = slice(window.start, window.cursor + width)
        return self.keys[:, :, live], self.values[:, :, live]

    def repack(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Take these rows (None: all, as they are), and move the live columns."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (_repacked(states, rows, move) for states in (self.keys, self.values))

    def align(self, source_BS: Tensor) -> None:
        """Live columns, each from the column `source_BS`, counted from the window's start."""
        if self.keys is None or self.values is None:
            return
        live = slice(self.window.start, self.window.cursor)
        rows_B11 = torch.arange(len(source_BS), device=source_BS.device)[:, None, None].to(self.keys.device)
        heads_1H1 = torch.arange(self.keys.shape[1], device=self.keys.device)[None, :, None]
        source_B1S = (source_BS + self.window.start).unsqueeze(1).to(self.keys.device)
        for states in (self.keys, self.values):
            states[:, :, live] = states[rows_B11, heads_1H1, source_B1S]

    def clear(self, rows: Tensor) -> None:
        """Zero these rows: what is masked must still be finite."""
        if self.keys is not None and self.values is not None:
            for states in (self.keys, self.values):
                states[rows.to(states.device)] = 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as transformers' own static layers do
        """Columns that a decode step attends to besides its own; 0 in a prefill; on the device where it is recorded."""
        if self.window.recorded is not None:
            return self.window.recorded.cursor_1[0]
        return 0 if self.window.prefilled is not None else self.window.cursor - self.window.start

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(columns, offset) of the mask; older versions pass the cache positions instead of their number."""
        if self.window.recorded is not None:
            return self.window.recorded.columns, 0
        width = query_length if isinstance(query_length, int) else query_length.shape[0]
        return int(self.get_seq_length()) + width, 0

    def get_max_length(self) -> int:
        """No limit of its own: the engine rolls the window."""
        return -1

    get_max_cache_shape = get_max_length


def _repacked(states: Tensor, rows: Tensor | None, move: ColumnMove) -> Tensor:
    live = slice(move.start, move.start + move.width)
    moved = states[:, :, live].clone() if rows is None else states[rows.to(states.device), :, live]
    packed = states if rows is None else states.new_zeros(len(rows), *states.shape[1:])
    packed[:, :, move.to : move.to + move.width] = moved
    return packed


class SlotKVCache(Cache):
    """A transformers cache whose layers are slots. Several models that read the same tokens share one window."""

    def __init__(self, n_layers: int, window: CacheWindow) -> None:
        self.window = window
        self.slot_layers = [SlotKVLayer(window) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))

    def repack(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Take these slots (None: all, as they are), and move the live columns; the window is the caller's."""
        for layer in self.slot_layers:
            layer.repack(rows, move)

    def align(self, source_BS: Tensor) -> None:
        """Bring every row's live columns together, each from the column `source_BS` of the window."""
        for layer in self.slot_layers:
            layer.align(source_BS)

    def clear(self, rows: Tensor) -> None:
        """Zero these slots."""
        for layer in self.slot_layers:
            layer.clear(rows)
