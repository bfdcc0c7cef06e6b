"""The dynamics of a response: laws that hold for any trajectory, and trajectories whose answer is known.

Integers make the arithmetic exact, so laws hold to the last bit. Shapes: T tokens, L layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extraction.monitoring import dynamics as dynamics_module
from extraction.monitoring.dynamics import (
    SUMMARY,
    WINDOW,
    acceleration,
    commitment_point,
    dynamics,
    noise,
    persistence,
    smoothed,
    velocity,
)

INTEGERS = st.integers(-1000, 1000)
TRAJECTORIES = st.lists(INTEGERS, max_size=40)
FACTORS = st.sampled_from([-64, -2, -1, -0.5, 0.25, 1, 2, 1024])  # powers of two: exact
laws = settings(max_examples=100, deadline=None)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal to the last bit, NaN where the other has NaN."""
    return np.array_equal(left, right, equal_nan=True)


def white(n: int, seed: int) -> np.ndarray:
    """Independent normal noise."""
    return np.random.default_rng(seed).standard_normal(n)


def wander(n: int, coefficient: float, seed: int) -> np.ndarray:
    """An AR(1) trajectory after a burn-in of 200 tokens."""
    x_T = white(n + 200, seed)
    for t in range(1, len(x_T)):
        x_T[t] += coefficient * x_T[t - 1]
    return x_T[200:]


# --- velocity and acceleration ---------------------------------------------------------------------------------------


@given(TRAJECTORIES, INTEGERS)
@laws
def test_a_constant_added_changes_no_velocity(x_T: list[int], constant: int) -> None:
    assert same(velocity(np.add(x_T, constant)), velocity(x_T))
    assert same(acceleration(np.add(x_T, constant)), acceleration(x_T))


@given(TRAJECTORIES, FACTORS)
@laws
def test_a_factor_scales(x_T: list[int], factor: float) -> None:
    assert same(velocity(np.multiply(x_T, factor)), factor * velocity(x_T))
    assert same(acceleration(np.multiply(x_T, factor)), factor * acceleration(x_T))


@given(TRAJECTORIES)
@laws
def test_reversing_negates_velocity_and_keeps_acceleration(x_T: list[int]) -> None:
    assert same(velocity(x_T[::-1])[1:], -velocity(x_T)[:0:-1])
    assert same(acceleration(x_T[::-1])[2:], acceleration(x_T)[:1:-1])


@given(TRAJECTORIES)
@laws
def test_velocities_add_up_to_the_way_and_are_nan_exactly_where_nothing_came_before(x_T: list[int]) -> None:
    v_T, a_T = velocity(x_T), acceleration(x_T)
    assert len(v_T) == len(a_T) == len(x_T)
    assert np.isnan(v_T).tolist() == [t < 1 for t in range(len(x_T))]
    assert np.isnan(a_T).tolist() == [t < 2 for t in range(len(x_T))]
    if x_T:
        assert np.nansum(v_T) == x_T[-1] - x_T[0]


@given(TRAJECTORIES, st.data())
@laws
def test_a_later_token_changes_nothing_before_it(x_T: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(x_T)))
    for measure in (velocity, acceleration, smoothed):
        assert same(measure(x_T[:cut]), measure(x_T)[:cut])


def test_by_hand() -> None:
    x_T = [1.0, 4.0, 9.0, 16.0, 25.0, 36.0]
    assert velocity(x_T).tolist()[1:] == [3, 5, 7, 9, 11]
    assert acceleration(x_T).tolist()[2:] == [2, 2, 2, 2]
    assert smoothed(x_T).tolist() == [1, 2.5, 14 / 3, 7.5, 11, 18]
    assert noise(x_T) == pytest.approx(7 / 0.6745 / math.sqrt(2))


def test_float32_loses_nothing_and_the_argument_stays_as_it_was() -> None:
    x_T = np.array([1e8, 1e8 + 8, 3], dtype=np.float32)
    before = x_T.copy()
    for measure in (velocity, acceleration, smoothed, noise, persistence):
        measure(x_T)
    assert velocity(x_T)[1] == 8
    assert np.array_equal(x_T, before)
    assert velocity(x_T).dtype == np.float64


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_the_deviation_of_white_noise_and_ignores_steps() -> None:
    x_T = 3 * white(5000, seed=0)
    assert noise(x_T) == pytest.approx(3, rel=0.05)
    assert noise(x_T + 1000 * (np.arange(5000) > 2500)) == pytest.approx(3, rel=0.05)
    assert noise([]) == noise([7.0]) == 0.0
    assert noise(np.arange(10) > 4) == 0.0


# --- commitment ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(WINDOW, 30), st.integers(1, 50), st.integers(1, 50), st.booleans())
@laws
def test_a_step_commits_within_the_window_after_it(before: int, after: int, low: int, high: int, falls: bool) -> None:
    sign = -1 if falls else 1
    found = commitment_point(sign * np.array([-low] * before + [high] * after), 0)
    late = 0 if not before else next(k for k in range(WINDOW) if _mean_after(before, k, low, high) > 0)
    assert late < WINDOW
    assert found == (before + late if after - late >= WINDOW else None)


def _mean_after(before: int, k: int, low: int, high: int) -> float:
    """The trailing mean k tokens after the step's first."""
    seen = ([-low] * before + [high] * (k + 1))[-WINDOW:]
    return sum(seen) / len(seen)


def test_a_step_half_way_is_seen_two_tokens_late() -> None:
    assert commitment_point([-1.0] * 10 + [1.0] * 10, 0.0) == 12
    assert commitment_point([0.0] * 10 + [1.0] * 10, 0.5) == 12


@pytest.mark.parametrize("seed", range(20))
def test_a_step_in_noise_commits_within_the_window(seed: int) -> None:
    x_T = white(60, seed) + np.where(np.arange(60) < 25, -4, 4)
    found = commitment_point(x_T, 0.0)
    assert found is not None
    assert 25 <= found <= 25 + WINDOW - 1


@given(TRAJECTORIES, INTEGERS, INTEGERS, FACTORS)
@laws
def test_commitment_moves_with_its_threshold(x_T: list[int], threshold: int, constant: int, factor: float) -> None:
    wanted = commitment_point(x_T, threshold)
    assert commitment_point(np.add(x_T, constant), threshold + constant) == wanted
    assert commitment_point(np.multiply(x_T, factor), factor * threshold) == wanted


@given(TRAJECTORIES, INTEGERS)
@laws
def test_from_the_commitment_on_the_mean_stays_on_one_side_and_before_it_did_not(x_T: list[int], level: int) -> None:
    found = commitment_point(x_T, level)
    if found is None:
        return
    side_T = np.sign(smoothed(np.subtract(x_T, level)))
    assert len(x_T) - found >= WINDOW
    assert set(side_T[found:]) in ({1.0}, {-1.0})
    assert found == 0 or side_T[found - 1] != side_T[-1]
    assert np.sign(np.mean(x_T[found:]) - level) == side_T[-1]


def share_committed(make: Callable[[int], np.ndarray], n: int = 400) -> float:
    """Of n trajectories around 0."""
    return float(np.mean([commitment_point(make(seed), 0.0) is not None for seed in range(n)]))


@pytest.mark.parametrize(("length", "most"), [(20, 0.07), (50, 0.04), (150, 0.04)])
def test_noise_around_the_threshold_does_not_commit(length: int, most: float) -> None:
    assert share_committed(lambda seed: white(length, seed)) < most


def test_without_the_clearance_noise_does_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics_module, "CLEARANCE", 0.0)
    assert share_committed(lambda seed: white(50, seed)) > 0.3


def test_an_autocorrelated_series_commits_more_often_than_noise() -> None:
    shares = [share_committed(lambda seed, phi=phi: wander(50, phi, seed)) for phi in (0.0, 0.3, 0.6)]
    assert shares[0] < 0.04 < shares[1] < 0.2 < shares[2]


EDGES = {
    "no token": ([], None),
    "one token": ([5], None),
    "shorter than the window": ([5] * (WINDOW - 1), None),
    "as long as the window": ([5] * WINDOW, 0),
    "above throughout": ([5] * 20, 0),
    "on the threshold throughout": ([0] * 20, None),
    "ends on the threshold": ([5] * 10 + [0] * 5, None),
    "from the threshold up": ([0] * 10 + [5] * 10, 10),
    "touches the threshold": ([5] * 6 + [-20] + [5] * 10, 11),  # the mean is exactly 0 while -20 is in the window
    "crosses in the last window": ([-5] * 20 + [5] * (WINDOW + 1), None),
    "crosses just before it": ([-5] * 20 + [5] * (WINDOW + 2), 22),
    "one outlier": ([5] * 10 + [-6] + [5] * 10, 0),
    "swings about the threshold": ([5, -5] * 15, None),
    "the mean is carried by tokens before the commitment": ([-999, 300, 300, 300, -99, -99, 11, 11, 11, 11, 11], None),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges_of_commitment(case: str) -> None:
    x_T, wanted = EDGES[case]
    assert commitment_point(x_T, 0.0) == wanted
    assert commitment_point(np.negative(x_T), 0.0) == wanted


# --- persistence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [-0.5, 0.0, 0.3, 0.8, 0.95])
def test_an_ar1_trajectory_gives_back_its_coefficient(coefficient: float) -> None:
    assert persistence(wander(20_000, coefficient, seed=1)) == pytest.approx(coefficient, abs=0.02)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_short_trajectories_have_the_documented_bias(coefficient: float) -> None:
    found = [persistence(wander(30, coefficient, seed)) for seed in range(600)]
    assert np.mean(found) == pytest.approx(coefficient - (1 + 4 * coefficient) / 30, abs=0.02)


@given(st.lists(INTEGERS, min_size=3, max_size=40), INTEGERS, FACTORS)
@laws
def test_persistence_has_no_unit_and_no_arrow(x_T: list[int], constant: int, factor: float) -> None:
    found = persistence(x_T)
    if found is None:
        assert len(set(x_T)) == 1
        return
    assert -1 < found < 1
    assert persistence(np.multiply(x_T, factor) + constant) == pytest.approx(found, abs=1e-9)
    assert persistence(x_T[::-1]) == pytest.approx(found, abs=1e-9)


def test_persistence_by_hand_and_where_there_is_none() -> None:
    assert persistence([1, 2, 3, 4]) == pytest.approx((0.75 - 0.25 + 0.75) / 5)
    assert persistence([1, -1] * 50) == pytest.approx(-0.99)
    assert persistence([]) is persistence([1.0]) is persistence([1.0, 2.0]) is None
    assert persistence([0.1] * 7) is None
    assert persistence(np.array([0.1] * 7, dtype=np.float32)) is None
    assert persistence([1e-200, 3e-200, 2e-200]) == pytest.approx(persistence([1, 3, 2]))


def test_shuffled_the_persistence_is_gone() -> None:
    x_T = wander(5000, 0.9, seed=2)
    assert persistence(np.random.default_rng(0).permutation(x_T)) == pytest.approx(0, abs=0.05)


# --- the summary -----------------------------------------------------------------------------------------------------


def test_a_summary_by_hand() -> None:
    rises = [0.0] * 10 + [8.0] * 10
    falls = [1.0, 7.0] + [-3.0] * 18
    first, second = dynamics(np.array([rises, falls]).T, [4.0, 0.0])
    assert first == {
        "mean": 4.0,
        "first": 0.0,
        "last": 8.0,
        "peak": 8.0,
        "peak_token": 10,
        "peak_velocity": 8.0,
        "peak_velocity_token": 10,
        "mean_speed": pytest.approx(8 / 19),
        "peak_acceleration": 8.0,
        "commitment": 12,
        "committed_to": 1,
        "persistence": pytest.approx((17 * 16 + 16 - 16) / 320),
    }
    assert (second["peak"], second["peak_token"]) == (7.0, 1)
    assert (second["peak_velocity"], second["peak_velocity_token"], second["peak_acceleration"]) == (-10.0, 2, -16.0)
    assert (second["commitment"], second["committed_to"]) == (4, -1)


@given(st.integers(0, 12), st.integers(0, 4), st.integers(0, 2**31), st.booleans())
@laws
def test_any_response_is_ready_for_json(n_tokens: int, n_layers: int, seed: int, flat: bool) -> None:
    x_TL = np.zeros((n_tokens, n_layers)) if flat else np.random.default_rng(seed).normal(size=(n_tokens, n_layers))
    found = dynamics(x_TL.astype(np.float32), np.zeros(n_layers))
    assert len(found) == n_layers
    assert all(tuple(summary) == SUMMARY for summary in found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {type(value) for summary in found for value in summary.values()} <= {float, int, type(None)}


def test_a_layer_is_summed_up_alone() -> None:
    x_TL = np.random.default_rng(3).normal(size=(30, 4))
    levels_L = [0.1, -0.2, 0.3, 0.0]
    alone = [dynamics(x_TL[:, [i]], [level])[0] for i, level in enumerate(levels_L)]
    assert dynamics(x_TL, levels_L) == alone
    assert dynamics(x_TL[:, ::-1], levels_L) != alone


def test_trajectories_that_are_not_finite_have_no_figures() -> None:
    none = dict.fromkeys(SUMMARY)
    assert dynamics(np.zeros((0, 2)), [0.0, 0.0]) == [none, none]
    for broken in (np.nan, np.inf):
        x_TL = np.ones((10, 2))
        x_TL[3, 0] = broken
        first, second = dynamics(x_TL, [0.0, 0.0])
        assert first == none
        assert second["commitment"] == 0
        assert dynamics(np.ones((10, 1)), [broken]) == [none]


def test_few_tokens_have_few_numbers() -> None:
    (one,) = dynamics([[2.0]], [0.0])
    assert {key for key, value in one.items() if value is not None} == {"mean", "first", "last", "peak", "peak_token"}
    (two,) = dynamics([[2.0], [5.0]], [0.0])
    assert {key for key, value in two.items() if value is None} == {
        *("peak_acceleration", "commitment", "committed_to", "persistence")
    }
    assert (two["peak_velocity"], two["peak_velocity_token"], two["mean_speed"]) == (3.0, 1, 3.0)


def test_shapes_that_do_not_match_are_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        dynamics(np.zeros((5, 2)), [0.0])
    with pytest.raises(AssertionError):
        velocity(np.zeros((5, 2)))
