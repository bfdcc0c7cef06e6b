"""Work in the background: in order, little of it pending, all of it done at the end, and no error lost."""

from __future__ import annotations

import threading
import time

import pytest

from extraction.core.errors import StoreError
from extraction.storage.background_writer import MAX_PENDING, BackgroundWriter


def test_all_is_done_in_order_by_another_thread():
    done: list[tuple[int, int]] = []
    with BackgroundWriter() as background:
        for i in range(20):
            background.put(lambda i=i: done.append((i, threading.get_ident())))
    assert [i for i, _ in done] == list(range(20))
    assert {thread for _, thread in done} != {threading.get_ident()}
    assert len({thread for _, thread in done}) == 1


def test_little_is_pending_and_the_caller_waits_for_more():
    gate, started = threading.Event(), threading.Event()
    handed = []

    def caller() -> None:
        with BackgroundWriter() as background:
            for i in range(MAX_PENDING + 3):
                background.put(lambda: (started.set(), gate.wait(10)))
                handed.append(i)

    thread = threading.Thread(target=caller)
    thread.start()
    assert started.wait(10)
    time.sleep(0.05)
    assert len(handed) == MAX_PENDING
    gate.set()
    thread.join(10)
    assert len(handed) == MAX_PENDING + 3


def fail() -> None:
    raise StoreError("disk full")


def test_an_error_is_raised_by_the_next_put_and_nothing_follows_it():
    done: list[int] = []
    with pytest.raises(StoreError, match="disk full"), BackgroundWriter() as background:  # noqa: PT012
        background.put(fail)
        while True:
            background.put(lambda: done.append(1))
    assert done == []


def test_an_error_of_the_last_work_is_raised_at_the_end():
    with pytest.raises(StoreError, match="disk full"), BackgroundWriter() as background:  # noqa: PT012
        background.put(lambda: None)
        background.put(fail)


def test_all_submitted_work_is_finished_however_the_block_ends():
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as background:  # noqa: PT012
        for i in range(MAX_PENDING):
            background.put(lambda i=i: (time.sleep(0.02), done.append(i)))
        raise KeyboardInterrupt
    assert done == list(range(MAX_PENDING))


def test_a_signal_while_it_waits_at_the_end_is_raised_when_all_is_done(monkeypatch):
    done: list[int] = []
    background = BackgroundWriter()
    shut, calls = background._pool.shutdown, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        shut()

    monkeypatch.setattr(background._pool, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt), background:
        background.put(lambda: (time.sleep(0.02), done.append(1)))
    assert done == [1]
