"""The running batch: slots, their window of columns, and the one loop that every way of decoding goes through.

A step feeds every slot its newest token and what was proposed to follow it; a slot whose request ends takes the next
one while its neighbours go on. Requests may be added and dropped while it runs. A result does not depend on
neighbours, order, batch size, refill or on when it was asked for.

Shapes: B slots, T columns of a step, R rows that enter, P prompt columns, S columns of the window, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from extraction.activations.pooled import CaptureSpec, EndedRow, PooledCapture, first_non_finite_layer
from extraction.core.errors import ActivationError, ConfigError, LogitsError, PromptError
from extraction.engine import speculation
from extraction.engine.cuda_graphs import (
    STEPS_PER_RUN,
    CudaGraphRunner,
    graph_recorder_for,
    mark_unsupported,
    round_up_columns,
)
from extraction.engine.logit_diff import check_alpha
from extraction.engine.requests import Completion, Request
from extraction.engine.row_state import DRAW, RowBuffers
from extraction.engine.sampler import Sample, Sampler, sampler_of
from extraction.engine.sequence import BatchLimits, RunningSequence, StepOutput, left_pad
from extraction.engine.speculation import Proposal
from extraction.engine.steering import NO_STEERING, Steering, SteeringHook, check_steering
from extraction.engine.strategies import ModelWithCache, ProposerInput, Strategy, make_strategy, needs_contiguous_kv
from extraction.model.devices import prefill_rows
from extraction.model.gqa_decode import gqa_decoding
from extraction.model.kv_cache import CacheWindow, ColumnMove
from extraction.model.loading import LanguageModel
from extraction.model.pairs import refuse_different


class ContinuousBatch:
    """The slots, their caches and their window. Everything that changes from step to step lives here."""

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
        self.lm, self.limits, self.strategy, self.stop_strings = lm, limits, strategy or Sample(), stop_strings
        self.capture, self.steerings = capture, steerings
        self.queue: deque[Request] = deque()
        self.slots: list[RunningSequence | None] = [None]
        self.tainted: set[int] = set()
        self.window = CacheWindow(len(self.slots), 0)
        self.partner = make_strategy(self.strategy, self.window, lm)
        self.width = self.partner.depth + 1
        self.window.columns = limits.longest + max(32, limits.longest // 4) + self.partner.depth
        self.lane = ModelWithCache(lm, self.window)
        self.lanes = [lane for lane in (self.lane, self.partner.lane) if lane is not None]
        for lane in self.lanes[1:]:
            refuse_different(lm, lane.lm, self.partner.names)
        self.holes_matter = self.width > 1 and any(needs_contiguous_kv(lane.lm) for lane in self.lanes)
        self.max_positions = min((lane.lm.max_positions for lane in self.lanes if lane.lm.max_positions), default=None)
        self.last_position = min(limits.longest, self.max_positions or limits.longest) - 1
        self.observer = capture.observer(lm, 1, self.width) if capture is not None else None
        for steering in steerings:
            check_steering(steering, lm)
        self.steerer = SteeringHook(lm, steerings, 1) if steerings else None
        # the steerer's hooks come first, so that the observer sees what it has done
        self.guests = [guest for guest in (self.steerer, self.observer) if guest is not None]
        self.rows = RowBuffers(self.partner.streams, limits.budget, lm.device)
        self.mask_BS = torch.ones(1, self.window.columns, dtype=torch.bool, device=lm.device)
        self.bursts = self._find_bursts()
        self._sampler: Sampler | None = None

    # -- from outside -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.queue) or any(slot is not None for slot in self.slots)

    def watching(self) -> AbstractContextManager[Any]:
        """The guests' hooks, while the batch runs, and attention that copies nothing."""
        own = [guest.watching() for guest in self.guests]
        return _all([*own, *(gqa_decoding(lane.lm) for lane in self.lanes)])

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests, in this order. PromptError or ConfigError for one that does not fit; then none is queued."""
        asked = list(requests)
        for request in asked:
            self._check(request)
        self.queue.extend(asked)

    @torch.inference_mode()
    def drop(self, request_id: str) -> None:
        """Forget a request, waiting or running; its slot is free at once."""
        self.queue = deque(request for request in self.queue if request.id != request_id)
        for row, slot in enumerate(self.slots):
            if slot is not None and slot.request.id == request_id:
                self._free(row)
        self._find_start()

    @torch.inference_mode()
    def advance(self) -> StepOutput:
        """Refill if it pays, then one step of every slot."""
        news = StepOutput()
        self._fit()
        if self._should_refill():
            self._refill(news)
        if any(slot is not None for slot in self.slots):
            if self.bursts is not None and self.bursts.can_record(self.sampler):
                self._burst(self.bursts, news)
            else:
                self._step(news)
        return news

    def _check(self, request: Request) -> None:
        steering = request.steering or NO_STEERING
        check_steering(steering, self.lm)
        check_alpha(request.alpha or 0.0)
        if self.steerer is None and steering.layers:
            raise ConfigError(f"{request.id}: this batch was made without steering; name the steerings when it is made")
        n_prompt = len(request.token_ids)
        if not n_prompt:
            raise PromptError(f"{request.id}: the prompt has no tokens; give it at least one")
        if request.max_new_tokens < 1:
            raise PromptError(f"{request.id}: max_new_tokens is {request.max_new_tokens}; use at least 1")
        n_total = n_prompt + request.max_new_tokens - (self.capture is None)
        if self.max_positions is not None and n_total > self.max_positions:
            raise PromptError(
                f"{request.id}: {n_prompt} prompt tokens + {request.max_new_tokens} new ones pass the model's "
                f"{self.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
        if n_prompt + request.max_new_tokens > self.limits.longest or request.max_new_tokens > self.limits.budget:
            raise PromptError(
                f"{request.id}: {n_prompt} prompt tokens + {request.max_new_tokens} new ones pass the batch's limits, "
                f"{self.limits.longest} together and {self.limits.budget} new ones"
            )

    # -- entering -----------------------------------------------------------------------------------------------------

    def _should_refill(self) -> bool:
        """Several free slots are filled together, to share the cost of a prefill: many, where a step is cheap."""
        free, n_slots = self.slots.count(None), len(self.slots)
        enough = n_slots // 16 + 1 if self.bursts is None else self.bursts.enough_free(n_slots)
        return bool(self.queue) and (free == n_slots or free >= min(len(self.queue), enough))

    def _refill(self, news: StepOutput) -> None:
        """Fill the free slots, in prefills of as many prompts as are quickest together."""
        free = min(self.slots.count(None), len(self.queue))
        while free:
            lengths = [len(request.token_ids) for request in islice(self.queue, free)]
            n_rows = prefill_rows(lengths, self.lm.device)
            self._enter([i for i, slot in enumerate(self.slots) if slot is None][:n_rows], news)
            free -= n_rows

    def _enter(self, rows: list[int], news: StepOutput) -> None:
        """Prefill the next requests straight into these slots, and choose their first tokens."""
        entering = [self.queue.popleft() for _ in rows]
        ids_RP, mask_RP = left_pad([r.token_ids for r in entering], self.lm.pad_id, self.lm.device)
        self._make_room(ids_RP.shape[1])
        rows_R = torch.tensor(rows, device=self.lm.device)
        self._seat(rows, rows_R, entering, ids_RP, mask_RP)
        position_RP = (mask_RP.cumsum(1) - 1).clamp_(min=0)
        with self.window.entering(rows_R, self.window.cursor):
            with _all(guest.entering(rows_R, mask_RP) for guest in self.guests):
                logits_RV = self.lane.read(ids_RP, mask_RP, position_RP)[:, -1]
            logits_RV = self.partner.enter(ids_RP, mask_RP, position_RP, logits_RV)
        token_R = self._choose(logits_RV, self.rows.uniform_BT[DRAW][rows_R, 0], rows)
        self.rows.token_B1[rows_R, 0] = token_R
        chosen = {row: [token] for row, token in zip(rows, token_R.tolist(), strict=True)}
        self._extend_all(chosen, news, pending=0)
        self._let_go(news)

    def _make_room(self, width: int) -> None:
        """A prompt of this width must fit to the left of the cursor, and a step to the right of it."""
        window = self.window
        if all(slot is None for slot in self.slots):
            window.cursor = window.start = width
        if window.cursor < width or window.cursor + self.width > window.columns:
            self._roll(width)

    def _seat(self, rows: list[int], rows_R: Tensor, entering: list[Request], ids_RP: Tensor, mask_RP: Tensor) -> None:
        """Give each row its slot: mask, position, random numbers, steering."""
        cursor = self.window.cursor
        for row, request in zip(rows, entering, strict=True):
            sample = request.sample or self.strategy.sample
            stop_strings = (*self.stop_strings, *request.stop_strings)
            self.slots[row] = RunningSequence(request, sample, stop_strings, cursor - len(request.token_ids))
        self.mask_BS[rows_R] = False
        self.mask_BS[rows_R, cursor - mask_RP.shape[1] : cursor] = mask_RP
        self.mask_BS[rows_R, cursor:] = True
        draws = any((request.sample or self.strategy.sample).draws for request in entering)
        self.rows.seat(rows_R, entering, ids_RP, mask_RP, draws=draws)
        if self.steerer is not None:
            self.steerer.seat(rows_R, [request.steering or NO_STEERING for request in entering])
        self.partner.seat(rows, entering)
        for lane in self.lanes:  # what is masked must still be finite
            if self.tainted.intersection(rows):
                lane.cache.clear(rows_R)
        self.tainted.difference_update(rows)
        self._sampler = None
        self._find_start()

    # -- stepping -----------------------------------------------------------------------------------------------------

    def _step(self, news: StepOutput) -> None:
        """Feed every slot's newest token and what is proposed to follow, and choose the next."""
        if self.window.cursor + self.width > self.window.columns:
            self._roll()
        age_B = self.rows.age_B
        proposal = self.partner.propose(self._front()) if self.width > 1 else None
        pending_B1 = self.rows.token_B1
        ids_BT = pending_B1 if proposal is None else torch.cat([pending_B1, proposal.token_BK], dim=1)
        logits_BTV = self._read(ids_BT)
        broken = [] if proposal is None else self._broken(logits_BTV)
        if proposal is not None and broken:
            proposal = proposal.without(broken, pending_B1)
            ids_BT = torch.cat([pending_B1, proposal.token_BK], dim=1)
            logits_BTV = self._read(ids_BT)
        chosen = self._one_more(logits_BTV) if proposal is None else self._settle(logits_BTV, proposal, ids_BT)
        read = self._extend_all({row: chosen[row] for row, slot in enumerate(self.slots) if slot is not None}, news)
        if self.observer is not None:
            self.observer.credit(age_B, None if proposal is None else read)
        if proposal is not None:
            self._learn(proposal, chosen)
        self._let_go(news)

    def _broken(self, logits_BTV: Tensor) -> list[int]:
        """Live rows that what was proposed may have broken: a NaN reaches the columns before it too, masked or not."""
        bad = (~logits_BTV.amax(-1).isfinite()).any(1).nonzero()[:, 0].tolist()
        return [row for row in bad if (slot := self.slots[row]) is not None and slot.fault is None]

    def _read(self, ids_BT: Tensor, seen_BS: Tensor | None = None) -> Tensor:
        """One pass of every model over a step's columns: the logits that tokens are chosen from, [B, T, V].

        `seen_BS`: the columns that are attended to, of a step that is recorded; else those of the window.
        """
        window, width = self.window, ids_BT.shape[1]
        position_BT = self.rows.positions(width, self.last_position)
        mask_BS = self.mask_BS[:, window.start : window.cursor + width] if seen_BS is None else seen_BS
        with _all(guest.stepping(width) for guest in self.guests):
            logits_BTV = self.lane.read(ids_BT, mask_BS, position_BT, width)
        return self.partner.weigh(ids_BT, mask_BS, position_BT, logits_BTV)

    def _find_bursts(self) -> CudaGraphRunner | None:
        """Recorded steps, where the device, the models and all that watches them allow it."""
        still = self.observer is None or (isinstance(self.observer, PooledCapture) and self.observer.in_place)
        record = graph_recorder_for([lane.lm for lane in self.lanes]) if still and self.partner.in_place else None
        if record is None:
            return None
        self.window.columns = round_up_columns(self.window.columns)
        self.mask_BS = self.mask_BS.new_ones(1, self.window.columns)
        return CudaGraphRunner(
            self.rows,
            self.window,
            record,
            lambda seen_BS: self._read(self.rows.token_B1, seen_BS)[:, -1],
            self.lm.stop_ids,
        )

    def _burst(self, bursts: CudaGraphRunner, news: StepOutput) -> None:
        """Several recorded steps of every slot, and only then a look at what they chose."""
        live = [slot for slot in self.slots if slot is not None]
        # a stop string is the host's to find, and what comes after it must not be counted
        one_by_one = self.observer is not None and any(slot.stop_strings for slot in live)
        n_steps = 1 if one_by_one else min(STEPS_PER_RUN, max(slot.left for slot in live) + 1)
        if bursts.must_roll(n_steps):
            self._roll()
        observer = self.observer if isinstance(self.observer, PooledCapture) else None
        burst = bursts.run(n_steps, self.slots, self.mask_BS, self.sampler, observer)
        self.window.cursor += burst.n_steps
        if bursts.broken:
            mark_unsupported(self.lm, bursts.broken)
            self.bursts = None
        said = {row: burst.tokens[row][: burst.sound[row]] for row, slot in enumerate(self.slots) if slot is not None}
        self._extend_all(said, news)
        self._fail([row for row, sound in enumerate(burst.sound) if sound < burst.n_steps])
        self._let_go(news)

    def _one_more(self, logits_BTV: Tensor) -> list[list[int]]:
        """One token for every row."""
        uniform_B = self.rows.uniform(DRAW, 1)[:, 0] if self.sampler.draws else None
        token_B = self._choose(logits_BTV[:, -1], uniform_B, None)
        self.rows.step(token_B.unsqueeze(1), self.rows.token_B1, 1)
        self.window.cursor += 1
        return [[token] for token in token_B.tolist()]

    def _settle(self, logits_BTV: Tensor, proposal: Proposal, ids_BT: Tensor) -> list[list[int]]:
        """The accepted proposals of every row and one token more. Columns of what was rejected become holes."""
        cursor, width = self.window.cursor, ids_BT.shape[1]
        bad_BT = ~logits_BTV.amax(-1).isfinite()
        chances_BTV = self.sampler.chances(torch.where(bad_BT.unsqueeze(-1), 0.0, logits_BTV))
        accept_BK, draw_BT = self.rows.uniform("accept", width - 1), self.rows.uniform(DRAW, width)
        verdict = speculation.verify_proposal(chances_BTV, proposal, accept_BK, draw_BT)
        count_B1 = verdict.count_B.unsqueeze(1)
        stays_BT = torch.arange(width, device=bad_BT.device) < count_B1
        self._fail((bad_BT & stays_BT).any(1).nonzero()[:, 0].tolist())
        self.mask_BS[:, cursor : cursor + width] = stays_BT
        self.rows.step(verdict.token_BT.gather(1, count_B1 - 1), ids_BT.gather(1, count_B1 - 1), count_B1)
        self.window.cursor += width
        counts = verdict.count_B.tolist()
        return [tokens[:count] for tokens, count in zip(verdict.token_BT.tolist(), counts, strict=True)]

    def _front(self) -> ProposerInput:
        # one token comes without a proposal
        room = [0 if slot is None else max(0, slot.left - 1) for slot in self.slots]
        return ProposerInput(self.rows, self.mask_BS, self.last_position, self.sampler, room)

    @property
    def sampler(self) -> Sampler:
        """What chooses tokens for the slots as they are; an idle one is treated as any other."""
        if self._sampler is None:
            live = [slot.sample for slot in self.slots if slot is not None]
            samples = [live[0] if slot is None else slot.sample for slot in self.slots]
            self._sampler = sampler_of(samples, self.lm.device)
        return self._sampler

    def _choose(self, logits_BV: Tensor, uniform_B: Tensor | None, rows: list[int] | None) -> Tensor:
        """Tokens for these rows (None: every slot). Where a row's logits are not sound, the row fails, if it lives."""
        if rows is None:
            sampler = self.sampler
        else:
            held = [self.slots[row] for row in rows]
            sampler = sampler_of([slot.sample for slot in held if slot is not None], self.lm.device)
        try:
            return sampler(logits_BV, uniform_B)
        except LogitsError as failure:
            self._fail([row if rows is None else rows[row] for row in failure.rows])
            bad_R = torch.tensor(failure.rows, device=logits_BV.device)
            return sampler(logits_BV.index_fill(0, bad_R, 0.0), uniform_B)

    def _fail(self, rows: Sequence[int]) -> None:
        """End rows whose logits are not finite; the numbers that they leave behind are cleared before the next use."""
        self.tainted.update(rows)
        for slot in (self.slots[row] for row in rows):
            if slot is not None and slot.ending is None:
                slot.ending, slot.fault = "failed", self._no_choice(slot)

    def _no_choice(self, slot: RunningSequence) -> ActivationError:
        """What to say where a live row has no sound logits: names the example, the first bad layer, the dtype."""
        layer = first_non_finite_layer(self.lm, [*slot.request.token_ids, *slot.tokens])
        where = "the head" if layer is None else f"layer {layer}"
        dtype = str(self.lm.dtype).removeprefix("torch.")
        return ActivationError(
            f"{slot.request.id}: the logits after {len(slot.tokens)} response tokens are NaN or all -inf in {dtype}, "
            f"from {where} on: load the model with --dtype bfloat16 or float32"
        )

    # -- ending -------------------------------------------------------------------------------------------------------

    def _extend_all(self, chosen: dict[int, list[int]], news: StepOutput, pending: int = 1) -> list[int]:
        """Append each row's tokens. Returns how many columns of the pass hold response tokens that count, by slot.

        `pending`: a step reads one token that was there before, a prefill none.
        """
        read = [0] * len(self.slots)
        for row, tokens in chosen.items():
            slot = self.slots[row]
            assert slot is not None
            kept: list[int] = []
            if slot.ending is None:
                kept = slot.extend(self.lm, tokens)
                self.partner.extend(row, kept)
            if kept:
                news.fresh.setdefault(slot.request.id, []).extend(kept)
            read[row] = pending + min(len(tokens) - 1, len(kept))  # the newest one is not read yet
            slot.fed += read[row]
        return read

    def _learn(self, proposal: Proposal, chosen: Sequence[Sequence[int]]) -> None:
        """Tell the partner what became of its proposals; close the holes where a model minds them, or they are many."""
        for row, depth in enumerate(proposal.depth_B.tolist()):
            self.partner.learn(row, depth, len(chosen[row]) - 1)
        longest = max(slot.length for slot in self.slots if slot is not None)
        if self.holes_matter or self.window.cursor - self.window.start > 1.5 * longest + 16:
            self._align()

    def _let_go(self, news: StepOutput) -> None:
        """Emit the rows that are done."""
        captured = self.observer is not None
        done = {row: s for row, s in enumerate(self.slots) if s is not None and s.is_done(captured=captured)}
        if not done:
            return
        sound = [EndedRow(row, len(s.tokens), s.request.id) for row, s in done.items() if s.fault is None]
        emitted = self.observer.emit(sound) if self.observer is not None else [{} for _ in sound]
        kept: dict[int, dict[str, Tensor]] = {}
        for ended, found in zip(sound, emitted, strict=True):
            if isinstance(found, ActivationError):
                done[ended.slot].fault = found
            else:
                kept[ended.slot] = found
        news.done.extend(self._leave(row, slot, kept.get(row, {})) for row, slot in done.items())
        self._find_start()

    def _leave(self, row: int, slot: RunningSequence, kept: dict[str, Tensor]) -> Completion:
        reason = "failed" if slot.fault is not None else slot.ending or "length"
        self._free(row)
        return Completion(slot.request.id, tuple(slot.tokens), reason, kept, self.partner.account(row), slot.fault)

    def _free(self, row: int) -> None:
        self.slots[row] = None
        # an idle row costs least with little to attend to; with nothing, it would come out as NaN
        self.mask_BS[row, : self.window.cursor] = False
        self._sampler = None

    # -- the window ---------------------------------------------------------------------------------------------------

    def _find_start(self) -> None:
        """The first column that a live row still needs."""
        live = [slot.first_column for slot in self.slots if slot is not None]
        self.window.start = min(live, default=self.window.cursor)

    def _align(self) -> None:
        """Close the holes that rejected proposals left: every row's tokens come to END at the cursor."""
        live = slice(self.window.start, self.window.cursor)
        source_BS = self.mask_BS[:, live].int().argsort(dim=1, stable=True)
        for lane in self.lanes:
            lane.cache.align(source_BS)
        self.mask_BS[:, live] = self.mask_BS[:, live].gather(1, source_BS)
        for slot in self.slots:
            if slot is not None:
                slot.first_column = self.window.cursor - slot.length
        self._find_start()

    def _roll(self, width: int = 0, rows: list[int] | None = None) -> None:
        """Move the live columns to the left edge, or so far that `width` columns fit before the cursor."""
        if self.width > 1:
            self._align()
        window = self.window
        live = window.cursor - window.start
        self._repack(rows, ColumnMove(window.start, live, max(live, width) - live))

    def _fit(self) -> None:
        """As many slots as there is work for: grow while requests wait, and go on with the live rows alone when few."""
        live = [row for row, slot in enumerate(self.slots) if slot is not None]
        n_slots, wanted = len(self.slots), len(live) + len(self.queue)
        if wanted > n_slots < self.limits.slots:
            more = min(self.limits.slots, max(wanted, 2 * n_slots)) - n_slots
            self._roll(rows=[*range(n_slots), *[0] * more])
        elif not self.queue and live and len(live) <= n_slots // 2:
            self._roll(rows=live)

    def _repack(self, rows: list[int] | None, move: ColumnMove) -> None:
        """The slots become these (one that is named again is an empty one), and the live columns move."""
        rows_B = None if rows is None else torch.tensor(rows, device=self.lm.device)
        for lane in self.lanes:
            lane.cache.repack(rows_B, move)
        kept = list(range(len(self.slots))) if rows is None else rows
        self.slots = [self.slots[row] if row not in kept[:i] else None for i, row in enumerate(kept)]
        for slot in self.slots:
            if slot is not None:
                slot.first_column += move.to - move.start
        index_B = torch.tensor(kept, device=self.lm.device)
        moved_BS = self.mask_BS[index_B, move.start : move.start + move.width]
        if rows is not None:
            self.mask_BS = self.mask_BS[index_B]
        self.mask_BS.fill_(True)
        self.mask_BS[:, : move.to] = False
        self.mask_BS[:, move.to : move.to + move.width] = moved_BS
        self.window.start, self.window.cursor = move.to, move.to + move.width
        if rows_B is not None:
            self._take_rows(rows_B, kept)

    def _take_rows(self, rows_B: Tensor, rows: list[int]) -> None:
        self.window.slots = len(rows)
        self.rows.take(rows_B)
        self.tainted = {i for i, row in enumerate(rows) if row in self.tainted}
        self.partner.take_rows(rows)
        for guest in self.guests:
            guest.repack(rows_B)
        if self.bursts is not None:
            self.bursts.forget()
        self._sampler = None


def _all(contexts: Iterable[AbstractContextManager[Any]]) -> ExitStack:
    """Several contexts as one, the first outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()
