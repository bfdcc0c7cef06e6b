"""A model that loads on first use, and work that is repeated at a smaller batch size when memory runs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from extraction.core.progress import ProgressReporter

if TYPE_CHECKING:
    from extraction.config.experiments import Experiment, ModelSpec
    from extraction.model.loading import LanguageModel
if TYPE_CHECKING:
    from extraction.config.experiments import Experiment, ModelSpec
    from extraction.model.loading import LanguageModel


class LazyModel(ABC):
    """A model that is loaded when it is first needed. `fits`: the batch size that was found after memory ran out."""

    fits: int | None

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """Which model."""

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return "lm" in self.__dict__

    @cached_property
    def lm(self) -> LanguageModel:
        """The loaded model."""
        from transformers.utils import logging

        from extraction.model.loading import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(self.spec)

    def slots(self, settings: Experiment, prompt_lengths: Sequence[int]) -> int:
        """The batch size: what was found to fit, what is asked for, or what memory should hold."""
        from extraction.model.memory import auto_batch_size

        if self.fits is not None:
            return self.fits
        if settings.batch_size != "auto":
            return int(settings.batch_size)
        return auto_batch_size(self.lm, prompt_lengths, settings.generation.max_new_tokens)


def load_model(engine: LazyModel, listener: ProgressReporter) -> None:
    """Load the model, saying so, unless it is loaded."""
    if not engine.is_loaded:
        listener.note(f"loading {engine.spec.name}")
        for note in (*device_notes(engine.lm.spread), *cuda_graph_notes(engine.lm)):
            listener.note(note)


def device_notes(spread: Mapping[str, int]) -> Iterator[str]:
    """Where the layers of a model are that is spread over several devices."""
    if spread:
        yield "layers: " + ", ".join(f"{count} on {place}" for place, count in spread.items())
    if any(not place.startswith("cuda") for place in spread):
        yield (
            "layers in main memory are fetched for every pass, which is slow: use --quantize 4bit, --dtype bfloat16, "
            "more GPUs or a smaller model"
        )


def cuda_graph_notes(lm: LanguageModel) -> Iterator[str]:
    """Why the decode steps of a model on a GPU are not recorded as a graph, which costs speed and nothing else."""
    from extraction.engine.cuda_graphs import graph_recorder_for, unsupported_reason

    graph_recorder_for([lm])
    if unsupported_reason(lm):
        yield f"decode steps run one by one: this model's can't be recorded as a graph ({unsupported_reason(lm)})"


def retry_with_smaller_batch(
    run: Callable[[int], None], batch_size: int, engine: LazyModel, listener: ProgressReporter, undo: Callable[[], None]
) -> int:
    """Run at a batch size; when memory runs out, again at half of it. Returns the size that worked."""
    from extraction.engine.run_loop import smaller_batch
    from extraction.model.devices import empty_cache
    from extraction.model.memory import is_out_of_memory

    while True:
        try:
            run(batch_size)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            undo()
            smaller = smaller_batch(batch_size, failure)
        else:
            return batch_size
        batch_size = engine.fits = smaller
        listener.note(f"out of memory: again with batch size {batch_size}")
        empty_cache()
