"""A run or capture set that is killed, starved of disk or locked out, then started again, ends as if uninterrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from extraction.core.errors import StoreError
from extraction.storage.trait_run import TraitRun, trait_run
from tests.kills import CONFIG, JOBS, ROOT, STORES, worker

MIN_CALLS = {"run": 100, "captures": 60}  # calls of a job that change the disk


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Give the worker a task."""
    with worker() as request:
        yield request


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_any_call_and_started_again_equals_uninterrupted(ask: Callable[..., Any], job: str) -> None:
    result = ask("kills", job=job)
    assert result["failures"] == []
    assert result["kills"] > 2 * result["calls"] > 2 * MIN_CALLS[job]


def test_killed_twice_equals_uninterrupted(ask: Callable[..., Any]) -> None:
    assert ask("kills", job="run", step=7, second=True)["failures"] == []


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_store_does_not_pass(ask: Callable[..., Any], job: str, store: str) -> None:
    assert ask("wrong_store", job=job, store=store)


@pytest.mark.parametrize("job", JOBS)
def test_a_power_cut_finds_the_disk_in_order(ask: Callable[..., Any], job: str) -> None:
    """Each file is synced before it gets its name, and its folder after; no name is given in any other way."""
    calls, opened = ask("trace", job=job)
    assert [name for name, _ in calls].count("open") == opened  # nothing writes past the counter
    for at, (name, target) in enumerate(calls):
        if name == "replace":
            temporary = f"{Path(target).parent}/.{Path(target).name}."
            assert calls[at - 1][0] == "fsync"
            assert calls[at - 1][1].startswith(temporary)
            assert calls[at + 1] == ["fsync", str(Path(target).parent)]
        if name == "open":
            assert target.endswith((".tmp", "/.lock"))


def succeeds(command: list[str]) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("room", ["tmpfs", "limit"])
def test_a_full_disk_loses_nothing(ask: Callable[..., Any], tmp_path: Path, room: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if room == "tmpfs" and not succeeds(mount):
        pytest.skip("mounting a tiny file system takes root")
    try:
        result = ask("full_disk", tmp_path, room=room)
    finally:
        if room == "tmpfs":
            subprocess.run(["umount", "-l", str(disk)], check=True)
    *starved, last = result["outcomes"]
    assert result["failures"] == []
    assert last == [0, ""]
    assert len(starved) > 3
    assert all(code == 1 and str(disk) in text for code, text in starved)


@pytest.mark.parametrize("job", JOBS)
def test_a_read_only_folder_is_refused_at_the_start(ask: Callable[..., Any], job: str) -> None:
    scratch = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        results = ask("read_only", scratch, job=job)
    finally:
        shutil.rmtree(scratch)
    assert results["control"] == [0, "", True]
    for case in ("root", "folders"):
        code, text, untouched = results[case]
        assert (code, untouched) == (1, True), text
        assert "Permission denied" in text
    assert "this folder" in results["folders"][1]  # by the check at the start, not by a later write


def test_two_slices_equal_one_process(ask: Callable[..., Any]) -> None:
    assert ask("slices") == [[0, 0], True]


def test_a_folder_deleted_during_a_run_is_one_store_error(tmp_path: Path) -> None:
    folder = trait_run(tmp_path, "exp", "calm")
    with folder.lock():
        folder.open(CONFIG)
        shutil.rmtree(tmp_path / "exp")
        with pytest.raises(StoreError, match=r"0000.*No such file"):
            folder.write_responses_shard(0, [{"id": "pos-0"}], {})
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_share_a_run_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    folder = TraitRun(tmp_path)
    code = "import sys, time; from extraction.storage.trait_run import TraitRun; from pathlib import Path\n"
    code += "with TraitRun(Path(sys.argv[1])).lock(): print('in', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            with pytest.raises(StoreError, match=rf"\(pid {other.pid}\)"), folder.lock():
                pass
        finally:
            other.kill()
    with folder.lock():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
