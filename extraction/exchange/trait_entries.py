"""Read and check single entries of imported trait files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from extraction.config.traits import same_text
from extraction.config.yaml_loader import SourceLocation, text
from extraction.core.text import show
from extraction.exchange.trait_files import TraitFile

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class TraitFields:
    """Fields of a trait's YAML without its name, with notes for the user."""

    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


def required_field(row: Any, key: str, place: SourceLocation) -> Any:
    """Return a field of an entry. Raises TraitError with its place where it is missing."""
    if not isinstance(row, dict) or key not in row:
        raise place.fail(f"{key!r} is missing; every entry needs it")
    return row[key]


def nonblank_text(value: Any, place: SourceLocation) -> str:
    """Return text without spaces around it. Raises TraitError for blank text or another type."""
    return text(value, place).strip()


def numbered_entries(file: TraitFile, key: str) -> Iterable[tuple[int, Any]]:
    """Return the numbered entries of a list in a file's JSON object. Raises TraitError where there are none."""
    value = file.data.get(key)
    if not isinstance(value, list) or not value:
        raise file.place.at(key).fail(f"{show(value)} is not a list with entries; the trait needs {key}")
    return enumerate(value)


def entry_list(file: TraitFile) -> list[Any]:
    """Return a file's list, which may be under `pairs`. Raises TraitError where it is empty or missing."""
    data = file.data.get("pairs") if isinstance(file.data, dict) else file.data
    if not isinstance(data, list) or not data:
        raise file.place.fail(f"{show(data)} is not a list with entries; a trait needs both sides")
    return data


def drop_repeats(entries: Iterable[Any], key: Callable[[Any], str]) -> tuple[list[Any], int]:
    """Return the entries without repeats by `key`, and the number of repeats."""
    all_entries = list(entries)
    first = {key(entry): entry for entry in reversed(all_entries)}
    return [first[entry] for entry in dict.fromkeys(map(key, all_entries))], len(all_entries) - len(first)


def prompt_key(prompt: Any) -> str:
    """Return the key by which traits compare natural prompts."""
    return same_text(prompt if isinstance(prompt, str) else f"{prompt['system']}\n\n{prompt['prompt']}")


def repeats_note(kind: str, count: int) -> tuple[str, ...]:
    """Return a note about repeats, if there were any."""
    return (f"repeated {kind} left out: {count}",) if count else ()
