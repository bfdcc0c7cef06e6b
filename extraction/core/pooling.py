"""Poolings: how the activations of all tokens become one vector, [B, T, D] -> [B, D]; and their names.

`POOLINGS` lists the names. The engine pools while it generates, with the running form of each pooling
(`extraction.activations.pooled.ACCUMULATORS`); the functions here pool a finished tensor.

Sums run in float32, or in float64 for float64 input: in bfloat16 a running sum of ones sticks at 256, in float16 at
2048. Masked tokens may hold anything, NaN included. A row without a live token raises ValueError: a vector of zeros
would look like an activation. Empty responses are left out before pooling.

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from extraction.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def pool_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Average each row over its live tokens: [B, T, D] -> [B, D]."""
    live_BT = _live(hidden_BTD, mask_BT)
    live_BTD = _wide(hidden_BTD).masked_fill(~live_BT.unsqueeze(-1), 0)
    return live_BTD.sum(1) / live_BT.sum(1, keepdim=True)


def pool_last(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Take each row's last live token, whichever side the padding is on: [B, T, D] -> [B, D]."""
    live_BT = _live(hidden_BTD, mask_BT)
    from_end_B = live_BT.flip(1).int().argmax(1)
    last_B11 = (live_BT.shape[1] - 1 - from_end_B).view(-1, 1, 1)
    return _wide(hidden_BTD.take_along_dim(last_B11, 1).squeeze(1))


def pool_first(hidden_BTD: Tensor, mask_BT: Tensor, n: int) -> Tensor:
    """Average each row over its first n live tokens, or over all of them where there are fewer: [B, T, D] -> [B, D]."""
    if n < 1:
        raise ValueError(f"pool_first needs n of at least 1, not {n}")
    live_BT = mask_BT.bool()
    return pool_mean(hidden_BTD, live_BT & (live_BT.cumsum(1) <= n))


def _live(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    if hidden_BTD.shape[:2] != mask_BT.shape:
        raise ValueError(f"mask of shape {tuple(mask_BT.shape)} over activations of shape {tuple(hidden_BTD.shape)}")
    live_BT = mask_BT.bool()
    dead_rows = (~live_BT.any(1)).nonzero().flatten().tolist()
    if dead_rows:
        raise ValueError(f"rows {dead_rows} have no live token to pool; leave empty responses out")
    return live_BT


def _wide(hidden: Tensor) -> Tensor:
    return hidden if hidden.dtype.itemsize >= 4 else hidden.float()


@dataclass(frozen=True)
class PoolingKind:
    """An entry of POOLINGS: the part of the sequence that it pools, and the function (None: every token is kept)."""

    part: str
    pool: Callable[..., Tensor] | None
    takes_count: bool = False


POOLINGS: dict[str, PoolingKind] = {
    "response_mean": PoolingKind("response", pool_mean),
    "response_first": PoolingKind("response", pool_first, takes_count=True),
    "response_last": PoolingKind("response", pool_last),
    "prompt_mean": PoolingKind("prompt", pool_mean),
    "prompt_last": PoolingKind("prompt", pool_last),
    "all": PoolingKind("response", None),
}


@dataclass(frozen=True)
class Pooling:
    """A pooling with its count of tokens, if it takes one. `str(pooling)` is its name in files: `response_first:5`."""

    name: str
    count: int | None = None

    def __str__(self) -> str:
        return self.name if self.count is None else f"{self.name}:{self.count}"

    @property
    def part(self) -> str:
        """Part of the sequence that it pools: `prompt` or `response`."""
        return POOLINGS[self.name].part

    def __call__(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Pool [B, T, D] over the live tokens of this pooling's part: [B, D]. Raises ValueError for `all`."""
        pool = POOLINGS[self.name].pool
        if pool is None:
            raise ValueError(f"pooling {self.name!r} keeps every token and can't be called")
        return pool(hidden_BTD, mask_BT) if self.count is None else pool(hidden_BTD, mask_BT, self.count)


def parse_pooling(text: str) -> Pooling:
    """Parse a name such as `response_mean` or `response_first:5`. Raises ConfigError with the nearest known name."""
    name, colon, count = text.partition(":")
    if name not in POOLINGS:
        raise ConfigError(f"pooling {text!r} is not known; {_suggestion(name)}")
    if not POOLINGS[name].takes_count:
        if colon:
            raise ConfigError(f"pooling {text!r}: {name} takes no count; write {name!r}")
        return Pooling(name)
    if not re.fullmatch(r"[1-9][0-9]{0,5}", count, re.ASCII):
        raise ConfigError(f"pooling {text!r}: {name} needs a count of tokens, from 1 to 999999, as in '{name}:5'")
    return Pooling(name, int(count))


def _suggestion(name: str) -> str:
    nearest = get_close_matches(name, POOLINGS, n=1, cutoff=0.5)
    known = ", ".join(f"{known}:N" if kind.takes_count else known for known, kind in POOLINGS.items())
    return f"did you mean {nearest[0]!r}? (known: {known})" if nearest else f"known: {known}"
