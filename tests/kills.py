"""A worker process that kills attempts at small jobs of the storage package, at any call that changes the disk.

Run as a module it is the worker: it forks a process for every attempt. It imports no torch (a `Block` stands for a
tensor), since a small process forks in a millisecond. Within an attempt the calls that change the disk are counted, and
one of them can be the last.
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
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import extraction.storage.atomic
import extraction.storage.token_captures
import extraction.storage.trait_run
from extraction.core.errors import StoreError
from extraction.storage.atomic import read_data
from extraction.storage.experiment_dir import verify_tree, write_sets_index
from extraction.storage.run_dir import RunDir
from extraction.storage.token_captures import capture_set, prompt_id, set_name
from extraction.storage.trait_run import TraitRun, trait_run

ROOT = Path(__file__).parents[1]
NOBODY = 65534
CONFIG = {"model": "tiny", "seed": 1, "batch_size": 2}
SHARDS = (("pos-0", "neg-0"), ("pos-1", "neg-1"))
FAST_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a SIGKILL is the same on every file system
COUNTED = ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate")


class Block(NamedTuple):
    """Float32 values with a shape, in place of a tensor."""

    shape: tuple[int, ...]
    values: tuple[float, ...]
    dtype: str = "torch.float32"


def block_bytes(path: Path, blocks: Mapping[str, Block], header: Mapping[str, Any]) -> bytes:
    """A safetensors file, as `serialization.safetensors_bytes` makes it of tensors."""
    entries: dict[str, Any] = {"__metadata__": {key: json.dumps(value) for key, value in sorted(header.items())}}
    data = b""
    for name, block in blocks.items():
        start, data = len(data), data + array("f", block.values).tobytes()
        entries[name] = {"dtype": "F32", "shape": block.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


# --- jobs -----------------------------------------------------------------------------------------------------------


def trait_job(root: Path) -> None:
    """A run from start to end, which continues an earlier attempt."""
    folder = trait_run(root, "exp", "calm")
    with folder.lock():
        folder.open(CONFIG)
        for index in range(len(SHARDS)):
            make_shard(folder, index)
        rows = [row for index in range(len(SHARDS)) for row in folder.read_responses_shard(index)]
        folder.write_responses({side: [row for row in rows if row["id"].startswith(side)] for side in ("pos", "neg")})
        sizes = [len(read_data(path)[0]) for path in sorted((folder.path / "activations").glob("*.safetensors"))]
        folder.write_vectors("mean_diff", {"direction": Block((2, 3), (1.5,) * 6)}, {"trait": "calm", "n": sizes})
        folder.write_card({"auc": 0.75})
        folder.write_report("report.html", b"<html></html>")


def make_shard(folder: TraitRun, index: int) -> None:
    """Write the responses and activations of a shard, unless they are complete."""
    ids = SHARDS[index]
    if not folder.shard_done("responses", index):
        folder.write_responses_shard(index, [{"id": id, "response": f"{id} é"} for id in ids], {"model": "tiny"})
    if not folder.shard_done("activations", index):
        hidden = Block((2, 2, 3), tuple(float(i + index) for i in range(12)))
        folder.write_activations_shard(index, ids, {"residual.response_mean": hidden}, {"model": "tiny"})


def make_one_slice(root: Path, index: int) -> None:
    """Write one shard under a shared lock."""
    folder = trait_run(root, "exp", "calm")
    with folder.lock(shared=True):
        folder.open(CONFIG)
        make_shard(folder, index)


def captures_job(root: Path) -> None:
    """A capture set from start to end, which continues an earlier attempt."""
    folder = capture_set(root, "exp", set_name(2, "prompts_few", CONFIG))
    words = ["a", "b", "c"]
    with folder.lock():
        folder.open(CONFIG)
        for id in map(prompt_id, range(2)):
            if not folder.prompt_done(id):
                header = {"id": id, "tokens": words, "pieces": words, "token_ids": [1, 2, 3], "n_prompt": 2}
                header |= {"tier": 3, "layers": [0], "points": ["x", "y"]}
                header |= {"tensors": {"projections.calm": ["token", "layer", "point"]}}
                folder.write_prompt(id, {"projections.calm": Block((3, 1, 2), (0.5,) * 6)}, header, {"batch_size": 8})
            folder.write_json(id, folder.prompt_header(id)["tokens"])
        folder.write_dynamics({"calm": [folder.prompt_header(id)["token_ids"] for id in folder.prompt_ids()]})
        folder.write_report("page.html", b"<html></html>")
        folder.write_report("overview.png", b"png")
    write_sets_index(root, "exp", b"<html></html>")


JOBS = {"run": trait_job, "captures": captures_job}


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every name below `root` but the lock's, with its bytes."""
    paths = (path for path in root.rglob("*") if path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


# --- stores that are wrong on purpose -------------------------------------------------------------------------------


def write_in_place(path: Path, data: bytes) -> None:
    """Write without a temporary file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(handle, data)
    os.fsync(handle)
    os.close(handle)


def write_receipt_first(path: Path, data: bytes, facts: dict[str, Any]) -> None:
    """Write the receipt, then the data into a file that has its full size from the start."""
    extraction.storage.atomic.write_with_receipt(path, data, facts)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.ftruncate(handle, len(data))
    os.write(handle, data)
    os.close(handle)


def as_it_is() -> None:
    """Change nothing."""


def in_place() -> None:
    """Write files in place."""
    extraction.storage.atomic.atomic_write = write_in_place


def receipt_first() -> None:
    """Write receipts before their data."""
    for module in (extraction.storage.trait_run, extraction.storage.token_captures):
        module.write_with_receipt = write_receipt_first


def no_cleaning() -> None:
    """Leave the temporary files of killed processes."""
    RunDir.clean_orphans = lambda self: None  # type: ignore[method-assign]


STORES = {store.__name__: store for store in (in_place, receipt_first, no_cleaning)}


# --- attempts -------------------------------------------------------------------------------------------------------


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
    """Pass every call that changes the disk to `on_call`."""

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


def kill(job: str, root: Path, at: int, when: str, prepare: Callable[[], None] = as_it_is) -> bool:
    """Attempt the job; True if it was killed."""
    return attempt(lambda: (watch(dying(at, when)), JOBS[job](root)), prepare)[0] == -signal.SIGKILL


def finish(job: str, root: Path) -> str:
    """Run the job in the worker itself, which isn't the process that died; the text of its error."""
    try:
        JOBS[job](root)
    except StoreError as error:
        return str(error)
    return ""


def difference(root: Path, expected: dict[str, bytes | None], rerun: Callable[[Path], str]) -> str:
    """Start the job again and describe how its end differs from the expected one; then delete it."""
    text, end, findings = rerun(root), snapshot(root), verify_tree(root)
    shutil.rmtree(root)
    if text or findings:
        return text or str(findings[0])
    return ", ".join(sorted(name for name in end.keys() | expected.keys() if end.get(name) != expected.get(name)))


def uninterrupted(job: str, scratch: Path) -> dict[str, bytes | None]:
    """The files of a job that nothing interrupts."""
    JOBS[job](scratch / "whole")
    return snapshot(scratch / "whole")


# --- the worker's tasks ---------------------------------------------------------------------------------------------


def task_trace(scratch: Path, job: str) -> Any:
    """The calls of a whole job, [name, target], and the number of files opened for writing, by audit."""
    root = scratch / "traced"
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
        JOBS[job](root)
        (scratch / "trace.json").write_text(json.dumps([calls, opened]))

    assert attempt(work) == (0, "")
    return json.loads((scratch / "trace.json").read_text())


def task_kills(scratch: Path, job: str, step: int = 1, second: bool = False) -> Any:
    """Kill an attempt at every call (every `step`-th), and if `second` the next one too; start again and compare."""
    expected = uninterrupted(job, scratch)
    calls = [name for name, _ in task_trace(scratch, job)[0]]
    kills, failures = 0, []
    for at in range(1, len(calls) + 1, step):
        for when in ("before", "torn", "after") if calls[at - 1] == "write" else ("before", "after"):
            root = scratch / f"killed-{at}-{when}"
            kills += kill(job, root, at, when)
            if second:
                kills += kill(job, root, at * 7 % len(calls) + 1, when)
            if problem := difference(root, expected, partial(finish, job)):
                failures.append(f"{when} call {at} ({calls[at - 1]}): {problem}")
    return {"calls": len(calls), "kills": kills, "failures": failures}


def task_wrong_store(scratch: Path, job: str, store: str) -> Any:
    """The first difference that a kill makes to a store that is wrong on purpose."""
    expected = uninterrupted(job, scratch)
    for at in range(1, 300):
        root = scratch / f"killed-{at}"
        kill(job, root, at, "before", STORES[store])
        if problem := difference(root, expected, lambda root: attempt(lambda: JOBS[job](root), STORES[store])[1]):
            return problem
    return None


def task_full_disk(scratch: Path, room: str) -> Any:
    """Give the job a little more room each time, until it has enough; after each failure make room and start again."""
    expected = uninterrupted("run", scratch)
    outcomes: list[tuple[int, str]] = [(1, "")]
    failures = []
    while outcomes[-1][0] and len(outcomes) < 200:
        outcome, left = starve(scratch / "disk", ROOMS[room], len(outcomes) - 1)
        problem = difference(scratch / "disk/runs", expected, partial(finish, "run"))
        outcomes.append(outcome)
        if left or problem:
            failures.append([outcome, left, problem])
    return {"outcomes": outcomes[1:], "failures": failures}


def starve(disk: Path, prepare: Callable[[Path, int], None], room: int) -> tuple[tuple[int, str], list[str]]:
    """An attempt with that much room, and the temporary files that it left."""
    ballast = disk / "ballast"
    disk.mkdir(exist_ok=True)
    outcome = attempt(lambda: (prepare(ballast, room), trait_job(disk / "runs")))
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


def task_read_only(scratch: Path, job: str) -> Any:
    """The job as a user who may not write: nowhere, in the run's folders only, and (the control) everywhere."""
    results = {}
    for case, top, below in (("root", 0o755, 0o755), ("folders", 0o777, 0o555), ("control", 0o777, 0o777)):
        root = scratch / case
        root.mkdir()
        if case != "root":
            JOBS[job](root)
        for path in root.rglob("*"):
            path.chmod(below if path.is_dir() else 0o666)
        root.chmod(top if os.geteuid() == 0 or case != "root" else 0o555)
        before = snapshot(root)
        results[case] = (*attempt(lambda: JOBS[job](root), become_nobody), snapshot(root) == before)  # noqa: B023
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
    expected = uninterrupted("run", scratch)
    pids = []
    for index in range(len(SHARDS)):
        pid = os.fork()
        if pid == 0:
            make_one_slice(scratch / "sliced", index)
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    trait_job(scratch / "sliced")
    return codes, snapshot(scratch / "sliced") == expected


TASKS = {name.removeprefix("task_"): task for name, task in list(globals().items()) if name.startswith("task_")}


# --- the worker -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    for module in (extraction.storage.trait_run, extraction.storage.token_captures):
        module.safetensors_bytes = block_bytes
    with tempfile.TemporaryDirectory() as warm:
        for job in JOBS.values():
            job(Path(warm))
    assert "torch" not in sys.modules
    gc.freeze()  # what isn't touched needn't be copied for every attempt
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        scratch = Path(request.pop("scratch"))
        print(json.dumps(TASKS[request.pop("task")](scratch, **request)), flush=True)


@contextmanager
def worker() -> Iterator[Callable[..., Any]]:
    """Start a worker; yield a function that gives it a task and returns the result."""
    command = [sys.executable, "-m", "tests.kills"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as process,
        tempfile.TemporaryDirectory(dir=FAST_DISK) as fast,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        Path(fast).chmod(0o755)

        def request(task: str, scratch: Path | None = None, **options: Any) -> Any:
            place = scratch or Path(tempfile.mkdtemp(dir=fast))
            place.chmod(0o755)
            process.stdin.write(json.dumps({"task": task, "scratch": str(place), **options}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield request
        process.stdin.close()


if __name__ == "__main__":
    serve()
