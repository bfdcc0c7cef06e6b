"""Measure the time of a validation card, on rows with a planted trait in the shapes of real models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from extraction.vectors.card import build_card
from extraction.vectors.method_table import DEFAULT_METHODS

QUESTIONS, INSTRUCTIONS = 20, 5  # with both sides: 200 rows
SHAPES = {"tiny": (2, 16), "pocket": (6, 192), "2b": (26, 2304)}  # layers, hidden
TRAITS = {"tiny": 1, "2b": 1}  # at most


def card_cost(shapes: Sequence[str], *, n_traits: int, say: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """Return the seconds of cards with all methods and controls, summed over `n_traits` (one for a large shape)."""
    return {
        "shapes": {shape: _cost(shape, min(n_traits, TRAITS.get(shape, n_traits)), say, options) for shape in shapes}
    }


def _cost(shape: str, n_traits: int, say: Callable[[str], None], options: dict[str, Any]) -> dict[str, Any]:
    n_layers, hidden = SHAPES[shape]
    seconds, words = [], []
    for seed in range(n_traits):
        rows_nLD, positive_n, questions, instructions = planted_rows(n_layers, hidden, seed)
        began = time.perf_counter()
        card = build_card(
            rows_nLD, positive_n, questions, instruction_ids=instructions, layers=range(n_layers), seed=seed,
            without_instruction_nLD=rows_nLD, **options,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
        words.append(card["verdict"]["word"])
        say(f"  {shape}, trait {seed}: {seconds[-1]:.1f} s, {words[-1]}")
    return {
        "layers": n_layers, "hidden": hidden, "rows": 2 * QUESTIONS * INSTRUCTIONS, "traits": n_traits,
        "methods": len(DEFAULT_METHODS), "bootstraps": card["bootstraps"], "seconds": sum(seconds),
        "seconds_each": seconds, "verdicts": words,
    }  # fmt: skip


def planted_rows(n_layers: int, hidden: int, seed: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Draw rows of every question, instruction and side, with effects of each and a trait in all layers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n = 2 * QUESTIONS * INSTRUCTIONS
    positive_n = torch.arange(n) < n // 2
    question_n, instruction_n = torch.arange(n) % QUESTIONS, torch.arange(n) // QUESTIONS % INSTRUCTIONS
    rows_nLD = normal(QUESTIONS, n_layers, hidden)[question_n] + normal(INSTRUCTIONS, n_layers, hidden)[instruction_n]
    way_LD = torch.nn.functional.normalize(normal(n_layers, hidden), dim=-1) * hidden**0.5 / 4
    sign_n11 = torch.where(positive_n, 1.0, -1.0)[:, None, None]
    return (
        rows_nLD + normal(n, n_layers, hidden) + sign_n11 * way_LD,
        positive_n,
        question_n.tolist(),
        instruction_n.tolist(),
    )
