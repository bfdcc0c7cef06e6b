"""Many rows are processed in chunks: the same directions and metrics as at once, in less memory.

Shapes: n rows, L layers, D hidden, C columns, B resamples.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.processes import PEAK
from extraction.core.errors import ActivationError
from extraction.vectors import bootstrap, chunked, prepare
from extraction.vectors.bootstrap import resample_questions, resampled_auroc
from extraction.vectors.chunked import mean_over_rows, row_chunks, row_norms
from extraction.vectors.method_table import METHODS
from extraction.vectors.methods import FUNCTIONS
from extraction.vectors.metrics import project
from extraction.vectors.prepare import check_sides, prepare_sides
from extraction.vectors.splits import LabelledRows
from tests.planted import gaussian

POSITIVE, NEGATIVE = gaussian(230, 2, 24, seed=1) + 0.4, gaussian(171, 2, 24, seed=2)


@pytest.fixture(params=[7, 230, 400])
def few_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit chunks to this many rows of one layer, half as many of both: the sides begin anywhere in a chunk."""
    for name in ("CHUNK_BYTES", "NORM_CHUNK_BYTES"):
        monkeypatch.setattr(chunked, name, request.param * 24 * 8)
    monkeypatch.setattr(prepare, "NORM_CHUNK_BYTES", request.param * 24 * 8)
    return int(request.param)


def test_chunks_are_the_rows_in_order(few_rows: int):
    chunks = row_chunks(POSITIVE)
    assert torch.equal(torch.cat(chunks), POSITIVE)
    assert max(map(len, chunks)) == min(few_rows // 2, 230)
    both = prepare_sides(POSITIVE, NEGATIVE)
    assert torch.equal(torch.cat(both.row_chunks(), 1), both.rows_LnR)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_in_chunks_and_whole(name: str, few_rows: int, monkeypatch: pytest.MonkeyPatch):
    some_LD = FUNCTIONS[name](POSITIVE, NEGATIVE, seed=3)
    monkeypatch.undo()
    all_LD = FUNCTIONS[name](POSITIVE, NEGATIVE, seed=3)
    torch.testing.assert_close(some_LD, all_LD, rtol=0, atol=2e-7 * float(all_LD.abs().max()))
    assert name not in ("mean_diff", "random") or torch.equal(some_LD, all_LD)
    if name != "random":
        other_LD = FUNCTIONS[name](POSITIVE[:-7], NEGATIVE, seed=3)
        assert not torch.allclose(some_LD, other_LD, rtol=0, atol=2e-7 * float(all_LD.abs().max()))


def test_deviations_from_the_sides_means_are_the_same_in_chunks(few_rows: int, monkeypatch: pytest.MonkeyPatch):
    both = prepare_sides(POSITIVE, NEGATIVE)
    some_LnR = torch.cat(list(both.deviations()), 1)
    monkeypatch.undo()
    (all_LnR,) = both.deviations()
    assert torch.equal(some_LnR, all_LnR)
    assert float(all_LnR[:, :230].sum(1).abs().max()) < 1e-12 > float(all_LnR[:, 230:].sum(1).abs().max())


def test_means_norms_and_projections_are_the_same_in_chunks(few_rows: int):
    directions_KLD = gaussian(3, 2, 24, seed=5)
    wide = gaussian(900, 1, 200, seed=6).float()
    assert torch.equal(mean_over_rows(wide), wide.mean(0, dtype=torch.float64))
    assert torch.equal(row_norms(POSITIVE), POSITIVE.norm(dim=-1, dtype=torch.float64))
    at_once = torch.einsum("nld,kld->nkl", POSITIVE.double(), directions_KLD.double())
    torch.testing.assert_close(project(POSITIVE, directions_KLD), at_once, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(project(POSITIVE.flip(0), directions_KLD), at_once)


def test_a_nan_in_any_chunk_is_found_and_named(few_rows: int):
    broken = NEGATIVE.clone()
    broken[150, 1, 3] = torch.nan
    with pytest.raises(ActivationError, match=r"layer 1, row 150 .*negative.* 3 is nan"):
        check_sides(POSITIVE, broken)


def test_sides_are_views_where_the_positive_rows_come_first():
    both, first_n = torch.cat([POSITIVE, NEGATIVE]), torch.arange(401) < 230
    rows = LabelledRows(both, first_n, ("q",) * 401, (0,) * 401)
    assert all(map(torch.equal, rows.sides, (POSITIVE, NEGATIVE)))
    assert rows.sides[1].untyped_storage().data_ptr() == both.untyped_storage().data_ptr()
    order = torch.randperm(401, generator=torch.Generator().manual_seed(0))
    mixed = LabelledRows(both[order], first_n[order], ("q",) * 401, (0,) * 401)
    assert all(map(torch.equal, mixed.sides, (both[order][first_n[order]], both[order][~first_n[order]])))


# --- many questions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("questions", "strata"), [(7, 1), (7, 3), (60, 1), (60, 2), (1, 1)])
def test_wins_by_rank_are_wins_by_question(
    questions: int, strata: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(questions + strata)
    scores_nC = gaussian(60, 4, seed=questions)
    scores_nC = scores_nC.round() if ties else scores_nC
    positive_n = torch.rand(60, generator=generator) < 0.4
    resamples = resample_questions(positive_n, [i % questions for i in range(60)], count=40, seed=0)
    resamples = replace(resamples, stratum_n=torch.randint(strata, (60,), generator=generator))
    found = []
    for most in (0, 10**9):
        monkeypatch.setattr(bootstrap, "MAX_PAIRS_PER_ROW", most)
        monkeypatch.setattr(bootstrap, "CHUNK_NUMBERS", 500)
        found.append([resampled_auroc(scores_nC, each) for each in (resamples, resamples.original())])
    for by_rank, by_question in zip(*found, strict=True):
        torch.testing.assert_close(by_rank, by_question, rtol=0, atol=0, equal_nan=True)
    assert questions == 1 or not torch.equal(found[0][0], resampled_auroc(-scores_nC, resamples))


# --- memory ---------------------------------------------------------------------------------------------------------

FIT = (
    PEAK
    + """
import sys
import torch
from extraction.vectors import chunked
from extraction.vectors.method_table import METHODS
from extraction.vectors.methods import FUNCTIONS

torch.set_num_threads(1)
chunked.CHUNK_BYTES = int(sys.argv[2])
rows = torch.randn(24000, 1, 384, generator=torch.Generator().manual_seed(0))
small = rows[::60]
FUNCTIONS[sys.argv[1]](small[:200] + 0.1, small[200:], seed=0)  # memory of the libraries themselves
before = peak()
FUNCTIONS[sys.argv[1]](rows[:12000] + 0.1, rows[12000:], seed=0)
print(peak() - before)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads the peak memory of a child process from POSIX")
def test_a_method_has_one_float64_copy_of_its_rows() -> None:
    """70 MiB of rows, 18 MiB for a copy of the positive side, and chunks; at once, two more copies of the rows."""

    def grown(name: str, chunk_bytes: int) -> float:
        command = [sys.executable, "-c", FIT, name, str(chunk_bytes)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    for name in ("ica", "gradient"):
        assert grown(name, 2**22) < 70 + 18 + 70, name
    assert grown("ica", 2**40) > 70 + 18 + 2 * 70
