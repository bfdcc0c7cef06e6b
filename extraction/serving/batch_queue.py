"""A lane: one running batch, the rows that wait for it, and what happens when memory runs out.

A batch that ran out of memory is made again with half the slots and the rows that it held. A row that runs out of
memory alone fails alone, and the others get all the slots again. A batch that stays small grows back, step by step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from extraction.core.errors import TraitlineError
from extraction.serving.errors import HttpError
from extraction.serving.events import Event, Failed, PendingRow

if TYPE_CHECKING:
    from extraction.engine.batch import ContinuousBatch

Ends = list[tuple[PendingRow, Event]]

ROUNDS = 4  # of rows that went well, after which a smaller batch grows again


class BatchQueue:
    """The rows of one kind, in the order in which they came. Used by the engine's thread alone."""

    def __init__(self, make: Callable[[int], ContinuousBatch], slots: int, *, keeps: bool = True) -> None:
        self.make, self.full, self.slots, self.keeps = make, slots, slots, keeps
        self.waiting: deque[PendingRow] = deque()
        self.inside: dict[str, PendingRow] = {}
        self.running: ContinuousBatch | None = None
        self.well = 0  # rows that ended since memory ran out
        self.n_out_of_memory = 0

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.inside)

    def add(self, row: PendingRow) -> None:
        """Queue a row."""
        self.waiting.append(row)

    def drop(self, row: PendingRow) -> None:
        """Forget a row; its slot is free at once."""
        if self.inside.pop(row.id, None) is not None and self.running is not None:
            self.running.cancel(row.id)
        elif row in self.waiting:
            self.waiting.remove(row)

    def advance(self) -> Ends:
        """One step of every row. Returns the rows that ended, and how."""
        from extraction.model.memory import is_out_of_memory

        ends: Ends = []
        try:
            self._feed(ends)
            self._step(ends)
            return ends
        except Exception as failure:
            if not is_out_of_memory(failure):
                raise
        # outside of the handler: what it holds on to is what memory is needed for
        return ends + self._shrink()

    def _feed(self, ends: Ends) -> None:
        """Rows go in as long as there is room; beyond its slots, a full batch knows those that come next."""
        if self.slots < self.full and self.well >= ROUNDS * self.slots:
            if self.inside:
                return  # it runs empty, then grows
            self._resize(min(self.full, 2 * self.slots))
        room = self.slots * (2 if 1 < self.slots == self.full else 1) - len(self.inside)
        entering = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.inside |= {row.id: row for row in entering}
        if self.running is None:
            self.running = self.make(self.slots)
        for row in entering:
            row.restart()
        try:
            self.running.add([row.request for row in entering])
        except TraitlineError:
            ends += self._add_each(self.running, entering)

    def _add_each(self, running: ContinuousBatch, rows: Sequence[PendingRow]) -> Ends:
        """Where some don't fit, they fail, and the others go in."""
        ends: Ends = []
        for row in rows:
            try:
                running.add([row.request])
            except TraitlineError as failure:
                del self.inside[row.id]
                ends.append((row, Failed(HttpError(422, str(failure), code="does_not_fit"))))
        return ends

    def _step(self, ends: Ends) -> None:
        if not self.inside or self.running is None:
            return
        with self.running.attached():
            step = self.running.step()
        for row_id, token_ids in step.new_tokens.items():
            if row_id in self.inside:
                self.inside[row_id].hear(token_ids)
        ended = [(self.inside.pop(each.id), each) for each in step.completions if each.id in self.inside]
        self.well += len(ended)
        if not self.has_work and (self.slots < self.full or not self.keeps):
            self.release()
        ends += [(row, row.finished(completion)) for row, completion in ended]

    def release(self) -> None:
        """Give an idle batch's memory back."""
        self._resize(self.full)

    def _shrink(self) -> Ends:
        """Memory ran out: half the slots, or without the row that needs it all."""
        self.n_out_of_memory += 1
        ends: Ends = []
        rows = list(self.inside.values())  # never empty: what is added is inside before memory is asked for
        if self.slots == 1:
            alone = rows.pop(0)
            error = HttpError(
                507, "out of memory with this prompt alone; shorten it or ask for fewer tokens", code="memory"
            )
            ends.append((alone, Failed(error)))
        slots = self.full if self.slots == 1 else self.slots // 2
        self.inside.clear()
        self.waiting.extendleft(reversed(rows))
        self._resize(slots)
        return ends

    def _resize(self, slots: int) -> None:
        from extraction.model.devices import empty_cache

        self.slots, self.running, self.well = slots, None, 0
        empty_cache()
