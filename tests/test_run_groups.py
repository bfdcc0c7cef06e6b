"""Run groups: whole shards in order, known from the plan alone; resumed, sliced and extended with the same bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import extraction.pipeline.run_groups
from extraction.core.progress import ProgressReporter
from extraction.engine.generate import generate
from extraction.model.loading import wrap
from extraction.model.memory import CPU_AUTO_BATCH, adjusted_batch_size
from extraction.pipeline import stages
from extraction.pipeline.executors.base import TraitCallback
from extraction.pipeline.executors.local import LocalExecutor
from extraction.pipeline.executors.slice import groups_of_slice, shards_of_slice
from extraction.pipeline.plan import MODES, GenerationMode, RunGroup, RunPlan, make_plan, shard_names
from extraction.pipeline.session import ModelSession
from extraction.storage.trait_run import trait_run
from extraction.utils_batch import Capture, Request
from tests.runs import Silent, contents, make_root, payloads, refused, succeed
from tests.tiny import deviation, prompts, shared_model

BOTH = ("--experiment", "demo", "--traits", "calm,warm", "--judge", "none", "--n-examples", "12")
SHORT = (*BOTH, "--max-new-tokens", "16", "--shard-size", "8", "--self-check", "0")
TRAITS = ("calm", "warm")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two traits, three shards each, in one queue: for tests that only read."""
    root = make_root(tmp_path_factory.mktemp("whole"))
    succeed("batched", "--root", root, *SHORT, "--queue-size", "100")
    return root / "experiments/demo"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A fresh root."""
    return make_root(tmp_path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A plan of both traits."""
    return make_plan("demo", "calm,warm", root=str(make_root(tmp_path_factory.mktemp("plan"))))


def sized(plan: RunPlan, n_examples: int, shard_size: int, queue_size: int) -> RunPlan:
    settings = plan.experiment.with_(n_examples=n_examples, shard_size=shard_size, queue_size=queue_size)
    return replace(plan, experiment=settings)


def keys(groups: Iterable[RunGroup]) -> list[tuple[str, int]]:
    return [(shard.trait.name, shard.index) for group in groups for shard in group]


def meta_of(experiment: Path, trait: str, index: int, stage: str = "activations") -> dict:
    return json.loads((experiment / trait / stage / f"{index:04d}.receipt.json").read_text())["meta"]


def rows_of(run: Path) -> list[dict]:
    paths = sorted((run / "responses/shards").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def forget(experiment: Path, *names: str) -> None:
    """Delete shards such as `calm/2`, as if the run had ended before them."""
    for name in names:
        trait, _, index = name.partition("/")
        for path in (experiment / trait).rglob(f"{int(index):04d}.*"):
            path.unlink()
        for path in (experiment / trait / "responses").glob("*.*"):
            path.unlink()


# --- the cut into groups --------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 90), st.integers(1, 5))
def test_groups_are_whole_shards_in_order_and_slices_part_them(plan, n_examples, shard_size, queue_size, n_slices):
    plan = sized(plan, n_examples, shard_size, queue_size)
    groups = plan.run_groups(MODES["batched"])
    assert keys(groups) == [(trait.name, i) for trait in plan.traits for i in range(len(plan.shards(trait)))]
    second = plan.traits[1]
    assert [shard.examples for group in groups for shard in group if shard.trait == second] == plan.shards(second)
    sizes = [[len(shard.examples) for shard in group] for group in groups]
    assert all(sum(size) <= queue_size or len(size) == 1 for size in sizes)
    assert all(sum(size) + after[0] > queue_size for size, after in pairwise(sizes))
    for mode in MODES.values():
        parts = [groups_of_slice(replace(plan, slice=(k, n_slices)), mode) for k in range(n_slices)]
        assert sorted(keys(group for part in parts for group in part)) == sorted(keys(plan.run_groups(mode)))
        own = [shards_of_slice(replace(plan, slice=(0, n_slices)), trait, mode) for trait in plan.traits]
        assert sum(map(len, own)) == len(keys(parts[0]))


def test_serial_groups_are_single_shards_and_stage_2_has_the_same_slice(plan):
    plan = replace(sized(plan, 20, 8, 100), slice=(1, 2))
    assert len(plan.run_groups(MODES["batched"])) == 1
    for name in ("responses", "combined"):
        groups = groups_of_slice(plan, MODES[name])
        assert [len(group) for group in groups] == [1] * 4
        alone = [replace(plan, traits=(trait,)) for trait in plan.traits]
        assert keys(groups) == [key for each in alone for key in keys(groups_of_slice(each, MODES[name]))]


def test_consecutive_shards_are_named_as_a_range(plan):
    shards = [shard for group in sized(plan, 20, 8, 100).run_groups(MODES["batched"]) for shard in group]
    assert shard_names(shards) == ["calm/0-4", "warm/0-4"]
    assert shard_names([*shards[:2], shards[3], *shards[6:]]) == ["calm/0-1", "calm/3", "warm/1-4"]
    assert shard_names([]) == []


# --- in the engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_requests_in_any_order_give_the_same(name):
    """Shortest prompt first: each one that enters is longer than what lies left of the cursor."""
    lm = wrap(shared_model(name))
    ids = sorted(prompts(11), key=len)
    requests = [Request(str(i), ids_T, 12) for i, ids_T in enumerate(ids)]
    capture = Capture((0, 1, 2))
    found = [
        {c.id: c for c in generate(lm, requests, batch_size=3, capture=capture, in_order=in_order)}
        for in_order in (True, False)
    ]
    for id, wanted in found[1].items():
        got = found[0][id]
        assert got.token_ids == wanted.token_ids
        for key, rows in wanted.activations.items():
            assert deviation(got.activations[key], rows) < 1e-5
    alone = [[c.id for c in generate(lm, requests, batch_size=1, in_order=in_order)] for in_order in (True, False)]
    assert alone[0] == [request.id for request in requests]
    assert alone[1] != alone[0]


# --- what runs ------------------------------------------------------------------------------------------------------


def test_a_group_gives_every_trait_the_responses_that_it_has_alone(whole, root):
    for trait in TRAITS:
        succeed("batched", "--root", root, *SHORT, "--trait", trait, "--queue-size", "1")
        alone, together = (payloads(path / trait, "responses") for path in (root / "experiments/demo", whole))
        assert alone == together
        assert [meta_of(whole, trait, i)["queue"] for i in range(3)] == [["calm/0-2", "warm/0-2"]] * 3
        assert [meta_of(root / "experiments/demo", trait, i)["queue"] for i in range(3)] == [
            [f"{trait}/{i}"] for i in range(3)
        ]


def test_a_group_that_lacks_shards_runs_again_whole_and_writes_only_those(whole, root):
    command = ("batched", "--root", root, *SHORT, "--queue-size", "100")
    succeed(*command)
    experiment = root / "experiments/demo"
    assert {trait: contents(experiment / trait) for trait in TRAITS} == {t: contents(whole / t) for t in TRAITS}
    forget(experiment, "calm/1", "warm/1")
    (experiment / "warm/activations/0002.receipt.json").unlink()  # killed between the two receipts
    kept = {path: path.stat().st_mtime_ns for path in experiment.rglob("0000.*")}
    stderr = succeed(*command).stderr
    assert re.search(r"2 traits: .* 48 .* 24 ", stderr)  # examples, and those that were done
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {trait: contents(experiment / trait) for trait in TRAITS} == {t: contents(whole / t) for t in TRAITS}


def test_a_shard_rerun_alone_has_the_same_tokens_and_records_its_group(whole, root, monkeypatch):
    """The control: a rerun set that leaves out what is committed shows in the receipts."""
    command = ("batched", "--root", root, *SHORT, "--queue-size", "100")
    succeed(*command)
    forget(root / "experiments/demo", "calm/2", "warm/1", "warm/2")
    monkeypatch.setattr(extraction.pipeline.run_groups, "rerun_set", extraction.pipeline.run_groups.pending_shards)
    succeed(*command)
    now, then = (payloads(path / "warm") for path in (root / "experiments/demo", whole))
    assert [name for name in then if name.startswith("responses/shards") and now[name] != then[name]] == []
    assert meta_of(root / "experiments/demo", "warm", 1)["together"] == ["calm/2", "warm/1-2"]
    assert "together" not in meta_of(whole, "warm", 1)


def test_a_trait_that_is_added_later_finds_the_others_done(root):
    def tokens(stdout: str) -> int:
        return int(re.search(r"([\d,]+) tokens at", stdout)[1].replace(",", ""))

    command = ("batched", "--root", root, *SHORT, "--queue-size", "100")
    first = tokens(succeed(*command, "--trait", "calm").stdout)
    calm = contents(root / "experiments/demo/calm")
    second = tokens(succeed(*command).stdout)
    assert contents(root / "experiments/demo/calm") == calm
    assert meta_of(root / "experiments/demo", "warm", 0)["queue"] == ["calm/0-2", "warm/0-2"]
    assert meta_of(root / "experiments/demo", "warm", 0)["together"] == ["warm/0-2"]
    warm = contents(root / "experiments/demo/warm")
    assert first + second == sum(
        len(row["token_ids"]) for trait in TRAITS for row in rows_of(root / "experiments/demo" / trait)
    )
    forget(root / "experiments/demo", "warm/1")
    assert tokens(succeed(*command).stdout) <= second
    assert contents(root / "experiments/demo/warm") == warm


def test_stored_responses_are_captured_before_their_group_and_take_no_part_in_it(root):
    succeed("generate", "--root", root, *SHORT, "--slice", "1/2")  # shards 0 and 2 of each
    generated = contents(root / "experiments/demo/calm/responses/shards")
    succeed("batched", "--root", root, *SHORT)
    experiment = root / "experiments/demo"
    now = contents(experiment / "calm/responses/shards")
    assert {name: now[name] for name in generated} == generated
    how = {i: meta_of(experiment, "warm", i) for i in range(3)}
    assert [how[i]["captured"] for i in range(3)] == ["from stored ids", "while generating", "from stored ids"]
    assert how[1]["together"] == ["calm/1", "warm/1"]
    before = contents(experiment / "warm")
    forget(experiment, "warm/1")
    succeed("batched", "--root", root, *SHORT)
    assert contents(experiment / "warm") == before


def test_a_group_that_runs_out_of_memory_repeats_its_uncommitted_shards(whole, root):
    command = ("batched", "--root", root, *SHORT, "--queue-size", "100", "--batch-size", "4")
    with RoomUntil(root / "experiments/demo", "calm/0"):
        assert succeed(*command).stderr.count("out of memory") == 1
    experiment = root / "experiments/demo"
    first, later = meta_of(experiment, "calm", 0), meta_of(experiment, "calm", 1)
    assert (first["batch_size"], "together" in first) == (4, False)
    assert (later["batch_size"], later["together"]) == (2, ["calm/1-2", "warm/0-2"])
    for trait in TRAITS:
        assert payloads(experiment / trait, "responses") == payloads(whole / trait, "responses")


class RoomUntil:
    """Once a shard is there, more than two rows of a prompt are too many."""

    def __init__(self, experiment: Path, name: str) -> None:
        trait, _, index = name.partition("/")
        self.receipt = experiment / trait / f"activations/{int(index):04d}.receipt.json"

    def __enter__(self) -> None:
        def hook(module: torch.nn.Module, _args: object, output: object) -> None:
            shape = output.shape if module.__class__.__name__ == "LlamaDecoderLayer" else (0, 0)
            if shape[0] > 2 and self.receipt.exists():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        self.handle = torch.nn.modules.module.register_module_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_slices_take_groups_and_one_without_any_names_the_option_that_helps(whole, root):
    sized = ("--queue-size", "16")
    succeed("batched", "--root", make_root(root / "one"), *SHORT, *sized)
    for part in ("2/4", "1/4", "3/4"):
        assert "--slice" not in succeed("batched", "--root", root, *SHORT, *sized, "--slice", part).stderr
    idle = succeed("batched", "--root", root, *SHORT, *sized, "--slice", "4/4")
    assert re.search("--slice 4/4: .* 3 .*--queue-size", idle.stderr)
    serial = succeed("generate", "--root", root, *SHORT, *sized, "--slice", "4/4")
    assert re.search("--slice 4/4: .*--shard-size", serial.stderr)
    succeed("batched", "--root", root, *SHORT, *sized)
    assert contents(root / "experiments") == contents(root / "one/experiments")
    for part, count in (("1/4", 1), ("4/4", 0)):
        planned = succeed("batched", "--root", root, *SHORT, *sized, "--slice", part, "--dry-run").stdout
        assert re.search(rf"examples .*\b{count} run group", planned)


class BackwardExecutor:
    """Runs the groups in reverse order."""

    def __init__(self, session: ModelSession, mode: GenerationMode, progress: ProgressReporter) -> None:
        self.local = LocalExecutor(session, mode, progress)

    def run(self, groups: Sequence[RunGroup], on_trait_end: TraitCallback | None = None) -> None:
        self.local.run(groups[::-1], on_trait_end)


def test_groups_give_the_same_bytes_in_any_order(tmp_path):
    """Assumptions of an executor."""
    options = {"n_examples": 12, "max_new_tokens": 16, "shard_size": 8, "queue_size": 16, "judge": "none"}
    for make_executor in (LocalExecutor, BackwardExecutor):
        root = make_root(tmp_path / make_executor.__name__)
        plan = make_plan("demo", "calm,warm", root=str(root), options=options, self_check=0)
        assert len(groups_of_slice(plan, MODES["batched"])) == 3
        result = stages.generate(plan, MODES["batched"], Silent(), make_executor=make_executor)
        assert [each.kept.total for each in result.traits] == [24, 24]
    found = [contents(tmp_path / name / "experiments") for name in ("LocalExecutor", "BackwardExecutor")]
    assert found[0] == found[1]


# --- what is refused, and what goes on ------------------------------------------------------------------------------


def test_a_locked_run_or_one_with_another_config_stops_all_before_anything_is_written(root):
    with trait_run(root / "experiments", "demo", "warm").lock():
        line = refused("batched", "--root", root, *SHORT, notes=("trait",))
    assert f"pid {os.getpid()}" in line
    assert [path.name for path in (root / "experiments").rglob("*") if path.is_file()] == [".lock", ".lock"]
    succeed("batched", "--root", root, *SHORT, "--trait", "warm", "--seed", "3")
    line = refused("batched", "--root", root, *SHORT, notes=("trait",))
    assert re.search(r"seed\b.*\b3\b.*\b0\b", line)
    assert not list((root / "experiments/demo/calm").rglob("*.json"))


def test_queue_size_is_pinned(root):
    succeed("batched", "--root", root, *SHORT)
    line = refused("batched", "--root", root, *SHORT, "--queue-size", "24", notes=("trait",))
    assert re.search(r"queue_size\b.*\b40\b.*\b24\b", line)


# --- the batch size after the first group -----------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("forecast", "taken", "free", "wanted"),
    [
        (8 * GB, 8 * GB, 10 * GB, 64),  # as forecast
        (8 * GB, int(9.5 * GB), 10 * GB, 32),  # too low, and hardly anything left
        (4 * GB, 6 * GB, 10 * GB, 64),  # too low, with room
        (9 * GB, int(9.5 * GB), 10 * GB, 64),  # near enough
    ],
)
def test_a_batch_that_took_more_than_was_forecast_is_halved_where_little_was_left(forecast, taken, free, wanted):
    assert adjusted_batch_size(64, forecast, taken, free) == wanted
    assert adjusted_batch_size(1, forecast, taken, free) == 1


def test_on_a_processor_nothing_is_adjusted_batch_size(root, monkeypatch):
    monkeypatch.setattr("extraction.model.memory.adjusted_batch_size", lambda *_: pytest.fail("adjusted_batch_size"))
    succeed("batched", "--root", root, *SHORT, "--batch-size", "auto", "--queue-size", "8", "--trait", "warm")
    assert meta_of(root / "experiments/demo", "warm", 2)["batch_size"] == CPU_AUTO_BATCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_right_forecast_is_not_adjusted_batch_size(root):
    succeed("batched", "--root", root, *SHORT, "--batch-size", "auto", "--queue-size", "8", "--device", "cuda")
    sizes = [meta_of(root / "experiments/demo", "calm", i)["batch_size"] for i in range(3)]
    assert sizes[0] == sizes[1]
    assert meta_of(root / "experiments/demo", "warm", 2)["device"] == "cuda"
