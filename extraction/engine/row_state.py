"""Per-row state on the device: each slot's newest token, its lengths and its random numbers.

Shapes: B slots, T columns of a step, R rows that enter, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from extraction.engine.requests import Request
from extraction.engine.sampler import uniforms

DRAW = ""  # the stream of random numbers that every strategy draws tokens from


class RowBuffers:
    """Buffers [B, 1], and for each stream of random numbers [B, budget].

    `token_B1` is the token to feed, `last_B1` the one in the column before the cursor, `length_B1` how many tokens of
    the row are in the cache, `prompt_B1` how many of them are the prompt's.
    """

    def __init__(self, streams: Sequence[str], budget: int, device: torch.device) -> None:
        self.budget, self.device = budget, device
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.token_B1, self.last_B1, self.length_B1, self.prompt_B1 = (
            torch.zeros(1, 1, dtype=torch.long, device=device) for _ in range(4)
        )
        self.uniform_BT = {s: torch.zeros(1, budget, dtype=wide, device=device) for s in (DRAW, *streams)}

    def assign(self, rows_R: Tensor, asked: Sequence[Request], ids_RP: Tensor, mask_RP: Tensor, *, draws: bool) -> None:
        """Give rows to these requests; `draws`: True if any of them needs random numbers."""
        self.length_B1[rows_R] = mask_RP.sum(1, keepdim=True)
        self.prompt_B1[rows_R] = self.length_B1[rows_R]
        self.last_B1[rows_R] = ids_RP[:, -1:]
        for stream, uniform_BT in self.uniform_BT.items() if draws else ():
            drawn = np.stack([uniforms(r.draws or r.id, r.seed, self.budget, stream) for r in asked])
            uniform_BT[rows_R] = torch.from_numpy(drawn).to(uniform_BT)

    @property
    def n_rows(self) -> int:
        """Number of slots."""
        return len(self.token_B1)

    @property
    def age_B(self) -> Tensor:
        """Position in the response of the token to feed, from 0: [B]."""
        return (self.length_B1 - self.prompt_B1)[:, 0]

    def positions(self, width: int, last: int) -> Tensor:
        """Positions of the next `width` tokens, [B, T]. Those of idle rows drift, so they are clamped to `last`."""
        return count_up(self.length_B1, width).clamp_(0, last)

    def uniform(self, stream: str, width: int) -> Tensor:
        """Uniforms of a stream for the `width` response tokens after the one to feed: [B, T]."""
        age_BT = count_up(self.length_B1 - self.prompt_B1 + 1, width)
        return self.uniform_BT[stream].gather(1, age_BT.clamp_(0, self.budget - 1))

    def step(self, token_B1: Tensor, last_B1: Tensor, count_B1: Tensor | int) -> None:
        """Count tokens that went into the cache, the last of them `last_B1`; `token_B1` is fed next. In place."""
        self.last_B1.copy_(last_B1)
        self.token_B1.copy_(token_B1)
        self.length_B1.add_(count_B1)

    def select(self, rows_B: Tensor) -> None:
        """Make the rows these ones."""
        self.token_B1, self.last_B1, self.length_B1, self.prompt_B1 = (
            buffer[rows_B] for buffer in (self.token_B1, self.last_B1, self.length_B1, self.prompt_B1)
        )
        self.uniform_BT = {stream: uniform_BT[rows_B] for stream, uniform_BT in self.uniform_BT.items()}


def count_up(first_B1: Tensor, width: int) -> Tensor:
    """Return `width` consecutive numbers from each row's first: [B, T], a new tensor."""
    return first_B1 + torch.arange(width, device=first_B1.device) if width > 1 else first_B1.clone()
