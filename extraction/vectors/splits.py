"""Splitting a trait's rows by question, never by row.

n rows, L layers, D hidden. Rows that share a question share most of their activation: split by row, a direction that
knows the questions and nothing of the trait passes for a good one.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from extraction.errors import ConfigError, TraitError
from extraction.records import Example

TEST_FRACTION = 0.25
VALIDATION_FRACTION = 0.25

Question = TypeVar("Question", bound=Hashable)


@dataclass(frozen=True)
class Rows:
    """Activations [n, L, D], which rows are positive [n], and each row's question (n hashable, sortable ids)."""

    activations_nLD: Tensor
    positive_n: Tensor
    question_ids: tuple[Any, ...]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Positive rows [N, L, D] and negative rows [M, L, D]."""
        return self.activations_nLD[self.positive_n], self.activations_nLD[~self.positive_n]

    def about(self, questions: Sequence[Any]) -> Rows:
        """The rows of those questions."""
        wanted = set(questions)
        keep_n = torch.tensor([question in wanted for question in self.question_ids])
        kept_ids = tuple(question for question in self.question_ids if question in wanted)
        return Rows(self.activations_nLD[keep_n], self.positive_n[keep_n], kept_ids)

    def shuffled(self, seed: int) -> Rows:
        """The same rows with labels dealt out again: nothing is left to find."""
        order_n = torch.randperm(len(self.positive_n), generator=torch.Generator().manual_seed(seed))
        return Rows(self.activations_nLD, self.positive_n[order_n], self.question_ids)


@dataclass(frozen=True)
class Parts:
    """The three parts of a trait's rows; no question is in two of them."""

    fit: Rows
    validation: Rows
    test: Rows


def question_keys(examples: Sequence[Example]) -> tuple[str, ...]:
    """What the rows are split by: the question's text. A natural prompt is its own; duplicates stay together."""
    return tuple(example.question for example in examples)


def split_by_question(
    question_ids: Sequence[Question],
    *,
    fraction: float = TEST_FRACTION,
    seed: int,
    positive: Sequence[bool] | Tensor | None = None,
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Row by row question ids -> (train questions, test questions), each sorted; about `fraction` go to the test.

    All rows of a question, of both sides and every instruction, are on one side of the split. With `positive` (the
    rows' labels), questions seen on both sides, on the positive only and on the negative only are split one group after
    the other, so natural prompts leave both sides in each part. Depends on the set of questions and the seed alone.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"split fraction {fraction}: must lie between 0 and 1, both excluded")
    groups = _by_sides_seen(question_ids, positive)
    if all(len(group) < 2 for group in groups):
        raise TraitError(
            f"{len(set(question_ids))} questions: held-out validation needs at least 2 (natural prompts: 2 on each"
            " side), one to fit on and one to test on; add questions"
        )
    shuffler = random.Random(seed)
    test: list[Question] = []
    for group in groups:
        shuffler.shuffle(group)
        count = min(max(int(fraction * len(group) + 0.5), 1), len(group) - 1)
        test += group[: max(count, 0)]
    taken = set(test)
    train = {question for question in question_ids if question not in taken}
    return tuple(_in_order(train)), tuple(_in_order(taken))


def _by_sides_seen(question_ids: Sequence[Question], positive: Sequence[bool] | Tensor | None) -> list[list[Question]]:
    if positive is None:
        return [_in_order(set(question_ids))]
    labels = [bool(label) for label in positive]
    on_positive = {question for question, label in zip(question_ids, labels, strict=True) if label}
    on_negative = {question for question, label in zip(question_ids, labels, strict=True) if not label}
    groups = (on_positive & on_negative, on_positive - on_negative, on_negative - on_positive)
    return [_in_order(group) for group in groups]


def _in_order(questions: set[Question]) -> list[Question]:
    return sorted(questions)  # type: ignore[type-var]  # ids are all int or all str


def split_in_three(rows: Rows, *, seed: int) -> Parts:
    """Fit (one half), validation and test (a quarter each), by question; TraitError where a part lacks a side."""
    rest_questions, test_questions = split_by_question(
        rows.question_ids, fraction=TEST_FRACTION, seed=seed, positive=rows.positive_n
    )
    rest = rows.about(rest_questions)
    fit_questions, validation_questions = split_by_question(
        rest.question_ids, fraction=VALIDATION_FRACTION / (1 - TEST_FRACTION), seed=seed + 1, positive=rest.positive_n
    )
    parts = Parts(rows.about(fit_questions), rows.about(validation_questions), rows.about(test_questions))
    for name, part in vars(parts).items():
        check_both_sides(name, part)
    return parts


def check_both_sides(name: str, part: Rows) -> None:
    """TraitError where a part of a split lacks a side; `name` is the part's."""
    n_positive = int(part.positive_n.sum())
    n_negative = len(part.positive_n) - n_positive
    if n_positive == 0 or n_negative == 0:
        raise TraitError(
            f"the {name} part has {n_positive} positive and {n_negative} negative rows over"
            f" {len(set(part.question_ids))} questions; held-out validation needs both sides in every part:"
            " add questions (at least 3, natural prompts 3 on each side), or loosen the judge's threshold"
        )
