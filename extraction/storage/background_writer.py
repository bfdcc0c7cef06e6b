"""A background thread that writes finished shards while the engine goes on.

Tasks run in order, and at most MAX_PENDING wait at a time, so that memory does not grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

MAX_PENDING = 2


class BackgroundWriter:
    """A thread that runs the tasks given to `put`; leaving the `with` block waits for all of them.

    After an error no other task runs; the error is raised by the next `put`, or at the end of the block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> BackgroundWriter:
        return self

    def put(self, task: Callable[[], None]) -> None:
        """Queue a task; wait while too many are pending."""
        while self._pending and (len(self._pending) >= MAX_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, task))

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._pool.shutdown()
        except BaseException:  # a signal during the wait: queued tasks are finished all the same
            self._pool.shutdown()
            raise
        if failure is None:
            for pending in self._pending:
                pending.result()
