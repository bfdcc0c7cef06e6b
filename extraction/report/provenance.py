"""The values of a report's last section: commands, settings, versions, hashes, and the responses that were left out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from extraction.config.settings import EXPERIMENT_SETTINGS, MODEL_SETTINGS
from extraction.report.page_data import ReportData, run_options

# options of `traitline extract` that decide the result or what counts of it, by their place in the config
NOT_REPEATED = ("traits", "batch_size", "judge_url", "judge_concurrency", "judge_price")
OPTIONS = {"--model": "model.source"} | {
    setting.flag: setting.path
    for setting in (MODEL_SETTINGS["dtype"], MODEL_SETTINGS["quantize"], *EXPERIMENT_SETTINGS.values())
    if setting.option.on_command_line and setting.name not in (*NOT_REPEATED, "model")
}
LABELS = {  # of the counts that are known; others go by their own names
    **{
        name: EXPERIMENT_SETTINGS[name].help.rstrip(".")
        for name in ("judge", "judge_model", "threshold", "coherence_threshold")
    },
    "total": "Responses in all",
    "kept_pos": "Counted, positive side",
    "kept_neg": "Counted, negative side",
    "dropped_empty": "Left out: the model ended at once",
    "dropped_unscored": "Left out: the judge could not score it",
    "dropped_refused": "Left out: the judge refused",
    "dropped_failed": "Left out: the judge could not be asked",
    "dropped_incoherent": "Left out: not coherent",
    "dropped_wrong_side": "Left out: the answer shows the other side of the trait",
}
PARTS = {
    "fit": "directions are fitted",
    "validation": "layer and method are chosen",
    "test": "figures are computed",
}


def provenance_values(data: ReportData) -> dict[str, Any]:
    """Return what the section on reproduction shows: commands, counts, split, settings, versions and hashes."""
    split = data.card["split"]
    return {
        "commands": list(commands(data)),
        "counts": list(response_counts(data.card["judge"])),
        "parts": [split_row(name, split[name]) for name in PARTS],
        "instruction_folds": split.get("instruction_folds") or 0,
        "settings": flatten(data.config),
        "versions": flatten(data.made_with),
        "hashes": data.hashes,
    }


def commands(data: ReportData) -> Iterator[str]:
    """Yield the commands that reproduce the run, with every setting that decides its bytes."""
    run = run_options(data)
    values = {option: value_at(data.config, path) for option, path in OPTIONS.items()}
    options = [
        f"{option} {shlex.quote(option_text(value))}"
        for option, value in values.items()
        if value is not None and value != []
    ]
    raw = ["--raw"] if value_at(data.config, "model.raw") else []
    yield " \\\n    ".join([f"traitline extract {run}", *options, *raw])
    yield f"traitline report {run}"


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; None where there is none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def option_text(value: Any) -> str:
    """Return a setting as it is typed on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested settings as (dotted name, text)."""
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            leaves += flatten(value, name)
        elif not isinstance(value, list | Mapping):
            leaves.append((name, "not set" if value is None else option_text(value)))
        else:
            leaves.append((name, option_text(list(value)) or "none"))
    return leaves


def response_counts(judge: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield label and value of every count and setting of the judging, known ones first."""
    known = {key: judge[key] for key in LABELS if key in judge}
    for key, value in {**known, **judge}.items():
        if not isinstance(value, Mapping | list):
            yield LABELS.get(key, key.replace("_", " ")), "not set" if value is None else option_text(value)


def split_row(name: str, part: Mapping[str, int]) -> tuple[str, ...]:
    """Return one part of the split with its counts, as a row of the table."""
    return f"{name}: {PARTS[name]}", *(f"{part[key]:,}" for key in ("questions", "positive", "negative"))
