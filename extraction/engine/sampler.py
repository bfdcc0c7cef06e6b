"""Plain sampling: temperature, top-k, top-p, then one draw by inverse CDF.

Shapes: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from extraction.core.errors import ConfigError, LogitsError

TokenChoice = tuple[Tensor, Tensor]  # a token for every row, and which rows have none: their token is any


class Sampler(Protocol):
    """Chooses tokens for the rows of a batch: a Sample for all of them, or one for each."""

    @property
    def draws(self) -> bool:
        """Whether any token needs a uniform."""

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Choose a token for every row. Raises LogitsError where a row has none."""

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """The same without a look at the outcome, which would have to wait for the device."""

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """What each column's token is drawn from: probabilities [B, T, V], one-hot where greedy."""


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

    @property
    def sample(self) -> Sample:
        """A Sample is a strategy by itself."""
        return self

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Choose a token for every row. Raises LogitsError where a row has none."""
        return _checked(*self.choose(logits_BV, uniform_B))

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """The same, unchecked."""
        if not self.draws:
            return _best(logits_BV)
        assert uniform_B is not None
        return _drawn(self.warp(at_least_float32(logits_BV)).softmax(-1), uniform_B)

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """What each column's token is drawn from: probabilities [B, T, V], one-hot where greedy."""
        if not self.draws:
            return one_hot(logits_BTV)
        return self.warp(at_least_float32(logits_BTV).flatten(0, 1)).softmax(-1).view_as(logits_BTV)

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Temperature, top-k and top-p applied: tokens that are out have -inf."""
        # Shifted first, so that no temperature above zero can overflow a logit into +inf.
        scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < scores_BV.shape[-1]:
            kth_B1 = scores_BV.topk(self.top_k, dim=-1).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, float("-inf"))
        return _keep_nucleus(scores_BV, self.top_p) if self.top_p < 1.0 else scores_BV


class PerRow:
    """Every row its own Sample: a row's token is the one that it would get alone."""

    def __init__(self, samples: Sequence[Sample], device: torch.device) -> None:
        self.samples = tuple(samples)
        self.draws = any(sample.draws for sample in samples)

        def column_B1(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        self.greedy_B = torch.tensor([not sample.draws for sample in samples], device=device)
        self.temperature_B1 = column_B1([sample.temperature or 1.0 for sample in samples])
        self.out_B1 = column_B1([1.0 - sample.top_p for sample in samples])
        self.top_k_B1 = torch.tensor([[sample.top_k] for sample in samples], device=device)
        self.cuts_mass = any(sample.top_p < 1.0 for sample in samples)

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Choose a token for every row. Raises LogitsError where a row has none."""
        return _checked(*self.choose(logits_BV, uniform_B))

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """The same, unchecked."""
        best_B, bad_B = _best(logits_BV)
        if not self.draws:
            return best_B, bad_B
        assert uniform_B is not None
        drawn_B, lost_B = _drawn(self.warp(at_least_float32(logits_BV)).softmax(-1), uniform_B)
        return torch.where(self.greedy_B, best_B, drawn_B), bad_B | lost_B

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """What each column's token is drawn from: probabilities [B, T, V], one-hot where greedy."""
        columns = [self.warp(logits_BV).softmax(-1) for logits_BV in at_least_float32(logits_BTV).unbind(1)]
        return torch.where(self.greedy_B[:, None, None], one_hot(logits_BTV), torch.stack(columns, 1))

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Temperature, top-k and top-p applied: tokens that are out have -inf."""
        scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature_B1.to(logits_BV.dtype)
        n_tokens = scores_BV.shape[-1]
        widest = max((sample.top_k for sample in self.samples if sample.top_k < n_tokens), default=0)
        if widest:
            cuts_B1 = (self.top_k_B1 > 0) & (self.top_k_B1 < n_tokens)
            kth_B1 = scores_BV.topk(widest, dim=-1).values.gather(1, (self.top_k_B1 - 1).clamp(0, widest - 1))
            scores_BV = scores_BV.masked_fill(cuts_B1 & (scores_BV < kth_B1), float("-inf"))
        return _keep_nucleus_by_row(scores_BV, self.out_B1) if self.cuts_mass else scores_BV


def sampler_of(samples: Sequence[Sample], device: torch.device) -> Sampler:
    """One Sample where all rows have the same, else one for each row."""
    return samples[0] if len(set(samples)) == 1 else PerRow(samples, device)


def at_least_float32(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _best(logits_BV: Tensor) -> TokenChoice:
    """The likeliest token of every row."""
    best_B, token_B = logits_BV.max(dim=-1)
    return token_B, _is_none(best_B)


def one_hot(logits: Tensor) -> Tensor:
    """Probability 1 for the largest logit, in float32 or wider."""
    return torch.zeros_like(at_least_float32(logits)).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _keep_nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens with at least `top_p` of the mass (Holtzman et al. 2020, section 3.1)."""
    return _without(scores_BV, lambda mass_BV: mass_BV <= 1.0 - top_p)


def _keep_nucleus_by_row(scores_BV: Tensor, out_B1: Tensor) -> Tensor:
    """The same, where each row leaves out a mass of its own; a row with 0 keeps all."""
    return _without(scores_BV, lambda mass_BV: (mass_BV <= out_B1.to(mass_BV.dtype)) & (out_B1 > 0))


def _without(scores_BV: Tensor, is_out: Callable[[Tensor], Tensor]) -> Tensor:
    ascending_BV, order_BV = scores_BV.sort(dim=-1)
    out_BV = is_out(ascending_BV.softmax(-1).cumsum(-1))
    out_BV[:, -1] = False
    return scores_BV.masked_fill(out_BV.scatter(1, order_BV, out_BV), float("-inf"))


def sample_from_scores(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative probability exceeds the uniform. A probability of 0 never wins."""
    return sample_from(scores_BV.softmax(-1), uniform_B)


def sample_from(chances_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The same, from weights that need not sum to 1. Raises LogitsError where a row has none."""
    return _checked(*_drawn(chances_BV, uniform_B))


def _drawn(chances_BV: Tensor, uniform_B: Tensor) -> TokenChoice:
    wide = torch.float32 if chances_BV.device.type == "mps" else torch.float64
    cdf_BV = chances_BV.cumsum(-1, dtype=wide)
    total_B1 = cdf_BV[:, -1:]
    token_B1 = torch.searchsorted(cdf_BV, uniform_B.to(wide).unsqueeze(1) * total_B1, right=True)
    return token_B1.clamp_(max=chances_BV.shape[-1] - 1).squeeze(1), _is_none(total_B1.squeeze(1))


def _is_none(witness_B: Tensor) -> Tensor:
    return witness_B.isnan() | (witness_B == float("-inf"))


def _checked(token_B: Tensor, bad_B: Tensor) -> Tensor:
    if bad_B.any():
        raise LogitsError(tuple(bad_B.nonzero()[:, 0].tolist()))
    return token_B


def uniforms(example_id: str, seed: int, n: int, stream: str = "") -> np.ndarray:
    """The first `n` uniforms in [0, 1) of one example: a function of (seed, id, step, stream) alone.

    Philox, a counter-based generator (Salmon et al. 2011), keyed by a hash of seed and id.
    """
    digest = hashlib.blake2b(
        f"{seed}/{example_id}".encode("utf-8", "surrogatepass"), digest_size=16, person=stream.encode()
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)
