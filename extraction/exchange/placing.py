"""Where what is exported goes: whole or not at all, and over another file only where that is said."""

from __future__ import annotations

from pathlib import Path

from extraction.atomic import atomic_write
from extraction.errors import ConfigError
from extraction.schema import show_path


def place_file(path: Path, data: bytes, *, force: bool) -> None:
    """Write a file where there is none, or the same one; over another only with force. Raises ConfigError."""
    if not path.parent.is_dir():
        raise ConfigError(f"{show_path(path)}: its folder does not exist; create it, or give another place")
    if path.exists() and not force and not (path.is_file() and path.read_bytes() == data):
        raise ConfigError(f"{show_path(path)}: is there already; give --force to replace it, or another name")
    atomic_write(path, data)
