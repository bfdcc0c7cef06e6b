"""Convert persona_vectors traits (instruction pairs, questions, a prompt for the judge) from and to Traitline's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from extraction.config.traits import same_text
from extraction.config.yaml_loader import SourceLocation, items, section, text
from extraction.core.errors import TraitError
from extraction.core.records import Trait
from extraction.exchange.trait_entries import (
    SIDES,
    TraitFields,
    drop_repeats,
    nonblank_text,
    numbered_entries,
    repeats_note,
    required_field,
)
from extraction.exchange.trait_files import TraitFile

RUBRIC_FIELDS = ("{question}", "{answer}")
_ASSISTANT = re.compile(r"You are an? (\S(?:.*?\S)?) assistant\. ")
_NEGATIVE_ASSISTANT = "helpful"


def persona_to_fields(files: Sequence[TraitFile]) -> TraitFields:
    """Convert `instruction` [{pos, neg}], `questions` and `eval_prompt` (the rubric).

    Instructions become the system prompts that persona_vectors sends: "You are a {name} assistant. {instruction}",
    where name is the trait (the file's name) on the positive side and "helpful" on the negative. A file that
    `trait_to_persona` wrote has the names under its key `traitline`.
    """
    (file,) = files
    ours = _traitline_part(file)
    names = ours.get("assistant", {"positive": file.path.stem.replace("_", " "), "negative": _NEGATIVE_ASSISTANT})
    prefixes = {side: assistant_prefix(name) for side, name in names.items()}
    place = file.place.at("instruction")
    texts = [
        nonblank_text(question, file.place.at("questions").at(i)) for i, question in numbered_entries(file, "questions")
    ]
    questions, repeats = drop_repeats(texts, same_text)
    fields = {
        "description": f"{file.path.stem}: imported from a persona_vectors trait.",
        "instructions": [
            _instruction_pair(pair, place.at(i), prefixes) for i, pair in numbered_entries(file, "instruction")
        ],
        "questions": questions,
        **{key: value for key, value in ours.items() if key != "assistant"},
    }
    notes = repeats_note("questions", repeats)
    if not ours:
        notes += (f"instructions begin as in persona_vectors: {prefixes['positive']!r} and {prefixes['negative']!r}",)
    rubric, rubric_notes = _rubric_field(file.data.get("eval_prompt"))
    return TraitFields(fields | rubric, (*notes, *rubric_notes))


def _traitline_part(file: TraitFile) -> dict[str, Any]:
    """Return the checked value of the key `traitline`, which `trait_to_persona` writes; empty where there is none."""
    if "traitline" not in file.data:
        return {}
    names = section(dict.fromkeys(SIDES, text))
    markers = section(dict.fromkeys(SIDES, items(text)), required=SIDES)
    rule = section({"description": text, "assistant": names, "markers": markers}, required=("description", "assistant"))
    ours: dict[str, Any] = rule(file.data["traitline"], file.place.at("traitline"))
    return ours


def _rubric_field(prompt: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the rubric if it has places for the question and the answer, or else a note."""
    if isinstance(prompt, str) and all(field in prompt for field in RUBRIC_FIELDS):
        return {"rubric": prompt}, ()
    if prompt is None:
        return {}, ()
    return {}, ("eval_prompt has no {question} or no {answer}, which a judge needs, so it was left out",)


def trait_to_persona(trait: Trait) -> dict[str, Any]:
    """Convert a trait of instructions to persona_vectors JSON, which `persona_to_fields` converts back exactly.

    Fields that the format lacks are under the key `traitline`, which persona_vectors ignores.
    """
    if trait.is_natural:
        raise TraitError(
            f"trait {trait.name}: natural prompts; a persona_vectors trait needs instructions and questions"
        )
    sides = {side: [getattr(pair, side) for pair in trait.instructions] for side in SIDES}
    shared = {side: _shared_assistant_name(instructions) for side, instructions in sides.items()}
    names = {side: name for side, name in shared.items() if name and all(shared.values())}
    pos, neg = (
        [words[len(assistant_prefix(names[side])) :] for words in sides[side]] if names else sides[side]
        for side in SIDES
    )
    ours: dict[str, Any] = {"description": trait.description, "assistant": names}
    if trait.markers:
        ours["markers"] = {side: list(getattr(trait.markers, side)) for side in SIDES}
    return {
        "instruction": [{"pos": one, "neg": other} for one, other in zip(pos, neg, strict=True)],
        "questions": list(trait.questions),
        **({"eval_prompt": trait.rubric} if trait.rubric else {}),
        "traitline": ours,
    }


def assistant_prefix(name: str) -> str:
    """Return what persona_vectors puts before an instruction."""
    return f"You are {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} assistant. "


def _shared_assistant_name(instructions: Iterable[str]) -> str | None:
    """Return the assistant name with which all instructions begin, if each has more text after it; otherwise None."""
    names = set()
    for instruction in instructions:
        match = _ASSISTANT.match(instruction)
        exact = match and instruction.startswith(assistant_prefix(match[1])) and instruction[match.end() :].strip()
        names.add(match[1] if match and exact else None)
    return names.pop() if len(names) == 1 else None


def _instruction_pair(pair: Any, place: SourceLocation, prefixes: Mapping[str, str]) -> dict[str, str]:
    both = {"positive": "pos", "negative": "neg"}
    return {
        side: prefixes.get(side, "") + nonblank_text(required_field(pair, key, place), place.at(key))
        for side, key in both.items()
    }
