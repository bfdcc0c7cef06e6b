"""The responses of a run, as data for the page's script, and the controls to look through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from extraction.core.records import POLARITIES, Trait
from extraction.report import formatting
from extraction.report.data import ReportData, Row
from extraction.report.markup import Html, data_block, tag, visible
from extraction.report.sections import section

SIDES = dict(zip(POLARITIES, ("positive", "negative"), strict=True))
PER_PAGE = 50
MOST_ROWS = 5000  # in the page; about 4 MB


def browser(facts: ReportData) -> Html:
    """A search box, filters and a list that the script fills; without a script, where the files are."""
    files = formatting.listed([facts.files[polarity] for polarity in POLARITIES])
    return section(
        "responses",
        "The responses",
        tag(
            "p",
            f"{_share(facts)}, {_scale(facts.judge)}. {len(facts.kept):,} count towards the vector.",
        ),
        tag("noscript", tag("p", f"The list needs JavaScript. The same responses are in {files}.")),
        tag("form", _controls(facts), id="filters", hidden=True, role="search", aria_label="Look through responses"),
        tag("p", id="count", role="status", aria_live="polite"),
        tag("ol", id="list", class_="responses"),
        tag(
            "p",
            tag("button", "Previous", type="button", id="previous"),
            tag("span", id="page"),
            tag("button", "Next", type="button", id="next"),
            class_="pager",
            id="pager",
            hidden=True,
        ),
        data_block("rows", data_of(facts)),
    )


def shown(facts: ReportData) -> Sequence[Row]:
    """The rows that the page holds: all, or every so many-th of a large run."""
    return facts.rows[:: -(-len(facts.rows) // MOST_ROWS) or 1]


def _share(facts: ReportData) -> str:
    n_shown, total = len(shown(facts)), formatting.counted(len(facts.rows), "response")
    return f"All {total}" if n_shown == len(facts.rows) else f"{n_shown:,} of {total}, evenly spread"


def _scale(judge: str) -> str:
    return "without scores" if judge == "none" else "with the judge's score from 0 (negative side) to 100 (positive)"


def _controls(facts: ReportData) -> list[Html]:
    questions = {str(i): _short(q) for i, q in enumerate(_distinct(facts, "question"))}
    return [
        tag("label", "Words", tag("input", type="search", id="q", autocomplete="off", spellcheck="false")),
        _choice("side", "Side", {"": "both", "pos": "positive", "neg": "negative"}),
        _choice("kept", "Counts", {"": "all", "yes": "counted", "no": "left out"}),
        _choice("question", "Question", {"": "all", **questions}),
        _choice("sort", "Order", {"": "as made", "low": "lowest score first", "high": "highest score first"}),
        tag("button", "Show all", type="reset"),
    ]


def _choice(name: str, label: str, values: Mapping[str, str]) -> Html:
    choices = (tag("option", said, value=value) for value, said in values.items())
    return tag("label", label, tag("select", choices, id=name))


def _short(said: str) -> str:
    return said if len(said) <= 90 else f"{said[:89]}\u2026"


def _distinct(facts: ReportData, key: str) -> dict[str, int]:
    """The different texts of a field, numbered in the order in which they come."""
    found: dict[str, int] = {}
    for row in shown(facts):
        found.setdefault(row[key], len(found))
    return found


def data_of(facts: ReportData) -> dict[str, Any]:
    """What the script shows: each text once, and a row of each response, as in `columns`. Control characters shown."""
    questions, prompts, kept = _distinct(facts, "question"), _distinct(facts, "prompt"), set(facts.kept)
    threshold = facts.card["judge"]["threshold"]
    return {
        "perPage": PER_PAGE,
        "judge": facts.judge,
        "sides": SIDES,
        "questions": [visible(question) for question in questions],
        "prompts": [visible(prompt) for prompt in prompts],
        "columns": ["id", "side", "why", "question", "prompt", "response", "finish", "score", "scores", "asked"],
        "rows": [
            [
                visible(row["id"]),
                row["polarity"],
                "" if row["id"] in kept else _reason(row, facts.judge, threshold),
                questions[row["question"]],
                prompts[row["prompt"]],
                visible(row["response"]),
                visible(str(row["finish_reason"])),
                row["scores"].get(facts.judge),
                {_other(name, facts.judge): score for name, score in row["scores"].items() if name != facts.judge},
                visible(_asked(facts.trait, row)),
            ]
            for row in shown(facts)
        ],
    }


def _reason(row: Row, judge: str, threshold: float | None) -> str:
    """Why a response that doesn't count doesn't: on the right side of the threshold, for want of coherence."""
    score = row["scores"].get(judge)
    if not row["response"].strip():
        return "empty"
    if score is None:
        why = (row.get("judged") or {}).get("reason")
        return visible(f"no score, {why}") if why else "no score"
    is_right = threshold is not None and (score >= threshold) == (row["polarity"] == "pos")
    return "not coherent" if is_right else "wrong side"


def _other(name: str, judge: str) -> str:
    """What a judge's other score is called, without the judge's name."""
    return visible(name.removeprefix(f"{judge}_"))


def _asked(trait: Trait, row: Row) -> str:
    """The instruction that a response was made under; empty for natural prompts."""
    if not 0 <= row["instruction_id"] < len(trait.instructions):
        return ""
    pair = trait.instructions[row["instruction_id"]]
    return pair.positive if row["polarity"] == "pos" else pair.negative
