"""Read and check traits, and turn them into examples."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from extraction.config.experiments import config_names, find_config
from extraction.config.patterns import check_pattern
from extraction.config.validation import Model, Text, distinct, problem, validate
from extraction.config.yaml_loader import Document, SourceLocation, parse_document, read_document
from extraction.core.errors import TraitError
from extraction.core.names import check_name, distinct_names, is_safe_name
from extraction.core.records import POLARITIES, Example, InstructionPair, Markers, NaturalPrompt, Trait
from extraction.core.text import show, suggest

T = TypeVar("T")
# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TraitSets:
    """A checked trait file: the general questions and instructions, and those of families of models."""

    file: TraitFile
    source: str

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families that have questions or instructions of their own, sorted."""
        return tuple(sorted({*self.file.questions_for, *self.file.instructions_for}))

    def fit_markers(self, family: str | None) -> bool:
        """Return True if the markers, if any, were written for this family, or for any model."""
        return not self.file.markers_for or family in self.file.markers_for

    def resolve(self, family: str | None = None, questions: str = "auto") -> Trait:
        """Return the trait for a model of this family.

        `questions` is `auto` (the questions and instructions of the family, the general ones where it has none),
        `general`, or a family whose questions and instructions are used on any model. The markers follow the model
        alone: without those that were written for other families. Raises TraitError for a family without any.
        """
        if questions not in (*QUESTION_SETS, *self.families):
            known = ", ".join((*QUESTION_SETS, *self.families))
            raise TraitError(
                f"{self.source}: --questions {show(questions)}: trait {self.file.name} has no such questions; "
                f"give one of: {known}"
            )
        chosen = family if questions == "auto" else questions
        fields = {key: value for key, value in self.file if not key.endswith("_for")}
        for key in _INSTRUCTED:
            fields[key] = getattr(self.file, f"{key}_for").get(chosen, fields[key])
        return Trait(**(fields if self.fit_markers(family) else fields | {"markers": None}))

    def check_lexical(self, model: str, family: str | None) -> None:
        """Raise TraitError if the markers were written for models of other families."""
        if not self.fit_markers(family):
            whose = " and ".join(self.file.markers_for)
            own = "has no family" if family is None else f"is of the family {family}"
            raise TraitError(
                f"{self.source}: --judge lexical: the markers of trait {self.file.name} are for models of the family "
                f"{whose}, and {model} {own}; give --judge local or openai with --judge-model, or --judge none"
            )


def load_trait(name: str, root: str | os.PathLike[str], family: str | None = None) -> Trait:
    """Return a trait by name, for a model of this family (None: a model without one). Raises TraitError."""
    return load_trait_sets(name, root).resolve(family)


def load_trait_sets(name: str, root: str | os.PathLike[str]) -> TraitSets:
    """Return a trait's file, from which `resolve` makes the trait for a model. Raises TraitError."""
    path = find_config("traits", name, root, TraitError)
    if path is None:
        known = list_traits(root)
        raise TraitError(f"configs/traits/{name}.yaml: no such trait; {suggest(name, known)}")
    return _named(name, read_document(path, TraitError))


def trait_from_yaml(name: str, raw: bytes, source: str, family: str | None = None) -> Trait:
    """Return the trait of a file with these bytes, as `load_trait` does; messages call the file `source`."""
    return _named(name, parse_document(raw, source, TraitError)).resolve(family)


def _named(name: str, document: Document) -> TraitSets:
    sets = TraitSets(_trait_file(document), document.place.source or name)
    if sets.file.name != name:
        raise document.place.at("name").fail(f"{show(sets.file.name)} is not the file's name; write 'name: {name}'")
    return sets


def list_traits(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of all traits, sorted."""
    return config_names("traits", root)


def parse_trait_list(names: str) -> tuple[str, ...]:
    """Return the names of `a,b`. Raises TraitError for two that differ only by case or Unicode form: one folder."""
    parts = [part.strip() for part in names.split(",")]
    if not all(parts):
        raise TraitError(f"--traits {show(names)}: a name is empty; write trait names with commas between, as a,b")
    return distinct_names(parts, "--traits", TraitError)


def trait_fingerprint(trait: Trait) -> str:
    """Return the sha256 of a trait's content."""
    content = json.dumps(asdict(trait), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def trait_notes(trait: Trait, n_per_side: int) -> tuple[str, ...]:
    """Return notes about repeated prompts, and about sides of natural prompts with unequal length."""
    sides = {"positive": len(trait.positive_prompts), "negative": len(trait.negative_prompts)}
    if not trait.is_natural:
        sides = {"distinct": len(trait.instructions) * len(trait.questions)}
    few = [f"{count} {side}" for side, count in sides.items() if count < n_per_side]
    notes = []
    if len(set(sides.values())) > 1:
        counts = " and ".join(f"{count} {side}" for side, count in sides.items())
        notes.append(f"trait {trait.name}: {counts} prompts; both sides give {n_per_side} examples all the same")
    if few:
        notes.append(
            f"trait {trait.name}: {n_per_side} examples a side of {' and '.join(few)} prompts: "
            "they repeat, with other seeds"
        )
    return tuple(notes)


# --- checking -------------------------------------------------------------------------------------------------------

Stripped = Annotated[Text, AfterValidator(str.strip)]
List = Annotated[tuple[T, ...], Field(strict=False)]


def _rubric(value: str) -> str:
    for field in ("{question}", "{answer}"):
        if field not in value:
            raise problem(f"{field} does not stand in it, so the judge would not see it; put {field} in")
    return value


def _marker(value: str) -> str:
    if value.startswith("re:"):
        check_pattern(value.removeprefix("re:"), problem)
    return value


class _Pair(Model):
    positive: Stripped
    negative: Stripped


def _pair(pair: _Pair) -> InstructionPair:
    if same_text(pair.positive) == same_text(pair.negative):
        raise problem(f"{show(pair.positive)} stands on both sides; the two must ask for opposite ends")
    return InstructionPair(pair.positive, pair.negative)


class _Natural(Model):
    prompt: Stripped
    system: Stripped | None = None


class _Markers(Model):
    positive: List[Annotated[Text, AfterValidator(_marker)]]
    negative: List[Annotated[Text, AfterValidator(_marker)]]


def _markers(sides: _Markers) -> Markers:
    for side in ("positive", "negative"):
        _refuse_repeats(getattr(sides, side), side, normal=_marker_key)
    for i, marker in enumerate(sides.negative):
        twin = next((other for other in sides.positive if _overlap(marker, other)), None)
        if twin is not None:
            raise problem(f"{show(marker)} is counted by the positive marker {show(twin)} too; keep one", "negative", i)
    if not sides.positive and not sides.negative:
        raise problem("no marker on either side; list some, or leave 'markers' out")
    return Markers(sides.positive, sides.negative)


Pair = Annotated[_Pair, AfterValidator(_pair)]
Natural = Annotated[
    _Natural,
    BeforeValidator(lambda value: value if isinstance(value, dict) else {"prompt": value}),
    AfterValidator(lambda entry: NaturalPrompt(entry.prompt, entry.system)),
]


QUESTION_SETS = ("auto", "general")  # the words of the setting `questions` that name no family


def _family_sets(sets: dict[str, tuple[T, ...]]) -> dict[str, tuple[T, ...]]:
    for family, entries in sets.items():
        if family in QUESTION_SETS or not is_safe_name(family):
            raise problem(f"{show(family)} is not the name of a family; write it as in a model's file", family)
        if not entries:
            raise problem("[] names nothing; give at least one, or leave the family out", family)
    return sets


ByFamily = Annotated[dict[Text, List[T]], AfterValidator(_family_sets)]


class TraitFile(Model):
    """The keys of a file in configs/traits; those in `_for` are of families of models, as a model's file names its own.

    `questions` and `instructions` are for the models of all other families, and `markers` for any model without
    `markers_for`.
    """

    name: Text
    description: Stripped
    instructions: List[Pair] = ()
    questions: List[Stripped] = ()
    positive_prompts: List[Natural] = ()
    negative_prompts: List[Natural] = ()
    rubric: Annotated[Text, AfterValidator(_rubric)] | None = None
    markers: Annotated[_Markers, AfterValidator(_markers)] | None = None
    questions_for: ByFamily[Stripped] = Field(default_factory=dict)
    instructions_for: ByFamily[Pair] = Field(default_factory=dict)
    markers_for: Annotated[
        List[Text],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        AfterValidator(distinct),
    ] = ()


def _overlap(one: str, other: str) -> bool:
    """Return True if two markers are the same, or one is a pattern that matches the other."""
    if _marker_key(one) == _marker_key(other):
        return True
    patterns = [(a, b) for a, b in ((one, other), (other, one)) if a.startswith("re:") and not b.startswith("re:")]
    return any(re.fullmatch(pattern[3:], phrase, re.IGNORECASE) for pattern, phrase in patterns)


_INSTRUCTED = ("instructions", "questions")
_NATURAL = ("positive_prompts", "negative_prompts")


def _trait_file(document: Document) -> TraitFile:
    place = document.place
    _check_sides(document.data, place)
    file: TraitFile = validate(CheckedTraitFile, document.data, place)
    check_name(file.name, f"{place.at('name')}: name", TraitError)
    return file


def _no_repeats(trait: TraitFile) -> TraitFile:
    for keys, pairs in _sets(trait, "instructions"):
        for side in ("positive", "negative"):
            _refuse_repeats([getattr(pair, side) for pair in pairs], *keys, side=side)
    for keys, questions in _sets(trait, "questions"):
        _refuse_repeats(questions, *keys)
    if trait.markers_for and trait.markers is None:
        raise problem("stands without 'markers'; list some, or leave it out", "markers_for")
    positive = [_natural_key(prompt) for prompt in trait.positive_prompts]
    negative = [_natural_key(prompt) for prompt in trait.negative_prompts]
    _refuse_repeats(positive, "positive_prompts")
    _refuse_repeats(negative, "negative_prompts")
    for i, key in enumerate(negative):
        if key in positive:
            raise problem(f"{show(key)} stands on the positive side too; keep one", "negative_prompts", i)
    return trait


def _sets(trait: TraitFile, key: str) -> list[tuple[tuple[str, ...], tuple[Any, ...]]]:
    """Return the general entries of a key and those of each family, with the keys that lead to them."""
    families: dict[str, tuple[Any, ...]] = getattr(trait, f"{key}_for")
    return [((key,), getattr(trait, key)), *(((f"{key}_for", name), entries) for name, entries in families.items())]


CheckedTraitFile = Annotated[TraitFile, AfterValidator(_no_repeats)]


def _check_sides(data: Any, place: SourceLocation) -> None:
    """Check that a trait is of one kind, instructed or natural, and has both sides."""
    if not isinstance(data, dict):
        return
    natural = [key for key in _NATURAL if key in data]
    instructed = [key for key in data if str(key).removesuffix("_for") in _INSTRUCTED]
    if natural and instructed:
        raise place.at(natural[0]).fail(f"stands beside {show(instructed[0])}; a trait has the one or the other")
    for key in natural and _NATURAL:
        if data.get(key) in (None, []):
            raise _one_sided(place, key.removesuffix("_prompts"))
    for key in () if natural else _INSTRUCTED:
        if data.get(key) in (None, []):
            raise place.fail(f"0 {key}; a trait needs instructions and questions, or positive_ and negative_prompts")
    pairs = data.get("instructions")
    for side in ("positive", "negative"):
        if isinstance(pairs, list) and all(isinstance(pair, dict) and not pair.get(side) for pair in pairs) and pairs:
            raise _one_sided(place, side)


def _one_sided(place: SourceLocation, side: str) -> TraitError:
    return TraitError(f"{place.source}: '{side}' has 0 prompts; a trait needs both sides")


def _refuse_repeats(
    texts: Iterable[str], *keys: str, side: str | None = None, normal: Callable[[str], str] | None = None
) -> None:
    """Refuse an entry that differs from another only by case, spaces or Unicode form."""
    seen: dict[str, int] = {}
    for i, entry in enumerate(texts):
        first = seen.setdefault((normal or same_text)(entry), i)
        if first != i:
            raise problem(f"{show(entry)} is entry {first} again; keep one", *keys, i, *([side] if side else []))


def same_text(entry: str) -> str:
    """Return a text without case, extra spaces and Unicode form, for comparison."""
    return " ".join(unicodedata.normalize("NFKC", entry).casefold().split())


def _marker_key(marker: str) -> str:
    r"""Return a marker for comparison; a pattern as it is: `\w` and `\W` differ."""
    return marker if marker.startswith("re:") else same_text(marker)


def _natural_key(prompt: NaturalPrompt | _Natural) -> str:
    return prompt.prompt if prompt.system is None else f"{prompt.system}\n\n{prompt.prompt}"


# --- examples -------------------------------------------------------------------------------------------------------


def make_examples(trait: Trait, n_per_side: int) -> tuple[Example, ...]:
    """Return `n_per_side` positive examples, each followed by its negative counterpart.

    Any number of the first ones is spread evenly: the counts of two instruction pairs, or of two questions, differ by
    at most one. The first n of more examples are the same n. Past the distinct prompts they repeat (`r01`, ...), with
    other random numbers.
    """
    if n_per_side < 1:
        raise TraitError(f"trait {trait.name}: {n_per_side} examples a side; at least 1 is needed")
    make = _natural_example if trait.is_natural else _instructed_example
    return tuple(make(trait, POLARITIES[i % 2], i // 2) for i in range(2 * n_per_side))


def _instructed_example(trait: Trait, polarity: str, step: int) -> Example:
    pair_id, question_id, repeat = walk(step, len(trait.instructions), len(trait.questions))
    pair = trait.instructions[pair_id]
    return Example(
        id=f"{polarity}-i{pair_id:02d}-q{question_id:03d}-r{repeat:02d}",
        trait=trait.name,
        polarity=polarity,
        instruction_id=pair_id,
        question_id=question_id,
        repeat=repeat,
        question=trait.questions[question_id],
        system=pair.positive if polarity == "pos" else pair.negative,
    )


def _natural_example(trait: Trait, polarity: str, step: int) -> Example:
    prompts = trait.positive_prompts if polarity == "pos" else trait.negative_prompts
    repeat, index = divmod(step, len(prompts))
    return Example(
        id=f"{polarity}-n{index:04d}-r{repeat:02d}",
        trait=trait.name,
        polarity=polarity,
        instruction_id=0,
        question_id=index,
        repeat=repeat,
        question=prompts[index].prompt,
        system=prompts[index].system,
    )


def walk(step: int, n_pairs: int, n_questions: int) -> tuple[int, int, int]:
    """Return the pair, question and repeat of a step: a diagonal over the pairs x questions table.

    The diagonal comes back to its start after lcm(pairs, questions) steps; each time it then starts one pair further.
    """
    repeat, cell = divmod(step, n_pairs * n_questions)
    lap = cell // math.lcm(n_pairs, n_questions)
    return (cell + lap) % n_pairs, cell % n_questions, repeat
