"""Weights of 8 and 4 bits: generation and capture, a missing bitsandbytes, and the fingerprint of runs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from extraction.config.experiments import ModelSpec, resolve_model
from extraction.core.errors import ConfigError, ModelError
from extraction.core.records import Example, Prompt
from extraction.engine.generate import generate
from extraction.model import loading
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load
from extraction.model.memory import shape_of
from extraction.model.pairs import load_pair
from extraction.pipeline.plan import make_plan, stored_plans
from extraction.pipeline.self_check import self_check
from extraction.storage.run_dir import fingerprint
from extraction.utils_batch import Capture, Completion, Request
from tests.lora import saved_adapter
from tests.runs import make_root, refused, saved_model
from tests.tiny import HIDDEN, LAYERS, prompts, tiny_model, tiny_tokenizer

BITS = ("8bit", "4bit")
SPEC = ModelSpec("tiny", str(saved_model()), device="cpu")


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"traitline\[quantized\]"):
        load(replace(SPEC, quantize="4bit"))
    root = make_root(tmp_path)
    assert "bitsandbytes" in refused(
        "generate", "--experiment", "demo", "--root", root, "--quantize", "8bit", "--device", "cpu"
    )


def test_other_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3bit"):
        resolve_model("tiny", make_root(tmp_path), {"quantize": "3bit"})


def test_quantization_is_in_a_runs_fingerprint_only_if_given(tmp_path: Path) -> None:
    root = str(make_root(tmp_path))
    plain, rounded = make_plan("demo", root=root), make_plan("demo", root=root, options={"quantize": "4bit"})
    trait = plain.traits[0]
    assert "quantize" not in plain.config(trait)["model"]
    assert rounded.config(trait)["model"]["quantize"] == "4bit"
    assert fingerprint(plain.config(trait)) != fingerprint(rounded.config(trait))
    for job, bits in ((plain, None), (rounded, "4bit")):
        folder = tmp_path / str(bits)
        folder.mkdir()
        other = make_root(folder)
        replace(job, root=other).folder(trait).open(job.config(trait))
        assert [stored.spec.quantize for stored in stored_plans("demo", root=str(other))] == [bits]


@pytest.mark.parametrize(("bits", "n_bytes"), [(None, 4), ("8bit", 1), ("4bit", 0.5625)])
def test_the_forecast_counts_quantized_weights(bits: str | None, n_bytes: float) -> None:
    shape = shape_of(AutoConfig.from_pretrained(SPEC.source), torch.float32, bits)
    linear = LAYERS * (2 * HIDDEN * HIDDEN + 2 * 2 * 8 * HIDDEN + 3 * 48 * HIDDEN)  # q, o; k, v; the MLP
    assert shape.weights == round((shape.n_parameters - linear) * 4 + linear * n_bytes)


# --- with bitsandbytes ------------------------------------------------------------------------------------------------

needs_it = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Save a model whose rows have at least 64 weights, the block size of one scale."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    tiny_model("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSpec("wide", str(folder), device="cpu")


def answered(lm: LanguageModel, batch_size: int) -> dict[str, Completion]:
    requests = [Request(str(i), row, 6) for i, row in enumerate(prompts(4))]
    return {c.id: c for c in generate(lm, requests, batch_size=batch_size, capture=Capture(tuple(range(LAYERS))))}


@needs_it
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_runs_in_its_dtype(bits: str, dtype: str, spec: ModelSpec) -> None:
    lm, whole = load(replace(spec, quantize=bits, dtype=dtype)), load(replace(spec, dtype=dtype))
    seen: list[torch.dtype] = []
    for block in lm.layers:
        block.register_forward_hook(lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
    alone, together = answered(lm, 1), answered(lm, 3)
    assert {lm.dtype, *seen} == {getattr(torch, dtype)}
    assert any(p.dtype in (torch.int8, torch.uint8) for p in lm.model.parameters())
    assert alone.keys() == together.keys()
    for completion in (*alone.values(), *together.values()):
        assert completion.activations["residual.response_mean"].dtype == torch.float32
    assert (lm.is_exact, whole.is_exact) == (False, dtype == "float32")
    prompt = Prompt(Example("a", "calm", "pos", 0, 0, 0, "Why?"), "Why?", prompts(1)[0])
    assert self_check(lm, [prompt], (0, 1, 2)) < 0.1
    exact = answered(whole, 1)["0"].activations["residual.response_mean"]
    assert not torch.equal(exact, alone["0"].activations["residual.response_mean"])


@needs_it
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_over_quantized_weights_is_not_merged(bits: str, spec: ModelSpec, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.symlink_to(spec.source)
    adapter = saved_adapter(tmp_path / "adapter", base)
    lm = load(ModelSpec("adapter", str(adapter), device="cpu", dtype="float32", quantize=bits))
    assert any("lora_A" in name for name, _ in lm.model.named_parameters())
    plain = load(replace(spec, dtype="float32", quantize=bits))
    ids_BT = torch.tensor([prompts(1)[0]])
    with torch.inference_mode():
        assert not torch.allclose(lm.last_logits(ids_BT), plain.last_logits(ids_BT), atol=1e-2)
    pair = load_pair(ModelSpec("adapter", str(adapter), device="cpu", quantize=bits), replace(spec, quantize=bits))
    assert pair.shares_weights
    assert answered(pair.after, 2).keys() == answered(pair.before, 2).keys()
