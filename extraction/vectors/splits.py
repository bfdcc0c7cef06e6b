"""Split a trait's rows by question and by instruction, never by row.

Rows that share a question or an instruction share most of their activation. After a split by row, a direction that
encodes the questions and nothing of the trait would score well on the test.

Shapes: n rows, N positive, M negative, L layers, k of them, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from extraction.core.errors import TraitError

PARTS = {"fit": 40, "validation": 20, "test": 40}  # percent of the questions
MAX_FOLDS = 5
MIN_ROWS_PER_SIDE = 2  # to fit on: what the methods need

Question = TypeVar("Question", bound=Hashable)


@dataclass(frozen=True)
class LabelledRows:
    """Activations [n, L, D] with each row's label [n] (True: positive), question and instruction.

    Ids are hashable, and sortable among themselves. Without instructions (natural prompts) all have the same id.
    """

    activations_nLD: Tensor
    positive_n: Tensor
    question_ids: tuple[Any, ...]
    instruction_ids: tuple[Any, ...]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Positive rows [N, L, D] and negative rows [M, L, D]; views where the positive ones come first, as in runs."""
        n_positive, _ = self.counts
        if self.positive_n[:n_positive].all():
            return self.activations_nLD[:n_positive], self.activations_nLD[n_positive:]
        return self.activations_nLD[self.positive_n], self.activations_nLD[~self.positive_n]

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Number of positive and number of negative rows."""
        n_positive = int(self.positive_n.sum())
        return n_positive, len(self.positive_n) - n_positive

    def select(self, keep_n: Tensor) -> LabelledRows:
        """Return the rows where `keep_n` is True."""
        places = keep_n.nonzero().flatten().tolist()
        questions, instructions = (tuple(ids[i] for i in places) for ids in (self.question_ids, self.instruction_ids))
        return LabelledRows(self.activations_nLD[keep_n], self.positive_n[keep_n], questions, instructions)

    def with_activations(self, activations_nkD: Tensor) -> LabelledRows:
        """Return the same rows with other activations, such as those of some layers."""
        return LabelledRows(activations_nkD, self.positive_n, self.question_ids, self.instruction_ids)

    def with_labels(self, positive_n: Tensor) -> LabelledRows:
        """Return the same rows with other labels."""
        return LabelledRows(self.activations_nLD, positive_n, self.question_ids, self.instruction_ids)


@dataclass(frozen=True)
class Fold:
    """Masks [n] of the rows that directions are fitted on, and of the held-out rows that they score."""

    fit_n: Tensor
    held_n: Tensor


@dataclass(frozen=True)
class Split:
    """Masks [n] of the parts, and the folds. Each row outside the fit part is held out by exactly one fold."""

    part_n: dict[str, Tensor]
    folds: tuple[Fold, ...]

    def fold_n(self) -> Tensor:
        """Return the index [n] of the fold that holds each row out; 0 for fit rows, too."""
        held_kn = torch.stack([fold.held_n for fold in self.folds])
        return held_kn.long().argmax(0)


# --- questions ------------------------------------------------------------------------------------------------------


def deal_questions(
    question_ids: Sequence[Question], positive_n: Tensor, shares: Sequence[int], *, seed: int
) -> list[set[Question]]:
    """Divide the questions of rows into disjoint sets. `shares` are percentages that add up to 100.

    All rows of a question, of both sides and every instruction, go together. Questions of both sides, of the positive
    side alone and of the negative side alone are dealt group by group, so that natural prompts leave both sides in each
    part. The result depends on the set of questions and the seed alone.
    """
    shuffler = random.Random(seed)
    dealt: list[set[Question]] = [set() for _ in shares]
    for group in _group_by_sides(question_ids, positive_n):
        shuffler.shuffle(group)
        start = 0
        for part, count in zip(dealt, apportion(len(group), shares), strict=True):
            part.update(group[start : start + count])
            start += count
    return dealt


def apportion(count: int, shares: Sequence[int]) -> list[int]:
    """Divide `count` items by percentages into whole numbers.

    The largest remainders are rounded up, the earlier ones first.
    """
    counts = [share * count // 100 for share in shares]
    largest = sorted(range(len(shares)), key=lambda i: (-(shares[i] * count % 100), i))
    for i in largest[: count - sum(counts)]:
        counts[i] += 1
    return counts


def _group_by_sides(question_ids: Sequence[Question], positive_n: Tensor) -> list[list[Question]]:
    seen: dict[bool, set[Question]] = {True: set(), False: set()}
    for question, label in zip(question_ids, positive_n.tolist(), strict=True):
        seen[label].add(question)
    groups = (seen[True] & seen[False], seen[True] - seen[False], seen[False] - seen[True])
    return [sorted(group) for group in groups]  # type: ignore[type-var]  # ids are all int or all str


def split_halves(rows: LabelledRows, *, seed: int) -> tuple[LabelledRows, LabelledRows]:
    """Return the rows of one half of the questions, and those of the other half."""
    first, _ = deal_questions(rows.question_ids, rows.positive_n, (50, 50), seed=seed)
    here_n = _rows_about(rows, first)
    return rows.select(here_n), rows.select(~here_n)


def _rows_about(rows: LabelledRows, questions: set[Any]) -> Tensor:
    return torch.tensor([question in questions for question in rows.question_ids], dtype=torch.bool)


# --- parts and folds ------------------------------------------------------------------------------------------------


def split_rows(rows: LabelledRows, *, seed: int) -> Split:
    """Split questions into fit (40%), validation (20%) and test (40%), and instructions into folds.

    Instructions are dealt into at most 5 folds. In each fold, directions are fitted on the fit questions of all other
    instructions, and score the fold's own rows about validation and test questions: no row is scored by a direction
    that was fitted on its question or its instruction. With one instruction (or natural prompts), or too few rows to
    leave one out, there is one fold and only questions are held out. Raises TraitError where a part lacks a side.
    """
    dealt = deal_questions(rows.question_ids, rows.positive_n, tuple(PARTS.values()), seed=seed)
    part_n = {name: _rows_about(rows, questions) for name, questions in zip(PARTS, dealt, strict=True)}
    for name, here_n in part_n.items():
        _check_both_sides(name, rows.select(here_n))
    folds = _folds(rows, part_n["fit"], seed)
    for fold in folds:
        check_no_leak(rows, fold, instructions=len(folds) > 1)
    return Split(part_n, folds)


def _folds(rows: LabelledRows, fit_n: Tensor, seed: int) -> tuple[Fold, ...]:
    instructions = sorted(set(rows.instruction_ids))
    random.Random(seed).shuffle(instructions)
    n_folds = min(MAX_FOLDS, len(instructions))
    groups = [set(instructions[fold::n_folds]) for fold in range(n_folds)]
    own = [torch.tensor([instruction in group for instruction in rows.instruction_ids]) for group in groups]
    folds = tuple(Fold(fit_n & ~own_n, ~fit_n & own_n) for own_n in own)
    if n_folds == 1 or min(min(rows.select(fold.fit_n).counts) for fold in folds) < MIN_ROWS_PER_SIDE:
        return (Fold(fit_n, ~fit_n),)
    return folds


def check_no_leak(rows: LabelledRows, fold: Fold, *, instructions: bool) -> None:
    """Raise AssertionError where a fold scores rows about a question, or with an instruction, that it was fitted on.

    `instructions`: check the instructions, too.
    """
    fitted, held = rows.select(fold.fit_n), rows.select(fold.held_n)
    shared = {"question": set(fitted.question_ids) & set(held.question_ids)}
    if instructions:
        shared["instruction"] = set(fitted.instruction_ids) & set(held.instruction_ids)
    for kind, ids in shared.items():
        if ids:
            raise AssertionError(f"a leak: {len(ids)} {kind}s are both fitted on and scored, {min(ids)!r} among them")


def _check_both_sides(name: str, part: LabelledRows) -> None:
    n_positive, n_negative = part.counts
    if n_positive == 0 or n_negative == 0:
        raise TraitError(
            f"the {name} part has {n_positive} positive and {n_negative} negative rows over"
            f" {len(set(part.question_ids))} questions; held-out validation needs both sides in every part:"
            " add questions (at least 3, natural prompts 3 on each side), or loosen the judge's threshold"
        )


# --- shuffled labels ------------------------------------------------------------------------------------------------


def shuffled_labels(rows: LabelledRows, split: Split, *, seed: int) -> Tensor:
    """Return labels [n] shuffled within each question, so that no trait is left to find.

    Questions of one side only (natural prompts) swap their labels with one another, within their part.
    """
    shuffler = random.Random(seed)
    labels = rows.positive_n.tolist()
    rows_of: dict[Any, list[int]] = {}
    for row, question in enumerate(rows.question_ids):
        rows_of.setdefault(question, []).append(row)
    both, on_positive, on_negative = _group_by_sides(rows.question_ids, rows.positive_n)
    for question in both:
        shuffled = [labels[row] for row in rows_of[question]]
        shuffler.shuffle(shuffled)
        for row, label in zip(rows_of[question], shuffled, strict=True):
            labels[row] = label
    for here_n in split.part_n.values():
        one_sided = [q for q in (*on_positive, *on_negative) if here_n[rows_of[q][0]]]
        shuffled = [labels[rows_of[question][0]] for question in one_sided]
        shuffler.shuffle(shuffled)
        for question, label in zip(one_sided, shuffled, strict=True):
            for row in rows_of[question]:
                labels[row] = label
    return torch.tensor(labels)
