"""A model that loads on first use, and work that is repeated at a smaller batch size when memory runs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from extraction.core.progress import ProgressReporter

if TYPE_CHECKING:
    from extraction.config.experiments import Experiment, ModelSpec
    from extraction.model.language_model import LanguageModel


class LazyModel(ABC):
    """A model that loads on first use. `fits`: batch size that was found to fit after memory ran out."""

    fits: int | None

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The model to load."""

    @property
    def is_loaded(self) -> bool:
        """True if the model is in memory."""
        return "lm" in self.__dict__

    @cached_property
    def lm(self) -> LanguageModel:
        """The loaded model."""
        from transformers.utils import logging

        from extraction.model.loading import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(self.spec)

    def notes(self) -> Iterator[str]:
        """Yield what to say once the model is loaded."""
        lm = self.lm
        yield from (*lm.notes, *rounding_notes(lm), *device_notes(lm.spread), *cuda_graph_notes(lm))

    def slots(self, settings: Experiment, prompt_lengths: Sequence[int]) -> int:
        """Return the batch size: found to fit, else set by the user, else forecast from free memory."""
        from extraction.model.memory import auto_batch_size

        if self.fits is not None:
            return self.fits
        if settings.batch_size != "auto":
            return int(settings.batch_size)
        return auto_batch_size(self.lm, prompt_lengths, settings.generation.max_new_tokens)


def load_model(model: LazyModel, progress: ProgressReporter) -> None:
    """Load the model with a note, unless it is loaded already."""
    if not model.is_loaded:
        progress.note(f"loading {model.spec.name}")
        for note in (
            *model.lm.notes,
            *rounding_notes(model.lm),
            *device_notes(model.lm.spread),
            *cuda_graph_notes(model.lm),
        ):
            progress.note(note)


def rounding_notes(lm: LanguageModel) -> Iterator[str]:
    """Yield a note if a response may depend on its batch."""
    if not lm.is_exact:
        dtype = str(lm.dtype).removeprefix("torch.")
        yield f"in {dtype}, rounding makes some responses differ with the batch size; --dtype float32 makes them equal"


def device_notes(spread: Mapping[str, int]) -> Iterator[str]:
    """Yield notes on where the layers of a model are that is spread over several devices."""
    if spread:
        yield "layers: " + ", ".join(f"{count} on {device}" for device, count in spread.items())
    if any(not device.startswith("cuda") for device in spread):
        yield (
            "layers in main memory are fetched for every pass, which is slow: use --quantize 4bit, --dtype bfloat16, "
            "more GPUs or a smaller model"
        )


def cuda_graph_notes(lm: LanguageModel) -> Iterator[str]:
    """Yield the reason that decode steps on a GPU are not captured as a CUDA graph, which costs speed alone."""
    from extraction.engine.cuda_graphs import graph_recorder_for, unsupported_reason

    graph_recorder_for([lm])
    if unsupported_reason(lm):
        yield f"decode steps run one by one: this model's can't be captured as a graph ({unsupported_reason(lm)})"


def retry_with_smaller_batch(
    run: Callable[[int], None], batch_size: int, model: LazyModel, progress: ProgressReporter, undo: Callable[[], None]
) -> int:
    """Run at a batch size; when memory runs out, undo and run again at half of it. Return the size that fits."""
    from extraction.engine.generate import smaller_batch
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
        batch_size = model.fits = smaller
        progress.note(f"out of memory: again with batch size {batch_size}")
        empty_cache()
