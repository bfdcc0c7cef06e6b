"""Observe attention queries, keys, values and weights while a model runs.

transformers registers attention functions by name. Ours calls the `eager_attention_forward` defined beside the model's
attention class, so its soft-capping, sinks, windows and scaling apply, and passes inputs and weights to an observer.
Tokens are the same with and without an observer.

Shapes: B rows, H heads, G key heads, T new tokens, S columns of the pass (the new tokens last), C head dimension.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from extraction.core.errors import ModelError
from extraction.model.language_model import decoder_of

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

ATTENTION_NAME = "traitline"
# sdpa has no soft-capping: transformers 5.4 runs Gemma-2 without it, later versions refuse to. A model that runs
# without soft-capping is observed without it too.
UNCAPPED_NAMES = {"sdpa": f"{ATTENTION_NAME}-uncapped"}
REMEDY = "capture without attention (--no-attention)"


@dataclass(frozen=True)
class AttentionReading:
    """One layer's attention in one pass. The tensors are views of the model's: copy them to keep them.

    `q_BTHC`, `k_BTGC`, `v_BTGC`: of the NEW tokens, after any normalisation and rotary embedding. `weights_BHTS`: over
    all columns of the pass, the new tokens' last; 0 in masked columns. A row sums to 1, or to less with attention sinks
    (gpt_oss: the rest goes to the sink). The row of a padded token is finite and has no meaning.
    """

    q_BTHC: Tensor
    k_BTGC: Tensor
    v_BTGC: Tensor
    weights_BHTS: Tensor


Observe = Callable[[int, AttentionReading], None]
# attention module (and every other module of its block) -> (layer, observer)
_observers: WeakKeyDictionary[nn.Module, tuple[int, Observe]] = WeakKeyDictionary()


@contextmanager
def watch_attention(lm: LanguageModel, layers: Sequence[int], observe: Observe) -> Iterator[None]:
    """Call `observe(layer, AttentionReading)` in every pass while the block lasts.

    A short pass checks first that every layer can be observed. The former attention implementation is restored at the
    end. Raises ModelError for a model that computes attention without transformers' interface, attends twice in a
    layer, or is observed already.
    """
    out_of_range = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if out_of_range:
        raise ModelError(f"layer {out_of_range[0]} is out of range: the model has layers 0 to {lm.n_layers - 1}")
    with _observable_attention(lm):
        _check_observable(lm, layers)
        with _observed(lm, layers, observe):
            yield


@contextmanager
def _observable_attention(lm: LanguageModel) -> Iterator[None]:
    """Switch the decoder to our attention function. Other towers of the model keep theirs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    decoder: Any = decoder_of(lm.model)
    kind = type(lm.model).__name__
    if not any(eager_attention_of(module) for module in lm.layers[0].modules()):
        raise ModelError(f"{kind} computes attention in code of its own, whose weights can't be read: {REMEDY}")
    before = attention_implementations(decoder.config)
    if any(str(name).startswith(ATTENTION_NAME) for name in before.values()):
        raise ModelError(f"{kind} is observed already: leave the first watch_attention before the next")
    for name, attend in {
        ATTENTION_NAME: _observed_attention,
        UNCAPPED_NAMES["sdpa"]: _observed_attention_uncapped,
    }.items():
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, eager_mask)
    try:
        with _one_line_errors(kind):
            decoder.set_attn_implementation(UNCAPPED_NAMES.get(before[""], ATTENTION_NAME))
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _one_line_errors(kind: str) -> Iterator[None]:
    """Turn any exception of an architecture into a ModelError of one line."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
        raise ModelError(f"the attention of {kind} can't be observed ({reason}): {REMEDY}") from failure


def attention_implementations(config: Any) -> dict[str, Any]:
    """Return the argument of `set_attn_implementation` that restores a config and its sub-configs as they are."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    current = {name: sub._attn_implementation for name, sub in inner.items() if sub is not None}
    return {"": config._attn_implementation, **current}


def eager_attention_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the `eager_attention_forward` defined beside a module's class or one of its base classes."""
    sources = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((eager for source in sources if (eager := getattr(source, "eager_attention_forward", None))), None)


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Run the model's own eager attention and pass it to the module's observer. Called by transformers."""
    eager = eager_attention_of(module)
    if eager is None:
        raise ModelError(f"{type(module).__name__} has no eager attention, so its weights can't be read: {REMEDY}")
    out, weights_BHTS = eager(module, query, key, value, attention_mask, **settings)
    layer, observe = _observers.get(module, (0, None))
    if observe is not None:
        width = query.shape[2]
        q, k, v = (states.transpose(1, 2) for states in (query, key[:, :, -width:], value[:, :, -width:]))
        observe(layer, AttentionReading(q, k, v, weights_BHTS))
    return out, weights_BHTS


def _observed_attention_uncapped(*args: Any, softcap: float | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Run `_observed_attention` without soft-capping."""
    return _observed_attention(*args, **settings)


@contextmanager
def _observed(lm: LanguageModel, layers: Sequence[int], observe: Observe) -> Iterator[None]:
    modules = [(module, layer) for layer in layers for module in lm.layers[layer].modules()]
    try:
        _observers.update({module: (layer, observe) for module, layer in modules})
        yield
    finally:
        for module, _ in modules:
            _observers.pop(module, None)


def _check_observable(lm: LanguageModel, layers: Sequence[int]) -> None:
    """Run three tokens: every layer must attend once, with weights for the columns of the pass and no others."""
    n_calls: Counter[int] = Counter()

    def note(layer: int, reading: AttentionReading) -> None:
        n_calls[layer] += 1
        if reading.weights_BHTS is None or reading.weights_BHTS.shape[-2:] != (3, 3):
            raise ModelError(f"layer {layer} of {type(lm.model).__name__} returns no attention weights: {REMEDY}")

    ids_BT = torch.arange(1, 4, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    with _one_line_errors(type(lm.model).__name__), torch.inference_mode(), _observed(lm, layers, note):
        lm.hidden_states(ids_BT)
    for layer in layers:
        if n_calls[layer] != 1:
            raise ModelError(
                f"layer {layer} of {type(lm.model).__name__} attends {n_calls[layer]} times, 1 is expected: {REMEDY}"
            )
