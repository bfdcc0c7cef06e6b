"""Run a plan: load the model once, answer every set's prompts in batches, and write each prompt's file when it ends.

A shard (a fixed range of prompts) always runs as a whole from a clean state, so an interrupted set ends with the same
bytes as one that was not interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from extraction.core.errors import TraitlineError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Prompt
from extraction.model.chat_template import encode_example
from extraction.monitoring.plan import MonitoringPlan, SetPlan
from extraction.monitoring.prompt_capture import header_of, named_tensors
from extraction.pipeline.lazy_model import LazyModel, load_model, retry_with_smaller_batch
from extraction.storage.token_captures import prompt_id

if TYPE_CHECKING:
    from extraction.activations.pooled import CaptureSpec
    from extraction.config.experiments import ModelSpec
    from extraction.engine.requests import Completion


@dataclass
class MonitoringSession(LazyModel):
    """The model of a plan, loaded on first use, and the progress of the plan.

    Attributes:
        n_made: Number of prompts captured.
        n_tokens: Number of tokens generated, in `seconds`.
        checked: True once the self-check has passed.
        fits: Largest batch size that has fitted into memory.
        batch_sizes: Batch size of every shard.
        failures: One line for everything that failed.
        changed: Stems of the sets that have new files.
    """

    plan: MonitoringPlan
    n_made: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    checked: bool = False
    fits: int | None = None
    batch_sizes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)

    @property
    def spec(self) -> ModelSpec:
        """The model to load."""
        return self.plan.spec

    @cached_property
    def capture(self) -> CaptureSpec:
        """The activations to capture of every token: projections (tier 2) or one layer's internals (tier 3)."""
        from extraction.activations.per_token import TokenInternals, TokenProjections

        if self.plan.tier == 3:
            return TokenInternals(self.plan.layers[0], attention=self.plan.attention)
        return TokenProjections(self.plan.layers, self.plan.unit_LDK, self.plan.attention)


def run_sets(plan: MonitoringPlan, listener: ProgressReporter) -> MonitoringSession:
    """Capture every prompt of every set that has no file yet.

    Raises:
        TraitlineError: A set failed. With `plan.keep_going` it is recorded in the session's failures instead.
    """
    session = MonitoringSession(plan, failures=list(plan.failures))
    for set_plan in plan.sets:
        with recorded_failure(session, set_plan.stem, listener):
            if pending_shards(plan, set_plan):
                _run_set(session, set_plan, listener)
    return session


@contextmanager
def recorded_failure(session: MonitoringSession, stem: str, listener: ProgressReporter) -> Iterator[None]:
    """Record a TraitlineError of the block in the session and go on, where the plan keeps going; else raise it."""
    try:
        yield
    except TraitlineError as failure:
        if not session.plan.keep_going:
            raise
        session.failures.append(f"{stem}: {failure}")
        listener.note(f"{stem}: {failure}")


def shards_of(plan: MonitoringPlan, set_plan: SetPlan) -> list[range]:
    """Return the fixed shards of a set, as ranges of prompt numbers."""
    count, size = len(set_plan.prompt_set.prompts), plan.settings.shard_size
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def pending_shards(plan: MonitoringPlan, set_plan: SetPlan) -> list[range]:
    """Return the shards of a set of which a prompt's file is missing."""
    shards = shards_of(plan, set_plan)
    return [shard for shard in shards if not all(set_plan.folder.prompt_done(prompt_id(i)) for i in shard)]


def _run_set(session: MonitoringSession, set_plan: SetPlan, listener: ProgressReporter) -> None:
    load_model(session, listener)
    prompts = encode_prompts(session, set_plan)  # every prompt is checked before the first is answered
    _self_check_once(session, prompts, listener)
    with set_plan.folder.lock():
        set_plan.folder.open(set_plan.config)
        session.changed.add(set_plan.stem)
        pending = pending_shards(session.plan, set_plan)
        n_done = len(prompts) - sum(map(len, pending))
        listener.begin(f"{set_plan.stem}, tier {session.plan.tier}", len(prompts), n_done)
        try:
            for shard in pending:
                _run_shard(session, set_plan, [prompts[i] for i in shard], listener)
        finally:
            listener.end()


def encode_prompts(session: MonitoringSession, set_plan: SetPlan) -> list[Prompt]:
    """Encode a set's prompts with the chat template. Raises PromptError for one that the model can't take."""
    plan, lm = session.plan, session.lm
    assert lm.tokenizer is not None
    return [
        encode_example(
            lm.tokenizer,
            Example(prompt_id(i), set_plan.stem, "pos", 0, i, 0, entry.prompt, entry.system or plan.system),
            instruction_as=plan.settings.instruction_as,
            literal=plan.settings.literal,
            thinking=plan.settings.thinking,
            raw=plan.spec.raw,
            max_tokens=lm.max_positions,
            max_new_tokens=plan.settings.generation.max_new_tokens,
        )
        for i, entry in enumerate(set_plan.prompt_set.prompts)
    ]


def _self_check_once(session: MonitoringSession, prompts: Sequence[Prompt], listener: ProgressReporter) -> None:
    """Check before the process's first shard that a few prompts have the same activations in a batch and alone."""
    from extraction.pipeline.self_check import self_check

    if session.plan.self_check and not session.checked:
        checked = prompts[: session.plan.self_check]
        deviation = self_check(session.lm, checked, session.plan.layers)
        listener.note(f"self-check: {len(checked)} prompts alone and in a batch agree within {deviation:.0e}")
    session.checked = True


def _run_shard(
    session: MonitoringSession, set_plan: SetPlan, prompts: Sequence[Prompt], listener: ProgressReporter
) -> None:
    """Answer one shard's prompts; each prompt's file is written when its response ends."""
    from extraction.engine.generate import generate
    from extraction.engine.requests import Request
    from extraction.engine.sampler import Sample

    plan, lm = session.plan, session.lm
    settings = plan.settings.generation
    # a request's id seeds its sampling: with the set's name in it, sets draw different random numbers
    by_id = {f"{set_plan.stem}/{prompt.example.id}": prompt for prompt in prompts}
    response_lengths: list[int] = []

    def run(batch_size: int) -> None:
        """Generate and write the shard at this batch size."""
        response_lengths.clear()
        for completion in generate(
            lm,
            [Request(id, p.token_ids, settings.max_new_tokens, plan.settings.seed) for id, p in by_id.items()],
            batch_size=batch_size,
            strategy=Sample.of(settings),
            capture=session.capture,
            stop_strings=settings.stop_strings,
            on_progress=lambda n_tokens: listener.advance(0, n_tokens),
        ):
            _write_prompt(session, set_plan, by_id[completion.id], completion, batch_size)
            response_lengths.append(len(completion.token_ids))
            listener.advance(1, 0)

    started = time.perf_counter()
    first_size = session.slots(plan.settings, [len(prompt.token_ids) for prompt in prompts])
    batch_size = retry_with_smaller_batch(
        run, first_size, session, listener, lambda: listener.advance(-len(response_lengths), 0)
    )
    session.seconds += time.perf_counter() - started
    session.n_made += len(response_lengths)
    session.n_tokens += sum(response_lengths)
    session.batch_sizes.append(batch_size)


def _write_prompt(
    session: MonitoringSession, set_plan: SetPlan, prompt: Prompt, completion: Completion, batch_size: int
) -> None:
    id = prompt.example.id
    if set_plan.folder.prompt_done(id):  # in a shard that was interrupted: the file has the same bytes
        return
    tensors = named_tensors(session.plan, completion.activations)
    header = header_of(session.plan, session.lm, prompt, completion, tensors)
    meta = {"batch_size": batch_size, "device": session.lm.device.type}
    set_plan.folder.write_prompt(id, {name: tensor for name, (tensor, _) in tensors.items()}, header, meta)
