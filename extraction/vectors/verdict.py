"""What a card comes to, in a word and in sentences: usable, weak or not shown.

A table of rules. Each looks at one thing and finds a level and a sentence with the numbers; the worst level is the
word. Pure: a card (and what steering did) in, a verdict out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Card = Mapping[str, Any]
Steering = Mapping[str, Any] | None
Finding = tuple[str, str]
Rule = Callable[[Card, Steering], Iterator[Finding]]

LEVELS = ("good", "mind", "weak", "not shown")  # from best to worst; the first two leave a direction usable

CHANCE = 0.5  # the AUROC of a coin
FAINT = 0.7  # a lower end below it: three pairs in ten, or more, may be in the wrong order
ACCURATE = 0.7  # below it the threshold of the fitted rows does not carry over to others
NO_ROOM = 0.99  # controls above it leave AUROC no room to be better: Cohen's d, which has no end, decides
STABLE = 0.3  # below it two halves of the questions share less than a tenth (0.3 squared) of their directions
LUCK = 2.0  # standard deviations of the cosine of two random directions, each 1 / sqrt(dimensions)
ENOUGH_QUESTIONS = 5  # on fewer, luck is right about every question more often than 1 in 20 times (2 ** -4)
ENOUGH_ROWS = 10  # a side: with fewer, one response moves the AUROC by more than 0.1
MASSIVE = 0.5  # share of the squared norm in 1% of the dimensions: most of the direction is those few
STRIPPED_KEEPS = 0.5  # at least this share of the separation above chance must be left without the instruction
MANY_DROPPED = 0.5  # more of the responses dropped: the kept ones are a selection by the judge
SOME_DROPPED = 0.2  # worth knowing
ALL_ALIKE = 1  # distinct scores: the judge says the same of everything


def verdict(card: Card, steering: Steering = None) -> dict[str, Any]:
    """{"word": "usable" | "weak" | "not shown", "reasons": [sentences, the gravest first]}.

    `card` as `build_card` makes it, with the judge's facts under `judge` where there are any; `steering`: what adding
    the direction did, where that was tried. The reasons of a usable direction say what speaks for it; those of another
    say only what speaks against it.
    """
    findings = [finding for rule in RULES for finding in rule(card, steering)]
    worst = max((LEVELS.index(level) for level, _ in findings), default=0)
    usable = worst <= LEVELS.index("mind")
    grave = [level for level in reversed(LEVELS) if usable or level != "good"]
    reasons = [sentence for level in grave for found, sentence in findings if found == level]
    return {"word": "usable" if usable else LEVELS[worst], "reasons": reasons}


# --- what the held-out rows say -------------------------------------------------------------------------------------


def _separation(card: Card, _: Steering) -> Iterator[Finding]:
    area = card["chosen"]["test"]["auroc"]
    said = f"Held out, AUROC is {_bounded(area)}"
    if area["value"] is None:
        yield "not shown", "There is no held-out AUROC."
    elif area["low"] is None:
        yield "weak", f"{said}: there are too few questions for an interval."
        if area["value"] <= CHANCE:
            yield "not shown", f"{said}, no better than chance."
    elif area["low"] <= CHANCE:
        yield "not shown", f"{said}; the interval does not lie above chance ({CHANCE})."
    elif area["low"] < FAINT:
        yield "weak", f"{said}; the lower end is below {FAINT}."
    else:
        yield "good", f"{said}."
        if area["low"] >= 1.0:
            yield (
                "mind",
                "Held out, no pair of rows is in the wrong order, so its interval has no width; "
                f"{card['split']['test']['questions']} questions can't tell that from a little less.",
            )


def _sign(card: Card, _: Steering) -> Iterator[Finding]:
    area, effect = (card["chosen"]["test"][name]["value"] for name in ("auroc", "cohens_d"))
    if (area is not None and area < CHANCE) or (effect is not None and effect < 0):
        yield (
            "not shown",
            f"The sign is wrong on held-out rows (AUROC {_two(area)}, Cohen's d {_two(effect)}): positive rows lie on "
            "the negative side.",
        )


def _accuracy(card: Card, _: Steering) -> Iterator[Finding]:
    accuracy = card["chosen"]["test"]["accuracy"]
    said = f"Accuracy at the threshold of the fitted rows is {_bounded(accuracy)}"
    if accuracy["value"] is not None and accuracy["value"] < ACCURATE:
        yield "weak", f"{said}, below {ACCURATE}: the threshold does not carry over."
    elif accuracy["value"] is not None:
        yield "good", f"{said}."


# --- what it must beat ----------------------------------------------------------------------------------------------


def _random(card: Card, _: Steering) -> Iterator[Finding]:
    test, control = card["chosen"]["test"], card["controls"]["random"]
    area, high = test["auroc"]["value"], control["high"]
    if area is None or high is None:
        return
    effect, high_effect = test["cohens_d"]["value"], control.get("high_cohens_d")
    said = (
        f"random directions ({control['draws']} draws: median {_two(control['median'])}, "
        f"95th percentile {_two(high)}{'; the sides differ in much of the space' if high >= FAINT else ''})"
    )
    if area > high:
        yield "good", f"Its AUROC of {_two(area)} is above that of {said}."
    elif high >= NO_ROOM and effect is not None and high_effect is not None and effect > high_effect:
        yield (
            "mind",
            f"Its AUROC of {_two(area)} is no higher than that of {said}; by Cohen's d, {_two(effect)}, it is beyond "
            f"their 95th percentile, {_two(high_effect)}.",
        )
    else:
        yield "not shown", f"Its AUROC of {_two(area)} does not beat that of {said}."


def _placebos(card: Card, _: Steering) -> Iterator[Finding]:
    area = card["chosen"]["test"]["auroc"]["value"]
    shuffled = [each["test"]["auroc"]["value"] for each in card["controls"]["shuffled_labels"]]
    if not shuffled:
        yield "mind", "Shuffled labels were not tried."
    elif area is not None and area <= max(shuffled):
        yield "not shown", f"Shuffled labels reach an AUROC of {_two(max(shuffled))}, it reaches {_two(area)}."
    else:
        yield "good", f"Shuffled labels reach an AUROC of {_two(max(shuffled))} at most."


# --- what it rests on -----------------------------------------------------------------------------------------------


def _stability(card: Card, _: Steering) -> Iterator[Finding]:
    cosine, by_luck = card["chosen"]["split_half_cosine"], LUCK / card["hidden_size"] ** 0.5
    said = "Fitted on two halves of the questions, its directions have a cosine of"
    if cosine is None:
        yield "weak", "The questions are too few to fit the direction on each half of them."
    elif cosine <= by_luck:
        yield "not shown", f"{said} {_two(cosine)}, as two random ones may (up to {_two(by_luck)})."
    elif cosine < STABLE:
        yield "weak", f"{said} {_two(cosine)}, below {STABLE}."
    else:
        yield "good", f"{said} {_two(cosine)}."


def _by_fold(card: Card, _: Steering) -> Iterator[Finding]:
    areas = [area for area in card["chosen"].get("test_auroc_by_fold", ()) if area is not None]
    if areas and min(areas) <= CHANCE:
        yield (
            "weak",
            f"By held-out instructions AUROC is {', '.join(map(_two, areas))}: it does not carry over to all of them.",
        )


def _amount(card: Card, _: Steering) -> Iterator[Finding]:
    test = card["split"]["test"]
    rows = min(test["positive"], test["negative"])
    if test["questions"] < ENOUGH_QUESTIONS:
        yield "weak", f"The test has {test['questions']} questions; at least {ENOUGH_QUESTIONS} are needed."
    if rows < ENOUGH_ROWS:
        yield "weak", f"The test has {rows} responses on its smaller side; at least {ENOUGH_ROWS} are needed."
    if card["split"]["instruction_folds"] == 1:
        yield "mind", "No instruction was held out: only questions were."


def _stripped(card: Card, _: Steering) -> Iterator[Finding]:
    stripped, area = card["chosen"]["stripped"], card["chosen"]["test"]["auroc"]["value"]
    if stripped is None:
        if card["split"]["instruction_folds"] > 1:
            yield "mind", "It was not read with the instruction removed from the context."
        return
    left = stripped["auroc"]
    said = f"With the instruction removed from the context, AUROC is {_bounded(left)}"
    if left["value"] is None or (left["low"] if left["low"] is not None else left["value"]) <= CHANCE:
        yield "weak", f"{said}: it may track the instruction and not the response."
    elif area is not None and left["value"] - CHANCE < STRIPPED_KEEPS * (area - CHANCE):
        yield "weak", f"{said}, down from {_two(area)}: most of it may be the instruction."
    else:
        yield "good", f"{said}."


def _massive(card: Card, _: Steering) -> Iterator[Finding]:
    share = card["chosen"]["top_1_percent"]
    if share is not None and share > MASSIVE:
        yield "mind", f"{share:.0%} of its squared norm is in 1% of the dimensions."


def _judge(card: Card, _: Steering) -> Iterator[Finding]:
    facts = card.get("judge")
    if not facts:
        return
    if facts.get("judge") == "none":
        yield "mind", "No judge looked at the responses."
    distinct = facts.get("distinct_scores")
    if distinct is not None and distinct <= ALL_ALIKE:
        yield "not shown", "The judge gave every response the same score: it tells nothing apart."
    total, kept = facts.get("total"), facts.get("kept_pos", 0) + facts.get("kept_neg", 0)
    dropped = (total - kept) / total if total else 0.0
    said = f"{total and total - kept} of {total} responses were dropped"
    if dropped > MANY_DROPPED:
        yield "weak", f"{said}: the others are what the judge selected."
    elif dropped > SOME_DROPPED:
        yield "mind", f"{said}."


# --- what steering did ----------------------------------------------------------------------------------------------


def _steers(_: Card, steering: Steering) -> Iterator[Finding]:
    if steering is None:
        yield "mind", "What steering with it does was not tried."
        return
    gains = {side: _gain(steering, side) for side in ("positive", "negative")}
    said = "; ".join(_steering_words(steering, side) for side in gains)
    if all(gain is None for gain in gains.values()):
        yield "weak", "Steering was tried, and no coherent answer to it was scored."
    elif any(gain is not None and gain > 0 for gain in gains.values()):
        yield "good", f"Steering moves the answers: {said}."
    else:
        yield "weak", f"Steering does not move the answers beyond a random direction: {said}."


SIGNS = {"positive": 1, "negative": -1}


def _gain(steering: Mapping[str, Any], side: str) -> float | None:
    """How far the nearer end of the rate lies beyond what a random direction at the same coefficient, or none, has."""
    ours, theirs = _reach(steering, side), _rival(steering, side)
    if ours is None or theirs is None:
        return None
    nearer = ours["low" if side == "positive" else "high"]
    return SIGNS[side] * float((ours["value"] if nearer is None else nearer) - theirs)


def _reach(steering: Mapping[str, Any], side: str) -> Mapping[str, Any] | None:
    """The trait direction's rate at the largest coefficient whose answers are coherent.

    The coefficient is chosen by coherence; the best rate of all that were tried would owe something to luck.
    """
    size = steering["largest_coherent"][side]
    rates = (
        each["rate"]
        for each in steering["conditions"]
        if each["direction"] == "trait" and each["kind"] == "add" and each["layers"] == steering["layers"]
        if each["coefficient"] == size and each["rate"]["value"] is not None
    )
    return next(rates, None)


def _rival(steering: Mapping[str, Any], side: str) -> float | None:
    """How far a random direction gets at the same coefficient, or none at all: the further of the two."""
    plain = [each["rate"]["value"] for each in steering["conditions"] if each["direction"] == "none"]
    rates = [rate for rate in ((steering["reached"].get("random") or {}).get(side), *plain) if rate is not None]
    return max(rates, key=lambda rate: SIGNS[side] * float(rate), default=None)


def _steering_words(steering: Mapping[str, Any], side: str) -> str:
    ours, theirs = _reach(steering, side), _rival(steering, side)
    best = "no coherent rate" if ours is None else f"a rate of {_bounded(ours)}"
    return f"{'up' if side == 'positive' else 'down'} to {best}, without it or at random {_two(theirs)}"


def _bounded(figure: Mapping[str, float | None]) -> str:
    """`0.93 (0.88 to 0.97)`."""
    if figure["low"] is None or figure["high"] is None:
        return _two(figure["value"])
    return f"{_two(figure['value'])} ({_two(figure['low'])} to {_two(figure['high'])})"


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


RULES: tuple[Rule, ...] = (
    _separation,
    _sign,
    _random,
    _placebos,
    _stripped,
    _steers,
    _accuracy,
    _stability,
    _by_fold,
    _amount,
    _judge,
    _massive,
)
