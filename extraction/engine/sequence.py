"""Running sequences: the request that a slot holds, the tokens it has so far, and the reason it ends.

Shapes: R rows, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from extraction.core.errors import ActivationError
from extraction.engine.requests import Completion, Request
from extraction.engine.sampler import Sample

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel


@dataclass(frozen=True)
class BatchLimits:
    """Upper bounds of a batch: slots, tokens of prompt and response together, and new tokens of any request."""

    slots: int
    longest: int
    budget: int

    @staticmethod
    def of(requests: Sequence[Request], slots: int) -> BatchLimits:
        """Return the smallest limits that hold these requests, with at most `slots` slots."""
        longest = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=1)
        budget = max((r.max_new_tokens for r in requests), default=1)
        return BatchLimits(max(1, min(slots, len(requests))), longest, budget)


@dataclass
class StepOutput:
    """Result of one step: completions that ended in it, and the new response tokens of each request."""

    completions: list[Completion] = field(default_factory=list)
    new_tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class RunningSequence:
    """A request in its slot. `n_fed`: number of response tokens that the model has read."""

    request: Request
    sample: Sample
    stop_strings: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    n_fed: int = 0
    finish_reason: str | None = None
    fault: ActivationError | None = None

    @property
    def n_left(self) -> int:
        """Number of tokens that may still join the response."""
        return 0 if self.finish_reason is not None else self.request.max_new_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Number of prompt and response tokens in the KV cache."""
        return len(self.request.token_ids) + self.n_fed

    def extend(self, lm: LanguageModel, tokens: Sequence[int]) -> list[int]:
        """Append tokens until one ends the response; return those that joined it."""
        first = len(self.tokens)
        for token in tokens if self.finish_reason is None else ():
            if token in lm.stop_ids and not self.request.ignore_eos:
                self.finish_reason = "stop"
            else:
                self.tokens.append(token)
                self.finish_reason = self._reason_to_finish(lm)
            if self.finish_reason is not None:
                break
        return self.tokens[first:]

    def _reason_to_finish(self, lm: LanguageModel) -> str | None:
        if self.stop_strings and lm.tokenizer is not None:
            longest = max(map(len, self.stop_strings))  # in characters, of up to four bytes, each perhaps a token
            text = lm.tokenizer.decode(self.tokens[-4 * longest - 8 :], skip_special_tokens=True)
            if any(stop in text for stop in self.stop_strings):
                return "stop_string"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None

    def is_done(self, *, captured: bool) -> bool:
        """Return True if the slot can be freed. With capture, the last token is fed once more for its activation."""
        if self.finish_reason is None:
            return False
        return not captured or self.fault is not None or self.n_fed >= len(self.tokens)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids [R, P] that end at the right edge, and their attention mask [R, P]."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
