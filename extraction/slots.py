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

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Window:
    """The columns in use: `[start, cursor)` hold live tokens; `entering` names the slots that a prefill fills."""

    slots: int
    columns: int
    cursor: int = 0
    start: int = 0
    entering: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, S, C], written in place."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
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
        if window.entering is not None:
            rows, columns = window.entering.to(self.keys.device), slice(window.cursor - width, window.cursor)
            self.keys[rows, :, columns] = key_states
            self.values[rows, :, columns] = value_states
            return key_states, value_states
        self.keys[:, :, window.cursor : window.cursor + width] = key_states
        self.values[:, :, window.cursor : window.cursor + width] = value_states
        live = slice(window.start, window.cursor + width)
        return self.keys[:, :, live], self.values[:, :, live]

    def repack(self, rows: Tensor | None, start: int, cursor: int) -> None:
        """Keep only these rows (None: all), and roll columns `[start, cursor)` to the left edge."""
        if self.keys is None or self.values is None:
            return
        self.keys, self.values = (_repacked(states, rows, start, cursor) for states in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Columns that a decode step attends to besides its own; 0 in a prefill."""
        return 0 if self.window.entering is not None else self.window.cursor - self.window.start

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(columns, offset) of the mask; older versions pass the cache positions instead of their number."""
        width = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + width, 0

    def get_max_length(self) -> int:
        """No limit of its own: the engine rolls the window."""
        return -1

    get_max_cache_shape = get_max_length


def _repacked(states: Tensor, rows: Tensor | None, start: int, cursor: int) -> Tensor:
    live = states[:, :, start:cursor] if rows is None else states[rows.to(states.device), :, start:cursor]
    if rows is None:
        live = live.clone()
    packed = states if rows is None else states.new_zeros(len(rows), *states.shape[1:])
    packed[:, :, : cursor - start] = live
    return packed


class SlotCache(Cache):
    """A transformers cache whose layers are slots."""

    def __init__(self, n_layers: int, slots: int, columns: int) -> None:
        self.window = Window(slots, columns)
        self.slot_layers = [SlotLayer(self.window) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))

    @contextmanager
    def entering(self, rows: Tensor, cursor: int) -> Iterator[None]:
        """Around a prefill: its keys and values go into these slots, and end at the cursor."""
        self.window.entering, self.window.cursor = rows, cursor
        try:
            yield
        finally:
            self.window.entering = None

    def repack(self, rows: Tensor | None = None) -> None:
        """Roll live columns to the left edge; with `rows`, shrink the batch to those slots."""
        window = self.window
        for layer in self.slot_layers:
            layer.repack(rows, window.start, window.cursor)
        window.cursor, window.start = window.cursor - window.start, 0
        window.slots = window.slots if rows is None else len(rows)
