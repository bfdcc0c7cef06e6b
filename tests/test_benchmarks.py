"""Tests of the measurements: all peers do the same job with equal answers, and the figures are written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedModel

from benchmarks.__main__ import main
from benchmarks.capture_cost import ratios
from benchmarks.captures import captures
from benchmarks.hardware import describe, linear_rate
from benchmarks.memory import many_rows, memory_growth
from benchmarks.peers import PEERS, Answers
from benchmarks.race import race
from benchmarks.reading_cost import agreement, reading_cost
from benchmarks.server import server_load
from benchmarks.shapes import random_model
from benchmarks.speculation import speculation
from benchmarks.tables import TABLES, save
from benchmarks.validation import card_cost
from benchmarks.workload import (
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Answer,
    bundled,
    compare,
    in_turn,
    make_requests,
    n_tokens,
    trait_requests,
)
from extraction.vectors.method_table import DEFAULT_METHODS
from tests.runs import succeed
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
N = 5
TOLERANCE = 1e-4


def say(_text: str) -> None:
    """Ignore the text."""


@pytest.fixture(scope="module")
def answers() -> dict[str, Answers]:
    """Return the answers of each peer at its smallest batch size."""
    lm = random_model("tiny")
    requests = make_requests(N, lm.vocab_size)
    return {name: peer.run(lm, requests, peer.sizes_for(N)[0]) for name, peer in PEERS.items()}


# --- the job and its peers ------------------------------------------------------------------------------------------


def test_requests_are_the_same_for_the_same_seed_and_within_their_limits() -> None:
    requests = make_requests(200, 97)
    assert requests == make_requests(200, 97)
    assert requests != make_requests(200, 97, seed=1)
    assert {len(request.token_ids) for request in requests} == set(range(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
    assert min(request.max_new_tokens for request in requests) >= RESPONSE_TOKENS[0]
    assert max(request.max_new_tokens for request in requests) == RESPONSE_TOKENS[1]
    assert 50 < n_tokens(requests) / 200 < 70


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_gives_each_row_its_own_number_of_tokens(answers: dict[str, Answers], name: str) -> None:
    requests = make_requests(N, 97)
    assert {key: len(answer.token_ids) for key, answer in answers[name].items()} == {
        request.id: request.max_new_tokens for request in requests
    }


@pytest.mark.parametrize("name", [name for name in PEERS if name != "serial"])
def test_every_peer_gives_the_answers_of_one_at_a_time(answers: dict[str, Answers], name: str) -> None:
    agreement = compare(answers[name], answers["serial"])
    assert (agreement.n_equal, agreement.n_compared) == (N, N)
    assert agreement.deviation < TOLERANCE


def test_padded_batches_smaller_than_the_job_give_the_same_answers(answers: dict[str, Answers]) -> None:
    lm = random_model("tiny")
    found = PEERS["batched"].run(lm, make_requests(N, lm.vocab_size), 4)
    assert compare(found, answers["serial"]).n_equal == N
    assert compare(found, answers["serial"]).deviation < TOLERANCE


def test_the_answers_are_worth_comparing(answers: dict[str, Answers]) -> None:
    """Not one token for ever, and not the same for everybody."""
    first = next(iter(answers["serial"].values()))
    assert len(set(first.token_ids)) > len(first.token_ids) // 4
    assert len({answer.token_ids for answer in answers["serial"].values()}) == N


def test_a_comparison_sees_another_token_and_another_mean(answers: dict[str, Answers]) -> None:
    right = answers["serial"]
    key, answer = next(iter(right.items()))
    other_token = {**right, key: replace(answer, token_ids=(*answer.token_ids[:-1], answer.token_ids[-1] ^ 1))}
    assert compare(other_token, right).n_equal == N - 1
    other_mean = {**right, key: Answer(answer.token_ids, answer.means_LD * 1.01)}
    assert compare(other_mean, right).deviation > 5e-3
    assert compare({}, right).n_compared == 0


# --- the figures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers_result() -> dict[str, Any]:
    """Return a comparison of one round."""
    found = race("tiny", n_examples=N, n_serial=2, repeats=1, say=say)
    return {"kind": "peers", "machine": describe(1), **found}


@pytest.mark.slow
def test_a_race_tells_every_peers_rate_and_that_all_agree(peers_result: dict[str, Any]) -> None:
    assert set(peers_result["peers"]) == set(PEERS)
    for peer in peers_result["peers"].values():
        rate = peer["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert peer["agreement"]["serial"]["n_equal"] == peer["agreement"]["serial"]["n_compared"] == 2
        assert peer["agreement"]["serial"]["deviation"] < TOLERANCE
    assert peers_result["peers"]["traitline"]["agreement"]["batched"]["n_equal"] == N
    assert peers_result["floor"] > peers_result["peers"]["traitline"]["tokens_per_second"]["max"]


def test_tables_and_json_are_written(peers_result: dict[str, Any], tmp_path: Path) -> None:
    path = save("peers-tiny", peers_result, tmp_path)
    assert json.loads(path.read_text()) == peers_result
    page = (tmp_path / "README.md").read_text()
    for peer in PEERS.values():
        assert f"| {peer.title} |" in page
    assert f"{N} of {N}" in page
    assert str(ROOT) not in page + path.read_text()


def test_pictures_are_written(peers_result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `bench`")
    from benchmarks.figures import draw

    capture = {"shape": "tiny", **ratios([(1.1, 1.0), (1.2, 1.1), (1.3, 1.4)])}
    memory = {"counts": [20, 40], "peak_mib": {"a": {"20": 1.0, "40": 2.0}}, "growth": {"a": 2.0}}
    for kind, result in {"peers": peers_result, "capture": capture, "memory": memory}.items():
        assert draw({**result, "kind": kind}, tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_of_pairs() -> None:
    found = ratios([(1.1, 1.0), (2.0, 2.0), (3.6, 3.0)])
    assert found["ratio"]["median"] == pytest.approx(1.1)
    assert (found["ratio"]["min"], found["ratio"]["max"]) == (pytest.approx(1.0), pytest.approx(1.2))
    assert found["ratio_of_quickest"] == pytest.approx(1.1)


def test_the_floor_is_a_rate() -> None:
    assert linear_rate(random_model("tiny"), 4, seconds=0.01) > 0


@pytest.mark.slow
def test_the_command_writes_the_cost_of_capture(tmp_path: Path) -> None:
    arguments = ["capture", "--shape", "tiny", "--threads", "1", "--repeats", "1", "--examples", "2"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "## What capture costs, tiny" in result.output
    assert json.loads((tmp_path / "capture-tiny.json").read_text())["pairs"] == 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads a child's memory as POSIX tells it")
def test_memory_is_measured_in_fresh_processes() -> None:
    found = memory_growth(counts=(8,), threads=1, say=say, large=(3, 16))
    assert all(peak > 50 for by_count in found["peak_mib"].values() for peak in by_count.values())
    assert all(growth == 1.0 for growth in found["growth"].values())
    assert "8 examples" in TABLES["memory"](found)


def test_the_memory_of_methods_and_traits_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all commands run in this process."""

    def run_here(words: Sequence[str], _folder: Path) -> float:
        said = succeed(*words).output
        assert "0 new" not in said
        return 10.0 * len(words)

    monkeypatch.setattr("benchmarks.memory.run_measured", run_here)
    found = many_rows((60, 2, 16), threads=1, say=say, n_traits=3)
    assert [name for name in found["cells"] if name.endswith(" vectors")] == [f"{m} vectors" for m in DEFAULT_METHODS]
    assert {"mean_diff vectors of 3 traits", "mean_diff card"} < set(found["cells"])
    memory = {"counts": [20], "peak_mib": {"a": {"20": 1.0}}, "growth": {"a": 1.0}, "many_rows": found}
    said = TABLES["memory"](memory)
    assert "60 examples, 2 layers of 16" in said
    assert "| mean_diff vectors of 3 traits |" in said


@pytest.mark.slow
def test_speculation_is_measured_and_greedy_answers_are_plain_ones(tmp_path: Path) -> None:
    found = speculation("tiny", n_examples=4, repeats=1, say=say, batch_sizes=(3,), max_new_tokens=6)
    assert [(cell["temperature"], cell["batch_size"]) for cell in found["cells"]] == [(0.0, 3), (0.7, 3)]
    for cell in found["cells"]:
        for name, side in cell["sides"].items():
            assert side["equal"] == (None if cell["temperature"] else [4, 4])
            assert side["ratio"]["median"] > 0
            assert name == "plain" or side["tokens_per_step"] >= 1
    assert found["cells"][0]["sides"]["draft"]["acceptance_rate"] > 0.1
    _written("speculation", found, tmp_path)


def _written(kind: str, found: dict[str, Any], folder: Path) -> None:
    """As the command writes it: figures, page, and a picture where matplotlib is."""
    result = {"kind": kind, "machine": describe(1), **found}
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.figures import draw

        assert draw(result, folder / f"{kind}-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(save(f"{kind}-tiny", result, folder).read_text()) == result
    assert TABLES[kind](result) in (folder / "README.md").read_text()


def test_questions_of_all_traits_are_asked_and_rounds_take_turns() -> None:
    lm = bundled("pocket")
    requests = trait_requests(lm, 30, 5)
    assert len({r.token_ids for r in requests}) == len({r.id for r in requests}) == 30
    assert in_turn(["a", "b", "c"], 4) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_a_cards_cost_is_measured_and_tabled() -> None:
    found = card_cost(["tiny"], n_traits=1, say=say, label_shuffles=1, bootstraps=20)
    assert found["shapes"]["tiny"]["seconds"] > 0
    assert "| tiny: 2 layers of 16, 200 rows | 1 |" in TABLES["validation"](found)


@pytest.mark.slow
def test_the_server_is_measured_and_tabled() -> None:
    options = ("--model", "pocket", "--max-new-tokens", "60")
    found = server_load(
        n_requests=4, repeats=1, threads=1, say=say, clients=4, paths=("/generate", "/generate/batch"), options=options
    )
    for endpoint in found["endpoints"].values():
        assert endpoint["one"]["tokens_per_second"] > 0
        assert endpoint["n_equal"] == 4
    said = TABLES["server"](found)
    assert "| /generate | 4 |" in said
    assert "4 of 4 answers equal" in said


@pytest.mark.slow
def test_reading_is_measured_and_equals_a_reading_by_hand(tmp_path: Path) -> None:
    found = reading_cost("tiny", n_examples=4, n_serial=2, repeats=1, say=say, batch_size=3)
    for name, each in found["agreement"].items():
        assert (each["n_equal"], each["n_compared"]) == (2, 2)
        assert name == "plain" or each["deviation"] < TOLERANCE
    assert [(each["of"], each["over"]) for each in found["ratios"]][-1] == ("attention", "by_hand")
    _written("reading", found, tmp_path)
    assert "2 of 2" in TABLES["reading"](found)


def test_a_reading_of_another_layer_is_noticed() -> None:
    projections = torch.randn(5, 3, 3, 2)
    theirs = {"a": ((1, 2), {"projections": projections[:, :, 0]})}
    assert agreement({"a": ((1, 2), {"projections": projections})}, theirs)["deviation"] == 0
    assert agreement({"a": ((1, 2), {"projections": projections.roll(1, 1)})}, theirs)["deviation"] > 0.1
    assert agreement({"a": ((1, 3), {"projections": projections})}, theirs)["n_equal"] == 0


@pytest.mark.slow
def test_captures_are_the_same_however_often_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all commands run in this process; `memory`, above, shows that they run in one of their own, too."""

    def run_here(words: Sequence[str], _folder: Path) -> float:
        succeed(*words)
        return 1.0

    monkeypatch.setattr("benchmarks.captures.run_measured", run_here)
    found = captures(repeats=1, threads=1, say=say, n_prompts=2, most=1, max_new_tokens=4)
    assert found["captures"] == 6
    assert found["equal"] == {side: [6, 6] for side in ("batched", "serial", "reloading")}
    processes = {side: each["processes"] for side, each in found["sides"].items()}
    assert processes == {"batched": 2, "serial": 2, "reloading": 6}
    cells = found["memory"]["cells"]
    assert cells["8 traits"]["projections_mib"] == pytest.approx(8 * cells["1 trait"]["projections_mib"])
    assert cells["1 trait, no attention"]["attention_mib"] == 0 < cells["1 trait"]["attention_mib"]
    save("monitoring", {"kind": "monitoring", "machine": describe(1), **found}, tmp_path)
    assert "6 of 6" in (tmp_path / "README.md").read_text()


# --- test_batching.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a user has it on disk."""
    folder = tmp_path_factory.mktemp("model")
    _save(tiny_model("llama", max_position_embeddings=1024), folder)
    return folder


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _invoke(*arguments: str) -> Result:
    sys.path.insert(0, str(ROOT))
    try:
        import test_batching
    finally:
        sys.path.remove(str(ROOT))
    return CliRunner().invoke(test_batching.main, [*arguments, "--n-prompts", "5", "--max-new-tokens", "6"])


@pytest.mark.slow
def test_the_script_runs_by_path_from_another_folder(model_folder: Path, tmp_path: Path) -> None:
    script = str(ROOT / "test_batching.py")
    options = ["--model", str(model_folder), "--n-prompts", "5", "--max-new-tokens", "6", "--batch-sizes", "2,4"]
    done = subprocess.run(
        [sys.executable, script, *options, "--threads", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Testing SERIAL generation..."
    assert lines[1].startswith("  Time: ")
    assert lines[1].endswith(" seconds")
    for size in (2, 4):
        start = lines.index(f"Testing BATCHED generation (batch_size={size})...")
        assert lines[start + 1].startswith("  Time: ")
        assert lines[start + 2].startswith("  Speedup: ")
        assert lines[start + 3] == "  Texts equal: 5 of 5"


def test_the_script_fails_when_texts_differ(model_folder: Path, tmp_path: Path) -> None:
    """Return a model whose generation config has a penalty that `model.generate` applies and the engine refuses."""
    model = tiny_model("llama", max_position_embeddings=1024)
    model.generation_config.no_repeat_ngram_size = 1
    _save(model, tmp_path)
    assert _invoke("--model", str(model_folder), "--batch-sizes", "2").exit_code == 0
    result = _invoke("--model", str(tmp_path), "--batch-sizes", "2")
    assert result.exit_code == 1, result.output
    assert "Texts equal: 5 of 5" not in result.output
    assert "First difference" in result.output


def test_the_script_refuses_an_unsupported_model(tmp_path: Path) -> None:
    assert _invoke("--batch-sizes", "4,x").exit_code == 2
    result = _invoke("--model", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith("traitline: model ")


def test_pytest_does_not_collect_the_script() -> None:
    source = (ROOT / "test_batching.py").read_text()
    assert "\ndef test_" not in source
    assert torch.__name__ not in source.split("if TYPE_CHECKING")[0]
