"""Print how far the engine is from transformers for every architecture: `python -m tests.deviations`.

Deviations are the largest absolute difference over the largest absolute value, float32, over every layer, pooling and
example of the engine's laws (tests/test_engine_laws.py). `single` is batch size 1; `batched` is 3, 4 and 5, refilled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import transformers

from extraction.engine.generate import teacher_force
from extraction.utils_batch import Capture, Completion
from tests.test_engine_laws import ALL_LAYERS, POOLINGS, Case, case_of, deviation, run, tokens_of, worst
from tests.tiny import ARCHITECTURES, HYBRID, MORE, MULTIMODAL

CAPTURE = Capture(ALL_LAYERS, poolings=POOLINGS)
CLAMPED = ("nemotron_h", "zamba2")  # their scan of a text clamps time steps where their decode steps don't
GROUPS = {
    "attention-only architectures": (*ARCHITECTURES, *MORE),
    "multimodal architectures, their text side": tuple(MULTIMODAL),
    "architectures with states": tuple(name for name in HYBRID if name not in CLAMPED),
    "whose scan clamps": CLAMPED,
}
COLUMNS = ("architecture", "tokens equal", "captured, single", "captured, batched", "batched vs single", "forced")


def measure(name: str) -> tuple[int, int, float, float, float, float]:
    """Return the number of equal responses, of responses, and the deviations in the order of COLUMNS."""
    case = case_of(name)
    runs = [(lm, run(lm, requests, size, CAPTURE)) for size, lm, requests in case.orders()]
    equal = sum(tokens_of(done)[key] == said for lm, done in runs for key, said in case.expected(done, lm).items())
    (_, single), *batched = runs
    between = [apart(single[key], c) for lm, done in batched for key, c in done.items() if key in single]
    return (
        equal,
        sum(len(done) for _, done in runs),
        worst(case, single),
        max(worst(case, done) for _, done in batched),
        max(between),
        worst(case, forced(case)),
    )


def apart(one: Completion, other: Completion) -> float:
    """Return the largest deviation between two captures of one example."""
    pairs = ((one.activations[key], other.activations[key]) for key in one.activations)
    return max((deviation(right, left) for left, right in pairs), default=0.0)


def forced(case: Case) -> dict[str, Completion]:
    """Run a teacher-forced pass over the reference's responses."""
    texts = [(r.id, r.token_ids, case.responses[r.id]) for r in case.requests]
    return {c.id: c for c in teacher_force(case.lm, texts, capture=CAPTURE, batch_size=4)}


def main() -> None:
    """Print one Markdown row per architecture, and the largest deviations last."""
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for group, names in GROUPS.items():
        print_group(group, names)


def print_group(group: str, names: Iterable[str]) -> None:
    """Print a row per architecture of a group, and the sums and largest deviations of its rows."""
    rows = []
    for name in names:
        try:
            rows.append(measure(name))
        except pytest.skip.Exception as absent:
            print(f"| {name} | {absent} | | | | |")
            continue
        equal, total, *deviations = rows[-1]
        print(f"| {name} | {equal}/{total} | " + " | ".join(f"{value:.1e}" for value in deviations) + " |", flush=True)
    equal, total = (sum(row[i] for row in rows) for i in (0, 1))
    largest = " | ".join(f"{max(row[i] for row in rows):.1e}" for i in range(2, 6))
    print(f"| **{len(rows)} {group}** | {equal}/{total} | {largest} |", flush=True)


if __name__ == "__main__":
    main()
