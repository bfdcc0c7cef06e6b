"""Exported control vectors in llama.cpp itself: on the pocket model its logits equal those of our steering.

Skipped unless llama-cpp-python is installed:

    pip install llama-cpp-python

Shapes: L layers, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from extraction.exchange.formats import FORMATS
from extraction.exchange.layer_rows import VectorMetadata
from extraction.model.hooks import steer
from extraction.model.loading import wrap
from extraction.vectors.direction import Direction
from tests.gguf_by_hand import load_as_llama_cpp
from tests.runs import REPOSITORY

llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
gguf = pytest.importorskip("gguf")

POCKET = REPOSITORY / "extraction/pocket/pocket"
IDS = (1, 50, 700, 33, 1200, 12)
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def lm():
    from transformers import AutoModelForCausalLM

    return wrap(AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32), stop_ids=())


@pytest.fixture(scope="module")
def loaded(lm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.c_void_p]:
    """Load the pocket model in llama.cpp in float32, with placeholder tokens."""
    path = tmp_path_factory.mktemp("gguf") / "pocket.gguf"
    _write_model(lm.model, path)
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    yield model
    llama.llama_model_free(model)


def _write_model(model, path: Path) -> None:
    config, weights = model.config, model.state_dict()
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([1] * size)

    def tensor(name: str) -> np.ndarray:
        return weights[name].float().numpy()

    def reorder_for_rope(rows: np.ndarray, count: int) -> np.ndarray:
        """Reorder rows: llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
        halves = rows.reshape(count, 2, rows.shape[0] // count // 2, rows.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))

    writer.add_tensor("token_embd.weight", tensor("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", tensor("model.norm.weight"))
    writer.add_tensor("output.weight", tensor("lm_head.weight"))
    for i in range(config.num_hidden_layers):
        for theirs, ours in PARTS.items():
            writer.add_tensor(f"blk.{i}.{theirs}.weight", tensor(f"model.layers.{i}.{ours}.weight"))
        for theirs, ours, count in (("attn_q", "q_proj", heads), ("attn_k", "k_proj", groups)):
            rows = tensor(f"model.layers.{i}.self_attn.{ours}.weight")
            writer.add_tensor(f"blk.{i}.{theirs}.weight", reorder_for_rope(rows, count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def their_logits(model, vector: bytes | None, n_layers: int) -> np.ndarray:
    """Return the last position's logits [V], with a control vector laid out as llama.cpp's loader does."""
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
    parameters.type_k = parameters.type_v = 0  # the cache in float32
    context = llama.llama_init_from_model(model, parameters)
    if vector is not None:
        size, directions, _ = load_as_llama_cpp(vector)
        flat = np.zeros(size * n_layers, np.float32)
        for number, values in directions.items():
            flat[size * (number - 1) : size * number] = values
        buffer = (ctypes.c_float * flat.size)(*flat)
        apply = getattr(llama, "llama_set_adapter_cvec", None) or llama.llama_apply_adapter_cvec
        assert apply(context, buffer, flat.size, size, 1, n_layers) == 0
    tokens = (llama.llama_token * len(IDS))(*IDS)
    assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(IDS))) == 0
    pointer = llama.llama_get_logits_ith(context, -1)
    logits_V = np.array([pointer[i] for i in range(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))])
    llama.llama_free(context)
    return logits_V


@torch.no_grad()
def our_logits(lm, direction: Direction, layers: tuple[int, ...], shift: int = 0) -> np.ndarray:
    modules = {layer: lm.layers[layer + shift] for layer in layers}
    with steer(modules, lambda layer, hidden: hidden + direction.at(layer)):
        return lm.model(input_ids=torch.tensor([IDS])).logits[0, -1].double().numpy()


def test_llama_cpp_adds_each_direction_to_the_same_block(lm, loaded) -> None:
    n_layers, hidden = lm.n_layers, lm.hidden_size
    values = torch.randn(n_layers, hidden, generator=torch.Generator().manual_seed(0)) * 3
    direction = Direction(values, tuple(range(n_layers)), "t", "m", "pocket")
    plain = our_logits(lm, direction, ())
    assert np.abs(their_logits(loaded, None, n_layers) - plain).max() < 0.02
    for layers in ((1,), (3,), (n_layers - 1,), tuple(range(1, n_layers))):
        for form in ("gguf", "repeng"):
            file = FORMATS[form].write(direction.select(layers), VectorMetadata("llama", n_layers)).data
            theirs = their_logits(loaded, file, n_layers)
            assert np.abs(theirs - our_logits(lm, direction, layers)).max() < 0.02, (form, layers)
            assert np.abs(theirs - plain).max() > 0.2  # the controls: nothing added, and one block off
            if len(layers) == 1 and layers[0] > 1:
                assert np.abs(theirs - our_logits(lm, direction, layers, -1)).max() > 0.2
