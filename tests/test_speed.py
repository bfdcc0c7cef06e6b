"""Tests of the roofline, scaling and GPU measurements and of isolated peers, with tiny models on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import peer_processes
from benchmarks.__main__ import DTYPES, ISOLATED_PEERS, JOBS, LOCAL_PEERS, SHAPES, main
from benchmarks.gpu import Plan, gpu_job
from benchmarks.hardware import Limits, describe, limits, threads
from benchmarks.peers import PEERS, Peer, static
from benchmarks.published import forecast_table
from benchmarks.race import Comparison, Selection, race, run_all, select_peers
from benchmarks.roofline import Sizes, decode_seconds, forced_seconds, roofline
from benchmarks.scaling import AXES, Job, fit_line, fitted, job_at, scaling, whole_runs
from benchmarks.shapes import HALF, config_of, dtype_of, lacking, random_model
from benchmarks.shapes import SHAPES as KNOWN
from benchmarks.tables import TABLES, TITLES, page, save
from benchmarks.workload import compare, make_even_requests, make_requests
from extraction.model.memory import shape_of
from tests.runs import succeed

N = 5
QUICK = Limits(bytes_per_second=1e10, flops_per_second=1e11)
PLAIN = """
import sys

sys.path.insert(0, {scripts!r})
import torch
from protocol import budgets, cut, left_padded, responses, serve, settings
from transformers import AutoModelForCausalLM

def load(setup):
    print("libraries talk")
    model = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(rows, batch_size):
        tokens = {{}}
        for piece in cut(rows, batch_size):
            ids, mask = left_padded(piece)
            stops = budgets(piece, ids.shape[1])
            out = model.generate(ids, attention_mask=mask, stopping_criteria=stops, **settings(piece))
            tokens |= responses(piece, out, ids.shape[1])
        if any(row["max_new_tokens"] > 140 for row in rows):
            raise SystemExit("too long for me")
        means = {{row["id"]: torch.full((3, 32), float(len(tokens[row["id"]]))) for row in rows}}
        return tokens, means if {means} else {{}}

    return run

serve(load)
"""


def say(_text: str) -> None:
    """Ignore the text."""


def probe(_device: str, _dtype: torch.dtype) -> Limits:
    """Limits that take no time."""
    return QUICK


def written(kind: str, found: dict[str, Any], folder: Path) -> str:
    """Write the files as the command does; return the page."""
    result = {"kind": kind, "machine": describe(1), **found}
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.figures import draw

        assert draw(result, folder / f"{kind}-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(save(f"{kind}-tiny", result, folder).read_text()) == result
    assert TABLES[kind](result) in page(folder)
    return page(folder)


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_the_large_shapes_have_the_sizes_of_their_models() -> None:
    """Without weights. Gemma-2-2B has 2.61 thousand million parameters, Llama-3-8B 8.03."""
    assert shape_of(config_of("2b"), torch.bfloat16).n_parameters == 2_614_341_888
    assert shape_of(config_of("8b"), torch.bfloat16).n_parameters == 8_030_261_248
    assert (dtype_of("2b"), dtype_of("pocket"), dtype_of("2b", "float32")) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert set(SHAPES) == set(KNOWN)


def test_a_shape_that_does_not_fit_is_left_out_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.free_memory", lambda _device: 2**30)
    assert lacking("tiny", torch.float32, "cpu") is None
    assert "8b in bfloat16 needs" in str(lacking("8b", torch.bfloat16, "cpu"))
    result = CliRunner().invoke(main, ["roofline", "--shape", "8b", "--threads", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1.0 GiB are free on cpu: skipped" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_large_shapes_weights_are_poured_and_the_model_answers_as_transformers_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HALF, "tiny-gemma", torch.bfloat16)
    lm = random_model("tiny-gemma", dtype=torch.float32)
    model: Any = lm.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert 0.7 < float(weight.std()) * weight.shape[1] ** 0.5 / 1.5 < 1.3
    requests = make_requests(3, lm.vocab_size)
    answers = [PEERS[name].run(lm, requests, 3) for name in ("traitline", "serial")]
    assert compare(*answers).n_equal == 3
    assert compare(*answers).deviation < 1e-4


# --- the roofline ---------------------------------------------------------------------------------------------------


def test_a_floor_is_the_longer_of_bytes_and_operations() -> None:
    limit = Limits(bytes_per_second=10.0, flops_per_second=100.0)
    assert (limit.floor(50.0, 100.0), limit.bound(50.0, 100.0)) == (5.0, "memory")
    assert (limit.floor(50.0, 1000.0), limit.bound(50.0, 1000.0)) == (10.0, "arithmetic")


def test_limits_are_measured_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(1):
        found = limits("cpu", torch.float32, seconds=0.01, read_bytes=2**22)
    assert found.bytes_per_second > 1e8
    assert found.flops_per_second > 1e8
    assert torch.get_num_threads() == before


def test_bytes_and_operations_of_a_step_equal_a_count_by_hand() -> None:
    """tiny: 3 layers of 4 heads of 8 and 2 of keys, 32 wide, an MLP of 64, 97 tokens, the head tied."""
    sizes = Sizes.of_model(random_model("tiny"))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert (sizes.body, sizes.head) == (3 * layer + 32, 97 * 32)
    assert (sizes.cache_bytes, sizes.query_width) == (3 * 2 * 2 * 8 * 4, 3 * 4 * 8)
    step = sizes.decode_step(rows=5, columns=70)
    weights = 3 * layer + 32 + 97 * 32
    assert step.n_bytes == 4 * weights + 5 * 70 * sizes.cache_bytes
    assert step.flops == 2 * 5 * weights + 4 * 5 * 70 * 96
    forced = sizes.forced_pass(rows=2, tokens=10)
    assert (forced.n_bytes, forced.flops) == (4 * sizes.body, 2 * 20 * sizes.body + 2 * 2 * 100 * 96)


def test_a_head_of_its_own_is_counted_and_its_embeddings_are_not() -> None:
    """8B, from its config alone: the table of embeddings is looked up, not read."""
    config = config_of("8b")
    sizes = Sizes.of(config, torch.bfloat16)
    assert sizes.body + 2 * sizes.head == shape_of(config, torch.bfloat16).n_parameters
    assert sizes.decode_step(1, 0).n_bytes == 2 * (sizes.body + sizes.head)


def test_steps_and_passes_are_measured_over_their_floors(tmp_path: Path) -> None:
    found = roofline("tiny-gemma", repeats=1, say=say, batch_sizes=(1, 3), probe=probe, most_threads=2)
    assert [(cell["pass"], cell["batch_size"]) for cell in found["cells"]] == [
        ("decode step", 1),
        ("teacher-forced pass", 1),
        ("decode step", 3),
        ("teacher-forced pass", 3),
    ]
    for cell in found["cells"]:
        assert cell["over_floor"] == pytest.approx(cell["seconds"]["min"] / cell["floor_seconds"])
        assert cell["floor_seconds"] == QUICK.floor(cell["n_bytes"], cell["flops"])
    assert set(found["by_threads"]) == {"1", "2"}
    assert "with 2 threads 10.0 GB/s and 100 GFLOP/s" in written("roofline", found, tmp_path)


def test_a_step_is_timed_without_its_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that counts columns, a step takes 1 and a prefill 60; the step's time must not hold any prefill."""
    lm, clock = random_model("tiny"), [0.0]

    def advance(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        clock[0] += kwargs["input_ids"].shape[1]

    assert forced_seconds(lm, 2, 16) > 0
    handle = lm.model.register_forward_pre_hook(advance, with_kwargs=True)
    monkeypatch.setattr("benchmarks.roofline.time.perf_counter", lambda: clock[0])
    try:
        assert decode_seconds(lm, 4, 3) == decode_seconds(lm, 4, 20) == 1.0
        assert decode_seconds(lm, 2, 5, captures=False) == 1.0
    finally:
        handle.remove()


def test_the_forecasts_of_the_document_are_those_of_the_published_figures() -> None:
    text = (Path(peer_processes.__file__).parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    assert forecast_table() in text
    assert "| T4 | 320 |" in forecast_table()


# --- how time grows -------------------------------------------------------------------------------------------------


def test_a_linear_fit_is_found_and_a_bend_is_reported() -> None:
    exact = fit_line((1, 2, 4), (3.0, 5.0, 9.0))
    assert exact["start"] == pytest.approx(1.0)
    assert exact["slope"] == pytest.approx(2.0)
    assert exact["largest_deviation"] < 1e-9
    assert fit_line((1, 2, 4, 8), (1.0, 4.0, 16.0, 64.0))["largest_deviation"] > 0.2


def test_every_axis_changes_one_thing() -> None:
    lm = random_model("tiny")
    for axis in AXES.values():
        chosen = fitted(axis, lm, most=300)
        jobs = [vars(job_at(chosen, point)) for point in chosen.points]
        changed = {key for job in jobs for key in job if job[key] != jobs[0][key]}
        assert changed == {axis.field}
        assert max(job["n_examples"] for job in jobs) <= 300
    assert fitted(AXES["layers"], lm, most=100).points == (0, 1, 3)


def run_here(words: Sequence[str], _folder: Path) -> float:
    """A command in this process, with a peak that grows; `test_benchmarks` has one in a process of its own."""
    succeed(*words)
    return 100.0 + int(words[words.index("--n-examples") + 1])


def test_growth_is_measured_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: replace(axis, job=Job(4, 6, 3, 2)) for name, axis in AXES.items()}
    short["length"] = replace(short["length"], points=(2, 4, 8))
    monkeypatch.setattr("benchmarks.scaling.AXES", short)
    monkeypatch.setattr("benchmarks.scaling.COUNTS", (2, 6))
    monkeypatch.setattr("benchmarks.scaling.run_measured", run_here)
    found = scaling("tiny", repeats=2, threads=1, say=say, most=4)
    assert found["axes"]["batch"]["points"] == [1, 2, 4]
    examples = found["axes"]["examples"]
    assert (examples["points"], examples["peak_mib"]) == ([2, 4], [101.0, 102.0])
    assert all(seconds > 0 for seconds in examples["seconds"])
    page = written("scaling", found, tmp_path)
    assert "Layers captured" in page
    assert "the peak of memory changes by **+1 MiB**" in page


def test_a_whole_run_answers_every_example_at_full_length_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, set[int]]] = []

    def look(words: Sequence[str], folder: Path) -> float:
        assert not (folder / "experiments").exists()
        succeed(*words)
        rows = [
            json.loads(line)
            for path in (folder / "experiments").rglob("responses/shards/*.jsonl")
            for line in path.read_text().splitlines()
        ]
        seen.append((len(rows), {len(row["token_ids"]) for row in rows}))
        return 1.0

    monkeypatch.setattr("benchmarks.scaling.run_measured", look)
    whole_runs("tiny", counts=(2, 6), repeats=1, threads=1, say=say)
    assert seen == [(2, {40}), (6, {40})]


# --- the GPU's job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpus_job_runs_from_end_to_end_on_a_processor(dtype: torch.dtype, tmp_path: Path) -> None:
    plan = Plan(n_examples=N, new_tokens=7, n_serial=2, batch_sizes=(2, 4), step_batch=3, step_tokens=6, pairs=2)
    found = gpu_job(
        "tiny-gemma", device="cpu", dtype=dtype, repeats=2, say=say, plan=replace(plan, static=True), probe=probe
    )
    assert set(found["peers"]) == {"traitline", "batched", "static", "serial"}
    for peer in found["peers"].values():
        assert peer["agreement"]["serial"]["n_compared"] == 2
        assert dtype == torch.bfloat16 or peer["agreement"]["serial"]["n_equal"] == 2
        assert peer["agreement"]["serial"]["deviation"] < (1e-4 if dtype == torch.float32 else 0.1)
    assert (found["tokens"], found["step"]["batch_size"], found["capture"]["pairs"]) == (7 * N, 3, 2)
    assert "all would take" in written("gpu", found, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_job_runs_on_one() -> None:
    plan = Plan(n_examples=N, new_tokens=7, n_serial=2, batch_sizes=(4,), step_batch=3, step_tokens=6, pairs=2)
    found = gpu_job("tiny-gemma", device="cuda", dtype=torch.float32, repeats=1, say=say, plan=plan)
    assert found["peers"]["traitline"]["agreement"]["serial"]["n_equal"] == 2
    assert found["step"]["over_floor"] > 1


def test_a_static_cache_gives_the_same_answers() -> None:
    lm = random_model("tiny")
    requests = make_even_requests(3, lm.vocab_size, 10, 6)
    assert compare(static(lm, requests, 2), PEERS["serial"].run(lm, requests, 1)).n_equal == 3


# --- peers in processes of their own --------------------------------------------------------------------------------


def plain_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, means: bool) -> None:
    """An process_ of ours in the place of nnsight: plain transformers, in this very environment."""
    script = PLAIN.format(scripts=str(peer_processes.SCRIPTS), means=means)
    (tmp_path / "with_nnsight.py").write_text(script)
    monkeypatch.setattr(peer_processes, "SCRIPTS", tmp_path)
    monkeypatch.setattr(peer_processes, "environment", lambda _name, _say: Path(sys.executable))
    recipe = replace(peer_processes.RECIPES["nnsight"], packages=("safetensors",), batch_sizes=(2, 4))
    monkeypatch.setitem(peer_processes.RECIPES, "nnsight", recipe)


@pytest.mark.slow
def test_an_isolated_peer_runs_and_gets_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_peer(tmp_path, monkeypatch, means=False)
    lm = random_model("tiny")
    requests = [replace(request, max_new_tokens=4 + i) for i, request in enumerate(make_requests(N, lm.vocab_size))]
    with peer_processes.peer_processes_for(["nnsight"], lm, requests, say) as found:
        peer, installed = found["nnsight"]
        field = {name: replace(PEERS[name], batch_sizes=(4,)) for name in ("traitline", "serial", "batched")}
        raced = run_all(Comparison(field | {"nnsight": peer}, lm, requests, 2), repeats=1, scouts=1, say=say)
    assert installed["torch"] == torch.__version__
    figures = raced["peers"]["nnsight"]
    assert figures["agreement"]["batched"]["n_equal"] == N
    assert figures["agreement"]["batched"]["deviation"] < 1e-4
    assert figures["ratio"]["median"] > 0
    result = {"shape": "tiny", **raced, "floor": 1.0, "versions": {"nnsight": installed}, "left_out": ["vllm"]}
    text = written("peers", result, tmp_path)
    assert "In environments of their own: nnsight (torch " in text
    assert "Not available: vllm." in text


@pytest.mark.slow
def test_an_isolated_peers_means_are_read_and_its_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_peer(tmp_path, monkeypatch, means=True)
    lm = random_model("tiny")
    requests = [replace(request, max_new_tokens=5) for request in make_requests(3, lm.vocab_size)]
    with peer_processes.peer_processes_for(["nnsight"], lm, requests, say) as found:
        peer: Peer = found["nnsight"][0]
        answers = peer.run(lm, requests, 2)
        assert {float(answer.means_LD.max()) for answer in answers.values()} == {5.0}
        assert compare(answers, PEERS["serial"].run(lm, requests, 1)).deviation > 0.1
        with pytest.raises(peer_processes.PeerMissingError, match="nnsight ended: too long for me"):
            peer.run(lm, [replace(requests[0], max_new_tokens=150)], 1)


def test_an_isolated_peer_that_does_not_start_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_peer(tmp_path, monkeypatch, means=False)
    (tmp_path / "with_nnsight.py").write_text("raise ImportError('no such library')")
    said: list[str] = []
    lm = random_model("tiny")
    with peer_processes.peer_processes_for(["nnsight"], lm, make_requests(2, lm.vocab_size), said.append) as found:
        assert found == {}
    assert said == ["  nnsight is left out: nnsight ended: ImportError: no such library"]


@pytest.mark.slow
def test_an_isolated_peer_that_rejects_the_model_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_peer(tmp_path, monkeypatch, means=False)
    said: list[str] = []
    lm = random_model("tiny")
    requests = [replace(request, max_new_tokens=150) for request in make_requests(2, lm.vocab_size)]
    with peer_processes.peer_processes_for(["nnsight"], lm, requests, said.append) as found:
        assert found == {}
    assert said == ["  nnsight is left out: nnsight ended: too long for me"]


def test_environments_are_kept_in_the_platforms_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peer_processes.cache_folder() == tmp_path / "traitline-benchmarks"
    folder = peer_processes.cache_folder() / f"vllm-{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True)
    wanted = {"packages": list(peer_processes.RECIPES["vllm"].packages), "torch": torch.__version__}
    (folder / peer_processes.READY).write_text(json.dumps(wanted))
    assert folder in peer_processes.environment("vllm", say).parents


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_offers_every_peer() -> None:
    assert set(ISOLATED_PEERS) == set(peer_processes.RECIPES)
    assert set(JOBS) == set(TABLES) == set(TITLES)
    assert all(dtype == "auto" or isinstance(getattr(torch, dtype), torch.dtype) for dtype in DTYPES)
    scripts = {path.stem.removeprefix("with_") for path in peer_processes.SCRIPTS.glob("with_*.py")}
    assert scripts == set(ISOLATED_PEERS)
    result = CliRunner().invoke(main, ["peers", "--with", "vllm,lens"])
    assert result.exit_code == 2
    assert "'lens'" in result.stderr


@pytest.mark.slow
def test_chosen_peers_race_and_the_page_names_the_others(tmp_path: Path) -> None:
    found = race(
        "tiny", n_examples=4, n_serial=2, repeats=1, say=say, selection=Selection(only=("continuous",), sizes=(3,))
    )
    assert list(found["peers"]) == ["traitline", "serial", "continuous"]
    assert [peer["batch_size"] for peer in found["peers"].values()] == [3, 1, 3]
    assert all(set(peer["agreement"]) == {"serial"} for peer in found["peers"].values())
    assert found["peers"]["continuous"]["agreement"]["serial"]["n_equal"] == 2
    text = written("peers", found, tmp_path)
    assert "Not run: batched." in text
    assert "| 2 of 2 |  | " in text


def test_peers_are_chosen_by_name_or_all_local_ones() -> None:
    everybody = list(PEERS)
    assert tuple(everybody) == LOCAL_PEERS
    assert select_peers((), ()) == (everybody, [])
    assert select_peers((), ("vllm",)) == (everybody, ["vllm"])
    assert select_peers(("batched", "vllm"), ()) == (["traitline", "serial", "batched"], ["vllm"])
    assert select_peers(("traitline", "vllm"), ("nnsight", "vllm")) == (["traitline", "serial"], ["nnsight", "vllm"])


def test_names_that_are_not_known_are_all_refused() -> None:
    result = CliRunner().invoke(main, ["peers", "--only", "batched,lens,vllm,torch"])
    assert result.exit_code == 2
    assert "'lens', 'torch'" in result.stderr


def test_vllm_is_started_again_with_its_threads_bound_and_once_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(peer_processes.SCRIPTS))
    script = importlib.import_module("with_vllm")
    monkeypatch.setattr(script, "OPENMP", tmp_path / "libiomp5.so")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert script.prepared() == {}  # no such library
    script.OPENMP.touch()
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {7, 5}, raising=False)
    added = script.prepared()
    assert added["LD_PRELOAD"] == str(script.OPENMP)
    assert added["KMP_AFFINITY"].endswith("proclist=[5]")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "KMP_AFFINITY" not in script.prepared()
    monkeypatch.setenv("LD_PRELOAD", str(script.OPENMP))
    assert script.prepared() == {}


def three_peers_and(extra: Peer) -> dict[str, Peer]:
    """Return three local peers and an extra one."""
    return {name: PEERS[name] for name in ("traitline", "serial", "batched")} | {"extra": extra}


def test_a_peer_whose_process_ends_is_left_out() -> None:
    lm = random_model("tiny")
    said: list[str] = []

    def ends(*_: Any) -> Any:
        raise peer_processes.PeerMissingError("the extra peer ended: empty log")

    peers = {name: PEERS[name] for name in ("traitline", "serial", "batched")} | {
        "extra": Peer("An extra peer", ends, (2,))
    }
    found = run_all(Comparison(peers, lm, make_requests(4, lm.vocab_size), 2), repeats=1, scouts=2, say=said.append)
    assert set(found["peers"]) == {"traitline", "serial", "batched"}
    assert [line for line in said if "left out" in line] == ["  left out: the extra peer ended: empty log"]


def test_a_peer_whose_process_ends_in_a_round_is_left_out_of_the_rounds_before() -> None:
    lm = random_model("tiny")
    runs: list[int] = []

    def tires(*given: Any) -> Any:
        runs.append(1)
        if len(runs) > 2:
            raise peer_processes.PeerMissingError("the extra peer ended: tired")
        return PEERS["batched"].run(*given)

    peers = {name: PEERS[name] for name in ("traitline", "serial", "batched")} | {
        "extra": Peer("An extra peer", tires, (2,))
    }
    found = run_all(Comparison(peers, lm, make_requests(4, lm.vocab_size), 2), repeats=3, scouts=1, say=say)
    assert (len(runs), set(found["peers"])) == (3, {"traitline", "serial", "batched"})
