"""What makes shards: a model that is loaded when the first one is due, a batch size that fits, stored responses read.

A shard is the unit of commit. Those that are made together, in one batch, are a queue (`queues`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.core.errors import ActivationError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Prompt, Trait
from extraction.engine.lazy_model import LazyModel, retry_with_smaller_batch
from extraction.pipeline.plan import MODES, GenerationMode, RunPlan
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.activations.pooled import Capture
    from extraction.config.experiments import ModelSpec
    from extraction.engine.requests import Completion


@dataclass
class ModelSession(LazyModel):
    """The model of a job, and what the doors want to know of its work."""

    job: RunPlan
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
        from extraction.activations.pooled import Capture

        settings = self.job.experiment.capture
        return Capture(self.job.layers, settings.sites, settings.poolings)

    def turned_to(self, job: RunPlan) -> ModelSession:
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

    def batch_size(self, mode: GenerationMode, prompt_lengths: Sequence[int]) -> int:
        """How many slots: one where the mode is serial, else what was asked for."""
        return 1 if mode.serial else self.slots(self.job.experiment, prompt_lengths)


@contextmanager
def locked_run(folder: TraitRun, job: RunPlan, trait: Trait) -> Iterator[None]:
    """Hold the run's lock; refuse a run with another config at once, and a folder that can't be written to."""
    with folder.lock(shared=not job.is_whole):
        begun = folder.stored_config() is not None
        if begun or any(folder.shard_done("responses", i) for i in range(len(job.shards(trait)))):
            folder.open(job.config(trait))
        yield


def is_done(folder: TraitRun, index: int, mode: GenerationMode) -> bool:
    """Whether a shard has all that a mode makes."""
    return folder.shard_done("responses", index) and (not mode.captures or folder.shard_done("activations", index))


def receipt_meta(engine: ModelSession, batch_size: int) -> dict[str, Any]:
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


def _policy(engine: ModelSession) -> str:
    """Where the instruction went: a system message, or folded into the user's turn."""
    from extraction.model.chat_template import instruction_policy

    asked = engine.job.experiment.instruction_as
    if engine.job.spec.raw:
        return "raw"
    return instruction_policy(engine.lm.tokenizer) if asked == "auto" and engine.lm.tokenizer else asked


def shard_tensors(engine: ModelSession, kept: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
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


def _stored(engine: ModelSession, hidden_LD: Tensor, place: str) -> Tensor:
    """In the type that the run stores."""
    import torch

    name = engine.job.experiment.capture.dtype
    stored: Tensor = hidden_LD.to(getattr(torch, name))
    if not stored.isfinite().all():
        raise ActivationError(f"{place}: too large for {name}; set capture: {{dtype: float32}} in the experiment")
    return stored


def _stacked(engine: ModelSession, rows_LD: Sequence[Tensor]) -> Tensor:
    """[n, L, D], also for a shard in which every response is empty."""
    import torch

    dtype = getattr(torch, engine.job.experiment.capture.dtype)
    return (
        torch.stack(list(rows_LD))
        if rows_LD
        else torch.empty(0, len(engine.job.layers), engine.lm.hidden_size, dtype=dtype)
    )


def capture_shard(
    engine: ModelSession,
    folder: TraitRun,
    index: int,
    listener: ProgressReporter,
    *,
    stripped: Sequence[Prompt] | None = None,
) -> None:
    """Activations of one shard's stored responses, from their token ids; empty responses have none.

    `stripped`: the shard's prompts without the instruction, to be read in the place of the stored ones.
    """
    from extraction.engine.generate import teacher_force

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
    batch_size = retry_with_smaller_batch(run, asked, engine, listener, lambda: listener.advance(-len(done), 0))
    engine.note_work(done.values(), batch_size, time.perf_counter() - started)
    kept = {row["id"]: done[row["id"]].activations for row in rows}
    how = "from stored ids" if stripped is None else "from stored ids, without the instruction"
    stage = "activations" if stripped is None else "stripped"
    meta = {**receipt_meta(engine, batch_size), "captured": how}
    folder.write_activations_shard(index, list(kept), shard_tensors(engine, kept), meta, stage=stage)
