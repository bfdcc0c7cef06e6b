"""Two models at once when one of them breaks: NaN in a row, in the draft, in a proposal that is not taken.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.core.errors import ActivationError, ModelError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.generate import generate
from extraction.engine.logit_diff import Amplify
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits
from extraction.engine.speculation import Speculate
from extraction.model.loading import LanguageModel, wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import blocks, prompts, reference_greedy, shared_model, tiny_model, tiny_tokenizer
from tests.two_models import amplified_response, noisy_model

SOME = pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom"])
N_TOKENS = 8


@cache
def asked(name: str) -> tuple[Request, ...]:
    """Seven prompts."""
    return tuple(Request(f"e{i}", prompt, N_TOKENS) for i, prompt in enumerate(prompts(7, seed=3)))


@cache
def greedy(name: str) -> dict[str, tuple[int, ...]]:
    """What the model says alone."""
    return {r.id: reference_greedy(shared_model(name), r.token_ids, N_TOKENS) for r in asked(name)}


@cache
def unheard(name: str) -> int:
    """A token that stands in no prompt and no answer."""
    heard = {t for r in asked(name) for t in r.token_ids} | {t for said in greedy(name).values() for t in said}
    return next(token for token in range(3, 97) if token not in heard)


def advanced(
    lm: LanguageModel, requests: Sequence[Request], slots: int, strategy: Any, capture: Capture | None = None
) -> dict[str, Completion]:
    """All completions, faults included."""
    batch = ContinuousBatch(lm, BatchLimits.of(requests, slots), strategy=strategy, capture=capture)
    batch.add(requests)
    done: list[Completion] = []
    with batch.attached():
        while batch.has_work:
            done += batch.step().completions
    assert sorted(c.id for c in done) == sorted(r.id for r in requests)
    return {c.id: c for c in done}


@contextmanager
def broken(model: Any, where: Callable[[Tensor], Tensor], *, at: Any = None) -> Iterator[None]:
    """NaN wherever `where(ids)` [B, T] holds: in the logits, or in what a block (`at`) gives, hence in the cache."""
    seen: list[Tensor] = []

    def note(_module: Any, args: Any) -> None:
        seen[:] = [args[0]]

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output
        bad_BT1 = where(seen[0])[:, -hidden.shape[1] :].unsqueeze(-1)
        spoilt = hidden.masked_fill(bad_BT1, float("nan"))
        if hasattr(output, "logits"):
            output.logits = spoilt
            return output
        return (spoilt, *output[1:]) if isinstance(output, tuple) else spoilt

    handles = [
        model.get_input_embeddings().register_forward_pre_hook(note),
        (model if at is None else at).register_forward_hook(spoil),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def insisting(model: Any, token: int) -> Iterator[None]:
    """A model that wants nothing but one token at every third position."""

    def insist(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        positions_BT = kwargs["position_ids"][:, -output.logits.shape[1] :]
        wanted_BT1 = (positions_BT % 3 == 0).unsqueeze(-1)
        only_V = torch.zeros(output.logits.shape[-1]).index_fill(0, torch.tensor(token), 1e3)
        output.logits = torch.where(wanted_BT1, only_V, output.logits)

    handle = model.register_forward_hook(insist, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def with_bad(name: str, n_bad: int = 2) -> list[Request]:
    """The prompts, with some among them that end in the token that nobody else meets."""
    bad = [Request(f"bad{i}", (5, 6, 7 + i, unheard(name)), N_TOKENS) for i in range(n_bad)]
    sound = list(asked(name))
    return [*sound[:2], *bad, *sound[2:]]


# --- a row that breaks -----------------------------------------------------------------------------------------------


@SOME
@pytest.mark.parametrize("kind", ["draft", "lookup", "amplified"])
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_a_row_of_nan_fails_alone_and_what_it_leaves_behind_harms_nobody(name: str, kind: str, slots: int) -> None:
    """NaN comes out of the first block, so it goes into the cache of the slot that the next request takes."""
    model = tiny_model(name)
    lm = wrap(model, stop_ids=())
    other = wrap(noisy_model(name), stop_ids=())
    strategies = {"draft": Speculate(other), "lookup": Speculate(None), "amplified": Amplify(other, alpha=0.5)}
    wanted = greedy(name)
    if kind == "amplified":
        wanted = {r.id: amplified_response(shared_model(name), other.model, r, 0.5) for r in asked(name)}
    token = unheard(name)
    if any(token in said for said in wanted.values()):
        pytest.skip("the amplified answers say the token that breaks")
    with broken(model, lambda ids_BT: ids_BT == token, at=blocks(model)[0]):
        done = advanced(lm, with_bad(name), slots, strategies[kind])
    assert {key: c.token_ids for key, c in done.items() if key in wanted} == wanted
    for key in ("bad0", "bad1"):
        assert (done[key].finish_reason, done[key].token_ids) == ("failed", ())
        assert isinstance(done[key].fault, ActivationError)
        assert key in str(done[key].fault)
        assert "\n" not in str(done[key].fault)


@pytest.mark.parametrize("slots", [1, 3, 9])
def test_nan_of_the_model_before_fails_its_row_alone(slots: int) -> None:
    name = "llama"
    before = tiny_model(name, seed=1)
    after = wrap(shared_model(name), stop_ids=())
    wanted = {r.id: amplified_response(after.model, before, r, 0.2) for r in asked(name)}
    token = next(
        t
        for t in range(3, 97)
        if not any(t in (*r.token_ids, *wanted[r.id]) for r in asked(name)) and t not in (5, 6, 7)
    )
    bad = Request("bad", (5, 6, token), N_TOKENS)
    strategy = Amplify(wrap(before, stop_ids=()), alpha=0.2)
    with broken(before, lambda ids_BT: ids_BT == token, at=blocks(before)[0]):
        done = advanced(after, [*asked(name)[:3], bad, *asked(name)[3:]], slots, strategy)
    assert done["bad"].finish_reason == "failed"
    assert {key: c.token_ids for key, c in done.items() if key != "bad"} == wanted


def test_generate_raises_what_a_running_batch_tells() -> None:
    model, token = tiny_model("llama"), unheard("llama")
    with broken(model, lambda ids_BT: ids_BT == token), pytest.raises(ActivationError, match="bad0"):
        list(generate(wrap(model, stop_ids=()), with_bad("llama"), batch_size=3, strategy=Speculate(None)))


# --- a draft that breaks ---------------------------------------------------------------------------------------------


@SOME
@pytest.mark.parametrize("sample", [Sample(), Sample(0.8)], ids=["greedy", "sampled"])
def test_a_draft_of_nan_costs_time_and_nothing_else(name: str, sample: Sample) -> None:
    draft = tiny_model(name, seed=2)
    lm, strategy = wrap(shared_model(name), stop_ids=()), Speculate(wrap(draft, stop_ids=()), sample)
    with broken(draft, lambda ids_BT: ids_BT % 3 == 0):
        alone = {r.id: advanced(lm, [r], 1, strategy)[r.id].token_ids for r in asked(name)}
        for slots in (3, 7):
            done = advanced(lm, asked(name), slots, strategy)
            assert {key: c.token_ids for key, c in done.items()} == alone
    assert {c.finish_reason for c in done.values()} == {"length"}
    if not sample.draws:
        assert alone == greedy(name)


@SOME
@pytest.mark.parametrize("deep", [False, True], ids=["logits", "cache"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_proposal_that_would_break_the_target_does_no_harm_once_it_is_rejected(
    name: str, deep: bool, adaptive: bool
) -> None:
    """Alone, the target would never have read that token; its NaN must not stay in the cache behind a mask."""
    model, draft, token = tiny_model(name), tiny_model(name), unheard(name)
    strategy = Speculate(wrap(draft, stop_ids=()), depth=4, adaptive=adaptive)
    lm = wrap(model, stop_ids=())
    spoilt = broken(model, lambda ids_BT: ids_BT == token, at=blocks(model)[0] if deep else None)
    with insisting(draft, token), spoilt:
        for slots, capture in ((1, None), (3, Capture((0, 2))), (7, None)):
            done = advanced(lm, asked(name), slots, strategy, capture)
            assert {key: c.token_ids for key, c in done.items()} == greedy(name)
            assert {c.finish_reason for c in done.values()} == {"length"}
            assert all(kept.isfinite().all() for c in done.values() for kept in c.activations.values())


# --- precision and padded heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@SOME
def test_in_half_precision_speculation_runs_to_every_budget(name: str, dtype: torch.dtype) -> None:
    lm = wrap(shared_model(name, dtype), stop_ids=())
    drafts = (wrap(noisy_model(name, dtype=dtype), stop_ids=()), wrap(noisy_model(name), stop_ids=()), None)
    for draft in drafts:
        for sample in (Sample(), Sample(0.8, top_p=0.9)):
            for capture in (None, Capture((0,), poolings=("response_mean", "all"))):
                done = advanced(lm, asked(name), 3, Speculate(draft, sample), capture)
                assert {(len(c.token_ids), c.finish_reason) for c in done.values()} == {(N_TOKENS, "length")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_a_draft_of_another_dtype_changes_no_greedy_token(dtype: torch.dtype) -> None:
    draft = wrap(noisy_model("llama", dtype=dtype), stop_ids=())
    done = advanced(wrap(shared_model("llama"), stop_ids=()), asked("llama"), 3, Speculate(draft))
    assert {key: c.token_ids for key, c in done.items()} == greedy("llama")


@pytest.mark.parametrize("width", [104, 128])
def test_heads_with_more_rows_than_the_tokenizer_has_tokens_go_together(width: int) -> None:
    """Qwen's models of different sizes pad their heads differently; the tokenizer is the same."""
    tokenizer = tiny_tokenizer()
    lm = wrap(shared_model("llama"), tokenizer, stop_ids=())
    wide = wrap(tiny_model("llama", seed=3, vocab_size=width), tokenizer, stop_ids=())
    requests = [replace(r, seed=1) for r in asked("llama")]
    for target, other in ((lm, wide), (wide, lm)):
        plain = {c.id: c.token_ids for c in generate(target, requests, batch_size=3)}
        done = advanced(target, requests, 3, Speculate(other))
        assert {key: c.token_ids for key, c in done.items() if max(plain[key]) < 97} == {
            key: said for key, said in plain.items() if max(said) < 97
        }
        for sample in (Sample(), Sample(1.0)):
            done = advanced(target, requests, 3, Amplify(other, sample, alpha=0.5))
            assert max(token for c in done.values() for token in c.token_ids) < 97


def test_tokenizers_that_differ_are_refused_though_their_sizes_agree() -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    words = other.get_vocab()
    swapped = {"a": words["b"], "b": words["a"]}
    other._tokenizer.model = _word_level(words | swapped)
    lm = wrap(shared_model("llama"), tokenizer, stop_ids=())
    stranger = wrap(tiny_model("gpt2"), other, stop_ids=())
    for strategy in (Speculate(stranger), Amplify(stranger)):
        with pytest.raises(ModelError) as caught:
            advanced(lm, asked("llama"), 2, strategy)
        assert "\n" not in str(caught.value)


def _word_level(words: dict[str, int]) -> Any:
    from tokenizers import models

    return models.WordLevel(words, unk_token="<unk>")
