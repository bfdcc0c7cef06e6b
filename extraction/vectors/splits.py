"""Splitting a trait's rows by question and by instruction, never by row.

n rows, L layers, D hidden. Rows that share a question, or an instruction, share most of their activation: split by row,
a direction that knows the questions and nothing of the trait passes for a good one.
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
from extraction.core.records import Example

PARTS = {"fit": 40, "validation": 20, "test": 40}  # percent of the questions
MOST_FOLDS = 5
LEAST_ROWS = 2  # a side, to fit on: what the methods need

Question = TypeVar("Question", bound=Hashable)


@dataclass(frozen=True)
class LabelledRows:
    """Activations [n, L, D], which rows are positive [n], and each row's question and instruction.

    Ids are hashable, and sortable among themselves. Without instructions (natural prompts) all have the same.
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
        """How many are positive, and how many negative."""
        n_positive = int(self.positive_n.sum())
        return n_positive, len(self.positive_n) - n_positive

    def pick(self, keep_n: Tensor) -> LabelledRows:
        """Some of the rows."""
        places = keep_n.nonzero().flatten().tolist()
        questions, instructions = (tuple(ids[i] for i in places) for ids in (self.question_ids, self.instruction_ids))
        return LabelledRows(self.activations_nLD[keep_n], self.positive_n[keep_n], questions, instructions)

    def at(self, activations_nkD: Tensor) -> LabelledRows:
        """The same rows with other activations: of some layers, say."""
        return LabelledRows(activations_nkD, self.positive_n, self.question_ids, self.instruction_ids)

    def relabelled(self, positive_n: Tensor) -> LabelledRows:
        """The same rows with other labels."""
        return LabelledRows(self.activations_nLD, positive_n, self.question_ids, self.instruction_ids)


@dataclass(frozen=True)
class Fold:
    """Which rows [n] directions are fitted on, and which of the other parts' rows [n] are scored with them."""

    fit_n: Tensor
    held_n: Tensor


@dataclass(frozen=True)
class Split:
    """Which rows [n] are in each part, and the folds: every row outside the fit part is held by exactly one."""

    part_n: dict[str, Tensor]
    folds: tuple[Fold, ...]

    def fold_n(self) -> Tensor:
        """The fold [n] that holds each row; 0 for fit rows, too."""
        held_kn = torch.stack([fold.held_n for fold in self.folds])
        return held_kn.long().argmax(0)


def question_keys(examples: Sequence[Example]) -> tuple[str, ...]:
    """What the rows are split by: the question's text. A natural prompt is its own; duplicates stay together."""
    return tuple(example.question for example in examples)


# --- questions ------------------------------------------------------------------------------------------------------


def deal_questions(
    question_ids: Sequence[Question], positive_n: Tensor, shares: Sequence[int], *, seed: int
) -> list[set[Question]]:
    """Row by row question ids and labels -> disjoint sets of questions; `shares` are percentages, which add up to 100.

    All rows of a question, of both sides and every instruction, go together. Questions seen on both sides, on the
    positive only and on the negative only are dealt one group after the other, so natural prompts leave both sides in
    each part. Depends on the set of questions and the seed alone.
    """
    shuffler = random.Random(seed)
    dealt: list[set[Question]] = [set() for _ in shares]
    for group in _by_sides_seen(question_ids, positive_n):
        shuffler.shuffle(group)
        start = 0
        for part, count in zip(dealt, apportion(len(group), shares), strict=True):
            part.update(group[start : start + count])
            start += count
    return dealt


def apportion(count: int, shares: Sequence[int]) -> list[int]:
    """`count` things by percentages, in whole numbers: the largest remainders are rounded up, the earlier first."""
    whole = [share * count // 100 for share in shares]
    largest = sorted(range(len(shares)), key=lambda i: (-(shares[i] * count % 100), i))
    for i in largest[: count - sum(whole)]:
        whole[i] += 1
    return whole


def _by_sides_seen(question_ids: Sequence[Question], positive_n: Tensor) -> list[list[Question]]:
    seen: dict[bool, set[Question]] = {True: set(), False: set()}
    for question, label in zip(question_ids, positive_n.tolist(), strict=True):
        seen[label].add(question)
    groups = (seen[True] & seen[False], seen[True] - seen[False], seen[False] - seen[True])
    return [sorted(group) for group in groups]  # type: ignore[type-var]  # ids are all int or all str


def halves(rows: LabelledRows, *, seed: int) -> tuple[LabelledRows, LabelledRows]:
    """The rows of one half of the questions, and those of the other."""
    first, _ = deal_questions(rows.question_ids, rows.positive_n, (50, 50), seed=seed)
    here_n = _about(rows, first)
    return rows.pick(here_n), rows.pick(~here_n)


def _about(rows: LabelledRows, questions: set[Any]) -> Tensor:
    return torch.tensor([question in questions for question in rows.question_ids], dtype=torch.bool)


# --- parts and folds ------------------------------------------------------------------------------------------------


def split_rows(rows: LabelledRows, *, seed: int) -> Split:
    """Fit (40% of the questions), validation (20%) and test (40%); and in each fold some instructions held out.

    Instructions are dealt into at most 5 folds. In each, directions are fitted on the fit questions of all other
    instructions, and the validation and test questions' rows of its own are scored: no row is scored by a direction
    that has seen its question or its instruction. With one instruction (or natural prompts), or where the rows are
    too few to leave one out, there is one fold and only questions are held out. TraitError where a part lacks a side.
    """
    dealt = deal_questions(rows.question_ids, rows.positive_n, tuple(PARTS.values()), seed=seed)
    part_n = {name: _about(rows, questions) for name, questions in zip(PARTS, dealt, strict=True)}
    for name, here_n in part_n.items():
        _check_both_sides(name, rows.pick(here_n))
    folds = _folds(rows, part_n["fit"], seed)
    for fold in folds:
        check_apart(rows, fold, instructions=len(folds) > 1)
    return Split(part_n, folds)


def _folds(rows: LabelledRows, fit_n: Tensor, seed: int) -> tuple[Fold, ...]:
    instructions = sorted(set(rows.instruction_ids))
    random.Random(seed).shuffle(instructions)
    n_folds = min(MOST_FOLDS, len(instructions))
    groups = [set(instructions[fold::n_folds]) for fold in range(n_folds)]
    own = [torch.tensor([instruction in group for instruction in rows.instruction_ids]) for group in groups]
    folds = tuple(Fold(fit_n & ~own_n, ~fit_n & own_n) for own_n in own)
    if n_folds == 1 or min(min(rows.pick(fold.fit_n).counts) for fold in folds) < LEAST_ROWS:
        return (Fold(fit_n, ~fit_n),)
    return folds


def check_apart(rows: LabelledRows, fold: Fold, *, instructions: bool) -> None:
    """AssertionError where a fold scores rows whose question (or, if asked, instruction) its directions have seen."""
    fitted, held = rows.pick(fold.fit_n), rows.pick(fold.held_n)
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


# --- the placebo ----------------------------------------------------------------------------------------------------


def shuffled_labels(rows: LabelledRows, split: Split, *, seed: int) -> Tensor:
    """Labels [n] dealt out again, so that nothing is left to find.

    Within each question, so that questions stay on both sides; questions seen on one side only (natural prompts) swap
    their labels with one another, within their part.
    """
    shuffler = random.Random(seed)
    labels = rows.positive_n.tolist()
    places: dict[Any, list[int]] = {}
    for place, question in enumerate(rows.question_ids):
        places.setdefault(question, []).append(place)
    both, on_positive, on_negative = _by_sides_seen(rows.question_ids, rows.positive_n)
    for question in both:
        own = [labels[place] for place in places[question]]
        shuffler.shuffle(own)
        for place, label in zip(places[question], own, strict=True):
            labels[place] = label
    for here_n in split.part_n.values():
        one_sided = [q for q in (*on_positive, *on_negative) if here_n[places[q][0]]]
        own = [labels[places[question][0]] for question in one_sided]
        shuffler.shuffle(own)
        for question, label in zip(one_sided, own, strict=True):
            for place in places[question]:
                labels[place] = label
    return torch.tensor(labels)
