"""The thread that runs the models. It steps every batch queue that has work, in turn.

Other threads call `submit` and `cancel`, and receive events through `PendingRow.emit`. A row is accepted or refused at
once; an accepted row always ends with an event, also if the engine fails.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from extraction.serving.batch_queue import BatchQueue, EndedRows, Failed, PendingRow, QueueName
from extraction.serving.errors import HttpError, code_location
from extraction.serving.metrics import Metrics

MAX_RETRY_SECONDS = 60


class EngineThread:
    """Scheduler of the batch queues.

    `state` is "ready", "draining" (no new rows), "stopped" or "failed".

    Args:
        open_queue: Makes the queue of a name when its first row arrives.
        max_rows: Rows that may wait or run at a time.
        metrics: Counts steps and rows.
        log: Prints one line for the operator.
    """

    def __init__(
        self,
        open_queue: Callable[[QueueName], BatchQueue],
        max_rows: int,
        metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:
        self.max_rows, self.metrics, self.log = max_rows, metrics, log
        self.state = "ready"
        self.fault: str | None = None
        self._open_queue = open_queue
        self._queues: dict[QueueName, BatchQueue] = {}
        self._rows: dict[str, PendingRow] = {}
        self._submitted: list[PendingRow] = []
        self._cancelled: list[PendingRow] = []
        self._changed = threading.Condition()
        self._last_end = time.perf_counter()
        self._seconds_per_row = 1.0  # between two rows that end: a running mean
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from other threads ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def n_rows(self) -> int:
        """Number of rows that wait or run."""
        return len(self._rows)

    def submit(self, rows: Sequence[PendingRow]) -> None:
        """Accept all rows or none.

        Raises HttpError: 429 while too many rows wait or run, 422 for more rows than can ever be accepted, 503 when
        the engine is not ready.
        """
        with self._changed:
            if self.state != "ready":
                raise self.unavailable_error()
            if len(rows) > self.max_rows:
                message = f"{len(rows)} rows given; this server holds at most {self.max_rows} (--queue)"
                raise HttpError(422, message, code="queue")
            if len(self._rows) + len(rows) > self.max_rows:
                seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(self._seconds_per_row * len(rows))))
                message = f"{len(self._rows)} of at most {self.max_rows} rows wait or run; try again in {seconds} s"
                raise HttpError(429, message, code="queue", headers={"retry-after": str(seconds)})
            self._rows |= {row.id: row for row in rows}
            self._submitted += rows
            self._changed.notify()

    def cancel(self, rows: Iterable[PendingRow]) -> None:
        """Remove the rows that have not ended, without an event."""
        with self._changed:
            removed = [row for row in rows if self._rows.pop(row.id, None) is not None]
            self._cancelled += removed
            self.metrics.rows_cancelled.inc(len(removed))
            self._changed.notify()

    def drain(self) -> None:
        """Accept no more rows; finish the accepted ones."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"

    def stop(self, timeout: float = 10.0) -> None:
        """Stop after the current step, waiting for it `timeout` seconds. Rows that have not ended fail with 503."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopped"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._fail_all(HttpError(503, "the server has stopped; ask again when it runs", code="stopped"))

    def unavailable_error(self) -> HttpError:
        """Return the error for a request that arrives while the engine is not ready."""
        if self.state == "failed":
            return HttpError(503, f"the engine has failed ({self.fault}); restart the server", code="engine")
        message = "the server is stopping; use another one, or try again later"
        return HttpError(503, message, code=self.state, headers={"retry-after": "5"})

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                for name, queue in list(self._queues.items()):
                    if queue.has_work:
                        self._step(name, queue)
        except BaseException as failure:
            with self._changed:
                self.state, self.fault = "failed", type(failure).__name__
            self.log(f"the engine has failed: {code_location(failure)}")
            self._fail_all(HttpError(500, f"the engine has failed ({self.fault}); restart the server", code="engine"))

    def _wait_for_work(self) -> bool:
        """Block until there is work, and dispatch new and cancelled rows. Returns False when the engine is stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._submitted or self._cancelled or self.state == "stopped" or self._has_work()
            )
            submitted, cancelled, self._submitted, self._cancelled = self._submitted, self._cancelled, [], []
            stopped = self.state == "stopped"
        if not stopped:
            self._dispatch(submitted, cancelled)
        return not stopped

    def _has_work(self) -> bool:
        return any(queue.has_work for queue in self._queues.values())

    def _dispatch(self, submitted: Sequence[PendingRow], cancelled: Sequence[PendingRow]) -> None:
        for row in submitted:
            if row.queue not in self._queues:
                self._queues[row.queue] = self._open_queue(row.queue)
            self._queues[row.queue].add(row)
        for row in cancelled:
            self._queues[row.queue].drop(row)

    def _step(self, name: QueueName, queue: BatchQueue) -> None:
        n_before = queue.n_out_of_memory
        started = time.perf_counter()
        ended = queue.step()
        n_out_of_memory = queue.n_out_of_memory - n_before
        self.metrics.count_step(name.kind, time.perf_counter() - started, n_out_of_memory)
        if n_out_of_memory:
            for other in self._queues.values():
                if not other.has_work:
                    other.release()
        self._finish(ended)

    def _finish(self, ended: EndedRows) -> None:
        """Free the places of ended rows, then emit their last events."""
        if not ended:
            return
        now = time.perf_counter()
        with self._changed:
            self._seconds_per_row = 0.8 * self._seconds_per_row + 0.2 * (now - self._last_end) / len(ended)
            self._last_end = now
            ended = [(row, event) for row, event in ended if self._rows.pop(row.id, None) is not None]
        for row, event in ended:
            self.metrics.count_end(row, event)
            row.emit(event)

    def _fail_all(self, error: HttpError) -> None:
        with self._changed:
            rows, self._rows = list(self._rows.values()), {}
        for row in rows:
            row.emit(Failed(error))
