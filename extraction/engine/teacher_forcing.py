"""Passes over existing texts: their activations, their log-likelihoods, and the divergence that steering causes.

Texts are read from their stored token ids. For activations, rows are packed by length and padded on the right, so that
no row attends to a pad; the LM head is skipped, and the pass stops after the highest layer requested.

Shapes: B rows, T tokens (for likelihoods: of the response), K points (site by layer), D hidden, V vocabulary,
C steerings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from extraction.activations.pooled import Capture, reshape_hidden
from extraction.activations.sites import Tap, taps_of, watch_taps
from extraction.core.errors import PromptError
from extraction.core.pooling import parse_pooling
from extraction.engine.steering import Steering, SteeringHook
from extraction.model.devices import prefill_rows, to_host
from extraction.model.hooks import StopForward

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

Text = tuple[str, Sequence[int], Sequence[int]]  # id, prompt ids, response ids


def teacher_forced_activations(
    lm: LanguageModel, texts: Sequence[Text], *, capture: Capture, batch_size: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (id, `site.pooling` -> [L, D] on the CPU; `all`: [T, L, D]) of every text with a response, longest first.

    At most `batch_size` rows are read at once, and no more than the device reads fastest together.

    Raises PromptError for a text past the model's positions, ActivationError where an activation is not finite.
    """
    for text in texts:
        _check(text, lm)
    taps = taps_of(lm, capture.sites, capture.layers)
    left = sorted(texts, key=lambda text: -len(text[1]) - len(text[2]))
    while left:
        lengths = [len(prompt) + len(response) for _, prompt, response in left[:batch_size]]
        n_rows = prefill_rows(lengths, lm.device)
        rows, left = left[:n_rows], left[n_rows:]
        pooled = _read_batch(lm, rows, taps, capture)
        for row, (example_id, _, _) in enumerate(rows):
            kept = {name: points[row] for name, points in pooled.items()}
            yield example_id, capture.by_site(kept, example_id, lm.dtype)


def _check(text: Text, lm: LanguageModel) -> None:
    example_id, prompt_ids, response_ids = text
    n_total = len(prompt_ids) + len(response_ids)
    if not response_ids:
        raise PromptError(f"{example_id}: the response has no tokens, so it has no activation; leave it out")
    lm.check_ids(example_id, [*prompt_ids, *response_ids])
    if lm.max_positions is not None and n_total > lm.max_positions:
        raise PromptError(
            f"{example_id}: {n_total} tokens pass the model's {lm.max_positions} positions; shorten the text"
        )


@torch.inference_mode()
def _read_batch(
    lm: LanguageModel, rows: Sequence[Text], taps: tuple[Tap, ...], capture: Capture
) -> dict[str, Sequence[Tensor]]:
    """Read one batch: pooling -> a [K, D] (`all`: [T, K, D]) for each row."""
    ids_BT, prompt_BT, response_BT = right_pad(rows, lm.pad_id, lm.device)
    found: dict[str, dict[int, list[Tensor]]] = {pooling: {} for pooling in capture.poolings}
    remaining = set(range(len(taps)))

    def note(point: int, hidden: Tensor) -> None:
        hidden_BTD = reshape_hidden(hidden, (*ids_BT.shape, lm.hidden_size)).to(lm.device)
        for pooling, points in found.items():
            points[point] = list(_pooled(pooling, hidden_BTD, prompt_BT, response_BT))
        remaining.discard(point)
        if not remaining:
            raise StopForward

    with suppress(StopForward), watch_taps(taps, note):
        lm.hidden_states(ids_BT)
    return {pooling: _by_row(points) for pooling, points in found.items()}


def _pooled(pooling: str, hidden_BTD: Tensor, prompt_BT: Tensor, response_BT: Tensor) -> Sequence[Tensor]:
    """Pool one point's hidden states: a [D] (`all`: [T, D]) for each row."""
    asked = parse_pooling(pooling)
    if asked.name == "all":
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        return [hidden_TD[live_T].to(wide) for hidden_TD, live_T in zip(hidden_BTD, response_BT, strict=True)]
    return asked(hidden_BTD, prompt_BT if asked.part == "prompt" else response_BT).unbind(0)


def _by_row(points: dict[int, list[Tensor]]) -> Sequence[Tensor]:
    """Regroup point -> row -> [.., D] into row -> [.., K, D] on the CPU."""
    by_point = [points[point] for point in range(len(points))]
    return to_host([torch.stack(row, dim=-2) for row in zip(*by_point, strict=True)])


def right_pad(rows: Sequence[Text], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, T] that start at the left edge, and masks of their prompt and response tokens."""
    width = max(len(prompt) + len(response) for _, prompt, response in rows)
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    prompt_BT, response_BT = np.zeros((2, len(rows), width), dtype=bool)
    for row, (_, prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = [*prompt, *response]
        prompt_BT[row, : len(prompt)] = True
        response_BT[row, len(prompt) : end] = True
    ids, prompts, responses = (torch.from_numpy(array).to(device) for array in (ids_BT, prompt_BT, response_BT))
    return ids, prompts, responses


LOGIT_BYTES = 2**28  # of one batch's logits in float32


def log_likelihoods(lm: LanguageModel, texts: Sequence[Text], *, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (id, log p of each response token given all before it, float32 [T] on the CPU), longest text first.

    The mean of the negative is the cross-entropy in nats, its exponential the perplexity. PromptError for a text
    without a prompt or a response token.
    """
    for text_id, prompt, response in texts:
        if not prompt or not response:
            raise PromptError(f"{text_id}: has no {'response' if prompt else 'prompt'} tokens, so no likelihood")
    longest_first = sorted(texts, key=lambda text: -len(text[1]) - len(text[2]))
    widest = len(longest_first[0][1]) + len(longest_first[0][2]) if texts else 1
    size = rows_that_fit(lm, widest, batch_size)
    for start in range(0, len(longest_first), size):
        yield from _token_log_probs(lm, longest_first[start : start + size])


def rows_that_fit(lm: LanguageModel, width: int, batch_size: int) -> int:
    """Return the largest number of rows, up to `batch_size`, whose logits of `width` positions fit in LOGIT_BYTES."""
    return max(1, min(batch_size, LOGIT_BYTES // (4 * width * lm.vocab_size)))


@torch.inference_mode()
def _token_log_probs(lm: LanguageModel, rows: Sequence[Text]) -> list[tuple[str, Tensor]]:
    ids_BT, _, _ = right_pad(rows, lm.pad_id, lm.device)
    first = min(len(prompt) for _, prompt, _ in rows) - 1  # the position that the first response token comes from
    log_probs_BTV = lm.logits(ids_BT, ids_BT.shape[1] - first).float().log_softmax(-1)
    token_BT = log_probs_BTV[:, :-1].gather(-1, ids_BT[:, first + 1 :].unsqueeze(-1)).squeeze(-1)
    result = []
    for (text_id, prompt, response), token_T in zip(rows, token_BT, strict=True):
        start = len(prompt) - 1 - first
        result.append((text_id, token_T[start : start + len(response)].cpu()))
    return result


def divergences(lm: LanguageModel, text: Text, steerings: Sequence[Steering], *, batch_size: int) -> list[float]:
    """Return KL(steered || plain) of the next token for each steering, mean over the response positions, in nats.

    All rows hold the same text, so that only the steering differs. Source: Kullback and Leibler 1951.
    """
    n_response = len(text[2])
    size = rows_that_fit(lm, n_response, batch_size)
    plain_TV = _next_token_log_probs(lm, text, [Steering()])[0]
    found: list[float] = []
    for start in range(0, len(steerings), size):
        for log_probs_TV in _next_token_log_probs(lm, text, steerings[start : start + size]):
            gap_TV = (log_probs_TV - plain_TV).masked_fill(log_probs_TV == -torch.inf, 0)  # 0 log 0 is 0
            found.append(float((log_probs_TV.exp() * gap_TV).sum(-1).mean()))
    return found


@torch.inference_mode()
def _next_token_log_probs(lm: LanguageModel, text: Text, steerings: Sequence[Steering]) -> Tensor:
    """Return log-probabilities [C, T, V] at the positions that predict the response's tokens."""
    _, prompt, response = text
    ids_CT = torch.tensor([[*prompt, *response[:-1]]] * len(steerings), device=lm.device)
    hook = SteeringHook(lm, steerings, len(steerings))
    rows_C = torch.arange(len(steerings), device=lm.device)
    hook.assign(rows_C, steerings)
    with hook.attached(), hook.during_text(len(prompt), ids_CT.shape[1]):
        return lm.logits(ids_CT, len(response)).float().log_softmax(-1)
