"""The front desk: checks what a request asks for, hands its rows to the engine, and waits for what comes back.

A client that leaves takes its rows with it, and so does a request whose time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from extraction.amplification.lda import DRAWS
from extraction.engine.requests import Request
from extraction.engine.sampler import Sample
from extraction.serving.engine_thread import EngineThread
from extraction.serving.errors import HttpError
from extraction.serving.events import Event, Failed, Finished, PendingRow, QueueName
from extraction.serving.models import ServedModels
from extraction.serving.prompt_encoding import Asked, Encoded, PromptEncoder, copies
from extraction.serving.settings import MAX_ROWS, Settings

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class RequestHandle:
    """What all rows of one HTTP request share. `max_new_tokens` None: as many as fit; `field`: where it stands."""

    lane: QueueName
    sample: Sample
    max_new_tokens: int | None
    seed: int
    field: str = "max_new_tokens"
    alpha: float | None = None
    ignore_eos: bool = False
    stops: tuple[str, ...] = ()
    copies: int = 1


def seed_or_any(seed: int | None) -> int:
    """The seed given, or a fresh one."""
    return secrets.randbits(48) if seed is None else seed


class RequestRows:
    """The rows of one HTTP request on their way, and their events as they come."""

    def __init__(self, desk: Service, order: RequestHandle, encoded: Sequence[Encoded], *, streams: bool) -> None:
        loop = asyncio.get_running_loop()
        self.order, self.encoded, self.desk = order, encoded, desk
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.ends_at = loop.time() + desk.settings.timeout
        prompts = [each for each in encoded for _ in range(order.copies)]

        def teller(index: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return tell

        self.rows = [
            PendingRow(order.lane, desk.request(order, each, index), teller(index), streams)
            for index, each in enumerate(prompts)
        ]
        self.left = len(self.rows)
        desk.scheduler.submit(self.rows)

    async def next(self) -> tuple[int, Event]:
        """The next event of any row. Raises Refused when the request's time is over."""
        try:
            async with asyncio.timeout_at(self.ends_at):
                index, event = await self.events.get()
        except TimeoutError:
            said = f"not done after {self.desk.settings.timeout:g} s; ask for fewer tokens, or start it with --timeout"
            raise HttpError(504, said, code="timeout") from None
        self.left -= isinstance(event, Finished | Failed)
        return index, event

    async def all(self) -> AsyncIterator[tuple[int, Event]]:
        """Every event until all rows have ended."""
        while self.left:
            yield await self.next()

    async def ends(self) -> list[Finished | HttpError]:
        """How each row ended, in order."""
        found: dict[int, Finished | HttpError] = {}
        async for index, event in self.all():
            if isinstance(event, Finished):
                found[index] = event
            elif isinstance(event, Failed):
                found[index] = event.error
        return [found[index] for index in range(len(self.rows))]

    def close(self) -> None:
        """Take back what has not ended."""
        self.desk.scheduler.cancel(self.rows)


class Service:
    """Everything that an endpoint needs."""

    def __init__(self, served: ServedModels, settings: Settings, scheduler: EngineThread) -> None:
        self.served, self.settings, self.scheduler = served, settings, scheduler
        tokenizers = {kind: lm.tokenizer for kind, lm in served.models.items()}
        self.prompter, self.decoders = PromptEncoder(tokenizers), copies(tokenizers)
        self.compatibility = served.compatibility()  # asked once, while nobody else uses the tokenizers
        self._numbers = itertools.count()

    def request(self, order: RequestHandle, encoded: Encoded, index: int) -> Request:
        """One row for the engine. Row i has the seed plus i, with which it can be had again alone."""
        return Request(
            id=f"{next(self._numbers)}",
            token_ids=encoded.token_ids,
            max_new_tokens=self._budget(order, encoded),
            seed=order.seed + index,
            draws=DRAWS,
            sample=order.sample,
            alpha=order.alpha,
            ignore_eos=order.ignore_eos,
            stop_strings=order.stops,
        )

    async def accept(self, order: RequestHandle, asked: Sequence[Asked], *, streams: bool = False) -> RequestRows:
        """Encode the prompts and hand in their rows. Raises Refused."""
        if len(asked) * order.copies > MAX_ROWS:
            said = f"'n': {len(asked)} prompts times {order.copies} are more than {MAX_ROWS}; ask for less at a time"
            raise HttpError(422, said, param="n")
        if self.scheduler.state != "ready":
            raise self.scheduler.refusal()
        return RequestRows(self, order, await self.prompter.encode(order.lane[0], asked), streams=streams)

    async def answer(
        self, http: HttpRequest, order: RequestHandle, asked: Sequence[Asked]
    ) -> tuple[RequestRows, list[Finished | HttpError]]:
        """How every row ended. Raises Refused, ClientGone."""
        rows = await self.accept(order, asked)
        try:
            return rows, await unless_gone(http, rows.ends())
        finally:
            rows.close()

    def _budget(self, order: RequestHandle, encoded: Encoded) -> int:
        """How many tokens may come. Raises Refused where prompt and answer don't fit."""
        limit, most = self.served.longest(order.lane[0], self.settings), self.settings.max_new_tokens
        n_prompt, asked = len(encoded.token_ids), order.max_new_tokens
        if asked is not None and asked > most:
            said = f"{order.field!r}: {asked} given; this server makes at most {most} new tokens (--max-new-tokens)"
            raise HttpError(422, said, param=order.field, code="token_limit")
        if n_prompt + (asked or 1) > limit:
            said = (
                f"{encoded.field!r}: {n_prompt} prompt tokens and {asked or 1} new ones are more than {limit}; shorten "
                f"the prompt or lower {order.field!r}"
            )
            raise HttpError(422, said, param=encoded.field, code="context_length_exceeded")
        return asked if asked is not None else min(most, limit - n_prompt)


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """The work's result, unless the client leaves first. Raises ClientGone."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def outcome(ends: Sequence[Finished | HttpError]) -> list[Finished]:
    """All rows' ends, where all were good. Raises the first that was not."""
    for end in ends:
        if isinstance(end, HttpError):
            raise end
    return [end for end in ends if isinstance(end, Finished)]
