"""Write the report page of a trait's run, and the index page of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extraction import __version__
from extraction.config.settings import EXECUTION_FIELDS
from extraction.core.errors import StoreError
from extraction.core.records import POLARITIES
from extraction.core.text import show_path
from extraction.pipeline.fit import sources_digest
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.score import kept_responses
from extraction.pipeline.session import TraitContext, TraitResult
from extraction.report.page_data import ReportData
from extraction.storage import experiment_dir
from extraction.storage.atomic import read_receipt
from extraction.storage.experiment_dir import trait_runs
from extraction.storage.run_dir import fingerprint
from extraction.storage.trait_run import TraitRun


def write_report(result: TraitResult) -> Path:
    """Write a trait's report page and its plots; return the page's path. `result` must have a card.

    Raises MissingPackage where matplotlib is not installed.
    """
    from extraction.report.page import report_page
    from extraction.report.plot_style import check_matplotlib
    from extraction.report.plots import pictures

    check_matplotlib()
    run, data = result.context.run, _report_data(result)
    drawn = pictures(data.card, data.steering)
    for name, picture in drawn.items():
        run.write_report(f"report-{name}.png", picture.wide)
    return run.write_report(run.report_path().name, report_page(data, drawn))


def stored_result(context: TraitContext) -> TraitResult:
    """Read what a report shows from the run folder.

    Raises StoreError for a run without a card, or with a card of other responses than those that are kept now.
    """
    run = context.run
    if not run.has_card():
        raise StoreError(
            f"{show_path(run.path)}: no card yet, so there is nothing to report; run `traitline validate` first"
        )
    card, kept = run.read_card(), kept_responses(context.plan, context.trait, run)
    sources = sources_digest(run, kept)
    if card["made_of"]["sources"] != sources:
        raise StoreError(
            f"{show_path(run.card_path)}: made from other responses than those that are kept now; "
            "run `traitline vectors` and `traitline validate` again"
        )
    return TraitResult(context, kept, sources, card=card, steering=_current_steering(run, card))


def write_index(plan: RunPlan) -> Path:
    """Write the index page of a plan's experiment, of every trait that has a card; return its path."""
    from extraction.report.page import IndexEntry, index_page

    root, experiment = plan.root / "experiments", plan.experiment.name
    entries = [
        IndexEntry(
            trait=run.path.name,
            card=card,
            steering=_current_steering(run, card),
            link=_link(run),
        )
        for run in trait_runs(root, experiment)
        if run.has_card()
        for card in [run.read_card()]
    ]
    return experiment_dir.write_index(root, experiment, index_page(experiment, entries))


def _current_steering(run: TraitRun, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the steering sweep of the vectors that the card is about, or None."""
    steering = run.read_steering() if run.has_steering() else None
    return steering if steering and steering["made_of"]["sources"] == card["made_of"]["sources"] else None


def _link(run: TraitRun) -> str | None:
    page = run.report_path()
    return page.relative_to(run.path.parent).as_posix() if page.exists() else None


def _report_data(result: TraitResult) -> ReportData:
    context, run, card, steering, kept = (
        result.context,
        result.context.run,
        result.card,
        result.steering,
        result.kept,
    )
    assert card is not None
    assert kept is not None
    config = run.read_config()
    return ReportData(
        trait=context.trait,
        card=card,
        steering=steering,
        rows=[_without_ids(row) for polarity in POLARITIES for row in run.read_responses(polarity)],
        kept=frozenset(example_id for ids in kept.ids.values() for example_id in ids),
        judge=kept.judge,
        config=_shareable({**config, **_execution_settings(context)}),
        files=_files(run, card["chosen"]["method"], steering["method"] if steering else None),
        hashes=_hashes(run, config, card["chosen"]["method"]),
        made_with=_made_with(run),
    )


def _execution_settings(context: TraitContext) -> dict[str, Any]:
    """Return the settings that may differ between two starts, as they are now: run.json has those of the first."""
    return {name: value for name, value in context.plan.config(context.trait).items() if name in EXECUTION_FIELDS}


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the address of the judge's server and the path of the model: reports are passed on."""
    model = {name: value for name, value in config["model"].items() if name != "path"}
    return {**{name: value for name, value in config.items() if name != "judge_url"}, "model": model}


def _without_ids(row: Mapping[str, Any]) -> dict[str, Any]:
    """Remove a row's token ids, which the page does not show and which take most of its size."""
    return {key: value for key, value in row.items() if not key.endswith("token_ids")}


def _files(run: TraitRun, method: str, steering_method: str | None) -> dict[str, str]:
    paths = {"vectors": run.vectors_path(method), "steering": run.vectors_path(steering_method or method)}
    paths |= {polarity: run.responses_path(polarity) for polarity in POLARITIES}
    return {name: path.relative_to(run.path).as_posix() for name, path in paths.items()}


def _hashes(run: TraitRun, config: Mapping[str, Any], method: str) -> dict[str, str]:
    return {
        "settings that decide the result": fingerprint(config),
        "trait": config["trait"]["sha256"],
        **{f"responses, shard {i}": sha256 for i, sha256 in enumerate(run.shard_checksums("responses"))},
        **{f"activations, shard {i}": sha256 for i, sha256 in enumerate(run.shard_checksums("activations"))},
        run.vectors_path(method).name: str(read_receipt(run.vectors_path(method))["sha256"]),
    }


def _made_with(run: TraitRun) -> dict[str, Any]:
    """Return the software and the device, from the first shard's receipt."""
    meta = run.shard_receipt("activations", 0)["meta"]
    facts = {key: meta[key] for key in ("model", "device", "dtype", "batch_size", "instruction_as") if key in meta}
    return {**facts, **meta.get("versions", {}), "report made by traitline": __version__}
