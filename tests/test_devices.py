"""A model over several devices gives the same tokens, captures and likelihoods as on one.

Devices are labels here (`tests/labelled.py`): an operation on tensors of two devices fails as it would on two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from transformers import PreTrainedModel

from extraction.activations.per_token import TokenInternals, TokenProjections
from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.core.records import Example, Prompt
from extraction.engine.generate import generate, teacher_force
from extraction.engine.logit_diff import Amplify
from extraction.engine.speculation import Speculate
from extraction.engine.steering import Steering
from extraction.engine.teacher_forcing import divergences
from extraction.model.devices import device_list, device_map_for, pick_device, to_host
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load, wrap
from extraction.model.lora import share_weights
from extraction.model.memory import CPU_AUTO_BATCH, auto_batch_size
from extraction.pipeline.lazy_model import device_notes
from extraction.pipeline.self_check import self_check
from extraction.utils_batch import Capture, Request
from tests.labelled import Labelled, TwoDevices, labelled_devices, place
from tests.runs import saved_model
from tests.tiny import HIDDEN, LAYERS, blocks, deviation, prompts, shared_model, tiny_model

FIRST, SECOND = "meta:0", "meta:1"
ALL = tuple(range(LAYERS))
POOLINGS = ("response_mean", "response_first:2", "response_last", "prompt_mean", "prompt_last", "all")
TEXTS = [(str(i), row, tuple(range(3, 8 + i))) for i, row in enumerate(prompts(3))]


def split(model: PreTrainedModel, *, hooks: bool = True) -> PreTrainedModel:
    """Put the last block and an untied head on the second device, with accelerate's hooks, as transformers does."""
    model.config.pad_token_id = None  # transformers' check indexes with a list, which labels don't support
    late, head = blocks(model)[-1], model.get_output_embeddings()
    moved = {late} if head.weight is model.get_input_embeddings().weight else {late, head}
    places = {
        name: SECOND if module in moved else FIRST
        for name, module in model.named_modules()
        if module in blocks(model) or not any(True for _ in module.children())
        if not any(module in block.modules() and module is not block for block in blocks(model))
    }
    place(model, FIRST)
    for module in moved:
        place(module, SECOND)
    if hooks:
        attach_align_device_hook_on_blocks(
            model,
            {name: torch.device(device) for name, device in (places | {"": FIRST}).items()},
            dict.fromkeys(places, False),
            skip_keys=model._skip_keys_device_placement,
        )
    model.hf_device_map = places  # type: ignore[assignment]
    return model


@pytest.fixture
def labels() -> Iterator[None]:
    with torch.inference_mode(), labelled_devices():
        yield


def units() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(3, HIDDEN, 2, generator=torch.Generator().manual_seed(0)), dim=1)


STEERING = Steering(add={0: torch.ones(HIDDEN), 2: -torch.ones(HIDDEN)}, ablate={2: units()[2, :, 0]})


def completions(lm: LanguageModel, *, steering: Steering | None = None, **settings: Any) -> dict[str, Any]:
    requests = [Request(str(i), row, 4, steering=steering) for i, row in enumerate(prompts(3))]
    done = generate(lm, requests, batch_size=2, **settings)
    return {c.id: {"tokens": torch.tensor(c.token_ids), **c.activations} for c in done}


def forced(lm: LanguageModel, capture: Capture) -> dict[str, Any]:
    return {c.id: c.activations for c in teacher_force(lm, TEXTS, capture=capture, batch_size=3)}


ADDERS = ("residual", "attention", "mlp")  # sites that parallel blocks have too
RUNS: dict[str, Callable[[LanguageModel, LanguageModel], Any]] = {
    "poolings": lambda lm, _: completions(lm, capture=Capture(ALL, poolings=POOLINGS)),
    "sites": lambda lm, _: completions(lm, capture=Capture(ALL, ADDERS)),
    "projections": lambda lm, _: completions(lm, capture=TokenProjections(ALL, units())),
    "internals": lambda lm, _: completions(lm, capture=TokenInternals(2)),
    "steering": lambda lm, _: completions(lm, steering=STEERING, capture=Capture(ALL)),
    "amplification": lambda lm, other: completions(lm, strategy=Amplify(other, alpha=1.5), capture=Capture(ALL)),
    "speculation": lambda lm, other: completions(lm, strategy=Speculate(other, depth=3), capture=Capture(ALL)),
    "teacher": lambda lm, _: forced(lm, Capture(ALL, ADDERS, ("response_mean", "prompt_last", "all"))),
    "likelihood": lambda lm, _: {"kl": torch.tensor(divergences(lm, TEXTS[0], [STEERING], batch_size=2))},
}


def assert_same(split_up: Any, whole: Any) -> None:
    assert split_up.keys() == whole.keys()
    for name, value in whole.items():
        if isinstance(value, Tensor):
            assert deviation(split_up[name].cpu(), value) < 1e-5
        else:
            assert_same(split_up[name], value)


SOME = ("poolings", "sites", "projections", "internals")


@pytest.mark.parametrize(("name", "runs"), [("llama", tuple(RUNS)), ("gpt2", SOME[:2]), ("gpt_neox", SOME)])
def test_a_model_over_two_devices_equals_one_on_one_device(name: str, runs: tuple[str, ...], labels: None) -> None:
    whole, other = wrap(shared_model(name)), wrap(tiny_model(name, seed=1))
    lm, second = wrap(split(tiny_model(name))), wrap(split(tiny_model(name, seed=1)))
    assert lm.device == torch.device(FIRST)
    assert lm.spread == {FIRST: 2, SECOND: 1}
    for run in runs:
        assert_same(RUNS[run](lm, second), RUNS[run](whole, other))


def test_negative_control_without_accelerates_hooks_two_devices_fail(labels: None) -> None:
    with pytest.raises(ModelError, match="TwoDevices"):
        wrap(split(tiny_model("llama"), hooks=False))


def test_negative_control_tensors_of_two_labels_can_not_be_combined(labels: None) -> None:
    left, right = torch.ones(2, 3, device=FIRST), torch.ones(2, 3).to(SECOND)
    assert isinstance(left, Labelled)
    assert (left + 1).device == torch.device(FIRST)
    for mix in (lambda: left + right, lambda: torch.cat([left, right]), lambda: left @ torch.ones(3, 2)):
        with pytest.raises(TwoDevices):
            mix()
    assert torch.equal((left + right.to(FIRST)).cpu(), 2 * torch.ones(2, 3))


def test_a_copy_sharing_weights_is_over_two_devices_too(labels: None) -> None:
    model = split(tiny_model("llama"))
    second = share_weights(model)
    pairs = zip(second.parameters(), model.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert_same(completions(wrap(second)), completions(wrap(model)))
    example = Prompt(Example("a", "calm", "pos", 0, 0, 0, "Why?"), "Why?", prompts(1)[0])
    assert self_check(wrap(second), [example], ALL) < 1e-5


def test_offloaded_layers_give_the_same(tmp_path: Path) -> None:
    whole, model = wrap(tiny_model("llama")), tiny_model("llama")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= dict.fromkeys(("model.layers.0", "model.layers.2"), "disk")
    dispatch_model(model, places, offload_dir=tmp_path, force_hooks=True)
    lm = wrap(model)
    assert lm.spread == {"main memory": 2, "cpu": 1}
    assert auto_batch_size(lm, [10], 20) == CPU_AUTO_BATCH
    for run in ("poolings", "sites", "projections", "teacher"):
        assert_same(RUNS[run](lm, lm), RUNS[run](whole, whole))


def test_with_offloaded_embeddings_the_device_is_the_one_that_computes(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    dispatch_model(model, {"model.embed_tokens": "disk", "model": "cpu", "lm_head": "cpu"}, offload_dir=tmp_path)
    assert model.get_input_embeddings().weight.is_meta
    assert wrap(model).device == torch.device("cpu")


# --- --device ---------------------------------------------------------------------------------------------------------


def test_device_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert device_map_for("balanced") == {"device_map": "cpu"}  # without GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert (pick_device("auto"), pick_device("cuda:1"), pick_device("balanced")) == ("cuda", "cuda:1", "cuda:0")
    assert (device_list("auto"), device_list("sequential")) == (("cuda",), ("cuda:0", "cuda:1"))
    assert device_map_for("auto") == {"device_map": "cuda"}
    spread = device_map_for("balanced")
    assert spread["device_map"] == "balanced"
    assert {spread["max_memory"][i] for i in (0, 1)} == {800}
    with pytest.raises(ModelError, match="cuda:2"):
        pick_device("cuda:2")


def test_balanced_loads_on_a_machine_with_one_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    lm = load(ModelSpec("tiny", str(saved_model()), device="balanced"))
    assert (lm.device, lm.spread) == (torch.device("cpu"), {})


def test_device_notes() -> None:
    assert list(device_notes({})) == []
    assert list(device_notes({"cuda:0": 20, "cuda:1": 12})) == ["layers: 20 on cuda:0, 12 on cuda:1"]
    assert len(list(device_notes({"cuda:0": 20, "main memory": 12}))) == 2  # the second warns of offloading


# --- with GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("run", RUNS)
def test_two_gpus_equal_one(run: str) -> None:
    whole = load(ModelSpec("tiny", str(saved_model()), device="cuda:0"))
    lm = wrap(dispatch_model(tiny_model("llama", max_position_embeddings=512), places_of_gpus()))
    assert lm.spread == {"cuda:0": 2, "cuda:1": 1}
    assert_same(RUNS[run](lm, lm), RUNS[run](whole, whole))


def places_of_gpus() -> dict[str, int]:
    first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    return dict.fromkeys(first, 0) | dict.fromkeys(("model.layers.2", "model.norm", "lm_head"), 1)


LACKS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, LACKS_CUDA])])
def test_to_host_copies_tensors_unchanged(device: str) -> None:
    tensors = [
        torch.randn(n, 3, device=device, dtype=dtype) for n in (0, 1, 900) for dtype in (torch.float32, torch.half)
    ]
    expected = [tensor.clone() for tensor in tensors]
    found = to_host(tensors)
    if device == "cuda":
        for tensor in tensors:
            tensor.zero_()  # the result is a copy
    for tensor, same in zip(found, expected, strict=True):
        assert tensor.device.type == "cpu"
        assert not tensor.is_pinned()
        assert tensor.dtype == same.dtype
        assert torch.equal(tensor, same.cpu())
    assert to_host([]) == []
