"""How a run was made: commands, config, versions, hashes, and what was left out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from extraction.config.settings import EXPERIMENT_SETTINGS, MODEL_SETTINGS
from extraction.report import formatting
from extraction.report.data import ReportData
from extraction.report.markup import Html, table, tag
from extraction.report.sections import section

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
ROLES = {"fit": "directions are made", "validation": "layer and method are chosen", "test": "figures are read"}


def provenance(facts: ReportData) -> Html:
    """What it takes to make this run again, and to know that it is the same."""
    return section(
        "made",
        "How this was made",
        tag("h3", "Make it again"),
        tag("p", "The same inputs give the same responses; traitline verify checks every file against its hash."),
        tag("pre", tag("code", "\n".join(commands(facts)))),
        tag("h3", "What was left out"),
        table(("What", "Value"), list(_counts(facts.card["judge"])), caption="Responses", class_="figures plain"),
        table(
            ("Part", "Questions", "Positive responses", "Negative responses"),
            [_part(name, facts.card["split"][name]) for name in ROLES],
            caption="The parts that the responses were split into, by question",
            class_="figures plain",
        ),
        _folds(facts.card["split"].get("instruction_folds")),
        tag("h3", "Settings"),
        table(("Setting", "Value"), flat(facts.config), caption="Configuration of the run", class_="figures plain"),
        tag("h3", "Versions and hashes"),
        table(("What", "Value"), flat(facts.made_with), caption="Versions and hardware", class_="figures plain"),
        table(
            ("File or part", "sha256"),
            [[name, tag("code", value)] for name, value in facts.hashes.items()],
            caption="Hashes",
            class_="figures plain hashes",
        ),
    )


def commands(facts: ReportData) -> Iterator[str]:
    """The commands that make this run again, each with every setting that decides its bytes."""
    config = {"queue_size": 1, **facts.config}  # a run that does not know queues has its shards one by one
    name = shlex.quote(facts.trait.name)
    where = f"--experiment {shlex.quote(str(config['name']))} --traits {name}"
    values = {option: value_at(config, path) for option, path in OPTIONS.items()}
    given = [
        f"{option} {shlex.quote(_typed(value))}"
        for option, value in values.items()
        if value is not None and value != []
    ]
    raw = ["--raw"] if value_at(config, "model.raw") else []
    yield " \\\n    ".join([f"traitline extract {where}", *given, *raw])
    yield f"traitline report {where}"


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], above: str = "") -> list[list[str]]:
    """The leaves of nested settings, by dotted name."""
    found = []
    for key, value in values.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            found += flat(value, name)
        elif not isinstance(value, list | Mapping):
            found.append([name, "not set" if value is None else _typed(value)])
        else:
            found.append([name, _typed(list(value)) or "none"])
    return found


def _counts(judge: Mapping[str, Any]) -> Iterator[list[str]]:
    known = {key: judge[key] for key in LABELS if key in judge}
    for key, value in {**known, **judge}.items():
        if not isinstance(value, Mapping | list):
            yield [LABELS.get(key, key.replace("_", " ")), "not set" if value is None else _typed(value)]


def _part(name: str, part: Mapping[str, int]) -> list[str]:
    return [f"{name}: {ROLES[name]}", *(f"{part[key]:,}" for key in ("questions", "positive", "negative"))]


def _folds(count: int | None) -> Html | None:
    if not count:
        return None
    said = "Instructions are held apart too: a test response's instruction is not among those that made its direction"
    return tag("p", f"{said} ({formatting.counted(count, 'fold')}).")
