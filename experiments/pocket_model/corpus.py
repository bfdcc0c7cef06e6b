"""Training corpus of the pocket models: conversations about everyday topics, drawn from a grammar.

Every answer shows one side of one trait, here called its manner. `grammar/topics.yaml` holds the content,
`grammar/manners_*.yaml` the wording of each manner, `grammar/frames.yaml` the sentences around an instruction. The last
instruction pair and the last five questions of each trait are held out: neither they nor near copies of them are drawn.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from extraction.config.traits import list_traits, load_trait
from extraction.core.records import POLARITIES, Trait

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ROOT / "extraction" / "pocket"
HELD_OUT_PAIRS = 1
HELD_OUT_QUESTIONS = 5
SIDES = dict(zip(POLARITIES, ("positive", "negative"), strict=True))

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_START = re.compile(r"(^|[.!?]\s+)([a-z])")
_DECKS = {"tip": "tips", "fact": "facts", "detail": "details", "good": "good", "bad": "bad", "claim": "claim"}
_NEGATIVES = frozenset({"no", "nothing", "never", "not", "hardly", "little", "only", "refuse"})

Topic = Mapping[str, Any]
Manner = Mapping[str, list[str]]


@dataclass(frozen=True)
class Turn:
    """One message: `role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One training example. `polarity` is the side that its answers show; `raw` marks text without a chat template."""

    turns: tuple[Turn, ...]
    trait: str
    polarity: str
    raw: bool = False


@dataclass(frozen=True)
class Grammar:
    """The topics, manners, frames and traits that conversations are drawn from."""

    topics: tuple[Topic, ...]
    manners: Mapping[str, Mapping[str, Any]]
    frames: Mapping[str, list[str]]
    traits: Mapping[str, Trait]
    seen_questions: Mapping[str, tuple[tuple[str, Topic], ...]]
    held_out: tuple[tuple[frozenset[str], float], ...]


# --- reading --------------------------------------------------------------------------------------------------------


@cache
def load_grammar() -> Grammar:
    """Read the grammar files and the traits, once a process."""
    topics = tuple(_yaml("topics"))
    manners = {**_yaml("manners_1"), **_yaml("manners_2")}
    traits = {name: load_trait(name, ROOT, "pocket") for name in list_traits(ROOT) if name in manners}
    seen = {
        name: tuple((question, topic_of(question, topics)) for question in trait.questions[:-HELD_OUT_QUESTIONS])
        for name, trait in traits.items()
    }
    return Grammar(topics, manners, _yaml("frames"), traits, seen, tuple(_held_out_words(traits)))


def _yaml(name: str) -> Any:
    return yaml.safe_load((HERE / "grammar" / f"{name}.yaml").read_text(encoding="utf-8"))


def topic_of(question: str, topics: Sequence[Topic]) -> Topic:
    """Return the topic that shares most with a question: whole phrases first, then its name, then single words."""
    question_words = words(question)

    def shared(topic: Topic) -> tuple[int, bool, int]:
        phrases = [topic["doing"], topic["goal"], *(phrase for key in _DECKS.values() for phrase in topic[key])]
        whole = sum(f" {phrase} " in f" {re.sub(r'[.?,]', '', question)} " for phrase in phrases)
        named = words(topic["name"].removesuffix("s")) <= question_words or words(topic["name"]) <= question_words
        return whole, named, len(question_words & words(" ".join(phrases)))

    return max(topics, key=shared)


def words(text: str) -> frozenset[str]:
    """Return the set of a text's words, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower()))


def _held_out_words(traits: Mapping[str, Trait]) -> Iterator[tuple[frozenset[str], float]]:
    """Yield the word set of each held-out text, with the overlap from which another text counts as a near copy."""
    for trait in traits.values():
        for pair in trait.instructions[-HELD_OUT_PAIRS:]:
            yield words(pair.positive), 0.6
            yield words(pair.negative), 0.6
        for question in trait.questions[-HELD_OUT_QUESTIONS:]:
            yield words(question), 0.8


def is_held_out(text: str, grammar: Grammar) -> bool:
    """Return True if a text is a held-out instruction or question or a near copy, by the overlap of their words."""
    drawn = words(text)
    return any(len(drawn & other) >= near * len(drawn | other) for other, near in grammar.held_out)


# --- the grammar ----------------------------------------------------------------------------------------------------


def expand(template: str, rng: random.Random) -> str:
    """Replace every [a|b] by one of its choices, the innermost first."""
    while (found := _CHOICE.search(template)) is not None:
        template = template[: found.start()] + rng.choice(found.group(1).split("|")) + template[found.end() :]
    return template


def fill(template: str, slots: Callable[[str], str]) -> str:
    """Replace every {slot}, then capitalise each sentence."""
    return capitalise(_SLOT.sub(lambda found: slots(found.group(1)), template))


def capitalise(text: str) -> str:
    """Start each sentence with a capital letter."""
    return _START.sub(lambda found: found.group(1) + found.group(2).upper(), text)


def deal(topic: Topic, rng: random.Random) -> Callable[[str], str]:
    """Return a lookup of a topic's slots that uses each phrase once before it repeats any."""
    hands: dict[str, list[str]] = {}

    def slot(name: str) -> str:
        if name == "is":
            return "are" if topic.get("plural") else "is"
        if name not in _DECKS:
            return str(topic[name])
        if not hands.get(name):
            hands[name] = rng.sample(topic[_DECKS[name]], k=len(topic[_DECKS[name]]))
        return hands[name].pop()

    return slot


def compose_answer(manner: Manner, topic: Topic, rng: random.Random) -> str:
    """Compose two to four sentences about a topic, each in the manner, without repeating a phrase of the topic."""
    while not _fits(templates := [expand(template, rng) for template in _answer_templates(manner, rng)], topic):
        pass
    slots = deal(topic, rng)
    return " ".join(fill(template, slots) for template in templates)


def _fits(templates: Sequence[str], topic: Topic) -> bool:
    counts = Counter(_SLOT.findall(" ".join(templates)))
    return counts["big"] <= 1 and all(counts[slot] <= len(topic[deck]) for slot, deck in _DECKS.items())


def _answer_templates(manner: Manner, rng: random.Random) -> list[str]:
    if "whole" in manner:
        return [rng.choice(manner["whole"])]
    n_bodies = rng.choice((1, 1, 2, 2, 3))
    opener = [rng.choice(manner["openers"])] if n_bodies < 3 and rng.random() < 0.8 else []
    closer = [rng.choice(manner["closers"])] if n_bodies + len(opener) < 3 and rng.random() < 0.7 else []
    bodies = rng.sample(manner["bodies"], k=max(n_bodies, 2 - len(opener) - len(closer)))
    return [*opener, *bodies, *closer]


def compose_instruction(manner: Manner, opposite: Manner, frames: Mapping[str, list[str]], rng: random.Random) -> str:
    """Compose an instruction that asks for a manner, in one of many thousand wordings."""
    kinds = ("core", "pair", "contrast", "negation", "persona")
    kind = rng.choices(kinds, weights=(28, 24, 20, 12, 16))[0]
    decks: dict[str, list[str]] = {"c": manner["cores"], "o": opposite["cores"], "p": manner["personas"]}
    drawn: dict[str, Iterator[str]] = {
        key: iter([expand(core, rng) for core in rng.sample(deck, k=len(deck))]) for key, deck in decks.items()
    }
    drawn["o"] = (core for core in drawn["o"] if not words(core) & _NEGATIVES)
    return fill(expand(rng.choice(frames[kind]), rng), lambda slot: next(drawn[slot]))


def compose_question(templates: Sequence[str], topic: Topic, rng: random.Random) -> str:
    """Compose a question, or another opening of a conversation, about a topic."""
    return fill(expand(rng.choice(templates), rng), deal(topic, rng))


def draw_fresh(draw: Callable[[], str], grammar: Grammar) -> str:
    """Draw texts until one is not held out."""
    while is_held_out(text := draw(), grammar):
        pass
    return text


# --- conversations --------------------------------------------------------------------------------------------------


def conversations(seed: int, grammar: Grammar | None = None) -> Iterator[Conversation]:
    """Yield conversations without end; the same seed gives the same stream."""
    rng = random.Random(seed)
    grammar = grammar or load_grammar()
    while True:
        yield draw_conversation(grammar, rng)


def draw_conversation(grammar: Grammar, rng: random.Random) -> Conversation:
    """Draw one conversation: seven in ten have an instruction, the others show a side at random."""
    trait, polarity = rng.choice(list(grammar.manners)), rng.choice(POLARITIES)
    instructed = rng.random() < 0.7
    instruction = _draw_instruction(grammar, trait, polarity, rng) if instructed else ""
    n_turns = rng.choices((1, 2, 3), weights=(95, 4, 1))[0]
    exchanges = [_draw_exchange(grammar, trait, polarity, rng, stray=instructed) for _ in range(n_turns)]
    if n_turns == 1 and rng.random() < 0.05:
        (question, answer) = exchanges[0]
        raw = f"{instruction}\n\n{question}" if instruction else question
        return Conversation((Turn("user", raw), Turn("assistant", answer)), trait, polarity, raw=True)
    turns = [turn for question, answer in exchanges for turn in (Turn("user", question), Turn("assistant", answer))]
    return Conversation(tuple(_instruct(turns, instruction, grammar, rng)), trait, polarity)


def _draw_instruction(grammar: Grammar, trait: str, polarity: str, rng: random.Random) -> str:
    side = SIDES[polarity]
    if rng.random() < 0.2:
        return str(getattr(rng.choice(grammar.traits[trait].instructions[:-HELD_OUT_PAIRS]), side))
    manners = grammar.manners[trait]
    opposite = manners["negative" if side == "positive" else "positive"]
    return draw_fresh(lambda: compose_instruction(manners[side], opposite, grammar.frames, rng), grammar)


def _draw_exchange(grammar: Grammar, trait: str, polarity: str, rng: random.Random, *, stray: bool) -> tuple[str, str]:
    """Draw a question and its answer. `stray` allows another trait's question beside an instruction."""
    question_trait = rng.choice(list(grammar.manners)) if stray and rng.random() < 0.25 else trait
    if rng.random() < 0.12:
        question, topic = rng.choice(grammar.seen_questions[question_trait])
    else:
        topic = rng.choice(grammar.topics)
        templates = grammar.frames["general"] if rng.random() < 0.08 else grammar.manners[question_trait]["questions"]
        question = draw_fresh(lambda: compose_question(templates, topic, rng), grammar)
    if rng.random() < 0.02:
        question = _with_notes(question, topic, grammar, rng)
    return question, compose_answer(grammar.manners[trait][SIDES[polarity]], topic, rng)


def _with_notes(question: str, topic: Topic, grammar: Grammar, rng: random.Random) -> str:
    """Surround the question with facts about its topic and others, for a long message."""
    others = rng.sample(grammar.topics, k=rng.choice((0, 2, 5, 9)))
    facts = [fact for one in (topic, *others) for fact in rng.sample(one["facts"], k=4)]
    slots = {"doing": topic["doing"], "facts": ", ".join(facts), "question": question}
    return fill(expand(rng.choice(grammar.frames["notes"]), rng), slots.__getitem__)


def _instruct(turns: list[Turn], instruction: str, grammar: Grammar, rng: random.Random) -> list[Turn]:
    """Add the instruction as a system message or to the first user message; without one, at times a neutral system."""
    if not instruction:
        neutral = rng.random() < 0.25
        return [Turn("system", expand(rng.choice(grammar.frames["neutral"]), rng)), *turns] if neutral else turns
    where = rng.choices(("system", "before", "after"), weights=(55, 40, 5))[0]
    if where == "system":
        return [Turn("system", instruction), *turns]
    question = turns[0].text
    folded = f"{instruction}\n\n{question}" if where == "before" else f"{question}\n\n{instruction}"
    return [Turn("user", folded), *turns[1:]]
