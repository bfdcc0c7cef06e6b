"""What makes shards: a model that is loaded when the first one is due, a batch size that fits, stored responses read.

A shard is the unit of commit. Those that are made together, in one batch, are a queue (`queues`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from extraction.errors import ActivationError, ModelError
from extraction.jobs import MODES, Job, Mode
from extraction.records import Example, Prompt, Trait
from extraction.store import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.capture import Capture
    from extraction.configs import Experiment, ModelSpec
    from extraction.models import LanguageModel
    from extraction.utils_batch import Completion


class Listener(Protocol):
    """What a door gives a stage, to hear how the work goes."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """A stage of one trait starts; `n_done` examples are there already."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """So many more examples and response tokens."""

    def end(self) -> None:
        """The stage has ended."""


class Loading(ABC):
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

        from extraction.models import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(self.spec)

    def slots(self, settings: Experiment, prompt_lengths: Sequence[int]) -> int:
        """The batch size: what was found to fit, what is asked for, or what memory should hold."""
        from extraction.forecast import auto_batch_size

        if self.fits is not None:
            return self.fits
        if settings.batch_size != "auto":
            return int(settings.batch_size)
        return auto_batch_size(self.lm, prompt_lengths, settings.generation.max_new_tokens)


@dataclass
class Engine(Loading):
    """The model of a job, and what the doors want to know of its work."""

    job: Job
    n_made: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    checked: bool = False
    batch_sizes: list[int] = field(default_factory=list)
    fits: int | None = None

    @property
    def spec(self) -> ModelSpec:
        """Which model."""
        return self.job.spec

    @cached_property
    def capture(self) -> Capture:
        """What to keep of every example."""
        from extraction.capture import Capture

        settings = self.job.experiment.capture
        return Capture(self.job.layers, settings.sites, settings.poolings)

    def turned_to(self, job: Job) -> Engine:
        """The same counts, for another job; with the loaded model where that has the same one."""
        engine = replace(self, job=job)
        if self.is_loaded and job.spec == self.job.spec:
            engine.lm = self.lm
        return engine

    def note_work(self, done: Collection[Completion], batch_size: int, seconds: float) -> None:
        """Count what a shard took."""
        self.n_made += len(done)
        self.n_tokens += sum(len(completion.token_ids) for completion in done)
        self.seconds += seconds
        self.batch_sizes.append(batch_size)

    def prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """Examples as this model sees them."""
        assert self.lm.tokenizer is not None
        return self.job.prompts(self.lm.tokenizer, examples, max_tokens=self.lm.max_positions)

    def batch_size(self, mode: Mode, prompt_lengths: Sequence[int]) -> int:
        """How many slots: one where the mode is serial, else what was asked for."""
        return 1 if mode.serial else self.slots(self.job.experiment, prompt_lengths)


@contextmanager
def working_in(folder: RunFolder, job: Job, trait: Trait) -> Iterator[None]:
    """Hold the run's lock; refuse a run with another config at once, and a folder that can't be written to."""
    with folder.lock(shared=not job.is_whole):
        begun = folder.stored_config() is not None
        if begun or any(folder.shard_done("responses", i) for i in range(len(job.shards(trait)))):
            folder.open(job.config(trait))
        yield


def load_once(engine: Loading, listener: Listener) -> None:
    """Load the model, saying so, unless it is loaded."""
    if not engine.is_loaded:
        listener.note(f"loading {engine.spec.name}")
        for note in (*notes_of_places(engine.lm.spread), *notes_of_steps(engine.lm)):
            listener.note(note)


def notes_of_places(spread: Mapping[str, int]) -> Iterator[str]:
    """Where the layers of a model are that is spread over several devices."""
    if spread:
        yield "layers: " + ", ".join(f"{count} on {place}" for place, count in spread.items())
    if any(not place.startswith("cuda") for place in spread):
        yield (
            "layers in main memory are fetched for every pass, which is slow: use --quantize 4bit, --dtype bfloat16, "
            "more GPUs or a smaller model"
        )


def notes_of_steps(lm: LanguageModel) -> Iterator[str]:
    """Why the decode steps of a model on a GPU are not recorded as a graph, which costs speed and nothing else."""
    from extraction.bursts import recording, why_not

    recording([lm])
    if why_not(lm):
        yield f"decode steps run one by one: this model's can't be recorded as a graph ({why_not(lm)})"


def is_done(folder: RunFolder, index: int, mode: Mode) -> bool:
    """Whether a shard has all that a mode makes."""
    return folder.shard_done("responses", index) and (not mode.captures or folder.shard_done("activations", index))


def halving(
    run: Callable[[int], None], batch_size: int, engine: Loading, listener: Listener, undo: Callable[[], None]
) -> int:
    """Run at a batch size; when memory runs out, again at half of it. Returns the size that worked."""
    from extraction.devices import give_back
    from extraction.forecast import is_out_of_memory

    while True:
        try:
            run(batch_size)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            undo()
            if batch_size == 1:
                raise ModelError(
                    "out of memory even with --batch-size 1: use a smaller model, --dtype bfloat16, fewer --layers "
                    "or a lower --max-new-tokens; finished shards are kept"
                ) from failure
        else:
            return batch_size
        batch_size //= 2
        engine.fits = batch_size
        listener.note(f"out of memory: again with batch size {batch_size}")
        give_back()


def meta_of(engine: Engine, batch_size: int) -> dict[str, Any]:
    """What a receipt tells of how a shard was made."""
    import torch
    import transformers

    from extraction import __version__

    job, lm = engine.job, engine.lm
    return {
        "model": job.spec.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "layers": list(job.layers),
        "batch_size": batch_size,
        "instruction_as": _policy(engine),
        "versions": {
            "traitline": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _policy(engine: Engine) -> str:
    """Where the instruction went: a system message, or folded into the user's turn."""
    from extraction.prompts import instruction_policy

    asked = engine.job.experiment.instruction_as
    if engine.job.spec.raw:
        return "raw"
    return instruction_policy(engine.lm.tokenizer) if asked == "auto" and engine.lm.tokenizer else asked


def tensors_of(engine: Engine, kept: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a shard's file holds: rows of every pooling, in the examples' order, in the capture's dtype.

    Raises ActivationError where that type can't hold one.
    """
    tensors: dict[str, Tensor] = {}
    for name in (f"{site}.{pooling}" for pooling in engine.capture.poolings for site in engine.capture.sites):
        stored = {i: _stored(engine, activations[name], f"{i}: {name}") for i, activations in kept.items()}
        if name.endswith(".all"):
            tensors.update({f"{name}/{i}": rows for i, rows in stored.items()})
        else:
            tensors[name] = _stacked(engine, list(stored.values()))
    return tensors


def _stored(engine: Engine, hidden_LD: Tensor, place: str) -> Tensor:
    """In the type that the run stores."""
    import torch

    name = engine.job.experiment.capture.dtype
    stored: Tensor = hidden_LD.to(getattr(torch, name))
    if not stored.isfinite().all():
        raise ActivationError(f"{place}: too large for {name}; set capture: {{dtype: float32}} in the experiment")
    return stored


def _stacked(engine: Engine, rows_LD: Sequence[Tensor]) -> Tensor:
    """[n, L, D], also for a shard in which every response is empty."""
    import torch

    dtype = getattr(torch, engine.job.experiment.capture.dtype)
    return (
        torch.stack(list(rows_LD))
        if rows_LD
        else torch.empty(0, len(engine.job.layers), engine.lm.hidden_size, dtype=dtype)
    )


def capture_shard(
    engine: Engine, folder: RunFolder, index: int, listener: Listener, *, stripped: Sequence[Prompt] | None = None
) -> None:
    """Activations of one shard's stored responses, from their token ids; empty responses have none.

    `stripped`: the shard's prompts without the instruction, to be read in the place of the stored ones.
    """
    from extraction.utils_batch import teacher_force

    rows = [row for row in folder.read_responses_shard(index) if row["token_ids"]]
    prompts = {row["id"]: row["prompt_token_ids"] for row in rows}
    if stripped is not None:
        prompts = {prompt.example.id: prompt.token_ids for prompt in stripped}
    texts = [(row["id"], prompts[row["id"]], row["token_ids"]) for row in rows]
    done: dict[str, Completion] = {}

    def run(batch_size: int) -> None:
        done.clear()
        for completion in teacher_force(engine.lm, texts, capture=engine.capture, batch_size=batch_size):
            done[completion.id] = completion
            listener.advance(1, len(completion.token_ids))

    started = time.perf_counter()
    asked = engine.batch_size(MODES["batched"], [len(prompt_ids) for _, prompt_ids, _ in texts])
    batch_size = halving(run, asked, engine, listener, lambda: listener.advance(-len(done), 0))
    engine.note_work(done.values(), batch_size, time.perf_counter() - started)
    kept = {row["id"]: done[row["id"]].activations for row in rows}
    how = "from stored ids" if stripped is None else "from stored ids, without the instruction"
    stage = "activations" if stripped is None else "stripped"
    meta = {**meta_of(engine, batch_size), "captured": how}
    folder.write_activations_shard(index, list(kept), tensors_of(engine, kept), meta, stage=stage)
