"""Pairs of models: sharing weights changes nothing, and different vocabularies are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.engine.generate import generate
from extraction.engine.logit_diff import Amplify
from extraction.engine.sampler import Sample
from extraction.engine.speculation import Speculate
from extraction.engine.steering import Steering
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load, wrap
from extraction.model.pairs import ModelPair, compatibility, load_pair, refuse_different, unshared_ids
from extraction.utils_batch import Capture, Completion, Request
from tests.lora import change_config, saved_adapter, saved_base
from tests.tiny import HIDDEN, VOCABULARY, deviation, prompts, shared_model, tiny_model, tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10], [40, 3, 77, 20, 31, 9]])


def spec(folder: Path | str, **options: Any) -> ModelSpec:
    return ModelSpec(name=Path(folder).name, source=str(folder), device="cpu", **options)


@torch.inference_mode()
def logits(lm: LanguageModel) -> torch.Tensor:
    return lm.logits(IDS_BT, IDS_BT.shape[1])


def pointers(lm: LanguageModel) -> dict[int, int]:
    """Return the address of each of a model's tensors, with its bytes."""
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    return {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return saved_adapter(tmp_path / "adapter", base)


# --- shared weights ---------------------------------------------------------------------------------------------------


def test_a_shared_pair_holds_one_copy_of_the_weights(adapter: Path, base: Path) -> None:
    pair = load_pair(spec(adapter), spec(base))
    after, before = pointers(pair.after), pointers(pair.before)
    assert pair.shares_weights
    assert pair.names == ("adapter", "base")
    assert before.items() <= after.items()
    added = sum(size for place, size in after.items() if place not in before)
    assert 0 < added == sum(p.numel() * 4 for name, p in pair.after.model.named_parameters() if "lora" in name)


def test_two_full_models_share_nothing(tmp_path: Path, base: Path) -> None:
    other = saved_base(tmp_path / "other", seed=5)
    pair = load_pair(spec(other), spec(base))
    assert not pair.shares_weights
    assert not pointers(pair.after).keys() & pointers(pair.before).keys()
    assert deviation(logits(pair.after), logits(load(spec(other)))) < 1e-5
    assert deviation(logits(pair.before), logits(load(spec(base)))) < 1e-5


ARRANGEMENTS: dict[str, tuple[str, str]] = {
    "after is the adapter": ("adapter", "base"),
    "before is the adapter": ("base", "adapter"),
    "two adapters of one base": ("adapter", "second"),
    "a model and itself": ("base", "base"),
    "an adapter and itself": ("adapter", "adapter"),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_models_of_a_shared_pair_equal_those_loaded_alone(tmp_path: Path, adapter: Path, base: Path, name: str) -> None:
    saved_adapter(tmp_path / "second", base, seed=2)
    after, before = (tmp_path / each for each in ARRANGEMENTS[name])
    pair = load_pair(spec(after), spec(before))
    assert pair.shares_weights
    assert deviation(logits(pair.after), logits(load(spec(after)))) < 1e-5
    assert deviation(logits(pair.before), logits(load(spec(before)))) < 1e-5
    assert (deviation(logits(pair.after), logits(pair.before)) > 1e-2) == (after != before)  # negative control


def biased(folder: Path) -> None:
    change_config(folder, bias="all")


def to_another_base(folder: Path) -> None:
    saved_base(folder.parent / "other", seed=9)
    change_config(folder, base_model_name_or_path="../other")


@pytest.mark.parametrize("change", [biased, to_another_base])
def test_weights_are_not_shared_if_the_adapter_changes_its_base(
    adapter: Path, base: Path, change: Callable[[Path], None]
) -> None:
    change(adapter)
    pair = load_pair(spec(adapter), spec(base))
    assert not pair.shares_weights
    assert deviation(logits(pair.before), logits(load(spec(base)))) < 1e-5


@pytest.mark.parametrize(("one", "other", "shares"), [("auto", "float32", True), ("bfloat16", "float32", False)])
def test_weights_are_shared_only_in_one_dtype(adapter: Path, base: Path, one: str, other: str, shares: bool) -> None:
    pair = load_pair(spec(adapter, dtype=one), spec(base, dtype=other))
    assert pair.shares_weights == shares
    assert pair.before.dtype == torch.float32


def test_hooks_on_one_model_do_not_affect_the_other(adapter: Path, base: Path) -> None:
    pair = load_pair(spec(adapter), spec(base))
    plain = logits(pair.before)
    seen = []
    handles = [layer.register_forward_hook(lambda *_: seen.append("after")) for layer in pair.after.layers]
    assert torch.equal(logits(pair.before), plain)
    assert seen == []
    logits(pair.after)
    assert len(seen) == pair.after.n_layers  # negative control: the hooks do fire
    for handle in handles:
        handle.remove()


def amplified_answers(pair: ModelPair, **options: Any) -> dict[str, Completion]:
    push = Steering(add={1: torch.linspace(-1, 1, HIDDEN)})
    requests = [
        Request(str(i), row, 8, seed=3, alpha=alpha, steering=push if i % 2 else None)
        for i, (row, alpha) in enumerate(zip(prompts(6), (0.0, 0.5, 2.0, -1.0, 1.0, 0.7), strict=True))
    ]
    strategy = Amplify(pair.before, Sample(temperature=1.0))
    return {c.id: c for c in generate(pair.after, requests, batch_size=4, strategy=strategy, **options)}


def test_amplification_steering_and_capture_are_equal_with_shared_weights(adapter: Path, base: Path) -> None:
    shared = load_pair(spec(adapter), spec(base))
    apart = ModelPair(load(spec(adapter)), load(spec(base)), "adapter", "base", False)
    capture = Capture((0, 1, 2))
    one, two = amplified_answers(shared, capture=capture), amplified_answers(apart, capture=capture)
    for name, expected in two.items():
        assert one[name].token_ids == expected.token_ids
        for key, tensor in expected.activations.items():
            assert deviation(one[name].activations[key], tensor) < 1e-4
    swapped = amplified_answers(ModelPair(apart.before, apart.after, "base", "adapter", False))
    assert [c.token_ids for c in swapped.values()] != [two[name].token_ids for name in swapped]  # negative control


# --- vocabularies -----------------------------------------------------------------------------------------------------


def with_tokens(change: Callable[[dict[str, Any]], None]) -> Any:
    """Return the tiny tokenizer with a changed vocabulary."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    change(content["model"]["vocab"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def swap_two(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def drop_the_last(vocabulary: dict[str, int]) -> None:
    vocabulary.pop(max(vocabulary, key=lambda token: vocabulary[token]))


def wrapped(tokenizer: Any = None, width: int = VOCABULARY) -> LanguageModel:
    model = shared_model("llama") if width == VOCABULARY else tiny_model("llama", vocab_size=width)
    return wrap(model, tokenizer)


def test_the_same_vocabulary_is_compatible() -> None:
    found = compatibility(wrapped(tiny_tokenizer()), wrapped(tiny_tokenizer()), ("one", "two"))
    assert found["compatible"]
    assert (found["problems"], found["notes"], found["first_differing_tokens"]) == ([], [], [])
    assert [facts["name"] for facts in found["models"]] == ["one", "two"]
    assert found["models"][0]["eos_token_id"] == 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_padded_logits_are_compatible_and_noted() -> None:
    found = compatibility(wrapped(tiny_tokenizer()), wrapped(tiny_tokenizer(), width=128))
    assert found["compatible"]
    assert "97" in found["notes"][0]
    assert "128" in found["notes"][0]


def move_the_last(vocabulary: dict[str, int]) -> None:
    drop_the_last(vocabulary)
    vocabulary["@"] = 100


@pytest.mark.parametrize(
    ("change", "first", "count"), [(swap_two, (10, "a", "b"), 2), (move_the_last, (96, "@", None), 2)]
)
def test_the_first_differing_token_is_named(change: Any, first: tuple[int, str, str | None], count: int) -> None:
    one, two = wrapped(tiny_tokenizer()), wrapped(with_tokens(change))
    found = compatibility(one, two)
    assert not found["compatible"]
    assert found["differing_tokens"] == count
    assert tuple(found["first_differing_tokens"][0].values()) == first
    with pytest.raises(ModelError, match=rf"left and right .* {first[0]}: '{first[1]}'") as caught:
        refuse_different(one, two, ("left", "right"))
    assert "\n" not in str(caught.value)


def rename_a_special(tokenizer: Any, name: str = "<|stop|>") -> Any:
    """Return the tiny tokenizer with another text at the id of a special token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = tokenizer.backend_tokenizer.to_str().replace(json.dumps("<|end|>"), json.dumps(name))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), **tokenizer.special_tokens_map)


def test_an_id_that_only_one_model_has_is_a_note() -> None:
    for one, other in ((tiny_tokenizer(), with_tokens(drop_the_last)), (with_tokens(drop_the_last), tiny_tokenizer())):
        first, second = wrapped(one), wrapped(other)
        found = compatibility(first, second)
        assert found["compatible"]
        assert (found["differing_tokens"], unshared_ids(first, second)) == (1, (96,))
        assert any("96" in note and "'@'" in note for note in found["notes"])
        refuse_different(first, second)


def test_a_special_token_of_another_name_is_a_note_and_an_ordinary_one_is_refused() -> None:
    whole = with_tokens(lambda _: None)
    first, second = wrapped(whole), wrapped(rename_a_special(whole))
    found = compatibility(first, second)
    assert (found["compatible"], found["differing_tokens"], unshared_ids(first, second)) == (True, 1, ())
    assert any("<|end|>" in note and "<|stop|>" in note for note in found["notes"])
    ordinary = wrapped(with_tokens(lambda vocabulary: vocabulary.update({"\u00a7": vocabulary.pop("@")})))
    with pytest.raises(ModelError, match=r"96: '@' and '\u00a7'"):
        refuse_different(wrapped(tiny_tokenizer()), ordinary)


N_SHARED = 90


def without_the_last_seven(vocabulary: dict[str, int]) -> None:
    for token in [token for token, number in vocabulary.items() if number >= N_SHARED]:
        vocabulary.pop(token)


@pytest.mark.parametrize("width", [N_SHARED, VOCABULARY])
@pytest.mark.parametrize("alpha", [0.0, 1.5, -0.5])
@torch.inference_mode()
def test_tokens_that_only_the_model_after_has_are_drawn_by_its_own_logits(alpha: float, width: int) -> None:
    """The reference reads one row without a cache; the heads are equally wide, or that of the model before is not."""
    after = wrap(tiny_model("llama", seed=3), tiny_tokenizer(), stop_ids=())
    before = wrap(tiny_model("llama", seed=4, vocab_size=width), with_tokens(without_the_last_seven), stop_ids=())
    after.model.get_output_embeddings().weight[N_SHARED:] *= 3  # so that these tokens are drawn

    def scores(ids: tuple[int, ...]) -> torch.Tensor:
        after_V = after.logits(torch.tensor([ids]), 1)[0, -1]
        before_V = before.logits(torch.tensor([ids]).clamp(max=width - 1), 1)[0, -1, :N_SHARED]
        return torch.cat([after_V[:N_SHARED] + alpha * (after_V[:N_SHARED] - before_V), after_V[N_SHARED:]])

    rows = prompts(4)
    strategy = Amplify(before, Sample(), alpha)
    done = {
        c.id: c
        for c in generate(
            after, [Request(str(i), row, 6) for i, row in enumerate(rows)], batch_size=2, strategy=strategy
        )
    }
    drawn = []
    for i, row in enumerate(rows):
        ids = tuple(row)
        for _ in range(6):
            ids += (int(scores(ids).argmax()),)
        assert done[str(i)].token_ids == ids[len(row) :]
        drawn += ids[len(row) :]
    assert max(drawn) >= N_SHARED  # negative control: one of those tokens was drawn


@pytest.mark.parametrize("depth", [1, 4])
def test_a_draft_without_some_of_the_tokens_gives_the_targets_own_tokens(depth: int) -> None:
    target = wrap(tiny_model("llama", seed=3), tiny_tokenizer(), stop_ids=())
    draft = wrap(tiny_model("llama", seed=4, vocab_size=N_SHARED), with_tokens(without_the_last_seven), stop_ids=())
    with torch.inference_mode():
        target.model.get_output_embeddings().weight[N_SHARED:] *= 3
    requests = [Request(str(i), row, 8) for i, row in enumerate(prompts(4))]
    plain, drafted = (
        {c.id: c.token_ids for c in generate(target, requests, batch_size=3, strategy=strategy)}
        for strategy in (Sample(), Speculate(draft, Sample(), depth))
    )
    assert drafted == plain
    assert max(token for row in plain.values() for token in row) >= N_SHARED  # negative control


def test_other_chat_templates_and_stop_ids_are_notes() -> None:
    other = tiny_tokenizer()
    other.chat_template, other.eos_token = "{{ messages }}", "<|end|>"
    notes = compatibility(wrapped(tiny_tokenizer()), wrapped(other))["notes"]
    assert any("chat templates" in note for note in notes)
    assert any("[2] and [2, 7]" in note for note in notes)
    refuse_different(wrapped(tiny_tokenizer()), wrapped(other))


def test_without_tokenizers_sizes_are_compared() -> None:
    refuse_different(wrapped(), wrapped())
    with pytest.raises(ModelError, match=r"97 .*128"):
        refuse_different(wrapped(), wrapped(width=128))


def test_a_pair_with_different_vocabularies_is_refused(tmp_path: Path, base: Path) -> None:
    other = saved_base(tmp_path / "other")
    with_tokens(swap_two).save_pretrained(other)
    with pytest.raises(ModelError, match="other and base"):
        load_pair(spec(other), spec(base))
