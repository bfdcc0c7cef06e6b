"""One prompt's capture as its file holds it: tensors with the names of their axes, and the header.

Shapes: T tokens (prompt tokens, then response tokens), L layers, D hidden, P points of a layer, K traits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.core.records import POINTS, STREAM, Prompt
from extraction.monitoring.plan import MonitoringPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from extraction.engine.requests import Completion
    from extraction.model.language_model import LanguageModel

CONVENTIONS: dict[str, str] = {
    "rows": "row i is the state where token i is the input; the first n_prompt rows are the prompt's",
    "layers": "layer k is the output of decoder block k, counted from 0; the embeddings are not a layer",
    "points": "residual_in is a block's input, after_attention the residual stream after the attention block was added "
    "(where attention and MLP run side by side: residual_in and what attention adds), residual_out its output",
    "projections": "the dot product with the vector over its norm, float32",
}
INTERNALS = {
    "q, k, v": "what the projections give, by head, before any normalisation and rotary embedding",
    "rot_q, rot_k": "queries and keys as attention compares them, after both",
    "mlp": "mlp_up and mlp_gate are what these projections give, mlp_activation is what goes into the down projection, "
    "mlp_down what comes out of it",
    "residual_mid": "the same as after_attention",
}
ATTENTION = {
    2: "weights averaged over heads, one row a response token, 0 to the right of the row's own token",
    3: "weights of every head, 0 to the right of the row's own token",
}
HEADS = {"q": "head", "rot_q": "head", **dict.fromkeys(("k", "v", "rot_k"), "key_head")}

NamedTensors = dict[str, tuple["Tensor", tuple[str, ...]]]  # name -> tensor, names of its axes


def named_tensors(plan: MonitoringPlan, activations: Mapping[str, Tensor]) -> NamedTensors:
    """Return what a prompt's file holds: captured tensors, and a tensor of projections [T, L, P] for each trait."""
    tensors = {name: (tensor, axes_of(plan.tier, name, tensor.ndim)) for name, tensor in activations.items()}
    if plan.vectors:
        projections_TLPK = tensors.pop("projections")[0] if plan.tier == 2 else project_stream(plan, activations)
        for k, vector in enumerate(plan.vectors):
            tensors[f"projections.{vector.trait}"] = (projections_TLPK[..., k], ("token", "layer", "point"))
    return tensors


def project_stream(plan: MonitoringPlan, activations: Mapping[str, Tensor]) -> Tensor:
    """Project the residual stream that tier 3 captures: [T, 1, P, K]."""
    import torch

    stream_T1PD = torch.stack([activations[name] for name in STREAM], dim=1).unsqueeze(1)
    return stream_T1PD @ plan.unit_LDK[0]


def axes_of(tier: int, name: str, n_axes: int) -> tuple[str, ...]:
    """Return the names of a tensor's axes. The neurons of a mixture of experts are those of the chosen experts."""
    if name == "attention":
        return ("token", "layer" if tier == 2 else "head", "column")
    if name in HEADS:
        return ("token", HEADS[name], "channel")
    if name in STREAM or name == "mlp_down":
        return ("token", "hidden")
    return ("token", *(("expert", "neuron") if n_axes == 3 else ("expert" if name.startswith("expert") else "neuron",)))


def header_of(
    plan: MonitoringPlan, lm: LanguageModel, prompt: Prompt, completion: Completion, tensors: NamedTensors
) -> dict[str, Any]:
    """Return the header of a prompt's file: texts, tokens, settings, axes and conventions."""
    assert lm.tokenizer is not None
    token_ids = [*prompt.token_ids, *completion.token_ids]
    return {
        "id": prompt.example.id,
        "prompt": prompt.example.question,
        "system": prompt.example.system,
        "text": prompt.text,
        "response": lm.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
        "tokens": tokens_of(lm.tokenizer, token_ids),
        "pieces": pieces_of(lm.tokenizer, token_ids),
        "token_ids": token_ids,
        "n_prompt": len(prompt.token_ids),
        "finish_reason": completion.finish_reason,
        "tier": plan.tier,
        "model": plan.spec.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "layers": list(plan.layers),
        "points": list(POINTS),
        "traits": [vector.identity() for vector in plan.vectors],
        "tensors": {name: list(axes) for name, (_, axes) in tensors.items()},
        "conventions": {**CONVENTIONS, "attention": ATTENTION[plan.tier], **(INTERNALS if plan.tier == 3 else {})},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a file's bytes."""
    import torch
    import transformers

    from extraction import __version__

    return {"traitline": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


# --- tokens as text -------------------------------------------------------------------------------------------------


def tokens_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return the tokenizer's string of every id; ids beyond the vocabulary (padding of a model's head) by number."""
    named: Any = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [f"<{number}>" if name is None else str(name) for number, name in zip(token_ids, named, strict=True)]


def pieces_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return the text that every id adds; the pieces join to the whole text, with special tokens.

    Where several tokens are the bytes of one character, the last one has it and the others are empty. For a character
    that is cut off, the last token has what the decoder writes for it.
    """
    from tokenizers.decoders import DecodeStream

    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if backend is None:  # a slow tokenizer has no stream: each token is decoded alone
        return [str(tokenizer.decode([number], skip_special_tokens=False)) for number in token_ids]
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(backend, number) or "" for number in token_ids]
    text, streamed = backend.decode(list(token_ids), skip_special_tokens=False), "".join(pieces)
    if pieces and text != streamed and text.startswith(streamed):
        pieces[-1] += text[len(streamed) :]
    return pieces
