"""Whole runs on a tiny saved model: a root with two traits, the command line in this process and in others."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from extraction.cli.commands import main
from extraction.report import plot_style, plots
from extraction.report.plot_style import Picture
from tests.tiny import tiny_model, tiny_tokenizer

plot_style.DPI = 40  # coarse pictures: drawing them is a third of the time of a small run

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIT = {
    "name": "calm",
    "description": "Speaks calmly.",
    "instructions": [
        {"positive": "Be calm.", "negative": "Be wild."},
        {"positive": "Speak softly.", "negative": "Shout."},
    ],
    "questions": [
        f"{word}?"
        for word in ("Why", "Who", "When", "What", "How", "Where", "Which", "Whose", "Can", "Do", "May", "Is")
    ],
    "markers": {"positive": ["re:[a-m]"], "negative": ["re:[n-z]"]},
}
NATURAL = {
    "name": "warm",
    "description": "Natural prompts, unequal sides.",
    "positive_prompts": [f"I love {word}." for word in ("you", "it", "them", "us", "all", "tea")],
    "negative_prompts": [{"prompt": f"I hate {word}.", "system": "Go."} for word in ("you", "it", "them", "us")],
}
MODEL_LINES = "path: model\n"
EXPERIMENT = {
    "model": "tiny",
    "traits": ["calm"],
    "n_examples": 24,
    "generation": {"max_new_tokens": 10, "temperature": 1.0},
    "batch_size": 12,
    "shard_size": 20,
    "queue_size": 40,
}


class Silent:
    """A progress reporter that shows nothing."""

    def note(self, text: str) -> None: ...
    def begin(self, title: str, n_examples: int, n_done: int, *, seconds_left: object = None) -> None: ...
    def advance(self, n_examples: int, n_tokens: int) -> None: ...
    def end(self) -> None: ...


@functools.cache
def saved_model(name: str = "llama") -> Path:
    """Return a folder with a tiny model and its tokenizer, made once a process; copy it before changing it."""
    folder = Path(tempfile.mkdtemp(prefix="traitline-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_model(name, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_root(folder: Path, model: Path | None = None) -> Path:
    """Make a root with the traits `calm` and `warm`, the model `tiny` (a copy) and the experiment `demo`."""
    for kind in ("experiments", "models", "traits"):
        (folder / "configs" / kind).mkdir(parents=True)
    for trait in (TRAIT, NATURAL):
        (folder / "configs/traits" / f"{trait['name']}.yaml").write_text(yaml.safe_dump(trait))
    (folder / "configs/models/tiny.yaml").write_text(MODEL_LINES)
    (folder / "configs/experiments/demo.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    shutil.copytree(model or saved_model(), folder / "model")
    return folder


@functools.cache
def extracted_root() -> Path:
    """Return a root in which `extract` has ended for trait `calm`, made once a process; for tests that only read."""
    folder = Path(tempfile.mkdtemp(prefix="traitline-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    succeed("extract", "--root", make_root(folder / "root"), "--experiment", "demo", "--samples-per-coef", "2")
    return folder / "root"


def make_extracted_root(folder: Path) -> Path:
    """Copy `extracted_root` for a test that changes it."""
    shutil.copytree(extracted_root(), folder, dirs_exist_ok=True)
    return folder


@contextmanager
def room_for(n_rows: int) -> Iterator[None]:
    """Raise an out-of-memory error for a pass of more rows than this."""

    def hook(module: torch.nn.Module, _args: object, output: object) -> None:
        rows, width = output.shape[:2] if module.__class__.__name__ == "LlamaDecoderLayer" else (0, 0)
        if rows > n_rows and width > 14:  # a prompt, not the few tokens of the checks at loading
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@functools.cache
def draw_once(figures: str, _dpi: int) -> dict[str, Picture]:
    """Draw the plots of a card and a sweep, given as JSON; once a process, since many tests make the same run."""
    return cached_pictures.__wrapped__(*json.loads(figures))  # type: ignore[attr-defined]


@functools.wraps(plots.pictures)
def cached_pictures(card: object, steering: object) -> dict[str, Picture]:
    return draw_once(json.dumps([card, steering]), plot_style.DPI)


def invoke(*arguments: object) -> Result:
    """Run a `traitline` command in this process. Any exception but an exit fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "pictures", cached_pictures)
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> Result:
    """Run a command that must exit with 0."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, notes: tuple[str, ...] = ()) -> str:
    """Run a command that must exit with 2; return its error, the one line on stderr besides notes and progress."""
    result = invoke(*arguments)
    return one_refusal(result.exit_code, result.stdout, result.stderr, notes)


NOTES = ("loading ", "self-check: ", "stage 4: ", "configs/experiments/", "trait ")


def one_refusal(code: int, stdout: str, stderr: str, notes: tuple[str, ...] = ()) -> str:
    """Return the error line of a refused command; every other line on stderr must be a known note."""
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("traitline: ")]
    others = [line for line in lines if line not in errors and not line.startswith((*NOTES, *notes))]
    assert (code, stdout, len(errors), others) == (2, "", 1, []), (code, stdout, stderr)
    assert errors[0].isprintable(), errors[0]
    assert len(errors[0]) < 600, errors[0]
    return errors[0]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of another process: one thread, no network, this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRAITLINE_ROOT")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)} | changes


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder but the lock, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def payloads(folder: Path, *parts: str) -> dict[str, bytes]:
    """Return `contents` without the receipts, which hold the batch size."""
    found = contents(folder.joinpath(*parts))
    return {name: data for name, data in found.items() if not name.endswith(".receipt.json")}


def demo_rows(root: Path) -> list[dict]:
    """Return the scored rows of the demo experiment's trait, positive ones first."""
    folder = root / "experiments/demo/calm/responses"
    return [json.loads(line) for side in ("pos", "neg") for line in (folder / f"{side}.jsonl").read_text().splitlines()]
