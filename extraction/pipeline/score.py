"""The judging of a run: every response gets its scores, and with them it is known which count.

What a judge that reads has said is in a log of the run's folder as soon as it is known; nothing in it is asked again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from extraction.core.errors import TraitError
from extraction.core.progress import ProgressReporter
from extraction.core.records import POLARITIES, Trait
from extraction.judging.base import (
    EMPTY,
    FAILED,
    MAX_CHARACTERS,
    Judgement,
    Pair,
    Rating,
    RatingContext,
    RuleJudge,
    Scorer,
)
from extraction.judging.filtering import COHERENCE, KeptResponses, filter_responses
from extraction.judging.registry import is_model_judge, judge_model, model_judge, resolve_judge, rule_judge
from extraction.judging.rubric import fill, rubrics_of
from extraction.pipeline.plan import RunPlan
from extraction.storage.atomic import digest
from extraction.storage.trait_run import TraitRun

Row = dict[str, Any]


# --- scoring --------------------------------------------------------------------------------------------------------


def make_scorer(job: RunPlan, trait: Trait, listener: ProgressReporter, *, folder: TraitRun | None = None) -> Scorer:
    """The job's judge for a trait: a function of (question, answer) pairs that returns their Judgements, in order.

    Call it with as many pairs as there are: a model is loaded at the first that needs it, and answers are batched or
    asked for side by side. A blank answer is not asked about. What is in the log of `folder` (the run's, which must be
    open and locked) is read from there, and what is new is added to it. Raises ConfigError where a judge can't be
    reached, ModelError where it can't judge.
    """
    name = resolve_judge(job.experiment.judge, trait)
    if not is_model_judge(name):
        return partial(_score_by_rule, rule_judge(name, trait), name, trait, listener)
    return _Reader(job, trait, name, listener, folder or job.folder(trait))


def _score_by_rule(
    judge: RuleJudge, name: str, trait: Trait, listener: ProgressReporter, pairs: Sequence[Pair]
) -> list[Judgement]:
    """Score pairs by a judge without a model; note the responses that are too long to be read to their end."""
    n_cut = sum(len(answer) > MAX_CHARACTERS for _, answer in pairs)
    if n_cut and name != "none":
        listener.note(f"{trait.name}: {n_cut} responses judged by their first {MAX_CHARACTERS:,} characters")
    return [_at_once(judge.score(question, answer, trait), name) for question, answer in pairs]


def _at_once(score: float | None, how: str) -> Judgement:
    return Judgement(score, reason=None if score is not None else "no score", how=how)


class _Reader:
    """A judge that reads, with its log."""

    def __init__(self, job: RunPlan, trait: Trait, name: str, listener: ProgressReporter, folder: TraitRun) -> None:
        self.job, self.trait, self.name, self.listener, self.folder = job, trait, name, listener, folder
        self.model = judge_model(job.experiment, job.root)
        self.rubrics = rubrics_of(trait)
        self.lock = threading.Lock()
        self.known: dict[str, Rating] | None = None  # not read yet; the run is locked, so nobody else adds to the log

    def __call__(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Judge the pairs; each needs a rating by the trait's rubric, and one of coherence.

        What could not be had is asked for again by the next process, not by this one.
        """
        if self.known is None:
            self.known = {key: _from_log(row) for key, row in self.folder.read_judgements(self.name).items()}
        asked = {
            self._key(rubric, pair): (rubric, pair) for pair in pairs for rubric in self.rubrics if pair[1].strip()
        }
        texts = {key: fill(rubric, *pair) for key, (rubric, pair) in asked.items() if key not in self.known}
        if texts:
            self.listener.begin(f"{self.trait.name}: judging", len(asked), len(asked) - len(texts))
            if len(texts) < len(asked):
                self.listener.note(f"{self.trait.name}: {len(asked) - len(texts)} ratings known from the log")
            context = RatingContext(
                self.job.experiment, self.job.root, self.job.spec.device, self.trait.name, self.listener
            )
            try:
                model_judge(self.name).rate(context, texts, self.keep)
            finally:
                self.listener.end()
        return [self._judgement(pair, self.known) for pair in pairs]

    def keep(self, ratings: Mapping[str, Rating]) -> None:
        """Into the log, all but what failed: that is asked for again."""
        rows = [_to_log(key, rating) for key, rating in ratings.items() if not _has_failed(rating)]
        with self.lock:
            assert self.known is not None
            self.known.update(ratings)
            if rows:
                self.folder.add_judgements(self.name, rows)

    def _key(self, rubric: str, pair: Pair) -> str:
        return digest([self.name, self.model, rubric, *pair])

    def _judgement(self, pair: Pair, known: Mapping[str, Rating]) -> Judgement:
        if not pair[1].strip():
            return Judgement(None, reason=EMPTY)
        of_trait, of_coherence = (known[self._key(rubric, pair)] for rubric in self.rubrics)
        reason = of_trait.reason or of_coherence.reason
        cut = f", first {MAX_CHARACTERS:,} characters" if len(pair[1]) > MAX_CHARACTERS else ""
        return Judgement(of_trait.score, of_coherence.score, of_trait.raw, reason, of_trait.how + cut)


def _has_failed(rating: Rating) -> bool:
    return (rating.reason or "").startswith(FAILED)


def _to_log(key: str, rating: Rating) -> Row:
    return {
        "key": key,
        "score": rating.score,
        "reason": rating.reason,
        "raw": rating.raw,
        "how": rating.how,
        "tokens": list(rating.tokens),
    }


def _from_log(row: Row) -> Rating:
    n_in, n_out = row["tokens"]
    return Rating(row["score"], row["reason"], row["raw"], row["how"], (n_in, n_out))


# --- a run ----------------------------------------------------------------------------------------------------------


def score_responses(
    job: RunPlan, trait: Trait, folder: TraitRun, listener: ProgressReporter, *, again: bool = True
) -> None:
    """responses/pos.jsonl and neg.jsonl: every shard's rows with their scores, once all shards are there.

    Answers that could not be had before are asked for `again`, or left as they are.
    """
    count = len(job.shards(trait))
    if not all(folder.shard_done("responses", i) for i in range(count)):
        return
    made_from = [*_judge_of(job, trait), *folder.shard_checksums("responses")]
    present = folder.response_sources()
    if present == made_from or (not again and present == [*made_from, FAILED]):
        return
    name = resolve_judge(job.experiment.judge, trait)
    judge_all = make_scorer(job, trait, listener, folder=folder)
    failed = is_model_judge(name) and _read_all(judge_all, folder, count)
    sides = {polarity: _of_side(judge_all, name, folder, count, polarity) for polarity in POLARITIES}
    folder.write_responses(sides, [*made_from, FAILED] if failed else made_from)


def _read_all(judge_all: Scorer, folder: TraitRun, count: int) -> bool:
    """Ask a judge that reads about every response, all at once; its log knows them then. True where some failed."""
    rows = (row for i in range(count) for row in folder.read_responses_shard(i))
    judgements = judge_all([(row["question"], row["response"]) for row in rows])
    return any((judgement.reason or "").startswith(FAILED) for judgement in judgements)


def _judge_of(job: RunPlan, trait: Trait) -> list[str]:
    """What the scores depend on besides the responses."""
    name = resolve_judge(job.experiment.judge, trait)
    if not is_model_judge(name):
        return [f"judge {name}"]
    return [f"judge {name}", f"model {judge_model(job.experiment, job.root)}", f"rubrics {digest(rubrics_of(trait))}"]


def _of_side(judge_all: Scorer, name: str, folder: TraitRun, count: int, polarity: str) -> Iterator[Row]:
    """One polarity's rows with their scores, a shard at a time: memory does not grow with their number."""
    for i in range(count):
        rows = [row for row in folder.read_responses_shard(i) if row["polarity"] == polarity]
        judgements = judge_all([(row["question"], row["response"]) for row in rows])
        yield from (_scored(row, name, judgement) for row, judgement in zip(rows, judgements, strict=True))


def _scored(row: Row, name: str, judgement: Judgement) -> Row:
    """A row with its scores; of a judge that reads, with what it said and how that was read, too."""
    if name == "none":
        return {**row, "scores": {}}
    if not is_model_judge(name):
        return {**row, "scores": {name: judgement.score}}
    judged = {"raw": judgement.raw, "how": judgement.how, "reason": judgement.reason}
    return {**row, "scores": {name: judgement.score, name + COHERENCE: judgement.coherence}, "judged": judged}


def kept_responses(job: RunPlan, trait: Trait, folder: TraitRun) -> KeptResponses:
    """Which responses of a finished stage 1 count."""
    settings = job.experiment
    name = resolve_judge(settings.judge, trait)
    rows = {polarity: folder.read_responses(polarity) for polarity in POLARITIES}
    model = judge_model(settings, job.root) if is_model_judge(name) else None
    return filter_responses(
        rows, name, settings.threshold, coherence_threshold=settings.coherence_threshold, model=model
    )


def usable_kept_responses(job: RunPlan, trait: Trait, folder: TraitRun) -> KeptResponses:
    """As `kept_of`. Raises TraitError where the judge can't be relied on: no scores, no spread, a side without any."""
    kept = kept_responses(job, trait, folder)
    if kept.problem:
        raise TraitError(f"trait {trait.name}: {kept.problem}; give another --judge-model, or --judge lexical or none")
    return kept
