"""One row (prompt) of a request on its way through the engine, and the events that it emits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from extraction.serving.errors import HttpError

if TYPE_CHECKING:
    from extraction.engine.requests import Completion, Request


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a row whose response is streamed."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """A row's completion. Seconds count from its acceptance; `first_seconds` is None if it has no tokens."""

    completion: Completion
    seconds: float
    first_seconds: float | None


@dataclass(frozen=True)
class Failed:
    """A row that ended without a completion."""

    error: HttpError


Event = NewTokens | Finished | Failed


class QueueName(NamedTuple):
    """Rows of one kind of generation and one speculation depth (0: none) share a queue and a batch."""

    kind: str
    depth: int = 0


@dataclass(eq=False)
class PendingRow:
    """One prompt that waits or runs. The engine's thread calls `emit` with each event.

    When a batch runs out of memory, its rows start again. A row's tokens depend on its request alone, so the same ones
    are generated again; `n_emitted` counts those that have been emitted, so that none is emitted twice.
    """

    queue: QueueName
    request: Request
    emit: Callable[[Event], None]
    stream: bool = False
    accepted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    n_generated: int = 0
    n_emitted: int = 0

    @property
    def id(self) -> str:
        """Id of the engine's request."""
        return self.request.id

    def restart(self) -> None:
        """Reset the token count: the row's tokens are generated again from the first."""
        self.n_generated = 0

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens; if the response is streamed, emit those not emitted before."""
        if token_ids and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        new_ids = tuple(token_ids[max(0, self.n_emitted - self.n_generated) :])
        self.n_generated += len(token_ids)
        self.n_emitted += len(new_ids)
        if new_ids and self.stream:
            self.emit(NewTokens(new_ids))

    def end_event(self, completion: Completion) -> Event:
        """Return the row's last event: its completion, or the error if its logits were not finite."""
        if completion.fault is not None:
            return Failed(HttpError(500, str(completion.fault), code="not_finite"))
        first_seconds = None if self.first_token_at is None else self.first_token_at - self.accepted_at
        return Finished(completion, time.perf_counter() - self.accepted_at, first_seconds)
