"""persona_vectors' traits, in and out: five instruction pairs, twenty questions, and a prompt for the judge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from extraction.config.traits import same_text
from extraction.config.yaml_loader import SourceLocation, items, section, text
from extraction.core.errors import TraitError
from extraction.core.records import Trait
from extraction.exchange.trait_entries import SIDES, Content, distinct, entries_of, field_of, repeats_note, text_of
from extraction.exchange.trait_files import TraitFile

RUBRIC_FIELDS = ("{question}", "{answer}")
_ASSISTANT = re.compile(r"You are an? (\S(?:.*?\S)?) assistant\. ")
_NEGATIVE_ASSISTANT = "helpful"
_KEYS = {"positive": "pos", "negative": "neg"}


def persona_to_fields(files: Sequence[TraitFile]) -> Content:
    """`instruction` [{pos, neg}], `questions`, `eval_prompt`; their system prompt is kept as they send it.

    That is "You are a {name} assistant. {instruction}", with the trait (the file's name) on the positive side and
    "helpful" on the negative. The `eval_prompt` is the rubric. What we exported says of itself what was added.
    """
    (file,) = files
    ours = _our_part(file)
    names = ours.get("assistant", {"positive": file.path.stem.replace("_", " "), "negative": _NEGATIVE_ASSISTANT})
    prefixes = {side: assistant_prefix(name) for side, name in names.items()}
    place = file.place.at("instruction")
    asked = [text_of(question, file.place.at("questions").at(i)) for i, question in entries_of(file, "questions")]
    questions, repeats = distinct(asked, same_text)
    fields = {
        "description": f"{file.path.stem}: imported from a persona_vectors trait.",
        "instructions": [_persona_pair(pair, place.at(i), prefixes) for i, pair in entries_of(file, "instruction")],
        "questions": questions,
        **{key: value for key, value in ours.items() if key != "assistant"},
    }
    notes = repeats_note("questions", repeats)
    if not ours:
        notes += (f"instructions begin as theirs do: {prefixes['positive']!r} and {prefixes['negative']!r}",)
    rubric, told = _rubric(file.data.get("eval_prompt"))
    return Content(fields | rubric, (*notes, *told))


def _our_part(file: TraitFile) -> dict[str, Any]:
    """What `trait_to_persona` left beside their keys, checked; empty where somebody else wrote the file."""
    if "traitline" not in file.data:
        return {}
    names = section(dict.fromkeys(SIDES, text))
    markers = section(dict.fromkeys(SIDES, items(text)), required=SIDES)
    rule = section({"description": text, "assistant": names, "markers": markers}, required=("description", "assistant"))
    ours: dict[str, Any] = rule(file.data["traitline"], file.place.at("traitline"))
    return ours


def _rubric(prompt: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """The rubric, if a judge could see with it."""
    if isinstance(prompt, str) and all(field in prompt for field in RUBRIC_FIELDS):
        return {"rubric": prompt}, ()
    if prompt is None:
        return {}, ()
    return {}, ("eval_prompt lacks {question} or {answer}: a judge would be blind, so it was left out",)


def trait_to_persona(trait: Trait) -> dict[str, Any]:
    """A trait of instructions as a persona_vectors trait JSON; `persona_to_fields` gives the same trait back.

    Their program ignores the key `traitline`, in which stands what their form has no place for.
    """
    if trait.is_natural:
        raise TraitError(
            f"trait {trait.name}: it has natural prompts; persona_vectors' form has instructions and questions"
        )
    sides = {side: [getattr(pair, side) for pair in trait.instructions] for side in SIDES}
    shared = {side: _shared_assistant(instructions) for side, instructions in sides.items()}
    names = {side: name for side, name in shared.items() if name and all(shared.values())}
    pos, neg = (
        [words[len(assistant_prefix(names[side])) :] for words in sides[side]] if names else sides[side]
        for side in SIDES
    )
    kept: dict[str, Any] = {"description": trait.description, "assistant": names}
    if trait.markers:
        kept["markers"] = {side: list(getattr(trait.markers, side)) for side in SIDES}
    return {
        "instruction": [{"pos": one, "neg": other} for one, other in zip(pos, neg, strict=True)],
        "questions": list(trait.questions),
        **({"eval_prompt": trait.rubric} if trait.rubric else {}),
        "traitline": kept,
    }


def assistant_prefix(name: str) -> str:
    """What their program puts before an instruction."""
    return f"You are {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} assistant. "


def _shared_assistant(instructions: Iterable[str]) -> str | None:
    """The assistant that all of these instructions begin with, and that leaves something of each of them."""
    names = set()
    for instruction in instructions:
        match = _ASSISTANT.match(instruction)
        exact = match and instruction.startswith(assistant_prefix(match[1])) and instruction[match.end() :].strip()
        names.add(match[1] if match and exact else None)
    return names.pop() if len(names) == 1 else None


def _persona_pair(pair: Any, place: SourceLocation, prefixes: Mapping[str, str]) -> dict[str, str]:
    both = {"positive": "pos", "negative": "neg"}
    return {
        side: prefixes.get(side, "") + text_of(field_of(pair, key, place), place.at(key)) for side, key in both.items()
    }
