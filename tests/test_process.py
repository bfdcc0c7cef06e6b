"""Processes that are stopped, killed, or share one run: nothing is lost, the bytes are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forked, Forks, forks
from tests.runs import contents, make_root, refused, succeed

SETTINGS = (
    "--experiment",
    "demo",
    "--n-examples",
    "24",
    "--max-new-tokens",
    "40",
    "--shard-size",
    "4",
    "--queue-size",
    "12",
    "--batch-size",
    "4",
)
COMMAND = ("extract", *SETTINGS, "--quick")
SHARDS = 12  # in four run groups


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A server that forks processes which have imported torch."""
    with forks(tmp_path_factory.mktemp("forks")) as running:
        yield running


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the undisturbed run."""
    root = make_root(tmp_path_factory.mktemp("quiet"))
    succeed(*COMMAND, "--root", root)
    return contents(run_of(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A fresh root."""
    return make_root(tmp_path)


def run_of(root: Path) -> Path:
    return root / "experiments/demo/calm"


def wait_for_shards(root: Path, count: int, process: Forked) -> None:
    """Wait until `count` shards are committed."""
    end = time.monotonic() + 100
    while len(list((run_of(root) / "activations").glob("*.receipt.json"))) < count:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_after_a_signal_the_same_command_resumes(server, root, quiet, number, code):
    process = server.start(*COMMAND, "--root", root)
    wait_for_shards(root, 2, process)
    process.send_signal(number)
    assert process.wait() == code, process.stderr
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("traitline: ")
    assert "Traceback" not in process.stderr
    assert not list((root / "experiments").rglob("*.tmp"))
    assert 2 <= len(contents(run_of(root) / "activations")) // 2 < SHARDS
    succeed(*COMMAND, "--root", root)
    assert contents(run_of(root)) == quiet


def test_a_second_signal_ends_the_process(server, root):
    """The line about the first signal goes to a pipe that is full and never read, so the process would hang."""
    os.mkfifo(root / "pipe")
    pipe = os.open(root / "pipe", os.O_RDWR | os.O_NONBLOCK)
    process = server.start(*COMMAND, "--root", root, stderr=root / "pipe")
    wait_for_shards(root, 1, process)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(TimeoutError):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143
    os.close(pipe)


def test_two_processes_do_not_share_a_run(server, root):
    process = server.start(*COMMAND, "--root", root)
    wait_for_shards(root, 1, process)
    for command in (COMMAND, ("vectors", "--experiment", "demo"), ("extract", "--experiment", "demo", "--slice=1/2")):
        line = refused(*command, "--root", root)
        assert f"pid {process.pid}" in line
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kills_lose_nothing(server, root, quiet):
    chance = random.Random(7)
    for kill in range(5):
        process = server.start(*COMMAND, "--root", root)
        wait_for_shards(root, 2 * kill + 1, process)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    succeed(*COMMAND, "--root", root)
    assert contents(run_of(root)) == quiet


def test_two_parallel_slices_equal_one_process(server, root, quiet):
    both = [server.start(*COMMAND, "--root", root, "--slice", part) for part in ("1/2", "2/2")]
    assert [process.wait(100) for process in both] == [0, 0], [process.stderr for process in both]
    assert all("tokens at" in process.stdout for process in both)
    assert not (run_of(root) / "vectors/card.json").exists()
    succeed(*COMMAND, "--root", root)
    assert contents(run_of(root)) == quiet


def test_a_folder_deleted_during_a_run_is_a_one_line_error(server, root):
    process = server.start(*COMMAND, "--root", root)
    wait_for_shards(root, 1, process)
    run_of(root).rename(root / "gone")
    assert process.wait() == 2, process.stderr
    last = process.stderr.splitlines()[-1]
    assert str(run_of(root)) in last
    assert "Traceback" not in process.stderr
    assert not run_of(root).exists()


TOGETHER = (
    "extract",
    *SETTINGS,
    "--traits",
    "calm,warm",
    "--queue-size",
    "60",
    "--judge",
    "none",
    "--self-check",
    "0",
)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two traits: all of one and a part of the other are one run group."""
    root = make_root(tmp_path_factory.mktemp("together"))
    succeed("batched", *TOGETHER[1:], "--root", root)
    return root / "experiments/demo"


@pytest.mark.parametrize("count", [1, 13, 20])
def test_a_group_of_several_traits_that_is_killed_midway_ends_with_the_same_bytes(server, root, together, count):
    """Of 24 shards the first 15 are one run group, 12 of them the first trait's."""
    process = server.start("batched", *TOGETHER[1:], "--root", root)
    receipts = "*/activations/*.receipt.json"
    end = time.monotonic() + 100
    while len(list((root / "experiments/demo").glob(receipts))) < count:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = sorted((root / "experiments/demo").glob(receipts))
    stamps = {path: path.stat().st_mtime_ns for path in there}
    assert count <= len(there) < 24
    succeed("batched", *TOGETHER[1:], "--root", root)
    assert {path: path.stat().st_mtime_ns for path in there} == stamps
    for trait in ("calm", "warm"):
        assert contents(root / "experiments/demo" / trait) == contents(together / trait)
