"""A trait's vector separates hedging tokens from certain ones on the bundled model, and placebo vectors do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.separation import SIDES, separation, units


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return separation(100, 60, lambda _: None)


def test_the_prompt_files_have_answers_of_both_sides(result: dict[str, Any]) -> None:
    assert all(result["answers"][side] >= 4 for side in SIDES)
    assert all(result["tokens"][side] >= 150 for side in SIDES)


def test_the_trait_vector_separates_tokens_at_every_layer_better_than_placebos(result: dict[str, Any]) -> None:
    for layer in result["layers"]:
        assert layer["of_tokens"]["trait"] > 0.62
        assert layer["of_tokens"]["beaten"] >= 0.95
        assert layer["of_answers"]["trait"] > 0.85


def test_placebos_separate_nothing(result: dict[str, Any]) -> None:
    for layer in result["layers"]:
        assert 0.42 < layer["of_tokens"]["median"] < 0.58
        assert layer["of_tokens"]["low"] < 0.45
        assert 0.3 < layer["of_answers"]["median"] < 0.7


def test_placebo_vectors_do_not_point_along_a_planted_trait() -> None:
    """Negative control of the placebos: they do not point along a planted trait, its own vector does."""
    generator = torch.Generator().manual_seed(0)
    rows_NLD = torch.randn(60, 2, 16, generator=generator)
    planted_LD = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator), dim=-1)
    unit_LDK = units(rows_NLD + 3 * planted_LD, rows_NLD[torch.randperm(60)] - 3 * planted_LD, 50)
    along_LK = torch.einsum("ld,ldk->lk", planted_LD, unit_LDK)
    assert (along_LK[:, 0] > 0.95).all()
    assert along_LK[:, 1:].abs().mean() < 0.6
