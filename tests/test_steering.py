"""Steering in the engine, against `model.generate` alone with a hook of the test's own, over every architecture.

Shapes: L layers, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from extraction.core.errors import ConfigError
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.engine.steering import Steering, steer_hidden
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import FAMILIES, LAYERS, blocks, deviation, prompts, reference_greedy, shared_model, taps

pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
EVERY = pytest.mark.parametrize("name", FAMILIES)
SOME = pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral"])
BUDGETS = (9, 3, 12, 5, 12, 1, 7)
ALL_LAYERS = tuple(range(LAYERS))


def vector(model: PreTrainedModel, seed: int, size: float = 1.0) -> Tensor:
    """A direction of about the size of the model's own activations."""
    width = model.config.get_text_config().hidden_size
    draw = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return size * draw / draw.norm() * typical_norm(model)


def typical_norm(model: PreTrainedModel) -> float:
    """The mean norm of a block's output."""
    with taps([blocks(model)[0]]) as seen, torch.no_grad():
        model(input_ids=torch.tensor([prompts(1)[0]]), use_cache=False)
    return float(seen[0].norm(dim=-1).mean())


def steerings(model: PreTrainedModel) -> list[Steering | None]:
    """One for each request: pushes of several sizes and layers, an ablation, both, the response alone, nothing."""
    unit = vector(model, 7) / vector(model, 7).norm()
    return [
        Steering(add={1: vector(model, 1)}),
        None,
        Steering(add={1: vector(model, 2, -2.0)}),
        Steering(ablate=dict.fromkeys(ALL_LAYERS, unit)),
        Steering(add={0: vector(model, 3), 1: vector(model, 4)}, positions="response"),
        Steering(add={0: vector(model, 5)}),
        Steering(add={1: vector(model, 6)}, ablate={0: unit}, positions="response"),
    ]


def requests_of(model: PreTrainedModel) -> list[Request]:
    rows = zip(prompts(len(BUDGETS)), BUDGETS, steerings(model), strict=True)
    return [Request(f"s{i}", ids, n, steering=steering) for i, (ids, n, steering) in enumerate(rows)]


@contextmanager
def plainly_steered(model: PreTrainedModel, steering: Steering | None, n_prompt: int) -> Iterator[None]:
    """One sequence's steering by hooks of the test's own, one block at a time."""
    handles = []
    for layer, block in enumerate(blocks(model)):

        def hook(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            assert steering is not None
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            rows = hidden.view(-1, hidden.shape[-1])
            first = n_prompt - 1 if len(rows) >= n_prompt and steering.positions == "response" else 0
            if layer in steering.ablate:
                unit = steering.ablate[layer]
                rows[first:] -= torch.outer(rows[first:] @ unit, unit)
            if layer in steering.add:
                rows[first:] += steering.add[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        if steering is not None:
            handles.append(block.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wanted(model: PreTrainedModel, request: Request) -> tuple[int, ...]:
    with plainly_steered(model, request.steering, len(request.token_ids)):
        return reference_greedy(model, request.token_ids, request.max_new_tokens)


def run(model: PreTrainedModel, requests: Sequence[Request], batch_size: int, **options: Any) -> dict[str, Completion]:
    lm = wrap(model, stop_ids=())
    return {c.id: c for c in generate(lm, requests, batch_size=batch_size, **options)}


def said(done: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    return {key: completion.token_ids for key, completion in done.items()}


@EVERY
def test_steered_rows_equal_model_generate_steered_alone_in_any_batch(name: str) -> None:
    model = shared_model(name)
    requests = requests_of(model)
    expected = {request.id: wanted(model, request) for request in requests}
    for batch_size in (1, 3, 7):
        assert said(run(model, requests, batch_size)) == expected, batch_size
    assert said(run(model, requests[::-1], 2)) == expected


@SOME
def test_steering_changes_the_response(name: str) -> None:
    """The control of the test above: without steering, or with a neighbour's, most answers are others."""
    model = shared_model(name)
    requests = [replace(request, max_new_tokens=12) for request in requests_of(model)]
    steered = said(run(model, requests, 3))
    plain = said(run(model, [replace(request, steering=None) for request in requests], 3))
    swapped = [replace(r, steering=requests[i - 1].steering) for i, r in enumerate(requests)]
    assert plain["s1"] == steered["s1"]
    assert sum(plain[key] != steered[key] for key in plain) >= 4
    assert sum(steered[key] != other for key, other in said(run(model, swapped, 3)).items()) >= 4


@EVERY
def test_a_coefficient_of_zero_is_plain_generation_exactly(name: str) -> None:
    model = shared_model(name)
    plain = [replace(request, steering=None) for request in requests_of(model)]
    zero = vector(model, 1) * 0.0
    nothing = [replace(r, steering=Steering(add={0: zero, 1: -zero}, ablate={1: zero})) for r in plain]
    sample = Sample(temperature=1.0)
    for strategy in (Sample(), sample):
        one, other = (run(model, rows, 3, strategy=strategy, capture=Capture(ALL_LAYERS)) for rows in (plain, nothing))
        assert said(one) == said(other)
        for key, completion in one.items():
            for tensor, pooled in completion.activations.items():
                assert torch.equal(pooled, other[key].activations[tensor]), (key, tensor)


@SOME
def test_steering_by_v_minus_v_changes_nothing(name: str) -> None:
    model = shared_model(name)
    plain = [replace(request, steering=None) for request in requests_of(model)]
    push = vector(model, 1)
    opposed = [replace(request, steering=Steering(add={1: push - push})) for request in plain]
    assert said(run(model, opposed, 3)) == said(run(model, plain, 3))


@SOME
def test_captured_activations_are_those_of_the_steered_stream(name: str) -> None:
    model = shared_model(name)
    push, n_prompt = vector(model, 3), len(prompts(1)[0])
    request = Request("a", prompts(1)[0], 6, steering=Steering(add={1: push}))
    done = run(model, [request, Request("b", prompts(2)[1], 9)], 2, capture=Capture(ALL_LAYERS, poolings=("all",)))["a"]
    with plainly_steered(model, request.steering, n_prompt), taps(blocks(model)) as seen, torch.no_grad():
        model(input_ids=torch.tensor([[*request.token_ids, *done.token_ids]]), use_cache=False)
    hidden_TLD = torch.stack([h.reshape(-1, h.shape[-1])[n_prompt:] for h in seen], 1)
    got_TLD = done.activations["residual.all"]
    assert deviation(got_TLD, hidden_TLD) < 1e-5
    hidden_TLD[:, 1] -= push
    assert deviation(got_TLD, hidden_TLD) > 1e-2  # the control: read before the vector was added


@SOME
def test_an_ablated_direction_is_gone_from_the_stream(name: str) -> None:
    model = shared_model(name)
    unit = vector(model, 7) / vector(model, 7).norm()
    ablated = Steering(ablate=dict.fromkeys(ALL_LAYERS, unit))
    rows = [Request("a", prompts(1)[0], 6, steering=ablated), Request("b", prompts(1)[0], 6)]
    done = run(model, rows, 2, capture=Capture(ALL_LAYERS, poolings=("response_mean", "prompt_mean")))
    shares = {
        key: max(float((h @ unit).abs().max() / h.norm(dim=-1).max()) for h in completion.activations.values())
        for key, completion in done.items()
    }
    assert shares["a"] < 1e-5
    assert shares["b"] > 1e-3


def test_half_precision_adds_in_float32_and_zero_changes_no_bit() -> None:
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    add, unit = torch.zeros(2, 8), torch.zeros(2, 8)
    add[1] = 1e-4
    moved = steer_hidden(hidden, add, unit)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved[0], hidden[0])
    assert torch.equal(moved[1], (hidden[1].float() + 1e-4).bfloat16())


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        (lambda d: Steering(add={LAYERS: torch.zeros(d)}), f"layer {LAYERS}.*layers 0 to {LAYERS - 1}"),
        (lambda d: Steering(ablate={-1: torch.zeros(d)}), "layer -1"),
        (lambda d: Steering(add={0: torch.zeros(d + 1)}), "hidden size is"),
        (lambda d: Steering(add={0: torch.full((d,), float("inf"))}), "smaller coefficient"),
        (lambda d: Steering(positions="sometimes"), "use one of all, response"),
    ],
)
def test_a_steering_that_does_not_fit_is_refused_before_anything_runs(steering: Any, words: str) -> None:
    model = shared_model("llama")
    width = model.config.get_text_config().hidden_size
    with pytest.raises(ConfigError, match=words):
        run(model, [Request("a", (1, 2), 3, steering=steering(width))], 1)


def test_the_model_is_left_without_hooks() -> None:
    model = shared_model("llama")
    before = [len(module._forward_hooks) for module in model.modules()]  # transformers leaves some of its own
    run(model, requests_of(model), 3)
    assert [len(module._forward_hooks) for module in model.modules()] == before
