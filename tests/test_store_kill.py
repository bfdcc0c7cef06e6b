"""A run that is killed, starved of disk or shut out, then started again, ends as if nothing had happened.

Run as a script, this file is the worker of its own tests: it imports torch once, and forks a process for every attempt
at a small job. Within an attempt the calls that change the disk are counted, and one of them can be the last.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import extraction.storage.atomic
import extraction.storage.trait_run
from extraction.core.errors import StoreError
from extraction.storage.experiment_dir import verify_tree
from extraction.storage.trait_run import TraitRun, trait_run

ROOT = Path(__file__).parents[1]
NOBODY = 65534
CONFIG = {"model": "tiny", "seed": 1, "batch_size": 2}
SHARDS = (("pos-0", "neg-0"), ("pos-1", "neg-1"))
FAST_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a SIGKILL is the same on every file system
COUNTED = ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate")

# The job


def job(root: Path) -> None:
    """A run from start to end, that goes on where an earlier one stopped."""
    folder = trait_run(root, "exp", "calm")
    with folder.lock():
        folder.open(CONFIG)
        for index in range(len(SHARDS)):
            make_shard(folder, index)
        rows = [row for index in range(len(SHARDS)) for row in folder.read_responses_shard(index)]
        folder.write_responses({side: [row for row in rows if row["id"].startswith(side)] for side in ("pos", "neg")})
        _, hidden = folder.load_activations("residual.response_mean")
        folder.write_vectors("mean_diff", {"direction": hidden.mean(0)}, {"trait": "calm", "n": len(rows)})
        folder.write_card({"auc": 0.75})
        folder.write_report("report.html", b"<html></html>")


def make_shard(folder: TraitRun, index: int) -> None:
    import torch

    ids = SHARDS[index]
    if not folder.shard_done("responses", index):
        folder.write_responses_shard(index, [{"id": id, "response": f"{id} é"} for id in ids], {"model": "tiny"})
    if not folder.shard_done("activations", index):
        hidden = torch.arange(12, dtype=torch.float32).reshape(2, 2, 3) + index
        folder.write_activations_shard(index, ids, {"residual.response_mean": hidden}, {"model": "tiny"})


def make_one_slice(root: Path, index: int) -> None:
    folder = trait_run(root, "exp", "calm")
    with folder.lock(shared=True):
        folder.open(CONFIG)
        make_shard(folder, index)


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every name below `root` but the lock's, with its bytes."""
    paths = (path for path in root.rglob("*") if path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


# Stores that are wrong on purpose


def write_in_place(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(handle, data)
    os.fsync(handle)
    os.close(handle)


def commit_receipt_first(path: Path, data: bytes, facts: dict[str, Any]) -> None:
    """The receipt, then the payload into a file that has its full size from the start."""
    extraction.storage.atomic.commit(path, data, facts)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.ftruncate(handle, len(data))
    os.write(handle, data)
    os.close(handle)


def as_it_is() -> None:
    pass


def in_place() -> None:
    extraction.storage.atomic.atomic_write = write_in_place


def receipt_first() -> None:
    extraction.storage.trait_run.commit = commit_receipt_first


def no_cleaning() -> None:
    TraitRun.clean_orphans = lambda self: None  # type: ignore[method-assign]


STORES = {store.__name__: store for store in (in_place, receipt_first, no_cleaning)}

# Attempts


def attempt(work: Callable[[], Any], prepare: Callable[[], None] = as_it_is) -> tuple[int, str]:
    """Run `work` in a process of its own: its exit code (0 done, 1 StoreError, -9 killed) and the error's text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            prepare()
            work()
        except StoreError as error:
            code = 1
            os.write(writer, str(error).encode())
        except BaseException as error:
            code = 3
            os.write(writer, repr(error).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def watch(on_call: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Hand every call that changes the disk to `on_call`."""

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            return on_call(name, lambda *changed: real(*(changed or args), **options), args)

        return call

    for name in COUNTED:
        setattr(os, name, watched(name, getattr(os, name)))


def dying(at: int, when: str) -> Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]:
    """Die at call number `at`: before it, in the middle of its bytes, or after it."""
    count = 0

    def on_call(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        if count != at:
            return real()
        try:
            if when == "after":
                real()
            elif when == "torn":
                real(args[0], args[1][: len(args[1]) // 2])
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_call


def trace(root: Path) -> list[list[Any]]:
    """The calls of a whole job, [name, target], and at the end the number of files opened for writing, by audit."""
    calls: list[list[Any]] = []
    opened = 0

    def on_call(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        target = (
            os.readlink(f"/proc/self/fd/{args[0]}")
            if isinstance(args[0], int)
            else str(args[-1 if name == "replace" else 0])
        )
        calls.append([name, target])
        return real()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open" and str(args[0]).startswith(str(root)) and args[2] & (os.O_WRONLY | os.O_RDWR):
            opened += 1

    def work() -> None:
        sys.addaudithook(audit)
        watch(on_call)
        job(root)
        (root / "trace.json").write_text(json.dumps([calls, opened]))

    assert attempt(work) == (0, "")
    return json.loads((root / "trace.json").read_text())


# The worker's tasks


def task_kills(scratch: Path, step: int = 1, second: bool = False) -> Any:
    """Kill an attempt at every call (every `step`-th), and if `second` the next one too; start again and compare."""
    whole = uninterrupted(scratch)
    calls = [name for name, _ in trace(scratch / "traced")[0]]
    kills, failures = 0, []
    for at in range(1, len(calls) + 1, step):
        for when in ("before", "torn", "after") if calls[at - 1] == "write" else ("before", "after"):
            root = scratch / f"killed-{at}-{when}"
            kills += kill(root, at, when)
            if second:
                kills += kill(root, at * 7 % len(calls) + 1, when)
            if problem := differs(root, whole):
                failures.append(f"{when} call {at} ({calls[at - 1]}): {problem}")
    return {"calls": len(calls), "kills": kills, "failures": failures}


def task_wrong_store(scratch: Path, store: str) -> Any:
    """The first call of a store that is wrong on purpose, before which a kill makes a difference."""
    whole = uninterrupted(scratch)
    for at in range(1, 300):
        root = scratch / f"killed-{at}"
        kill(root, at, "before", STORES[store])
        if problem := differs(root, whole, lambda root: attempt(lambda: job(root), STORES[store])[1]):
            return problem
    return None


def uninterrupted(scratch: Path) -> dict[str, bytes | None]:
    job(scratch / "whole")
    return snapshot(scratch / "whole")


def finish(root: Path) -> str:
    """The job in the worker itself, which isn't the process that died, and is warm: it takes 3 ms, a fork 15."""
    try:
        job(root)
    except StoreError as error:
        return str(error)
    return ""


def kill(root: Path, at: int, when: str, prepare: Callable[[], None] = as_it_is) -> bool:
    """Attempt the job; True when it was killed."""
    return attempt(lambda: (watch(dying(at, when)), job(root)), prepare)[0] == -signal.SIGKILL


def differs(root: Path, whole: dict[str, bytes | None], rerun: Callable[[Path], str] = finish) -> str:
    """Start the job again, and say how its end differs from the whole; then delete it."""
    text, end, findings = rerun(root), snapshot(root), verify_tree(root)
    shutil.rmtree(root)
    if text or findings:
        return text or str(findings[0])
    return ", ".join(sorted(name for name in end.keys() | whole.keys() if end.get(name) != whole.get(name)))


def task_full_disk(scratch: Path, room: str) -> Any:
    """Give the job a little more room each time, until it has enough; after each failure make room and start again."""
    whole = uninterrupted(scratch)
    outcomes: list[tuple[int, str]] = [(1, "")]
    failures = []
    while outcomes[-1][0] and len(outcomes) < 200:
        outcome, left = starve(scratch / "disk", ROOMS[room], len(outcomes) - 1)
        problem = differs(scratch / "disk/runs", whole)
        outcomes.append(outcome)
        if left or problem:
            failures.append([outcome, left, problem])
    return {"outcomes": outcomes[1:], "failures": failures}


def starve(disk: Path, prepare: Callable[[Path, int], None], room: int) -> tuple[tuple[int, str], list[str]]:
    """An attempt with that much room, and the temporary files that it left."""
    ballast = disk / "ballast"
    disk.mkdir(exist_ok=True)
    outcome = attempt(lambda: (prepare(ballast, room), job(disk / "runs")))
    ballast.unlink(missing_ok=True)
    return outcome, [str(path) for path in disk.rglob("*.tmp")]


def fill_disk(ballast: Path, pages: int) -> None:
    """Leave that many pages of the (tiny) file system free."""
    free = os.statvfs(ballast.parent)
    ballast.write_bytes(b"x" * (free.f_bavail - pages) * free.f_bsize)


def limit_files(ballast: Path, pages: int) -> None:
    """Let no file grow past a limit: EFBIG in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (pages * 128, resource.RLIM_INFINITY))


ROOMS = {"tmpfs": fill_disk, "limit": limit_files}


def task_read_only(scratch: Path) -> Any:
    """The job as a user who may not write: nowhere, in the run's folder only, and (the control) everywhere."""
    results = {}
    for case, top, below in (("root", 0o755, 0o755), ("folders", 0o777, 0o555), ("control", 0o777, 0o777)):
        root = scratch / case
        root.mkdir()
        if case != "root":
            job(root)
        for path in root.rglob("*"):
            path.chmod(below if path.is_dir() else 0o666)
        root.chmod(top if os.geteuid() == 0 or case != "root" else 0o555)
        before = snapshot(root)
        results[case] = (*attempt(lambda: job(root), become_nobody), snapshot(root) == before)  # noqa: B023
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IRWXU)
    return results


def become_nobody() -> None:
    """Root may write anywhere; so don't be root."""
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def task_slices(scratch: Path) -> Any:
    """Two processes, a shard each, at once, and then the rest: the same as one process."""
    job(scratch / "whole")
    pids = []
    for index in range(len(SHARDS)):
        pid = os.fork()
        if pid == 0:
            make_one_slice(scratch / "sliced", index)
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    job(scratch / "sliced")
    return codes, snapshot(scratch / "sliced") == snapshot(scratch / "whole")


TASKS = {
    "trace": trace,
    "kills": task_kills,
    "wrong_store": task_wrong_store,
    "full_disk": task_full_disk,
    "read_only": task_read_only,
    "slices": task_slices,
}


def serve() -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    with tempfile.TemporaryDirectory() as warm:
        job(Path(warm))
    gc.freeze()  # what isn't touched needn't be copied for every attempt
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        scratch = Path(request.pop("scratch"))
        print(json.dumps(TASKS[request.pop("task")](scratch, **request)), flush=True)


# Tests


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Ask the worker for a task."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker,
        tempfile.TemporaryDirectory(dir=FAST_DISK) as fast,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None

        def request(task: str, scratch: Path | None = None, **options: Any) -> Any:
            place = scratch or Path(tempfile.mkdtemp(dir=fast))
            worker.stdin.write(json.dumps({"task": task, "scratch": str(place), **options}) + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        yield request
        worker.stdin.close()


def test_killed_at_any_call_and_started_again_equals_uninterrupted(ask: Callable[..., Any]) -> None:
    result = ask("kills")
    assert result["failures"] == []
    assert result["kills"] > 2 * result["calls"] > 200


def test_killed_twice_equals_uninterrupted(ask: Callable[..., Any]) -> None:
    assert ask("kills", step=7, second=True)["failures"] == []


@pytest.mark.parametrize("store", ["in_place", "receipt_first", "no_cleaning"])
def test_a_wrong_store_does_not_pass(ask: Callable[..., Any], store: str) -> None:
    assert ask("wrong_store", store=store)


def test_a_power_cut_finds_the_disk_in_order(ask: Callable[..., Any]) -> None:
    """Each file is synced before it gets its name, and its folder after; no name is given in any other way."""
    calls, opened = ask("trace")
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
    assert all(
        code == 1 and "; free some disk space, then run the same command again" in text for code, text in starved
    )


def test_a_read_only_folder_is_refused_at_the_start(ask: Callable[..., Any]) -> None:
    scratch = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    scratch.chmod(0o755)
    try:
        results = ask("read_only", scratch)
    finally:
        shutil.rmtree(scratch)
    assert results["control"] == [0, "", True]
    for case in ("root", "folders"):
        code, text, untouched = results[case]
        assert (code, untouched) == (1, True), text
        assert "Permission denied" in text
        assert "make the folder writable" in text
    assert "can't write in this folder" in results["folders"][1]  # by the check at the start, not by a later write


def test_two_slices_equal_one_process(ask: Callable[..., Any]) -> None:
    assert ask("slices") == [[0, 0], True]


def test_a_folder_deleted_meanwhile_is_one_clear_error(tmp_path: Path) -> None:
    folder = trait_run(tmp_path, "exp", "calm")
    with folder.lock():
        folder.open(CONFIG)
        shutil.rmtree(tmp_path / "exp")
        with pytest.raises(StoreError, match=r"0000.*No such file.*run the same command again"):
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
            with pytest.raises(StoreError, match=rf"another process \(pid {other.pid}\).*; wait for it"), folder.lock():
                pass
        finally:
            other.kill()
    with folder.lock():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


if __name__ == "__main__":
    serve()
