"""References for two models at once: plain loops over one row, transformers alone, no cache, no padding.

Nothing here knows the engine. Rows are Python lists; V vocabulary, B rows, T tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from extraction.engine.batch import ContinuousBatch
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample, uniforms
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Completion, Request
from tests.tiny import LAYERS, deviation, pooled, reference_hidden, shared_model, tiny_model

MINUS_INFINITY = float("-inf")
GREEDY = Sample()
POOLINGS = ("response_mean", "prompt_mean", "prompt_last", "response_first:2", "response_last", "all")
ALL_LAYERS = tuple(range(LAYERS))

# --- runs of the engine ----------------------------------------------------------------------------------------------


def run(lm: LanguageModel, requests: Sequence[Request], batch_size: int, **options: Any) -> dict[str, Completion]:
    """Run all requests; return their completions by id."""
    done = list(generate(lm, requests, batch_size=batch_size, **options))
    assert sorted(c.id for c in done) == sorted(r.id for r in requests)
    return {c.id: c for c in done}


def tokens_of(completions: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    """Return the tokens by id."""
    return {key: completion.token_ids for key, completion in completions.items()}


def worst(name: str, requests: Sequence[Request], done: dict[str, Completion], dtype: torch.dtype) -> float:
    """Return the largest deviation of any captured residual from the hidden states of prompt + response."""
    return max(
        deviation(kept, pooled(hidden_LTD, len(request.token_ids), key.removeprefix("residual.")))
        for request in requests
        if done[request.id].token_ids
        for hidden_LTD in [reference_hidden(shared_model(name, dtype), request.token_ids + done[request.id].token_ids)]
        for key, kept in done[request.id].activations.items()
    )


# --- choosing a token ------------------------------------------------------------------------------------------------


def plain_amplified(after: Sequence[float], before: Sequence[float], alpha: float, plausibility: float) -> list[float]:
    """Compute after + alpha (after - before) token by token; with plausibility, Li et al. 2022, equation 2."""
    best = max(after)
    shares = [math.exp(a - best) for a in after]  # p(token) / max p
    return [
        MINUS_INFINITY if a == MINUS_INFINITY or share < plausibility else a + alpha * (a - b) if a != b else a
        for a, b, share in zip(after, before, shares, strict=True)
    ]


def warped(scores_V: Tensor, sample: Sample) -> Tensor:
    """Apply temperature, top-k and top-p by transformers' warpers; greedy: probability 1 at the maximum."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sample.temperature == 0:
        return torch.full_like(scores_V, MINUS_INFINITY).index_fill(0, scores_V.argmax(), 0.0)
    warpers: list[Any] = [TemperatureLogitsWarper(sample.temperature)]
    warpers += [TopKLogitsWarper(sample.top_k)] if sample.top_k else []
    warpers += [TopPLogitsWarper(sample.top_p)] if sample.top_p < 1 else []
    scores_1V = scores_V.unsqueeze(0)
    for warper in warpers:
        scores_1V = warper(torch.zeros(1, 1, dtype=torch.long), scores_1V)
    return scores_1V[0]


def plain_draw(weights: Sequence[float], uniform: float) -> int:
    """Return the first token whose cumulative weight exceeds the uniform's share of the total."""
    sums = list(itertools.accumulate(weights))
    return next(token for token, reached in enumerate(sums) if reached > uniform * sums[-1])


def plain_settle(
    target: Sequence[Sequence[float]],
    tokens: Sequence[int],
    drafted: Sequence[Sequence[float]] | None,
    accept: Sequence[float],
    draws: Sequence[float],
) -> list[int]:
    """Return one row's new tokens: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1. `tokens`: proposals."""
    accepted: list[int] = []
    for k, token in enumerate(tokens):
        certain = [float(other == token) for other in range(len(target[k]))]
        q = certain if drafted is None else drafted[k]
        if accept[k] * q[token] < target[k][token]:
            accepted.append(token)
            continue
        residual = [max(0.0, p - chance) for p, chance in zip(target[k], q, strict=True)]
        return [*accepted, plain_draw(residual if sum(residual) > 0 else target[k], draws[k])]
    return [*accepted, plain_draw(target[len(tokens)], draws[len(tokens)])]


# --- whole responses -------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the next token's logits [V] in float64."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()


def amplified_response(
    after: PreTrainedModel,
    before: PreTrainedModel,
    request: Request,
    alpha: float,
    sample: Sample = GREEDY,
    plausibility: float = 0.0,
) -> tuple[int, ...]:
    """Generate with two models by hand: one prompt, without a cache, up to `max_new_tokens`."""
    response: list[int] = []
    for uniform in uniforms(request.draws or request.id, request.seed, request.max_new_tokens):
        rows = [last_logits(model, [*request.token_ids, *response]).tolist() for model in (after, before)]
        scores_V = torch.tensor(plain_amplified(*rows, alpha, plausibility), dtype=torch.float64)
        response.append(plain_draw(warped(scores_V, sample).softmax(-1).tolist(), float(uniform)))
    return tuple(response)


def fed_at_random(
    batch: ContinuousBatch, waiting: list[Request], rng: random.Random
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Run a batch to which requests are added and from which they are dropped at random times.

    Returns the completed responses, which must equal their streamed tokens, and the ids of the dropped requests.
    """
    done: dict[str, tuple[int, ...]] = {}
    fresh: dict[str, tuple[int, ...]] = {}
    dropped: set[str] = set()
    with batch.attached():
        while waiting or batch.has_work:
            n_new = rng.randint(0 if batch.has_work else 1, 3)
            arriving, waiting = waiting[:n_new], waiting[n_new:]
            batch.add(arriving)
            running = [key for key in fresh if key not in done and key not in dropped]
            gone = rng.sample([r.id for r in arriving] + running, 1) if running and rng.random() < 0.1 else []
            for key in gone:
                batch.cancel(key)
                dropped.add(key)
            news = batch.step()
            fresh |= {key: fresh.get(key, ()) + tuple(tokens) for key, tokens in news.new_tokens.items()}
            done |= {c.id: c.token_ids for c in news.completions}
    assert {key: fresh.get(key, ()) for key in done} == done
    return done, dropped


Outcome = tuple[tuple[int, ...], str]


def outcome_chances(lm: LanguageModel, prompt: tuple[int, ...], n: int, sample: Sample) -> dict[Outcome, float]:
    """Return the probability of every response of up to `n` tokens with its finish reason, from the target alone."""
    found: dict[Outcome, float] = {}
    open_rows: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(n):
        longer: dict[tuple[int, ...], float] = {}
        for response, chance in open_rows.items():
            for token, p in enumerate(warped(last_logits(lm.model, prompt + response), sample).softmax(-1).tolist()):
                if token in lm.stop_ids:
                    found[response, "stop"] = found.get((response, "stop"), 0.0) + chance * p
                elif p > 0:
                    longer[*response, token] = chance * p
        open_rows = longer
    return found | {(response, "length"): chance for response, chance in open_rows.items()}


def chi_square_p(counts: Mapping[Outcome, int], chances: Mapping[Outcome, float]) -> float:
    """Return the p-value of the chi-square test over all outcomes, rare ones merged; 0 after an impossible one."""
    from scipy.stats import chisquare

    if any(chances.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    total = sum(counts.values())
    common = [outcome for outcome, chance in chances.items() if chance * total >= 5]
    observed = [counts.get(outcome, 0) for outcome in common]
    wanted = [chances[outcome] * total for outcome in common]
    if total - sum(wanted) >= 5:
        observed, wanted = [*observed, total - sum(observed)], [*wanted, total - sum(wanted)]
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [each * scale for each in wanted]).pvalue)


# --- drafts ----------------------------------------------------------------------------------------------------------


def noisy_model(
    name: str, strength: float = 0.1, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Return the tiny model of that name with noise on its weights, so that many of its tokens are accepted."""
    model = tiny_model(name, dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.data.add_(strength * parameter.data.float().std(correction=0).to(parameter.dtype) * noise)
    return model


@contextmanager
def contradicting(model: PreTrainedModel, where: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Negate the model's logits at the positions that `where` picks."""

    def turn(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(kwargs["input_ids"].shape[1]).unsqueeze(0)
        wrong_BT1 = where(positions[:, -output.logits.shape[1] :]).unsqueeze(-1)
        output.logits = torch.where(wrong_BT1, -output.logits, output.logits)

    handle = model.register_forward_hook(turn, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
