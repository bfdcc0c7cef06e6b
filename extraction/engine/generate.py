"""The ways into the engine: generate responses, and read responses that exist already (teacher forcing).

Shapes: T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from extraction.activations.pooled import Capture, CaptureSpec
from extraction.engine.batch import ContinuousBatch
from extraction.engine.requests import Completion, Request
from extraction.engine.run_loop import run_loop
from extraction.engine.sequence import BatchLimits, StepOutput
from extraction.engine.strategies import Strategy
from extraction.engine.teacher_forcing import Text, teacher_forced_activations
from extraction.model.loading import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Progress = Callable[[int], None]


def generate(  # noqa: PLR0913
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    strategy: Strategy | None = None,
    capture: CaptureSpec | None = None,
    stop_strings: Sequence[str] = (),
    on_progress: Progress | None = None,
    in_order: bool = False,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> Iterator[Completion]:
    """Continue every request, longest prompt first or `in_order`; yield completions as they end.

    Args:
        strategy: Sample (greedy without one), Amplify or Speculate.
        capture: activations to keep; they are those of the steered residual stream.
        on_progress: called with the number of new response tokens after each step.
        on_smaller_batch: called when memory ran out and the unfinished requests start again at half the batch size;
            without it, out of memory is raised.

    Raises PromptError for a request that the model can't hold, ConfigError for a steering or an alpha that does not
    fit, ModelError for a second model of another vocabulary, ActivationError where an activation or a logit is not
    finite.
    """

    def make_batch(n_slots: int) -> ContinuousBatch:
        return ContinuousBatch(
            lm,
            BatchLimits.of(requests, n_slots),
            strategy=strategy,
            capture=capture,
            stop_strings=tuple(stop_strings),
            steerings=[request.steering for request in requests if request.steering is not None],
        )

    def report(output: StepOutput) -> None:
        if on_progress is not None:
            on_progress(sum(map(len, output.new_tokens.values())))

    ordered = requests if in_order else sorted(requests, key=lambda request: len(request.token_ids), reverse=True)
    for completion in run_loop(make_batch, ordered, batch_size, on_step=report, on_smaller_batch=on_smaller_batch):
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
    """Capture activations of existing responses. `texts` are (id, prompt ids, response ids), never re-tokenised.

    Yields completions, longest first, with `finish_reason` "given". Errors as in `generate`.
    """
    responses = {example_id: tuple(response) for example_id, _, response in texts}
    for example_id, kept in teacher_forced_activations(lm, texts, capture=capture, batch_size=batch_size):
        if on_progress is not None:
            on_progress(len(responses[example_id]))
        yield Completion(example_id, responses[example_id], "given", kept)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text, with exactly one BOS token if the tokenizer adds one by default."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
