"""Intervals and tests of proportions, against scipy and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from extraction.amplification.stats import fisher_exact, holm, wilson

COUNTS = [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (1, 1000), (999, 1000), (437, 1000), (0, 1000), (25_000, 100_000)]


@pytest.mark.parametrize(("hits", "count"), COUNTS)
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_wilson_equals_scipy(hits: int, count: int, level: float) -> None:
    wanted = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    assert wilson(hits, count, level) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_contains_the_proportion_and_stays_within_0_and_1() -> None:
    for hits, count in COUNTS:
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high <= 1
        assert low < high


@given(st.integers(1, 60), st.integers(1, 60), st.data())
@settings(max_examples=200, deadline=None)
def test_fisher_equals_scipy(count: int, other: int, data: st.DataObject) -> None:
    hits, other_hits = data.draw(st.integers(0, count)), data.draw(st.integers(0, other))
    table = [[hits, count - hits], [other_hits, other - other_hits]]
    wanted = stats.fisher_exact(table).pvalue
    assert fisher_exact(hits, count, other_hits, other) == pytest.approx(wanted, rel=1e-6)
    assert fisher_exact(other_hits, other, hits, count) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("hits", "other_hits", "count"), [(0, 412, 1000), (3, 12, 1000), (0, 1, 1000), (300, 9000, 20_000)]
)
def test_fisher_equals_scipy_on_large_tables(hits: int, other_hits: int, count: int) -> None:
    wanted = stats.fisher_exact([[hits, count - hits], [other_hits, count - other_hits]]).pvalue
    assert fisher_exact(hits, count, other_hits, count) == pytest.approx(wanted, rel=1e-6)


def test_fisher_by_hand() -> None:
    """The lady who tastes tea: 3 of 4 against 1 of 4, of C(8, 4) = 70 tables."""
    assert fisher_exact(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert fisher_exact(3, 4, 1, 4) == pytest.approx((16 + 16 + 1 + 1) / 70)
    assert fisher_exact(2, 4, 2, 4) == pytest.approx(1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_multiplies_the_smallest_by_the_number_of_tests(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= new <= 1 for p, new in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert min(adjusted) == min(1.0, len(p_values) * min(p_values))


@pytest.mark.parametrize("call", [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(call: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{call[0]} of {call[1]}"):
        wilson(*call)
    if call[1]:
        with pytest.raises(ValueError, match=f"{call[0]} of {call[1]}"):
            fisher_exact(*call, 1, 2)
