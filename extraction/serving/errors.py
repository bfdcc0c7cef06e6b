"""HTTP errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

from extraction.core.text import show, suggest

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
    507: "out_of_memory_error",
}  # other statuses: server_error from 500, else invalid_request_error


class ClientDisconnected(Exception):
    """The client closed its connection before it was answered."""


class HttpError(Exception):
    """An HTTP error response.

    Args:
        status: HTTP status.
        message: One line with the value, the place and the remedy.
        param: The field of the request that the error is about.
        code: A short name for programs.
        headers: Headers of the response.
    """

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
        """JSON body of the response."""
        kind = ERROR_TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def validation_error(errors: list[Any]) -> HttpError:
    """Convert the first of pydantic's errors: the field, the value given, and what is valid."""
    first = errors[0]
    kind, field = first["type"], _field_path(first["loc"])
    if kind == "json_invalid":
        message = f"the body is not JSON ({first['ctx']['error']}); send one JSON object"
        return HttpError(400, message, code="json_invalid")
    param = first.get("ctx", {}).get("param") or field or None
    if kind == "missing":
        message = f"{field!r} is missing; give it" if field else "the body is missing; send a JSON object"
    elif kind == "refused":
        message = f"{param!r}: {first['msg']}" if param else first["msg"]
    else:
        valid = first["msg"][:1].lower() + first["msg"][1:]
        message = f"{repr(field) if field else 'the body'}: {show(first.get('input'))} given; {valid}"
    return HttpError(422, message, param=param, code="invalid" if kind == "refused" else kind)


def unknown_value(value: object, known: Iterable[str], what: str, param: str, status: int = 422) -> HttpError:
    """Return the error for a value that is not among the known ones, with the nearest of them."""
    return HttpError(status, f"{param!r}: {show(value)} is not {what}; {suggest(value, known)}", param=param)


def code_location(failure: BaseException) -> str:
    """Return an exception's class, file and line, without its message, which may hold a part of a prompt."""
    frames = traceback.extract_tb(failure.__traceback__)
    return f"{type(failure).__name__}" + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def _field_path(location: tuple[Any, ...]) -> str:
    """Join pydantic's location, such as `messages.0.content`, without its first part ("body")."""
    return ".".join(str(part) for part in location[1:])
