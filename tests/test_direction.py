"""Direction: laws of its arithmetic, copies, and errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extraction.core.errors import VectorError
from extraction.storage.trait_run import TraitRun
from extraction.vectors.direction import Direction, format_layers

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
LAYERS = (2, 3, 7)


def of(values: list[list[float]], layers: tuple[int, ...] = LAYERS, **labels: Any) -> Direction:
    return Direction(torch.tensor(values), layers, **labels)


DIRECTIONS = st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=3, max_size=3).map(of)


@QUICK
@given(DIRECTIONS, DIRECTIONS)
def test_laws_of_sums(a, b):
    assert a + b == b + a
    negative = -a
    assert -negative == a
    assert 2 * a == a + a == a * 2
    assert a - b == a + -b
    assert (a - a).norms_L.tolist() == [0, 0, 0]
    assert a / 2 == 0.5 * a
    back = (a + b) - b
    error = (back.direction_LD - a.direction_LD).abs().max()
    assert error <= 1e-6 * (a.norms_L.max() + b.norms_L.max())


@QUICK
@given(DIRECTIONS)
def test_laws_of_length(a):
    if not a.norms_L.all():
        with pytest.raises(VectorError, match=r"layer [237]"):
            a.normalised()
        return
    unit = a.normalised()
    torch.testing.assert_close(unit.norms_L, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(unit.normalised().direction_LD, unit.direction_LD, rtol=0, atol=1e-6)
    for other, cosine in ((a, 1.0), (-a, -1.0), (unit, 1.0), (3 * a, 1.0)):
        torch.testing.assert_close(
            a.cosine(other), torch.full((3,), cosine, dtype=torch.float64), rtol=0, atol=1e-5, check_dtype=True
        )
    torch.testing.assert_close(a.normalised([1, 2, 3]).norms_L, torch.tensor([1.0, 2, 3]).double(), rtol=1e-6, atol=0)


def test_wrong_laws_fail():
    a, b = of([[1.0, 2], [3, 4], [5, 6]]), of([[1.0, 0], [0, 1], [1, 1]])
    assert a + b != a - b
    assert 2 * a != a
    assert abs(float(a.cosine(b)[0]) - 1) > 0.1
    assert a != of([[1.0, 2], [3, 4], [5, 6]], layers=(2, 3, 8))
    assert a != of([[1.0, 2], [3, 4], [5, 6]], model="other")


def test_a_zero_vector_has_no_cosine():
    a = of([[1.0, 0], [0, 0], [0, 1]])
    assert a.cosine(a).isnan().tolist() == [False, True, False]


def test_a_layer_is_found_by_its_own_number():
    a = of([[1.0, 2], [3, 4], [5, 6]])
    assert a.at(7).tolist() == [5, 6]
    assert a.select([3, 7]) == of([[3.0, 4], [5, 6]], layers=(3, 7))
    assert Direction.from_layers({7: torch.tensor([5.0, 6]), 2: torch.tensor([1.0, 2]), 3: torch.tensor([3.0, 4])}) == a
    with pytest.raises(VectorError, match=r"layer 0: .*layers 2-3, 7"):
        a.at(0)


def test_it_cannot_be_changed():
    values = torch.ones(1, 2)
    a = Direction(values, (0,))
    values[0, 0] = 9
    a.at(0)[1] = 9
    assert a == of([[1.0, 1]], layers=(0,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.layers = (1,)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


ONE = of([[1.0, 2], [3, 4], [5, 6]], trait="calm", method="pca", model="m")


@pytest.mark.parametrize(
    ("other", "value"),
    [
        (of([[1.0], [2], [3]]), "of 2 and 1 values"),
        (of([[1.0, 2], [3, 4]], layers=(2, 3)), "layers 2-3, 7 and at layers 2-3"),
        (of([[1.0, 2], [3, 4], [5, 6]], model="n"), "m and n"),
    ],
)
def test_directions_that_do_not_fit_are_refused(other, value):
    for work in (lambda: ONE + other, lambda: ONE - other, lambda: ONE.cosine(other)):
        with pytest.raises(VectorError, match=value):
            work()


def test_labels_of_a_sum():
    other = of([[1.0, 0], [0, 1], [1, 1]], trait="warm", method="pca")
    total = ONE + other
    assert (total.trait, total.method, total.model) == ("calm + warm", "pca", "m")
    assert (ONE + ONE).trait == "calm"
    assert (2 * ONE).trait == "calm"


@pytest.mark.parametrize(
    ("values", "layers", "value"),
    [
        ([[1.0]], (), r"layers \[\]"),
        ([[1.0]], (-1,), r"layers \[-1\]"),
        ([[1.0], [2]], (1, 0), r"layers \[1, 0\]"),
        ([[1.0], [2]], (1, 1), r"layers \[1, 1\]"),
        ([[1.0]], (0, 1), r"float32 \[1, 1\] at 2 layers"),
        ([[1]], (0,), "int64 \\[1, 1\\]"),
        ([[]], (0,), r"float32 \[1, 0\]"),
        ([[1.0], [float("nan")]], (0, 4), "layer 4 "),
        ([[float("inf")]], (0,), "layer 0 "),
    ],
)
def test_invalid_directions_raise_vector_error(values, layers, value):
    with pytest.raises(VectorError, match=value):
        Direction(torch.tensor(values), layers)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_or_zero_divisors_are_refused(factor):
    with pytest.raises(VectorError, match=str(factor)):
        factor * ONE
    with pytest.raises(VectorError, match=str(factor)):
        ONE / factor
    with pytest.raises(VectorError, match="layer 2 "):
        ONE * 1e300
    with pytest.raises(VectorError, match="over 0"):
        ONE / 0


@pytest.mark.parametrize("factor", ["2", None, True, ONE])
def test_only_numbers_scale(factor):
    with pytest.raises(TypeError):
        _ = ONE * factor


def test_values_of_any_float_type_are_kept_as_float32():
    assert Direction(torch.ones(1, 2, dtype=torch.bfloat16), (0,)).direction_LD.dtype == torch.float32
    assert Direction(torch.ones(1, 2, dtype=torch.float64), (0,)) == of([[1.0, 1]], layers=(0,))


def test_it_fits_models_of_its_size_only():
    ONE.check_fits(8, 2, "m")
    with pytest.raises(VectorError, match=r"layer 7; .* m is 6"):
        ONE.check_fits(7, 2, "m")
    with pytest.raises(VectorError, match=r"of 2 values; .*\b3"):
        ONE.check_fits(8, 3, "m")


def test_a_run_gives_its_vectors(tmp_path: Path):
    run = TraitRun(tmp_path)
    run.open({"model": {"name": "m"}})
    labels = {"trait": "calm", "method": "pca", "model": "m"}
    run.write_vectors("pca", {"direction": ONE.direction_LD}, {**labels, "layers": [2, 3, 7]})
    found = Direction.from_run(run, "pca")
    assert found == ONE == Direction.from_run(tmp_path, "pca")
    assert found.at(3).tolist() == [3, 4]
    assert (found.trait, found.method, found.model) == ("calm", "pca", "m")
    with pytest.raises(VectorError, match="'probe'; it has pca"):
        Direction.from_run(run, "probe")
    run.write_vectors("odd", {"other": ONE.direction_LD}, labels)
    with pytest.raises(VectorError, match=r"odd\.safetensors: "):
        Direction.from_run(run, "odd")


def test_layers_are_formatted_as_spans():
    assert format_layers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
