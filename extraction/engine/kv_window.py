"""The KV window: the columns of the cache that all slots share, which of them are live, and how they move.

Every slot writes the same column, the cursor, so a slot's tokens end there (left padding).

Shapes: B slots, R rows that enter, P prompt columns, S columns of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.model.kv_cache import CacheWindow, ColumnMove

if TYPE_CHECKING:
    from extraction.engine.strategies import ModelWithCache


class KVWindow:
    """Columns of the caches of one or more models that read the same tokens.

    `mask_BS` is the attention mask: columns from the cursor on are True, so that a step sees its own. `width` is the
    largest number of columns that one decode step writes. `dirty` holds rows whose cached numbers may be NaN.
    """

    def __init__(self, window: CacheWindow, models: Sequence[ModelWithCache], width: int, device: torch.device) -> None:
        self.window, self.models, self.width = window, models, width
        self.mask_BS = torch.ones(1, window.columns, dtype=torch.bool, device=device)
        self.first_column: list[int | None] = [None]
        self.dirty: set[int] = set()

    @property
    def n_live(self) -> int:
        """Number of columns between the first one that a running row needs and the cursor."""
        return self.window.cursor - self.window.start

    def has_room(self, n_columns: int) -> bool:
        """True if so many columns fit between the cursor and the end of the window."""
        return self.window.cursor + n_columns <= self.window.columns

    def make_room(self, prompt_width: int, lengths: Sequence[int | None]) -> None:
        """Make a prompt fit to the left of the cursor, and a step to the right of it."""
        if all(first is None for first in self.first_column):
            self.window.cursor = self.window.start = prompt_width
        if self.window.cursor < prompt_width or not self.has_room(self.width):
            self.roll(lengths, prompt_width)

    def admit(self, rows: Sequence[int], rows_R: Tensor, mask_RP: Tensor, n_prompt: Sequence[int]) -> None:
        """Give rows the columns of their left-padded prompts, which end at the cursor."""
        cursor = self.window.cursor
        for row, n_tokens in zip(rows, n_prompt, strict=True):
            self.first_column[row] = cursor - n_tokens
        self.mask_BS[rows_R] = False
        self.mask_BS[rows_R, cursor - mask_RP.shape[1] : cursor] = mask_RP
        self.mask_BS[rows_R, cursor:] = True
        if self.dirty.intersection(rows):
            for model in self.models:  # attention multiplies masked values by zero, and NaN times zero is NaN
                model.cache.clear(rows_R)
        self.dirty.difference_update(rows)
        self.update_start()

    def free(self, rows: Sequence[int]) -> None:
        """Mark rows as idle: they keep nothing to attend to but the columns of the step itself."""
        for row in rows:
            self.first_column[row] = None
            self.mask_BS[row, : self.window.cursor] = False
        self.update_start()

    def update_start(self) -> None:
        """Move the window's start to the first column that a running row still needs."""
        live = [first for first in self.first_column if first is not None]
        self.window.start = min(live, default=self.window.cursor)

    def compact(self, lengths: Sequence[int | None]) -> None:
        """Close the holes that rejected proposals left: every row's tokens end at the cursor again."""
        live = slice(self.window.start, self.window.cursor)
        source_BS = self.mask_BS[:, live].int().argsort(dim=1, stable=True)
        for model in self.models:
            model.cache.gather_columns(source_BS)
        self.mask_BS[:, live] = self.mask_BS[:, live].gather(1, source_BS)
        self.first_column = [None if length is None else self.window.cursor - length for length in lengths]
        self.update_start()

    def roll(self, lengths: Sequence[int | None], width: int = 0, rows: Sequence[int] | None = None) -> None:
        """Move the live columns to the left edge, or so far that `width` columns fit before the cursor.

        `rows`: the rows that the slots become (None: all, as they are); one that is named again becomes idle.
        """
        if self.width > 1:
            self.compact(lengths)
        n_live = self.n_live
        move = ColumnMove(self.window.start, n_live, max(n_live, width) - n_live)
        rows_B = None if rows is None else torch.tensor(rows, device=self.mask_BS.device)
        for model in self.models:
            model.cache.select_rows(rows_B, move)
        self._move_mask(rows_B, move)
        kept = range(len(self.first_column)) if rows is None else rows
        shift = move.to - move.start
        self.first_column = [
            None if (first := self.first_column[row]) is None or row in kept[:i] else first + shift
            for i, row in enumerate(kept)
        ]
        self.window.start, self.window.cursor = move.to, move.to + move.width
        if rows is not None:
            self.window.slots = len(rows)
            self.dirty = {i for i, row in enumerate(rows) if row in self.dirty}

    def _move_mask(self, rows_B: Tensor | None, move: ColumnMove) -> None:
        source_BS = self.mask_BS if rows_B is None else self.mask_BS[rows_B]
        moved_BS = source_BS[:, move.start : move.start + move.width].clone()
        self.mask_BS = source_BS  # where the rows stay, the same buffer: CUDA graphs read it
        self.mask_BS.fill_(True)
        self.mask_BS[:, : move.to] = False
        self.mask_BS[:, move.to : move.to + move.width] = moved_BS
