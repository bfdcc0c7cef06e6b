"""Names that users give to runs, traits, models and reports: safe as a file name on every system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from extraction.core.errors import ConfigError
from extraction.core.text import show

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_safe_name(name: object) -> bool:
    """True if `name` can name a file on every system: 1 to 64 characters, no trailing dot, no Windows device."""
    return isinstance(name, str) and bool(NAME.fullmatch(name)) and not WINDOWS_DEVICE.fullmatch(name)


def check_name(name: str, what: str, error: type[ConfigError] = ConfigError) -> str:
    """Return `name` if it is safe as a file name everywhere; raise `error` otherwise. `what` names the value."""
    if not is_safe_name(name):
        raise error(
            f"{what} {show(name)}: not a name; use letters, digits, '.', '_' and '-', at most 64, a letter or digit "
            "first, no '.' last, and no device name of Windows"
        )
    return name


def distinct_names(names: Iterable[str], what: str, error: type[ConfigError] = ConfigError) -> tuple[str, ...]:
    """Return safe names, no two of them equal up to case and Unicode form (they would share a folder)."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", str(name)).casefold()
        if key in seen:
            raise error(f"{what} {show(name)}: given twice (as {show(seen[key])}); keep one")
        seen[key] = name
    return tuple(check_name(name, what, error) for name in seen.values())
