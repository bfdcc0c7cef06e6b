"""The report of a trait's run, and the index of an experiment: what is stored, read and put into pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extraction import __version__
from extraction.core.errors import StoreError
from extraction.core.records import POLARITIES, Trait
from extraction.core.text import show_path
from extraction.pipeline.fit import sources_digest
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.score import kept_responses
from extraction.report.page_data import ReportData
from extraction.storage.atomic import read_receipt
from extraction.storage.experiment_dir import trait_runs, write_index
from extraction.storage.run_dir import EXECUTION_FIELDS, fingerprint
from extraction.storage.trait_run import TraitRun


def report(job: RunPlan, trait: Trait) -> Path:
    """Write a trait's report and its plots from what its run has stored; returns the page's path.

    Raises StoreError where the run has no card, or one of other responses than those that count now, and
    MissingPackage where matplotlib is absent.
    """
    from extraction.report.page import report_page
    from extraction.report.plot_style import check_matplotlib
    from extraction.report.plots import pictures

    check_matplotlib()
    folder = job.folder(trait)
    with folder.lock(shared=True):
        facts = _facts_of(job, trait, folder)
        drawn = pictures(facts.card, facts.steering)
        for name, picture in drawn.items():
            folder.write_report(f"report-{name}.png", picture.wide)
        return folder.write_report(folder.report_path().name, report_page(facts, drawn))


def index(job: RunPlan) -> Path:
    """Write the index of a job's experiment: every trait that has a card."""
    from extraction.report.page import IndexEntry, index_page

    root, experiment = job.root / "experiments", job.experiment.name
    entries = [
        IndexEntry(
            trait=folder.path.name,
            card=folder.read_card(),
            steering=folder.read_steering() if folder.has_steering() else None,
            link=_link(folder),
        )
        for folder in trait_runs(root, experiment)
        if folder.has_card() and "verdict" in folder.read_card()  # not one of an earlier version
    ]
    return write_index(root, experiment, index_page(experiment, entries))


def _link(folder: TraitRun) -> str | None:
    page = folder.report_path()
    return page.relative_to(folder.path.parent).as_posix() if page.exists() else None


def _facts_of(job: RunPlan, trait: Trait, folder: TraitRun) -> ReportData:
    if not folder.has_card():
        raise StoreError(
            f"{show_path(folder.path)}: no card yet, so there is nothing to report; run `traitline validate` first"
        )
    card, kept = folder.read_card(), kept_responses(job, trait, folder)
    if card["made_of"]["sources"] != sources_digest(folder, kept):
        raise StoreError(
            f"{show_path(folder.card_path)}: made from other responses than those that count now; "
            "run `traitline vectors` and `traitline validate` again"
        )
    config, steering = folder.read_config(), folder.read_steering() if folder.has_steering() else None
    return ReportData(
        trait=trait,
        card=card,
        steering=steering,
        rows=[_read(row) for polarity in POLARITIES for row in folder.read_responses(polarity)],
        kept=frozenset(example_id for ids in kept.ids.values() for example_id in ids),
        judge=kept.judge,
        config=_shareable({**config, **_execution(job, trait)}),
        files=_files(folder, card["chosen"]["method"], steering["method"] if steering else None),
        hashes=_hashes(folder, config, card["chosen"]["method"]),
        made_with=_made_with(folder),
    )


def _execution(job: RunPlan, trait: Trait) -> dict[str, Any]:
    """What may differ between two starts, as it is now; run.json has it as it was at the first."""
    return {name: value for name, value in job.config(trait).items() if name in EXECUTION_FIELDS}


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the address of anybody's server: a report is passed on."""
    return {name: value for name, value in config.items() if name != "judge_url"}


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its token ids, which nobody reads and which take most of the room."""
    return {key: value for key, value in row.items() if not key.endswith("token_ids")}


def _files(folder: TraitRun, method: str, steers_by: str | None) -> dict[str, str]:
    paths = {"vectors": folder.vectors_path(method), "steering": folder.vectors_path(steers_by or method)}
    paths |= {polarity: folder.responses_path(polarity) for polarity in POLARITIES}
    return {name: path.relative_to(folder.path).as_posix() for name, path in paths.items()}


def _hashes(folder: TraitRun, config: Mapping[str, Any], method: str) -> dict[str, str]:
    return {
        "settings that decide the result": fingerprint(config),
        "trait": config["trait"]["sha256"],
        **{f"responses, shard {i}": sha256 for i, sha256 in enumerate(folder.sources("responses"))},
        **{f"activations, shard {i}": sha256 for i, sha256 in enumerate(folder.sources("activations"))},
        folder.vectors_path(method).name: str(read_receipt(folder.vectors_path(method))["sha256"]),
    }


def _made_with(folder: TraitRun) -> dict[str, Any]:
    """What the first shard's receipt tells of the software and the machine."""
    meta = folder.shard_facts("activations", 0)["meta"]
    told = {key: meta[key] for key in ("model", "device", "dtype", "batch_size", "instruction_as") if key in meta}
    return {**told, **meta.get("versions", {}), "report made by traitline": __version__}
