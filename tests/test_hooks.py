"""Hooks are removed however their `with` block ends, and observing changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extraction.core.errors import ActivationError
from extraction.engine.generate import generate, teacher_force
from extraction.model.hooks import StopForward, steer, watch, watch_inputs
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Request
from tests.tiny import prompts, reference_greedy, shared_model, tiny_model

EVERYWHERE = Capture((0, 1, 2), ("residual", "attention", "mlp", "residual_mid"), ("response_mean", "prompt_mean"))
CONTEXTS: dict[str, Callable[..., Any]] = {"watch": watch, "watch_inputs": watch_inputs, "steer": steer}


def keep(_key: object, hidden: Tensor) -> Tensor:
    """Return the hidden states unchanged: an observer, or a change without effect."""
    return hidden


def count_hooks(module: nn.Module) -> int:
    """Count the hooks on a module and its submodules."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Pair(nn.Module):
    """A block of older code: hidden states first in a tuple."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return hidden + 1, "extra"


def chain() -> nn.Sequential:
    """Two linear layers with exact arithmetic."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for i, layer in enumerate(model):
        layer.weight.data = torch.eye(4) * (i + 2)  # type: ignore[union-attr]
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_hooks_are_removed_when_the_block_ends(kind: str) -> None:
    model = chain()
    with CONTEXTS[kind]({0: model[0], 1: model[1]}, keep):
        assert count_hooks(model) == 2
    assert count_hooks(model) == 0


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, StopForward])
def test_hooks_are_removed_when_the_block_fails(kind: str, failure: type[BaseException]) -> None:
    model = chain()
    with pytest.raises(failure), CONTEXTS[kind]({0: model[0], 1: model[1]}, keep):
        raise failure
    assert count_hooks(model) == 0


@pytest.mark.parametrize("kind", CONTEXTS)
def test_hooks_are_removed_when_an_observer_fails(kind: str) -> None:
    model = chain()

    def fail(_key: object, _hidden: Tensor) -> Tensor:
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"), CONTEXTS[kind]({0: model[0]}, fail):
        model(torch.ones(1, 2, 4))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("kind", CONTEXTS)
def test_no_hook_stays_if_one_cannot_be_registered(kind: str) -> None:
    model = chain()
    with pytest.raises(AttributeError), CONTEXTS[kind]({0: model[0], 1: "not a module"}, keep):
        pytest.fail("the block must not begin")
    assert count_hooks(model) == 0


def test_nested_observers_see_their_own_passes() -> None:
    model, outer, inner = chain(), [], []
    ones = torch.ones(1, 1, 4)
    with watch({"a": model[0], "b": model[1]}, lambda key, hidden: outer.append((key, float(hidden[0, 0, 0])))):
        model(ones)
        with watch({"b": model[1]}, lambda key, hidden: inner.append((key, float(hidden[0, 0, 0])))):
            model(ones)
        model(ones)
    assert outer == [("a", 2.0), ("b", 6.0)] * 3
    assert inner == [("b", 6.0)]


def test_inputs_are_observed_by_position_and_by_keyword() -> None:
    class Named(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            return hidden * 2

    model, seen = Named(), []
    with watch_inputs({0: model}, lambda _key, hidden: seen.append(float(hidden.sum()))):
        model(torch.ones(1, 1, 3), torch.zeros(1))
        model(hidden=torch.ones(1, 1, 4), mask=torch.zeros(1))
    assert seen == [3.0, 4.0]


def test_the_rest_of_a_tuple_output_is_kept() -> None:
    pair, seen = Pair(), []
    with watch({0: pair}, lambda _key, hidden: seen.append(hidden.clone())):
        observed = pair(torch.zeros(1, 1, 2))
    assert observed[1] == "extra"
    assert torch.equal(seen[0], torch.ones(1, 1, 2))
    with steer({0: pair}, lambda _key, hidden: hidden * 5):
        steered = pair(torch.zeros(1, 1, 2))
    assert isinstance(steered, tuple)
    assert torch.equal(steered[0], torch.full((1, 1, 2), 5.0))
    assert steered[1] == "extra"


def test_steering_changes_later_modules_only() -> None:
    model, ones = chain(), torch.ones(1, 1, 4)
    inputs: list[Tensor] = []

    def shift(_key: object, hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden + 10

    with steer({0: model[0]}, shift):
        assert float(model(ones)[0, 0, 0]) == 36.0
    assert float(inputs[0][0, 0, 0]) == 2.0
    assert float(ones[0, 0, 0]) == 1.0
    assert float(model(ones)[0, 0, 0]) == 6.0


def test_opposite_steering_cancels_and_watching_after_steering_sees_it() -> None:
    model, seen = chain(), []
    with (
        steer({0: model[0]}, lambda _key, hidden: hidden + 8),
        watch({0: model[0]}, lambda _key, hidden: seen.append(float(hidden[0, 0, 0]))),
        steer({0: model[0]}, lambda _key, hidden: hidden - 8),
    ):
        assert float(model(torch.ones(1, 1, 4))[0, 0, 0]) == 6.0
    assert seen == [10.0]


# --- the engine's own hooks -------------------------------------------------------------------------------------------


def test_a_captured_run_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm = wrap(model, stop_ids=())
    requests = [Request(f"e{i}", row, 4) for i, row in enumerate(prompts(5))]
    done = list(generate(lm, requests, batch_size=2, capture=EVERYWHERE))
    list(teacher_force(lm, [("x", (5, 6), (7, 8))], capture=EVERYWHERE))
    assert len(done) == 5
    assert count_hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_closed_run_leaves_no_hook() -> None:
    model = tiny_model("llama")
    requests = [Request(f"e{i}", row, 4) for i, row in enumerate(prompts(5))]
    running = generate(wrap(model, stop_ids=()), requests, batch_size=2, capture=EVERYWHERE)
    next(running)
    assert count_hooks(model) > 0
    running.close()  # type: ignore[attr-defined]
    assert count_hooks(model) == 0


def test_steering_around_the_engine_steers_every_token() -> None:
    """`v - v` changes nothing, `v` does; afterwards the model is unchanged."""
    model, row = shared_model("llama"), prompts(1)[0]
    lm = wrap(model, stop_ids=())
    requests = [Request("e", row, 8)]
    push_D = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain = reference_greedy(model, row, 8)

    def answer() -> tuple[int, ...]:
        return next(generate(lm, requests, batch_size=1)).token_ids

    with steer({1: lm.layers[1]}, lambda _key, hidden: hidden + (push_D - push_D)):
        assert answer() == plain
    with steer({1: lm.layers[1]}, lambda _key, hidden: hidden + push_D):
        steered = answer()
        assert steered == reference_greedy(model, row, 8)
    assert steered != plain
    assert answer() == plain


@pytest.mark.parametrize("capture", [None, EVERYWHERE], ids=["plain", "captured"])
def test_a_nan_example_is_named_and_leaves_no_hook(capture: Capture | None) -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data[50] = float("nan")
    requests = [Request("fine", (3, 4, 5), 3), Request("poison", (3, 50, 5), 3)]
    with pytest.raises(ActivationError, match="poison") as caught:
        list(generate(wrap(model, stop_ids=()), requests, batch_size=2, capture=capture))
    assert "fine" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert count_hooks(model) == 0


def test_a_nan_text_is_named_with_its_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    texts = [("first", (3, 4), (5,)), ("second", (3, 9), (5, 6))]
    with pytest.raises(ActivationError, match="layer 1") as caught:
        list(teacher_force(wrap(model), texts, capture=Capture((0, 1, 2))))
    assert "first" in str(caught.value) or "second" in str(caught.value)
    assert "float32" in str(caught.value)
    assert count_hooks(model) == 0
