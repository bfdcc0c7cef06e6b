"""Whole runs on a tiny model: the stages agree with one another, and nothing is done twice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from tests.runs import (
    MODEL_LINES,
    TRAIT,
    contents,
    environment,
    invoke,
    make_extracted_root,
    payloads,
    refused,
    room_for,
    succeed,
)
from tests.tiny import deviation

COUNT = 48  # 24 of each polarity, in shards of 20, two in a run group


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    """A copy of its root, for tests that go on from there."""
    return make_extracted_root(tmp_path)


def run_of(root: Path, experiment: str = "demo", trait: str = "calm") -> Path:
    return root / "experiments" / experiment / trait


def rows_of(run: Path, polarity: str) -> list[dict]:
    return [json.loads(line) for line in (run / "responses" / f"{polarity}.jsonl").read_text().splitlines()]


def activations_of(run: Path) -> dict[str, torch.Tensor]:
    """Every row of the default pooling, by example."""
    found = {}
    for path in sorted((run / "activations").glob("*.safetensors")):
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        ids = json.loads(header["__metadata__"]["ids"])
        found.update(zip(ids, load_file(path)["residual.response_mean"], strict=True))
    return found


def test_extract_runs_every_stage_and_a_second_one_runs_none(root):
    first = succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    run = run_of(root)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*") if path.name != ".lock"}
    second = succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*") if path.name != ".lock"}
    files = {path: stamp for path, stamp in before.items() if path.is_file()}
    assert {path: after[path] for path in files} == files
    assert {path for path in after if path.is_file()} == set(files)
    assert second.stderr == ""
    assert first.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]
    assert succeed("verify", run).exit_code == 0


class CountedTokenizer:
    """Counts, by content, the conversations that are rendered while it is active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import PreTrainedTokenizerFast

        self.rendered: Counter[tuple[str, ...]] = Counter()
        self.encoded: Counter[str] = Counter()
        render, encode = PreTrainedTokenizerFast.apply_chat_template, PreTrainedTokenizerFast.__call__

        def counted_render(tokenizer, conversation, *args, **kwargs):
            self.rendered[tuple(message["content"] for message in conversation)] += 1
            return render(tokenizer, conversation, *args, **kwargs)

        def counted_encode(tokenizer, text, *args, **kwargs):
            self.encoded[text] += 1
            return encode(tokenizer, text, *args, **kwargs)

        monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counted_render)
        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted_encode)


def test_each_prompt_is_rendered_and_encoded_once_and_responses_are_filtered_once(root, monkeypatch):
    """24 examples of each side: 2 instructions x 12 questions, and the 12 questions without an instruction."""
    from extraction.pipeline import score

    counted, filtered, real = CountedTokenizer(monkeypatch), [], score.filter_responses
    monkeypatch.setattr(score, "filter_responses", lambda *a, **k: filtered.append(1) or real(*a, **k))
    succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    questions = {f"{question}" for question in TRAIT["questions"]}
    prompts = {contents: n for contents, n in counted.rendered.items() if contents[-1] in questions}
    assert sorted(map(len, prompts)) == [1] * 12 + [2] * COUNT
    assert set(prompts.values()) == {1}
    assert counted.rendered.total() - len(prompts) <= 4  # two probes of the template, two outlines (roles): no more
    texts = {row["prompt"] for side in ("pos", "neg") for row in rows_of(run_of(root), side)}
    assert len(texts) == COUNT
    assert {counted.encoded[text] for text in texts} == {1}
    assert len(filtered) == 1
    succeed(
        "extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo"
    )  # nothing to do: nothing is encoded
    assert {counted.encoded[text] for text in texts} == {1}
    assert len(filtered) == 2


def test_a_run_with_nothing_to_do_imports_no_torch(extracted):
    end = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    code = f"{end}; from extraction.cli.commands import main; main()"
    for command, imports_torch in (
        (["extract", "--samples-per-coef", "2"], False),
        (["vectors", "--method", "random"], True),
    ):
        arguments = [sys.executable, "-c", code, *command, "--root", extracted, "--experiment", "demo"]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment())
        assert result.stdout.splitlines()[-1] == str(imports_torch), result.stdout


def test_the_summary_prints_the_paths_and_figures_of_the_files(finished):
    root = finished.parents[2]
    lines = succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo").stdout.splitlines()
    text = "\n".join(lines)
    card = json.loads((finished / "vectors/card.json").read_text())
    assert lines[0] == "calm on tiny"
    for place in ("responses", "activations", "vectors"):
        assert str(finished / place) in text
    kept = {side: [row for row in rows_of(finished, side) if _kept(row, side)] for side in ("pos", "neg")}
    n_pos, n_neg = len(kept["pos"]), len(kept["neg"])
    assert re.search(rf"kept +{n_pos + n_neg} of {COUNT} .*lexical.* 50\b[^.]* {n_pos} [^.]* {n_neg} ", text)
    assert re.search(rf"best .*{card['chosen']['layer']} .*{card['chosen']['method']}", text)
    auroc, effect = (card["chosen"]["test"][name] for name in ("auroc", "cohens_d"))
    interval = f"({auroc['low']:.2f} to {auroc['high']:.2f})"
    assert f"AUROC {auroc['value']:.2f} {interval}, Cohen's d {effect['value']:.2f}" in text
    assert re.search(rf"verdict +{card['verdict']['word']}", text)
    assert re.search(rf"random .*{card['controls']['random']['median']:.2f}", text)
    assert all(len(line) <= 80 for line in lines if str(finished) not in line), lines


def _kept(row: dict, side: str) -> bool:
    score = row["scores"]["lexical"]
    return bool(row["token_ids"]) and score is not None and (score >= 50) == (side == "pos")


def test_every_response_has_its_label_prompt_and_tokens(finished):
    rows = {side: rows_of(finished, side) for side in ("pos", "neg")}
    assert {side: len(found) for side, found in rows.items()} == {"pos": COUNT // 2, "neg": COUNT // 2}
    for side, found in rows.items():
        for row in found:
            assert row["id"].startswith(f"{side}-i{row['instruction_id']:02d}-q{row['question_id']:03d}-r")
            assert 2 not in row["token_ids"]
            assert len(row["token_ids"]) <= 10
            assert row["finish_reason"] == ("length" if len(row["token_ids"]) == 10 else "stop")
            assert row["prompt"].endswith("<|assistant|>\n")
            assert ("Be calm." in row["prompt"] or "Speak softly." in row["prompt"]) == (side == "pos")
    with_tokens = {row["id"] for found in rows.values() for row in found if row["token_ids"]}
    assert set(activations_of(finished)) == with_tokens


def test_stage_by_stage_equals_extract(root, finished):
    for stage, *options in (["batched"], ["vectors"], ["validate", "--samples-per-coef", "2"]):
        succeed(stage, "--root", root, "--experiment", "demo", *options)
    succeed("report", "--root", root, "--experiment", "demo")
    assert contents(run_of(root)) == contents(finished)


def test_serial_combined_and_batched_give_the_same_responses(root, finished):
    for command, options in (("generate", []), ("combined", []), ("batched", ["--batch-size", "3"])):
        succeed(command, "--root", root, "--experiment", f"tiny_{command}", "--trait", "calm", *SETTINGS, *options)
        assert payloads(run_of(root, f"tiny_{command}"), "responses") == payloads(finished, "responses")
    serial, batched = (activations_of(run_of(root, f"tiny_{name}")) for name in ("combined", "batched"))
    assert serial.keys() == batched.keys()
    assert max(deviation(row, batched[example]) for example, row in serial.items()) < 1e-5
    assert not list((run_of(root, "tiny_generate") / "activations").iterdir())


SETTINGS = ("--n-examples", "24", "--max-new-tokens", "10", "--shard-size", "20", "--temperature", "1")


def test_stage_2_equals_capture_during_generation(root, finished):
    succeed("generate", "--root", root, "--experiment", "demo")
    generated = contents(run_of(root))
    succeed("capture", "--root", root, "--experiment", "demo")
    assert {name: contents(run_of(root))[name] for name in generated} == generated
    captured, wanted = activations_of(run_of(root)), activations_of(finished)
    assert captured.keys() == wanted.keys()
    assert max(deviation(captured[example], row) for example, row in wanted.items()) < 1e-5
    for stage, *options in (["vectors"], ["validate", "--quick"]):
        succeed(stage, "--root", root, "--experiment", "demo", *options)
    assert succeed("verify", run_of(root)).exit_code == 0


def test_stored_responses_are_not_generated_again(root):
    succeed("generate", "--root", root, "--experiment", "demo")
    generated = payloads(run_of(root), "responses")
    receipts = contents(run_of(root) / "responses")
    succeed("extract", "--quick", "--root", root, "--experiment", "demo")
    assert payloads(run_of(root), "responses") == generated
    assert contents(run_of(root) / "responses") == receipts
    receipt = json.loads((run_of(root) / "activations/0000.receipt.json").read_text())
    assert receipt["meta"]["captured"] == "from stored ids"


def facts_of(run: Path, method: str = "mean_diff") -> dict:
    with safe_open(run / f"vectors/{method}.safetensors", "pt") as file:
        return json.loads(file.metadata()["examples"])


def test_responses_are_filtered_by_judge_score_and_counted(root):
    succeed("batched", "--root", root, "--experiment", "demo")
    generated = contents(run_of(root) / "responses/shards")
    facts = {}
    again = ("--judge", "lexical", "--threshold", "50")
    for options in ((), ("--threshold", "40"), ("--judge", "none"), again):
        out = succeed("vectors", "--root", root, "--experiment", "demo", "--method", "mean_diff", *options).stdout
        facts[options] = found = facts_of(run_of(root))
        dropped = [found[f"dropped_{reason}"] for reason in ("empty", "unscored", "wrong_side")]
        assert re.search(rf"kept +{found['kept_pos'] + found['kept_neg']} of {COUNT} ", out)
        assert found["kept_pos"] + found["kept_neg"] + sum(dropped) == COUNT
    plain, loose, none, judged_again = facts.values()
    assert min(plain["dropped_wrong_side"], plain["dropped_unscored"], plain["kept_pos"], plain["kept_neg"]) > 0
    assert loose["kept_pos"] > plain["kept_pos"]
    assert loose["kept_neg"] < plain["kept_neg"]
    assert (none["dropped_wrong_side"], none["dropped_unscored"], none["threshold"]) == (0, 0, None)
    assert judged_again == plain
    assert contents(run_of(root) / "responses/shards") == generated


def test_a_judge_that_a_stage_is_given_is_remembered_by_the_stages_after_it(root):
    demo = ("--root", root, "--experiment", "demo")
    succeed("batched", *demo)
    assert "lexical judge" in succeed("vectors", *demo).stdout
    assert "not judged" in succeed("vectors", *demo, "--judge", "none").stdout
    assert "not judged" in succeed("vectors", *demo).stdout
    assert facts_of(run_of(root))["judge"] == "none"
    succeed("validate", *demo, "--quick")
    succeed("report", *demo)
    assert "Not judged" in next((run_of(root) / "reports").glob("*.html")).read_text(encoding="utf-8")
    assert json.loads((run_of(root) / "run.json").read_text())["config"]["judge"] == "none"
    assert succeed("verify", run_of(root)).exit_code == 0


def test_extract_with_another_judge_generates_nothing(extracted):
    root = extracted
    card = (run_of(root) / "vectors/card.json").read_bytes()
    generated = contents(run_of(root) / "responses/shards")
    second = succeed("extract", "--root", root, "--experiment", "demo", "--judge", "none")
    assert "tokens at" not in second.stdout
    assert contents(run_of(root) / "responses/shards") == generated
    assert (run_of(root) / "vectors/card.json").read_bytes() != card
    succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    assert (run_of(root) / "vectors/card.json").read_bytes() == card


def test_a_judge_that_keeps_none_of_a_side_ends_the_run_and_no_older_vectors_are_shown(extracted):
    result = invoke("extract", "--root", extracted, "--experiment", "demo", "--threshold", "0")
    assert result.exit_code == 2
    assert "calm: the lexical judge leaves no negative response" in result.stderr
    assert "vectors  " not in result.stdout
    assert "AUROC" not in result.stdout


def test_stage_3_takes_missing_options_from_the_run(root):
    options = ("--n-examples", "12", "--temperature", "0.5", "--judge", "none", "--model", root / "model")
    succeed("batched", "--root", root, "--experiment", "anything", "--trait", "calm", *options)
    out = succeed("vectors", "--root", root, "--experiment", "anything").stdout
    assert out.startswith("calm on model\n")
    assert re.search("kept +24 of 24 ", out)
    assert succeed("validate", "--quick", "--root", root, "--experiment", "anything").stdout.startswith(
        "calm on model\n"
    )


def test_layers_of_stage_3_are_any_of_the_captured(root, finished):
    succeed("batched", "--root", root, "--experiment", "demo")
    succeed("vectors", "--root", root, "--experiment", "demo", "--layers", "1-2", "--methods", "mean_diff,random")
    part, whole = (load_file(run / "vectors/mean_diff.safetensors")["direction"] for run in (run_of(root), finished))
    assert part.shape == (2, 32)
    assert torch.equal(part, whole[1:])
    assert sorted(path.name for path in (run_of(root) / "vectors").glob("*.safetensors")) == [
        "mean_diff.safetensors",
        "random.safetensors",
    ]


def test_captured_layers_sites_and_poolings(root):
    options = ("--layers", "0,2", "--sites", "residual,mlp", "--poolings", "response_mean,prompt_last,all")
    succeed("batched", "--root", root, "--experiment", "demo", *options)
    tensors = load_file(run_of(root) / "activations/0000.safetensors")
    pooled = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "/" not in name}
    assert {name: shape[1:] for name, shape in pooled.items()} == dict.fromkeys(
        ("residual.response_mean", "mlp.response_mean", "residual.prompt_last", "mlp.prompt_last"), (2, 32)
    )
    ids = [row["id"] for row in rows_of(run_of(root), "pos") if row["token_ids"]]
    each = tensors[f"residual.all/{ids[0]}"]
    assert each.shape[1:] == (2, 32)
    assert deviation(each.mean(0), tensors["residual.response_mean"][0]) < 1e-5
    out = succeed("vectors", "--root", root, "--experiment", "demo", "--site", "mlp", "--pooling", "prompt_last")
    assert out.exit_code == 0


def test_natural_prompts_of_unequal_sides(root):
    result = succeed("extract", "--root", root, "--experiment", "demo", "--trait", "warm", "--judge", "none", "--quick")
    assert re.search("trait .*warm.* 6 .* 4 ", result.stderr)
    rows = {side: rows_of(run_of(root, trait="warm"), side) for side in ("pos", "neg")}
    assert [row["id"] for row in rows["neg"][:5]] == [f"neg-n{i % 4:04d}-r{i // 4:02d}" for i in range(5)]
    assert "<|system|>\nGo.<|end|>" in rows["neg"][0]["prompt"]
    assert "<|system|>" not in rows["pos"][0]["prompt"]
    assert rows["neg"][0]["token_ids"] != rows["neg"][4]["token_ids"]  # the same prompt with another seed
    assert "AUROC" in result.stdout


def test_raw_prompts_have_no_template(root):
    succeed("batched", "--root", root, "--experiment", "demo", "--raw")
    row = rows_of(run_of(root), "pos")[0]
    assert row["prompt"] == "Be calm.\n\nWhy?"
    assert len(row["prompt_token_ids"]) == len(row["prompt"])
    assert json.loads((run_of(root) / "activations/0000.receipt.json").read_text())["meta"]["instruction_as"] == "raw"


def test_several_traits_load_the_model_once(root):
    result = succeed(
        "extract", "--root", root, "--experiment", "demo", "--traits", "calm, warm", "--judge", "none", "--quick"
    )
    assert result.stderr.count("loading tiny") == 1
    assert result.stderr.count("self-check") == 1
    assert [line for line in result.stdout.splitlines() if line.endswith(" on tiny")] == [
        "calm on tiny",
        "warm on tiny",
    ]
    for stage in (("vectors",), ("validate", "--quick")):
        out = succeed(*stage, "--root", root, "--experiment", "demo").stdout
        assert "calm on tiny" in out
        assert "warm on tiny" in out


def test_responses_depend_on_the_seed_and_not_on_the_batch_size(root):
    for name, options in (("a", ["--batch-size", "1"]), ("b", ["--batch_size", "16"]), ("c", ["--seed", "1"])):
        succeed("batched", "--root", root, "--experiment", f"tiny_{name}", "--trait", "calm", *SETTINGS, *options)
    found = [payloads(run_of(root, f"tiny_{name}"), "responses") for name in "abc"]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_slices_and_a_plain_run_equal_one_run(root, finished):
    for part in ("2/2", "1/2"):
        assert "tokens at" in succeed("extract", "--root", root, "--experiment", "demo", "--slice", part).stdout
        assert not (run_of(root) / "responses/pos.jsonl").exists()
    succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    assert contents(run_of(root)) == contents(finished)


def test_a_damaged_shard_is_replaced_by_the_same_bytes(extracted, finished):
    root = extracted
    for name in ("responses/shards/0001.jsonl", "activations/0000.safetensors"):
        (run_of(root) / name).write_bytes((run_of(root) / name).read_bytes()[:-9])
    assert invoke("verify", run_of(root)).exit_code == 1
    succeed("extract", "--samples-per-coef", "2", "--root", root, "--experiment", "demo")
    assert contents(run_of(root)) == contents(finished)


def test_out_of_memory_halves_the_batch_of_that_shard(root, finished):
    """The hook stands for a device that holds two rows; the second run group is made before it is registered."""
    succeed("extract", "--root", root, "--experiment", "demo", "--slice", "2/2")
    untouched = contents(run_of(root) / "activations")
    with room_for(2):
        result = succeed("extract", "--quick", "--root", root, "--experiment", "demo", "--batch-size", "8")
    assert result.stderr.count("out of memory") == 2  # 8, 4
    now = contents(run_of(root) / "activations")
    assert {name: now[name] for name in untouched} == untouched
    sizes = [json.loads(now[f"000{i}.receipt.json"])["meta"]["batch_size"] for i in range(3)]
    assert sizes == [2, 2, 12]
    assert payloads(run_of(root), "responses") == payloads(finished, "responses")
    assert "batch size 2," in result.stdout


def test_out_of_memory_with_one_row_is_an_error_and_keeps_finished_shards(root):
    succeed("extract", "--root", root, "--experiment", "demo", "--slice", "1/2")
    before = contents(run_of(root))
    with room_for(0):
        line = refused("batched", "--root", root, "--experiment", "demo", "--self-check", "0", notes=OUT_NOTES)
    assert "--batch-size 1" in line
    assert contents(run_of(root)) == before


OUT_NOTES = ("out of memory", "calm: ")


# --- families of models ---------------------------------------------------------------------------------------------


def give_families(root: Path, *, of_model: str | None) -> None:
    """Make the trait's markers and some of its questions those of the family `toy`, and the model one of `of_model`."""
    own = {"questions_for": {"toy": ["Why me?", "Who else?", "When?"]}, "markers_for": "toy"}
    (root / "configs/traits/calm.yaml").write_text(yaml.safe_dump(TRAIT | own))
    line = f"family: {of_model}\n" if of_model else ""
    (root / "configs/models/tiny.yaml").write_text(MODEL_LINES + line)


def questions_of(root: Path) -> set[str]:
    return {row["question"] for side in ("pos", "neg") for row in rows_of(run_of(root), side)}


QUICK = ("--n-examples", "4", "--max-new-tokens", "4")


def test_a_model_of_a_family_gets_its_questions_and_is_scored_by_its_markers(root):
    give_families(root, of_model="toy")
    run = ("batched", "--root", root, "--experiment", "demo", *QUICK)
    succeed(*run, "--judge", "lexical")
    assert questions_of(root) == {"Why me?", "Who else?", "When?"}
    before = contents(root / "experiments")
    succeed(*run, "--judge", "lexical")
    assert contents(root / "experiments") == before
    assert "general" in refused(*run, "--questions", "general")  # another run
    for other in (None, "other"):  # stage 3 takes the trait that run.json names
        give_families(root, of_model=other)
        succeed("vectors", "--root", root, "--experiment", "demo", "--judge", "lexical", "--method", "mean_diff")


def test_a_model_of_no_family_gets_the_general_questions(root):
    give_families(root, of_model=None)
    succeed("generate", "--root", root, "--experiment", "demo", *QUICK)
    assert questions_of(root) <= set(TRAIT["questions"])


def test_the_option_gives_a_model_the_questions_of_another_family(root):
    give_families(root, of_model=None)
    run = ("generate", "--root", root, "--experiment", "demo", *QUICK)
    succeed(*run, "--questions", "toy")
    assert questions_of(root) == {"Why me?", "Who else?", "When?"}
    line = refused(*run, "--questions", "toys")
    assert "configs/traits/calm.yaml: --questions 'toys'" in line
    assert "auto, general, toy" in line


@pytest.mark.parametrize("family", [None, "other"])
def test_the_lexical_judge_is_refused_for_a_model_that_the_markers_are_not_for(root, family):
    give_families(root, of_model=family)
    line = refused("batched", "--root", root, "--experiment", "demo", "--judge", "lexical")
    for fragment in ("configs/traits/calm.yaml: --judge lexical", "trait calm", "toy", "tiny", "--judge local"):
        assert fragment in line
    assert not (root / "experiments").exists()
