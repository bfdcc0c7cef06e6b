"""Rows that are read a block of layers at a time: the same vectors and cards as at once, in one pass and less memory.

Shapes: n rows, L layers, D hidden, C columns, B resamples, Q questions.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.processes import PEAK
from extraction.core.errors import StoreError, TraitError
from extraction.storage.lazy_tensors import LazyTensor
from extraction.storage.trait_run import TraitRun
from extraction.vectors import chunked
from extraction.vectors.bootstrap import Resamples, resample_questions, resampled_auroc
from extraction.vectors.card import build_card
from extraction.vectors.chunked import LayerBlock, RowsInMemory, layer_blocks, typical_norms
from extraction.vectors.method_table import METHODS
from extraction.vectors.methods import FUNCTIONS, fit_block, fit_layers
from extraction.vectors.metrics import project
from extraction.vectors.prepare import PreparedSides, prepare_sides
from tests.planted import gaussian, trait_rows
from tests.runs import environment

NAME = "residual.response_mean"
ROWS = trait_rows(questions=8, instructions=2, hidden=24, effect=3.0)
N, LAYERS, HIDDEN = ROWS.activations_nLD.shape
ONE_LAYER = 4 * N * HIDDEN


@dataclass(frozen=True)
class Counted:
    """Rows that record which layers are read."""

    rows_nLD: Tensor
    read: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        n, n_layers, hidden = self.rows_nLD.shape
        return n, n_layers, hidden

    def read_layers(self, layers: slice) -> Tensor:
        self.read.extend(range(*layers.indices(self.rows_nLD.shape[1])))
        return self.rows_nLD[:, layers].clone()


@pytest.fixture(params=[1, 2, 3])
def few_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit blocks to this many layers."""
    monkeypatch.setattr(chunked, "BLOCK_BYTES", request.param * ONE_LAYER)
    return int(request.param)


def store(path: Path, rows_nLD: Tensor, shard_size: int = 9) -> tuple[TraitRun, list[str]]:
    """Store activations in a run's folder, and return it with the rows' ids."""
    folder, ids = TraitRun(path), [f"row-{i}" for i in range(len(rows_nLD))]
    folder.open({"seed": 0})
    for index, start in enumerate(range(0, len(ids), shard_size)):
        some = slice(start, start + shard_size)
        folder.write_activations_shard(index, ids[some], {NAME: rows_nLD[some], "other": rows_nLD[some] + 1}, {})
    return folder, ids


def card(activations: object, **asked: object) -> dict:
    settings = {"methods": ["mean_diff", "pca", "random"], "bootstraps": 50, "label_shuffles": 2, "random_draws": 4}
    settings = {**settings, "layers": range(LAYERS), "instruction_ids": ROWS.instruction_ids, "seed": 0}
    return build_card(activations, ROWS.positive_n, ROWS.question_ids, **{**settings, **asked})


def alike(a: object, b: object) -> bool:
    """Return True for cards equal within 1e-12: sums over few columns round in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and isinstance(b, float) else a == b


# --- blocks


def test_blocks_cover_every_layer_once_and_stay_within_their_limit(few_layers: int):
    blocks = list(layer_blocks((N, LAYERS, HIDDEN)))
    assert [layer for block in blocks for layer in range(LAYERS)[block.layers]] == list(range(LAYERS))
    assert max(block.stop - block.start for block in blocks) == few_layers
    assert len(list(layer_blocks((10**9, 5, HIDDEN)))) == 5  # one layer at least


def test_layers_that_fit_are_one_block():
    assert list(layer_blocks((200, 26, 2304))) == [LayerBlock(0, 26, 26)]
    assert list(layer_blocks((0, 3, 8))) == [LayerBlock(0, 3, 3)]


# --- some layers == all layers


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_in_blocks_and_whole(name: str, few_layers: int):
    rows_nLD = torch.cat(ROWS.sides)
    n_positive = ROWS.counts[0]
    all_LD = FUNCTIONS[name](*ROWS.sides, seed=3)
    some_LD = fit_layers([name], RowsInMemory(rows_nLD), n_positive, seed=3)[name]
    torch.testing.assert_close(some_LD, all_LD, rtol=0, atol=1e-7 * float(all_LD.abs().max()))
    if name != "probe":  # all layers of a block stop at the same Newton step
        assert torch.equal(some_LD, all_LD)


def test_a_random_direction_depends_on_the_layer_index():
    sides = [side[:, 1:2] for side in ROWS.sides]
    here, elsewhere = (fit_block("random", *sides, LayerBlock(start, start + 1, LAYERS), seed=0) for start in (1, 0))
    assert torch.equal(here, FUNCTIONS["random"](*ROWS.sides, seed=0)[1:2])
    assert not torch.allclose(here.abs(), elsewhere.abs())


def test_a_card_is_the_same_for_any_block_size(few_layers: int, monkeypatch: pytest.MonkeyPatch):
    without_instruction_nLD = ROWS.activations_nLD + 0.1 * gaussian(*ROWS.activations_nLD.shape, seed=9)
    some = card(ROWS.activations_nLD, without_instruction_nLD=without_instruction_nLD)
    monkeypatch.undo()
    assert alike(some, card(ROWS.activations_nLD, without_instruction_nLD=without_instruction_nLD))
    assert not alike(
        some,
        card(ROWS.activations_nLD + 1e-6 * without_instruction_nLD, without_instruction_nLD=without_instruction_nLD),
    )


def test_a_card_reads_every_layer_once(few_layers: int):
    rows, stripped = Counted(ROWS.activations_nLD), Counted(ROWS.activations_nLD)
    found = card(rows, without_instruction_nLD=stripped)
    assert rows.read == stripped.read == list(range(LAYERS))
    assert found == card(ROWS.activations_nLD, without_instruction_nLD=ROWS.activations_nLD)


def test_typical_norms_are_means_over_all_rows(few_layers: int):
    assert torch.equal(typical_norms(RowsInMemory(ROWS.activations_nLD)), ROWS.activations_nLD.norm(dim=-1).mean(0))


def test_a_layer_without_a_difference_is_named_as_the_model_counts_it(few_layers: int):
    rows_nLD = ROWS.activations_nLD.clone()
    rows_nLD[:, LAYERS - 1] = 1.0
    with pytest.raises(TraitError, match=f"layer {10 + LAYERS - 1}"):
        card(rows_nLD, layers=range(10, 10 + LAYERS))


# --- from the disk


def test_stored_rows_are_the_rows_in_any_order(tmp_path: Path):
    folder, ids = store(tmp_path, ROWS.activations_nLD)
    stored = folder.open_activations(NAME)
    places = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:20].tolist()
    columns = [2, 0, 3]
    picked = stored.pick([ids[place] for place in places], columns)
    assert picked.shape == (20, 3, HIDDEN)
    assert torch.equal(picked.read_layers(slice(None)), ROWS.activations_nLD[places][:, columns])
    assert torch.equal(picked.read_layers(slice(1, 3)), ROWS.activations_nLD[places][:, columns[1:3]])
    assert torch.equal(
        stored.pick(stored.ids, range(ROWS.activations_nLD.shape[1])).read_layers(slice(None)), ROWS.activations_nLD
    )
    with pytest.raises(KeyError, match="unknown"):
        stored.pick(["unknown", ids[0]], columns).read_layers(slice(None))


def test_the_dtype_is_the_one_that_is_stored(tmp_path: Path):
    rows_nLD = ROWS.activations_nLD.bfloat16()
    folder, ids = store(tmp_path, rows_nLD)
    assert torch.equal(
        folder.open_activations(NAME).pick(ids, range(LAYERS)).read_layers(slice(1, 2)), rows_nLD[:, 1:2]
    )


def test_a_card_from_the_disk_is_the_card_from_memory(tmp_path: Path, few_layers: int):
    folder, ids = store(tmp_path, ROWS.activations_nLD)
    assert card(folder.open_activations(NAME).pick(ids, range(LAYERS))) == card(ROWS.activations_nLD)


def test_a_damaged_file_is_found_before_anything_is_read(tmp_path: Path):
    folder, _ = store(tmp_path, ROWS.activations_nLD)
    path = sorted((tmp_path / "activations").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"0001"):
        folder.open_activations(NAME)
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"0001"):
        folder.open_activations(NAME)


def opened(folder: TraitRun) -> LazyTensor:
    return folder.open_activations(NAME)


def test_a_file_that_changes_after_it_was_checked_is_refused(tmp_path: Path):
    folder, ids = store(tmp_path, ROWS.activations_nLD)
    picked = opened(folder).pick(ids, range(LAYERS))
    folder.write_activations_shard(0, ids[:9], {NAME: ROWS.activations_nLD[:9] + 1, "other": torch.zeros(9, 1)}, {})
    with pytest.raises(StoreError, match=r"0000"):
        picked.read_layers(slice(0, 1))
    changed = opened(folder).pick(ids, range(LAYERS)).read_layers(slice(0, 1))  # opened and checked again
    assert torch.equal(changed[:9], ROWS.activations_nLD[:9, :1] + 1)


READ = (
    PEAK
    + """
import sys
import torch, safetensors
from pathlib import Path
from extraction.storage.trait_run import TraitRun

folder, n_layers = TraitRun(Path(sys.argv[1])), int(sys.argv[2])
stored = folder.open_activations("residual.response_mean")
before = peak()
for step in (1, n_layers):
    for start in range(0, n_layers, step):
        stored.pick(stored.ids, range(n_layers)).read_layers(slice(start, start + step)).mean()
    print(peak() - before)
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="reads the peak memory of a child process from POSIX")
def test_peak_memory_is_a_layer_and_a_file_and_not_all(tmp_path: Path):
    """32 MiB in 16 files, 1 MiB a layer, and as much of another tensor beside it."""
    store(tmp_path, torch.ones(1024, 32, 256), shard_size=64)
    command = [sys.executable, "-c", READ, str(tmp_path), "32"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    one, all_ = map(float, result.stdout.split())
    assert one < 16  # a layer, a file, and some room
    assert all_ > 30


# --- against direct implementations


def prepared_directly(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
    rows_LnD = torch.cat([positive_NLD, negative_MLD]).double().transpose(0, 1)
    rows_LnD = rows_LnD - rows_LnD.mean(1, keepdim=True)
    return rows_LnD / rows_LnD.square().mean((1, 2), keepdim=True).sqrt()


def deviations_directly(sides: PreparedSides) -> Tensor:
    both = (sides.positive_LNR, sides.negative_LMR)
    return torch.cat([(side - side.mean(1, keepdim=True)) / (2 * side.shape[1]) ** 0.5 for side in both], 1)


def auroc_directly(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Compare every positive row with every negative one."""
    positive_n, counts_BQ = resamples.positive_n, resamples.counts_BQ
    above_NC, below_MC = scores_nC[positive_n], scores_nC[~positive_n]
    one_hot_NQ, one_hot_MQ = (
        torch.nn.functional.one_hot(resamples.question_n[positive_n == side], counts_BQ.shape[1]).double()
        for side in (True, False)
    )
    same_NM = (resamples.stratum_n[positive_n][:, None] == resamples.stratum_n[~positive_n]).double()
    columns = []
    for above_N, below_M in zip(above_NC.mT, below_MC.mT, strict=True):
        won_NM = ((above_N[:, None] > below_M).double() + (above_N[:, None] >= below_M).double()) / 2
        won_QQ, all_QQ = (one_hot_NQ.mT @ (same_NM * each) @ one_hot_MQ for each in (won_NM, torch.ones_like(won_NM)))
        won_B, all_B = (torch.einsum("bp,pr,br->b", counts_BQ, each, counts_BQ) for each in (won_QQ, all_QQ))
        columns.append(torch.where(all_B > 0, won_B / all_B, torch.nan))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("shape", [(40, 6, 192), (9, 3, 24), (1, 2, 8), (300, 2, 64)])
def test_projections_equal_one_einsum(shape: tuple[int, int, int]):
    rows_nLD, direction_KLD = gaussian(*shape, seed=0), gaussian(5, *shape[1:], seed=1)
    before = torch.einsum("nld,kld->nkl", rows_nLD.double(), direction_KLD.double())
    assert torch.equal(project(rows_nLD, direction_KLD), before)
    assert not torch.equal(project(rows_nLD.flip(1), direction_KLD), before)


def test_prepared_rows_equal_a_direct_implementation_and_arguments_are_unchanged():
    for dtype in (torch.float32, torch.float64):
        sides = [side.to(dtype) for side in ROWS.sides]
        copies = [side.clone() for side in sides]
        found = prepare_sides(*sides)
        assert torch.equal(found.rows_LnR, prepared_directly(*copies))
        assert torch.equal(torch.cat(list(found.deviations()), 1), deviations_directly(found))
        assert all(torch.equal(side, copy) for side, copy in zip(sides, copies, strict=True))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("questions", "strata"), [(7, 1), (7, 3), (60, 1), (1, 1)])
def test_resampled_auroc_equals_all_pairs(questions: int, strata: int, ties: bool):
    generator = torch.Generator().manual_seed(questions + strata)
    scores_nC = gaussian(60, 4, seed=questions)
    scores_nC = scores_nC.round() if ties else scores_nC
    positive_n = torch.rand(60, generator=generator) < 0.4
    asked = [i % questions for i in range(60)]
    resamples = resample_questions(positive_n, asked, count=40, seed=0)
    resamples = replace(resamples, stratum_n=torch.randint(strata, (60,), generator=generator))
    for each in (resamples, resamples.original()):
        torch.testing.assert_close(
            resampled_auroc(scores_nC, each), auroc_directly(scores_nC, each), rtol=0, atol=0, equal_nan=True
        )
