"""Run groups: shards in one running batch that starts empty, each shard committed when its last response ends.

A row's neighbours decide how its sums round, so a shard's bytes are those of its group. A group that is found
unfinished therefore runs again whole: shards that are committed run along, and are not written again.
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
from extraction.pipeline.lazy_model import cuda_graph_notes, retry_with_smaller_batch
from extraction.pipeline.pace import TokenPace
from extraction.pipeline.plan import GenerationMode, RunGroup, RunPlan, Shard, shard_names
from extraction.pipeline.session import ModelSession
from extraction.pipeline.shards import capture_shard, is_done, receipt_meta, shard_tensors
from extraction.storage.background_writer import BackgroundWriter

if TYPE_CHECKING:
    from extraction.engine.requests import Completion, Request
    from extraction.engine.sampler import Sample
    from extraction.model.language_model import LanguageModel

Row = dict[str, Any]


# --- which shards run -----------------------------------------------------------------------------------------------


def pending_shards(plan: RunPlan, shards: Sequence[Shard], mode: GenerationMode) -> list[Shard]:
    """Return the shards that lack something that the mode makes."""
    return [shard for shard in shards if not is_done(plan.folder(shard.trait), shard.index, mode)]


def rerun_set(plan: RunPlan, group: RunGroup, mode: GenerationMode) -> list[Shard]:
    """Return the shards of a group that share its batch: all but those that another group or command has made."""
    names = shard_names(group)
    return [shard for shard in group if not _made_elsewhere(plan, shard, names, mode)]


def _made_elsewhere(plan: RunPlan, shard: Shard, names: Sequence[str], mode: GenerationMode) -> bool:
    run = plan.folder(shard.trait)
    if not run.shard_done("responses", shard.index):
        return False
    meta = run.shard_receipt("responses", shard.index)["meta"]
    of_another_group = is_done(run, shard.index, mode) and meta.get("queue") != names
    return of_another_group or (mode.captures and not meta["captured"])


def shards_to_run(plan: RunPlan, group: RunGroup, mode: GenerationMode) -> list[Shard]:
    """Return the shards that have to run until the group is done: its rerun set, up to the last one pending."""
    shards = rerun_set(plan, group, mode)
    pending = pending_shards(plan, shards, mode)
    return shards[: shards.index(pending[-1]) + 1] if pending else []


# --- the run of a group ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupRunner:
    """Runs groups with a loaded model."""

    session: ModelSession
    mode: GenerationMode
    pace: TokenPace
    progress: ProgressReporter

    def run(self, group: RunGroup) -> None:
        """Make what is missing of a group: activations of stored responses first, then responses with theirs."""
        session, plan = self.session, self.session.plan
        missing = pending_shards(plan, group, self.mode)
        if not missing:
            return
        shards = rerun_set(plan, group, self.mode)
        for shard in missing:
            if shard not in shards:
                capture_shard(session, plan.folder(shard.trait), shard.index, self.progress)
        pending = pending_shards(plan, shards, self.mode)
        if pending:
            open_shards = [_OpenShard(shard, session.prompts(shard.examples), shard in pending) for shard in shards]
            self._generate(_GroupRun(self, shard_names(group), open_shards))

    def _generate(self, group_run: _GroupRun) -> None:
        session, progress = self.session, self.progress
        lengths = [_length(prompt) for each in group_run.shards for prompt in each.prompts]
        memory, notes = _free_memory(session), [*cuda_graph_notes(session.lm)]
        batch_size = retry_with_smaller_batch(
            group_run.run, session.batch_size(self.mode, lengths), session, progress, group_run.start_again
        )
        for note in cuda_graph_notes(session.lm):
            if note not in notes:  # a decode step that could not be captured after all
                progress.note(note)
        if memory is not None and session.fits is None:
            self._correct_batch_size(batch_size, lengths, memory)

    def _correct_batch_size(self, batch_size: int, lengths: Sequence[int], memory: int) -> None:
        """After the first group: halve the batch size, if it took more memory than forecast and left too little."""
        from extraction.model.devices import peak_memory
        from extraction.model.memory import adjusted_batch_size, runtime_bytes

        lm, longest = self.session.lm, self.session.plan.experiment.generation.max_new_tokens
        taken = peak_memory() - sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
        size = adjusted_batch_size(batch_size, runtime_bytes(lm, lengths, longest, batch_size), taken, memory)
        if size < batch_size:
            self.session.fits = size
            self.progress.note(f"the first run group left little memory: the next ones have batch size {size}")


def _free_memory(session: ModelSession) -> int | None:
    """Free bytes before the first batch, if its size was forecast and the device reports what it takes; else None."""
    from extraction.model.devices import free_memory, is_cuda

    device = str(session.lm.device)
    is_forecast = session.plan.experiment.batch_size == "auto" and session.fits is None and not session.batch_sizes
    return free_memory((device,)) if is_forecast and is_cuda(device) and not session.lm.spread else None


@dataclass
class _OpenShard:
    """A shard under way: its prompts in the order of the file, and the completions so far."""

    shard: Shard
    prompts: Sequence[Prompt]
    is_pending: bool
    n_ended: int = 0
    n_read: int = 0  # prompt tokens of the examples that have ended
    done: dict[str, Completion] = field(default_factory=dict)

    def end(self, completion: Completion, n_prompt_tokens: int) -> bool:
        """Add a completion; return True if it was the last."""
        self.done[completion.id] = completion
        self.n_ended, self.n_read = self.n_ended + 1, self.n_read + n_prompt_tokens
        return not self.n_left

    @property
    def n_left(self) -> int:
        """Number of examples that have not ended."""
        return len(self.prompts) - self.n_ended

    @property
    def n_unread(self) -> int:
        """Number of their prompt tokens."""
        return sum(map(_length, self.prompts)) - self.n_read

    def fresh(self) -> _OpenShard:
        """Return the shard with nothing done."""
        return _OpenShard(self.shard, self.prompts, self.is_pending)


@dataclass
class _GroupRun:
    """One group under way. `names`: of all its shards; `shards`: those that share the batch."""

    runner: GroupRunner
    names: Sequence[str]
    shards: list[_OpenShard]

    def run(self, batch_size: int) -> None:
        """Generate until every pending shard is committed."""
        started, n_left = time.perf_counter(), sum(each.is_pending for each in self.shards)
        by_id = {_request_id(prompt): (each, prompt) for each in self.shards for prompt in each.prompts}
        with BackgroundWriter() as background, closing(self._completions(batch_size)) as completions:
            for completion in completions:
                each, prompt = by_id[completion.id]
                if not self._end_example(each, prompt, completion):
                    continue
                now = time.perf_counter()
                self.runner.session.note_work(each.done.values(), batch_size, now - started)
                started = now
                if each.is_pending:
                    self._commit(each, batch_size, background)
                    n_left -= 1
                self.runner.pace.end_shard([len(completion.token_ids) for completion in each.done.values()])
                each.done = {}
                if not n_left:
                    return

    def start_again(self) -> None:
        """After an out-of-memory error: keep what is committed, and start the other shards again without it."""
        plan, mode = self.runner.session.plan, self.runner.mode
        unmade = pending_shards(plan, [each.shard for each in self.shards if each.is_pending], mode)
        again = [each for each in self.shards if each.shard in unmade]
        others = [each for each in self.shards if each.shard not in unmade]
        self.runner.progress.advance(-sum(each.n_ended for each in again), 0)
        self.runner.pace.rerun(
            sum(each.n_ended for each in again) - sum(each.n_left for each in others),
            sum(each.n_read for each in again) - sum(each.n_unread for each in others),
        )
        self.shards = [each.fresh() for each in again]

    def _completions(self, batch_size: int) -> Generator[Completion, None, None]:
        from extraction.engine.generate import generate

        session, plan = self.runner.session, self.runner.session.plan
        ordered = (prompt for each in self.shards for prompt in sorted(each.prompts, key=_length, reverse=True))
        yield from generate(
            session.lm,
            [_request(plan, prompt) for prompt in ordered],
            batch_size=batch_size,
            strategy=_strategy(plan),
            capture=session.capture if self.runner.mode.captures else None,
            stop_strings=plan.experiment.generation.stop_strings,
            on_progress=self._advance,
            in_order=True,
        )

    def _advance(self, n_tokens: int) -> None:
        self.runner.progress.advance(0, n_tokens)
        self.runner.pace.advance(n_tokens)

    def _end_example(self, each: _OpenShard, prompt: Prompt, completion: Completion) -> bool:
        """Count an example that has ended; return True if it was its shard's last."""
        self.runner.pace.end_example(_length(prompt))
        if each.is_pending:
            self.runner.progress.advance(1, 0)
        return each.end(completion, _length(prompt))

    def _commit(self, each: _OpenShard, batch_size: int, background: BackgroundWriter) -> None:
        """Write the responses, then the activations, each with its receipt, while the next rows run."""
        session, captures = self.runner.session, self.runner.mode.captures
        run, index = session.plan.folder(each.shard.trait), each.shard.index
        together = shard_names(other.shard for other in self.shards)
        meta = {**receipt_meta(session, batch_size), "captured": captures, "queue": list(self.names)}
        meta |= {"together": together} if together != self.names else {}
        pairs = [(prompt, each.done[_request_id(prompt)]) for prompt in each.prompts]
        rows = [_row(session.lm, prompt, completion) for prompt, completion in pairs]
        background.put(partial(run.write_responses_shard, index, rows, meta))
        if captures:
            activations = {prompt.example.id: ended.activations for prompt, ended in pairs if ended.activations}
            tensors, meta = shard_tensors(session, activations), {**meta, "captured": "while generating"}
            background.put(partial(run.write_activations_shard, index, list(activations), tensors, meta))


def _length(prompt: Prompt) -> int:
    return len(prompt.token_ids)


def _request_id(prompt: Prompt) -> str:
    return f"{prompt.example.trait}/{prompt.example.id}"


def _request(plan: RunPlan, prompt: Prompt) -> Request:
    from extraction.engine.requests import Request

    settings = plan.experiment
    return Request(_request_id(prompt), prompt.token_ids, settings.generation.max_new_tokens, settings.seed)


def _strategy(plan: RunPlan) -> Sample:
    from extraction.engine.sampler import Sample

    return Sample.of(plan.experiment.generation)


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
