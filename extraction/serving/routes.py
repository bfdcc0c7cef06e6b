"""Traitline's own endpoints: plain, amplified and speculative generation.

To add an endpoint, add its request body to `schemas.py`, and to `make_router` a function that builds a RequestHandle
with `_make_handle`, awaits `service.generate`, and returns a JsonReply. Validation, limits, tokens, metrics and errors
need no change. Describe it in docs/server.md. A new kind of generation (another decoding strategy) is added in
`models.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from extraction.engine.requests import SpeculationStats
from extraction.engine.sampler import Sample
from extraction.serving.batch_queue import Failed, Finished, NewTokens, QueueName
from extraction.serving.errors import HttpError
from extraction.serving.models import AMPLIFY, PLAIN, SPECULATE
from extraction.serving.prompt_encoding import EncodedPrompt, TextPrompt
from extraction.serving.schemas import Formatting, Generate, GenerateBatch, GenerateLda, GenerateLdaBatch, Sampling
from extraction.serving.service import RequestHandle, RequestRows, Service, raise_first_error, seed_or_random
from extraction.serving.streaming import IncrementalDecoder, IndexedEvents, JsonReply, decode, stream_chunks

Json = dict[str, Any]

STOPPED = ("stop", "stop_string")  # finish reasons of a response that the model or a stop string ended


def make_router(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(default_response_class=JsonReply)

    @router.post("/generate")
    async def generate(body: Generate, http: HttpRequest) -> Any:
        return await _generate_one(service, http, _make_handle(service, PLAIN, body, body.max_new_tokens), body)

    @router.post("/generate_lda")
    async def generate_lda(body: GenerateLda, http: HttpRequest) -> Any:
        handle = _make_handle(service, AMPLIFY, body, body.max_new_tokens, alpha=body.alpha)
        return await _generate_one(service, http, handle, body)

    @router.post("/generate_lda_batch")
    async def generate_lda_batch(body: GenerateLdaBatch, http: HttpRequest) -> Any:
        handle = _make_handle(service, AMPLIFY, body, body.max_new_tokens, alpha=body.alpha)
        rows, ends = await service.generate(http, handle, _text_prompts(service, handle, body))
        results = [_result(service, rows, i, end) for i, end in enumerate(ends)]
        content = {"results": results, **_request_fields(service, handle), "batch_size": len(results)}
        return JsonReply(content, _status(ends))

    @router.post("/generate/batch")
    async def generate_batch(body: GenerateBatch, http: HttpRequest) -> Any:
        """Generate responses to several prompts, with speculation where the server has a draft model."""
        depth = body.speculation_depth or service.settings.depth
        handle = _make_handle(service, SPECULATE, body, body.max_tokens, field="max_tokens", depth=depth)
        started = time.perf_counter()
        rows, ends = await service.generate(http, handle, _text_prompts(service, handle, body))
        results = [_speculative_result(service, rows, i, end) for i, end in enumerate(ends)]
        content = {
            "results": results,
            **_request_fields(service, handle),
            "batch_size": len(results),
            "speculation_depth": depth,
            "time_seconds": round(time.perf_counter() - started, 6),
        }
        return JsonReply(content, _status(ends))

    @router.get("/tokenizer_compatibility")
    async def tokenizer_compatibility() -> Any:
        service.models.for_kind(AMPLIFY)
        return JsonReply(service.compatibility)

    return router


# --- requests -------------------------------------------------------------------------------------------------------


def _make_handle(
    service: Service,
    kind: str,
    body: Sampling,
    max_new_tokens: int,
    *,
    field: str = "max_new_tokens",
    alpha: float | None = None,
    depth: int = 0,
) -> RequestHandle:
    service.models.for_kind(kind)
    return RequestHandle(
        queue=QueueName(kind, depth),
        sample=Sample.of(body),
        max_new_tokens=max_new_tokens,
        seed=seed_or_random(body.seed),
        field=field,
        alpha=alpha,
        ignore_eos=body.ignore_eos,
        stops=tuple(body.stop),
    )


def _text_prompts(service: Service, handle: RequestHandle, body: GenerateLdaBatch | GenerateBatch) -> list[TextPrompt]:
    return [_text_prompt(service, handle, body, f"prompts.{i}", prompt) for i, prompt in enumerate(body.prompts)]


def _text_prompt(service: Service, handle: RequestHandle, body: Formatting, field: str, prompt: str) -> TextPrompt:
    default = False if handle.queue.kind in service.models.raw else None
    chat = default if body.apply_chat_template is None else body.apply_chat_template
    return TextPrompt(field, prompt, body.system_prompt, chat, body.literal)


async def _generate_one(service: Service, http: HttpRequest, handle: RequestHandle, body: Generate) -> Response:
    prompts = [_text_prompt(service, handle, body, "prompt", body.prompt)]
    if not body.stream:
        rows, ends = await service.generate(http, handle, prompts)
        (end,) = raise_first_error(ends)
        return JsonReply({**_result(service, rows, 0, end), **_request_fields(service, handle)})
    rows = await service.submit(handle, prompts, stream=True)
    return await stream_chunks(http, rows, lambda events: _chunks(service, rows, events))


# --- responses ------------------------------------------------------------------------------------------------------


async def _chunks(service: Service, rows: RequestRows, events: IndexedEvents) -> AsyncIterator[Json]:
    """Yield pieces of the text, and last the response as it is without streaming."""
    handle = rows.handle
    text = IncrementalDecoder(service.tokenizers[handle.queue.kind], handle.stops)
    async for _, event in events:
        if isinstance(event, Failed):
            raise event.error
        piece = text.add(event.token_ids) if isinstance(event, NewTokens) else text.finish(event.completion.token_ids)
        if piece:
            yield {"text": piece, "tokens_generated": len(text.token_ids), "done": False}
        if isinstance(event, Finished):
            yield {**_result(service, rows, 0, event), **_request_fields(service, handle), "done": True}


def _request_fields(service: Service, handle: RequestHandle) -> Json:
    """Return the fields of a response that all its rows share."""
    names = service.models.names
    fields: dict[str, Json] = {
        PLAIN: {"model": names["model"]},
        AMPLIFY: {"alpha": handle.alpha, "model_after": names["after"], "model_before": names["before"]},
        SPECULATE: {"model": names["model"], "draft": names["draft"]},
    }
    return fields[handle.queue.kind]


def _result(service: Service, rows: RequestRows, index: int, end: Finished | HttpError) -> Json:
    """Return one row's fields: its response, or its prompt and error."""
    handle, encoded = rows.handle, rows.encoded[index]
    if isinstance(end, HttpError):
        return _error_result(encoded, end)
    completion = end.completion
    text = decode(service.tokenizers[handle.queue.kind], completion.token_ids, handle.stops)
    return {
        "prompt": encoded.prompt,
        "formatted_prompt": encoded.text,
        "completion": text,
        "text": encoded.text + text,
        "tokens_generated": len(completion.token_ids),
        "stopped_early": completion.finish_reason in STOPPED,
        "finish_reason": completion.finish_reason,
        "seed": handle.seed + index,
    }


def _speculative_result(service: Service, rows: RequestRows, index: int, end: Finished | HttpError) -> Json:
    """Return one row's fields with its latency and the counts of speculation."""
    handle, encoded = rows.handle, rows.encoded[index]
    if isinstance(end, HttpError):
        return _error_result(encoded, end)
    completion, stats = end.completion, end.completion.speculation or SpeculationStats(0, 0, 0)
    return {
        "prompt": encoded.prompt,
        "text": decode(service.tokenizers[SPECULATE], completion.token_ids, handle.stops),
        "tokens": list(completion.token_ids),
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "seed": handle.seed + index,
        "time_seconds": round(end.seconds, 6),
        "tokens_per_second": round(len(completion.token_ids) / max(end.seconds, 1e-9), 3),
        "time_to_first_token": None if end.first_seconds is None else round(end.first_seconds, 6),
        "stats": {
            "total_steps": stats.target_steps,
            "proposed_tokens": stats.proposed,
            "accepted_tokens": stats.accepted,
            "acceptance_rates": [round(rate, 6) for rate in stats.step_rates],
            "avg_acceptance_rate": None if stats.acceptance_rate is None else round(stats.acceptance_rate, 6),
        },
    }


def _error_result(encoded: EncodedPrompt, error: HttpError) -> Json:
    return {"prompt": encoded.prompt, **error.body}


def _status(ends: Sequence[Finished | HttpError]) -> int:
    """Return 200 if any row has a response, else the status of the first row's error."""
    failed = [end.status for end in ends if isinstance(end, HttpError)]
    return failed[0] if len(failed) == len(ends) else 200
