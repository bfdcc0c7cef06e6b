"""The estimate of the time left: close where lengths and speeds are known, and absent where too little was seen."""

from __future__ import annotations

import random

import pytest

from extraction.cli.terminal import rough_duration
from extraction.pipeline.pace import MIN_EXAMPLES, PROMPT_SHARE, ExamplePace, TokenPace

SHARE, SECONDS = PROMPT_SHARE["cpu"], 0.001


class SimulatedBatch:
    """Slots that make a token a row in every step, and read a prompt when a row begins; its clock is simulated."""

    def __init__(self, n: int, seed: int, *, slots: int, start: float = 0.0) -> None:
        rng = random.Random(seed)
        self.lengths = [min(400, 1 + int(rng.gammavariate(2, 40))) for _ in range(n)]
        self.prompts = [rng.randint(20, 60) for _ in range(n)]
        self.now, self.slots = start, slots
        self.pace = TokenPace(n, sum(self.prompts), "cpu", clock=lambda: self.now)

    def run(self, shard: int = 100) -> tuple[float | None, float, float]:
        """After the first shard: seconds left by the pace, by examples per second since the start, and true ones."""
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
                self.pace.end_example(self.prompts[i])
                del rows[i]
            if not found and min([*rows, *waiting], default=shard) >= shard:
                self.pace.end_shard(self.lengths[:shard])
                left = self.pace.n_left
                found = [self.pace.seconds_left(), self.now / (len(self.lengths) - left) * left, self.now]
        return found[0], found[1], self.now - found[2]


@pytest.mark.parametrize("slots", [1, 32, 256])
@pytest.mark.parametrize("seed", range(3))
def test_after_the_first_shard_it_is_within_a_quarter(slots, seed):
    estimate, _, took = SimulatedBatch(max(600, 12 * slots), seed, slots=slots).run()
    assert estimate == pytest.approx(took, rel=0.25)


def test_a_slow_start_does_not_count():
    """The control: examples per second since the start would count it."""
    estimate, naive, took = SimulatedBatch(1500, 0, slots=32, start=20.0).run()
    assert estimate == pytest.approx(took, rel=0.25)
    assert naive > 1.5 * took


def pace_after(n_ended: int, seconds: float, n: int = 10_000) -> TokenPace:
    now = [0.0]
    pace = TokenPace(n, 10 * n, "cpu", clock=lambda: now[0])
    for _ in range(n_ended):
        pace.advance(50)
        pace.end_example(10)
    pace.end_shard([50] * n_ended)
    now[0] = seconds
    return pace


def test_there_is_no_estimate_before_enough_was_seen():
    assert pace_after(MIN_EXAMPLES, 5.0).seconds_left() is not None
    assert pace_after(MIN_EXAMPLES - 1, 5.0).seconds_left() is None
    assert TokenPace(10, 100, "cpu").seconds_left() is None
    assert ExamplePace(10).seconds_left() is None


def test_examples_that_run_again_after_an_out_of_memory_error_count_again():
    pace = pace_after(100, 5.0)
    pace.rerun(40, 400)
    assert (pace.n_left, pace.prompt_tokens_left, pace.seconds_left()) == (9940, 99_400, None)


def test_equal_examples_take_equal_times_from_the_first_end_on():
    now = [0.0]
    pace = ExamplePace(12, clock=lambda: now[0])
    for now[0] in (100.0, 103.0, 106.0):  # the first is slow
        pace.advance(2)
    assert pace.seconds_left() == pytest.approx(9.0)
    pace.advance(-4)
    assert (pace.n_left, pace.seconds_left()) == (10, None)


def test_examples_that_end_together_give_no_estimate_until_the_next_batch_has_ended():
    now = [0.0]
    pace = ExamplePace(40, clock=lambda: now[0])
    for start in (10.0, 20.0):
        for i in range(8):
            now[0] = start + 0.001 * i
            pace.advance(1)
            assert (pace.seconds_left() is None) == (start == 10.0)
    now[0] = 25.0
    assert pace.seconds_left() == pytest.approx(10.0 * 3 - 5.0, rel=0.01)


def test_an_estimate_never_grows_while_nothing_ends():
    now = [0.0]
    pace = ExamplePace(100, clock=lambda: now[0])
    for now[0] in (1.0, 2.0):  # two end early, the others run on
        pace.advance(1)
    assert pace.seconds_left() == pytest.approx(98.0)
    shown = []
    for now[0] in (3.0, 3.9, 12.0, 22.0):
        pace.advance(0)
        shown.append(pace.seconds_left())
    assert shown == [pytest.approx(97.0), pytest.approx(96.1), None, None]


def test_durations_are_rounded_as_an_estimate_is_known():
    assert [rough_duration(seconds) for seconds in (4.4, 480, 10_020)] == ["4 s", "8 min", "2 h 47 min"]
