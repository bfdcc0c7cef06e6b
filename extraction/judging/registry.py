"""Judges: how far an answer shows a trait, from 0 (the negative side) to 100 (the positive side).

`lexical` and `none` are functions `(question, answer, trait) -> float | None` that answer at once. `local` and `openai`
read the answer by a rubric; their work is in rooms of their own. None means that a judge could not tell: missing,
never 0.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from extraction.config.experiments import JUDGE_NAMES, Experiment, ModelSpec, resolve_model
from extraction.core.errors import ConfigError, TraitError
from extraction.core.records import Markers, Trait
from extraction.judging.rubric import check_rubric

Judge = Callable[[str, str, Trait], float | None]

THRESHOLD = 50.0
FAILED = "failed"  # the reason of a score that could not be asked for, and will be asked for again
EMPTY = "empty"  # there is nothing to judge
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Rating:
    """What a judge that reads made of one rubric: a score or why there is none, what it said, how that was read."""

    score: float | None
    reason: str | None = None
    raw: str = ""
    how: str = ""
    tokens: tuple[int, int] = (0, 0)  # in and out


@dataclass(frozen=True)
class Judgement:
    """What a judge made of one answer: 0 to 100, or None and the reason. Only a judge that reads rates coherence."""

    score: float | None
    coherence: float | None = None
    raw: str = ""
    reason: str | None = None
    how: str = ""


Pair = tuple[str, str]  # question, answer
Scorer = Callable[[Sequence[Pair]], list[Judgement]]
Keep = Callable[[Mapping[str, Rating]], None]  # to be called, from any thread, as soon as ratings are known


# --- the lexical judge ----------------------------------------------------------------------------------------------


def lexical_score(text: str, markers: Markers) -> float | None:
    """100 * p / (p + n), where p and n count the positive and the negative markers in a text; None when it has none.

    Markers are whole words or phrases, and case does not count. Raises TraitError for a pattern that does not compile.
    """
    positive = sum(_count(pattern, text) for pattern in _compiled(markers.positive))
    negative = sum(_count(pattern, text) for pattern in _compiled(markers.negative))
    total = positive + negative
    return 100.0 * positive / total if total else None


def _count(pattern: re.Pattern[str], text: str) -> int:
    """Matches that hold at least one character."""
    return sum(found.end() > found.start() for found in pattern.finditer(text))


@lru_cache(maxsize=256)
def _compiled(markers: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(_compile(marker) for marker in markers)


def _compile(marker: str) -> re.Pattern[str]:
    """`re:...` as it stands, anything else as a phrase between word boundaries; any space stands for any spaces."""
    if marker.startswith("re:"):
        source = marker[3:]
    else:
        phrase = r"\s+".join(re.escape(word) for word in marker.split())
        source = rf"(?<!\w){phrase}(?!\w)"
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as failure:
        raise TraitError(f"marker {marker!r}: not a valid pattern: {failure}; correct it") from failure


def judge_lexical(question: str, answer: str, trait: Trait) -> float | None:
    """The lexical score of the answer. Raises TraitError where the trait has no markers, or a pattern is invalid."""
    if trait.markers is None:
        raise _no_markers(trait)
    try:
        return lexical_score(answer, trait.markers)
    except TraitError as failure:
        raise TraitError(f"trait {trait.name}: {failure}") from failure


def _no_markers(trait: Trait) -> TraitError:
    return TraitError(
        f"trait {trait.name}: has no markers for the lexical judge; "
        f"add 'markers: {{positive: [...], negative: [...]}}' to configs/traits/{trait.name}.yaml, or give --judge none"
    )


def judge_none(question: str, answer: str, trait: Trait) -> float | None:
    """No judge: every score is missing."""
    return None


# --- choosing -------------------------------------------------------------------------------------------------------

JUDGES: dict[str, Judge] = {"lexical": judge_lexical, "none": judge_none}
READERS = ("local", "openai")


def resolve_judge(name: str, trait: Trait) -> str:
    """The judge that a name means for a trait: `auto` is lexical where the trait has markers, else none.

    Raises ConfigError for an unknown name, TraitError where the trait can't be judged by it.
    """
    if name not in JUDGE_NAMES:
        raise ConfigError(f"judge {name!r}: not known; {_nearest(name)}")
    if name == "auto":
        name = "lexical" if trait.markers else "none"
    if name == "lexical":
        judge_lexical("", "", trait)
    if name in READERS:
        check_rubric(trait)
    return name


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, JUDGE_NAMES, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(JUDGE_NAMES)}"


def check_judge(settings: Experiment, trait: Trait, root: Path) -> None:
    """Refuse what can be known to be wrong before anything is loaded or called. Raises ConfigError, TraitError."""
    name = resolve_judge(settings.judge, trait)
    if name in READERS and settings.judge_model is None:
        example = (
            "a file of configs/models, a folder or a hub id" if name == "local" else "the name that the server has"
        )
        raise ConfigError(f"--judge {name}: no model given; give --judge-model: {example}")
    if name == "local":
        judge_spec(settings, root)


def judge_spec(settings: Experiment, root: Path, device: str = "auto") -> ModelSpec:
    """The model of the local judge. Raises ConfigError where there is none of that name."""
    try:
        return resolve_model(settings.judge_model or "", root, {"device": None if device == "auto" else device})
    except ConfigError as failure:
        raise ConfigError(f"--judge-model: {failure}") from failure


def judge_model(settings: Experiment, root: Path) -> str:
    """The name that the judge's model goes by in logs and cards: of a folder, its last part."""
    return judge_spec(settings, root).name if settings.judge == "local" else settings.judge_model or ""


def judge_access(settings: Experiment) -> tuple[str, str | None]:
    """(key, address or None) of the server. Raises ConfigError without a key, or without the package to call with."""
    if find_spec("openai") is None:
        raise ConfigError("--judge openai: needs the package openai: pip install 'traitline[judge]'")
    key = os.environ.get(KEY, "").strip()
    if not key and settings.judge_url is None:
        raise ConfigError(
            f"--judge openai: {KEY} is not set; set it, or give --judge-url of a server that needs no key"
        )
    return key or "none", settings.judge_url


def keep(polarity: str, score: float | None, threshold: float = THRESHOLD) -> bool | None:
    """Whether a response shows its side: `pos` at or above the threshold, `neg` below it. None for a missing score."""
    if score is None:
        return None
    return score >= threshold if polarity == "pos" else score < threshold
