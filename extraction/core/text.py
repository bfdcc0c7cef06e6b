"""Short texts for messages: values, paths, suggestions."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def show(value: object) -> str:
    """Return a value as one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def show_path(path: str | os.PathLike[str]) -> str:
    """Return a path relative to the current folder if it lies in it."""
    text = os.fspath(path)
    here = os.getcwd() + os.sep
    text = text.removeprefix(here) if text.startswith(here) else text
    return text if text.isprintable() and len(text) <= 300 else show(text)


def one_line(message: object) -> str:
    """Return a message as one line in which control characters, such as ANSI codes of a file name, are escaped."""
    text = " ".join(str(message).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def suggest(value: object, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the known values if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
