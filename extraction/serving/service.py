"""Requests between HTTP and the engine: build a row for each prompt, submit the rows, and wait for their events.

The rows of a request are cancelled when its client disconnects or its time is over.
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
from extraction.serving.batch_queue import Event, Failed, Finished, PendingRow, QueueName
from extraction.serving.engine_thread import EngineThread
from extraction.serving.errors import ClientDisconnected, HttpError
from extraction.serving.models import ServedModels
from extraction.serving.prompt_encoding import EncodedPrompt, PromptEncoder, PromptInput, copy_tokenizers
from extraction.serving.settings import MAX_ROWS, Settings

T = TypeVar("T")


@dataclass(frozen=True)
class RequestHandle:
    """Settings shared by all rows of one HTTP request.

    Args:
        max_new_tokens: None for as many as fit.
        field: Name of `max_new_tokens` in the request, for messages.
        copies: Rows for each prompt.
    """

    queue: QueueName
    sample: Sample
    max_new_tokens: int | None
    seed: int
    field: str = "max_new_tokens"
    alpha: float | None = None
    ignore_eos: bool = False
    stops: tuple[str, ...] = ()
    copies: int = 1


def seed_or_random(seed: int | None) -> int:
    """Return the seed, or a random one for None."""
    return secrets.randbits(48) if seed is None else seed


class RequestRows:
    """The submitted rows of one HTTP request, and their events. Created in the event loop; submits at once."""

    def __init__(
        self, service: Service, handle: RequestHandle, encoded: Sequence[EncodedPrompt], *, stream: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        self.handle, self.encoded = handle, encoded
        self.deadline = loop.time() + service.settings.timeout
        self._service = service
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def emitter(index: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the event loop has closed
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return emit

        prompts = [prompt for prompt in encoded for _ in range(handle.copies)]
        self.rows = [
            PendingRow(handle.queue, service.build_request(handle, prompt, index), emitter(index), stream)
            for index, prompt in enumerate(prompts)
        ]
        self._n_running = len(self.rows)
        service.engine.submit(self.rows)

    async def next_event(self) -> tuple[int, Event]:
        """Wait for the next event of any row. Raises HttpError 504 at the deadline."""
        try:
            async with asyncio.timeout_at(self.deadline):
                index, event = await self._events.get()
        except TimeoutError:
            message = f"not finished within {self._service.settings.timeout:g} s (--timeout); ask for fewer tokens"
            raise HttpError(504, message, code="timeout") from None
        self._n_running -= isinstance(event, Finished | Failed)
        return index, event

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events until all rows have ended."""
        while self._n_running:
            yield await self.next_event()

    async def results(self) -> list[Finished | HttpError]:
        """Wait for all rows. Returns the completion or error of each, in order."""
        results: dict[int, Finished | HttpError] = {}
        async for index, event in self.events():
            if isinstance(event, Finished):
                results[index] = event
            elif isinstance(event, Failed):
                results[index] = event.error
        return [results[index] for index in range(len(self.rows))]

    def cancel(self) -> None:
        """Cancel the rows that have not ended."""
        self._service.engine.cancel(self.rows)


class Service:
    """The models, the engine and the tokenizers, as the routes use them."""

    def __init__(self, models: ServedModels, settings: Settings, engine: EngineThread) -> None:
        self.models, self.settings, self.engine = models, settings, engine
        tokenizers = {kind: lm.tokenizer for kind, lm in models.by_kind.items()}
        self.prompt_encoder, self.tokenizers = PromptEncoder(tokenizers), copy_tokenizers(tokenizers)
        self.compatibility = models.pair_compatibility()  # computed before other threads use the tokenizers
        self._ids = itertools.count()

    def build_request(self, handle: RequestHandle, encoded: EncodedPrompt, index: int) -> Request:
        """Return the engine's request for a row. Row i draws with seed + i, and gives the same tokens alone."""
        return Request(
            id=f"{next(self._ids)}",
            token_ids=encoded.token_ids,
            max_new_tokens=self._max_new_tokens(handle, encoded),
            seed=handle.seed + index,
            draws=DRAWS,
            sample=handle.sample,
            alpha=handle.alpha,
            ignore_eos=handle.ignore_eos,
            stop_strings=handle.stops,
        )

    async def submit(
        self, handle: RequestHandle, prompts: Sequence[PromptInput], *, stream: bool = False
    ) -> RequestRows:
        """Encode the prompts and submit their rows. Raises HttpError."""
        if len(prompts) * handle.copies > MAX_ROWS:
            message = f"'n': {len(prompts)} prompts times {handle.copies} are more than {MAX_ROWS}; lower it"
            raise HttpError(422, message, param="n")
        if self.engine.state != "ready":
            raise self.engine.unavailable_error()
        encoded = await self.prompt_encoder.encode(handle.queue.kind, prompts)
        return RequestRows(self, handle, encoded, stream=stream)

    async def generate(
        self, http: HttpRequest, handle: RequestHandle, prompts: Sequence[PromptInput]
    ) -> tuple[RequestRows, list[Finished | HttpError]]:
        """Submit rows and wait for their results. Raises HttpError, ClientDisconnected."""
        rows = await self.submit(handle, prompts)
        try:
            return rows, await unless_disconnected(http, rows.results())
        finally:
            rows.cancel()

    def _max_new_tokens(self, handle: RequestHandle, encoded: EncodedPrompt) -> int:
        """Return the row's limit on new tokens. Raises HttpError 422 if it or the prompt is too long."""
        limit, most = self.models.max_total_tokens(handle.queue.kind, self.settings), self.settings.max_new_tokens
        n_prompt, n_new = len(encoded.token_ids), handle.max_new_tokens
        if n_new is not None and n_new > most:
            message = f"{handle.field!r}: {n_new} given; this server generates at most {most} (--max-new-tokens)"
            raise HttpError(422, message, param=handle.field, code="token_limit")
        if n_prompt + (n_new or 1) > limit:
            message = (
                f"{encoded.field!r}: {n_prompt} prompt tokens and {n_new or 1} new ones are more than {limit}; shorten "
                f"the prompt or lower {handle.field!r}"
            )
            raise HttpError(422, message, param=encoded.field, code="context_length_exceeded")
        return n_new if n_new is not None else min(most, limit - n_prompt)


async def unless_disconnected(http: HttpRequest, work: Awaitable[T]) -> T:
    """Return the result of `work`. Raises ClientDisconnected if the client closes its connection first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def raise_first_error(results: Sequence[Finished | HttpError]) -> list[Finished]:
    """Return the completions of all rows. Raises the first row's error, if any failed."""
    for result in results:
        if isinstance(result, HttpError):
            raise result
    return [result for result in results if isinstance(result, Finished)]
