"""The check before a run: a few of its prompts, batched by the engine and alone by the plain model, must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.activations.pooled import Capture
from extraction.core.errors import ModelError
from extraction.engine.generate import generate
from extraction.engine.requests import Completion, Request
from extraction.model.hooks import watch

if TYPE_CHECKING:
    from extraction.core.records import Prompt
    from extraction.model.language_model import LanguageModel

N_TOKENS = 8
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the largest logit or activation
ROUNDED_TOLERANCE = 0.1  # of dtypes and kernels that round more


def self_check(lm: LanguageModel, prompts: Sequence[Prompt], layers: tuple[int, ...]) -> float:
    """Decode a few tokens greedily and compare; return the largest relative deviation.

    Every token must be the plain model's best (or tied with it), and every layer's mean activation the same. The plain
    model reads each text alone, unpadded, without a cache, in the run's dtype. Raises ModelError if they disagree.
    """
    requests = [Request(prompt.example.id, prompt.token_ids, N_TOKENS) for prompt in prompts]
    capture = Capture(layers)
    done = {c.id: c for c in generate(lm, requests, batch_size=len(requests), capture=capture)}
    deviations = [
        deviation
        for request in requests
        if (c := done[request.id]).token_ids
        for deviation in _compare_alone(lm, request, c, layers)
    ]
    worst = max(deviations, default=0.0)
    if worst > (TOLERANCE[lm.dtype] if lm.is_exact else ROUNDED_TOLERANCE):
        raise ModelError(
            f"self-check: in a batch the model deviates by {worst:.1e} from itself alone, so its activations can't be "
            "trusted; try --dtype float32, or --self-check 0 to go on all the same"
        )
    return worst


@torch.inference_mode()
def _compare_alone(
    lm: LanguageModel, request: Request, batched: Completion, layers: tuple[int, ...]
) -> tuple[float, float]:
    """Return the relative deviations of one example's logits and activations."""
    ids_BT = torch.tensor([[*request.token_ids, *batched.token_ids]], device=lm.device)
    n_prompt = len(request.token_ids)
    hidden: dict[int, Tensor] = {}
    with watch({layer: lm.layers[layer] for layer in layers}, hidden.__setitem__):
        logits_TV = lm.model(input_ids=ids_BT, use_cache=False).logits[0].float()
    before_TV = logits_TV[n_prompt - 1 : -1]
    chosen_T = before_TV.gather(1, ids_BT[0, n_prompt:].unsqueeze(1))[:, 0]
    regret = float((before_TV.amax(-1) - chosen_T).max() / before_TV.abs().max())
    means_LD = torch.stack([hidden[layer][0, n_prompt:].double().mean(0).to(lm.device) for layer in layers])
    batched_LD = batched.activations["residual.response_mean"].to(means_LD)
    return regret, float((batched_LD - means_LD).abs().max() / means_LD.abs().max())
