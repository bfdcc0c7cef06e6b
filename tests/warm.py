"""A Python for shell scripts that starts in milliseconds: a small program that asks a warm process to fork and run.

The fork has the caller's arguments, folder, environment, output and process group, ignores SIGINT if the caller does,
and gets the caller's signals. A script cannot tell it from the caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.runs import REPOSITORY, environment

CALLER = """#!{python} -ISE
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
call = dict(arguments=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ), group=os.getpgrp(), ignores=ignores)
socket.send_fds(server, [json.dumps(call).encode() + b"\\n"], [1, 2])
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Yield the program's path. The path of `folder` must be short: it holds a socket."""
    address = str(folder / "socket")
    program = folder / "python"
    program.write_text(CALLER.format(python=sys.executable, address=address))
    program.chmod(0o755)
    command = [sys.executable, "-m", "tests.warm", address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield program
        server.terminate()


def _serve(address: str) -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import extraction.cli.capture_summary
    import extraction.cli.summaries
    import extraction.monitoring.postprocess
    import extraction.pipeline.stages
    import extraction.vectors.card  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(caller)
                os._exit(0)
            caller.close()


def _answer(caller: socket.socket) -> None:
    data, handles, _, _ = socket.recv_fds(caller, 1 << 16, 2)
    while not data.endswith(b"\n"):
        data += caller.recv(1 << 16)
    call = json.loads(data)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, call["group"])
        _run(call, handles)
    with contextlib.suppress(OSError):  # a caller that was killed
        caller.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        caller.sendall(f"{code}\n".encode())


def _run(call: dict, handles: list[int]) -> None:
    code: object = 0
    for number, handle in enumerate(handles, 1):
        os.dup2(handle, number)
    if call["ignores"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["environment"])
    arguments = call["arguments"]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve(sys.argv[1])
