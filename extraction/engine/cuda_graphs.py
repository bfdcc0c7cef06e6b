"""CUDA graphs: capture one decode step and replay it several times between host synchronisations.

Everything that a step reads or writes lies in buffers at fixed addresses, the cursor among them, so that one graph
serves every step with the same rows and columns. Rows that end within a run are tracked on the device; tokens after
their end are dropped. The host reads the tokens once a run.

Shapes: B slots, K steps of a run, S columns of the window, V vocabulary.
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
from extraction.model.decode_probe import ProbeText, decode_probe
from extraction.model.devices import Record, recorder_for
from extraction.model.kv_cache import CacheWindow, GraphCursor
from extraction.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from extraction.activations.pooled import PooledCapture
    from extraction.engine.sequence import RunningSequence
    from extraction.model.language_model import LanguageModel

STEPS_PER_RUN = 4  # a row that ends idles for half of them on average; the host's read costs a share of each
COLUMN_BUCKET = 128  # a captured step attends to a multiple of these: fewer graphs against columns read in vain
PROOF_COLUMNS = 1024
_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # reason against capturing a model; "": none

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphRun:
    """Result of a run: each row's tokens, and how many of them precede the first non-finite logits."""

    tokens: list[list[int]]
    n_valid: list[int]

    @property
    def n_steps(self) -> int:
        """Number of steps; fewer than requested if no graph could be captured."""
        return len(self.tokens[0])


class CudaGraphRunner:
    """Captured steps of a batch. `read`: one pass over the rows' newest tokens, attention mask -> logits [B, V]."""

    def __init__(
        self, rows: RowBuffers, window: CacheWindow, record: Record, read: Read, stop_ids: Iterable[int]
    ) -> None:
        self.rows, self.window, self.record, self.read = rows, window, record, read
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=rows.device)
        self.arange_S = torch.arange(window.columns, device=rows.device)
        self.cursor_1, self.step_1 = (torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(2))
        self.broken = ""  # reason that a step could not be captured
        self._replays: dict[tuple[int, Sampler], Callable[[], None]] = {}
        self._allocate(0)

    def _allocate(self, n_slots: int) -> None:
        device = self.rows.device
        self.token_BK = torch.zeros(n_slots, STEPS_PER_RUN, dtype=torch.long, device=device)
        self.bad_BK = torch.zeros(n_slots, STEPS_PER_RUN, dtype=torch.bool, device=device)
        # live: the newest token is part of the response; left: tokens that may still join; heeds: stop tokens end it
        self.status_3B = torch.zeros(3, n_slots, dtype=torch.long, device=device)

    def forget(self) -> None:
        """Drop all graphs: the rows' buffers have moved."""
        self._replays.clear()

    def must_roll(self, n_steps: int) -> bool:
        """Return True if the window has no room for these steps, or a bucket of columns that no row needs."""
        window = self.window
        return window.cursor + n_steps > window.columns or round_up_columns(window.start + 1) > round_up_columns(1)

    @staticmethod
    def enough_free(n_slots: int) -> int:
        """Number of free slots that a prefill waits for. It is not captured, so its host time is worth many steps.

        A row costs prefill / free + tokens * step * (1 + free / 2 slots) / slots; if a prefill takes as long as a dozen
        steps and responses have 60 tokens, that is least where about half of the slots are free.
        """
        return n_slots // 2 + 1

    @staticmethod
    def can_record(sampler: Sampler) -> bool:
        """Return True if one Sample serves all rows; with one for each row, a step depends on which rows run."""
        return isinstance(sampler, Sample)

    def run(
        self,
        n_steps: int,
        slots: Sequence[RunningSequence | None],
        mask_BS: Tensor,
        sampler: Sampler,
        observer: PooledCapture | None,
    ) -> GraphRun:
        """Run `n_steps` steps of every row. The caller moves the cursor."""
        if len(slots) != self.status_3B.shape[1]:
            self._allocate(len(slots))
        status = [
            (slot.n_fed < len(slot.tokens), slot.n_left, not slot.request.ignore_eos) if slot is not None else (0, 0, 0)
            for slot in slots
        ]
        self.status_3B.copy_(torch.tensor(status, dtype=torch.long).T)
        self.cursor_1.fill_(self.window.cursor)
        self.step_1.zero_()
        columns = round_up_columns(self.window.cursor + n_steps)

        def step() -> None:
            self._step(columns, mask_BS, sampler, observer)

        replay, n_done = self._replays.get((columns, sampler)), 0
        if replay is None:
            step()  # the first one eagerly, which warms up the device
            n_done = 1
            try:
                replay = self._replays[columns, sampler] = self.record(step)
            except RuntimeError as failure:
                if is_out_of_memory(failure):
                    raise
                self.broken = _describe(failure)
                return self._outcome(n_done)
        for _ in range(n_steps - n_done):
            replay()
        return self._outcome(n_steps)

    def _outcome(self, n_steps: int) -> GraphRun:
        """Read the tokens: the run's only host synchronisation."""
        result_2BK = torch.stack([self.token_BK, self.bad_BK.long()])[..., :n_steps].cpu()
        n_valid = [row.index(1) if 1 in row else n_steps for row in result_2BK[1].tolist()]
        return GraphRun(result_2BK[0].tolist(), n_valid)

    def _step(self, columns: int, mask_BS: Tensor, sampler: Sampler, observer: PooledCapture | None) -> None:
        rows, (live_B, left_B, heeds_B) = self.rows, self.status_3B
        seen_BS = mask_BS[:, :columns] & (self.arange_S[:columns] <= self.cursor_1)
        with self.window.recording(GraphCursor(self.cursor_1, columns)):
            logits_BV = self.read(seen_BS)
        token_B, bad_B = sampler.choose(logits_BV, rows.uniform(DRAW, 1)[:, 0] if sampler.draws else None)
        if observer is not None:
            observer.accumulate(rows.age_B, live_B.bool())
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
    """Round a number of columns up to the bucket that graphs are captured for."""
    return -(-columns // COLUMN_BUCKET) * COLUMN_BUCKET


def graph_recorder_for(lms: Sequence[LanguageModel]) -> Record | None:
    """Return the device's graph recorder if these models share one device and passed the proof; else None."""
    places = {lm.device for lm in lms}
    record = recorder_for(lms[0].device)
    if record is None or len(places) > 1 or any(lm.spread for lm in lms):
        return None
    return None if any(unsupported_reason(lm, record) for lm in lms) else record


def unsupported_reason(lm: LanguageModel, record: Record | None = None) -> str:
    """Return the reason that a model's steps can't be captured; empty if they can, or if it was not tried.

    With a recorder, the proof runs once per model: a short text gives the same logits, within rounding.
    """
    if record is not None and lm.model not in _reasons:
        wanted_TV = decode_probe(lm)
        try:
            found_TV = _replayed(lm, record)
        except Exception as failure:  # an architecture may object in any way
            mark_unsupported(lm, _describe(failure))
        else:
            error = float((found_TV - wanted_TV).abs().max() / wanted_TV.abs().max())
            differs = not error <= (1e-4 if lm.is_exact else 3e-2)
            mark_unsupported(lm, f"a replayed step differs by {error:.0e}" if differs else "")
    return _reasons.get(lm.model, "")


def mark_unsupported(lm: LanguageModel, reason: str) -> None:
    """Record the reason that a model's steps can't be captured; an empty one allows it."""
    _reasons[lm.model] = reason


def _describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"


@torch.inference_mode()
def _replayed(lm: LanguageModel, record: Record) -> Tensor:
    """Decode the probe text by one captured step, replayed at every later cursor: logits [T, V].

    Many columns lie past the cursor: a model that counts a sliding window from the last column can't be captured.
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

    replay: Callable[[], None] = step  # the first time eagerly, which warms up the device
    for t in range(text.n_prompt, text.n_tokens):
        cursor_1.fill_(t)
        ids_B1.copy_(text.ids_BT[:, t : t + 1])
        position_B1.copy_(text.position_BT[:, t : t + 1])
        replay()
        logits.append(logits_BV.clone())
        replay = record(step) if replay is step else replay
    return torch.cat(logits).double()
