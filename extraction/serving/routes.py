"""Traitline's own endpoints: plain, amplified and speculated generation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from extraction.engine.requests import SpeculationStats
from extraction.engine.sampler import Sample
from extraction.serving.detokenizer import Stream, text_of
from extraction.serving.errors import HttpError
from extraction.serving.events import Failed, Finished, NewTokens
from extraction.serving.models import AMPLIFY, PLAIN, SPECULATE
from extraction.serving.prompt_encoding import Encoded, Raw
from extraction.serving.schemas import Formatting, Generate, GenerateBatch, GenerateLda, GenerateLdaBatch, Sampling
from extraction.serving.service import RequestHandle, RequestRows, Service, outcome, seed_or_any
from extraction.serving.streaming import Events, Reply, stream

EARLY = ("stop", "stop_string")


def routes(desk: Service) -> APIRouter:
    """The endpoints, at this desk."""
    router = APIRouter(default_response_class=Reply)

    @router.post("/generate")
    async def generate(body: Generate, http: HttpRequest) -> Any:
        return await _one(desk, http, _order(desk, PLAIN, body, body.max_new_tokens), body)

    @router.post("/generate_lda")
    async def generate_lda(body: GenerateLda, http: HttpRequest) -> Any:
        return await _one(desk, http, _order(desk, AMPLIFY, body, body.max_new_tokens, alpha=body.alpha), body)

    @router.post("/generate_lda_batch")
    async def generate_lda_batch(body: GenerateLdaBatch, http: HttpRequest) -> Any:
        order = _order(desk, AMPLIFY, body, body.max_new_tokens, alpha=body.alpha)
        rows, ends = await desk.answer(http, order, _several(desk, order, body))
        found = [_row(desk, order, i, *pair) for i, pair in enumerate(zip(rows.encoded, ends, strict=True))]
        return Reply({"results": found, **_run(desk, order), "batch_size": len(found)}, _status(ends))

    @router.post("/generate/batch")
    async def generate_batch(body: GenerateBatch, http: HttpRequest) -> Any:
        depth = body.speculation_depth or desk.settings.depth
        order = _order(desk, SPECULATE, body, body.max_tokens, field="max_tokens", depth=depth)
        began = time.perf_counter()
        rows, ends = await desk.answer(http, order, _several(desk, order, body))
        found = [_speculated(desk, order, i, *pair) for i, pair in enumerate(zip(rows.encoded, ends, strict=True))]
        facts = {"batch_size": len(found), "speculation_depth": depth, "time_seconds": _seconds(began)}
        return Reply({"results": found, **_run(desk, order), **facts}, _status(ends))

    @router.get("/tokenizer_compatibility")
    async def tokenizer_compatibility() -> Any:
        desk.served.of(AMPLIFY)
        return Reply(desk.compatibility)

    return router


def _order(
    desk: Service,
    kind: str,
    body: Sampling,
    budget: int,
    *,
    field: str = "max_new_tokens",
    alpha: float | None = None,
    depth: int = 0,
) -> RequestHandle:
    desk.served.of(kind)
    return RequestHandle(
        lane=(kind, depth),
        sample=Sample.of(body),
        max_new_tokens=budget,
        seed=seed_or_any(body.seed),
        field=field,
        alpha=alpha,
        ignore_eos=body.ignore_eos,
        stops=tuple(body.stop),
    )


def _several(desk: Service, order: RequestHandle, body: GenerateLdaBatch | GenerateBatch) -> list[Raw]:
    return [_asked(desk, order, body, f"prompts.{i}", prompt) for i, prompt in enumerate(body.prompts)]


def _asked(desk: Service, order: RequestHandle, body: Formatting, field: str, prompt: str) -> Raw:
    by_default = False if order.lane[0] in desk.served.raw else None
    chat = by_default if body.apply_chat_template is None else body.apply_chat_template
    return Raw(field, prompt, body.system_prompt, chat)


async def _one(desk: Service, http: HttpRequest, order: RequestHandle, body: Generate) -> Response:
    asked = [_asked(desk, order, body, "prompt", body.prompt)]
    if not body.stream:
        rows, ends = await desk.answer(http, order, asked)
        return Reply({**_answer(desk, order, 0, rows.encoded[0], outcome(ends)[0]), **_run(desk, order)})
    rows = await desk.accept(order, asked, streams=True)
    return await stream(http, rows, lambda events: _pieces(desk, rows, events))


async def _pieces(desk: Service, rows: RequestRows, events: Events) -> AsyncIterator[dict[str, Any]]:
    """The text as it grows; last, what there would have been without a stream."""
    order = rows.order
    text = Stream(desk.decoders[order.lane[0]], order.stops)
    async for _, event in events:
        if isinstance(event, Failed):
            raise event.error
        piece = text.add(event.token_ids) if isinstance(event, NewTokens) else text.end(event.completion.token_ids)
        if piece:
            yield {"text": piece, "tokens_generated": len(text.token_ids), "done": False}
        if isinstance(event, Finished):
            yield {**_answer(desk, order, 0, rows.encoded[0], event), **_run(desk, order), "done": True}


def _run(desk: Service, order: RequestHandle) -> dict[str, Any]:
    """What a reply says of the whole request."""
    names, kind = desk.served.names, order.lane[0]
    said: dict[str, dict[str, Any]] = {
        PLAIN: {"model": names["model"]},
        AMPLIFY: {"alpha": order.alpha, "model_after": names["after"], "model_before": names["before"]},
        SPECULATE: {"model": names["model"], "draft": names["draft"]},
    }
    return said[kind]


def _row(
    desk: Service, order: RequestHandle, index: int, encoded: Encoded, end: Finished | HttpError
) -> dict[str, Any]:
    """One prompt's place in a batch's reply: its answer, or why it has none."""
    if isinstance(end, HttpError):
        return {"prompt": encoded.prompt, **end.body}
    return _answer(desk, order, index, encoded, end)


def _answer(desk: Service, order: RequestHandle, index: int, encoded: Encoded, end: Finished) -> dict[str, Any]:
    completion = end.completion
    text = text_of(desk.decoders[order.lane[0]], completion.token_ids, order.stops)
    return {
        "prompt": encoded.prompt,
        "formatted_prompt": encoded.text,
        "completion": text,
        "text": encoded.text + text,
        "tokens_generated": len(completion.token_ids),
        "stopped_early": completion.finish_reason in EARLY,
        "finish_reason": completion.finish_reason,
        "seed": order.seed + index,
    }


def _speculated(
    desk: Service, order: RequestHandle, index: int, encoded: Encoded, end: Finished | HttpError
) -> dict[str, Any]:
    if isinstance(end, HttpError):
        return {"prompt": encoded.prompt, **end.body}
    completion, stats = end.completion, end.completion.speculation or SpeculationStats(0, 0, 0)
    return {
        "prompt": encoded.prompt,
        "text": text_of(desk.decoders[SPECULATE], completion.token_ids, order.stops),
        "tokens": list(completion.token_ids),
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "seed": order.seed + index,
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


def _status(ends: Sequence[Finished | HttpError]) -> int:
    """200 where at least one prompt has its answer, else the status of the first."""
    failed = [end.status for end in ends if isinstance(end, HttpError)]
    return failed[0] if len(failed) == len(ends) else 200


def _seconds(began: float) -> float:
    return round(time.perf_counter() - began, 6)
