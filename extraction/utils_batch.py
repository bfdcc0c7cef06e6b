"""THE ENGINE: left-padded continuous batching, with activations captured in the same pass.

One loop (`extraction.running`) serves plain sampling, amplification and speculation. Here are its ways in: `generate`,
`teacher_force`, and two functions for people who script.

Shapes: T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from extraction.capture import Capture, Recording
from extraction.continuations import Completion, Request
from extraction.decoding.sample import Sample
from extraction.models import LanguageModel, wrap
from extraction.partners import Strategy
from extraction.running import RunningBatch
from extraction.seats import Limits
from extraction.teacher import Text, forced_activations

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
Progress = Callable[[int], None]


def generate(
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    strategy: Strategy | None = None,
    capture: Recording | None = None,
    stop_strings: Sequence[str] = (),
    on_progress: Progress | None = None,
    in_order: bool = False,
) -> Iterator[Completion]:
    """Continue every request, longest prompt first or `in_order`; yield completions as they end.

    `strategy`: Sample (greedy without one), Amplify or Speculate. `on_progress` is told the number of new response
    tokens after each step. Activations are those of the steered stream. Raises PromptError for a request that the
    model can't hold, ConfigError for a steering or an alpha that does not fit, ModelError for a second model of another
    vocabulary, ActivationError where an activation or a logit is not finite.
    """
    batch = RunningBatch(
        lm,
        Limits.of(requests, batch_size),
        strategy=strategy,
        capture=capture,
        stop_strings=tuple(stop_strings),
        steerings=[request.steering for request in requests if request.steering is not None],
    )
    batch.add(requests if in_order else sorted(requests, key=lambda request: len(request.token_ids), reverse=True))
    with batch.watching():
        while batch.has_work:
            news = batch.advance()
            if on_progress is not None:
                on_progress(sum(map(len, news.fresh.values())))
            for completion in news.done:
                if completion.fault is not None:
                    raise completion.fault
                yield completion


def teacher_force(
    lm: LanguageModel,
    texts: Sequence[Text],
    *,
    capture: Capture,
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> Iterator[Completion]:
    """Activations of responses that exist already: `texts` are (id, prompt ids, response ids), never re-tokenised.

    Yields completions, longest first; `finish_reason` is `given`. Errors as in `generate`.
    """
    responses = {example_id: tuple(response) for example_id, _, response in texts}
    for example_id, kept in forced_activations(lm, texts, capture=capture, batch_size=batch_size):
        if on_progress is not None:
            on_progress(len(responses[example_id]))
        yield Completion(example_id, responses[example_id], "given", kept)


def generate_batch_with_activations(  # noqa: PLR0913 (a script's one call)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 150,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("residual",),
    poolings: Sequence[str] = ("response_mean",),
) -> list[dict[str, Any]]:
    """Generate for every prompt, capturing in the same pass. For people who script.

    `prompts` are exact texts: apply a chat template before. Returns, in their order, dicts with prompt, response,
    token_ids, finish_reason and activations (`site.pooling` -> [L, D], row i the i-th of `layers`, default all).
    """
    lm = wrap(model, tokenizer)
    encoded = [encode_text(tokenizer, prompt) for prompt in prompts]
    requests = [Request(str(i), tuple(ids), max_new_tokens, seed) for i, ids in enumerate(encoded)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    strategy = Sample(temperature, top_k, top_p)
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
    """Activations of texts in one teacher-forced pass. For people who script.

    A text is a string, all of which counts as response, or (prompt ids, response ids), which are taken as they are.
    Returns, in their order, `site.pooling` -> [L, D].
    """
    lm = wrap(model, tokenizer)
    pairs = [((), encode_text(tokenizer, text)) if isinstance(text, str) else text for text in texts]
    forced = [(str(i), prompt, response) for i, (prompt, response) in enumerate(pairs)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    done = {c.id: c.activations for c in teacher_force(lm, forced, capture=capture, batch_size=batch_size)}
    return [done[str(i)] for i in range(len(texts))]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, with exactly one BOS if the tokenizer has one of its own accord."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
