"""Work that is done by one thread in the background, in the order in which it is handed over: writing, while rows run.

Little of it waits at a time, so that memory stays flat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

MAX_PENDING = 2


class BackgroundWriter:
    """A thread that does what is `put`, while a `with` lasts; its end waits for all that was handed over.

    After an error nothing more is done, and the error is raised by the next `put`, or at the end of the `with`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> BackgroundWriter:
        return self

    def put(self, work: Callable[[], None]) -> None:
        """Hand over what is to be done next; wait as long as too much is pending."""
        while self._pending and (len(self._pending) >= MAX_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._do, work))

    def _do(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._pool.shutdown()
        except BaseException:  # a signal, while it waited: what was handed over is finished all the same
            self._pool.shutdown()
            raise
        if failure is None:
            for pending in self._pending:
                pending.result()
