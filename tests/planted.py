"""Rows with a known truth: a trait, an instruction, a question, or nothing at all."""

from __future__ import annotations

import torch
from torch import Tensor

from extraction.vectors.splits import LabelledRows


def gaussian(*shape: int, seed: int) -> Tensor:
    """Seeded normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ways(layers: int, hidden: int, seed: int) -> Tensor:
    """A unit direction at every layer."""
    return torch.nn.functional.normalize(gaussian(layers, hidden, seed=seed), dim=-1)


def trait_rows(
    questions: int = 20, instructions: int = 5, layers: int = 4, hidden: int = 24, effect: float = 1.0, seed: int = 0
) -> LabelledRows:
    """An instructed trait: every question and instruction on both sides, a trait direction stronger at layer 2."""
    n = 2 * questions * instructions
    positive_n = torch.arange(n) < n // 2
    question_n = torch.arange(n) % questions
    instruction_n = torch.arange(n) // questions % instructions
    strength_L1 = torch.tensor([0.1, 0.4, 1.0, 0.5])[:layers, None].double()
    sign_n11 = torch.where(positive_n, 1.0, -1.0).double()[:, None, None]
    by_question = gaussian(questions, layers, hidden, seed=seed)[question_n]
    by_instruction = 0.5 * gaussian(instructions, layers, hidden, seed=seed + 5)[instruction_n]
    noise = gaussian(n, layers, hidden, seed=seed + 1)
    activations = (
        by_question + by_instruction + noise + effect * sign_n11 * strength_L1 * ways(layers, hidden, seed + 2)
    )
    return LabelledRows(activations.float(), positive_n, tuple(question_n.tolist()), tuple(instruction_n.tolist()))


def natural_rows(
    each: int = 15, repeats: int = 2, hidden: int = 24, effect: float = 0.0, seed: int = 0
) -> LabelledRows:
    """Natural prompts: every question lies on one side, and its rows share nearly all of their activation."""
    question_n = torch.arange(2 * each * repeats) % (2 * each)
    positive_n = question_n % 2 == 0
    shared = gaussian(2 * each, 1, hidden, seed=seed)[question_n]
    sign_n11 = torch.where(positive_n, 1.0, -1.0).double()[:, None, None]
    noise = 0.1 * gaussian(len(question_n), 1, hidden, seed=seed + 1)
    activations = shared + noise + effect * sign_n11 * ways(1, hidden, seed + 2)
    return LabelledRows(activations, positive_n, tuple(question_n.tolist()), (0,) * len(question_n))


def memorised_instructions(
    seed: int = 0, hidden: int = 64, questions: int = 20, instructions: int = 10
) -> LabelledRows:
    """No trait: each instruction pair moves its sides apart along a direction of its own, the same for all questions.

    A direction that has met the instruction reads it perfectly on any question; one that has not reads nothing.
    """
    rows = trait_rows(questions, instructions, layers=2, hidden=hidden, effect=0.0, seed=seed)
    own = 6 * ways(instructions, hidden, seed + 3)[torch.tensor(rows.instruction_ids)].unsqueeze(1)
    sign_n11 = torch.where(rows.positive_n, 1.0, -1.0)[:, None, None]
    return LabelledRows(
        (rows.activations_nLD + sign_n11 * own).float(), rows.positive_n, rows.question_ids, rows.instruction_ids
    )
