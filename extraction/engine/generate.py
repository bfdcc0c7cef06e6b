"""The run loop, and the ways into the engine: generate responses, and read existing ones (teacher forcing).

The loop steps a batch until every request has its completion, with fewer slots when memory runs out.

Shapes: T tokens, L layers, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from extraction.activations.pooled import Capture, CaptureSpec
from extraction.core.errors import ModelError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.requests import Completion, Request
from extraction.engine.sequence import BatchLimits, StepOutput
from extraction.engine.strategies import Strategy
from extraction.engine.teacher_forcing import Text, teacher_forced_activations
from extraction.model.devices import empty_cache
from extraction.model.language_model import LanguageModel
from extraction.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Progress = Callable[[int], None]


def run_loop(
    make_batch: Callable[[int], ContinuousBatch],
    requests: Sequence[Request],
    batch_size: int,
    *,
    on_step: Callable[[StepOutput], None] | None = None,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> Iterator[Completion]:
    """Yield the completion of every request, as they end; one that failed carries its `fault`.

    Args:
        make_batch: makes an empty batch of at most so many slots.
        on_step: called after each step, before its completions are yielded.
        on_smaller_batch: called with half the batch size after memory ran out; the unfinished requests then start
            again. Without it, the error is raised. ModelError when one slot is too many.
    """
    unfinished = {request.id: request for request in requests}
    while unfinished:
        try:
            for output in _steps(make_batch(batch_size), list(unfinished.values())):
                if on_step is not None:
                    on_step(output)
                for completion in output.completions:
                    del unfinished[completion.id]
                    yield completion
        except (RuntimeError, MemoryError) as failure:
            if on_smaller_batch is None or not is_out_of_memory(failure):
                raise
            batch_size = smaller_batch(batch_size, failure)
        else:
            return
        # outside of the handler, which holds on to the memory of the failed step
        empty_cache()
        on_smaller_batch(batch_size)


def _steps(batch: ContinuousBatch, requests: Sequence[Request]) -> Iterator[StepOutput]:
    batch.add(requests)
    with batch.attached():
        while batch.has_work:
            yield batch.step()


def smaller_batch(batch_size: int, failure: BaseException) -> int:
    """Return half of a batch size that did not fit in memory. ModelError if it was 1."""
    if batch_size == 1:
        raise ModelError(
            "out of memory even with --batch-size 1: use a smaller model, --dtype bfloat16, fewer --layers or a lower "
            "--max-new-tokens; finished shards are kept"
        ) from failure
    return batch_size // 2


def warn_of_smaller_batch(batch_size: int) -> None:
    """Warn that a batch goes on with fewer slots, for callers that have no progress reporter."""
    warnings.warn(f"out of memory: going on with batch size {batch_size}", stacklevel=2)


# --- ways in --------------------------------------------------------------------------------------------------------


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
        """Make an empty batch of at most this many slots."""
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
