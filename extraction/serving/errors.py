"""What a client is told when it gets no answer: one shape everywhere, OpenAI's."""

from __future__ import annotations

import traceback
from typing import Any

from extraction.core.text import show, suggest

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
    507: "out_of_memory_error",
}


class HttpError(Exception):
    """An HTTP error: a status, one line with the remedy, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As JSON holds it."""
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_validation(errors: list[Any]) -> HttpError:
    """The first thing that is wrong with a body: where, what was given, and what should be."""
    first = errors[0]
    kind, place = first["type"], _place(first["loc"])
    if kind == "json_invalid":
        return HttpError(
            400, f"the body is not JSON ({first['ctx']['error']}); send one JSON object", code="json_invalid"
        )
    param = first.get("ctx", {}).get("param") or place or None
    if kind == "missing":
        said = f"{place!r} is missing; give it" if place else "the body is missing; send a JSON object"
    elif kind == "refused":
        said = f"{param!r}: {first['msg']}" if param else first["msg"]
    else:
        asked = first["msg"][:1].lower() + first["msg"][1:]
        said = f"{repr(place) if place else 'the body'}: {show(first.get('input'))} given; {asked}"
    return HttpError(422, said, param=param, code="invalid" if kind == "refused" else kind)


def where(failure: BaseException) -> str:
    """What broke and at which line, but not what it said: a message may hold a part of somebody's prompt."""
    frames = traceback.extract_tb(failure.__traceback__)
    return f"{type(failure).__name__}" + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def unknown(value: object, known: Any, what: str, param: str, status: int = 422) -> HttpError:
    """Something that is not known here, with the nearest that is."""
    return HttpError(status, f"{param!r}: {show(value)} is not {what}; {suggest(value, known)}", param=param)


def _place(location: tuple[Any, ...]) -> str:
    """`messages.0.content`, without the word for the body itself."""
    return ".".join(str(part) for part in location[1:])
