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
from extraction.serving.batch_queue import Failed, Finished, NewTokens, QueueName
from extraction.serving.errors import HttpError, unknown_value
from extraction.serving.models import PLAIN
from extraction.serving.prompt_encoding import ChatPrompt, PromptInput, TextPrompt, TokenPrompt
from extraction.serving.schemas import ChatCompletions, Completions
from extraction.serving.service import RequestHandle, RequestRows, Service, raise_first_error, seed_or_random
from extraction.serving.streaming import IncrementalDecoder, IndexedEvents, JsonReply, decode, stream_chunks

Json = dict[str, Any]


@dataclass(frozen=True)
class ResponseFormat:
    """The differences between the responses of the two endpoints.

    Args:
        id_prefix: Of the response's id.
        object: Value of "object" in a whole response.
        chunk_object: The same in a chunk of a stream.
        message: Makes a choice's text field.
        delta: Makes a chunk's text field, of a piece of text and whether it is the first chunk.
        starts_empty: True if a stream starts with a chunk without text.
    """

    id_prefix: str
    object: str
    chunk_object: str
    message: Callable[[str], Json]
    delta: Callable[[str, bool], Json]
    starts_empty: bool


TEXT = ResponseFormat(
    id_prefix="cmpl",
    object="text_completion",
    chunk_object="text_completion",
    message=lambda text: {"text": text},
    delta=lambda text, first: {"text": text},
    starts_empty=False,
)
CHAT = ResponseFormat(
    id_prefix="chatcmpl",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    message=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text, first: {
        "delta": {"role": "assistant", "content": ""} if first else {"content": text} if text else {}
    },
    starts_empty=True,
)


def make_router(service: Service) -> APIRouter:
    """Return the endpoints under /v1."""
    router = APIRouter(prefix="/v1", default_response_class=JsonReply)
    started = int(time.time())

    def list_models() -> list[Json]:
        name = service.models.names.get("model")
        return [{"id": name, "object": "model", "created": started, "owned_by": "traitline"}] if name else []

    def require_model(name: str) -> Json:
        models = {model["id"]: model for model in list_models()}
        if name not in models:
            raise unknown_value(name, models, "a model that is served here", "model", 404)
        return models[name]

    @router.get("/models")
    async def models() -> Any:
        return JsonReply({"object": "list", "data": list_models()})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Any:
        return JsonReply(require_model(name))

    @router.post("/completions")
    async def completions(body: Completions, http: HttpRequest) -> Any:
        """Continue texts as they are, without a chat template."""
        require_model(body.model)
        fields = [f"prompt.{i}" for i in range(len(body.prompt))] if len(body.prompt) > 1 else ["prompt"]
        prompts: list[PromptInput] = [
            TextPrompt(field, prompt, chat=False, literal=body.literal)
            if isinstance(prompt, str)
            else TokenPrompt(field, tuple(prompt))
            for field, prompt in zip(fields, body.prompt, strict=True)
        ]
        handle = _make_handle(body, body.max_tokens or 16, "max_tokens")
        return await _generate(service, http, TEXT, body, handle, prompts)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatCompletions, http: HttpRequest) -> Any:
        require_model(body.model)
        roles = {"developer": "system"}
        messages = tuple((roles.get(message.role, message.role), message.content) for message in body.messages)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        handle = _make_handle(body, body.max_completion_tokens or body.max_tokens, field)
        return await _generate(service, http, CHAT, body, handle, [ChatPrompt("messages", messages)])

    return router


def _make_handle(body: Completions | ChatCompletions, max_new_tokens: int | None, field: str) -> RequestHandle:
    return RequestHandle(
        queue=QueueName(PLAIN),
        sample=Sample.of(body),
        max_new_tokens=max_new_tokens,
        seed=seed_or_random(body.seed),
        field=field,
        ignore_eos=body.ignore_eos,
        stops=tuple(body.stop),
        copies=body.n or 1,
    )


async def _generate(
    service: Service,
    http: HttpRequest,
    form: ResponseFormat,
    body: Completions | ChatCompletions,
    handle: RequestHandle,
    prompts: Sequence[PromptInput],
) -> Response:
    head = {"id": f"{form.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        rows = await service.submit(handle, prompts, stream=True)
        chunk = {**head, "object": form.chunk_object}
        return await stream_chunks(http, rows, lambda events: _chunks(service, rows, form, chunk, events, with_usage))
    if body.stream_options is not None:
        raise HttpError(422, "'stream_options': given without 'stream': true; leave it out", param="stream_options")
    rows, ends = await service.generate(http, handle, prompts)
    finished = raise_first_error(ends)
    texts = [decode(service.tokenizers[PLAIN], end.completion.token_ids, handle.stops) for end in finished]
    choices = [
        _choice(i, end.completion.finish_reason, form.message(text))
        for i, (end, text) in enumerate(zip(finished, texts, strict=True))
    ]
    return JsonReply({**head, "object": form.object, "choices": choices, "usage": _usage(rows, finished)})


async def _chunks(
    service: Service, rows: RequestRows, form: ResponseFormat, head: Json, events: IndexedEvents, with_usage: bool
) -> AsyncIterator[Json]:
    """Yield a chunk for each piece of text, one for each choice's finish reason, and one with the usage if asked."""
    texts = [IncrementalDecoder(service.tokenizers[PLAIN], rows.handle.stops) for _ in rows.rows]
    tail: Json = {"usage": None} if with_usage else {}
    finished: list[Finished] = []

    def chunk(index: int, reason: str | None, delta: Json) -> Json:
        return {**head, "choices": [_choice(index, reason, delta)], **tail}

    for index in range(len(texts) if form.starts_empty else 0):
        yield chunk(index, None, form.delta("", True))
    async for index, event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, NewTokens):
            piece = texts[index].add(event.token_ids)
        else:
            piece = texts[index].finish(event.completion.token_ids)
        if piece:
            yield chunk(index, None, form.delta(piece, False))
        if isinstance(event, Finished):
            finished.append(event)
            yield chunk(index, event.completion.finish_reason, form.delta("", False))
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(rows, finished)}


def _choice(index: int, reason: str | None, text: Json) -> Json:
    openai_reason = None if reason is None else "length" if reason == "length" else "stop"
    return {"index": index, **text, "logprobs": None, "finish_reason": openai_reason}


def _usage(rows: RequestRows, finished: Sequence[Finished]) -> Json:
    n_prompt = sum(len(prompt.token_ids) for prompt in rows.encoded)
    n_new = sum(len(end.completion.token_ids) for end in finished)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
