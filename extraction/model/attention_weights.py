"""What attention compares and weighs, seen while a model runs: the model's own eager attention, watched.

transformers lets one register an attention function by name. Ours calls the `eager_attention_forward` beside the
model's attention class, so its soft-capping, sinks, windows and scaling hold, and shows what went in and came out.
A run that is watched gives the tokens that it gives unwatched.

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

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

NAME = "traitline"
# sdpa knows no soft-capping: transformers 5.4 runs Gemma-2 without it, later versions refuse to. What a model runs
# without is not there when it is watched either.
UNCAPPED = {"sdpa": f"{NAME}-uncapped"}
REMEDY = "capture without attention (--no-attention)"


@dataclass(frozen=True)
class AttentionReading:
    """One layer's attention over one pass. Views of the model's tensors: copy what is kept, change nothing.

    `q_BTHC`, `k_BTGC`, `v_BTGC`: the NEW tokens', as attention compares them: after any normalisation and rotary
    embedding. `weights_BHTS`: over all columns of the pass, the new tokens' last; 0 in masked columns. A row sums to 1,
    to less where the model has attention sinks (gpt_oss: the rest goes to the sink). A padded token's row is finite and
    means nothing.
    """

    q_BTHC: Tensor
    k_BTGC: Tensor
    v_BTGC: Tensor
    weights_BHTS: Tensor


Observe = Callable[[int, AttentionReading], None]
# who watches: attention module (and every other module of its block) -> its layer, and whom to tell
_watched: WeakKeyDictionary[nn.Module, tuple[int, Observe]] = WeakKeyDictionary()


@contextmanager
def watch_attention(lm: LanguageModel, layers: Sequence[int], observe: Observe) -> Iterator[None]:
    """Call `observe(layer, Attended)` in every pass, while the block lasts; a short pass proves first that it works.

    The model's former implementation comes back. Raises ModelError where a model's attention can't be watched: it has
    an attention of its own, attends twice a layer, or is being watched already.
    """
    beyond = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if beyond:
        raise ModelError(f"layer {beyond[0]} is out of range: the model has layers 0 to {lm.n_layers - 1}")
    with _eager(lm):
        _prove(lm, layers)
        with _telling(lm, layers, observe):
            yield


@contextmanager
def _eager(lm: LanguageModel) -> Iterator[None]:
    """The decoder on our attention function. Only the decoder: another tower of the model keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    decoder: Any = lm.model.get_decoder() if hasattr(lm.model, "get_decoder") else lm.model
    kind = type(lm.model).__name__
    if not any(eager_of(module) for module in lm.layers[0].modules()):
        raise ModelError(f"{kind} has an attention of its own, whose weights can't be read: {REMEDY}")
    before = implementations(decoder.config)
    if any(str(name).startswith(NAME) for name in before.values()):
        raise ModelError(f"{kind} is being watched already: leave the first watching_attention before the next")
    for name, attend in {NAME: _attend, UNCAPPED["sdpa"]: _attend_uncapped}.items():
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, eager_mask)
    try:
        with _refusing(kind):
            decoder.set_attn_implementation(UNCAPPED.get(before[""], NAME))
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Say in one line what an architecture objects to, in whatever way it does."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
        raise ModelError(f"the attention of {kind} can't be watched ({reason}): {REMEDY}") from failure


def implementations(config: Any) -> dict[str, Any]:
    """What `set_attn_implementation` takes to bring a config and those within it back to where they are."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    kept = {name: sub._attn_implementation for name, sub in inner.items() if sub is not None}
    return {"": config._attn_implementation, **kept}


def eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The eager attention that stands beside a module's class, or a class that it comes from."""
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((found for home in homes if (found := getattr(home, "eager_attention_forward", None))), None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """What transformers calls: the model's own eager attention, shown to who watches the module."""
    eager = eager_of(module)
    if eager is None:
        raise ModelError(f"{type(module).__name__} has no eager attention, so its weights can't be read: {REMEDY}")
    added, weights_BHTS = eager(module, query, key, value, attention_mask, **settings)
    layer, observe = _watched.get(module, (0, None))
    if observe is not None:
        width = query.shape[2]
        q, k, v = (states.transpose(1, 2) for states in (query, key[:, :, -width:], value[:, :, -width:]))
        observe(layer, AttentionReading(q, k, v, weights_BHTS))
    return added, weights_BHTS


def _attend_uncapped(*given: Any, softcap: float | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The same without soft-capping."""
    return _attend(*given, **settings)


@contextmanager
def _telling(lm: LanguageModel, layers: Sequence[int], observe: Observe) -> Iterator[None]:
    modules = [(module, layer) for layer in layers for module in lm.layers[layer].modules()]
    try:
        _watched.update({module: (layer, observe) for module, layer in modules})
        yield
    finally:
        for module, _ in modules:
            _watched.pop(module, None)


def _prove(lm: LanguageModel, layers: Sequence[int]) -> None:
    """Three tokens: every layer must show one attention, with weights for the columns of the pass and no others."""
    seen: Counter[int] = Counter()

    def note(layer: int, attended: AttentionReading) -> None:
        seen[layer] += 1
        if attended.weights_BHTS is None or attended.weights_BHTS.shape[-2:] != (3, 3):
            raise ModelError(f"layer {layer} of {type(lm.model).__name__} shows no attention weights: {REMEDY}")

    ids_BT = torch.arange(1, 4, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    with _refusing(type(lm.model).__name__), torch.inference_mode(), _telling(lm, layers, note):
        lm.hidden_states(ids_BT)
    for layer in layers:
        if seen[layer] != 1:
            raise ModelError(
                f"layer {layer} of {type(lm.model).__name__} attends {seen[layer]} times, 1 is expected: {REMEDY}"
            )
