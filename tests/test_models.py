"""Loading and wrapping models: what `LanguageModel` holds, and refusals of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError, PromptError
from extraction.engine.generate import generate
from extraction.model.kv_cache import CacheWindow, make_cache
from extraction.model.language_model import LanguageModel
from extraction.model.loading import find_layers, load, wrap
from extraction.utils_batch import Capture, Request, teacher_force
from tests.runs import environment, saved_model
from tests.tiny import (
    HIDDEN,
    LAYERS,
    MAX_POSITIONS,
    VOCABULARY,
    blocks,
    prompts,
    reference_greedy,
    shared_model,
    tiny_model,
    tiny_tokenizer,
)

# the common families, and one of each other way to name layers, sizes and positions in a config
KINDS = (
    *("llama", "gpt2", "gemma2", "qwen3", "mistral", "bloom", "mixtral", "gpt_neox", "opt"),
    *("mpt", "ctrl", "gpt_neo", "gptj", "falcon", "gemma4", "llama4", "deepseek_v3", "xglm"),
)


def one_line(error: BaseException) -> str:
    """Return an error's message, checking that it is one line."""
    assert "\n" not in str(error)
    return str(error)


def answers(lm: LanguageModel, n: int = 8) -> list[tuple[int, ...]]:
    """Return a model's responses to five prompts of different lengths, three at a time."""
    requests = [Request(str(i), row, n) for i, row in enumerate(prompts(5))]
    done = {c.id: c.token_ids for c in generate(lm, requests, batch_size=3)}
    return [done[r.id] for r in requests]


# --- what a LanguageModel holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_layers_sizes_ids_and_positions_are_found(name: str) -> None:
    model = shared_model(name)
    lm = wrap(model)
    assert lm.layers == tuple(blocks(model))
    assert (lm.n_layers, lm.hidden_size, lm.vocab_size) == (LAYERS, HIDDEN, VOCABULARY)
    assert (lm.device, lm.dtype) == (torch.device("cpu"), torch.float32)
    assert (lm.stop_ids, lm.pad_id) == (frozenset({2}), 0)
    assert lm.max_positions == MAX_POSITIONS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "mixtral"])
def test_a_model_may_have_any_floating_point_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "mixtral" and dtype == torch.float64:
        pytest.skip("transformers runs no experts in float64 on a CPU")
    assert wrap(shared_model(name, dtype)).dtype == dtype


def test_ambiguous_or_missing_layer_lists_are_refused() -> None:
    model = tiny_model("llama")
    model.model.twin = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    with pytest.raises(ModelError, match=r"2 .* 3 "):
        find_layers(model)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"0 .* 7 ") as caught:
        wrap(model)
    assert "LlamaForCausalLM" in one_line(caught.value)


@pytest.mark.parametrize(("name", "columns", "states"), [("llama", 3, 0), ("mamba", 0, 3), ("qwen3_next", 1, 2)])
def test_a_layer_of_the_cache_keeps_columns_or_states_as_its_model_writes_them(
    name: str, columns: int, states: int
) -> None:
    lm = wrap(shared_model(name))
    cache = make_cache(lm.model, CacheWindow(slots=2, columns=4))
    ids_BT = torch.tensor([[5, 6, 7]])
    with torch.inference_mode(), cache.window.prefilling(torch.tensor([1]), cursor=3):
        lm.cached_logits(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.arange(3).unsqueeze(0), cache)
    assert sum(bool(layer.columned) for layer in cache.slot_layers) == columns
    assert sum(bool(layer.states) for layer in cache.slot_layers) == states
    assert lm.state_bytes == cache.state_bytes == sum(s[1].nbytes for layer in cache.slot_layers for s in layer.states)
    for buffer in (b for layer in cache.slot_layers for b in (*layer.columned.values(), *layer.states)):
        assert buffer[1].any()
        assert not buffer[0].any()  # the slot that the prefill did not write


# --- stop, pad and vocabulary -----------------------------------------------------------------------------------------


def with_ids(*, pad: int | None, eos: int | list[int] | None) -> PreTrainedModel:
    """Return a Llama whose configs have these ids."""
    model = tiny_model("llama")
    model.config.pad_token_id, model.config.eos_token_id = pad, eos
    model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=eos)
    return model


@pytest.mark.parametrize(
    ("pad", "eos"), [(0, 2), (2, 2), (None, 2), (0, 0), (-1, 2), (None, None), (57, [2, 40]), (96, [96])]
)
def test_padding_is_masked_for_any_pad_id(pad: int | None, eos: Any) -> None:
    """Responses are equal whether the padding id is EOS, 0, absent, negative, or a token of the prompts."""
    lm = wrap(with_ids(pad=pad, eos=eos), stop_ids=())
    assert 0 <= lm.pad_id < VOCABULARY
    model = shared_model("llama")
    assert answers(lm) == [reference_greedy(model, row, 8) for row in prompts(5)]


def test_a_prompt_may_hold_the_padding_id() -> None:
    model = shared_model("gpt2")
    rows = [(0, 0, 5, 0), (7,), (0,), tuple(range(9))]
    requests = [Request(str(i), row, 6) for i, row in enumerate(rows)]
    done = {c.id: c.token_ids for c in generate(wrap(model, stop_ids=()), requests, batch_size=4)}
    assert [done[r.id] for r in requests] == [reference_greedy(model, row, 6) for row in rows]


def test_stop_ids_of_config_generation_config_and_tokenizer_are_combined() -> None:
    """Those of the generation config, the config and the tokenizer, one or many."""
    model = with_ids(pad=0, eos=[5, 6])
    model.generation_config.eos_token_id = [7, 8]
    assert wrap(model, tiny_tokenizer()).stop_ids == {2, 5, 6, 7, 8}
    assert wrap(model).stop_ids == {5, 6, 7, 8}
    assert wrap(model, stop_ids=[9]).stop_ids == {9}
    assert wrap(model, stop_ids=()).stop_ids == frozenset()


def test_without_eos_a_response_has_max_new_tokens() -> None:
    lm = wrap(with_ids(pad=None, eos=None))
    assert lm.stop_ids == frozenset()
    done = list(generate(lm, [Request("e", (5, 6), 9)], batch_size=1, capture=Capture((0,))))
    assert (len(done[0].token_ids), done[0].finish_reason) == (9, "length")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"97 .* 60"):
        wrap(tiny_model("llama", vocab_size=60), tiny_tokenizer())
    assert wrap(tiny_model("llama", vocab_size=128), tiny_tokenizer()).vocab_size == 128  # padded embeddings are common


def test_the_tiny_tokenizer_round_trips_text() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY
    text = "Is it  so?\nYes, (perhaps) 3 of 5!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat == "<bos><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer(chat, add_special_tokens=False)["input_ids"][:2]) == [
        "<bos>",
        "<|system|>",
    ]


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a tiny model and its tokenizer in a folder."""
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def spec(folder: Path | str, **options: Any) -> ModelSpec:
    """Make the spec of a model in a folder."""
    return ModelSpec(name="tiny", source=str(folder), device="cpu", **options)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_saved_model_loads_in_the_given_dtype(saved: Path, dtype: str) -> None:
    lm = load(spec(saved, dtype=dtype))
    assert lm.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert lm.tokenizer is not None
    assert len(lm.tokenizer) == VOCABULARY
    if lm.dtype == torch.float32:
        assert answers(lm) == answers(wrap(shared_model("llama")))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def overwrite(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove_one_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def misshape_one_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def run_own_code(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def unknown_architecture(folder: Path) -> None:
    change_config(folder, model_type="unknown-type")


def encoder_decoder(folder: Path) -> None:
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])


def vision_only(folder: Path) -> None:
    change_config(folder, model_type="vit", architectures=["ViTModel"])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def another_tokenizer(folder: Path) -> None:
    tiny_tokenizer(more=[f"word{i}" for i in range(50)]).save_pretrained(folder)


DAMAGE = {
    truncate: "truncated|damaged",
    empty: "truncated|damaged",
    overwrite: "truncated|damaged",
    remove_weights: "safetensors",
    remove_one_tensor: "up_proj",
    misshape_one_tensor: "up_proj",
    run_own_code: "code",
    unknown_architecture: "unknown-type",
    encoder_decoder: "causal",
    vision_only: "causal",
    break_config: "config|JSON",
    remove_config: "config",
    remove_tokenizer: "tokenizer",
    another_tokenizer: "tokenizer",
}


def test_tokens_past_the_embedding_are_refused_in_a_prompt_only(saved: Path) -> None:
    """Gemma 3's own tokenizer has one token more than the model: <image_soft_token>."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(saved)
    lm = load(spec(saved))
    assert len(answers(lm)) == 5
    assert lm.n_embeddings == VOCABULARY
    for texts in (
        lambda: generate(lm, [Request("seen", (5, VOCABULARY), 4)], batch_size=1),
        lambda: teacher_force(lm, [("seen", (5,), (6, VOCABULARY))], capture=Capture((0,)), batch_size=1),
    ):
        with pytest.raises(PromptError, match=rf"seen: .*{VOCABULARY} \('<image>'\)"):
            list(texts())


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_or_unsupported_model_is_refused_in_one_line(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(ModelError, match=DAMAGE[damage]) as caught:
        load(spec(saved))
    message = one_line(caught.value)
    assert "tiny" in message or "Llama" in message
    assert len(message) < 400
    assert not (saved / "ran").exists()


def test_an_absent_model_is_refused_offline_without_showing_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for source in ("nobody/nothing", str(tmp_path / "absent")):
        with pytest.raises(ModelError) as caught:
            load(spec(source))
        assert source in one_line(caught.value)
        assert "hf_secret" not in str(caught.value)


def test_a_missing_device_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="cuda:99"):
        load(ModelSpec(name="tiny", source=str(saved), device="cuda:99"))


def test_an_impossible_device_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="mps:7"):
        ModelSpec(name="tiny", source=str(saved), device="mps:7")


LOADING = """
import sys, threading
from extraction.config.experiments import ModelSpec
from extraction.model.loading import load

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch(seen, ended):
    while not ended.wait(0.002):
        seen.append(held())

load(ModelSpec("tiny", sys.argv[1]))  # loads the libraries
for dtype in ("auto", "float32"):
    before, seen, ended = held(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, ended))
    watcher.start()
    lm = load(ModelSpec("large", sys.argv[2], dtype=dtype))
    ended.set()
    watcher.join()
    print(max(seen) - before, sum(p.numel() * p.element_size() for p in lm.model.parameters()) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_weights_are_held_in_memory_once(tmp_path: Path) -> None:
    """In the checkpoint's dtype weights are memory-mapped; in another dtype each is converted once."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128}
    tiny_model("llama", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", LOADING, str(saved_model()), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    (mapped, weights), (converted, wide) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert wide == 2 * weights
    assert mapped < 0.5 * weights
    assert converted < 1.25 * wide
