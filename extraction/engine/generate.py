"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from extraction.activations.pooled import Capture, CaptureSpec
from extraction.engine.batch import ContinuousBatch
from extraction.engine.requests import Completion, Request
from extraction.engine.sequence import BatchLimits
from extraction.engine.strategies import Strategy
from extraction.engine.teacher_forcing import Text, teacher_forced_activations
from extraction.model.loading import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Progress = Callable[[int], None]


def generate(
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    strategy: Strategy | None = None,
    capture: CaptureSpec | None = None,
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
    batch = ContinuousBatch(
        lm,
        BatchLimits.of(requests, batch_size),
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
    for example_id, kept in teacher_forced_activations(lm, texts, capture=capture, batch_size=batch_size):
        if on_progress is not None:
            on_progress(len(responses[example_id]))
        yield Completion(example_id, responses[example_id], "given", kept)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, with exactly one BOS if the tokenizer has one of its own accord."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
