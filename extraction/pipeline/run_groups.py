"""A queue: shards of whatever traits in one running batch, from a clean state, each committed when its last row ends.

A shard's bytes are those of its queue. So one that is found unfinished runs again whole, and what is committed of it is
company to the rest and not written again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from extraction.core.progress import ProgressReporter
from extraction.core.records import Prompt
from extraction.engine.lazy_model import cuda_graph_notes, retry_with_smaller_batch
from extraction.pipeline.pace import Pace
from extraction.pipeline.plan import GenerationMode, RunGroup, RunPlan, Shard, shard_names
from extraction.pipeline.session import ModelSession, capture_shard, is_done, receipt_meta, shard_tensors
from extraction.storage.background_writer import BackgroundWriter

if TYPE_CHECKING:
    from extraction.engine.requests import Completion, Request
    from extraction.engine.sampler import Sample
    from extraction.model.loading import LanguageModel

Row = dict[str, Any]


def pending_shards(job: RunPlan, shards: Sequence[Shard], mode: GenerationMode) -> list[Shard]:
    """Those of some shards that lack what the mode makes."""
    return [shard for shard in shards if not is_done(job.folder(shard.trait), shard.index, mode)]


def rerun_set(job: RunPlan, queue: RunGroup, mode: GenerationMode) -> list[Shard]:
    """Those that run together: all but what was made elsewhere, whole or without a capture, and stays as it is."""
    names = shard_names(queue)
    return [shard for shard in queue if not _stays(job, shard, names, mode)]


def _stays(job: RunPlan, shard: Shard, names: Sequence[str], mode: GenerationMode) -> bool:
    folder = job.folder(shard.trait)
    if not folder.shard_done("responses", shard.index):
        return False
    meta = folder.shard_facts("responses", shard.index)["meta"]
    is_whole = is_done(folder, shard.index, mode)
    return (is_whole and meta.get("queue") != names) or (mode.captures and not meta["captured"])


def shards_to_run(job: RunPlan, queue: RunGroup, mode: GenerationMode) -> list[Shard]:
    """What has to run until all of a queue is there: what runs together, up to the last that is pending."""
    together = rerun_set(job, queue, mode)
    pending = pending_shards(job, together, mode)
    return together[: together.index(pending[-1]) + 1] if pending else []


def run_group(
    engine: ModelSession, queue: RunGroup, mode: GenerationMode, pace: Pace, listener: ProgressReporter
) -> None:
    """Make what is not there of a queue."""
    if not pending_shards(engine.job, queue, mode):
        return
    together = rerun_set(engine.job, queue, mode)
    for shard in pending_shards(engine.job, queue, mode):
        if shard not in together:
            capture_shard(engine, engine.job.folder(shard.trait), shard.index, listener)
    pending = pending_shards(engine.job, together, mode)
    if pending:
        opened = [_OpenShard(shard, engine.prompts(shard.examples), shard in pending) for shard in together]
        batch = _GroupRun(engine, shard_names(queue), mode, pace, listener, opened)
        lengths = [_length(prompt) for each in opened for prompt in each.prompts]
        room, said = _room(engine), [*cuda_graph_notes(engine.lm)]
        batch_size = retry_with_smaller_batch(
            batch.run, engine.batch_size(mode, lengths), engine, listener, batch.give_up
        )
        for note in cuda_graph_notes(engine.lm):
            if note not in said:  # a step that could not be recorded after all
                listener.note(note)
        if room is not None and engine.fits is None:
            _correct(engine, batch_size, lengths, room, listener)


def _room(engine: ModelSession) -> int | None:
    """Bytes that are free for the first batch, where its size was forecast and the device tells what it took."""
    from extraction.model.devices import free_memory, is_cuda

    device = str(engine.lm.device)
    is_forecast = engine.job.experiment.batch_size == "auto" and engine.fits is None and not engine.batch_sizes
    return free_memory((device,)) if is_forecast and is_cuda(device) and not engine.lm.spread else None


def _correct(
    engine: ModelSession, batch_size: int, lengths: Sequence[int], room: int, listener: ProgressReporter
) -> None:
    """After the first queue: half the batch size, where it took more than was forecast and left too little."""
    from extraction.model.devices import peak_memory
    from extraction.model.memory import adjusted_batch_size, runtime_bytes

    lm, longest = engine.lm, engine.job.experiment.generation.max_new_tokens
    seen = peak_memory() - sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
    size = adjusted_batch_size(batch_size, runtime_bytes(lm, lengths, longest, batch_size), seen, room)
    if size < batch_size:
        engine.fits = size
        listener.note(f"the first queue left little memory: the next ones have batch size {size}")


@dataclass
class _OpenShard:
    """A shard under way: its prompts in the store's order, and what has ended of it."""

    shard: Shard
    prompts: Sequence[Prompt]
    is_pending: bool
    n_ended: int = 0
    n_read: int = 0  # tokens of the prompts that have an answer
    done: dict[str, Completion] = field(default_factory=dict)

    def end(self, completion: Completion, n_prompt_tokens: int) -> bool:
        """Take what has ended; True when it was the last."""
        self.done[completion.id] = completion
        self.n_ended, self.n_read = self.n_ended + 1, self.n_read + n_prompt_tokens
        return not self.n_left

    @property
    def n_left(self) -> int:
        """Examples that have no answer."""
        return len(self.prompts) - self.n_ended

    @property
    def n_unread(self) -> int:
        """Tokens of the prompts that have none."""
        return sum(map(_length, self.prompts)) - self.n_read

    def fresh(self) -> _OpenShard:
        """The same, with nothing done."""
        return _OpenShard(self.shard, self.prompts, self.is_pending)


@dataclass
class _GroupRun:
    """The shards that run together, and how far they are. `names`: of the whole queue."""

    engine: ModelSession
    names: Sequence[str]
    mode: GenerationMode
    pace: Pace
    listener: ProgressReporter
    open: list[_OpenShard]

    def run(self, batch_size: int) -> None:
        """From a clean state, until all that was pending is committed."""
        started, left = time.perf_counter(), sum(each.is_pending for each in self.open)
        by_id = {_request_id(prompt): (each, prompt) for each in self.open for prompt in each.prompts}
        with BackgroundWriter() as background, closing(self._completions(batch_size)) as completions:
            for completion in completions:
                each, prompt = by_id[completion.id]
                if not self._end(each, prompt, completion):
                    continue
                now = time.perf_counter()
                self.engine.note_work(each.done.values(), batch_size, now - started)
                started = now
                if each.is_pending:
                    self._commit(each, batch_size, background)
                    left -= 1
                self._say(each)
                each.done = {}
                if not left:
                    return

    def give_up(self) -> None:
        """Memory ran out: what is committed stays, and the rest begins anew without it."""
        unmade = pending_shards(self.engine.job, [each.shard for each in self.open if each.is_pending], self.mode)
        again = [each for each in self.open if each.shard in unmade]
        others = [each for each in self.open if each.shard not in unmade]
        self.listener.advance(-sum(each.n_ended for each in again), 0)
        self.pace.again(
            sum(each.n_ended for each in again) - sum(each.n_left for each in others),
            sum(each.n_read for each in again) - sum(each.n_unread for each in others),
        )
        self.open = [each.fresh() for each in again]

    def _completions(self, batch_size: int) -> Generator[Completion, None, None]:
        from extraction.engine.generate import generate

        job = self.engine.job
        ordered = (prompt for each in self.open for prompt in sorted(each.prompts, key=_length, reverse=True))
        yield from generate(
            self.engine.lm,
            [_request(job, prompt) for prompt in ordered],
            batch_size=batch_size,
            strategy=_strategy(job),
            capture=self.engine.capture if self.mode.captures else None,
            stop_strings=job.experiment.generation.stop_strings,
            on_progress=self._advance,
            in_order=True,
        )

    def _advance(self, n_tokens: int) -> None:
        self.listener.advance(0, n_tokens)
        self.pace.advance(n_tokens)

    def _end(self, each: _OpenShard, prompt: Prompt, completion: Completion) -> bool:
        """An example has ended; True when it was its shard's last."""
        if each.is_pending:
            self.listener.advance(1, 0)
        self.pace.end(_length(prompt))
        return each.end(completion, _length(prompt))

    def _say(self, each: _OpenShard) -> None:
        """After the first shard: how long the rest takes."""
        self.pace.whole([len(completion.token_ids) for completion in each.done.values()])
        said = self.pace.say_once()
        if said is not None:
            self.listener.note(said)

    def _commit(self, each: _OpenShard, batch_size: int, background: BackgroundWriter) -> None:
        """Responses first, activations after them, each with its receipt, written while the next rows run."""
        folder, index, captures = self.engine.job.folder(each.shard.trait), each.shard.index, self.mode.captures
        together = shard_names(other.shard for other in self.open)
        meta = {**receipt_meta(self.engine, batch_size), "captured": captures, "queue": list(self.names)}
        meta |= {"together": together} if together != self.names else {}
        ordered = [each.done[_request_id(prompt)] for prompt in each.prompts]
        pairs = list(zip(each.prompts, ordered, strict=True))
        rows = [_row(self.engine.lm, prompt, completion) for prompt, completion in pairs]
        background.put(partial(folder.write_responses_shard, index, rows, meta))
        if captures:
            kept = {prompt.example.id: ended.activations for prompt, ended in pairs if ended.activations}
            tensors, meta = shard_tensors(self.engine, kept), {**meta, "captured": "while generating"}
            background.put(partial(folder.write_activations_shard, index, list(kept), tensors, meta))


def _length(prompt: Prompt) -> int:
    return len(prompt.token_ids)


def _request_id(prompt: Prompt) -> str:
    return f"{prompt.example.trait}/{prompt.example.id}"


def _request(job: RunPlan, prompt: Prompt) -> Request:
    from extraction.engine.requests import Request

    settings = job.experiment
    return Request(_request_id(prompt), prompt.token_ids, settings.generation.max_new_tokens, settings.seed)


def _strategy(job: RunPlan) -> Sample:
    from extraction.engine.sampler import Sample

    settings = job.experiment.generation
    return Sample(settings.temperature, settings.top_k, settings.top_p)


def _row(lm: LanguageModel, prompt: Prompt, completion: Completion) -> Row:
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
        "response": lm.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
