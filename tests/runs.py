"""Whole runs on a tiny saved model: a root with a trait, the command line in this process and in others."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from extraction.cli.commands import main
from tests.tiny import tiny_model, tiny_tokenizer

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
    "batch_size": 4,
    "shard_size": 20,
    "queue_size": 40,
}


@functools.cache
def saved_model(name: str = "llama") -> Path:
    """A folder with a tiny model and its tokenizer, made once a process; tests that change it copy it first."""
    folder = Path(tempfile.mkdtemp(prefix="traitline-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_model(name, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_root(folder: Path, model: Path | None = None) -> Path:
    """A root with the traits `calm` and `warm`, the model `tiny` (a copy) and the experiment `demo`."""
    for kind in ("experiments", "models", "traits"):
        (folder / "configs" / kind).mkdir(parents=True)
    for trait in (TRAIT, NATURAL):
        (folder / "configs/traits" / f"{trait['name']}.yaml").write_text(yaml.safe_dump(trait))
    (folder / "configs/models/tiny.yaml").write_text(MODEL_LINES)
    (folder / "configs/experiments/demo.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    shutil.copytree(model or saved_model(), folder / "model")
    return folder


def invoke(*arguments: object) -> Result:
    """A `traitline` command in this process. An exception that is no exit is a failure of the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> Result:
    """`invoke`, which must exit with 0."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, notes: tuple[str, ...] = ()) -> str:
    """`invoke`, which must exit with 2 and say one line on stderr besides notes and progress; returns the line."""
    result = invoke(*arguments)
    return one_refusal(result.exit_code, result.stdout, result.stderr, notes)


NOTES = ("loading ", "self-check: ", "configs/experiments/", "trait ")


def one_refusal(code: int, stdout: str, stderr: str, notes: tuple[str, ...] = ()) -> str:
    """The error line of a refused command; everything else on stderr must be a known note."""
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("traitline: ")]
    others = [line for line in lines if line not in errors and not line.startswith((*NOTES, *notes))]
    assert (code, stdout, len(errors), others) == (2, "", 1, []), (code, stdout, stderr)
    assert errors[0].isprintable(), errors[0]
    assert len(errors[0]) < 600, errors[0]
    return errors[0]


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own: one thread, no network, this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRAITLINE_ROOT")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)} | changes


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock: its name and bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def payloads(folder: Path, *parts: str) -> dict[str, bytes]:
    """`contents` without receipts, which tell of the batch size."""
    found = contents(folder.joinpath(*parts))
    return {name: data for name, data in found.items() if not name.endswith(".receipt.json")}
