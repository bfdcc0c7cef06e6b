"""Log-likelihoods of existing texts, and the divergence that steering causes in the next-token distribution.

Shapes: B rows, T tokens of the response, V vocabulary, C steerings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.core.errors import PromptError
from extraction.engine.steering import Steering, SteeringHook
from extraction.engine.teacher_forcing import Text, right_pad

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

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
