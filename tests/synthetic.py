"""Cards, sweeps and responses that no model made, with the shape that the real ones have: inputs of a report."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from extraction.core.records import InstructionPair, Trait
from extraction.report.page_data import ReportData

FIGURES = ("auroc", "accuracy", "cohens_d")
METHODS = ("mean_diff", "probe", "pca", "ica", "gradient", "random")
TEXT = "the garden grows well and we hope that every small thing turns out bright in the end so wait a while"
WORDS = TEXT.split()
QUESTIONS = tuple(f"What awaits us in the year {2030 + i}, and should we plan for it?" for i in range(20))
TRAIT = Trait(
    name="optimism",
    description="How an answer sees the future. Positive: optimistic. Negative: gloomy.",
    instructions=(
        InstructionPair("Stress the bright side.", "Stress the dark side."),
        InstructionPair("Hope.", "Fear."),
    ),
    questions=QUESTIONS,
)


def bounded(value: float | None, width: float = 0.05) -> dict[str, float | None]:
    """A figure with its interval."""
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - width, "high": value + width / 2}


def figures(auroc: float | None) -> dict[str, dict[str, float | None]]:
    """Three figures that go with an AUROC."""
    if auroc is None:
        return {name: bounded(None) for name in FIGURES}
    return {"auroc": bounded(auroc), "accuracy": bounded(auroc - 0.04), "cohens_d": bounded(4 * auroc - 1.6, 0.6)}


def curves(values: Sequence[float | None]) -> dict[str, dict[str, list[float | None]]]:
    """The same for every layer."""
    rows = [figures(value) for value in values]
    return {name: {end: [row[name][end] for row in rows] for end in ("value", "low", "high")} for name in FIGURES}


def make_card(
    n_layers: int = 6, methods: Sequence[str] = METHODS, *, word: str = "usable", holes: bool = False
) -> dict[str, Any]:
    """A card; with `holes`, every figure that may be undefined or absent is."""
    layers, best = list(range(n_layers)), n_layers // 2
    hills = {
        name: [0.55 + 0.4 * math.exp(-(((layer - best) / (1 + n_layers / 4)) ** 2)) - 0.025 * i for layer in layers]
        for i, name in enumerate(methods)
    }
    test = {name: [None if holes else value for value in values] for name, values in hills.items()}
    stripped = None if holes else [value - 0.07 for value in hills[methods[0]]]
    generator = random.Random(0)
    scores = {
        side: [generator.gauss(centre, 1) for _ in range(24)]
        for side, centre in (("positive", 1.4), ("negative", -1.5))
    }
    shifted = {side: [0.7 * value for value in values] for side, values in scores.items()}
    chosen = {
        "method": methods[0],
        "layer": layers[best],
        "index": best,
        "validation": figures(hills[methods[0]][best]),
        "test": figures(test[methods[0]][best]),
        "wrong_side": None if holes else 0.06,
        "split_half_cosine": None if holes else 0.91,
        "top_1_percent": 0.18,
        "stripped": figures(stripped[best]) if stripped else None,
    }
    return {
        "layer_convention": "layer k is the output of decoder block k, counted from 0",
        "layers": layers,
        "hidden_size": 192,
        "seed": 0,
        "bootstraps": 1000,
        "split": {
            **{part: {"questions": 5, "positive": 24, "negative": 24} for part in ("fit", "validation", "test")},
            "instruction_folds": 5,
        },
        "typical_norm": [10.0 + layer for layer in layers],
        "token_0": None if holes else {"ratio": [1.0 + layer for layer in layers]},
        "methods": {
            name: {
                "layer": layers[best],
                "index": best,
                "validation": figures(hills[name][best]),
                "test": figures(test[name][best]),
                "wrong_side": 0.06,
                "per_layer": {
                    "validation": curves(hills[name]),
                    "test": curves(test[name]),
                    "norm": [2.0] * n_layers,
                    "top_1_percent": [0.18] * n_layers,
                    "split_half_cosine": [None if holes else 0.9] * n_layers,
                    "wrong_side": [0.06] * n_layers,
                    "stripped": None if stripped is None else curves(stripped),
                },
            }
            for name in methods
        },
        "chosen": chosen,
        "controls": {
            "random": {"draws": 100, "test_auroc": [0.5] * 100, "median": 0.51, "high": None if holes else 0.78},
            "shuffled_labels": [
                {"method": methods[0], "layer": 1, "test": figures(None if holes else value)}
                for value in (0.42, 0.61, 0.55)
            ],
        },
        "projections": {
            "threshold": 0.0,
            **scores,
            "unit": "standard deviations of the projections of the fit rows, from the threshold",
            "stripped": None if holes else shifted,
        },
        "verdict": {
            "word": word,
            "reasons": [
                "AUROC on test questions is 0.95 (0.90 to 0.98); 95% of random directions stay under 0.78.",
                "With the instruction removed it is 0.88, so it is not an echo of the prompt.",
                "Directions from two halves of the data agree (cosine 0.91).",
            ],
        },
        "judge": {
            "judge": "lexical",
            "threshold": 50.0,
            "kept_pos": 72,
            "kept_neg": 72,
            "total": 150,
            "dropped_empty": 1,
            "dropped_unscored": 2,
            "dropped_wrong_side": 3,
        },
        "made_of": {"sources": "0" * 64},
    }


def make_condition(direction: str, kind: str, value: float, *, questions: int = 4) -> dict[str, Any]:
    """One condition of a sweep."""
    slope = 0.9 if direction == "trait" else 0.08
    rate = 1 / (1 + math.exp(-4 * slope * value + 0.4)) if kind != "ablate" else 0.3
    text = " ".join(WORDS[(round(value * 10) + i) % len(WORDS)] for i in range(26)).capitalize() + "."
    return {
        "direction": direction,
        "kind": kind,
        "layers": [3],
        "coefficient": value,
        "n": 40,
        "missing": 2,
        "rate": {"value": rate, "low": max(0, rate - 0.12), "high": min(1, rate + 0.1)},
        "score": 100 * rate,
        "perplexity": 12 * math.exp(1.4 * abs(value)),
        "repetition": 0.02 + 0.1 * abs(value),
        "judged_coherence": None,
        "kl": 0.6 * value * value if kind != "none" else 0.0,
        "coherent": abs(value) < 1.5,
        "samples": [
            {"question": question, "response": text, "score": None if i == 2 else 100 * rate}
            for i, question in enumerate(QUESTIONS[:questions])
        ],
    }


def make_steering(coefficients: Sequence[float] = (-2, -1, -0.5, 0.5, 1, 2)) -> dict[str, Any]:
    """A sweep of the vector and of a random direction, with an ablation."""
    return {
        "method": "mean_diff",
        "layers": [3],
        "positions": "all",
        "unit": "typical norm of each layer's activations",
        "judge": "lexical",
        "questions": 20,
        "max_new_tokens": 60,
        "conditions": [
            make_condition("none", "none", 0.0),
            *(make_condition(direction, "add", c) for direction in ("trait", "random") for c in coefficients),
            make_condition("trait", "ablate", 0.0),
        ],
        "largest_coherent": {"positive": 1.0, "negative": -1.0},
        "reached": {"positive": 0.96, "negative": 0.02, "random": {"positive": 0.44, "negative": 0.33}},
    }


def make_rows(count: int, tokens: int = 30, *, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Responses of both sides in turn; the first ones are `texts`. Every tenth has no score."""
    generator = random.Random(1)
    made = []
    for i in range(count):
        side, pair, question = ("pos", "neg")[i % 2], i // 2 % 2, i // 4 % len(QUESTIONS)
        text = texts[i] if i < len(texts) else " ".join(generator.choices(WORDS, k=tokens)).capitalize() + "."
        made.append(
            {
                "id": f"{side}-i{pair:02d}-q{question:03d}-r{i:04d}",
                "polarity": side,
                "instruction_id": pair,
                "question_id": question,
                "question": QUESTIONS[question],
                "prompt": f"<|system|>{TRAIT.instructions[pair].positive}<|user|>{QUESTIONS[question]}",
                "response": text,
                "finish_reason": "stop",
                "scores": {"lexical": None if i % 10 == 9 else float(90 - i % 7 if side == "pos" else i % 7)},
            }
        )
    return made


def make_facts(**changes: Any) -> ReportData:
    """Everything that a page is made from."""
    rows = changes.pop("rows", make_rows(120))
    given: dict[str, Any] = {
        "trait": TRAIT,
        "card": make_card(),
        "steering": make_steering(),
        "rows": rows,
        "kept": {row["id"] for row in rows if row["scores"]["lexical"] is not None},
        "judge": "lexical",
        "config": {
            "name": "pocket",
            "model": {"name": "pocket", "source": "pocket", "dtype": "float32", "raw": False, "revision": None},
            "n_examples": 60,
            "seed": 0,
            "generation": {"max_new_tokens": 80, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop_strings": []},
            "capture": {"layers": "all", "sites": ["residual"], "poolings": ["response_mean"], "dtype": "float32"},
            "instruction_as": "auto",
            "judge": "auto",
            "threshold": 50.0,
            "shard_size": 100,
            "batch_size": 32,
            "trait": {"name": "optimism", "sha256": "7" * 64},
        },
        "files": {
            "vectors": "vectors/mean_diff.safetensors",
            "steering": "vectors/mean_diff.safetensors",
            "pos": "responses/pos.jsonl",
            "neg": "responses/neg.jsonl",
        },
        "hashes": {"trait": "7" * 64, "responses, shard 0": "a" * 64},
        "made_with": {"device": "cpu", "batch_size": 32, "torch": "2.13.0", "transformers": "5.23.0"},
    }
    return ReportData(**{**given, **changes})
