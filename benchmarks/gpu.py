"""Measure a GPU: responses and all layers' means on a model of Gemma-2-2B's shape, compared with transformers.

200 prompts of 60 tokens, 150 new ones each, greedy. One at a time runs on 8 of them; the rest is extrapolated, since
every example takes equally long. Then the decode step over its floor, and capture on and off. Runs on a processor too,
at a tiny shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.hardware import Limits, limits
from benchmarks.peers import PEERS, Peer, engine, static
from benchmarks.race import Comparison, run_all
from benchmarks.reading_cost import device_name
from benchmarks.roofline import PROMPT_TOKENS, Sizes, decode_seconds
from benchmarks.shapes import random_model
from benchmarks.workload import in_turn, make_even_requests, spread
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Request

STATIC = Peer("transformers, padded batches, static cache, compiled + second pass", static, (64,))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Sizes of the job. `static` adds transformers' compiled step, which takes minutes to compile."""

    n_examples: int = 200
    new_tokens: int = 150
    n_serial: int = 8
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    step_batch: int = 64
    step_tokens: int = 64
    pairs: int = 5
    static: bool = False


PLAN = Plan()


def gpu_job(
    shape: str,
    *,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    say: Say,
    plan: Plan = PLAN,
    probe: Callable[[str, torch.dtype], Limits] = limits,
) -> dict[str, Any]:
    """Compare the peers, measure the step over its floor, and the cost of capture."""
    limit = probe(device, dtype)
    say(f"  {limit.bytes_per_second / 1e9:.0f} GB/s, {limit.flops_per_second / 1e12:.1f} TFLOP/s")
    lm = random_model(shape, dtype=dtype, device=device)
    requests = make_even_requests(plan.n_examples, lm.vocab_size, PROMPT_TOKENS, plan.new_tokens)
    _warm(lm, requests, plan)
    step = _step(lm, limit, plan, repeats)
    say(f"  decode step at batch {step['batch_size']}: {step['over_floor']:.2f} times its floor")
    cost = _capture(lm, plan, say)
    raced = run_all(Comparison(_field(plan), lm, requests, plan.n_serial), repeats=repeats, scouts=1, say=say)
    return {
        "shape": shape,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": lm.n_layers,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": plan.new_tokens,
        "limits": asdict(limit),
        "step": step,
        "capture": cost,
        **raced,
    }


def _field(plan: Plan) -> dict[str, Peer]:
    """Return the peers, with the plan's batch sizes."""
    chosen = {name: replace(PEERS[name], batch_sizes=plan.batch_sizes) for name in ("traitline", "batched")}
    compiled = {"static": replace(STATIC, batch_sizes=(plan.batch_sizes[-1],))} if plan.static else {}
    return {**chosen, **compiled, "serial": PEERS["serial"]}


def _warm(lm: LanguageModel, requests: Sequence[Request], plan: Plan) -> None:
    """Run every batch size once, so that kernels, memory and CUDA graphs are there before anything is timed."""
    for size in {*plan.batch_sizes, plan.step_batch}:
        few = [replace(request, max_new_tokens=min(4, plan.new_tokens)) for request in requests[:size]]
        with suppress(torch.OutOfMemoryError):
            engine(lm, few, size)


def _step(lm: LanguageModel, limit: Limits, plan: Plan, repeats: int) -> dict[str, Any]:
    rows = plan.step_batch
    tries = [decode_seconds(lm, rows, plan.step_tokens) for _ in range(repeats + 1)][1:]  # the first warms
    work = Sizes.of_model(lm).decode_step(rows, PROMPT_TOKENS + plan.step_tokens / 2)
    floor = limit.floor(work.n_bytes, work.flops)
    return {
        "batch_size": rows,
        "seconds": spread(tries),
        "floor_seconds": floor,
        "bound": limit.bound(work.n_bytes, work.flops),
        "over_floor": min(tries) / floor,
    }


def _capture(lm: LanguageModel, plan: Plan, say: Say) -> dict[str, Any]:
    """Measure a step with all layers' means over one without, in turn."""
    ratios = []
    for order in in_turn(["on", "off"], plan.pairs):
        took = {name: decode_seconds(lm, plan.step_batch, plan.step_tokens, captures=name == "on") for name in order}
        ratios.append(took["on"] / took["off"])
    say(f"  a step with capture over one without: {spread(ratios)['median']:.3f}")
    return {"pairs": plan.pairs, "ratio": spread(ratios)}
