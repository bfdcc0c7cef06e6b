"""Judge a run's responses, and select those that vectors are made from.

The answers of a judge that reads (`local`, `openai`) go into a log in the run folder as soon as they arrive; no answer
in the log is asked for again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from extraction.core.errors import StoreError, TraitError
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
from extraction.judging.registry import (
    is_model_judge,
    judge_model,
    model_judge,
    resolve_judge,
    rule_judge,
)
from extraction.judging.rubric import fill, rubrics_of
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.session import TraitContext
from extraction.storage.atomic import digest
from extraction.storage.trait_run import TraitRun

Row = dict[str, Any]


# --- scoring --------------------------------------------------------------------------------------------------------


def make_scorer(context: TraitContext) -> Scorer:
    """Return the judge of a trait: a function from (question, response) pairs to their Judgements, in order.

    Call it with many pairs at a time: they are judged in batches or in parallel calls. A model is loaded when the first
    pair needs it, and blank responses are not judged. Judgements in the run's log are read from it and new ones are
    added, so the run must be open and locked. Raises ConfigError where a judge can't be reached, ModelError where it
    can't judge.
    """
    name = resolve_judge(context.plan.experiment.judge, context.trait)
    if is_model_judge(name):
        return _ReadingJudge(context, name)
    return partial(_score_by_rule, rule_judge(name, context.trait), name, context)


def _score_by_rule(judge: RuleJudge, name: str, context: TraitContext, pairs: Sequence[Pair]) -> list[Judgement]:
    """Score pairs by a judge without a model; note the responses that are too long to be read to their end."""
    n_cut = sum(len(answer) > MAX_CHARACTERS for _, answer in pairs)
    if n_cut and name != "none":
        note = f"{n_cut} responses judged by their first {MAX_CHARACTERS:,} characters"
        context.progress.note(f"{context.trait.name}: {note}")
    return [_judgement(judge.score(question, answer, context.trait), name) for question, answer in pairs]


def _judgement(score: float | None, how: str) -> Judgement:
    return Judgement(score, reason=None if score is not None else "no score", how=how)


class _ReadingJudge:
    """A judge that reads the responses, with its log."""

    def __init__(self, context: TraitContext, name: str) -> None:
        self.context, self.name = context, name
        self.model = judge_model(context.plan.experiment, context.plan.root)
        self.rubrics = rubrics_of(context.trait)
        self.lock = threading.Lock()
        self.known: dict[str, Rating] | None = None  # the log, once it is read: the run's lock keeps other writers out

    def __call__(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Judge the pairs, each by the trait's rubric and by that of coherence.

        A rating that failed is not tried again by this process; the next one asks for it.
        """
        if self.known is None:
            self.known = {key: _from_log(row) for key, row in self.context.run.read_judgements(self.name).items()}
        by_key = {
            self._key(rubric, pair): (rubric, pair) for pair in pairs for rubric in self.rubrics if pair[1].strip()
        }
        texts = {key: fill(rubric, *pair) for key, (rubric, pair) in by_key.items() if key not in self.known}
        if texts:
            plan, trait, progress = self.context.plan, self.context.trait, self.context.progress
            progress.begin(f"{trait.name}: judging", len(by_key), len(by_key) - len(texts))
            if len(texts) < len(by_key):
                progress.note(f"{trait.name}: {len(by_key) - len(texts)} ratings known from the log")
            rating = RatingContext(plan.experiment, plan.root, plan.spec.device, trait.name, progress)
            try:
                model_judge(self.name).rate(rating, texts, self.keep)
            finally:
                progress.end()
        return [self._judgement(pair, self.known) for pair in pairs]

    def keep(self, ratings: Mapping[str, Rating]) -> None:
        """Add ratings to the log, except those that failed."""
        rows = [_to_log(key, rating) for key, rating in ratings.items() if not _has_failed(rating)]
        with self.lock:
            assert self.known is not None
            self.known.update(ratings)
            if rows:
                self.context.run.add_judgements(self.name, rows)

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


def score_responses(context: TraitContext, *, again: bool = True) -> None:
    """Write responses/pos.jsonl and neg.jsonl, the rows of every shard with their scores, once all shards are there.

    `again`: ask once more for ratings that failed.
    """
    plan, trait, run = context.plan, context.trait, context.run
    count = len(plan.shards(trait))
    if not all(run.shard_done("responses", i) for i in range(count)):
        return
    made_from = [*_judge_identity(plan, trait), *run.shard_checksums("responses")]
    present = run.response_sources()
    if present == made_from or (not again and present == [*made_from, FAILED]):
        return
    name, judge = resolve_judge(plan.experiment.judge, trait), make_scorer(context)
    failed = is_model_judge(name) and _judge_all(judge, run, count)
    sides = {polarity: _scored_rows(judge, name, run, count, polarity) for polarity in POLARITIES}
    run.write_responses(sides, [*made_from, FAILED] if failed else made_from)


def _judge_all(judge: Scorer, run: TraitRun, count: int) -> bool:
    """Judge every response at once, so that the log knows them all; return True if some failed."""
    rows = (row for i in range(count) for row in run.read_responses_shard(i))
    judgements = judge([(row["question"], row["response"]) for row in rows])
    return any((judgement.reason or "").startswith(FAILED) for judgement in judgements)


def _judge_identity(plan: RunPlan, trait: Trait) -> list[str]:
    """Return what scores depend on besides the responses."""
    name = resolve_judge(plan.experiment.judge, trait)
    if not is_model_judge(name):
        return [f"judge {name}"]
    return [f"judge {name}", f"model {judge_model(plan.experiment, plan.root)}", f"rubrics {digest(rubrics_of(trait))}"]


def _scored_rows(judge: Scorer, name: str, run: TraitRun, count: int, polarity: str) -> Iterator[Row]:
    """Yield one polarity's rows with their scores, a shard at a time: memory does not grow with their number."""
    for i in range(count):
        rows = [row for row in run.read_responses_shard(i) if row["polarity"] == polarity]
        judgements = judge([(row["question"], row["response"]) for row in rows])
        yield from (_scored(row, name, judgement) for row, judgement in zip(rows, judgements, strict=True))


def _scored(row: Row, name: str, judgement: Judgement) -> Row:
    """Return a row with its scores; of a judge that reads, also with its answer and how that was parsed."""
    if name == "none":
        return {**row, "scores": {}}
    if not is_model_judge(name):
        return {**row, "scores": {name: judgement.score}}
    judged = {"raw": judgement.raw, "how": judgement.how, "reason": judgement.reason}
    return {**row, "scores": {name: judgement.score, name + COHERENCE: judgement.coherence}, "judged": judged}


def kept_responses(plan: RunPlan, trait: Trait, run: TraitRun) -> KeptResponses:
    """Return the responses that vectors are made from. Raises StoreError while they are not all scored."""
    settings = plan.experiment
    name = resolve_judge(settings.judge, trait)
    rows = {polarity: run.read_responses(polarity) for polarity in POLARITIES}
    model = judge_model(settings, plan.root) if is_model_judge(name) else None
    return filter_responses(
        rows, name, settings.threshold, coherence_threshold=settings.coherence_threshold, model=model
    )


def stored_kept_responses(context: TraitContext) -> KeptResponses | None:
    """Return the kept responses, or None while they are not all scored."""
    try:
        return kept_responses(context.plan, context.trait, context.run)
    except StoreError:
        return None


def usable_kept_responses(context: TraitContext) -> KeptResponses:
    """Return the kept responses. Raises TraitError if the judge gave no scores, no spread, or keeps none of a side."""
    kept = kept_responses(context.plan, context.trait, context.run)
    if kept.problem:
        raise TraitError(
            f"trait {context.trait.name}: {kept.problem}; give another --judge-model, or --judge lexical or none"
        )
    return kept
