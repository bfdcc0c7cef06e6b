"""Plain sampling: temperature, top-k, top-p, then one draw by inverse CDF.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from extraction.errors import ConfigError, LogitsError


@dataclass(frozen=True)
class Sample:
    """Logits [B, V] and uniforms [B] in, tokens [B] out. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    The order is transformers': temperature, top-k, top-p (the token that crosses the threshold is kept).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} is out of range: use a number from 0 (greedy) upwards")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p} is out of range: use a number above 0, up to 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} is out of range: use 0 (all tokens) or more")

    @property
    def draws(self) -> bool:
        """Whether a token needs a uniform."""
        return self.temperature > 0

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Choose a token for every row. Raises LogitsError where a row has none."""
        if not self.draws:
            best_B, token_B = logits_BV.max(dim=-1)
            return _checked(token_B, best_B)
        assert uniform_B is not None
        scores_BV = logits_BV.float() if logits_BV.dtype in (torch.float16, torch.bfloat16) else logits_BV
        return draw(self.warp(scores_BV), uniform_B)

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Temperature, top-k and top-p applied: tokens that are out have -inf."""
        # Shifted first, so that no temperature above zero can overflow a logit into +inf.
        scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < scores_BV.shape[-1]:
            kth_B1 = scores_BV.topk(self.top_k, dim=-1).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, float("-inf"))
        return _keep_nucleus(scores_BV, self.top_p) if self.top_p < 1.0 else scores_BV


def _keep_nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens with at least `top_p` of the mass (Holtzman et al. 2020, section 3.1)."""
    ascending_BV, order_BV = scores_BV.sort(dim=-1)
    out_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1.0 - top_p
    out_BV[:, -1] = False
    return scores_BV.masked_fill(out_BV.scatter(1, order_BV, out_BV), float("-inf"))


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds the uniform. A probability of 0 never wins."""
    wide = torch.float32 if scores_BV.device.type == "mps" else torch.float64
    cdf_BV = scores_BV.softmax(-1).cumsum(-1, dtype=wide)
    total_B1 = cdf_BV[:, -1:]
    token_B1 = torch.searchsorted(cdf_BV, uniform_B.to(wide).unsqueeze(1) * total_B1, right=True)
    return _checked(token_B1.clamp_(max=scores_BV.shape[-1] - 1).squeeze(1), total_B1.squeeze(1))


def _checked(token_B: Tensor, witness_B: Tensor) -> Tensor:
    bad_B = witness_B.isnan() | (witness_B == float("-inf"))
    if bad_B.any():
        raise LogitsError(tuple(bad_B.nonzero()[:, 0].tolist()))
    return token_B


def uniforms(example_id: str, seed: int, n: int) -> np.ndarray:
    """The first `n` uniforms in [0, 1) of one example: a function of (seed, id, step) alone.

    Philox, a counter-based generator (Salmon et al. 2011), keyed by a hash of seed and id.
    """
    digest = hashlib.blake2b(f"{seed}/{example_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)
