"""The three kinds of judges, and the values that they return.

A rule judge scores a response at once. A likelihood judge scores it by the run's own model. A model judge is a language
model of its own: it rates every response by two rubrics (the trait's and coherence), and its ratings go to a log in the
run's folder, so that none is requested twice.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from extraction.config.experiments import Experiment
from extraction.config.patterns import MAX_TEXT
from extraction.core.errors import ModelError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Prompt, Trait
from extraction.core.text import show

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

THRESHOLD = 50.0
MAX_CHARACTERS = MAX_TEXT  # of a response that is judged
FAILED = "failed"  # how the reason of a score begins that the next run requests again
N_FIRST = 10  # answers without any score, after which a judge is stopped
EMPTY = "empty"  # the reason of a missing score: the response has no text


@dataclass(frozen=True)
class Rating:
    """A model judge's answer to one rubric. `score` is 0 to 100, or None with the `reason`; `raw` is what it wrote.

    `how` names the way in which the answer was read; `tokens` are (prompt, completion).
    """

    score: float | None
    reason: str | None = None
    raw: str = ""
    how: str = ""
    tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Judgement:
    """A judge's verdict on one response: 0 to 100, or None with the reason. Only model judges rate coherence."""

    score: float | None
    coherence: float | None = None
    raw: str = ""
    reason: str | None = None
    how: str = ""


class JudgedResponse(NamedTuple):
    """A response to judge. `instruction_id`: the trait's pair that the response was made with; None without one."""

    question: str
    text: str
    instruction_id: int | None = None


Scorer = Callable[[Sequence[JudgedResponse]], list[Judgement]]
SaveRatings = Callable[[Mapping[str, Rating]], None]  # by key; may be called from any thread


@dataclass(frozen=True)
class RatingContext:
    """The run in which a model judge rates: its settings, the device of its own model, and where progress goes."""

    settings: Experiment
    root: Path
    device: str
    trait_name: str
    reporter: ProgressReporter


@dataclass(frozen=True)
class RuleJudge:
    """A judge that needs no model.

    `score(question, response, trait)` returns 0 to 100, or None for a missing score. `check` raises TraitError for a
    trait that it can't judge.
    """

    score: Callable[[str, str, Trait], float | None]
    check: Callable[[Trait], None] = lambda trait: None


@dataclass(frozen=True)
class OwnModelJudge:
    """A judge that reads responses with the run's own model.

    `score(lm, encode, trait, responses, batch_size)` yields (index of the response, score from 0 to 100); `encode`
    turns examples into the model's prompts. `check` raises TraitError for a trait that it can't judge.
    """

    score: Callable[
        [LanguageModel, Callable[[Sequence[Example]], list[Prompt]], Trait, Sequence[JudgedResponse], int],
        Iterator[tuple[int, float]],
    ]
    check: Callable[[Trait], None] = lambda trait: None


def _settings_model(settings: Experiment, root: Path) -> str:
    return settings.judge_model or ""


def _accept(settings: Experiment, root: Path) -> None:
    pass


@dataclass(frozen=True)
class ModelJudge:
    """A judge that is a language model; it needs the setting `judge_model`, and `model_help` says what that holds.

    `rate(context, texts, save)` rates filled rubrics by key, saves every rating as soon as it is known and reports its
    progress. `model_name` is the name in logs and cards. The checks raise ConfigError or ModelError: `check_settings`
    when the run is planned, `check_access` before responses are made for it, `check_model` before the run's own model
    is loaded.
    """

    model_help: str
    rate: Callable[[RatingContext, Mapping[str, str], SaveRatings], None]
    model_name: Callable[[Experiment, Path], str] = _settings_model
    check_settings: Callable[[Experiment, Path], object] = _accept
    check_access: Callable[[Experiment, Path], object] = _accept
    check_model: Callable[[Experiment, Path], object] = _accept


def judged_part(response: str) -> str:
    """Return the part of a response that judges read: its first MAX_CHARACTERS characters."""
    return response[:MAX_CHARACTERS]


def shows_side(polarity: str, score: float | None, threshold: float = THRESHOLD) -> bool | None:
    """Return True if a score is on its own side: `pos` at or above the threshold, `neg` below it. None stays None."""
    if score is None:
        return None
    return score >= threshold if polarity == "pos" else score < threshold


class FirstAnswers:
    """Save ratings, the first ones only once one of them has a score; stop a judge that gives none.

    So a judge whose answers can't be read costs N_FIRST answers and leaves nothing in the log. May be called from any
    thread. `place` starts the error.
    """

    def __init__(self, save: SaveRatings, place: str) -> None:
        self.save, self.place = save, place
        self._held: dict[str, Rating] = {}
        self._has_score = False
        self._lock = threading.Lock()

    def __call__(self, ratings: Mapping[str, Rating]) -> None:
        """Save ratings that the judge gave, or hold them. Raises ModelError after N_FIRST without any score."""
        with self._lock:
            self._held |= ratings
            self._has_score = self._has_score or any(rating.score is not None for rating in ratings.values())
            if not self._has_score:
                if len(self._held) >= N_FIRST:
                    raise ModelError(self._problem())
                return
            ready, self._held = self._held, {}
        self.save(ready)

    def end(self) -> None:
        """Save what is held, when all texts are rated."""
        held, self._held = self._held, {}
        if held:
            self.save(held)

    def _problem(self) -> str:
        counts = Counter(str(rating.reason) for rating in self._held.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raw = next((rating.raw for rating in self._held.values() if rating.raw.strip()), "")
        return (
            f"{self.place}: none of its first {len(self._held)} answers gave a score ({reasons}"
            + (f"; one was {show(raw)}" if raw else "")
            + "); give another --judge-model, or --judge lexical or none"
        )
