"""Start processes of the command line in milliseconds: one server imports everything once, and forks.

Run as a module this is the server. Each line of its stdin is a folder whose file `arguments` holds the command;
`pid`, `stdout`, `stderr` and `status` are written there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.runs import REPOSITORY, environment


class Forked:
    """One process of the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = int(_awaited(folder / "pid", 60))

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        path = self.folder / "status"
        return int(path.read_text()) if path.exists() else None

    def wait(self, seconds: float = 60) -> int:
        """Wait for the exit code. Raises TimeoutError after `seconds`."""
        return int(_awaited(self.folder / "status", seconds))

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """Text written to stdout so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """Text written to stderr so far."""
        return (self.folder / "stderr").read_text()


def _awaited(path: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.002)
    return path.read_text()


class Forks:
    """Client of the server, used by tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        command = [sys.executable, "-m", "tests.forks"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY)

    def start(self, *arguments: object, stderr: Path | None = None) -> Forked:
        """Start `traitline` with these arguments; `stderr` is a pipe of the caller's."""
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        if stderr is not None:
            (place / "stderr").symlink_to(stderr)
        (place / "arguments").write_text(json.dumps([str(argument) for argument in arguments]))
        assert self.server.stdin is not None
        self.server.stdin.write(f"{place}\n")
        self.server.stdin.flush()
        return Forked(place)

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Run a server for the block."""
    server = Forks(folder)
    try:
        yield server
    finally:
        server.close()


def _serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import extraction.cli.summaries
    import extraction.pipeline.stages
    import extraction.serving.server
    import extraction.utils_batch
    import extraction.vectors.card  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch_over(Path(line.strip()))
            os._exit(0)


def _watch_over(folder: Path) -> None:
    pid = os.fork()
    if pid == 0:
        _run(folder)
    _write(folder / "pid", str(pid))
    _, status = os.waitpid(pid, 0)
    _write(folder / "status", str(os.waitstatus_to_exitcode(status)))


def _write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def _run(folder: Path) -> None:
    from extraction.cli.commands import main

    code: object = 70
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
    try:
        main(json.loads((folder / "arguments").read_text()), prog_name="traitline")
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    _serve()
