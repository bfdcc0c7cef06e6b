"""How memory grows with the number of examples: the real commands, in fresh processes, on a tiny model.

And on activations of a large model's shape, drawn at random and written through the store. Shapes: n rows, L layers,
D hidden.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import extraction
from benchmarks.shapes import random_model
from extraction.jobs import Job, plan
from extraction.records import Example
from extraction.traits import load_trait

TRAIT = "retrieval_construction"
EXPERIMENT = "memory"
# The command tells its own peak. What the system tells the parent (wait4, and ru_maxrss on Linux) counts the parent,
# too: a child begins as its copy, and one that has torch loaded is larger than many a command gets.
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
from extraction.cli import main
try:
    main()
finally:
    with open(path, "w") as file:
        file.write(str(peak()))
"""
)
STEPS = {  # the second finds the first one's work done, and goes on from there
    "responses and activations": ("batched",),
    "vectors and validation": ("extract", "--quick", "--methods", "mean_diff"),
}
LARGE = (26, 2304)  # layers and hidden size of a model with 2 billion parameters
ROOT = Path(extraction.__file__).resolve().parent.parent


def memory_growth(
    *, counts: Sequence[int], threads: int, say: Callable[[str], None], large: tuple[int, int] = LARGE
) -> dict[str, Any]:
    """Peak resident memory, in MiB, of each step of the job at each number of examples (both polarities together).

    The last step reads activations of the `large` shape, with room for those of the largest count on the disk.
    """
    n_layers, hidden_size = large
    of_large = f"vectors and validation, {n_layers} layers of {hidden_size}"
    peaks: dict[str, dict[str, float]] = {name: {} for name in (*STEPS, of_large)}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            model = _save_model(Path(folder) / "model")
            options = _options(folder, model, count, threads)
            found = {name: run_measured([*command, *options], Path(folder)) for name, command in STEPS.items()}
        with tempfile.TemporaryDirectory() as folder:
            model = _save_model(Path(folder) / "model")
            options = _options(folder, model, count, threads)
            _write_activations(options, large)
            found[of_large] = run_measured([*STEPS["vectors and validation"], *options], Path(folder))
        for name, peak in found.items():
            peaks[name][str(count)] = peak
            say(f"  {count} examples, {name}: {peak:.0f} MiB")
    growth = {name: by_count[str(counts[-1])] / by_count[str(counts[0])] for name, by_count in peaks.items()}
    return {"trait": TRAIT, "counts": list(counts), "peak_mib": peaks, "growth": growth}


def _options(folder: str, model: Path, count: int, threads: int) -> list[str]:
    options = {
        "--experiment": EXPERIMENT,
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


def _write_activations(options: Sequence[str], shape: tuple[int, int]) -> None:
    """A run that is done but for its vectors: what `_options` ask for, with random activations of a shape."""
    given = dict(zip(options[:-1:2], options[1:-1:2], strict=True))
    settings = {
        "model": given["--model"],
        "n_examples": int(given["--n-examples"]),
        "max_new_tokens": int(given["--max-new-tokens"]),
        "judge": given["--judge"],
        "raw": True,
    }
    job = plan(EXPERIMENT, TRAIT, root=given["--root"], options=settings)
    folder, generator = job.folder(job.traits[0]), torch.Generator().manual_seed(0)
    with folder.lock():
        folder.open(job.config(job.traits[0]))
        for i, shard in enumerate(job.shards(job.traits[0])):
            _write_shard(job, i, shard, torch.randn(len(shard), *shape, generator=generator))


def _write_shard(job: Job, index: int, shard: Sequence[Example], rows_nLD: torch.Tensor) -> None:
    """Rows of the positive side lie apart."""
    positive_n11 = torch.tensor([example.polarity == "pos" for example in shard])[:, None, None]
    meta = {"layers": list(range(rows_nLD.shape[1])), "captured": True, "instruction_as": "raw", "batch_size": 1}
    rows = [
        {
            **vars(example),
            "prompt": "",
            "prompt_token_ids": [1],
            "response": "a",
            "token_ids": [1, 1, 1, 1],
            "finish_reason": "length",
        }
        for example in shard
    ]
    folder = job.folder(job.traits[0])
    folder.write_responses_shard(index, rows, meta)
    tensors = {"residual.response_mean": rows_nLD + 0.1 * positive_n11}
    folder.write_activations_shard(index, [example.id for example in shard], tensors, meta)


def run_measured(arguments: Sequence[str], folder: Path) -> float:
    """Run a command of traitline; its peak resident memory in MiB. Raises RuntimeError when it fails."""
    log, peak = folder / "log.txt", folder / "peak.txt"
    with log.open("wb") as output:
        command = [sys.executable, "-c", PROGRAM, str(peak), *arguments]
        child = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if child.returncode:
        raise RuntimeError(f"traitline {arguments[0]} ended with {child.returncode}: {log.read_text()[-500:]}")
    return float(peak.read_text())


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
