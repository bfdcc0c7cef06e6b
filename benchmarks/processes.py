"""Run commands in fresh processes and measure their peak memory; save random models for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import extraction
from benchmarks.shapes import random_model
from extraction.config.traits import load_trait

TRAIT = "retrieval_construction"
# The child reads its own peak: what the parent gets from wait4 and ru_maxrss on Linux includes the parent's memory, of
# which the child starts as a copy.
PEAK = """
def peak():
    import resource, sys
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
"""
PROGRAM = (
    PEAK
    + """
import sys
path = sys.argv.pop(1)
from extraction.cli.commands import main
try:
    main()
finally:
    with open(path, "w") as file:
        file.write(str(peak()))
"""
)
ROOT = Path(extraction.__file__).resolve().parent.parent


def run_measured(arguments: Sequence[str], folder: Path) -> float:
    """Run a command of traitline; return its peak resident memory in MiB. Raises RuntimeError if it fails."""
    log, peak = folder / "log.txt", folder / "peak.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-c", PROGRAM, str(peak), *arguments]
        child = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if child.returncode:
        raise RuntimeError(f"traitline {arguments[0]} ended with {child.returncode}: {log.read_text()[-500:]}")
    return float(peak.read_text())


def words_of(options: dict[str, Any]) -> list[str]:
    """Return options as command-line words; a value of True is a flag."""
    return [word for name, value in options.items() for word in ([name] if value is True else [name, str(value)])]


def save_model(folder: Path, shape: str = "tiny", **options: Any) -> Path:
    """Save a random model of a shape with a tokenizer. It has no end token, so responses have their full length."""
    trait = load_trait(TRAIT, ROOT, "pocket")
    words = [*trait.questions, *(side for pair in trait.instructions for side in (pair.positive, pair.negative))]
    lm = random_model(shape, **options)
    _tokenizer(words, lm.vocab_size).save_pretrained(folder)
    lm.model.save_pretrained(folder)
    return folder


def _tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on a few texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<pad>"], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
