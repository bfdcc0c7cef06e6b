"""Faults with two models at once: NaN in a row, in the draft, in a rejected proposal; half precision; padded heads.

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
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import blocks, prompts, reference_greedy, shared_model, tiny_model, tiny_tokenizer
from tests.two_models import amplified_response, noisy_model

FAMILIES = pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom"])
N_TOKENS = 8


REQUESTS = tuple(Request(f"e{i}", prompt, N_TOKENS) for i, prompt in enumerate(prompts(7, seed=3)))


@cache
def greedy(name: str) -> dict[str, tuple[int, ...]]:
    """Return the greedy tokens of each request by transformers."""
    return {r.id: reference_greedy(shared_model(name), r.token_ids, N_TOKENS) for r in REQUESTS}


@cache
def amplified(name: str) -> dict[str, tuple[int, ...]]:
    """Return the greedy tokens of each request with the noisy model's difference at alpha 0.5, by hand."""
    return {r.id: amplified_response(shared_model(name), noisy_model(name), r, 0.5) for r in REQUESTS}


@cache
def unused_token(name: str) -> int:
    """Return a token that is in no prompt and no greedy response."""
    used = {t for r in REQUESTS for t in r.token_ids} | {t for tokens in greedy(name).values() for t in tokens}
    return next(token for token in range(3, 97) if token not in used)


def run_all(
    lm: LanguageModel, requests: Sequence[Request], slots: int, strategy: Any, capture: Capture | None = None
) -> dict[str, Completion]:
    """Return all completions, including failed ones."""
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
    """Plant NaN where `where(ids)` [B, T] is true: in the logits, or in a block's output (`at`), hence in the cache."""
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
    """Make a model propose one token at every third position."""

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
    """Return the requests with some among them that end in the unused token."""
    bad = [Request(f"bad{i}", (5, 6, 7 + i, unused_token(name)), N_TOKENS) for i in range(n_bad)]
    sound = list(REQUESTS)
    return [*sound[:2], *bad, *sound[2:]]


# --- a row that breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slots"), [("llama", 1), ("llama", 3), ("llama", 9), ("gpt2", 3), ("mistral", 1), ("bloom", 3)]
)
@pytest.mark.parametrize("kind", ["draft", "lookup", "amplified"])
def test_a_row_of_nan_fails_alone_and_its_cache_does_not_reach_other_rows(name: str, kind: str, slots: int) -> None:
    """NaN comes out of the first block, so it enters the KV cache of the slot that the next request takes."""
    model = tiny_model(name)
    lm = wrap(model, stop_ids=())
    other = wrap(noisy_model(name), stop_ids=())
    strategies = {"draft": Speculate(other), "lookup": Speculate(None), "amplified": Amplify(other, alpha=0.5)}
    wanted = amplified(name) if kind == "amplified" else greedy(name)
    token = unused_token(name)
    if any(token in tokens for tokens in wanted.values()):
        pytest.skip("the amplified responses hold the faulty token")
    with broken(model, lambda ids_BT: ids_BT == token, at=blocks(model)[0]):
        done = run_all(lm, with_bad(name), slots, strategies[kind])
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
    wanted = {r.id: amplified_response(after.model, before, r, 0.2) for r in REQUESTS}
    token = next(
        t for t in range(3, 97) if not any(t in (*r.token_ids, *wanted[r.id]) for r in REQUESTS) and t not in (5, 6, 7)
    )
    bad = Request("bad", (5, 6, token), N_TOKENS)
    strategy = Amplify(wrap(before, stop_ids=()), alpha=0.2)
    with broken(before, lambda ids_BT: ids_BT == token, at=blocks(before)[0]):
        done = run_all(after, [*REQUESTS[:3], bad, *REQUESTS[3:]], slots, strategy)
    assert done["bad"].finish_reason == "failed"
    assert {key: c.token_ids for key, c in done.items() if key != "bad"} == wanted


def test_generate_raises_the_fault_of_a_row() -> None:
    model, token = tiny_model("llama"), unused_token("llama")
    with broken(model, lambda ids_BT: ids_BT == token), pytest.raises(ActivationError, match="bad0"):
        list(generate(wrap(model, stop_ids=()), with_bad("llama"), batch_size=3, strategy=Speculate(None)))


# --- a draft that breaks ---------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("sample", [Sample(), Sample(0.8)], ids=["greedy", "sampled"])
def test_a_draft_with_nan_changes_no_token(name: str, sample: Sample) -> None:
    draft = tiny_model(name, seed=2)
    lm, strategy = wrap(shared_model(name), stop_ids=()), Speculate(wrap(draft, stop_ids=()), sample)
    with broken(draft, lambda ids_BT: ids_BT % 3 == 0):
        wanted = (
            {r.id: run_all(lm, [r], 1, strategy)[r.id].token_ids for r in REQUESTS} if sample.draws else greedy(name)
        )
        for slots in (3, 7):
            done = run_all(lm, REQUESTS, slots, strategy)
            assert {key: c.token_ids for key, c in done.items()} == wanted
    assert {c.finish_reason for c in done.values()} == {"length"}


@FAMILIES
@pytest.mark.parametrize(("deep", "adaptive"), [(False, True), (True, False)], ids=["logits", "cache"])
def test_a_rejected_proposal_with_nan_in_the_target_changes_no_token(name: str, deep: bool, adaptive: bool) -> None:
    """Alone, the target would never have read that token; its NaN must not stay in the cache behind a mask."""
    model, draft, token = tiny_model(name), tiny_model(name), unused_token(name)
    strategy = Speculate(wrap(draft, stop_ids=()), depth=4, adaptive=adaptive)
    lm = wrap(model, stop_ids=())
    spoilt = broken(model, lambda ids_BT: ids_BT == token, at=blocks(model)[0] if deep else None)
    with insisting(draft, token), spoilt:
        for slots, capture in ((1, None), (3, Capture((0, 2))), (7, None)):
            done = run_all(lm, REQUESTS, slots, strategy, capture)
            assert {key: c.token_ids for key, c in done.items()} == greedy(name)
            assert {c.finish_reason for c in done.values()} == {"length"}
            assert all(kept.isfinite().all() for c in done.values() for kept in c.activations.values())


# --- precision and padded heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float16), *((name, torch.bfloat16) for name in ("llama", "gpt2", "mistral", "bloom"))],
    ids=str,
)
def test_in_half_precision_speculation_runs_to_every_budget(name: str, dtype: torch.dtype) -> None:
    lm = wrap(shared_model(name, dtype), stop_ids=())
    drafts = (wrap(noisy_model(name, dtype=dtype), stop_ids=()), wrap(noisy_model(name), stop_ids=()), None)
    for draft in drafts:
        for sample, capture in (
            (Sample(), Capture((0,), poolings=("response_mean", "all"))),
            (Sample(0.8, top_p=0.9), None),
        ):
            done = run_all(lm, REQUESTS, 3, Speculate(draft, sample), capture)
            assert {(len(c.token_ids), c.finish_reason) for c in done.values()} == {(N_TOKENS, "length")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_a_draft_of_another_dtype_changes_no_greedy_token(dtype: torch.dtype) -> None:
    draft = wrap(noisy_model("llama", dtype=dtype), stop_ids=())
    done = run_all(wrap(shared_model("llama"), stop_ids=()), REQUESTS, 3, Speculate(draft))
    assert {key: c.token_ids for key, c in done.items()} == greedy("llama")


def test_models_whose_output_matrices_are_padded_differently_can_be_combined() -> None:
    """Qwen's models of different sizes do so; the tokenizer is the same."""
    tokenizer = tiny_tokenizer()
    lm = wrap(shared_model("llama"), tokenizer, stop_ids=())
    wide = wrap(tiny_model("llama", seed=3, vocab_size=128), tokenizer, stop_ids=())
    requests = [replace(r, seed=1) for r in REQUESTS]
    for target, other in ((lm, wide), (wide, lm)):
        plain = {c.id: c.token_ids for c in generate(target, requests, batch_size=3)}
        done = run_all(target, requests, 3, Speculate(other))
        assert {key: c.token_ids for key, c in done.items() if max(plain[key]) < 97} == {
            key: tokens for key, tokens in plain.items() if max(tokens) < 97
        }
        for sample in (Sample(), Sample(1.0)):
            done = run_all(target, requests, 3, Amplify(other, sample, alpha=0.5))
            assert max(token for c in done.values() for token in c.token_ids) < 97


def test_tokenizers_of_one_size_that_differ_are_refused() -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    words = other.get_vocab()
    swapped = {"a": words["b"], "b": words["a"]}
    other._tokenizer.model = _word_level(words | swapped)
    lm = wrap(shared_model("llama"), tokenizer, stop_ids=())
    stranger = wrap(tiny_model("gpt2"), other, stop_ids=())
    for strategy in (Speculate(stranger), Amplify(stranger)):
        with pytest.raises(ModelError) as caught:
            run_all(lm, REQUESTS, 2, strategy)
        assert "\n" not in str(caught.value)


def _word_level(words: dict[str, int]) -> Any:
    from tokenizers import models

    return models.WordLevel(words, unk_token="<unk>")
