"""The teacher-forced pass: activations of existing texts, from their stored token ids.

Rows are packed by length and padded on the right, so that no row attends to a pad; the LM head is skipped, and the pass
stops after the highest layer requested.

Shapes: B rows, T tokens, K points (site by layer), D hidden.
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
from extraction.model.devices import prefill_rows, to_host
from extraction.model.hooks import StopForward

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

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
