"""The responses of a run as data for the page's script, and the choices of its filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from extraction.core.records import POLARITIES, Trait
from extraction.report.page_data import ReportData, Row
from extraction.report.rendering import data_block, visible

SIDES = dict(zip(POLARITIES, ("positive", "negative"), strict=True))
PER_PAGE = 50
MAX_ROWS = 5000  # in the page; about 4 MB


def browser_values(data: ReportData) -> dict[str, Any]:
    """Return what the section of responses shows: counts, the filters' choices, and the rows for the script."""
    return {
        "n_shown": len(shown_rows(data)),
        "n_all": len(data.rows),
        "n_kept": len(data.kept),
        "judge": data.judge,
        "files": [data.files[polarity] for polarity in POLARITIES],
        "filters": filter_choices(data),
        "block": data_block("rows", script_data(data)),
    }


def shown_rows(data: ReportData) -> Sequence[Row]:
    """Return the rows that the page holds: all, or evenly spaced rows of a large run."""
    return data.rows[:: -(-len(data.rows) // MAX_ROWS) or 1]


def filter_choices(data: ReportData) -> list[dict[str, Any]]:
    """Return the select elements of the form: id, label, and the label of every value."""
    questions = {str(i): shorten(question) for i, question in enumerate(number_texts(data, "question"))}
    choices: dict[str, tuple[str, Mapping[str, str]]] = {
        "side": ("Side", {"": "both", "pos": "positive", "neg": "negative"}),
        "kept": ("Counts", {"": "all", "yes": "counted", "no": "left out"}),
        "question": ("Question", {"": "all", **questions}),
        "sort": ("Order", {"": "as generated", "low": "lowest score first", "high": "highest score first"}),
    }
    return [{"id": id, "label": label, "values": values} for id, (label, values) in choices.items()]


def shorten(text: str, length: int = 90) -> str:
    """Return a text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def number_texts(data: ReportData, key: str) -> dict[str, int]:
    """Number the distinct texts of a field in order of appearance."""
    numbers: dict[str, int] = {}
    for row in shown_rows(data):
        numbers.setdefault(row[key], len(numbers))
    return numbers


def script_data(data: ReportData) -> dict[str, Any]:
    """Return the script's data: every distinct text once, and a row per response, as in `columns`."""
    questions, prompts, kept = number_texts(data, "question"), number_texts(data, "prompt"), set(data.kept)
    threshold = data.card["judge"]["threshold"]
    return {
        "perPage": PER_PAGE,
        "judge": data.judge,
        "sides": SIDES,
        "questions": [visible(question) for question in questions],
        "prompts": [visible(prompt) for prompt in prompts],
        "columns": [
            "id",
            "side",
            "reason",
            "question",
            "prompt",
            "response",
            "finish",
            "score",
            "scores",
            "instruction",
        ],
        "rows": [
            [
                visible(row["id"]),
                row["polarity"],
                "" if row["id"] in kept else exclusion_reason(row, data.judge, threshold),
                questions[row["question"]],
                prompts[row["prompt"]],
                visible(row["response"]),
                visible(str(row["finish_reason"])),
                row["scores"].get(data.judge),
                {
                    visible(name.removeprefix(f"{data.judge}_")): score
                    for name, score in row["scores"].items()
                    if name != data.judge
                },
                visible(instruction_of(data.trait, row)),
            ]
            for row in shown_rows(data)
        ],
    }


def exclusion_reason(row: Row, judge: str, threshold: float | None) -> str:
    """Return why a response is left out. On the right side of the threshold, it is for want of coherence."""
    score = row["scores"].get(judge)
    if not row["response"].strip():
        return "empty"
    if score is None:
        reason = (row.get("judged") or {}).get("reason")
        return visible(f"no score, {reason}") if reason else "no score"
    is_right = threshold is not None and (score >= threshold) == (row["polarity"] == "pos")
    return "not coherent" if is_right else "wrong side"


def instruction_of(trait: Trait, row: Row) -> str:
    """Return the instruction that a response was generated under; empty for natural prompts."""
    if not 0 <= row["instruction_id"] < len(trait.instructions):
        return ""
    pair = trait.instructions[row["instruction_id"]]
    return pair.positive if row["polarity"] == "pos" else pair.negative
