"""The run loop: step a batch until every request has its completion, with fewer slots when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

from extraction.core.errors import ModelError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.requests import Completion, Request
from extraction.engine.sequence import StepOutput
from extraction.model.devices import empty_cache
from extraction.model.memory import is_out_of_memory


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
