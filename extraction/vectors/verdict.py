"""Turn a card into a verdict: usable, weak or not shown, with the reasons in sentences.

RULES is a table of functions. Each checks one property of the card, or of the steering sweep, and yields findings: a
level and a sentence with the numbers. The worst level decides the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Card = Mapping[str, Any]
Steering = Mapping[str, Any] | None
Finding = tuple[str, str]
Rule = Callable[[Card, Steering], Iterator[Finding]]

LEVELS = ("good", "note", "weak", "not shown")  # from best to worst; the first two leave a direction usable

CHANCE_AUROC = 0.5
WEAK_AUROC = 0.7  # lower bound of the interval: below it three pairs in ten, or more, may be in the wrong order
WEAK_ACCURACY = 0.7  # below it the threshold of the fitted rows does not generalise to other rows
SATURATED_AUROC = (
    0.99  # random directions above it leave AUROC no room to be better: Cohen's d, which is unbounded, decides
)
WEAK_COSINE = 0.3  # below it two halves of the questions share less than a tenth (0.3 squared) of their directions
RANDOM_COSINE_SDS = 2.0  # standard deviations of the cosine of two random directions, each 1 / sqrt(dimensions)
MIN_TEST_QUESTIONS = 5  # with fewer, chance is right about every question more often than 1 in 20 times (2 ** -4)
MIN_TEST_ROWS = 10  # on a side: with fewer, one response moves the AUROC by more than 0.1
MASSIVE_SHARE = 0.5  # of the squared norm in 1% of the dimensions: above it most of the direction is those few
MIN_SHARE_LEFT = 0.5  # of the separation above chance must be left with the instruction removed
MANY_DROPPED_SHARE = 0.5  # of the responses: above it the kept ones are mostly the judge's selection
SOME_DROPPED_SHARE = 0.2  # of the responses: above it a note
CONSTANT_SCORE = 1  # number of distinct judge scores: the judge distinguishes no responses


def verdict(card: Card, steering: Steering = None) -> dict[str, Any]:
    """Judge a card: {"word": "usable" | "weak" | "not shown", "reasons": [sentences, the gravest first]}.

    The reasons for a usable direction include what supports it; those for another are only what is wrong with it.

    Args:
        card: as `build_card` makes it, with the judge's facts under `judge` where there are any.
        steering: the results of the steering sweep, where one was run.
    """
    findings = [finding for rule in RULES for finding in rule(card, steering)]
    worst = max((LEVELS.index(level) for level, _ in findings), default=0)
    usable = worst <= LEVELS.index("note")
    reported = [level for level in reversed(LEVELS) if usable or level != "good"]
    reasons = [sentence for level in reported for of_finding, sentence in findings if of_finding == level]
    return {"word": "usable" if usable else LEVELS[worst], "reasons": reasons}


# --- metrics on held-out test questions -----------------------------------------------------------------------------


def _auroc_rule(card: Card, _: Steering) -> Iterator[Finding]:
    area = card["chosen"]["test"]["auroc"]
    measured = f"AUROC on held-out test questions is {_with_interval(area)}"
    if area["value"] is None:
        yield "not shown", "AUROC on held-out test questions is undefined."
    elif area["low"] is None:
        yield "weak", f"{measured}; there are too few questions for an interval."
        if area["value"] <= CHANCE_AUROC:
            yield "not shown", f"{measured}, no better than chance ({CHANCE_AUROC})."
    elif area["low"] <= CHANCE_AUROC:
        yield "not shown", f"{measured}; the interval is not above chance ({CHANCE_AUROC})."
    elif area["low"] < WEAK_AUROC:
        yield "weak", f"{measured}; the lower bound is below {WEAK_AUROC}."
    else:
        yield "good", f"{measured}."
        if area["low"] >= 1.0:
            yield (
                "note",
                "The interval of the AUROC has no width, since no pair of test responses is in the wrong order; "
                f"{card['split']['test']['questions']} questions can't distinguish that from a slightly lower AUROC.",
            )


def _sign_rule(card: Card, _: Steering) -> Iterator[Finding]:
    area, effect = (card["chosen"]["test"][name]["value"] for name in ("auroc", "cohens_d"))
    if (area is not None and area < CHANCE_AUROC) or (effect is not None and effect < 0):
        yield (
            "not shown",
            f"The sign is wrong on held-out test questions (AUROC {_two_decimals(area)}, Cohen's d "
            f"{_two_decimals(effect)}): positive responses project lower than negative ones.",
        )


def _accuracy_rule(card: Card, _: Steering) -> Iterator[Finding]:
    accuracy = card["chosen"]["test"]["accuracy"]
    measured = f"Accuracy at the threshold of the fitted responses is {_with_interval(accuracy)}"
    if accuracy["value"] is not None and accuracy["value"] < WEAK_ACCURACY:
        yield "weak", f"{measured}, below {WEAK_ACCURACY}: the threshold does not generalise."
    elif accuracy["value"] is not None:
        yield "good", f"{measured}."


# --- controls -------------------------------------------------------------------------------------------------------


def _random_directions_rule(card: Card, _: Steering) -> Iterator[Finding]:
    test, control = card["chosen"]["test"], card["controls"]["random"]
    area, high = test["auroc"]["value"], control["high"]
    if area is None or high is None:
        return
    effect, high_effect = test["cohens_d"]["value"], control.get("high_cohens_d")
    everywhere = "; the sides differ in much of the space" if high >= WEAK_AUROC else ""
    randoms = (
        f"random directions ({control['draws']} draws: median {_two_decimals(control['median'])}, "
        f"95th percentile {_two_decimals(high)}{everywhere})"
    )
    if area > high:
        yield "good", f"AUROC {_two_decimals(area)} is above that of {randoms}."
    elif high >= SATURATED_AUROC and effect is not None and high_effect is not None and effect > high_effect:
        yield (
            "note",
            f"AUROC {_two_decimals(area)} is no higher than that of {randoms}, but Cohen's d {_two_decimals(effect)} "
            f"is above their 95th percentile, {_two_decimals(high_effect)}.",
        )
    else:
        yield "not shown", f"AUROC {_two_decimals(area)} is not above that of {randoms}."


def _shuffled_labels_rule(card: Card, _: Steering) -> Iterator[Finding]:
    area = card["chosen"]["test"]["auroc"]["value"]
    shuffled = [control["test"]["auroc"]["value"] for control in card["controls"]["shuffled_labels"]]
    if not shuffled:
        yield "note", "Shuffled labels were not measured."
        return
    best = f"With shuffled labels AUROC is at most {_two_decimals(max(shuffled))}"
    if area is not None and area <= max(shuffled):
        yield "not shown", f"{best}; with the true labels it is {_two_decimals(area)}, no higher."
    else:
        yield "good", f"{best}."


# --- stability ------------------------------------------------------------------------------------------------------


def _split_half_rule(card: Card, _: Steering) -> Iterator[Finding]:
    cosine, of_random = card["chosen"]["split_half_cosine"], RANDOM_COSINE_SDS / card["hidden_size"] ** 0.5
    measured = "The cosine between the directions of two halves of the questions is"
    if cosine is None:
        yield "weak", "There are too few questions to fit the direction on each half of them."
    elif cosine <= of_random:
        yield "not shown", f"{measured} {_two_decimals(cosine)}, no more than of random directions ({of_random:.2f})."
    elif cosine < WEAK_COSINE:
        yield "weak", f"{measured} {_two_decimals(cosine)}, below {WEAK_COSINE}."
    else:
        yield "good", f"{measured} {_two_decimals(cosine)}."


def _instruction_folds_rule(card: Card, _: Steering) -> Iterator[Finding]:
    areas = [area for area in card["chosen"].get("test_auroc_by_fold", ()) if area is not None]
    if areas and min(areas) <= CHANCE_AUROC:
        listed = ", ".join(map(_two_decimals, areas))
        yield "weak", f"AUROC by fold of held-out instructions is {listed}: it does not generalise to all of them."


def _test_size_rule(card: Card, _: Steering) -> Iterator[Finding]:
    test = card["split"]["test"]
    rows = min(test["positive"], test["negative"])
    if test["questions"] < MIN_TEST_QUESTIONS:
        yield "weak", f"There are {test['questions']} test questions; at least {MIN_TEST_QUESTIONS} are needed."
    if rows < MIN_TEST_ROWS:
        yield "weak", f"There are {rows} test responses on the smaller side; at least {MIN_TEST_ROWS} are needed."
    if card["split"]["instruction_folds"] == 1:
        yield "note", "No instruction was held out, only questions."


def _without_instruction_rule(card: Card, _: Steering) -> Iterator[Finding]:
    stripped, area = card["chosen"]["stripped"], card["chosen"]["test"]["auroc"]["value"]
    if stripped is None:
        if card["split"]["instruction_folds"] > 1:
            yield "note", "AUROC with the instruction removed from the context was not measured."
        return
    left = stripped["auroc"]
    measured = f"With the instruction removed from the context, AUROC is {_with_interval(left)}"
    if left["value"] is None or (left["low"] if left["low"] is not None else left["value"]) <= CHANCE_AUROC:
        yield "weak", f"{measured}: the direction may encode the instruction and not the response."
    elif area is not None and left["value"] - CHANCE_AUROC < MIN_SHARE_LEFT * (area - CHANCE_AUROC):
        yield "weak", f"{measured}, down from {_two_decimals(area)}: most of it may be the instruction."
    else:
        yield "good", f"{measured}."


def _massive_dimensions_rule(card: Card, _: Steering) -> Iterator[Finding]:
    share = card["chosen"]["top_1_percent"]
    if share is not None and share > MASSIVE_SHARE:
        yield "note", f"{share:.0%} of the direction's squared norm is in 1% of the dimensions."


def _judge_rule(card: Card, _: Steering) -> Iterator[Finding]:
    facts = card.get("judge")
    if not facts:
        return
    if facts.get("judge") == "none":
        yield "weak", "Not judged: the responses were kept as they were told, whether they show the trait or not."
    distinct = facts.get("distinct_scores")
    if distinct is not None and distinct <= CONSTANT_SCORE:
        yield "not shown", "The judge gave every response the same score, so it distinguishes nothing."
    total, kept = facts.get("total"), facts.get("kept_pos", 0) + facts.get("kept_neg", 0)
    dropped = (total - kept) / total if total else 0.0
    counted = f"{total and total - kept} of {total} responses were dropped"
    if dropped > MANY_DROPPED_SHARE:
        yield "weak", f"{counted}: the rest is the judge's selection."
    elif dropped > SOME_DROPPED_SHARE:
        yield "note", f"{counted}."


# --- steering -------------------------------------------------------------------------------------------------------


def _steering_rule(_: Card, steering: Steering) -> Iterator[Finding]:
    if steering is None:
        yield "note", "Steering with the direction was not measured."
        return
    gains = {side: _gain_over_baseline(steering, side) for side in ("positive", "negative")}
    rates = "; ".join(_describe_steering(steering, side) for side in gains)
    if all(gain is None for gain in gains.values()):
        yield "weak", "Steering was run, but no coherent steered response was scored."
    elif any(gain is not None and gain > 0 for gain in gains.values()):
        yield "good", f"Steering changes the share of responses that show the trait: {rates}."
    else:
        yield (
            "weak",
            "Steering changes the share of responses that show the trait no further than a random direction does: "
            f"{rates}.",
        )


SIGNS = {"positive": 1, "negative": -1}


def _gain_over_baseline(steering: Mapping[str, Any], side: str) -> float | None:
    """Return how far the nearer bound of the steered rate lies beyond the baseline rate; None where one is missing."""
    rate, baseline = _rate_at_largest_coherent(steering, side), _baseline_rate(steering, side)
    if rate is None or baseline is None:
        return None
    nearer = rate["low" if side == "positive" else "high"]
    return SIGNS[side] * float((rate["value"] if nearer is None else nearer) - baseline)


def _rate_at_largest_coherent(steering: Mapping[str, Any], side: str) -> Mapping[str, Any] | None:
    """Return the trait direction's rate at the largest coefficient whose responses are coherent.

    The coefficient is chosen by coherence: the best rate of all coefficients would be selected by its noise.
    """
    coefficient = steering["largest_coherent"][side]
    rates = (
        condition["rate"]
        for condition in steering["conditions"]
        if condition["direction"] == "trait" and condition["kind"] == "add"
        if condition["layers"] == steering["layers"] and condition["coefficient"] == coefficient
        if condition["rate"]["value"] is not None
    )
    return next(rates, None)


def _baseline_rate(steering: Mapping[str, Any], side: str) -> float | None:
    """Return the further of two rates: a random direction's at the same coefficient, and that without steering."""
    plain = [condition["rate"]["value"] for condition in steering["conditions"] if condition["direction"] == "none"]
    rates = [rate for rate in ((steering["reached"].get("random") or {}).get(side), *plain) if rate is not None]
    return max(rates, key=lambda rate: SIGNS[side] * float(rate), default=None)


def _describe_steering(steering: Mapping[str, Any], side: str) -> str:
    rate, baseline = _rate_at_largest_coherent(steering, side), _baseline_rate(steering, side)
    steered = "no coherent rate" if rate is None else f"a rate of {_with_interval(rate)}"
    way = "up" if side == "positive" else "down"
    return f"{way} to {steered}, unsteered or with a random direction {_two_decimals(baseline)}"


def _with_interval(estimate: Mapping[str, float | None]) -> str:
    """Format an estimate: `0.93 (0.88 to 0.97)`."""
    if estimate["low"] is None or estimate["high"] is None:
        return _two_decimals(estimate["value"])
    return f"{_two_decimals(estimate['value'])} ({_two_decimals(estimate['low'])} to {_two_decimals(estimate['high'])})"


def _two_decimals(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


RULES: tuple[Rule, ...] = (
    _auroc_rule,
    _sign_rule,
    _random_directions_rule,
    _shuffled_labels_rule,
    _without_instruction_rule,
    _steering_rule,
    _accuracy_rule,
    _split_half_rule,
    _instruction_folds_rule,
    _test_size_rule,
    _judge_rule,
    _massive_dimensions_rule,
)
