"""Judge a run's responses, and select those that vectors are made from.

The ratings of a judge that runs a model (`likelihood`, `local`, `openai`) go into a log in the run folder as soon as
they are known; no rating in the log is made again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from extraction.config.traits import trait_fingerprint
from extraction.core.errors import StoreError, TraitError
from extraction.core.progress import ProgressReporter
from extraction.core.records import POLARITIES, Trait
from extraction.judging.base import (
    EMPTY,
    FAILED,
    MAX_CHARACTERS,
    JudgedResponse,
    Judgement,
    OwnModelJudge,
    Rating,
    RatingContext,
    RuleJudge,
    Scorer,
)
from extraction.judging.filtering import COHERENCE, KeptResponses, filter_responses
from extraction.judging.registry import (
    JUDGES,
    is_model_judge,
    judge_model,
    model_judge,
    resolve_judge,
)
from extraction.judging.rubric import fill, rubrics_of
from extraction.pipeline.lazy_model import load_model
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.session import TraitContext
from extraction.storage.atomic import digest
from extraction.storage.trait_run import TraitRun

Row = dict[str, Any]
LOG_EVERY = 32  # ratings of the run's own model between two writes of the log


# --- scoring --------------------------------------------------------------------------------------------------------


def make_scorer(context: TraitContext) -> Scorer:
    """Return the judge of a trait: a function from responses to their Judgements, in order.

    Call it with many responses at a time: they are judged in batches or in parallel calls. A model is loaded when the
    first response needs it, and blank responses are not judged. Judgements in the run's log are read from it and new
    ones are added, so the run must be open and locked. Raises ConfigError where a judge can't be reached, ModelError
    where it can't judge.
    """
    name = resolve_judge(context.plan.experiment.judge, context.trait)
    judge = JUDGES[name]
    if isinstance(judge, RuleJudge):
        return partial(_score_by_rule, judge, name, context)
    kind = _OwnModelScorer if isinstance(judge, OwnModelJudge) else _RubricScorer
    return kind(context, name)


def preview_scores(context: TraitContext, responses: Sequence[JudgedResponse]) -> list[Judgement]:
    """Judge a few responses by `auto`, without a log."""
    name = resolve_judge("auto", context.trait)
    judge = JUDGES[name]
    if isinstance(judge, RuleJudge):
        return _score_by_rule(judge, name, context, responses)
    scores = dict(own_model_scores(context, name, responses))
    return [_judgement(scores.get(i), name) for i in range(len(responses))]


def _score_by_rule(
    judge: RuleJudge, name: str, context: TraitContext, responses: Sequence[JudgedResponse]
) -> list[Judgement]:
    """Score responses by a judge without a model; note those that are too long to be read to their end."""
    n_cut = sum(len(response.text) > MAX_CHARACTERS for response in responses)
    if n_cut and name != "none":
        note = f"{n_cut} responses judged by their first {MAX_CHARACTERS:,} characters"
        context.progress.note(f"{context.trait.name}: {note}")
    return [_judgement(judge.score(each.question, each.text, context.trait), name) for each in responses]


def _judgement(score: float | None, how: str) -> Judgement:
    return Judgement(score, reason=None if score is not None else "no score", how=how)


class _LoggedScorer:
    """A judge that runs a model, and the log of its ratings."""

    def __init__(self, context: TraitContext, name: str) -> None:
        self.context, self.name = context, name
        self.lock = threading.Lock()

    @cached_property
    def known(self) -> dict[str, Rating]:
        """The ratings in the log and those that were added; the run's lock keeps other writers out."""
        return {key: _from_log(row) for key, row in self.context.run.read_judgements(self.name).items()}

    def keep(self, ratings: Mapping[str, Rating]) -> None:
        """Add ratings to the log, except those that failed."""
        rows = [_to_log(key, rating) for key, rating in ratings.items() if not _has_failed(rating)]
        with self.lock:
            self.known.update(ratings)
            if rows:
                self.context.run.add_judgements(self.name, rows)

    @contextmanager
    def progress(self, n_all: int, n_left: int) -> Iterator[ProgressReporter]:
        """Report the progress of rating."""
        trait, progress = self.context.trait.name, self.context.progress
        progress.begin(f"{trait}: judging", n_all, n_all - n_left)
        if n_left < n_all:
            progress.note(f"{trait}: {n_all - n_left} ratings known from the log")
        try:
            yield progress
        finally:
            progress.end()


def _cut_note(text: str) -> str:
    return f", first {MAX_CHARACTERS:,} characters" if len(text) > MAX_CHARACTERS else ""


class _OwnModelScorer(_LoggedScorer):
    """A judge that reads the responses with the run's own model."""

    def __call__(self, responses: Sequence[JudgedResponse]) -> list[Judgement]:
        """Judge the responses; those without tokens have no score."""
        by_key = {self._key(response): response for response in responses if response.text.strip()}
        pending = {key: response for key, response in by_key.items() if key not in self.known}
        if pending:
            self._rate(by_key, pending)
        return [self._judgement(response) for response in responses]

    def _rate(self, by_key: Mapping[str, JudgedResponse], pending: Mapping[str, JudgedResponse]) -> None:
        keys, fresh = list(pending), dict[str, Rating]()
        load_model(self.context.session, self.context.progress)
        with self.progress(len(by_key), len(pending)) as progress:
            for i, score in own_model_scores(self.context, self.name, list(pending.values())):
                fresh[keys[i]] = Rating(score, how=self.name)
                progress.advance(1, 0)
                if len(fresh) == LOG_EVERY:
                    self.keep(fresh)
                    fresh = {}
            self.keep(fresh)

    def _key(self, response: JudgedResponse) -> str:
        spec, trait = self.context.plan.spec, self.context.trait
        return digest([self.name, spec.name, spec.dtype, trait_fingerprint(trait), *response])

    def _judgement(self, response: JudgedResponse) -> Judgement:
        rating = self.known.get(self._key(response))
        if rating is None:
            return Judgement(None, reason=EMPTY)
        return Judgement(rating.score, how=rating.how + _cut_note(response.text))


def own_model_scores(
    context: TraitContext, name: str, responses: Sequence[JudgedResponse]
) -> Iterator[tuple[int, float]]:
    """Yield (index, score) of responses by a judge that reads with the run's own model."""
    judge, session, trait = JUDGES[name], context.session, context.trait
    assert isinstance(judge, OwnModelJudge)
    lengths = [len(prompt.token_ids) for prompt in session.prompts(context.plan.shards(trait)[0])]
    batch_size = session.slots(context.plan.experiment, lengths)
    return judge.score(session.lm, session.prompts, trait, responses, batch_size)


class _RubricScorer(_LoggedScorer):
    """A model judge, which rates by rubrics."""

    def __init__(self, context: TraitContext, name: str) -> None:
        super().__init__(context, name)
        self.model = judge_model(context.plan.experiment, context.plan.root)
        self.rubrics = rubrics_of(context.trait)

    def __call__(self, responses: Sequence[JudgedResponse]) -> list[Judgement]:
        """Judge the responses, each by the trait's rubric and by that of coherence.

        A rating that failed is not tried again by this process; the next one asks for it.
        """
        by_key = {
            self._key(rubric, each): (rubric, each)
            for each in responses
            for rubric in self.rubrics
            if each.text.strip()
        }
        texts = {
            key: fill(rubric, each.question, each.text)
            for key, (rubric, each) in by_key.items()
            if key not in self.known
        }
        if texts:
            plan, trait = self.context.plan, self.context.trait
            with self.progress(len(by_key), len(texts)) as progress:
                rating = RatingContext(plan.experiment, plan.root, plan.spec.device, trait.name, progress)
                model_judge(self.name).rate(rating, texts, self.keep)
        return [self._judgement(response) for response in responses]

    def _key(self, rubric: str, response: JudgedResponse) -> str:
        return digest([self.name, self.model, rubric, response.question, response.text])

    def _judgement(self, response: JudgedResponse) -> Judgement:
        if not response.text.strip():
            return Judgement(None, reason=EMPTY)
        of_trait, of_coherence = (self.known[self._key(rubric, response)] for rubric in self.rubrics)
        reason = of_trait.reason or of_coherence.reason
        how = of_trait.how + _cut_note(response.text)
        return Judgement(of_trait.score, of_coherence.score, of_trait.raw, reason, how)


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
    failed = not isinstance(JUDGES[name], RuleJudge) and _judge_all(judge, run, count)
    sides = {polarity: _scored_rows(judge, name, run, count, polarity) for polarity in POLARITIES}
    run.write_responses(sides, [*made_from, FAILED] if failed else made_from)


def _judge_all(judge: Scorer, run: TraitRun, count: int) -> bool:
    """Judge every response at once, so that the log knows them all; return True if some failed."""
    rows = (row for i in range(count) for row in run.read_responses_shard(i))
    judgements = judge(list(map(_judged, rows)))
    return any((judgement.reason or "").startswith(FAILED) for judgement in judgements)


def _judged(row: Row) -> JudgedResponse:
    return JudgedResponse(row["question"], row["response"], row["instruction_id"])


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
        judgements = judge(list(map(_judged, rows)))
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
    """Return the kept responses.

    Raises TraitError if the judge could score fewer than half, gave all the same score, or keeps none of a side.
    """
    kept = kept_responses(context.plan, context.trait, context.run)
    if kept.problem:
        raise TraitError(f"trait {context.trait.name}: {kept.problem}; {kept.remedy}; the responses are kept on disk")
    return kept
