"""Continuous batching: the decode loop that every way of decoding goes through.

A step is three calls: the scheduler admits requests to free slots, the stepper runs the models and chooses tokens, and
the commit appends them and frees the slots of sequences that end. Requests may be added and cancelled while the batch
runs. A result does not depend on neighbours, order, batch size, refill or on when its request was added.

Shapes: B slots, T columns of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from extraction.activations.pooled import CaptureSpec, EndedRow, first_non_finite_layer
from extraction.core.errors import ActivationError
from extraction.engine.kv_window import KVWindow
from extraction.engine.requests import Completion, Request
from extraction.engine.row_state import RowBuffers
from extraction.engine.sampler import Sample
from extraction.engine.scheduler import RequestRules, Scheduler
from extraction.engine.sequence import BatchLimits, RunningSequence, StepOutput
from extraction.engine.speculation import Proposal
from extraction.engine.steering import Steering, SteeringHook, check_steering
from extraction.engine.stepper import ChosenTokens, Stepper, nested
from extraction.engine.strategies import ModelWithCache, Strategy, make_strategy, needs_contiguous_kv
from extraction.model.gqa_decode import gqa_decoding
from extraction.model.kv_cache import CacheWindow
from extraction.model.language_model import LanguageModel
from extraction.model.pairs import refuse_different


class ContinuousBatch:
    """A running batch: a scheduler, a KV window and a stepper.

    Args:
        strategy: Sample (greedy without one), Amplify or Speculate.
        capture: activations to keep of every request.
        stop_strings: end every response; a request may have others besides.
        steerings: all steering vectors that requests may carry.
    """

    def __init__(
        self,
        lm: LanguageModel,
        limits: BatchLimits,
        *,
        strategy: Strategy | None = None,
        capture: CaptureSpec | None = None,
        stop_strings: tuple[str, ...] = (),
        steerings: Sequence[Steering] = (),
    ) -> None:
        strategy = strategy or Sample()
        window = CacheWindow(1, 0)
        self.lm, self.strategy = lm, make_strategy(strategy, window, lm)
        width = self.strategy.depth + 1
        window.columns = limits.longest + max(32, limits.longest // 4) + self.strategy.depth
        model = ModelWithCache(lm, window)
        models = [model] if self.strategy.model is None else [model, self.strategy.model]
        for second in models[1:]:
            refuse_different(lm, second.lm, self.strategy.names)
        for steering in steerings:
            check_steering(steering, lm)
        positions = [each.lm.max_positions for each in models if each.lm.max_positions]
        max_positions = min(positions, default=None)
        pads_prompts = all(each.lm.pads_prompts for each in models)
        rules = RequestRules(
            lm, limits, max_positions, pads_prompts, captures=capture is not None, steers=bool(steerings)
        )
        self.scheduler = Scheduler(rules, strategy.sample, stop_strings)
        self.kv = KVWindow(window, models, width, lm.device)
        self.stepper = Stepper(
            lm,
            model,
            self.strategy,
            self.kv,
            RowBuffers(self.strategy.streams, limits.budget, lm.device),
            capture=None if capture is None else capture.hook(lm, 1, width),
            steering=SteeringHook(lm, steerings, 1) if steerings else None,
            last_position=min(limits.longest, max_positions or limits.longest) - 1,
        )
        self.holes_matter = width > 1 and any(needs_contiguous_kv(each.lm) for each in models)

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return self.scheduler.has_work

    def attached(self) -> AbstractContextManager[Any]:
        """Register the hooks and the decode kernels; every step runs inside this context."""
        hooks = [hook.attached() for hook in self.stepper.hooks]
        return nested([*hooks, *(gqa_decoding(model.lm) for model in self.kv.models)])

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests, in this order. PromptError or ConfigError for one that does not fit; then none is queued."""
        self.scheduler.add(requests)

    @torch.inference_mode()
    def cancel(self, request_id: str) -> None:
        """Remove a request, waiting or running; its slot is free at once."""
        self.kv.free(self.scheduler.cancel(request_id))

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Schedule, run, commit: prefill what enters, then one decode step of every slot."""
        output = StepOutput()
        self._resize()
        for admission in self.scheduler.admissions(self.stepper.min_free_slots, self.lm.device):
            lengths = self.scheduler.lengths
            samples = self.scheduler.assign(admission)
            self._commit(self.stepper.prefill(admission, samples, lengths), output)
        if self.scheduler.running:
            self._commit(self.stepper.decode(self.scheduler.slots), output)
        return output

    def _resize(self) -> None:
        """Have as many slots as there is work for."""
        rows = self.scheduler.resize()
        if rows is not None:
            self.kv.roll(self.scheduler.lengths, rows=rows)
            self.scheduler.select(rows)
            self.stepper.select_rows(rows)

    def _commit(self, chosen: ChosenTokens, output: StepOutput) -> None:
        """Append the chosen tokens, count their activations, and complete the sequences that end."""
        self.kv.dirty.update(chosen.failed)
        n_read = [0] * len(self.scheduler.slots)
        for row, sequence in self.scheduler.running.items():
            if row in chosen.tokens:
                n_read[row] = self._append(row, sequence, chosen, output)
        capture = self.stepper.capture
        if capture is not None and chosen.age_B is not None:
            capture.commit_tokens(chosen.age_B, None if chosen.proposal is None else n_read)
        if chosen.proposal is not None:
            self._record_acceptance(chosen.proposal, chosen)
        self._complete(output)

    def _append(self, row: int, sequence: RunningSequence, chosen: ChosenTokens, output: StepOutput) -> int:
        """Append a row's tokens; return how many columns of the pass hold response tokens that count."""
        tokens, joined = chosen.tokens[row], list[int]()
        if sequence.finish_reason is None:
            valid = tokens[: chosen.failed.get(row, len(tokens))]
            joined = sequence.extend(self.lm, valid)
            if valid:
                self.strategy.append_tokens(row, joined)
            if row in chosen.failed and sequence.finish_reason is None:
                sequence.finish_reason, sequence.fault = "failed", self._logits_error(sequence)
        if joined:
            output.new_tokens.setdefault(sequence.request.id, []).extend(joined)
        n_read = chosen.n_pending + min(len(tokens) - 1, len(joined))  # the newest token is not read yet
        sequence.n_fed += n_read
        return n_read

    def _logits_error(self, sequence: RunningSequence) -> ActivationError:
        """The error of a row without finite logits: names the example, the first non-finite layer and the dtype."""
        layer = first_non_finite_layer(self.lm, [*sequence.request.token_ids, *sequence.tokens])
        where = "the head" if layer is None else f"layer {layer}"
        dtype = str(self.lm.dtype).removeprefix("torch.")
        return ActivationError(
            f"{sequence.request.id}: the logits after {len(sequence.tokens)} response tokens are NaN or all -inf in "
            f"{dtype}, from {where} on: load the model with --dtype bfloat16 or float32"
        )

    def _record_acceptance(self, proposal: Proposal, chosen: ChosenTokens) -> None:
        """Tell the proposer what was accepted; close the holes where a model counts columns, or they are many."""
        for row, depth in enumerate(proposal.depth_B.tolist()):
            self.strategy.record_acceptance(row, depth, len(chosen.tokens[row]) - 1)
        longest = max(sequence.length for sequence in self.scheduler.running.values())
        if self.holes_matter or self.kv.n_live > 1.5 * longest + 16:
            self.kv.compact(self.scheduler.lengths)

    def _complete(self, output: StepOutput) -> None:
        """Emit the completions of sequences that are done, and free their slots."""
        capture = self.stepper.capture
        done = {
            row: sequence
            for row, sequence in self.scheduler.running.items()
            if sequence.is_done(captured=capture is not None)
        }
        if not done:
            return
        sound = [EndedRow(row, len(s.tokens), s.request.id) for row, s in done.items() if s.fault is None]
        emitted = capture.emit(sound) if capture is not None else [{} for _ in sound]
        activations: dict[int, dict[str, Tensor]] = {}
        for ended, found in zip(sound, emitted, strict=True):
            if isinstance(found, ActivationError):
                done[ended.slot].fault = found
            else:
                activations[ended.slot] = found
        for row, sequence in done.items():
            reason = "failed" if sequence.fault is not None else sequence.finish_reason or "length"
            request_id, tokens, stats = sequence.request.id, tuple(sequence.tokens), self.strategy.stats(row)
            output.completions.append(
                Completion(request_id, tokens, reason, activations.get(row, {}), stats, sequence.fault)
            )
            self.scheduler.slots[row] = None
        self.kv.free(list(done))
