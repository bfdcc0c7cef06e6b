"""The report of one trait's run and the index of an experiment, each one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.report import formatting, page_data
from extraction.report.page_data import ReportData
from extraction.report.plot_style import Picture
from extraction.report.provenance import provenance_values
from extraction.report.rendering import render_page
from extraction.report.response_browser import browser_values
from extraction.report.steering_data import steering_values


@dataclass(frozen=True)
class IndexEntry:
    """A trait of an experiment; `link` is the path to its report, or None without one."""

    trait: str
    card: Mapping[str, Any]
    steering: Mapping[str, Any] | None
    link: str | None


def report_page(data: ReportData, pictures: Mapping[str, Picture]) -> bytes:
    """Render a trait's report. `pictures`: as `plots.pictures` returns them."""
    card = data.card
    test = card["split"]["test"]
    return render_page(
        "report.html.j2",
        title=f"{data.trait.name}: Traitline report",
        config=data.config,
        trait=data.trait,
        card=card,
        chosen=card["chosen"],
        files=data.files,
        pictures=pictures,
        contents=page_data.CONTENTS,
        run_options=page_data.run_options(data),
        example=page_data.example_prompts(data.trait),
        verdict=page_data.verdict_values(card["verdict"]),
        steering_vector=page_data.steering_vector(data),
        n_test=test["positive"] + test["negative"],
        key_figures=list(page_data.key_figures(card)),
        further_figures=list(page_data.further_figures(data)),
        words=plot_descriptions(card),
        layer_rows=list(page_data.layer_rows(card)),
        steering=steering_values(data.steering, card["chosen"]["layer"]),
        browser=browser_values(data),
        provenance=provenance_values(data),
    )


def plot_descriptions(card: Mapping[str, Any]) -> dict[str, str]:
    """Describe in words every plot that a card alone gives, by the plot's name."""
    return {
        "layers": formatting.describe_layers(card),
        "distances": formatting.describe_distances(card),
        "methods": formatting.describe_methods(card),
        "projections": formatting.describe_projections(card),
    }


def index_page(experiment: str, entries: Sequence[IndexEntry]) -> bytes:
    """Render the index of an experiment: a row per trait."""
    rows = [index_row(entry) for entry in entries]
    return render_page("report_index.html.j2", title=f"{experiment}: Traitline", experiment=experiment, rows=rows)


def index_row(entry: IndexEntry) -> dict[str, Any]:
    """Return what the index shows of a trait."""
    chosen, word = entry.card["chosen"], entry.card["verdict"]["word"]
    return {
        "trait": entry.trait,
        "link": entry.link,
        "verdict": word,
        "css_class": page_data.verdict_class(word),
        "auroc": formatting.with_interval("auroc", chosen["test"]["auroc"]),
        "reach": "not measured" if entry.steering is None else page_data.reach_text(entry.steering),
        "vector": f"{chosen['method']}, layer {chosen['layer']}",
    }
