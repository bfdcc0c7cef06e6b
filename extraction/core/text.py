"""TODO."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def show(value: object) -> str:
    """A value as one short line, whatever it holds."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def show_path(path: str | os.PathLike[str]) -> str:
    """A path as a user would type it: relative to the current folder where it lies inside it."""
    text = os.fspath(path)
    here = os.getcwd() + os.sep
    text = text.removeprefix(here) if text.startswith(here) else text
    return text if text.isprintable() and len(text) <= 300 else show(text)


def one_line(said: object) -> str:
    """Text for a terminal: ANSI and other control characters of a name or a path are shown, not obeyed."""
    text = " ".join(str(said).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def suggest(value: object, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the known values where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
