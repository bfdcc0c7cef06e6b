"""Measure how often a pocket model answers in the manner of its instruction, by the lexical judge.

    python -m experiments.pocket_model.evaluate --model extraction/pocket/pocket --out /tmp/rates.json

The saved bfloat16 weights run in float32, sampling at temperature 1. A rate is the share of answers scored positive
(>= 50). An answer without any marker is `missing` and counts as a failure: as not positive under the positive
instruction, as positive under the negative one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.pocket_model.corpus import HELD_OUT_PAIRS, HELD_OUT_QUESTIONS, SIDES, load_grammar
from extraction.core.records import POLARITIES, Trait
from extraction.judging.base import THRESHOLD
from extraction.judging.lexical import judge_lexical

SPLITS = ("seen", "new_instruction", "new_question", "both_new")


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt. `split` names what was held out of training; `first` marks the first of repeated prompts."""

    trait: Trait
    polarity: str
    instruction: str | None
    question: str
    split: str
    first: bool = True


def split_of(pair: int, question: int, trait: Trait) -> str:
    """Return the split of an instruction pair and a question, by their indices."""
    new_pair = pair >= len(trait.instructions) - HELD_OUT_PAIRS
    new_question = question >= len(trait.questions) - HELD_OUT_QUESTIONS
    return SPLITS[new_pair + 2 * new_question]


def instructed(trait: Trait, repeats: dict[str, int]) -> list[EvalPrompt]:
    """Return every instruction x question of both sides, each as often as `repeats` has for its split."""
    asks = []
    for polarity in POLARITIES:
        for i, pair in enumerate(trait.instructions):
            for j, question in enumerate(trait.questions):
                split = split_of(i, j, trait)
                instruction = str(getattr(pair, SIDES[polarity]))
                asks += [
                    EvalPrompt(trait, polarity, instruction, question, split, r == 0) for r in range(repeats[split])
                ]
    return asks


def uninstructed(trait: Trait, repeats: int) -> list[EvalPrompt]:
    """Return every question without an instruction, `repeats` times."""
    return [
        EvalPrompt(trait, "none", None, question, "uninstructed")
        for question in trait.questions
        for _ in range(repeats)
    ]


def messages_of(ask: EvalPrompt, instruction_as: str) -> list[dict[str, str]]:
    """Return the chat messages of one prompt."""
    if ask.instruction is None:
        return [{"role": "user", "content": ask.question}]
    if instruction_as == "user":
        return [{"role": "user", "content": f"{ask.instruction}\n\n{ask.question}"}]
    return [{"role": "system", "content": ask.instruction}, {"role": "user", "content": ask.question}]


def answer_all(
    model: Any,
    tokenizer: Any,
    chats: Sequence[list[dict[str, str]]],
    batch_size: int = 256,
    *,
    temperature: float = 1.0,
) -> list[str]:
    """Sample one answer to each chat, in left-padded batches; temperature 0 decodes greedily."""
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = sampled if temperature else {"do_sample": False}
    answers = []
    for start in range(0, len(chats), batch_size):
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats[start : start + batch_size]
        ]
        tokens = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=120, **how
            )
        answers += tokenizer.batch_decode(ids[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


# --- rates ----------------------------------------------------------------------------------------------------------


def rate(polarity: str, scores: Iterable[float | None]) -> dict[str, float | int]:
    """Return the share scored positive, missing ones counted as failures; polarity `none` leaves them out."""
    scores = list(scores)
    marked = [score for score in scores if score is not None]
    missing = len(scores) - len(marked)
    positive = sum(score >= THRESHOLD for score in marked)
    if polarity == "none":
        share = positive / max(1, len(marked))
    else:
        share = (positive + (missing if polarity == "neg" else 0)) / len(scores)
    return {"positive": round(share, 4), "n": len(scores), "missing": missing}


def tabulate(asks: Sequence[EvalPrompt], scores: Sequence[float | None]) -> dict[str, Any]:
    """Return the rates by trait: 100 examples a side, each split, and uninstructed."""
    table: dict[str, Any] = {}
    for trait in dict.fromkeys(ask.trait.name for ask in asks):
        own = [(ask, score) for ask, score in zip(asks, scores, strict=True) if ask.trait.name == trait]
        row = {"uninstructed": rate("none", (score for ask, score in own if ask.split == "uninstructed"))}
        for polarity in POLARITIES:
            sided = [(ask, score) for ask, score in own if ask.polarity == polarity]
            row[f"all_{polarity}"] = rate(polarity, (score for ask, score in sided if ask.first))
            for split in SPLITS:
                row[f"{split}_{polarity}"] = rate(polarity, (score for ask, score in sided if ask.split == split))
        table[trait] = row
    return table


def measure(folder: Path, *, seed: int, instruction_as: str, scale: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Return all rates of a model, and the answers behind them."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    repeats = {"seen": 1, "new_instruction": 3 * scale, "new_question": 2 * scale, "both_new": 8 * scale}
    traits = load_grammar().traits.values()
    asks = [ask for trait in traits for ask in (*instructed(trait, repeats), *uninstructed(trait, 5 * scale))]
    asks.sort(key=lambda ask: len(ask.instruction or "") + len(ask.question))
    answers = answer_all(model, tokenizer, [messages_of(ask, instruction_as) for ask in asks])
    scores = [judge_lexical(ask.question, text, ask.trait) for ask, text in zip(asks, answers, strict=True)]
    shown = [f"{a.trait.name} {a.polarity} {s}\t{a.instruction}\t{a.question}\t{t}"
             for a, s, t in zip(asks, scores, answers, strict=True)]  # fmt: skip
    return dict(sorted(tabulate(asks, scores).items())), shown


def render(table: dict[str, Any]) -> str:
    """Render the table as Markdown: per cent scored positive, positive instruction / negative instruction."""
    lines = ["| trait | 100 a side | seen | new instruction | new question | both new | uninstructed | missing |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for trait, row in table.items():
        cells = [f"{_percent(row[f'{split}_pos'])} / {_percent(row[f'{split}_neg'])}" for split in ("all", *SPLITS)]
        sides = [row[f"{split}_{polarity}"] for split in SPLITS for polarity in POLARITIES]
        missing = f"{sum(side['missing'] for side in sides)} of {sum(side['n'] for side in sides)}"
        free = (
            f"{_percent(row['uninstructed'])} ({row['uninstructed']['missing']} of {row['uninstructed']['n']} missing)"
        )
        lines.append(f"| {trait} | {' | '.join(cells)} | {free} | {missing} |")
    return "\n".join(lines)


def _percent(cell: dict[str, Any]) -> str:
    return f"{100 * cell['positive']:.0f}"


def main() -> None:
    """Measure, print the table, write the rates and, if asked, the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="rates as JSON")
    parser.add_argument("--answers", type=Path, help="every answer, one a line")
    parser.add_argument("--instruction-as", choices=("system", "user"), default="system")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1, help="more repeats of the held-out splits")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table, answers = measure(
        options.model, seed=options.seed, instruction_as=options.instruction_as, scale=options.scale
    )
    print(render(table))
    if options.out:
        how = {"instruction_as": options.instruction_as, "seed": options.seed, "temperature": 1.0}
        options.out.write_text(json.dumps({"how": how, "traits": table}, indent=1) + "\n", encoding="utf-8")
    if options.answers:
        options.answers.write_text("\n".join(answers) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
