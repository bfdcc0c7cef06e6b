"""Bursts: a decode step recorded once as a graph of the device, and replayed several times without asking the host.

All that a step reads or writes lies in buffers that stay where they are, the cursor among them, so that one recording
serves every step of so many rows and columns. Rows that end within a burst are told so on the device; what they say
after their end is dropped. The host looks at the tokens once a burst.

Shapes: B slots, K steps of a burst, S columns of the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from extraction.engine.row_state import DRAW, RowBuffers
from extraction.engine.sampler import Sample, Sampler
from extraction.model.devices import Record, recorder_for
from extraction.model.gqa_decode import ProbeText, decode_probe
from extraction.model.kv_cache import CacheWindow, GraphCursor
from extraction.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from extraction.activations.pooled import PooledCapture
    from extraction.engine.sequence import RunningSequence
    from extraction.model.loading import LanguageModel

STEPS_PER_RUN = 4  # of a burst: a row that ends idles for half of them, and the host's look costs a share of each
COLUMN_BUCKET = 128  # a recorded step attends to a multiple of so many: fewer recordings against columns read in vain
PROOF_COLUMNS = 1024
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # why a model's steps are not recorded; "": they are

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphRun:
    """What came of a burst: each row's tokens, and how many of them came before its logits broke (all: never)."""

    tokens: list[list[int]]
    sound: list[int]

    @property
    def n_steps(self) -> int:
        """How many steps it had; fewer than asked for where no recording could be made."""
        return len(self.tokens[0])


class CudaGraphRunner:
    """The recorded steps of a running batch. `read` is one pass over the rows' newest tokens: mask -> logits [B, V]."""

    def __init__(
        self, rows: RowBuffers, window: CacheWindow, record: Record, read: Read, stop_ids: Iterable[int]
    ) -> None:
        self.rows, self.window, self.record, self.read = rows, window, record, read
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=rows.device)
        self.arange_S = torch.arange(window.columns, device=rows.device)
        self.cursor_1, self.step_1 = (torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(2))
        self.broken = ""  # why a step could not be recorded after all
        self._replays: dict[tuple[int, Sampler], Callable[[], None]] = {}
        self._make(0)

    def _make(self, n_slots: int) -> None:
        device = self.rows.device
        self.token_BK = torch.zeros(n_slots, STEPS_PER_RUN, dtype=torch.long, device=device)
        self.bad_BK = torch.zeros(n_slots, STEPS_PER_RUN, dtype=torch.bool, device=device)
        # live: the newest token is part of the response; left: how many may still join it; heeds: stop tokens end it
        self.standing_3B = torch.zeros(3, n_slots, dtype=torch.long, device=device)

    def forget(self) -> None:
        """The rows' buffers are other ones now: nothing that was recorded holds."""
        self._replays.clear()

    def must_roll(self, n_steps: int) -> bool:
        """Whether the window has no room for so many steps, or many columns that nobody needs any more."""
        window = self.window
        return window.cursor + n_steps > window.columns or round_up_columns(window.start + 1) > round_up_columns(1)

    @staticmethod
    def enough_free(n_slots: int) -> int:
        """How many free slots a prefill waits for. It is not recorded, so the host's part of it is worth many steps.

        A row costs prefill / free + tokens * step * (1 + free / 2 slots) / slots; if a prefill takes as long as a dozen
        steps, and answers have 60 tokens, that is least where about half of the slots are free.
        """
        return n_slots // 2 + 1

    @staticmethod
    def can_record(sampler: Sampler) -> bool:
        """One Sample for all rows; where each has its own, what a step does depends on who is there."""
        return isinstance(sampler, Sample)

    def run(
        self,
        n_steps: int,
        slots: Sequence[RunningSequence | None],
        mask_BS: Tensor,
        sampler: Sampler,
        observer: PooledCapture | None,
    ) -> GraphRun:
        """So many steps of every row; the cursor is the caller's to move."""
        if len(slots) != self.standing_3B.shape[1]:
            self._make(len(slots))
        standing = [
            (slot.fed < len(slot.tokens), slot.left, not slot.request.ignore_eos) if slot is not None else (0, 0, 0)
            for slot in slots
        ]
        self.standing_3B.copy_(torch.tensor(standing, dtype=torch.long).T)
        self.cursor_1.fill_(self.window.cursor)
        self.step_1.zero_()
        columns = round_up_columns(self.window.cursor + n_steps)

        def step() -> None:
            self._step(columns, mask_BS, sampler, observer)

        replay, n_done = self._replays.get((columns, sampler)), 0
        if replay is None:
            step()  # the first one as it is, which warms up the device
            n_done = 1
            try:
                replay = self._replays[columns, sampler] = self.record(step)
            except RuntimeError as failure:
                if is_out_of_memory(failure):
                    raise
                self.broken = _words_of(failure)
                return self._outcome(n_done)
        for _ in range(n_steps - n_done):
            replay()
        return self._outcome(n_steps)

    def _outcome(self, n_steps: int) -> GraphRun:
        """The only look of the host at the device."""
        found_2BK = torch.stack([self.token_BK, self.bad_BK.long()])[..., :n_steps].cpu()
        sound = [row.index(1) if 1 in row else n_steps for row in found_2BK[1].tolist()]
        return GraphRun(found_2BK[0].tolist(), sound)

    def _step(self, columns: int, mask_BS: Tensor, sampler: Sampler, observer: PooledCapture | None) -> None:
        rows, (live_B, left_B, heeds_B) = self.rows, self.standing_3B
        seen_BS = mask_BS[:, :columns] & (self.arange_S[:columns] <= self.cursor_1)
        with self.window.recording(GraphCursor(self.cursor_1, columns)):
            logits_BV = self.read(seen_BS)
        token_B, bad_B = sampler.choose(logits_BV, rows.uniform(DRAW, 1)[:, 0] if sampler.draws else None)
        if observer is not None:
            observer.tally(rows.age_B, live_B.bool())
        self.token_BK.index_copy_(1, self.step_1, token_B.unsqueeze(1))
        self.bad_BK.index_copy_(1, self.step_1, bad_B.unsqueeze(1))
        stops_B = torch.isin(token_B, self.stop_ids) & heeds_B.bool()
        joins_B = live_B.bool() & ~stops_B & ~bad_B & (left_B > 0)
        live_B.copy_(joins_B)
        left_B.sub_(joins_B.long())
        rows.step(token_B.unsqueeze(1), rows.token_B1, 1)
        self.cursor_1.add_(1)
        self.step_1.add_(1)


def round_up_columns(columns: int) -> int:
    """So many columns, or a few more: of these, recordings are made."""
    return -(-columns // COLUMN_BUCKET) * COLUMN_BUCKET


def graph_recorder_for(lms: Sequence[LanguageModel]) -> Record | None:
    """What records the steps of these models, if they are on one device that can, and have been proven to allow it."""
    places = {lm.device for lm in lms}
    record = recorder_for(lms[0].device)
    if record is None or len(places) > 1 or any(lm.spread for lm in lms):
        return None
    return None if any(unsupported_reason(lm, record) for lm in lms) else record


def unsupported_reason(lm: LanguageModel, record: Record | None = None) -> str:
    """Why a model's steps are not recorded as a graph; empty where they are, or where nobody has tried.

    Proven once a model, given what records: a short text comes out the same, within rounding.
    """
    if record is not None and lm.model not in _refused:
        wanted_TV = decode_probe(lm)
        try:
            found_TV = _replayed(lm, record)
        except Exception as failure:  # an architecture may object in any way
            mark_unsupported(lm, _words_of(failure))
        else:
            error = float((found_TV - wanted_TV).abs().max() / wanted_TV.abs().max())
            differs = not error <= (1e-4 if lm.is_exact else 3e-2)
            mark_unsupported(lm, f"a replayed step differs by {error:.0e}" if differs else "")
    return _refused.get(lm.model, "")


def mark_unsupported(lm: LanguageModel, reason: str) -> None:
    """From now on this model's steps are not recorded; are, where there is no reason."""
    _refused[lm.model] = reason


def _words_of(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"


@torch.inference_mode()
def _replayed(lm: LanguageModel, record: Record) -> Tensor:
    """`decoded`, by one step that is recorded, and replayed at every later cursor.

    Many columns lie past the cursor: a model that counts a sliding window from the last of them can't be recorded.
    """
    text = ProbeText(lm, min(lm.max_positions or PROOF_COLUMNS, PROOF_COLUMNS))
    logits = [text.prefill()]
    logits_BV, ids_B1, position_B1 = (
        torch.empty_like(logits[0]),
        text.ids_BT[:, :1].clone(),
        text.position_BT[:, :1].clone(),
    )
    cursor_1 = torch.zeros(1, dtype=torch.long, device=lm.device)
    n_columns = text.cache.window.columns
    column_S = torch.arange(n_columns, device=lm.device)
    mask_BS = pad(text.mask_BT, (0, n_columns - text.n_tokens), value=True)

    def step() -> None:
        with text.cache.window.recording(GraphCursor(cursor_1, n_columns)):
            logits_BV.copy_(text.read(ids_B1, mask_BS & (column_S <= cursor_1), position_B1))

    replay: Callable[[], None] = step  # the first time as it is, which warms up the device
    for t in range(text.n_prompt, text.n_tokens):
        cursor_1.fill_(t)
        ids_B1.copy_(text.ids_BT[:, t : t + 1])
        position_B1.copy_(text.position_BT[:, t : t + 1])
        replay()
        logits.append(logits_BV.clone())
        replay = record(step) if replay is step else replay
    return torch.cat(logits).double()
