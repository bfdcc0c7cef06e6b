"""The engine's thread: it alone touches the models. It steps every lane that has work, one after the other.

Others talk to it through `submit` and `cancel`, and hear of their rows through `Row.tell`. A row is accepted or refused
at once; one that was accepted ends with an event, whatever happens to the engine.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from extraction.serving.batch_queue import BatchQueue, Ends
from extraction.serving.errors import HttpError, where
from extraction.serving.events import Failed, PendingRow, QueueName
from extraction.serving.metrics import Metrics

LONGEST_WAIT = 60  # seconds that a client is asked to wait before it tries again


class EngineThread:
    """Rows in, events out. `open_lane` makes the batch of a lane when its first row comes."""

    def __init__(
        self, open_lane: Callable[[QueueName], BatchQueue], queue: int, meter: Metrics, say: Callable[[str], None]
    ) -> None:
        self.queue, self.meter, self.say = queue, meter, say
        self.state = "ready"  # then draining, then stopped; or failed
        self.fault: str | None = None
        self._open_lane = open_lane
        self._lanes: dict[QueueName, BatchQueue] = {}
        self._rows: dict[str, PendingRow] = {}
        self._new: list[PendingRow] = []
        self._gone: list[PendingRow] = []
        self._changed = threading.Condition()
        self._last_end = time.perf_counter()
        self._pace = 1.0  # seconds between two rows that end
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- asked by others ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def n_rows(self) -> int:
        """Rows that wait or run."""
        return len(self._rows)

    def submit(self, rows: Sequence[PendingRow]) -> None:
        """Take rows, all or none. Raises Refused: 503 where none are taken any more, 429 where too many are there."""
        with self._changed:
            if self.state != "ready":
                raise self.refusal()
            if len(rows) > self.queue:
                raise HttpError(422, f"{len(rows)} rows given; this server holds {self.queue} (--queue)", code="queue")
            if len(self._rows) + len(rows) > self.queue:
                seconds = min(LONGEST_WAIT, max(1, math.ceil(self._pace * len(rows))))
                raise HttpError(
                    429,
                    f"{len(self._rows)} rows wait or run and {self.queue} are held; try again in {seconds} s",
                    code="queue",
                    headers={"retry-after": str(seconds)},
                )
            self._rows |= {row.id: row for row in rows}
            self._new += rows
            self._changed.notify()

    def cancel(self, rows: Iterable[PendingRow]) -> None:
        """Forget rows; those that have ended already don't matter."""
        with self._changed:
            left = [row for row in rows if self._rows.pop(row.id, None) is not None]
            self._gone += left
            self.meter.rows_cancelled.inc(len(left))
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing more; go on with what there is."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"

    def stop(self, patience: float = 10.0) -> None:
        """End now. Rows that have not ended are told so."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopped"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(patience)
        self._fail_all(HttpError(503, "the server has stopped; ask again when it is back", code="stopped"))

    def refusal(self) -> HttpError:
        """Why nothing is taken."""
        if self.state == "failed":
            return HttpError(503, f"the engine has failed ({self.fault}); restart the server", code="engine")
        return HttpError(
            503, "the server is stopping; ask another, or later", code=self.state, headers={"retry-after": "5"}
        )

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                for lane, batch in list(self._lanes.items()):
                    if batch.has_work:
                        self._advance(lane, batch)
        except BaseException as failure:
            with self._changed:
                self.state, self.fault = "failed", type(failure).__name__
            self.say(f"the engine has failed: {where(failure)}")
            self._fail_all(HttpError(500, f"the engine has failed ({self.fault}); restart the server", code="engine"))

    def _take(self) -> bool:
        """Wait for work; hand what is new to the lanes. False: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._gone or self.state == "stopped" or self._has_work())
            new, gone, self._new, self._gone = self._new, self._gone, [], []
            going = self.state != "stopped"
        if going:
            self._hand_over(new, gone)
        return going

    def _has_work(self) -> bool:
        return any(batch.has_work for batch in self._lanes.values())

    def _hand_over(self, new: Sequence[PendingRow], gone: Sequence[PendingRow]) -> None:
        for row in new:
            if row.lane not in self._lanes:
                self._lanes[row.lane] = self._open_lane(row.lane)
            self._lanes[row.lane].add(row)
        for row in gone:
            self._lanes[row.lane].drop(row)

    def _advance(self, lane: QueueName, batch: BatchQueue) -> None:
        before = batch.n_out_of_memory
        began = time.perf_counter()
        ends = batch.advance()
        self.meter.count_step(lane[0], time.perf_counter() - began, batch.n_out_of_memory - before)
        if batch.n_out_of_memory > before:
            for other in self._lanes.values():
                if not other.has_work:
                    other.release()
        self._end(ends)

    def _end(self, ends: Ends) -> None:
        """Rows that ended make room first, then are told."""
        if not ends:
            return
        now = time.perf_counter()
        with self._changed:
            self._pace = 0.8 * self._pace + 0.2 * (now - self._last_end) / len(ends)
            self._last_end = now
            ends = [(row, event) for row, event in ends if self._rows.pop(row.id, None) is not None]
        for row, event in ends:
            self.meter.count_end(row, event)
            row.tell(event)

    def _fail_all(self, error: HttpError) -> None:
        with self._changed:
            rows, self._rows = list(self._rows.values()), {}
        for row in rows:
            row.tell(Failed(error))
