"""Who makes the shards: this process, one after the other, each from a clean state.

A shard is the unit of work, of commit and of resume. The model is loaded when the first one is due.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from extraction.errors import ConfigError
from extraction.jobs import MODES, Job, Mode
from extraction.records import Example, Prompt
from extraction.store import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.capture import Capture
    from extraction.models import LanguageModel
    from extraction.utils_batch import Completion

Row = dict[str, Any]


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


@dataclass
class Engine:
    """The model of a job, loaded when first needed, and what the doors want to know of its work."""

    job: Job
    n_made: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    checked: bool = False
    batch_sizes: list[int] = field(default_factory=list)

    @cached_property
    def lm(self) -> LanguageModel:
        """The loaded model."""
        from transformers.utils import logging

        from extraction.models import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(self.job.spec)

    @cached_property
    def capture(self) -> Capture:
        """What to keep of every example."""
        from extraction.capture import Capture

        settings = self.job.experiment.capture
        return Capture(self.job.layers, settings.sites, settings.poolings)

    def prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """Examples as this model sees them."""
        from extraction.prompts import encode_example

        settings = self.job.experiment
        return [
            encode_example(
                self.lm.tokenizer,
                example,
                instruction_as=settings.instruction_as,
                raw=self.job.spec.raw,
                max_tokens=self.lm.max_positions,
                max_new_tokens=settings.generation.max_new_tokens,
            )
            for example in examples
        ]

    def batch_size(self, mode: Mode) -> int:
        """How many slots: one where the mode is serial, else what was asked for."""
        from extraction.forecast import auto_batch_size

        asked = self.job.experiment.batch_size
        if mode.serial:
            return 1
        return (
            auto_batch_size(self.lm, self.job.experiment.generation.max_new_tokens) if asked == "auto" else int(asked)
        )


def make_shard(
    engine: Engine, examples: Sequence[Example], index: int, folder: RunFolder, mode: Mode, listener: Listener
) -> None:
    """One shard from a clean state: responses first, activations after them, each with its receipt."""
    from extraction.utils_batch import generate

    job, lm, prompts = engine.job, engine.lm, engine.prompts(examples)
    started = time.perf_counter()
    done: dict[str, Completion] = {}

    def run(batch_size: int) -> None:
        done.clear()
        requests = [_request(job, prompt) for prompt in prompts]
        settings = job.experiment.generation
        for completion in generate(
            lm,
            requests,
            batch_size=batch_size,
            strategy=_strategy(job),
            capture=engine.capture if mode.captures else None,
            stop_strings=settings.stop_strings,
            on_progress=lambda n_tokens: listener.advance(0, n_tokens),
        ):
            done[completion.id] = completion
            listener.advance(1, 0)

    batch_size = _halving(run, engine.batch_size(mode), listener, lambda: listener.advance(-len(done), 0))
    engine.seconds += time.perf_counter() - started
    engine.n_tokens += sum(len(completion.token_ids) for completion in done.values())
    engine.n_made += len(done)
    engine.batch_sizes.append(batch_size)
    ordered = [done[_request_id(prompt)] for prompt in prompts]
    meta = _meta(engine, batch_size)
    rows = [_row(lm, prompt, completion) for prompt, completion in zip(prompts, ordered, strict=True)]
    folder.write_responses_shard(index, rows, meta)
    if mode.captures:
        kept = {p.example.id: c.activations for p, c in zip(prompts, ordered, strict=True) if c.activations}
        _write_activations(job, folder, index, kept, meta)


def _halving(run: Any, batch_size: int, listener: Listener, undo: Any) -> int:
    """Run at a batch size; when memory runs out, again at half of it. Returns the size that worked."""
    from extraction.forecast import is_out_of_memory

    while True:
        try:
            run(batch_size)
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                raise
            if batch_size == 1:
                raise ConfigError(
                    "out of memory even with --batch-size 1: use a smaller model, --dtype bfloat16, fewer --layers "
                    "or a lower --max-new-tokens"
                ) from failure
            undo()
        else:
            return batch_size
        batch_size //= 2
        listener.note(f"out of memory: this shard again with batch size {batch_size}")
        _free_memory()


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _request_id(prompt: Prompt) -> str:
    return f"{prompt.example.trait}/{prompt.example.id}"


def _request(job: Job, prompt: Prompt) -> Any:
    from extraction.utils_batch import Request

    settings = job.experiment
    return Request(_request_id(prompt), prompt.token_ids, settings.generation.max_new_tokens, settings.seed)


def _strategy(job: Job) -> Any:
    from extraction.decoding.sample import Sample

    settings = job.experiment.generation
    return Sample(settings.temperature, settings.top_k, settings.top_p)


def _row(lm: LanguageModel, prompt: Prompt, completion: Any) -> Row:
    example = prompt.example
    assert lm.tokenizer is not None
    return {
        "id": example.id,
        "polarity": example.polarity,
        "instruction_id": example.instruction_id,
        "question_id": example.question_id,
        "question": example.question,
        "prompt": prompt.text,
        "prompt_token_ids": list(prompt.token_ids),
        "response": lm.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _meta(engine: Engine, batch_size: int) -> dict[str, Any]:
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


def _write_activations(
    job: Job, folder: RunFolder, index: int, kept: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> None:
    """Rows of every pooling, in the examples' order, in the capture's dtype."""
    import torch

    dtype = getattr(torch, job.experiment.capture.dtype)
    tensors: dict[str, Tensor] = {}
    for name in next(iter(kept.values()), {}):
        if name.endswith(".all"):
            tensors.update({f"{name}/{i}": activations[name].to(dtype) for i, activations in kept.items()})
        else:
            tensors[name] = torch.stack([activations[name] for activations in kept.values()]).to(dtype)
    folder.write_activations_shard(index, list(kept), tensors, meta)


def capture_shard(engine: Engine, folder: RunFolder, index: int, listener: Listener) -> None:
    from extraction.utils_batch import teacher_force

    rows = [row for row in folder.read_responses_shard(index) if row["token_ids"]]
    texts = [(row["id"], row["prompt_token_ids"], row["token_ids"]) for row in rows]
    done: dict[str, Mapping[str, Tensor]] = {}

    def run(batch_size: int) -> None:
        done.clear()
        for completion in teacher_force(engine.lm, texts, capture=engine.capture, batch_size=batch_size):
            done[completion.id] = completion.activations
            listener.advance(1, len(completion.token_ids))

    started = time.perf_counter()
    batch_size = _halving(run, engine.batch_size(MODES["batched"]), listener, lambda: listener.advance(-len(done), 0))
    engine.seconds += time.perf_counter() - started
    engine.n_made += len(done)
    engine.batch_sizes.append(batch_size)
    kept = {row["id"]: done[row["id"]] for row in rows}
    _write_activations(engine.job, folder, index, kept, _meta(engine, batch_size))
