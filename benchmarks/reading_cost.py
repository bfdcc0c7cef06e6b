"""Measure the cost of per-token projections: in the generating pass, and in a second pass as scripts do it.

A script generates an answer, runs prompt and answer again with all hidden states and attention weights, brings those to
the host, and projects there.

Shapes: T tokens, R of the response, L layers, D hidden, K traits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.shapes import random_model
from benchmarks.workload import in_turn, make_requests, n_tokens, spread, timed
from extraction.activations.per_token import TokenProjections
from extraction.engine.generate import generate
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Completion, Request

N_TRAITS = 4
SIDES = {
    "plain": "generation alone, batch of {batch_size}",
    "projections": "with projections at every layer, batch of {batch_size}",
    "attention": "with projections and attention, batch of {batch_size}",
    "alone": "with projections and attention, one prompt at a time",
    "by_hand": "transformers: answer, second pass, projected on the host, one prompt at a time",
}
IN_BATCH = ("plain", "projections", "attention")
PAIRS = (  # what is divided by what
    ("projections", "plain"),
    ("attention", "plain"),
    ("attention", "alone"),
    ("alone", "by_hand"),
    ("attention", "by_hand"),
)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
Readings = dict[str, tuple[tuple[int, ...], dict[str, Tensor]]]  # by id: the answer's tokens, and what was read


def reading_cost(
    shape: str,
    *,
    n_examples: int,
    n_serial: int,
    repeats: int,
    say: Callable[[str], None],
    device: str = "cpu",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Run all ways in turn, `repeats` times, with forced lengths; one at a time on the first `n_serial` prompts."""
    lm = on_device(random_model(shape), device)
    requests = make_requests(n_examples, lm.vocab_size)
    few, unit_LDK = requests[:n_serial], directions(lm)
    layers = tuple(range(lm.n_layers))
    reads = {attention: TokenProjections(layers, unit_LDK, attention) for attention in (False, True)}
    jobs: dict[str, Callable[[], Readings]] = {
        "plain": lambda: by_engine(lm, requests, batch_size, None),
        "projections": lambda: by_engine(lm, requests, batch_size, reads[False]),
        "attention": lambda: by_engine(lm, requests, batch_size, reads[True]),
        "alone": lambda: by_engine(lm, few, 1, reads[True]),
        "by_hand": lambda: by_hand(lm, few, unit_LDK),
    }
    reference = jobs["by_hand"]()
    found = {name: agreement(job(), reference) for name, job in jobs.items() if name != "by_hand"}  # and warm
    rounds = [_round(order, jobs, say) for order in in_turn(list(jobs), repeats)]
    rates = {name: [each[name] for each in rounds] for name in jobs}
    return {
        "shape": shape,
        "device": device_name(device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "parameters": sum(weights.numel() for weights in lm.model.parameters()),
        "layers": lm.n_layers,
        "traits": N_TRAITS,
        "examples": len(requests),
        "serial_examples": len(few),
        "tokens": n_tokens(requests),
        "repeats": repeats,
        "sides": {name: {"title": SIDES[name].format(batch_size=batch_size), **spread(rates[name])} for name in jobs},
        "ratios": [
            {"of": one, "over": other, **spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])}
            for one, other in PAIRS
        ],
        "agreement": found,
    }


def on_device(lm: LanguageModel, device: str) -> LanguageModel:
    """Build the model on its device, in the usual type there."""
    model: Any = lm.model
    return wrap(model.to(device, DTYPES[torch.device(device).type]), stop_ids=())


def device_name(device: str) -> str:
    """Return the name of a device."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "processor"


def directions(lm: LanguageModel) -> Tensor:
    """Draw random unit directions, [L, D, K]."""
    drawn_LDK = torch.randn(lm.n_layers, lm.hidden_size, N_TRAITS, generator=torch.Generator().manual_seed(0))
    unit_LDK: Tensor = drawn_LDK / drawn_LDK.norm(dim=1, keepdim=True)
    return unit_LDK


def by_engine(
    lm: LanguageModel, requests: Sequence[Request], batch_size: int, reads: TokenProjections | None
) -> Readings:
    """Run Traitline with readings in the generating pass."""
    done: Iterator[Completion] = generate(lm, requests, batch_size=batch_size, capture=reads)
    return {completion.id: (completion.token_ids, completion.activations) for completion in done}


def by_hand(lm: LanguageModel, requests: Sequence[Request], unit_LDK: Tensor) -> Readings:
    """Run `model.generate`, then a pass with all hidden states and attention weights; project on the host."""
    return {request.id: _read_by_hand(lm, request, unit_LDK) for request in requests}


@torch.inference_mode()
def _read_by_hand(lm: LanguageModel, request: Request, unit_LDK: Tensor) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    model: Any = lm.model
    ids_1T = torch.tensor([list(request.token_ids)], device=lm.device)
    config: Any = GenerationConfig(do_sample=False, max_new_tokens=request.max_new_tokens, pad_token_id=0)
    ids_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
    with _eager(model):
        out = model(input_ids=ids_1T, output_hidden_states=True, output_attentions=True, use_cache=False)
    hidden_LTD = torch.stack([hidden_1TD[0] for hidden_1TD in out.hidden_states[:-1]]).cpu().float()
    weights_LHTT = torch.stack([weights_1HTT[0] for weights_1HTT in out.attentions]).cpu().float()
    n_prompt = len(request.token_ids)
    return tuple(ids_1T[0, n_prompt:].tolist()), {
        "projections": torch.einsum("ltd,ldk->tlk", hidden_LTD, unit_LDK),
        "attention": weights_LHTT.mean(1)[:, n_prompt:].transpose(0, 1),
    }


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Use attention that returns its weights for the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def agreement(ours: Readings, reference: Readings) -> dict[str, Any]:
    """Count the answers with equal tokens, and measure the deviation of their readings from the reference.

    The reference's hidden states are what goes INTO every layer: the first of our three points.
    """
    equal = [key for key, (tokens, _) in reference.items() if ours[key][0] == tokens]
    deviations = []
    for key in equal:
        kept, theirs = ours[key][1], reference[key][1]
        points = {"projections": kept["projections"][:, :, 0]} if "projections" in kept else {}
        points |= {"attention": kept["attention"]} if "attention" in kept else {}
        deviations += [_deviation(found, theirs[name]) for name, found in points.items()]
    return {"n_equal": len(equal), "n_compared": len(reference), "deviation": max(deviations, default=None)}


def _deviation(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _round(
    order: Sequence[str], jobs: dict[str, Callable[[], Readings]], say: Callable[[str], None]
) -> dict[str, float]:
    rates = {}
    for name in order:
        gc.collect()
        done, seconds = timed(jobs[name])
        rates[name] = sum(len(tokens) for tokens, _ in done.values()) / seconds
        say(f"  {name}: {rates[name]:.0f} tokens/s")
    return rates
