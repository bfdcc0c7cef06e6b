"""The forecast of the time that is left: right where lengths and speeds are known, and silent where it is soon over."""

from __future__ import annotations

import random

import pytest

from extraction.pipeline.pace import ENOUGH, PROMPT_SHARE, Pace

SHARE, SECONDS = PROMPT_SHARE["cpu"], 0.001


class Machine:
    """Slots that make a token a row in every step, and read a prompt when a row begins; time is counted, not taken."""

    def __init__(self, n: int, seed: int, *, slots: int, start: float = 0.0) -> None:
        rng = random.Random(seed)
        self.lengths = [min(400, 1 + int(rng.gammavariate(2, 40))) for _ in range(n)]
        self.prompts = [rng.randint(20, 60) for _ in range(n)]
        self.now, self.slots = start, slots
        self.pace = Pace(n, sum(self.prompts), "cpu", clock=lambda: self.now)

    def run(self, shard: int = 100) -> tuple[float | None, float, float]:
        """After the first shard: seconds left as forecast, as examples a second have it, and as they came to be."""
        waiting, rows, found = list(range(len(self.lengths)))[::-1], dict[int, int](), []
        while rows or waiting:
            while len(rows) < self.slots and waiting:
                entering = waiting.pop()
                rows[entering] = self.lengths[entering]
                self.now += SHARE * self.prompts[entering] * SECONDS
            self.now += SECONDS * len(rows)
            self.pace.advance(len(rows))
            rows = {i: left - 1 for i, left in rows.items()}
            for i in [i for i, left in rows.items() if not left]:
                self.pace.end(self.prompts[i])
                del rows[i]
            if not found and min([*rows, *waiting], default=shard) >= shard:
                self.pace.whole(self.lengths[:shard])
                left = self.pace.n_left
                found = [self.pace.seconds_left(), self.now / (len(self.lengths) - left) * left, self.now]
        return found[0], found[1], self.now - found[2]


@pytest.mark.parametrize("slots", [1, 32, 256])
@pytest.mark.parametrize("seed", range(6))
def test_after_the_first_shard_it_is_good_to_a_quarter(slots, seed):
    said, _, took = Machine(max(600, 12 * slots), seed, slots=slots).run()
    assert said == pytest.approx(took, rel=0.25)


def test_what_is_slow_once_does_not_count():
    """The control: examples a second would count it."""
    said, naive, took = Machine(1500, 0, slots=32, start=20.0).run()
    assert said == pytest.approx(took, rel=0.25)
    assert naive > 1.5 * took


def paced(n_whole: int, seconds: float, n: int = 10_000) -> Pace:
    now = [0.0]
    pace = Pace(n, 10 * n, "cpu", clock=lambda: now[0])
    for _ in range(n_whole):
        pace.advance(50)
        pace.end(10)
    pace.whole([50] * n_whole)
    now[0] = seconds
    return pace


def test_it_is_said_once_in_round_words():
    pace = paced(100, 5.0)
    assert pace.say_once() == "about 8 min left for 9,900 examples"
    assert pace.say_once() is None
    assert paced(100, 100.0).say_once() == "about 2 h 47 min left for 9,900 examples"


def test_nothing_is_said_of_what_is_soon_over_or_of_what_little_was_seen():
    assert paced(100, 0.5).say_once() is None
    assert paced(ENOUGH - 1, 5.0).say_once() is None
    assert Pace(10, 100, "cpu").seconds_left() is None


def test_what_was_lost_to_a_lack_of_memory_counts_again():
    pace = paced(100, 5.0)
    pace.again(40, 400)
    assert (pace.n_left, pace.prompts_left, pace.seconds_left()) == (9940, 99_400, None)
