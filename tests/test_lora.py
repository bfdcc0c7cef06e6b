"""A LoRA adapter is loaded completely or refused in one line, and gives peft's logits."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.engine.generate import generate
from extraction.engine.steering import Steering
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load, load_over, read_config, read_tokenizer
from extraction.utils_batch import Capture, Request
from tests.lora import CONFIG, WEIGHTS, change_config, peft_reference, saved_adapter, saved_base
from tests.runs import environment
from tests.tiny import HIDDEN, LAYERS, VOCABULARY, deviation, prompts, tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 3, 77, 20, 31, 9]])


def spec(folder: Path | str, **options: Any) -> ModelSpec:
    return ModelSpec(name="tiny", source=str(folder), device="cpu", **options)


@torch.inference_mode()
def logits(lm: LanguageModel) -> torch.Tensor:
    return lm.logits(IDS_BT, IDS_BT.shape[1])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return saved_adapter(tmp_path / "adapter", base)


# --- loading ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "opt": ("opt", {}),
    "gemma2": ("gemma2", {"use_rslora": True}),
    "mixtral attention": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "whole head": ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("opt", {"bias": "all"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_logits_equal_pefts(tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    base = saved_base(tmp_path / "base", name)
    adapter = saved_adapter(tmp_path / "adapter", base, **options)
    with torch.inference_mode():
        expected = peft_reference(adapter, base)(input_ids=IDS_BT).logits
    lm = load(spec(adapter))
    assert deviation(logits(lm), expected) < 1e-5
    assert deviation(logits(load(spec(base))), expected) > 1e-2  # negative control: without the adapter
    assert lm.n_layers == LAYERS
    assert not [name for name, _ in lm.model.named_parameters() if "lora" in name]


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' of each other
def test_an_adapter_with_added_tokens_brings_their_embeddings(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<other>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained.save_pretrained(adapter, save_embedding_layers=True)
    tokenizer.save_pretrained(adapter)
    change_config(adapter, base_model_name_or_path=str(base))
    ids_BT = torch.tensor([[5, VOCABULARY, 7, VOCABULARY + 1]])
    with torch.inference_mode():
        expected = trained.eval()(input_ids=ids_BT).logits
        plain = load(spec(base))
        for lm in (load(spec(adapter)), load_over(plain, spec(adapter))):
            assert deviation(lm.logits(ids_BT, 4), expected) < 1e-5
            assert lm.n_embeddings == VOCABULARY + 2
    assert plain.n_embeddings == VOCABULARY  # the base that shares its weights keeps its own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_have_the_requested_dtype(tmp_path: Path, dtype: str) -> None:
    base = saved_base(tmp_path / "base", "gemma2")
    adapter = saved_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    halved = {name: tensor.half() for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(halved, adapter / WEIGHTS)
    for lm in (load(spec(adapter, dtype=dtype)), load_over(load(spec(base, dtype=dtype)), spec(adapter, dtype=dtype))):
        assert {parameter.dtype for parameter in lm.model.parameters()} == {getattr(torch, dtype)}
        assert torch.isfinite(logits(lm)).all()


def test_the_base_is_found_by_a_relative_or_an_absolute_path(adapter: Path, base: Path) -> None:
    relative = logits(load(spec(adapter)))
    change_config(adapter, base_model_name_or_path=str(base))
    assert torch.equal(logits(load(spec(adapter))), relative)


def test_config_and_tokenizer_are_the_bases_unless_the_adapter_has_a_tokenizer(adapter: Path) -> None:
    assert read_config(spec(adapter)).num_hidden_layers == LAYERS
    assert len(read_tokenizer(spec(adapter))) == VOCABULARY
    own = tiny_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(adapter)
    assert read_tokenizer(spec(adapter)).chat_template == own.chat_template
    assert load(spec(adapter)).tokenizer.chat_template == own.chat_template


def test_config_and_tokenizer_need_no_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert read_config(spec(adapter)).hidden_size == HIDDEN
    assert read_tokenizer(spec(adapter)).chat_template
    with pytest.raises(ModelError, match=r"traitline\[lora\]"):
        load(spec(adapter))


def test_a_full_model_needs_no_peft(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert load(spec(base)).n_layers == LAYERS


def test_loading_draws_no_random_numbers(adapter: Path) -> None:
    before = torch.random.get_rng_state()
    load(spec(adapter))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_capture_and_steering_are_equal_with_a_merged_and_an_attached_adapter(adapter: Path, base: Path) -> None:
    push = Steering(add={1: torch.linspace(-2, 2, HIDDEN)})
    requests = [Request(str(i), row, 8, steering=push if i % 2 else None) for i, row in enumerate(prompts(5))]
    capture = Capture((0, 2), ("residual", "mlp"))
    found = []
    for lm in (load(spec(adapter)), load_over(load(spec(base)), spec(adapter))):
        found.append({c.id: c for c in generate(lm, requests, batch_size=3, capture=capture)})
    for name, expected in found[0].items():
        assert found[1][name].token_ids == expected.token_ids
        for key, tensor in expected.activations.items():
            assert deviation(found[1][name].activations[key], tensor) < 1e-4


# --- refusals ---------------------------------------------------------------------------------------------------------


class Trap:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(str(folder / "ran"))))


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def one_tensor_missing(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(NAME))


def one_tensor_misshapen(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].clone()}))


def one_tensor_too_many(folder: Path) -> None:
    foreign = NAME.replace("layers.1", "layers.9")
    change_tensors(folder, lambda tensors: tensors.update({foreign: tensors[NAME].clone()}))


def nan_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[NAME].fill_(float("nan")))


def fields(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changed)


def another_base(folder: Path) -> None:
    saved_base(folder.parent / "other", hidden_size=64)
    change_config(folder, base_model_name_or_path="../other")


def base_is_an_adapter(folder: Path) -> None:
    saved_adapter(folder.parent / "upper", folder.parent / "base")
    change_config(folder, base_model_name_or_path="../upper")


def broken_config(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": ')


def config_is_a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def base_truncated(folder: Path) -> None:
    path = folder.parent / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def base_runs_code(folder: Path) -> None:
    base = folder.parent / "base"
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (only_pickled, "safetensors"),
    "truncated": (truncated, "truncated|damaged"),
    "missing": (one_tensor_missing, "up_proj"),
    "misshapen": (one_tensor_misshapen, "up_proj"),
    "too many": (one_tensor_too_many, r"layers\.9"),
    "nan": (nan_tensor, "NaN|corrupted|broken"),
    "another kind": (fields(peft_type="IA3"), "IA3"),
    "no kind": (fields(peft_type=None), "peft_type"),
    "pissa": (fields(init_lora_weights="pissa"), "pissa"),
    "activated": (fields(alora_invocation_tokens=[1, 2]), "adapter_config.json"),
    "unknown feature": (fields(use_new_feature=True), "use_new_feature"),
    "no base": (fields(base_model_name_or_path=None), "base_model_name_or_path"),
    "base gone": (fields(base_model_name_or_path="../gone"), "../gone"),
    "base not on the hub": (fields(base_model_name_or_path="nobody/nothing"), "nobody/nothing"),
    "another base": (another_base, "lora"),
    "base is an adapter": (base_is_an_adapter, "base"),
    "broken config": (broken_config, "adapter_config.json"),
    "config is a list": (config_is_a_list, "adapter_config.json"),
    "base truncated": (base_truncated, "truncated|damaged"),
    "base runs code": (base_runs_code, "code"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_is_refused_in_one_line(adapter: Path, name: str) -> None:
    damage, pattern = DAMAGE[name]
    damage(adapter)
    with pytest.raises(ModelError, match=pattern) as caught:
        load(spec(adapter))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (adapter / "ran").exists()


def test_unknown_fields_at_their_defaults_are_ignored(adapter: Path) -> None:
    expected = logits(load(spec(adapter)))
    change_config(adapter, use_new_feature=False, new_size=16, new_list=[])
    assert torch.equal(logits(load(spec(adapter))), expected)


# --- by hub ids -------------------------------------------------------------------------------------------------------

LOADED_BY_HUB_ID = """
import sys, torch
from extraction.config.experiments import resolve_model
from extraction.model.loading import load
from extraction.model.pairs import load_pair
adapter, base = (resolve_model(name, ".", {"device": "cpu"}) for name in ("owner/adapter", "owner/base"))
lm = load(adapter)
pair = load_pair(adapter, base)
ids_BT = torch.tensor([[5, 6, 7, 8, 9, 10]])
with torch.inference_mode():
    print(*(float(model.last_logits(ids_BT)[0, 3]) for model in (lm, pair.after, pair.before)), pair.shares_weights)
"""


def in_cache(home: Path, name: str, folder: Path) -> None:
    """Copy a folder into a hub cache."""
    place = home / "hub" / f"models--owner--{name}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs/main").write_text("0" * 40)


def test_an_adapter_and_its_base_are_found_in_the_hub_cache(tmp_path: Path, adapter: Path, base: Path) -> None:
    change_config(adapter, base_model_name_or_path="owner/base")
    in_cache(tmp_path / "home", "adapter", adapter)
    in_cache(tmp_path / "home", "base", base)
    env = environment(HF_HOME=str(tmp_path / "home"), HF_HUB_CACHE=str(tmp_path / "home/hub"))
    result = subprocess.run(
        [sys.executable, "-c", LOADED_BY_HUB_ID], capture_output=True, text=True, env=env, check=True, cwd=tmp_path
    )
    alone, after, before, shares = result.stdout.split()
    change_config(adapter, base_model_name_or_path=str(base))
    expected = [float(logits(load(spec(folder)))[0, -1, 3]) for folder in (adapter, base)]
    assert [float(alone), float(after), float(before)] == pytest.approx([expected[0], *expected], rel=1e-4)
    assert shares == "True"
