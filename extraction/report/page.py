"""The report of one trait's run: one HTML file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from extraction.report.data import ReportData
from extraction.report.markup import Html, document, join, tag
from extraction.report.plot_style import Picture
from extraction.report.provenance import provenance
from extraction.report.response_browser import browser
from extraction.report.sections import heading, key_figures, layers, projections, verdict
from extraction.report.steering_section import steering

CONTENTS = {
    "verdict": "Verdict",
    "figures": "Key figures",
    "layers": "Layers",
    "projections": "The two sides",
    "steering": "Steering",
    "responses": "Responses",
    "made": "How it was made",
}


def report_page(facts: ReportData, pictures: Mapping[str, Picture]) -> bytes:
    """The whole page, in the order in which it is read: verdict first, details last."""
    where = f"--experiment {shlex.quote(str(facts.config['name']))} --traits {shlex.quote(facts.trait.name)}"
    body = tag(
        "main",
        heading(facts),
        contents(CONTENTS),
        verdict(facts),
        key_figures(facts),
        layers(facts, pictures),
        projections(facts, pictures),
        steering(facts, pictures, f"traitline validate {where}"),
        browser(facts),
        provenance(facts),
    )
    return document(f"{facts.trait.name}: Traitline report", join([SKIP, body]))


SKIP = tag("a", "Skip to the verdict", href="#verdict", class_="skip")


def contents(parts: Mapping[str, str]) -> Html:
    """Links to the parts of the page."""
    return tag(
        "nav",
        tag("ul", (tag("li", tag("a", title, href=f"#{name}")) for name, title in parts.items())),
        aria_label="Contents",
    )
