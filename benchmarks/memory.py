"""How memory grows with the number of examples: the real commands, in fresh processes, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import extraction
from benchmarks.shapes import random_model
from extraction.traits import load_trait

TRAIT = "retrieval_construction"
STEPS = {  # the second finds the first one's work done, and goes on from there
    "responses and activations": ("batched",),
    "vectors and validation": ("extract", "--quick", "--methods", "mean_diff"),
}
ROOT = Path(extraction.__file__).resolve().parent.parent


def memory_growth(*, counts: Sequence[int], threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Peak resident memory, in MiB, of each step of the job at each number of examples (both polarities together)."""
    peaks: dict[str, dict[str, float]] = {name: {} for name in STEPS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            model = _save_model(Path(folder) / "model")
            for name, command in STEPS.items():
                peaks[name][str(count)] = run_measured(
                    [*command, *_options(folder, model, count, threads)], Path(folder)
                )
                say(f"  {count} examples, {name}: {peaks[name][str(count)]:.0f} MiB")
    growth = {name: by_count[str(counts[-1])] / by_count[str(counts[0])] for name, by_count in peaks.items()}
    return {"trait": TRAIT, "counts": list(counts), "peak_mib": peaks, "growth": growth}


def _options(folder: str, model: Path, count: int, threads: int) -> list[str]:
    options = {
        "--experiment": "memory",
        "--root": folder,
        "--model": str(model),
        "--trait": TRAIT,
        "--n-examples": str(count // 2),
        "--max-new-tokens": "4",
        "--batch-size": "64",
        "--judge": "none",
        "--threads": str(threads),
        "--self-check": "0",
    }
    return [word for pair in options.items() for word in pair] + ["--raw"]


def run_measured(arguments: Sequence[str], folder: Path) -> float:
    """Run a command of traitline; its peak resident memory in MiB. Raises RuntimeError when it fails."""
    program = "from extraction.cli import main; main()"
    log = folder / "log.txt"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"traitline {arguments[0]} ended with {child.returncode}: {log.read_text()[-500:]}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _save_model(folder: Path) -> Path:
    """A tiny model with a tokenizer of its own, as a user would have it on disk."""
    trait = load_trait(TRAIT, ROOT)
    words = [*trait.questions, *(side for pair in trait.instructions for side in (pair.positive, pair.negative))]
    lm = random_model("tiny")
    _tokenizer(words, lm.vocab_size).save_pretrained(folder)
    lm.model.save_pretrained(folder)
    return folder


def _tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs, learned from a few texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<pad>"], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
