"""Rows on their way through the engine, their events, and the queue of the rows that share one continuous batch.

A row is one prompt of a request. The engine's thread calls its `emit` with each event.

A batch that runs out of memory is rebuilt with half the slots, and its rows start again. A row that runs out of memory
alone in the batch fails, and the batch is rebuilt with all slots for the others. A batch with fewer slots grows back:
its slots are doubled after GROW_AFTER times as many rows have ended as it has slots.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from extraction.core.errors import TraitlineError
from extraction.serving.errors import HttpError

if TYPE_CHECKING:
    from extraction.engine.batch import ContinuousBatch
    from extraction.engine.requests import Completion, Request


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a row whose response is streamed."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """A row's completion. Seconds count from its acceptance; `first_seconds` is None if it has no tokens."""

    completion: Completion
    seconds: float
    first_seconds: float | None


@dataclass(frozen=True)
class Failed:
    """A row that ended without a completion."""

    error: HttpError


Event = NewTokens | Finished | Failed


class QueueName(NamedTuple):
    """Rows of one kind of generation and one speculation depth (0: none) share a queue and a batch."""

    kind: str
    depth: int = 0


@dataclass(eq=False)
class PendingRow:
    """One prompt that waits or runs. The engine's thread calls `emit` with each event.

    When a batch runs out of memory, its rows start again. A row's tokens depend on its request alone, so the same ones
    are generated again; `n_emitted` counts those that have been emitted, so that none is emitted twice.
    """

    queue: QueueName
    request: Request
    emit: Callable[[Event], None]
    stream: bool = False
    accepted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    n_generated: int = 0
    n_emitted: int = 0

    @property
    def id(self) -> str:
        """Id of the engine's request."""
        return self.request.id

    def restart(self) -> None:
        """Reset the token count: the row's tokens are generated again from the first."""
        self.n_generated = 0

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens; if the response is streamed, emit those not emitted before."""
        if token_ids and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        new_ids = tuple(token_ids[max(0, self.n_emitted - self.n_generated) :])
        self.n_generated += len(token_ids)
        self.n_emitted += len(new_ids)
        if new_ids and self.stream:
            self.emit(NewTokens(new_ids))

    def end_event(self, completion: Completion) -> Event:
        """Return the row's last event: its completion, or the error if its logits were not finite."""
        if completion.fault is not None:
            return Failed(HttpError(500, str(completion.fault), code="not_finite"))
        first_seconds = None if self.first_token_at is None else self.first_token_at - self.accepted_at
        return Finished(completion, time.perf_counter() - self.accepted_at, first_seconds)


EndedRows = list[tuple[PendingRow, Event]]

GROW_AFTER = 4


class BatchQueue:
    """Rows in order of arrival, and the batch that decodes them. Used by the engine's thread alone.

    Args:
        make_batch: Makes a batch of a number of slots.
        max_slots: Slots of the batch while memory suffices.
        keep_batch: False to free the batch's memory whenever the queue is empty.
    """

    def __init__(
        self, make_batch: Callable[[int], ContinuousBatch], max_slots: int, *, keep_batch: bool = True
    ) -> None:
        self.make_batch, self.max_slots, self.slots, self.keep_batch = make_batch, max_slots, max_slots, keep_batch
        self.waiting: deque[PendingRow] = deque()
        self.in_batch: dict[str, PendingRow] = {}
        self.batch: ContinuousBatch | None = None
        self.n_out_of_memory = 0
        self._n_ended = 0  # rows that ended since the batch was last resized

    @property
    def has_work(self) -> bool:
        """True if any row waits or runs."""
        return bool(self.waiting or self.in_batch)

    def add(self, row: PendingRow) -> None:
        """Append a row."""
        self.waiting.append(row)

    def drop(self, row: PendingRow) -> None:
        """Remove a row without an event; its slot is free for the next step."""
        if self.in_batch.pop(row.id, None) is not None and self.batch is not None:
            self.batch.cancel(row.id)
        elif row in self.waiting:
            self.waiting.remove(row)

    def step(self) -> EndedRows:
        """Run one decode step of the batch. Returns the rows that ended, with their last events."""
        from extraction.model.memory import is_out_of_memory

        ended: EndedRows = []
        try:
            self._fill(ended)
            self._decode(ended)
            return ended
        except Exception as failure:
            if not is_out_of_memory(failure):
                raise
        # outside the handler: the exception's frames would keep the tensors alive
        return ended + self._recover_memory()

    def _fill(self, ended: EndedRows) -> None:
        """Move waiting rows into the batch.

        A batch of full size gets as many rows again beyond its slots, so that it can schedule the next ones itself.
        """
        if self.slots < self.max_slots and self._n_ended >= GROW_AFTER * self.slots:
            if self.in_batch:
                return  # wait until it is empty, then grow
            self._resize(min(self.max_slots, 2 * self.slots))
        room = self.slots * (2 if 1 < self.slots == self.max_slots else 1) - len(self.in_batch)
        entering = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.in_batch |= {row.id: row for row in entering}
        if self.batch is None:
            self.batch = self.make_batch(self.slots)
        for row in entering:
            row.restart()
        try:
            self.batch.add([row.request for row in entering])
        except TraitlineError:
            ended += self._add_one_by_one(self.batch, entering)

    def _add_one_by_one(self, batch: ContinuousBatch, rows: Sequence[PendingRow]) -> EndedRows:
        """Add rows of which some do not fit. Returns those that do not."""
        ended: EndedRows = []
        for row in rows:
            try:
                batch.add([row.request])
            except TraitlineError as failure:
                del self.in_batch[row.id]
                ended.append((row, Failed(HttpError(422, str(failure), code="does_not_fit"))))
        return ended

    def _decode(self, ended: EndedRows) -> None:
        if not self.in_batch or self.batch is None:
            return
        with self.batch.attached():
            step = self.batch.step()
        for row_id, token_ids in step.new_tokens.items():
            if row_id in self.in_batch:
                self.in_batch[row_id].on_tokens(token_ids)
        done = [
            (self.in_batch.pop(completion.id), completion)
            for completion in step.completions
            if completion.id in self.in_batch
        ]
        self._n_ended += len(done)
        if not self.has_work and (self.slots < self.max_slots or not self.keep_batch):
            self.release()
        ended += [(row, row.end_event(completion)) for row, completion in done]

    def release(self) -> None:
        """Free the memory of the idle batch; the next one has all slots."""
        self._resize(self.max_slots)

    def _recover_memory(self) -> EndedRows:
        """Put the batch's rows back and halve its slots; fail the row that ran out of memory in a batch of one slot."""
        self.n_out_of_memory += 1
        ended: EndedRows = []
        rows = list(self.in_batch.values())  # never empty: rows enter `in_batch` before memory is allocated for them
        if self.slots == 1:
            message = "out of memory with this prompt alone; shorten it or ask for fewer tokens"
            ended.append((rows.pop(0), Failed(HttpError(507, message, code="memory"))))
        slots = self.max_slots if self.slots == 1 else self.slots // 2
        self.in_batch.clear()
        self.waiting.extendleft(reversed(rows))
        self._resize(slots)
        return ended

    def _resize(self, slots: int) -> None:
        from extraction.model.devices import empty_cache

        self.slots, self.batch, self._n_ended = slots, None, 0
        empty_cache()
