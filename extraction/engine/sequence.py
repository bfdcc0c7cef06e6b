"""The places of a running batch: what each holds, how far it is, and what ends it.

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
    from extraction.model.loading import LanguageModel


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may grow: rows, tokens of prompt and response together, new tokens of any request."""

    slots: int
    longest: int
    budget: int

    @staticmethod
    def of(requests: Sequence[Request], slots: int) -> BatchLimits:
        """What a known list of requests needs."""
        longest = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=1)
        budget = max((r.max_new_tokens for r in requests), default=1)
        return BatchLimits(max(1, min(slots, len(requests))), longest, budget)


@dataclass
class StepOutput:
    """What a step came to: completions that ended, and the new response tokens by request."""

    done: list[Completion] = field(default_factory=list)
    fresh: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class RunningSequence:
    """One row of the running batch and the request that it holds. `fed`: response tokens that the model has read."""

    request: Request
    sample: Sample
    stop_strings: tuple[str, ...]
    first_column: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    ending: str | None = None
    fault: ActivationError | None = None

    @property
    def left(self) -> int:
        """How many tokens may still join the response."""
        return 0 if self.ending is not None else self.request.max_new_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of prompt and response that the model has read."""
        return len(self.request.token_ids) + self.fed

    def extend(self, lm: LanguageModel, tokens: Sequence[int]) -> list[int]:
        """Append tokens until one ends the response; returns those that joined it."""
        first = len(self.tokens)
        for token in tokens if self.ending is None else ():
            if token in lm.stop_ids and not self.request.ignore_eos:
                self.ending = "stop"
            else:
                self.tokens.append(token)
                self.ending = self._ended_by(lm)
            if self.ending is not None:
                break
        return self.tokens[first:]

    def _ended_by(self, lm: LanguageModel) -> str | None:
        if self.stop_strings and lm.tokenizer is not None:
            longest = max(map(len, self.stop_strings))  # in characters, of up to four bytes, each perhaps a token
            text = lm.tokenizer.decode(self.tokens[-4 * longest - 8 :], skip_special_tokens=True)
            if any(stop in text for stop in self.stop_strings):
                return "stop_string"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None

    def is_done(self, *, captured: bool) -> bool:
        """With capture, a response's last token is fed once more, so that it has an activation."""
        return self.ending is not None and (not captured or self.fault is not None or self.fed >= len(self.tokens))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [R, P] that end at the right edge, and their mask [R, P]."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
