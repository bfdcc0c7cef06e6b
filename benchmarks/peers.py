"""Other implementations of the same job, each in its fastest configuration.

With transformers the job takes two stages: responses, then a second pass over prompt and response that returns the
hidden states. It gets every advantage: rows sorted by length, no language-model head and no mask in the second pass,
the best of several batch sizes.

Shapes: B rows, T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.workload import Answer, cut
from extraction.activations.pooled import Capture
from extraction.engine.generate import generate
from extraction.engine.sequence import left_pad
from extraction.model.hooks import watch
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Request

Answers = dict[str, Answer]
Tokens = Mapping[str, tuple[int, ...]]
PAGE_TOKENS = 64  # of the paged cache; the best of 16, 64 and 256


def engine(lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Answers:
    """Run Traitline: responses and means in one pass."""
    capture = Capture(tuple(range(lm.n_layers)))
    completions = generate(lm, requests, batch_size=batch_size, capture=capture)
    return {c.id: Answer(c.token_ids, c.activations["residual.response_mean"]) for c in completions}


def serial(lm: LanguageModel, requests: Sequence[Request], batch_size: int = 1) -> Answers:
    """Run `model.generate` and a second pass on one example at a time: the reference answers."""
    tokens = {request.id: _generated(lm, [request])[request.id] for request in requests}
    return second_pass(lm, requests, tokens, 1)


def batched(lm: LanguageModel, requests: Sequence[Request], batch_size: int, *, cache: str | None = None) -> Answers:
    """Run `model.generate` on left-padded batches sorted by prompt length, then a second pass in batches."""
    longest_first = sorted(requests, key=lambda request: -len(request.token_ids))
    tokens = {key: ids for rows in cut(longest_first, batch_size) for key, ids in _generated(lm, rows, cache).items()}
    return second_pass(lm, requests, tokens, batch_size)


def static(lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Answers:
    """Run `batched` with a static cache, for which transformers compiles the step on a GPU."""
    return batched(lm, requests, batch_size, cache="static")


def continuous(lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Answers:
    """Run transformers' continuous batching (the base of `model.generate_batch`), then a second pass in batches.

    Its manager is used directly, since `generate_batch` has one length for all requests. The paged cache is made just
    large enough: on a processor every step attends over all of it, and its default size is many times slower.
    """
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=batch_size * (-(-longest // PAGE_TOKENS) + 1) + 2,
        max_batch_tokens=256,
        max_requests_per_batch=batch_size,
        allow_block_sharing=False,
    )
    tokens = _served(lm, requests, config)
    return second_pass(lm, requests, tokens, batch_size)


@dataclass(frozen=True)
class Peer:
    """One implementation of the job, and the batch sizes to try."""

    title: str
    run: Callable[[LanguageModel, Sequence[Request], int], Answers]
    batch_sizes: tuple[int, ...]

    def sizes_for(self, n: int) -> tuple[int, ...]:
        """Return the batch sizes that `n` examples can fill."""
        return tuple(size for size in self.batch_sizes if size <= n) or self.batch_sizes[:1]


PEERS = {
    "traitline": Peer("Traitline, one pass", engine, (16, 32, 64, 128)),
    "serial": Peer("transformers, one at a time + second pass", serial, (1,)),
    "batched": Peer("transformers, padded batches + second pass", batched, (8, 16, 32, 64, 128)),
    "continuous": Peer("transformers, continuous batching + second pass", continuous, (8, 16, 32, 64)),
}


# --- responses ------------------------------------------------------------------------------------------------------


class Budgets(StoppingCriteria):
    """Stopping criterion that ends each row at its own length."""

    def __init__(self, width: int, rows: Sequence[Request], device: torch.device) -> None:
        self.columns_B = torch.tensor([width + request.max_new_tokens for request in rows], device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Mark the rows that are done."""
        done_B: Tensor = self.columns_B <= input_ids.shape[1]
        return done_B


@torch.inference_mode()
def _generated(lm: LanguageModel, rows: Sequence[Request], cache: str | None = None) -> Tokens:
    """Run `model.generate` on one left-padded batch. `cache` None is transformers' default cache."""
    ids_BT, mask_BT = left_pad([request.token_ids for request in rows], 0, lm.device)
    width = ids_BT.shape[1]
    most = max(request.max_new_tokens for request in rows)
    config = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0, cache_implementation=cache)
    model: Any = lm.model
    stops = StoppingCriteriaList([Budgets(width, rows, lm.device)])
    out_BT = model.generate(ids_BT, attention_mask=mask_BT.long(), generation_config=config, stopping_criteria=stops)
    return {
        request.id: tuple(out_T[width : width + request.max_new_tokens].tolist())
        for request, out_T in zip(rows, out_BT, strict=True)
    }


def _served(lm: LanguageModel, requests: Sequence[Request], config: ContinuousBatchingConfig) -> Tokens:
    """All requests through the continuous-batching manager."""
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
    model: Any = lm.model
    found: dict[str, tuple[int, ...]] = {}
    with (
        torch.no_grad(),
        model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config, block=True, timeout=5, warmup=False
        ) as manager,
    ):
        for request in requests:
            budget = request.max_new_tokens
            manager.add_request(list(request.token_ids), request_id=request.id, max_new_tokens=budget, eos_token_id=-1)
        while len(found) < len(requests):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"continuous batching ended with {len(found)} of {len(requests)} answers")
            if result is not None and result.is_finished():
                found[result.request_id] = tuple(result.generated_tokens)
    return found


# --- the second pass ------------------------------------------------------------------------------------------------


def second_pass(lm: LanguageModel, requests: Sequence[Request], tokens: Tokens, batch_size: int) -> Answers:
    """Compute the means of every layer over the responses from `output_hidden_states`, in batches sorted by length."""
    longest_first = sorted(requests, key=lambda request: -len(request.token_ids) - len(tokens[request.id]))
    answers: Answers = {}
    for rows in cut(longest_first, batch_size):
        means_BLD = _pooled(lm, [(request.token_ids, tokens[request.id]) for request in rows])
        for request, means_LD in zip(rows, means_BLD, strict=True):
            answers[request.id] = Answer(tokens[request.id], means_LD.clone())
    return answers


@torch.inference_mode()
def _pooled(lm: LanguageModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Pool one right-padded batch; no row attends to its padding. Returns [B, L, D]."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids_BT = torch.tensor(
        [[*prompt, *response] + [0] * (width - len(prompt) - len(response)) for prompt, response in rows],
        device=lm.device,
    )
    column_T = torch.arange(width, device=lm.device)
    start_B1 = torch.tensor([[len(prompt)] for prompt, _ in rows], device=lm.device)
    end_B1 = start_B1 + torch.tensor([[len(response)] for _, response in rows], device=lm.device)
    live_BT = ((column_T >= start_B1) & (column_T < end_B1)).float()
    last: list[Tensor] = []
    model: Any = lm.model
    with watch({-1: lm.layers[-1]}, lambda _, hidden_BTD: last.append(hidden_BTD)):
        hidden = model.base_model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    states = [*hidden[1:-1], last[0]]  # theirs is after the final norm
    sums = [torch.einsum("btd,bt->bd", hidden_BTD.float(), live_BT) for hidden_BTD in states]
    return (torch.stack(sums, dim=1) / live_BT.sum(1)[:, None, None]).cpu()
