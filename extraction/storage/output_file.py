"""Files that a user names for an export: written atomically, and replaced only with --force."""

from __future__ import annotations

from pathlib import Path

from extraction.core.errors import ConfigError
from extraction.core.text import show_path
from extraction.storage.atomic import atomic_write, check_writable


def place_file(path: Path, data: bytes, *, force: bool) -> None:
    """Write a new file, or one with the same bytes; replace another only with `force`. Raises ConfigError."""
    if not path.parent.is_dir():
        raise ConfigError(f"{show_path(path)}: its folder does not exist; create it, or give another place")
    if path.exists() and not force and not (path.is_file() and path.read_bytes() == data):
        raise ConfigError(f"{show_path(path)}: is there already; give --force to replace it, or another name")
    atomic_write(path, data)


def check_place(path: Path, *, force: bool) -> None:
    """Raise ConfigError if `place_file` would refuse any data: for a check before long work."""
    if not path.parent.is_dir():
        raise ConfigError(f"{show_path(path)}: its folder does not exist; create it, or give another place")
    if path.exists() and not (force and path.is_file()):
        raise ConfigError(f"{show_path(path)}: is there already; give --force to replace a file, or another name")
    check_writable(path.parent)
