"""The commands of tiers 2 and 3: their files, their refusals, and what a second start does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from extraction.config.experiments import resolve_model
from extraction.model.loading import load
from tests.runs import REPOSITORY, contents, environment, invoke, make_root, payloads, refused, succeed
from tests.tiny import reference_hidden

QUICK = ("--experiment", "demo", "--traits", "calm,warm", "--quick", "--self-check", "0")
PROGRESS = ("loading", "self-check", "one, tier", "two, tier", "prompts, tier", "calm", "warm", "missing")
SHORT = ("--max-new-tokens", "6", "--self-check", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose traits have vectors, with two prompt files."""
    root = make_root(tmp_path_factory.mktemp("reading"))
    succeed("extract", "--root", root, *QUICK)
    (root / "one.txt").write_text("Why is it so?\nIs it?\n\nWho are you, and what do you want from me?\n")
    (root / "two.txt").write_text("What?\nHow?\n")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "root")


def read(root: Path, *arguments: object, tier: int = 2) -> Any:
    command = {2: "read", 3: "internals"}[tier]
    return succeed(command, "--root", root, "--experiment", "demo", *SHORT, *arguments)


def sets(root: Path, *, like: str = "*") -> list[Path]:
    return sorted(path for path in (root / "experiments/demo/captures").glob(like) if path.is_dir())


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        whole = json.loads(file.read(size))
    return {key: json.loads(value) for key, value in whole["__metadata__"].items()}


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_set_with_a_page_and_a_table(root):
    result = read(root, "--traits", "calm,warm", "--prompts-file", root / "one.txt")
    (folder,) = sets(root, like="tier2-one-*")
    assert [path.name for path in sorted((folder / "prompts").glob("*.safetensors"))] == [
        f"p000{i}.safetensors" for i in range(3)
    ]
    assert (folder / "reports/page.html").is_file()
    assert (root / "experiments/demo/captures/index.html").is_file()
    assert re.search(r"one\.txt.*\b1\b", result.stderr)
    assert re.search(r"\b3 prompts\b", result.stdout)
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "/" not in line), result.stdout
    succeed("verify", "--root", root)


def test_the_numbers_are_those_of_the_plain_model_reading_the_text_alone(root):
    read(root, "--trait", "calm", "--method", "probe", "--prompts-file", root / "one.txt", "--layers", "0,2")
    lm = load(resolve_model("tiny", root))
    unit_LD = torch.nn.functional.normalize(
        load_file(root / "experiments/demo/calm/vectors/probe.safetensors")["direction"][[0, 2]], dim=1
    )
    for path in (sets(root)[0] / "prompts").glob("*.safetensors"):
        head = header(path)
        hidden_LTD = reference_hidden(lm.model, head["token_ids"])[[0, 2]]
        wanted_TL = torch.einsum("ltd,ld->tl", hidden_LTD, unit_LD)
        found_TLP = load_file(path)["projections.calm"]
        assert (found_TLP[:, :, 2] - wanted_TL).abs().max() < 1e-4
        assert (found_TLP[:, :, 2] - wanted_TL.flip(1)).abs().max() > 1e-2  # a control: the layers changed places
        assert lm.tokenizer.convert_tokens_to_ids(head["tokens"]) == head["token_ids"]
        assert "".join(head["pieces"]) == lm.tokenizer.decode(head["token_ids"], clean_up_tokenization_spaces=False)
        assert head["text"] == "".join(head["pieces"][: head["n_prompt"]])


def test_every_tensor_of_tier_3_is_a_row_a_token(root):
    method = ("--method", "mean_diff")
    read(root, "--trait", "calm", *method, "--layer", "1", "--prompts", "Why?", "--prompts", "How so?", tier=3)
    (folder,) = sets(root, like="tier3-prompts-*")
    head, tensors = header(folder / "prompts/p0001.safetensors"), load_file(folder / "prompts/p0001.safetensors")
    assert {len(tensor) for tensor in tensors.values()} == {len(head["token_ids"])}
    assert set(tensors) == set(head["tensors"])
    assert torch.allclose(tensors["attention"].sum(-1), torch.ones(()), atol=1e-5)
    direction = load_file(root / "experiments/demo/calm/vectors/mean_diff.safetensors")["direction"][1]
    wanted_T = tensors["residual_out"] @ direction / direction.norm()
    assert torch.allclose(tensors["projections.calm"][:, 0, 2], wanted_T, atol=1e-4)
    assert not torch.allclose(tensors["projections.calm"][:, 0, 0], wanted_T, atol=1e-4)


def test_tier_3_needs_no_trait_and_finds_the_middle_layer(root):
    read(root, "--prompts", "Why?", tier=3)
    head = header(sets(root)[0] / "prompts/p0000.safetensors")
    assert head["layers"] == [1]
    assert head["traits"] == []
    assert (sets(root)[0] / "reports/page.html").is_file()


def test_json_holds_the_same_numbers(root):
    read(root, "--trait", "calm", "--prompts", "Why?", "--save-json", "--no-attention")
    folder = sets(root)[0] / "prompts"
    plain = json.loads((folder / "p0000.json").read_text())
    tensors = load_file(folder / "p0000.safetensors")
    assert set(plain["values"]) == set(tensors) == {"projections.calm"}
    assert torch.equal(torch.tensor(plain["values"]["projections.calm"]), tensors["projections.calm"])
    assert plain["token_ids"] == header(folder / "p0000.safetensors")["token_ids"]


def test_an_imported_vector_is_read_in_a_model_that_is_named(root):
    path = root / "experiments/demo/calm/vectors/mean_diff.safetensors"
    succeed("import", path, "--as", "foreign", "--root", root)
    arguments = ("read", "--root", root, "--experiment", "imported", "--trait", "foreign", "--prompts", "Why?", *SHORT)
    assert "model" in refused(*arguments)
    succeed(*arguments, "--model", "tiny")
    assert (root / "experiments/imported/captures").is_dir()


# --- another start --------------------------------------------------------------------------------------------------


def test_a_second_start_finds_nothing_to_do(root):
    asked = ("--trait", "calm", "--prompts-file", root / "one.txt", "--save-json")
    read(root, *asked)
    before = contents(root / "experiments")
    assert "loading" not in read(root, *asked).stderr
    assert contents(root / "experiments") == before


def test_another_config_never_overwrites_a_set(root):
    read(root, "--trait", "calm", "--prompts", "Why?")
    (first,) = sets(root)
    before = contents(first)
    for change in (("--seed", "1"), ("--method", "pca"), ("--layers", "0"), ("--prompts", "How?"), ("--no-attention",)):
        read(root, "--trait", "calm", "--prompts", "Why?", *change)
    assert len(sets(root)) == 6
    assert contents(first) == before


@pytest.mark.parametrize("lost", [("p0000",), ("p0001", "p0002"), ("p0000", "p0001", "p0002")])
def test_missing_files_are_written_again_with_the_same_bytes(root, lost):
    asked = ("--trait", "calm", "--prompts-file", root / "one.txt", "--shard-size", "2", "--temperature", "1")
    read(root, *asked)
    folder = sets(root)[0]
    before = contents(folder)
    for name in lost:
        for path in (folder / "prompts").glob(f"{name}*"):
            path.unlink()
    (folder / "dynamics.json").unlink()
    read(root, *asked)
    assert contents(folder) == before


def test_the_batch_size_changes_no_token_and_is_no_other_set(root):
    asked = ("--trait", "calm", "--prompts-file", root / "one.txt", "--temperature", "1")
    read(root, *asked, "--batch-size", "1")
    alone = payloads(sets(root)[0], "prompts")
    told = {name: header(sets(root)[0] / "prompts" / name)["token_ids"] for name in alone}
    shutil.rmtree(root / "experiments/demo/captures")
    read(root, *asked, "--batch-size", "3")
    assert {name: header(sets(root)[0] / "prompts" / name)["token_ids"] for name in told} == told
    read(root, *asked, "--batch-size", "2")
    assert len(sets(root)) == 1


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("--trait", "calm"), "--prompts"),
        (("--prompts", "Why?"), "--trait"),
        (("--trait", "calm", "--prompts", " "), "--prompts"),
        (("--trait", "nobody", "--prompts", "Why?"), "nobody"),
        (("--trait", "calm", "--prompts", "Why?", "--layers", "7"), "7"),
        (("--trait", "calm", "--prompts", "Why?", "--method", "tea"), "'tea'"),
        (("--trait", "calm", "--prompts", "Why?", "--temperature", "-1"), "temperature"),
        (("--trait", "calm", "--prompts", "Why?", "--system", ""), "--system"),
        (("--trait", "calm", "--prompts", "Why?", "--max-new-tokens", "9999"), "9999"),
        (("--trait", "calm", "--prompts-file", "nowhere.txt"), "nowhere.txt"),
        (("--trait", "calm", "--prompts", "Why?", "--model", "nowhere"), "nowhere"),
        (("--trait", "calm", "--prompts", "Why? \udcff"), "surrogate"),
    ],
    ids=lambda value: " ".join(value).encode(errors="replace").decode() if isinstance(value, tuple) else value[:12],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(made, arguments, value):
    before = contents(made / "experiments")
    line = refused("read", "--root", made, "--experiment", "demo", "--self-check", "0", *arguments, notes=PROGRESS)
    assert value in line
    assert contents(made / "experiments") == before


def test_tier_3_needs_one_layer_of_the_model(made):
    for layer, said in (("9", "9"), ("0-1", "'0-1'"), ("x", "x")):
        line = refused("internals", "--root", made, "--experiment", "demo", "--layer", layer, "--prompts", "Why?")
        assert said in line


def test_two_files_of_one_name_are_refused(made, tmp_path):
    (tmp_path / "one.txt").write_text("What?\n")
    files = ("--prompts-file", made / "one.txt", "--prompts-file", tmp_path / "one.txt")
    line = refused("read", "--root", made, "--experiment", "demo", "--trait", "calm", *files)
    assert "'one'" in line


def test_without_a_run_the_error_names_the_first_command(tmp_path):
    root = make_root(tmp_path / "root")
    line = refused("read", "--root", root, "--experiment", "demo", "--trait", "calm", "--prompts", "Why?")
    assert "traitline extract" in line


def test_keep_going_finishes_the_sets_without_errors(root):
    files = ("--prompts-file", root / "missing.txt", "--prompts-file", root / "two.txt")
    result = invoke(
        *("read", "--root", root, "--experiment", "demo", "--traits", "calm,nobody", *files, *SHORT, "--keep-going")
    )
    assert result.exit_code == 1
    assert re.search(r"\b2 failed", result.stderr)
    assert "nobody" in result.stderr
    assert len(sets(root, like="tier2-two-*")) == 1


def test_a_prompt_too_long_fails_its_own_file_alone(root):
    (root / "long.txt").write_text("x" * 600 + "\n")
    files = ("--prompts-file", root / "long.txt", "--prompts-file", root / "two.txt")
    arguments = ("read", "--root", root, "--experiment", "demo", "--trait", "calm", *files, *SHORT)
    assert re.search(r"\b512\b", refused(*arguments, notes=PROGRESS))
    assert not sets(root)
    result = invoke(*arguments, "--keep-going")
    assert result.exit_code == 1
    assert re.search(r"long: .*\b512\b", result.stderr)
    assert len(sets(root)) == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(made):
    before = contents(made)
    result = read(made, "--trait", "calm", "--prompts-file", made / "two.txt", "--dry-run")
    assert re.search(r"two: 2 prompts, 0\b", result.stdout)
    assert contents(made) == before


# --- scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [2, 3])
def test_the_scripts_run_by_path_from_any_folder(root, tmp_path, tier):
    words = ["--experiment", "demo", "--trait", "calm", "--prompts", "What is the capital of France?"]
    own = {2: ["--method", "probe", "--save_json"], 3: ["--layer", "1"]}[tier]
    done = subprocess.run(
        [sys.executable, REPOSITORY / f"extraction/capture_tier{tier}.py", "--root", root, *words, *own, *SHORT],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(sets(root, like=f"tier{tier}-prompts-*")) == 1
