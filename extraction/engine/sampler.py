"""Sampling: temperature, top-k, top-p, min-p, then one draw by inverse CDF.

Shapes: B rows, T columns, V vocabulary. A uniform is a random number in [0, 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from extraction.config.settings import SAMPLING, SamplingSettings, check_sampling
from extraction.core.errors import LogitsError

TokenChoice = tuple[Tensor, Tensor]  # tokens [B], and True for the rows that have none (their token is arbitrary)


class Sampler(Protocol):
    """Choose tokens for the rows of a batch: one `Sample` for all rows, or one for each row."""

    @property
    def draws(self) -> bool:
        """True if some row needs a uniform."""

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Return a token for every row. Raises LogitsError where a row has none."""

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """Return tokens without checking that there are any: the check would wait for the device."""

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """Return the probabilities [B, T, V] that tokens are drawn from; one-hot where greedy."""


@dataclass(frozen=True)
class Sample:
    """Map logits [B, V] and uniforms [B] to tokens [B]. Temperature 0 is greedy; the other defaults cut nothing.

    The order is that of transformers' `generate`: temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_sampling(asdict(self))

    @classmethod
    def of(cls, settings: Any) -> Sample:
        """Return the sampling of any settings; a field that they lack, or that is None, has its default there."""
        values = {name: getattr(settings, name, None) for name in SAMPLING}
        defaults = {name: SamplingSettings.model_fields[name].default for name in SAMPLING}
        return cls(**{name: defaults[name] if value is None else value for name, value in values.items()})

    @property
    def draws(self) -> bool:
        """True if a token needs a uniform."""
        return self.temperature > 0

    @property
    def sample(self) -> Sample:
        """This: a Sample is a decoding strategy by itself."""
        return self

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Return a token for every row. Raises LogitsError where a row has none."""
        return _checked(*self.choose(logits_BV, uniform_B))

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """Return tokens without checking that there are any."""
        if not self.draws:
            return _best(logits_BV)
        assert uniform_B is not None
        return _drawn(self.warp(at_least_float32(logits_BV)).softmax(-1), uniform_B)

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """Return the probabilities [B, T, V] that tokens are drawn from; one-hot where greedy."""
        if not self.draws:
            return one_hot(logits_BTV)
        return self.warp(at_least_float32(logits_BTV).flatten(0, 1)).softmax(-1).view_as(logits_BTV)

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Return the scores after all options; a token that is out has -inf."""
        # Shifted first, so that no temperature above zero can overflow a logit into +inf.
        scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < scores_BV.shape[-1]:
            kth_B1 = scores_BV.topk(self.top_k, dim=-1).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, float("-inf"))
        if self.top_p < 1.0:
            scores_BV = _keep_nucleus(scores_BV, self.top_p)
        return _keep_likely(scores_BV, self.min_p) if self.min_p > 0.0 else scores_BV


class PerRow:
    """One Sample for each row: a row's token is the one that it would get alone."""

    def __init__(self, samples: Sequence[Sample], device: torch.device) -> None:
        self.samples = tuple(samples)
        self.draws = any(sample.draws for sample in samples)

        wide = _wide(device)

        def column_B1(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        self.greedy_B = torch.tensor([not sample.draws for sample in samples], device=device)
        self.temperature_B1 = column_B1([sample.temperature or 1.0 for sample in samples])
        self.out_B1 = column_B1([1.0 - sample.top_p for sample in samples])
        self.top_k_B1 = torch.tensor([[sample.top_k] for sample in samples], device=device)
        self.min_p_B1 = column_B1([sample.min_p for sample in samples], wide)
        self.cuts_mass = any(sample.top_p < 1.0 for sample in samples)
        self.cuts_unlikely = any(sample.min_p > 0.0 for sample in samples)

    def __call__(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> Tensor:
        """Return a token for every row. Raises LogitsError where a row has none."""
        return _checked(*self.choose(logits_BV, uniform_B))

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None = None) -> TokenChoice:
        """Return tokens without checking that there are any."""
        best_B, bad_B = _best(logits_BV)
        if not self.draws:
            return best_B, bad_B
        assert uniform_B is not None
        drawn_B, lost_B = _drawn(self.warp(at_least_float32(logits_BV)).softmax(-1), uniform_B)
        return torch.where(self.greedy_B, best_B, drawn_B), bad_B | lost_B

    def chances(self, logits_BTV: Tensor) -> Tensor:
        """Return the probabilities [B, T, V] that tokens are drawn from; one-hot where greedy."""
        columns = [self.warp(logits_BV).softmax(-1) for logits_BV in at_least_float32(logits_BTV).unbind(1)]
        return torch.where(self.greedy_B[:, None, None], one_hot(logits_BTV), torch.stack(columns, 1))

    def warp(self, logits_BV: Tensor) -> Tensor:
        """Return the scores after all options; a token that is out has -inf."""
        scores_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature_B1.to(logits_BV.dtype)
        n_tokens = scores_BV.shape[-1]
        widest = max((sample.top_k for sample in self.samples if sample.top_k < n_tokens), default=0)
        if widest:
            cuts_B1 = (self.top_k_B1 > 0) & (self.top_k_B1 < n_tokens)
            kth_B1 = scores_BV.topk(widest, dim=-1).values.gather(1, (self.top_k_B1 - 1).clamp(0, widest - 1))
            scores_BV = scores_BV.masked_fill(cuts_B1 & (scores_BV < kth_B1), float("-inf"))
        if self.cuts_mass:
            scores_BV = _keep_nucleus_by_row(scores_BV, self.out_B1)
        return _keep_likely(scores_BV, self.min_p_B1) if self.cuts_unlikely else scores_BV


def sampler_of(samples: Sequence[Sample], device: torch.device) -> Sampler:
    """Return one Sample if all rows have the same, else one for each row."""
    return samples[0] if len(set(samples)) == 1 else PerRow(samples, device)


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32, others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _best(logits_BV: Tensor) -> TokenChoice:
    """Return the likeliest token of every row."""
    best_B, token_B = logits_BV.max(dim=-1)
    return token_B, _is_none(best_B)


def one_hot(logits: Tensor) -> Tensor:
    """Return probability 1 for the largest logit, in float32 or wider."""
    return torch.zeros_like(at_least_float32(logits)).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _keep_nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens with at least `top_p` of the mass (Holtzman et al. 2020, section 3.1)."""
    return _without(scores_BV, lambda mass_BV: mass_BV <= 1.0 - top_p)


def _keep_nucleus_by_row(scores_BV: Tensor, out_B1: Tensor) -> Tensor:
    """Keep the nucleus of each row, which leaves out `out_B1` of the mass; a row with 0 keeps all tokens."""
    return _without(scores_BV, lambda mass_BV: (mass_BV <= out_B1.to(mass_BV.dtype)) & (out_B1 > 0))


def _keep_likely(scores_BV: Tensor, min_p: float | Tensor) -> Tensor:
    """Keep tokens with at least `min_p` of the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    chances_BV = scores_BV.softmax(-1)
    share = min_p.to(chances_BV.dtype) if isinstance(min_p, Tensor) else min_p
    return scores_BV.masked_fill(chances_BV < share * chances_BV.amax(-1, keepdim=True), float("-inf"))


def _without(scores_BV: Tensor, is_out: Callable[[Tensor], Tensor]) -> Tensor:
    ascending_BV, order_BV = scores_BV.sort(dim=-1)
    out_BV = is_out(ascending_BV.softmax(-1).cumsum(-1))
    out_BV[:, -1] = False
    return scores_BV.masked_fill(out_BV.scatter(1, order_BV, out_BV), float("-inf"))


def sample_from(chances_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw by inverse CDF: the first token whose cumulative weight exceeds the uniform, never one of weight 0.

    Weights need not sum to 1. Raises LogitsError where a row has none.
    """
    return _checked(*_drawn(chances_BV, uniform_B))


def _drawn(chances_BV: Tensor, uniform_B: Tensor) -> TokenChoice:
    wide = _wide(chances_BV.device)
    cdf_BV = chances_BV.cumsum(-1, dtype=wide)
    total_B1 = cdf_BV[:, -1:]
    token_B1 = torch.searchsorted(cdf_BV, uniform_B.to(wide).unsqueeze(1) * total_B1, right=True)
    return token_B1.clamp_(max=chances_BV.shape[-1] - 1).squeeze(1), _is_none(total_B1.squeeze(1))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _is_none(witness_B: Tensor) -> Tensor:
    return witness_B.isnan() | (witness_B == float("-inf"))


def _checked(token_B: Tensor, bad_B: Tensor) -> Tensor:
    if bad_B.any():
        raise LogitsError(tuple(bad_B.nonzero()[:, 0].tolist()))
    return token_B


def uniforms(example_id: str, seed: int, n: int, stream: str = "") -> np.ndarray:
    """Return the first `n` uniforms of one example: a function of (seed, id, step, stream) alone.

    Philox, a counter-based generator (Salmon et al. 2011), keyed by a hash of seed and id.
    """
    digest = hashlib.blake2b(
        f"{seed}/{example_id}".encode("utf-8", "surrogatepass"), digest_size=16, person=stream.encode()
    ).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)
