"""A short text to try a model's decoding on, and the check of every loaded model.

`check_decoding` proves that a model decodes in cache slots as it does alone. Other checks of an optimisation (grouped
attention, CUDA graphs) compare the logits of the same text.

Shapes: B two rows, T tokens or steps, S columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extraction.core.errors import ModelError
from extraction.model.kv_cache import CacheWindow, cache_argument, make_cache

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

EXACT_TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1  # of the largest logit; see LanguageModel.is_exact


class ProbeText:
    """Two rows of up to 14 tokens and a cache to decode them through.

    The first row's prompt is `n_prompt` tokens, longer than the kernels of convolutions in use; the second row's is 2,
    left-padded, and shorter than those. Five tokens more of each row are read one by one.
    """

    n_steps = 5

    def __init__(self, lm: LanguageModel, columns: int | None = None) -> None:
        self.lm = lm
        self.n_tokens = max(self.n_steps + 2, min(14, lm.max_positions or 14))
        self.n_prompt = self.n_tokens - self.n_steps
        ids_BT = torch.arange(1, 2 * self.n_tokens + 1, device=lm.device).mul(7).remainder(lm.vocab_size)
        self.ids_BT = ids_BT.reshape(2, self.n_tokens)
        self.starts = (0, self.n_prompt - 2)
        self.mask_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        self.mask_BT[1, : self.starts[1]] = False
        self.position_BT = (self.mask_BT.cumsum(1) - 1).clamp_(min=0)
        self.cache = make_cache(lm.model, CacheWindow(slots=2, columns=columns or self.n_tokens))

    def read(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor) -> Tensor:
        """Run one pass through the cache and return the last column's logits [B, V]."""
        return self.lm.cached_logits(ids_BT, mask_BS, position_BT, self.cache)[:, -1]

    def prefill(self, rows: Sequence[int] = (0, 1)) -> Tensor:
        """Read these rows' prompts and return their last logits [B, V]."""
        prompt = slice(min(self.starts[row] for row in rows), self.n_prompt)
        rows_R = torch.tensor(rows, device=self.lm.device)
        with self.cache.window.prefilling(rows_R, cursor=self.n_prompt):
            return self.read(*(part[rows_R, prompt] for part in (self.ids_BT, self.mask_BT, self.position_BT)))

    def step(self, t: int) -> Tensor:
        """Read token t and return its logits [B, V]."""
        logits_BV = self.read(self.ids_BT[:, t : t + 1], self.mask_BT[:, : t + 1], self.position_BT[:, t : t + 1])
        self.cache.window.cursor += 1
        return logits_BV

    def decode(self, groups: Sequence[Sequence[int]] = ((0, 1),)) -> Tensor:
        """Read the prompts, those of a group together, and then token by token: logits [T, B, V]."""
        prompts_BV = torch.cat([self.prefill(rows) for rows in groups])
        return torch.stack([prompts_BV, *map(self.step, range(self.n_prompt, self.n_tokens))])

    def read_alone(self) -> Tensor:
        """Read each row in one pass, alone and without a cache: logits [T, B, V] at the places that `decode` gives."""
        rows = [self.lm.logits(self._row(row), self.n_steps + 1, use_cache=False)[0] for row in range(2)]
        return torch.stack(rows, dim=1)

    def decode_alone(self) -> Tensor:
        """Decode each row alone, through the cache that transformers makes: logits [T, B, V]."""
        return torch.stack([self._decode_row(row) for row in range(2)], dim=1)

    def _row(self, row: int) -> Tensor:
        return self.ids_BT[row : row + 1, self.starts[row] :]

    def _decode_row(self, row: int) -> Tensor:
        ids_1T = self._row(row)
        name = cache_argument(self.lm.inputs)
        n_read, cache, logits = 0, None, []
        for n_new in (ids_1T.shape[1] - self.n_steps, *[1] * self.n_steps):
            inputs: dict[str, Any] = {name: cache, "use_cache": True}
            if "position_ids" in self.lm.inputs:
                inputs["position_ids"] = torch.arange(n_read, n_read + n_new, device=ids_1T.device).unsqueeze(0)
            output = self.lm.model(input_ids=ids_1T[:, n_read : n_read + n_new], **inputs)
            cache, n_read = getattr(output, name), n_read + n_new
            logits.append(output.logits[0, -1])
        return torch.stack(logits)


@torch.inference_mode()
def decode_probe(lm: LanguageModel) -> Tensor:
    """Return the float64 logits [T B, V] of a short text: a prefill, then token by token, through the cache."""
    return ProbeText(lm).decode().double().flatten(0, 1)


@torch.inference_mode()
def check_decoding(lm: LanguageModel, name: str) -> LanguageModel:
    """Check that a model decodes in cache slots as it does alone; return it with what is learned of its state.

    The probe's rows are read together, left-padded. Their logits must be those of each row alone: in one pass or, where
    the model keeps states besides keys and values (its scan of a text may round or clamp otherwise than its steps), by
    transformers' own cache.

    Raises ModelError where they differ: the model is not causal, or it keeps a state outside of its cache.
    """
    try:
        text = ProbeText(lm)
        together_TBV, scan_TBV = text.decode(), text.read_alone()
        lm = replace(lm, state_bytes=text.cache.state_bytes)
        alone_TBV = text.decode_alone() if lm.state_bytes else scan_TBV
        if not agree(lm, together_TBV, alone_TBV):
            if not agree(lm, ProbeText(lm).decode(groups=((0,), (1,))), alone_TBV):
                raise ModelError(
                    f"{name} does not decode through a cache as it reads a text: it is not causal, or it keeps a "
                    "state outside of the cache; use another decoder-only model"
                )
            lm = replace(lm, pads_prompts=False)
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as failure:  # an architecture may raise anything
        raise ModelError(
            f"{name} can't decode with a cache of slots ({type(failure).__name__}: "
            f"{' '.join(str(failure).split())[:120]}); use another decoder-only model"
        ) from failure
    if not agree(lm, scan_TBV, alone_TBV):
        lm = replace(lm, notes=(*lm.notes, _scan_note(name, float(_errors(scan_TBV, alone_TBV).max()))))
    return lm


def agree(lm: LanguageModel, logits_TBV: Tensor, expected_TBV: Tensor) -> bool:
    """Return True if logits are equal up to rounding, in every row. With a coarse dtype most steps of a row must be.

    A mixture of experts may route one token otherwise by rounding alone, and all its logits change.
    """
    error_TB = _errors(logits_TBV, expected_TBV)
    if lm.is_exact:
        return bool((error_TB <= EXACT_TOLERANCE).all())
    return bool((error_TB.median(dim=0).values <= ROUNDED_TOLERANCE).all())


def _errors(logits_TBV: Tensor, expected_TBV: Tensor) -> Tensor:
    """Largest difference of each step's logits, in parts of the largest logit: [T, B]. Non-finite ones don't count."""
    logits_TBV, expected_TBV = logits_TBV.float(), expected_TBV.float()
    finite_TBV = logits_TBV.isfinite() & expected_TBV.isfinite()  # the engine reports non-finite logits row by row
    difference_TBV = torch.where(finite_TBV, logits_TBV - expected_TBV, 0.0).abs()
    scale = torch.where(finite_TBV, expected_TBV, 0.0).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return difference_TBV.amax(-1) / scale


def _scan_note(name: str, error: float) -> str:
    return (
        f"{name}: transformers reads a whole text otherwise than token by token (logits differ by up to {error:.0e} of "
        "the largest): activations of given texts differ by as much from those of generated ones"
    )
