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

from extraction.background import Background
from extraction.jobs import Job, Mode, Queue, Shard, names_of
from extraction.pace import Pace
from extraction.records import Prompt
from extraction.runners import Engine, Listener, capture_shard, halving, is_done, meta_of, notes_of_steps, tensors_of

if TYPE_CHECKING:
    from extraction.decoding.sample import Sample
    from extraction.models import LanguageModel
    from extraction.utils_batch import Completion, Request

Row = dict[str, Any]


def pending_of(job: Job, shards: Sequence[Shard], mode: Mode) -> list[Shard]:
    """Those of some shards that lack what the mode makes."""
    return [shard for shard in shards if not is_done(job.folder(shard.trait), shard.index, mode)]


def together_of(job: Job, queue: Queue, mode: Mode) -> list[Shard]:
    """Those that run together: all but what was made elsewhere, whole or without a capture, and stays as it is."""
    names = names_of(queue)
    return [shard for shard in queue if not _stays(job, shard, names, mode)]


def _stays(job: Job, shard: Shard, names: Sequence[str], mode: Mode) -> bool:
    folder = job.folder(shard.trait)
    if not folder.shard_done("responses", shard.index):
        return False
    meta = folder.shard_facts("responses", shard.index)["meta"]
    is_whole = is_done(folder, shard.index, mode)
    return (is_whole and meta.get("queue") != names) or (mode.captures and not meta["captured"])


def ahead_of(job: Job, queue: Queue, mode: Mode) -> list[Shard]:
    """What has to run until all of a queue is there: what runs together, up to the last that is pending."""
    together = together_of(job, queue, mode)
    pending = pending_of(job, together, mode)
    return together[: together.index(pending[-1]) + 1] if pending else []


def make_queue(engine: Engine, queue: Queue, mode: Mode, pace: Pace, listener: Listener) -> None:
    """Make what is not there of a queue."""
    if not pending_of(engine.job, queue, mode):
        return
    together = together_of(engine.job, queue, mode)
    for shard in pending_of(engine.job, queue, mode):
        if shard not in together:
            capture_shard(engine, engine.job.folder(shard.trait), shard.index, listener)
    pending = pending_of(engine.job, together, mode)
    if pending:
        opened = [_Open(shard, engine.prompts(shard.examples), shard in pending) for shard in together]
        batch = _Batch(engine, names_of(queue), mode, pace, listener, opened)
        lengths = [_length(prompt) for each in opened for prompt in each.prompts]
        room, said = _room(engine), [*notes_of_steps(engine.lm)]
        batch_size = halving(batch.run, engine.batch_size(mode, lengths), engine, listener, batch.give_up)
        for note in notes_of_steps(engine.lm):
            if note not in said:  # a step that could not be recorded after all
                listener.note(note)
        if room is not None and engine.fits is None:
            _correct(engine, batch_size, lengths, room, listener)


def _room(engine: Engine) -> int | None:
    """Bytes that are free for the first batch, where its size was forecast and the device tells what it took."""
    from extraction.devices import free_memory, is_cuda

    device = str(engine.lm.device)
    is_forecast = engine.job.experiment.batch_size == "auto" and engine.fits is None and not engine.batch_sizes
    return free_memory((device,)) if is_forecast and is_cuda(device) and not engine.lm.spread else None


def _correct(engine: Engine, batch_size: int, lengths: Sequence[int], room: int, listener: Listener) -> None:
    """After the first queue: half the batch size, where it took more than was forecast and left too little."""
    from extraction.devices import peak_memory
    from extraction.forecast import beyond_weights, corrected

    lm, longest = engine.lm, engine.job.experiment.generation.max_new_tokens
    seen = peak_memory() - sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
    size = corrected(batch_size, beyond_weights(lm, lengths, longest, batch_size), seen, room)
    if size < batch_size:
        engine.fits = size
        listener.note(f"the first queue left little memory: the next ones have batch size {size}")


@dataclass
class _Open:
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

    def fresh(self) -> _Open:
        """The same, with nothing done."""
        return _Open(self.shard, self.prompts, self.is_pending)


@dataclass
class _Batch:
    """The shards that run together, and how far they are. `names`: of the whole queue."""

    engine: Engine
    names: Sequence[str]
    mode: Mode
    pace: Pace
    listener: Listener
    open: list[_Open]

    def run(self, batch_size: int) -> None:
        """From a clean state, until all that was pending is committed."""
        started, left = time.perf_counter(), sum(each.is_pending for each in self.open)
        by_id = {_request_id(prompt): (each, prompt) for each in self.open for prompt in each.prompts}
        with Background() as background, closing(self._completions(batch_size)) as completions:
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
        unmade = pending_of(self.engine.job, [each.shard for each in self.open if each.is_pending], self.mode)
        again = [each for each in self.open if each.shard in unmade]
        others = [each for each in self.open if each.shard not in unmade]
        self.listener.advance(-sum(each.n_ended for each in again), 0)
        self.pace.again(
            sum(each.n_ended for each in again) - sum(each.n_left for each in others),
            sum(each.n_read for each in again) - sum(each.n_unread for each in others),
        )
        self.open = [each.fresh() for each in again]

    def _completions(self, batch_size: int) -> Generator[Completion, None, None]:
        from extraction.utils_batch import generate

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

    def _end(self, each: _Open, prompt: Prompt, completion: Completion) -> bool:
        """An example has ended; True when it was its shard's last."""
        if each.is_pending:
            self.listener.advance(1, 0)
        self.pace.end(_length(prompt))
        return each.end(completion, _length(prompt))

    def _say(self, each: _Open) -> None:
        """After the first shard: how long the rest takes."""
        self.pace.whole([len(completion.token_ids) for completion in each.done.values()])
        said = self.pace.say_once()
        if said is not None:
            self.listener.note(said)

    def _commit(self, each: _Open, batch_size: int, background: Background) -> None:
        """Responses first, activations after them, each with its receipt, written while the next rows run."""
        folder, index, captures = self.engine.job.folder(each.shard.trait), each.shard.index, self.mode.captures
        together = names_of(other.shard for other in self.open)
        meta = {**meta_of(self.engine, batch_size), "captured": captures, "queue": list(self.names)}
        meta |= {"together": together} if together != self.names else {}
        ordered = [each.done[_request_id(prompt)] for prompt in each.prompts]
        pairs = list(zip(each.prompts, ordered, strict=True))
        rows = [_row(self.engine.lm, prompt, completion) for prompt, completion in pairs]
        background.put(partial(folder.write_responses_shard, index, rows, meta))
        if captures:
            kept = {prompt.example.id: ended.activations for prompt, ended in pairs if ended.activations}
            tensors, meta = tensors_of(self.engine, kept), {**meta, "captured": "while generating"}
            background.put(partial(folder.write_activations_shard, index, list(kept), tensors, meta))


def _length(prompt: Prompt) -> int:
    return len(prompt.token_ids)


def _request_id(prompt: Prompt) -> str:
    return f"{prompt.example.trait}/{prompt.example.id}"


def _request(job: Job, prompt: Prompt) -> Request:
    from extraction.utils_batch import Request

    settings = job.experiment
    return Request(_request_id(prompt), prompt.token_ids, settings.generation.max_new_tokens, settings.seed)


def _strategy(job: Job) -> Sample:
    from extraction.decoding.sample import Sample

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
