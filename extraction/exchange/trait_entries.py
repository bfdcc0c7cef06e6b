"""Entries of others' trait files, checked one by one; and what they become."""

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
class Content:
    """A trait's fields in our form, without its name, and what a user should know."""

    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


def field_of(row: Any, key: str, place: SourceLocation) -> Any:
    """One field of an entry, which must be there."""
    if not isinstance(row, dict) or key not in row:
        raise place.fail(f"{key!r} is missing; every entry needs it")
    return row[key]


def text_of(value: Any, place: SourceLocation) -> str:
    """Text with something in it, without spaces around it, as traits are kept."""
    return text(value, place).strip()


def entries_of(file: TraitFile, key: str) -> Iterable[tuple[int, Any]]:
    """The numbered entries of one list in a file's object, which must hold some."""
    value = file.data.get(key)
    if not isinstance(value, list) or not value:
        raise file.place.at(key).fail(f"{show(value)} is no list with something in it; the trait needs {key}")
    return enumerate(value)


def list_of(file: TraitFile) -> list[Any]:
    """The list that a file is, or that stands in it under `pairs`; it must hold something."""
    data = file.data.get("pairs") if isinstance(file.data, dict) else file.data
    if not isinstance(data, list) or not data:
        raise file.place.fail(f"{show(data)} is no list with something in it; a trait needs both sides")
    return data


def distinct(entries: Iterable[Any], key: Callable[[Any], str]) -> tuple[list[Any], int]:
    """Entries without those that count as the same, and how many those were."""
    given = list(entries)
    first = {key(entry): entry for entry in reversed(given)}
    return [first[entry] for entry in dict.fromkeys(map(key, given))], len(given) - len(first)


def prompt_key(prompt: Any) -> str:
    """As traits compare two natural prompts."""
    return same_text(prompt if isinstance(prompt, str) else f"{prompt['system']}\n\n{prompt['prompt']}")


def repeats_note(what: str, count: int) -> tuple[str, ...]:
    """What to say of repeats, if there were any."""
    return (f"repeated {what} left out: {count}",) if count else ()
