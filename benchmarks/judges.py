"""Compare judges with labels that a reader gave: `python -m benchmarks.judges MODEL LABELS.jsonl`.

LABELS.jsonl holds one answer of MODEL a line, as `benchmarks/judge_labels/README.md` describes. Each candidate scores
every answer. Its coverage is the share that has a score; its agreement is the share of answers with a clear label that
it scores on the labelled side (an answer without a score does not agree), and its AUROC is over those with both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.hardware import threads
from extraction.config.experiments import find_root, resolve_model
from extraction.config.traits import load_trait
from extraction.core.errors import ModelError
from extraction.core.records import Example, Prompt, Trait
from extraction.judging.base import JudgedResponse
from extraction.judging.lexical import judge_lexical
from extraction.judging.likelihood import contrasts, score_of
from extraction.judging.local import rate_texts
from extraction.judging.rubric import fill, rubrics_of
from extraction.model.chat_template import encode_example
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load
from extraction.vectors.metrics import auroc

Scores = dict[int, float]  # index of the answer -> 0 to 100
BATCH_SIZE = 16


@dataclass(frozen=True)
class Answer:
    """A labelled answer. `label`: positive, negative or unclear; `told`: the side that the instruction asked for."""

    trait: Trait
    response: JudgedResponse
    told: str
    label: str


def read_answers(path: Path, root: Path) -> list[Answer]:
    """Read the labelled answers; the traits are the general ones of the root."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    traits = {name: load_trait(name, root) for name in {row["trait"] for row in rows}}
    return [_answer(traits[row["trait"]], row) for row in rows]


def _answer(trait: Trait, row: Mapping[str, Any]) -> Answer:
    texts = [getattr(pair, row["polarity"]) for pair in trait.instructions]
    response = JudgedResponse(row["question"], row["answer"], texts.index(row["instruction"]))
    return Answer(trait, response, row["polarity"], row["label"])


def by_likelihood(lm: LanguageModel, raw: bool, answers: Sequence[Answer]) -> Scores:
    """Score with the likelihood judge."""

    def encode(examples: Sequence[Example]) -> list[Prompt]:
        return [encode_example(lm.tokenizer, example, raw=raw) for example in examples]  # type: ignore[arg-type]

    scores: Scores = {}
    for trait in {answer.trait.name: answer.trait for answer in answers}.values():
        index = [i for i, answer in enumerate(answers) if answer.trait.name == trait.name]
        responses = [answers[i].response for i in index]
        found = contrasts(lm, encode, trait, responses, BATCH_SIZE)
        scores |= {index[i]: score_of(contrast) for i, contrast in found}
    return scores


def by_rubric(lm: LanguageModel, answers: Sequence[Answer]) -> Scores:
    """Score with the model itself as a rubric judge (`--judge local --judge-model` the same model)."""
    texts = {
        str(i): fill(rubrics_of(answer.trait)[0], answer.response.question, answer.response.text)
        for i, answer in enumerate(answers)
        if answer.response.text.strip()
    }
    scores: Scores = {}

    def save(ratings: Mapping[str, Any]) -> None:
        scores.update({int(key): rating.score for key, rating in ratings.items() if rating.score is not None})

    with suppress(ModelError):  # none of its first answers was a number: the judge is stopped
        rate_texts(lm, "own", texts, save, batch_size=BATCH_SIZE)
    return scores


def by_markers(answers: Sequence[Answer]) -> Scores:
    """Score with the lexical judge; a trait without markers has no scores."""
    found = {
        i: judge_lexical(answer.response.question, answer.response.text, answer.trait)
        for i, answer in enumerate(answers)
        if answer.trait.markers
    }
    return {i: score for i, score in found.items() if score is not None}


def as_told(answers: Sequence[Answer]) -> Scores:
    """Take every answer to show the side that it was told to show: what `--judge none` does."""
    return {i: 100.0 if answer.told == "positive" else 0.0 for i, answer in enumerate(answers)}


def figures(answers: Sequence[Answer], scores: Scores, seconds: float) -> dict[str, Any]:
    """Return coverage, agreement and AUROC over all traits, and by trait."""
    names = sorted({answer.trait.name for answer in answers})
    parts = {name: [i for i, answer in enumerate(answers) if answer.trait.name == name] for name in names}
    return {
        "seconds": round(seconds, 1),
        **_figures_of(answers, scores, range(len(answers))),
        "traits": {name: _figures_of(answers, scores, index) for name, index in parts.items()},
    }


def _figures_of(answers: Sequence[Answer], scores: Scores, index: Sequence[int]) -> dict[str, Any]:
    clear = [i for i in index if answers[i].label != "unclear"]
    right = [i for i in clear if i in scores and (scores[i] >= 50) == (answers[i].label == "positive")]
    scored = [i for i in clear if i in scores]
    sides = [[scores[i] for i in scored if answers[i].label == side] for side in ("positive", "negative")]
    return {
        "answers": len(index),
        "clear": len(clear),
        "coverage": _ratio(sum(i in scores for i in index), len(index)),
        "agreement": _ratio(len(right), len(clear)),
        "agreement_of_scored": _ratio(len(right), len(scored)),
        "auroc": _auroc(*sides),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def _auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    if not positive or not negative:
        return None
    return round(float(auroc(*(torch.tensor(side)[:, None] for side in (positive, negative)))[0]), 3)


def compare(lm: LanguageModel, raw: bool, answers: Sequence[Answer]) -> dict[str, Any]:
    """Run every candidate; return its figures by name."""
    candidates: dict[str, Callable[[], Scores]] = {
        "likelihood": partial(by_likelihood, lm, raw, answers),
        "own model by rubric": partial(by_rubric, lm, answers),
        "lexical": partial(by_markers, answers),
        "none (as told)": partial(as_told, answers),
    }
    results: dict[str, Any] = {}
    for name, judge in candidates.items():
        start = time.perf_counter()
        scores = judge()
        results[name] = figures(answers, scores, time.perf_counter() - start)
    return results


@click.command()
@click.argument("model")
@click.argument("labels", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--raw", is_flag=True, help="The model has no chat template.")
@click.option("--threads", "n_threads", default=2, show_default=True, help="Threads of the processor.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the figures.")
def main(model: str, labels: Path, raw: bool, n_threads: int, out: Path | None) -> None:
    """Compare judges with the labels of a model's answers."""
    with threads(n_threads):
        root = find_root(None)
        lm = load(resolve_model(model, root, {"dtype": "float32"}))
        answers = read_answers(labels, root)
        results = compare(lm, raw, answers)
    for name, result in results.items():
        click.echo(json.dumps({"judge": name, **{k: v for k, v in result.items() if k != "traits"}}))
    if out is not None:
        out.write_text(json.dumps({"labels": labels.name, "judges": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
