"""The local judge: its score equals the mean of a softmax computed by hand, in a batch as alone."""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from extraction.config.experiments import resolve_model
from extraction.core.errors import ModelError
from extraction.judging.base import Rating
from extraction.judging.local import TOO_LONG, encode_rubric, rate_texts
from extraction.judging.number_probabilities import Spellings, number_probabilities, spell_numbers
from extraction.judging.rubric import COHERENCE, NO_NUMBER, fill
from extraction.model.kv_cache import SlotCache
from extraction.model.language_model import LanguageModel
from extraction.model.loading import read_tokenizer, wrap
from tests.runs import contents, demo_rows, make_root, refused, succeed
from tests.tiny import VOCABULARY, prompts, tiny_model, tiny_tokenizer

NUMBER_VOCABULARY = 220
TEXTS = {f"k{i}": fill(COHERENCE, "Why?", "because " * i) for i in range(1, 6)}


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every character and for every number from 0 to 100."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    plain = tiny_tokenizer()
    words = sorted(plain.get_vocab(), key=plain.get_vocab().__getitem__)
    words += [str(number) for number in range(10, 101)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\D"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:8]])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = plain.chat_template
    return tokenizer


def number_model() -> PreTrainedModel:
    """Return a model whose numbers are probable enough for a score: other tokens' logits are small."""
    sizes = {"vocab_size": NUMBER_VOCABULARY, "max_position_embeddings": 2048}
    model = tiny_model("llama", tie_word_embeddings=False, **sizes)
    numbers = set(number_tokenizer().convert_tokens_to_ids([str(number) for number in range(101)]))
    model.lm_head.weight.data[sorted(set(range(NUMBER_VOCABULARY)) - numbers)] *= 0.1
    return model


def judge_of(kind: str) -> tuple[LanguageModel, Spellings]:
    """A tiny judge whose numbers are `single` tokens, or digits."""
    tokenizer, model = {
        "single": (number_tokenizer, number_model),
        "digits": (tiny_tokenizer, lambda: tiny_model("llama", max_position_embeddings=2048)),
        "states": (tiny_tokenizer, lambda: tiny_model("falcon_h1", max_position_embeddings=2048)),
    }[kind]
    lm = wrap(model(), tokenizer())
    return lm, spell_numbers(lm.tokenizer, kind)


def collected(lm: LanguageModel, texts: dict[str, str], **options: int) -> dict[str, Rating]:
    found: dict[str, Rating] = {}
    rate_texts(lm, "tiny", texts, found.update, **options)
    return found


@torch.no_grad()
def next_of(lm: LanguageModel, ids: tuple[int, ...]) -> torch.Tensor:
    """The plain model's next-token probabilities: one row, no pads, no cache, float64."""
    return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)


def by_hand(lm: LanguageModel, ids: tuple[int, ...], spellings: Spellings) -> list[float]:
    """P(n) of every number: the product of its tokens, times the chance that no further digit of a number follows."""
    found = [0.0] * 101
    next_after = functools.cache(lambda path: next_of(lm, (*ids, *path)))
    for path, number in spellings.numbers.items():
        chance = 1.0
        for i, token in enumerate(path):
            chance *= float(next_after(path[:i])[token])
        longer = {
            other[len(path)] for other in spellings.numbers if len(other) > len(path) and other[: len(path)] == path
        }
        if longer:
            chance *= 1 - float(next_after(path)[sorted(longer)].sum())
        found[number] += chance
    return found


@pytest.mark.parametrize("kind", ["single", "digits", "states"])
def test_the_weights_are_those_of_a_softmax_by_hand(kind):
    lm, spellings = judge_of(kind)
    assert spellings.description == ("number tokens" if kind == "single" else "numbers of several tokens")
    ids = encode_rubric(lm, "Rate 1 of 2.")
    got = number_probabilities(lm, [ids], spellings)[0].double()
    wanted = torch.tensor(by_hand(lm, ids, spellings)).double()
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-9)
    assert wanted.std() > 1e-4
    assert not torch.allclose(got, torch.tensor(by_hand(lm, ids[:-1], spellings)).double(), rtol=1e-2)


def test_negative_control_a_state_that_is_not_put_back_gives_other_weights(monkeypatch):
    lm, spellings = judge_of("states")
    ids = encode_rubric(lm, "Rate 1 of 2.")
    wanted = number_probabilities(lm, [ids], spellings)
    monkeypatch.setattr(SlotCache, "restore_states", lambda cache, saved: None)
    assert not torch.allclose(number_probabilities(lm, [ids], spellings), wanted, rtol=1e-2)


def test_the_score_is_the_mean_over_the_101_number_tokens():
    lm, _ = judge_of("single")
    rating = collected(lm, {"a": "Rate it."})["a"]
    numbers = torch.tensor([lm.tokenizer.convert_tokens_to_ids(str(n)) for n in range(101)])
    logits = lm.model(input_ids=torch.tensor([encode_rubric(lm, "Rate it.")])).logits[0, -1, numbers]
    mean = float((logits.double().softmax(-1) * torch.arange(101)).sum())
    assert rating.score == pytest.approx(mean, rel=1e-4)
    assert rating.how == "number tokens"
    assert rating.reason is None


def test_numbers_that_weigh_little_are_no_score():
    lm, spellings = judge_of("digits")  # a random model: its numbers weigh as little as anything else
    rating = collected(lm, {"a": "Rate it."})["a"]
    weight = float(number_probabilities(lm, [encode_rubric(lm, "Rate it.")], spellings).sum())
    assert 0 < weight < 0.25
    assert (rating.score, rating.reason) == (None, NO_NUMBER)


def test_a_judge_without_any_score_is_stopped_after_its_first_answers_and_nothing_is_kept():
    lm, _ = judge_of("digits")
    texts = {f"k{i}": f"Rate {'x' * i}." for i in range(40)}
    found: dict[str, Rating] = {}
    with pytest.raises(ModelError, match=r"--judge-model tiny.* 12 .*no number"):
        rate_texts(lm, "tiny", texts, found.update, batch_size=4)
    assert found == {}
    few = dict(list(texts.items())[:9])
    assert len(collected(lm, few, batch_size=4)) == 9  # the control: too few to tell


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bloom", "gemma2", "mistral", "gpt_neo", "falcon_h1", "mamba", "qwen3_next"]
)
def test_in_a_batch_as_alone(name):
    lm = wrap(tiny_model(name), tiny_tokenizer())
    spellings = spell_numbers(lm.tokenizer, name)
    asked = prompts(6)
    together = number_probabilities(lm, asked, spellings)
    alone = torch.cat([number_probabilities(lm, [ids], spellings) for ids in asked])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-8)
    short = asked[1]
    seen_pads = number_probabilities(lm, [(lm.pad_id,) * 8 + tuple(short)], spellings)
    assert not torch.allclose(seen_pads, alone[1:2], rtol=1e-2)


def test_the_batch_size_and_the_order_change_nothing():
    lm, _ = judge_of("single")
    base = collected(lm, TEXTS)
    turned = dict(reversed(TEXTS.items()))
    for texts, size in itertools.product((TEXTS, turned), (1, 3)):
        found = collected(lm, texts, batch_size=size)
        assert found.keys() == base.keys()
        assert all(found[key].score == pytest.approx(base[key].score, abs=1e-3) for key in base)
    assert len({round(rating.score, 3) for rating in base.values()}) > 1


def test_a_text_longer_than_the_judges_positions_is_missing():
    lm = wrap(tiny_model("llama"), tiny_tokenizer())
    found = collected(lm, {"short": "Rate.", "long": "Rate. " * 40})
    assert (found["long"].score, found["long"].reason) == (None, TOO_LONG)
    assert found["short"].reason != TOO_LONG


def test_a_judge_without_a_chat_template_gets_a_cue():
    lm, _ = judge_of("single")
    lm.tokenizer.chat_template = None
    assert lm.tokenizer.decode(list(encode_rubric(lm, "Rate it.\n"))) == "Rate it.\n\nScore:"


def test_a_rubric_may_contain_the_text_of_a_control_token():
    lm, _ = judge_of("single")
    harmless, hostile = (encode_rubric(lm, f"Rate {text} now") for text in ("x", "<|end|>"))
    assert lm.tokenizer.convert_tokens_to_ids("<|end|>") in harmless  # the template's own
    ends = [ids.count(lm.tokenizer.convert_tokens_to_ids("<|end|>")) for ids in (harmless, hostile)]
    assert ends[0] == ends[1]


def test_the_bundled_tokenizer_and_one_of_digits_can_write_every_number(tmp_path):
    for tokenizer in (read_tokenizer(resolve_model("pocket", tmp_path)), tiny_tokenizer()):
        spellings = spell_numbers(tokenizer, "x")
        assert set(spellings.numbers.values()) == set(range(101))
        for path, number in spellings.numbers.items():
            assert tokenizer.decode(list(path)).strip() == str(number)


def test_a_number_is_known_with_and_without_the_mark_of_a_texts_start():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "\u2581", "\n", *"0123456789"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    mark = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([mark, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)
    spellings = spell_numbers(tokenizer, "x")
    marked, eight, five = (words.index(word) for word in ("\u2581", "8", "5"))
    assert spellings.numbers[(marked, eight, five)] == spellings.numbers[(eight, five)] == 85


def test_a_tokenizer_without_digits_is_refused():
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "5": 2}, unk_token="<unk>"))
    with pytest.raises(ModelError, match="100 of the numbers"):
        spell_numbers(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), "x")


def test_logits_that_are_nan_are_an_error_not_a_score():
    lm, _ = judge_of("single")
    lm.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        collected(lm, TEXTS)


def test_memory_that_runs_out_halves_the_batch():
    lm, _ = judge_of("single")
    wanted = collected(lm, TEXTS)
    sizes: list[int] = []
    with _room_for(2, sizes):
        found = collected(lm, TEXTS, batch_size=5)
    assert max(sizes) == 5
    assert all(found[key].score == pytest.approx(wanted[key].score, abs=1e-3) for key in TEXTS)
    with _room_for(0, sizes), pytest.raises(ModelError, match="out of memory"):
        collected(lm, TEXTS)


@contextmanager
def _room_for(n_rows: int, sizes: list[int]) -> Iterator[None]:
    """More rows than this in one pass, and memory is out."""

    def hook(module: torch.nn.Module, _args: object, output: object) -> None:
        if module.__class__.__name__ == "LlamaDecoderLayer":
            sizes.append(output.shape[0])
            if output.shape[0] > n_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- in a run -------------------------------------------------------------------------------------------------------


def save_judge(root: Path, name: str, model: PreTrainedModel) -> None:
    model.save_pretrained(root / name)
    number_tokenizer().save_pretrained(root / name)
    (root / "configs/models" / f"{name}.yaml").write_text(f"path: {name}\n")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with responses and two judges: one whose scores depend on the text, one that gives 50 to everything."""
    root = make_root(tmp_path_factory.mktemp("generated"))
    save_judge(root, "eager", number_model())
    dull = number_model()
    dull.model.norm.weight.data.zero_()
    save_judge(root, "dull", dull)
    succeed("batched", "--root", root, "--experiment", "demo")
    return root


@pytest.fixture
def root(generated: Path, tmp_path: Path) -> Path:
    """A copy of that root."""
    return Path(shutil.copytree(generated, tmp_path / "root"))


LOCAL = ("--experiment", "demo", "--judge", "local", "--judge-model")


def test_a_run_is_judged_once_and_kept_in_the_log(root):
    options = ("--root", root, *LOCAL, "eager", "--coherence-threshold", "0")
    first = succeed("batched", *options)
    assert "loading the judge eager" in first.stderr
    rows = demo_rows(root)
    scores = [row["scores"]["local"] for row in rows if row["token_ids"]]
    assert max(scores) - min(scores) > 5
    assert all(set(row["scores"]) == {"local", "local_coherence"} for row in rows)
    assert {row["judged"]["how"] for row in rows if row["response"].strip()} == {"number tokens"}
    before = contents(root / "experiments/demo/calm")
    for side in ("pos", "neg"):
        (root / f"experiments/demo/calm/responses/{side}.jsonl").unlink()
    second = succeed("batched", *options)
    assert "loading the judge" not in second.stderr
    assert contents(root / "experiments/demo/calm") == before
    assert "local judge eager" in first.stdout
    middle = str(statistics.median(scores))
    assert "mean_diff" in succeed("vectors", *options, "--method", "mean_diff", "--threshold", middle).stdout


def test_a_judge_with_the_same_score_for_everything_is_refused(root):
    shown = succeed("batched", "--root", root, *LOCAL, "dull").stdout
    assert "(50)" in shown
    line = refused("vectors", "--root", root, *LOCAL, "dull")
    assert "local judge dull" in line
    assert "(50)" in line
    assert not list((root / "experiments/demo/calm/vectors").glob("*.safetensors"))
    assert "mean_diff" in succeed("vectors", "--root", root, "--experiment", "demo", "--judge", "lexical").stdout


def test_an_unknown_or_unable_judge_is_refused_before_anything_is_made(root):
    shutil.rmtree(root / "experiments")
    assert "'eager'" in refused("extract", "--root", root, *LOCAL, "eagr")
    assert "--judge-model" in refused("extract", "--root", root, "--experiment", "demo", "--judge", "local")
    save_judge(root, "mute", tiny_model("llama"))
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "Words": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = __import__("tokenizers").pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(root / "mute")
    assert "101 of the numbers" in refused("extract", "--root", root, *LOCAL, "mute")
    assert not (root / "experiments").exists()


def test_the_vocabulary_of_the_tiny_models_holds_no_numbers_but_digits():
    assert VOCABULARY < 101
