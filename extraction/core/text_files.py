"""Open and decode files that users give, with one-line errors."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from extraction.core.errors import ConfigError
from extraction.core.text import show_path


def open_input(path: str | os.PathLike[str], limit: int, error: type[ConfigError] = ConfigError) -> BinaryIO:
    """Open a regular file of at most `limit` bytes. A FIFO, a folder or a device is refused unopened."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
            raise error(f"{show_path(path)}: is {kind}; give a regular file")
        if info.st_size > limit:
            raise error(f"{show_path(path)}: {info.st_size} bytes; at most {limit} are read, split the file")
        return open(path, "rb")
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise error(f"{show_path(path)}: {reason.lower()}; check the path and its permissions") from failure


def read_text(path: str | os.PathLike[str], limit: int, error: type[ConfigError] = ConfigError) -> str:
    """Return a regular file's text without its byte order mark: UTF-8, at most `limit` bytes."""
    with open_input(path, limit, error) as file:
        return decode_utf8(file.read(limit), 0, show_path(path), error).removeprefix("\ufeff")


def refuse_nul(text: str, place: str, error: type[ConfigError] = ConfigError) -> None:
    """Raise `error` with the line of the first NUL in a text."""
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise error(f"{place}:{line}: holds a NUL byte; remove it")


def decode_utf8(data: bytes, offset: int, place: str, error: type[ConfigError] = ConfigError) -> str:
    """Return strictly decoded UTF-8. `offset` is where `data` starts in its file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as failure:
        byte = data[failure.start]
        raise error(
            f"{place}: invalid UTF-8 at byte {offset + failure.start} (0x{byte:02x}); save the file as UTF-8"
        ) from failure
