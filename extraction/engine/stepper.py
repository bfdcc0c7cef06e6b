"""The stepper: one forward pass of all models over the slots, and the choice of the next tokens.

Shapes: B slots, T columns of a step, R rows that enter, P prompt columns, S columns of the window, K proposals,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from extraction.activations.pooled import CaptureHook, PooledCapture
from extraction.core.errors import LogitsError
from extraction.engine import speculation
from extraction.engine.cuda_graphs import (
    STEPS_PER_RUN,
    CudaGraphRunner,
    graph_recorder_for,
    mark_unsupported,
    round_up_columns,
)
from extraction.engine.kv_window import KVWindow
from extraction.engine.row_state import DRAW, RowBuffers
from extraction.engine.sampler import Sample, Sampler, sampler_of
from extraction.engine.scheduler import Admission
from extraction.engine.sequence import RunningSequence, left_pad
from extraction.engine.speculation import Proposal
from extraction.engine.steering import NO_STEERING, SteeringHook
from extraction.engine.strategies import ModelWithCache, PlainDecoding, ProposerInput
from extraction.model.language_model import LanguageModel

Slots = Sequence[RunningSequence | None]


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens that a forward pass chose, by row.

    `n_pending`: tokens of each row that the pass read and that were chosen before it: 1 in a decode step, 0 in a
    prefill. `failed`: rows whose logits are not finite, with the number of their tokens that came before. `age_B`:
    position in the response of the pending token; None where activations have been committed already. `proposal`: the
    tokens that speculation proposed.
    """

    tokens: Mapping[int, Sequence[int]]
    n_pending: int
    failed: Mapping[int, int] = field(default_factory=dict)
    age_B: Tensor | None = None
    proposal: Proposal | None = None


class Stepper:
    """Runs the models of a batch. `rows`: the per-row state on the device; `kv`: the window of their caches."""

    def __init__(
        self,
        lm: LanguageModel,
        model: ModelWithCache,
        strategy: PlainDecoding,
        kv: KVWindow,
        rows: RowBuffers,
        *,
        capture: CaptureHook | None,
        steering: SteeringHook | None,
        last_position: int,
    ) -> None:
        self.lm, self.model, self.strategy, self.kv, self.rows = lm, model, strategy, kv, rows
        self.capture, self.steering, self.last_position = capture, steering, last_position
        # steering hooks come first, so that the captured activations are the steered ones
        self.hooks: list[SteeringHook | CaptureHook] = [hook for hook in (steering, capture) if hook is not None]
        self.width = strategy.depth + 1
        self._samples: tuple[Sample, ...] = ()
        self._sampler: Sampler = Sample()
        self.graphs = self._cuda_graphs()

    @property
    def min_free_slots(self) -> int:
        """Number of free slots that a prefill waits for: many where a decode step is cheap."""
        n_slots = self.rows.n_rows
        return n_slots // 16 + 1 if self.graphs is None else self.graphs.enough_free(n_slots)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make the rows of all per-row state these ones."""
        rows_B = torch.tensor(rows, device=self.lm.device)
        self.rows.select(rows_B)
        self.strategy.select_rows(rows)
        for hook in self.hooks:
            hook.select_rows(rows_B)
        if self.graphs is not None:
            self.graphs.forget()

    # -- prefill ------------------------------------------------------------------------------------------------------

    def prefill(self, admission: Admission, samples: Sequence[Sample], lengths: Sequence[int | None]) -> ChosenTokens:
        """Read the prompts that enter straight into their slots, and choose their first tokens.

        `lengths`: cached tokens of the slots that run already.
        """
        rows, requests = admission.rows, admission.requests
        ids_RP, mask_RP = left_pad([request.token_ids for request in requests], self.lm.pad_id, self.lm.device)
        rows_R = torch.tensor(rows, device=self.lm.device)
        self.kv.make_room(ids_RP.shape[1], lengths)
        self.kv.admit(rows, rows_R, mask_RP, [len(request.token_ids) for request in requests])
        self.rows.assign(rows_R, requests, ids_RP, mask_RP, draws=any(sample.draws for sample in samples))
        self.strategy.assign(rows, requests)
        if self.steering is not None:
            self.steering.assign(rows_R, [request.steering or NO_STEERING for request in requests])
        position_RP = (mask_RP.cumsum(1) - 1).clamp_(min=0)
        with self.kv.window.prefilling(rows_R, self.kv.window.cursor):
            with nested(hook.during_prefill(rows_R, mask_RP) for hook in self.hooks):
                logits_RV = self.model.forward(ids_RP, mask_RP, position_RP)[:, -1]
            logits_RV = self.strategy.prefill(ids_RP, mask_RP, position_RP, logits_RV)
        uniform_R = self.rows.uniform_BT[DRAW][rows_R, 0]
        token_R, failed = self._choose(sampler_of(samples, self.lm.device), logits_RV, uniform_R)
        self.rows.token_B1[rows_R, 0] = token_R
        tokens = {row: [token] for row, token in zip(rows, token_R.tolist(), strict=True)}
        return ChosenTokens(tokens, n_pending=0, failed={rows[i]: 0 for i in failed})

    # -- decode -------------------------------------------------------------------------------------------------------

    def decode(self, slots: Slots) -> ChosenTokens:
        """Feed every slot its newest token, and what is proposed to follow it; choose the next ones."""
        sampler = self._sampler_of(slots)
        if self.graphs is not None and self.graphs.can_record(sampler):
            return self._run_graph(self.graphs, slots, sampler)
        if not self.kv.has_room(self.width):
            self.kv.roll(_lengths(slots))
        age_B = self.rows.age_B
        proposal = self.strategy.propose(self._proposer_input(slots, sampler)) if self.width > 1 else None
        if proposal is None:
            return self._decode_one(sampler, age_B)
        return self._verify(slots, sampler, age_B, proposal)

    def _decode_one(self, sampler: Sampler, age_B: Tensor) -> ChosenTokens:
        """One token for every row."""
        logits_BV = self._forward(self.rows.token_B1)[:, -1]
        uniform_B = self.rows.uniform(DRAW, 1)[:, 0] if sampler.draws else None
        token_B, failed = self._choose(sampler, logits_BV, uniform_B)
        self.rows.step(token_B.unsqueeze(1), self.rows.token_B1, 1)
        self.kv.window.cursor += 1
        tokens = {row: [token] for row, token in enumerate(token_B.tolist())}
        return ChosenTokens(tokens, n_pending=1, failed=dict.fromkeys(failed, 0), age_B=age_B)

    def _verify(self, slots: Slots, sampler: Sampler, age_B: Tensor, proposal: Proposal) -> ChosenTokens:
        """Accept proposals by rejection sampling, and choose one token more. Rejected columns become holes."""
        pending_B1 = self.rows.token_B1
        ids_BT = torch.cat([pending_B1, proposal.token_BK], dim=1)
        logits_BTV = self._forward(ids_BT)
        if broken := _non_finite_rows(slots, logits_BTV):  # a NaN reaches the columns before it too, masked or not
            proposal = proposal.without(broken, pending_B1)
            ids_BT = torch.cat([pending_B1, proposal.token_BK], dim=1)
            logits_BTV = self._forward(ids_BT)
        cursor, width = self.kv.window.cursor, ids_BT.shape[1]
        bad_BT = ~logits_BTV.amax(-1).isfinite()
        probs_BTV = sampler.chances(torch.where(bad_BT.unsqueeze(-1), 0.0, logits_BTV))
        accept_BK, draw_BT = self.rows.uniform("accept", width - 1), self.rows.uniform(DRAW, width)
        verified = speculation.verify_proposal(probs_BTV, proposal, accept_BK, draw_BT)
        count_B1 = verified.count_B.unsqueeze(1)
        stays_BT = torch.arange(width, device=bad_BT.device) < count_B1
        failed = (bad_BT & stays_BT).any(1).nonzero()[:, 0].tolist()
        self.kv.mask_BS[:, cursor : cursor + width] = stays_BT
        self.rows.step(verified.token_BT.gather(1, count_B1 - 1), ids_BT.gather(1, count_B1 - 1), count_B1)
        self.kv.window.cursor += width
        chosen = zip(verified.token_BT.tolist(), verified.count_B.tolist(), strict=True)
        tokens = {row: row_tokens[:count] for row, (row_tokens, count) in enumerate(chosen)}
        return ChosenTokens(tokens, 1, dict.fromkeys(failed, 0), age_B, proposal)

    def _forward(self, ids_BT: Tensor, seen_BS: Tensor | None = None) -> Tensor:
        """One pass of every model over a step's columns: the logits that tokens are chosen from, [B, T, V].

        `seen_BS`: attention mask of a step that is captured as a graph; else that of the window's live columns.
        """
        window, width = self.kv.window, ids_BT.shape[1]
        position_BT = self.rows.positions(width, self.last_position)
        mask_BS = self.kv.mask_BS[:, window.start : window.cursor + width] if seen_BS is None else seen_BS
        with nested(hook.during_step(width) for hook in self.hooks):
            logits_BTV = self.model.forward(ids_BT, mask_BS, position_BT, width)
        return self.strategy.process_logits(ids_BT, mask_BS, position_BT, logits_BTV)

    def _proposer_input(self, slots: Slots, sampler: Sampler) -> ProposerInput:
        # one token is chosen without a proposal
        room = [0 if sequence is None else max(0, sequence.n_left - 1) for sequence in slots]
        return ProposerInput(self.rows, self.kv.mask_BS, self.last_position, sampler, room)

    def _sampler_of(self, slots: Slots) -> Sampler:
        """The sampler of the slots as they are; a free slot is sampled like the first running one."""
        running = next(sequence.sample for sequence in slots if sequence is not None)
        samples = tuple(running if sequence is None else sequence.sample for sequence in slots)
        if samples != self._samples:
            self._samples, self._sampler = samples, sampler_of(samples, self.lm.device)
        return self._sampler

    @staticmethod
    def _choose(sampler: Sampler, logits_BV: Tensor, uniform_B: Tensor | None) -> tuple[Tensor, Sequence[int]]:
        """Tokens [B], and the rows whose logits are not finite; their token is arbitrary."""
        try:
            return sampler(logits_BV, uniform_B), ()
        except LogitsError as failure:
            bad_R = torch.tensor(failure.rows, device=logits_BV.device)
            return sampler(logits_BV.index_fill(0, bad_R, 0.0), uniform_B), failure.rows

    # -- CUDA graphs --------------------------------------------------------------------------------------------------

    def _cuda_graphs(self) -> CudaGraphRunner | None:
        """A runner of captured steps, where the device, the models and all hooks allow it."""
        is_static = self.capture is None or (isinstance(self.capture, PooledCapture) and self.capture.in_place)
        models = [model.lm for model in self.kv.models]
        record = graph_recorder_for(models) if is_static and self.strategy.in_place else None
        if record is None:
            return None
        window = self.kv.window
        window.columns = round_up_columns(window.columns)
        self.kv.mask_BS = self.kv.mask_BS.new_ones(1, window.columns)
        return CudaGraphRunner(
            self.rows,
            window,
            record,
            lambda seen_BS: self._forward(self.rows.token_B1, seen_BS)[:, -1],
            self.lm.stop_ids,
        )

    def _run_graph(self, graphs: CudaGraphRunner, slots: Slots, sampler: Sampler) -> ChosenTokens:
        """Several captured steps of every slot, with one look at their tokens."""
        running = [sequence for sequence in slots if sequence is not None]
        # the host finds stop strings, and tokens after one must not be captured
        one_by_one = self.capture is not None and any(sequence.stop_strings for sequence in running)
        n_steps = 1 if one_by_one else min(STEPS_PER_RUN, max(sequence.n_left for sequence in running) + 1)
        if graphs.must_roll(n_steps):
            self.kv.roll(_lengths(slots))
        capture = self.capture if isinstance(self.capture, PooledCapture) else None
        result = graphs.run(n_steps, slots, self.kv.mask_BS, sampler, capture)
        self.kv.window.cursor += result.n_steps
        if graphs.broken:
            mark_unsupported(self.lm, graphs.broken)
            self.graphs = None
        failed = {row: n_valid for row, n_valid in enumerate(result.n_valid) if n_valid < result.n_steps}
        return ChosenTokens(dict(enumerate(result.tokens)), n_pending=1, failed=failed)


def _lengths(slots: Slots) -> list[int | None]:
    return [None if sequence is None else sequence.length for sequence in slots]


def _non_finite_rows(slots: Slots, logits_BTV: Tensor) -> list[int]:
    """Running rows with a NaN or all -inf among their logits."""
    bad = (~logits_BTV.amax(-1).isfinite()).any(1).nonzero()[:, 0].tolist()
    return [row for row in bad if (sequence := slots[row]) is not None and sequence.fault is None]


def nested(contexts: Iterable[AbstractContextManager[Any]]) -> ExitStack:
    """Enter several contexts as one, the first outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()
