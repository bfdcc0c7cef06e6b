"""OpenAI's completions and chat completions, for plain generation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from extraction.engine.sampler import Sample
from extraction.serving.detokenizer import Stream, text_of
from extraction.serving.errors import HttpError, unknown
from extraction.serving.events import Failed, Finished, NewTokens
from extraction.serving.models import PLAIN
from extraction.serving.openai_schemas import ChatCompletions, Completions
from extraction.serving.prompt_encoding import Asked, Conversation, Ids, Raw
from extraction.serving.service import RequestHandle, RequestRows, Service, outcome, seed_or_any
from extraction.serving.streaming import Events, Reply, stream

REASONS = {"length": "length"}  # all others are `stop`

Said = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What differs between the two endpoints: names, and how a choice holds its text."""

    prefix: str
    whole: str
    chunk: str
    message: Callable[[str], Said]
    delta: Callable[[str, bool], Said]
    opens: bool  # whether a stream starts with a chunk that has no text


TEXT = Form(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text, first: {"text": text}, False
)
CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text, first: {"delta": {"role": "assistant", "content": ""} if first else {"content": text} if text else {}},
    True,
)


def routes(desk: Service) -> APIRouter:
    """The endpoints, at this desk."""
    router = APIRouter(prefix="/v1", default_response_class=Reply)
    started = int(time.time())

    def served() -> list[Said]:
        name = desk.served.names.get("model")
        return [{"id": name, "object": "model", "created": started, "owned_by": "traitline"}] if name else []

    def known(name: str) -> Said:
        found = {each["id"]: each for each in served()}
        if name not in found:
            raise unknown(name, found, "a model that is served here", "model", 404)
        return found[name]

    @router.get("/models")
    async def models() -> Any:
        return Reply({"object": "list", "data": served()})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Any:
        return Reply(known(name))

    @router.post("/completions")
    async def completions(body: Completions, http: HttpRequest) -> Any:
        known(body.model)
        several = len(body.prompt) > 1
        asked: list[Asked] = [
            Raw(f"prompt.{i}" if several else "prompt", each, chat=False)
            if isinstance(each, str)
            else Ids(f"prompt.{i}" if several else "prompt", tuple(each))
            for i, each in enumerate(body.prompt)
        ]
        return await _answer(desk, http, TEXT, body, _order(body, body.max_tokens or 16, "max_tokens"), asked)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatCompletions, http: HttpRequest) -> Any:
        known(body.model)
        roles = {"developer": "system"}
        turns = tuple((roles.get(each.role, each.role), each.content) for each in body.messages)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        order = _order(body, body.max_completion_tokens or body.max_tokens, field)
        return await _answer(desk, http, CHAT, body, order, [Conversation("messages", turns)])

    return router


def _order(body: Completions | ChatCompletions, budget: int | None, field: str) -> RequestHandle:
    return RequestHandle(
        lane=(PLAIN, 0),
        sample=Sample.of(body),
        max_new_tokens=budget,
        seed=seed_or_any(body.seed),
        field=field,
        ignore_eos=body.ignore_eos,
        stops=tuple(body.stop),
        copies=body.n or 1,
    )


async def _answer(
    desk: Service,
    http: HttpRequest,
    form: Form,
    body: Completions | ChatCompletions,
    order: RequestHandle,
    asked: Sequence[Asked],
) -> Response:
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        rows = await desk.accept(order, asked, streams=True)
        chunk = {**head, "object": form.chunk}
        return await stream(http, rows, lambda events: _chunks(desk, rows, form, chunk, events, with_usage))
    if body.stream_options is not None:
        raise HttpError(422, "'stream_options': given without 'stream': true; leave it out", param="stream_options")
    rows, ends = await desk.answer(http, order, asked)
    found = outcome(ends)
    choices = [
        _choice(i, end.completion.finish_reason, form.message(_text(desk, order, end))) for i, end in enumerate(found)
    ]
    return Reply({**head, "object": form.whole, "choices": choices, "usage": _usage(rows, found)})


async def _chunks(
    desk: Service, rows: RequestRows, form: Form, head: Said, events: Events, with_usage: bool
) -> AsyncIterator[Said]:
    """A chunk a piece of text, one for each choice's end, and one with the usage where it was asked for."""
    texts = [Stream(desk.decoders[PLAIN], rows.order.stops) for _ in rows.rows]
    tail: Said = {"usage": None} if with_usage else {}
    found: dict[int, Finished] = {}
    for index in range(len(texts) if form.opens else 0):
        yield {**head, "choices": [_choice(index, None, form.delta("", True))], **tail}
    async for index, event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, NewTokens):
            piece = texts[index].add(event.token_ids)
        else:
            found[index] = event
            piece = texts[index].end(event.completion.token_ids)
        if piece:
            yield {**head, "choices": [_choice(index, None, form.delta(piece, False))], **tail}
        if isinstance(event, Finished):
            yield {**head, "choices": [_choice(index, event.completion.finish_reason, form.delta("", False))], **tail}
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(rows, list(found.values()))}


def _choice(index: int, reason: str | None, text: Said) -> Said:
    told = None if reason is None else REASONS.get(reason, "stop")
    return {"index": index, **text, "logprobs": None, "finish_reason": told}


def _text(desk: Service, order: RequestHandle, end: Finished) -> str:
    return text_of(desk.decoders[PLAIN], end.completion.token_ids, order.stops)


def _usage(rows: RequestRows, found: Sequence[Finished]) -> Said:
    n_prompt = sum(len(each.token_ids) for each in rows.encoded)
    n_new = sum(len(end.completion.token_ids) for end in found)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
