"""The public batched API: continuous batching with activations captured in the same forward pass.

`generate` and `teacher_force` work on token ids; `generate_batch_with_activations` and `get_activations_from_texts` on
texts. The engine itself is `extraction.engine`: start at `extraction.engine.batch`.

Shapes: T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from extraction.activations.pooled import Capture
from extraction.engine.generate import Progress, encode_text, generate, teacher_force
from extraction.engine.requests import Completion, Request
from extraction.engine.sampler import Sample
from extraction.model.loading import wrap

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Capture",
    "Completion",
    "Progress",
    "Request",
    "encode_text",
    "generate",
    "generate_batch_with_activations",
    "get_activations_from_texts",
    "teacher_force",
]


def generate_batch_with_activations(  # noqa: PLR0913 (a script's one call)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 150,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("residual",),
    poolings: Sequence[str] = ("response_mean",),
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Generate for every prompt, capturing activations in the same pass.

    `prompts` are exact texts: apply a chat template before. `sampling` has the fields of `Sample`: temperature (0 by
    default: greedy), top_k, top_p and others. Returns, in their order, dicts with prompt, response, token_ids,
    finish_reason and activations (`site.pooling` -> [L, D], row i the i-th of `layers`, default all).
    """
    lm = wrap(model, tokenizer)
    encoded = [encode_text(tokenizer, prompt) for prompt in prompts]
    requests = [Request(str(i), tuple(ids), max_new_tokens, seed) for i, ids in enumerate(encoded)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    strategy = Sample(**sampling)
    done = {c.id: c for c in generate(lm, requests, batch_size=batch_size, strategy=strategy, capture=capture)}
    return [
        {
            "prompt": prompt,
            "response": tokenizer.decode(list(done[str(i)].token_ids), skip_special_tokens=True),
            "token_ids": list(done[str(i)].token_ids),
            "finish_reason": done[str(i)].finish_reason,
            "activations": done[str(i)].activations,
        }
        for i, prompt in enumerate(prompts)
    ]


def get_activations_from_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("residual",),
    poolings: Sequence[str] = ("response_mean",),
) -> list[dict[str, Tensor]]:
    """Capture activations of texts in one teacher-forced pass.

    A text is a string, all of which counts as response, or (prompt ids, response ids), which are used unchanged.
    Returns, in their order, `site.pooling` -> [L, D].
    """
    lm = wrap(model, tokenizer)
    pairs = [((), encode_text(tokenizer, text)) if isinstance(text, str) else text for text in texts]
    forced = [(str(i), prompt, response) for i, (prompt, response) in enumerate(pairs)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    done = {c.id: c.activations for c in teacher_force(lm, forced, capture=capture, batch_size=batch_size)}
    return [done[str(i)] for i in range(len(texts))]
