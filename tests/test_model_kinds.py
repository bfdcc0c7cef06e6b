"""Models with states and multimodal models: what is refused, what is dropped, and loading them from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from extraction.config.experiments import ModelSpec, resolve_model
from extraction.core.errors import ConfigError, ModelError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.sequence import BatchLimits
from extraction.engine.speculation import Speculate
from extraction.model import decode_probe
from extraction.model.decode_probe import check_decoding
from extraction.model.kv_cache import SlotCache
from extraction.model.loading import load, read_config, wrap
from extraction.model.memory import shape_of
from extraction.utils_batch import Request, generate
from tests.tiny import HIDDEN, HYBRID, LAYERS, MULTIMODAL, VOCABULARY, shared_model, tiny_model, tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10]])


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(name="tiny", source=str(folder), device="cpu")


# --- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "draft"])
def test_speculation_with_a_state_is_refused_by_role(role: str) -> None:
    states, plain = wrap(shared_model("mamba2")), wrap(shared_model("llama"))
    target, draft = (states, plain) if role == "target" else (plain, states)
    with pytest.raises(ModelError, match=role):
        ContinuousBatch(target, BatchLimits(2, 40, 8), strategy=Speculate(draft=draft))


def test_negative_control_states_that_do_not_follow_the_slots_are_caught_at_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shared_model("qwen3_next")
    lm = wrap(model)
    monkeypatch.setattr(decode_probe.ProbeText, "prefill", _prefill_row_by_row(swap=False))
    check_decoding(lm, "tiny")
    monkeypatch.setattr(decode_probe.ProbeText, "prefill", _prefill_row_by_row(swap=True))
    with pytest.raises(ModelError, match="tiny"):
        check_decoding(lm, "tiny")


def _prefill_row_by_row(*, swap: bool) -> Any:
    """Return a prefill that reads one row at a time and may then exchange the rows' states."""
    whole = decode_probe.ProbeText.prefill

    def prefill(text: decode_probe.ProbeText, rows: Any = (0, 1)) -> torch.Tensor:
        logits_BV = torch.cat([whole(text, (row,)) for row in rows])
        if swap:
            for layer in text.cache.slot_layers:
                for state in layer.states:
                    state.copy_(state.flip(0))
        return logits_BV

    return prefill


def test_prompts_of_unequal_length_are_read_apart_where_padding_reaches_a_state() -> None:
    lm = wrap(shared_model("lfm2_bias"))
    list(generate(lm, [Request("first", (3, 4), 1)], batch_size=1))  # the checks of the first run read texts too
    assert not lm.pads_prompts
    assert wrap(shared_model("lfm2")).pads_prompts
    read: list[torch.Size] = []
    handle = lm.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        lengths = (4, 4, 7, 4)
        requests = [Request(str(i), tuple(range(3, 3 + n)), 1) for i, n in enumerate(lengths)]
        list(generate(lm, requests, batch_size=4))
    finally:
        handle.remove()
    assert sorted(tuple(shape) for shape in read if shape[1] > 1) == [(1, 7), (3, 4)]


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "mamba", "lfm2", "minimax", "jamba", "llama"])
def test_the_bytes_of_a_rows_states_are_known_before_and_after_loading(name: str) -> None:
    lm = wrap(shared_model(name))
    shape = shape_of(lm.model.config.get_text_config(), torch.float32)
    assert shape.state_bytes == lm.state_bytes
    assert bool(lm.state_bytes) == (name in HYBRID)


def test_a_scan_that_differs_from_decoding_is_noted() -> None:
    assert "NemotronH" in " ".join(wrap(shared_model("nemotron_h")).notes)
    assert wrap(shared_model("mamba2")).notes == ()


# --- multimodal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl", "llava"])
def test_a_multimodal_model_loads_from_its_folder_without_the_parts_for_images(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load(spec(tmp_path))
    with torch.inference_mode():
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(lm.logits(IDS_BT, 6), whole(input_ids=IDS_BT).logits)
    assert lm.n_layers == LAYERS == read_config(spec(tmp_path)).num_hidden_layers
    count = [sum(p.numel() for p in each.parameters()) for each in (lm.model, whole)]
    assert count[0] < count[1]
    assert not [key for key, _ in lm.model.named_parameters() if "vis" in key]
    n_head = VOCABULARY * HIDDEN  # the text config may not say that the head is tied to the embeddings
    assert shape_of(read_config(spec(tmp_path)), torch.float32).n_parameters in (count[0], count[0] + n_head)
    assert name in MULTIMODAL


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_a_model_and_a_missing_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "small.Q4_0.gguf"
    file.write_bytes(b"GGUF")
    found = resolve_model(str(file), tmp_path)
    assert (found.name, found.source) == ("small.Q4_0", str(file))
    with pytest.raises(ConfigError, match=r"other\.gguf"):
        resolve_model(str(tmp_path / "other.gguf"), tmp_path)
    with pytest.raises(ModelError, match="small"):
        load(found)


def test_a_cache_of_a_models_own_class_is_one() -> None:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    from extraction.model.kv_cache import CacheWindow, make_cache

    cache = make_cache(shared_model("minimax"), CacheWindow(1, 4))
    assert isinstance(cache, SlotCache)
    assert isinstance(cache, MiniMaxCache)
    assert not isinstance(make_cache(shared_model("llama"), CacheWindow(1, 4)), MiniMaxCache)
