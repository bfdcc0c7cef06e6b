"""A row: one prompt's way through the engine, and what is told of it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from extraction.serving.errors import HttpError

if TYPE_CHECKING:
    from extraction.engine.requests import Completion, Request


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a row that streams."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """A row's end. Seconds count from when the row was accepted; the first token's are None where there was none."""

    completion: Completion
    seconds: float
    first_seconds: float | None


@dataclass(frozen=True)
class Failed:
    """A row that has no answer, and why."""

    error: HttpError


Event = NewTokens | Finished | Failed
QueueName = tuple[str, int]  # a kind, and how many tokens it proposes (0: none)


@dataclass(eq=False)
class PendingRow:
    """One prompt in the engine. `tell` hears each event, and is called by the engine's thread.

    A batch that ran out of memory is made again, and with it the row's tokens: the same ones, since they are a
    function of the request alone. `told` counts those that were told, so that nobody hears them twice.
    """

    lane: QueueName
    request: Request
    tell: Callable[[Event], None]
    streams: bool = False
    accepted: float = field(default_factory=time.perf_counter)
    first: float | None = None
    made: int = 0
    told: int = 0

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    def restart(self) -> None:
        """Its tokens will be made from the first again."""
        self.made = 0

    def hear(self, token_ids: Sequence[int]) -> None:
        """So many more tokens were made; tell those that are news."""
        if token_ids and self.first is None:
            self.first = time.perf_counter()
        news = tuple(token_ids[max(0, self.told - self.made) :])
        self.made += len(token_ids)
        self.told += len(news)
        if news and self.streams:
            self.tell(NewTokens(news))

    def finished(self, completion: Completion) -> Event:
        """What to tell at the end."""
        if completion.fault is not None:
            return Failed(HttpError(500, str(completion.fault), code="not_finite"))
        first = None if self.first is None else self.first - self.accepted
        return Finished(completion, time.perf_counter() - self.accepted, first)
