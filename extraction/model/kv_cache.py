"""The key-value cache of a running batch: slots that share one window of columns.

Every slot writes the same column, the cursor, so a slot's tokens END there (left padding). New rows are prefilled to
the left of the cursor, and their keys and values go straight into their slots. Works with every model that keeps its
cache in a transformers `Cache`.

`make_cache` is the only place where a cache is built. What a layer keeps per row depends on the layer's kind:
`LAYER_CLASSES` maps a kind to a class that follows `SlotLayer`. To keep another kind of state (the convolution and
recurrent states of hybrid models), add its class and its entry there.

Shapes: B slots, H heads, S columns, C head dimension, R rows of a prefill, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


# --- per-row state of one layer -------------------------------------------------------------------------------------


class SlotLayer(Protocol):
    """State that one layer keeps per slot: a transformers cache layer that can also follow the slots.

    transformers calls the update methods of its own layer classes: `update` for keys and values, `update_conv_state`
    and `update_recurrent_state` for recurrent layers (`LinearAttentionCacheLayerMixin`). They must write a prefill
    (`window.prefilled`) to its slots, and a decode step in place: a captured graph replays the same addresses. A state
    without columns ignores moves and `gather_columns`.
    """

    def select_rows(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Keep these slots, in this order (None: all as they are), and move the live columns."""

    def gather_columns(self, source_BS: Tensor) -> None:
        """Fill each row's live columns from its columns `source_BS`, counted from the window's start."""

    def clear(self, rows: Tensor) -> None:
        """Zero these slots."""


class SlotKVLayer(CacheLayerMixin):
    """One attention layer's keys and values [B, H, S, C], written in place."""

    is_sliding = False

    def __init__(self, window: CacheWindow) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros, not uninitialised memory: a masked NaN is still a NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.window.slots, states.shape[1], self.window.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those to attend to.

        A prefill writes its rows into their slots and attends to itself; a decode step writes the cursor's column and
        attends to all live columns.
        """
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
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                stored.index_copy_(2, window.recorded.cursor_1, states)
            return self.keys[:, :, : window.recorded.columns], self.values[:, :, : window.recorded.columns]
        self.keys[:, :, window.cursor : window.cursor + width] = key_states
        self.values[:, :, window.cursor : window.cursor + width] = value_states
        live = slice(window.start, window.cursor + width)
        return self.keys[:, :, live], self.values[:, :, live]

    def select_rows(self, rows: Tensor | None, move: ColumnMove) -> None:
        """Keep these slots, in this order (None: all as they are), and move the live columns."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (_select_rows(states, rows, move) for states in (self.keys, self.values))

    def gather_columns(self, source_BS: Tensor) -> None:
        """Fill each row's live columns from its columns `source_BS`, counted from the window's start."""
        if self.keys is None or self.values is None:
            return
        live = slice(self.window.start, self.window.cursor)
        rows_B11 = torch.arange(len(source_BS), device=source_BS.device)[:, None, None].to(self.keys.device)
        heads_1H1 = torch.arange(self.keys.shape[1], device=self.keys.device)[None, :, None]
        source_B1S = (source_BS + self.window.start).unsqueeze(1).to(self.keys.device)
        for states in (self.keys, self.values):
            states[:, :, live] = states[rows_B11, heads_1H1, source_B1S]

    def clear(self, rows: Tensor) -> None:
        """Zero these slots: what is masked must still be finite."""
        if self.keys is not None and self.values is not None:
            for states in (self.keys, self.values):
                states[rows.to(states.device)] = 0

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


# layer kind (as in a config's `layer_types`) -> class of its per-slot state; a model with any other kind is refused
LAYER_CLASSES: dict[str, Callable[[CacheWindow], SlotLayer]] = dict.fromkeys(
    ("full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"), SlotKVLayer
)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Return the kind of every layer of a text config; one that names none has attention in all layers."""
    n_layers = int(config.num_hidden_layers)
    kinds = tuple(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    return kinds or ("full_attention",) * n_layers


# --- the cache ------------------------------------------------------------------------------------------------------


def make_cache(model: PreTrainedModel, window: CacheWindow) -> SlotKVCache:
    """Build an empty cache of slots for a model. Several models that read the same tokens may share one window."""
    kinds = layer_kinds(model.config.get_text_config())
    return SlotKVCache([LAYER_CLASSES[kind](window) for kind in kinds], window)


class SlotKVCache(Cache):
    """A transformers cache whose layers keep their state in slots. Built by `make_cache`."""

    def __init__(self, layers: Sequence[SlotLayer], window: CacheWindow) -> None:
        self.window = window
        self.slot_layers = list(layers)
        super().__init__(layers=cast(Any, self.slot_layers))

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
