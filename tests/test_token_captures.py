"""Laws of capture sets: prompts read back as written, another config overwrites nothing, and no damage goes unseen."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from extraction.core.errors import ConfigError, RunMismatch, StoreError
from extraction.core.names import check_name
from extraction.storage.atomic import write_with_receipt
from extraction.storage.experiment_dir import capture_sets, trait_runs, verify_tree, write_sets_index
from extraction.storage.run_dir import fingerprint
from extraction.storage.serialization import safetensors_bytes
from extraction.storage.token_captures import CaptureSet, capture_set, prompt_id, set_name
from extraction.storage.trait_run import trait_run
from tests.kills import snapshot
from tests.runs import environment
from tests.test_trait_run import BAD_NAMES, QUICK, TEXT, contents, spoil, through_json

CONFIG = {
    "tier": 2,
    "model": {"name": "tiny", "device": "cpu"},
    "prompts": ["Why?", "Who?"],
    "batch_size": 8,
    "seed": 1,
}
ELSEWHERE = {**CONFIG, "model": {"name": "tiny", "device": "cuda"}, "batch_size": 1, "threads": 4, "self_check": 0}
POINTS = ["residual_in", "after_attention", "residual_out"]
N_LAYERS, N_PROMPT, N_RESPONSE, HEADS = 2, 3, 2, 2
META = {"batch_size": 8}


def header(id: str = "p0000", tier: int = 2, n_prompt: int = N_PROMPT, n: int = N_PROMPT + N_RESPONSE) -> dict:
    layers = [4, 5] if tier == 2 else [4]
    attention = ["token", "layer", "token"] if tier == 2 else ["token", "head", "token"]
    return {
        "id": id,
        "prompt": "Why?\u2028\ud800",
        "system": None,
        "response": "So.",
        "tokens": [f"t{i}" for i in range(n)],
        "pieces": [f"p{i}" for i in range(n)],
        "token_ids": list(range(n)),
        "n_prompt": n_prompt,
        "tier": tier,
        "layers": layers,
        "points": POINTS,
        "tensors": {"attention": attention, "projections.calm": ["token", "layer", "point"]},
    }


def tensors(tier: int = 2, n_prompt: int = N_PROMPT, n: int = N_PROMPT + N_RESPONSE, start: float = 0.0) -> dict:
    rows, layers, middle = (n - n_prompt, 2, 2) if tier == 2 else (n, 1, HEADS)
    shapes = {"attention": (rows, middle, n), "projections.calm": (n, layers, 3)}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {name: torch.arange(sizes[name]).reshape(shape) / 7 + start for name, shape in shapes.items()}


def job(root: Path) -> None:
    """A set from start to end, that goes on where an earlier one stopped."""
    folder = capture_set(root, "exp", set_name(2, "prompts_few", CONFIG))
    with folder.lock():
        folder.open(CONFIG)
        for index in range(2):
            id = prompt_id(index)
            if not folder.prompt_done(id):
                folder.write_prompt(id, tensors(start=index), header(id), META)
            folder.write_json(id, folder.prompt_header(id)["tokens"])
        folder.write_dynamics({"calm": [folder.read_prompt(id)[0]["attention"].tolist() for id in folder.prompt_ids()]})
        folder.write_report("page.html", b"<html></html>")
        folder.write_report("overview.png", b"png")
    write_sets_index(root, "exp", b"<html></html>")


def filled(root: Path) -> CaptureSet:
    job(root)
    return capture_sets(root, "exp")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CaptureSet:
    return filled(tmp_path_factory.mktemp("experiments"))


@pytest.fixture
def folder(tmp_path: Path) -> CaptureSet:
    folder = capture_set(tmp_path / "experiments", "exp", "tier2-x-01234567")
    folder.open(CONFIG)
    return folder


# --- round trips ----------------------------------------------------------------------------------------------------


@QUICK
@given(
    words=st.lists(TEXT, max_size=4),
    prompt=TEXT,
    tier=st.sampled_from([2, 3]),
    index=st.integers(0, 123_456),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_prompts_read_back(folder, words, prompt, tier, index, dtype, data) -> None:
    n_prompt, id = data.draw(st.integers(0, len(words))), prompt_id(index)
    said = header(id, tier, n_prompt, len(words)) | {"tokens": words, "pieces": words, "prompt": prompt}
    written = {name: tensor.to(dtype) for name, tensor in tensors(tier, n_prompt, len(words)).items()}
    folder.write_prompt(id, written, said, META)
    read, told = folder.read_prompt(id)
    assert told == folder.prompt_header(id) == through_json(said)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
        name: (dtype, tensor.tolist()) for name, tensor in written.items()
    }
    assert folder.prompt_done(id)
    assert id in folder.prompt_ids()
    assert folder.verify() == []


def test_tensors_and_json_have_one_order(folder: CaptureSet) -> None:
    names = [f"projections.{letter}" for letter in "hgfedcba"]
    axes = {name: ["token", "layer", "point"] for name in names}
    rows = tensors()["projections.calm"]
    folder.write_prompt("p0000", dict.fromkeys(names, rows), header() | {"tensors": axes}, META)
    for _ in range(5):
        read, said = folder.read_prompt("p0000")
        assert list(read) == sorted(names)
    first = folder.write_json("p0000", {**said, "values": {}}).read_bytes()
    assert folder.write_json("p0000", {"values": {}, **dict(reversed(said.items()))}).read_bytes() == first


def test_prompts_past_9999_stay_in_order(folder: CaptureSet) -> None:
    for index in (10_000, 9_999, 2):
        folder.write_prompt(prompt_id(index), tensors(), header(prompt_id(index)), META)
    assert folder.prompt_ids() == ["p0002", "p9999", "p10000"]


def test_the_files_of_a_finished_set(finished: CaptureSet) -> None:
    name = set_name(2, "prompts_few", CONFIG)
    assert finished.path.name == name
    assert name.startswith("tier2-prompts_few-")
    assert name.endswith(fingerprint(CONFIG)[:8])
    prompts = [f"prompts/p000{i}.{end}" for i in (0, 1) for end in ("json", "receipt.json", "safetensors")]
    assert sorted(contents(finished.path)) == sorted(
        [".lock", "dynamics.json", "reports/overview.png", "reports/page.html", "run.json", *prompts]
    )
    assert finished.prompt_ids() == ["p0000", "p0001"]
    assert finished.read_config() == finished.stored_config() == CONFIG
    assert len(finished.read_dynamics()["calm"]) == 2
    assert json.loads((finished.path / "prompts/p0000.json").read_text()) == header()["tokens"]
    receipt = json.loads((finished.path / "prompts/p0000.receipt.json").read_text())
    assert receipt["meta"] == META
    assert receipt["tensors"]["attention"] == {"dtype": "float32", "shape": [2, 2, 5]}
    assert (finished.path.parent / "index.html").exists()


def test_other_programs_can_read_the_files(finished: CaptureSet) -> None:
    from safetensors import safe_open

    with safe_open(finished.prompt_path("p0001"), "pt") as file:
        assert json.loads(file.metadata()["tokens"]) == header()["tokens"]
        assert file.get_slice("projections.calm").get_shape() == [5, 2, 3]


def test_the_same_inputs_give_the_same_bytes(finished: CaptureSet, tmp_path: Path) -> None:
    before = snapshot(filled(tmp_path).path)
    assert before == snapshot(finished.path)
    assert snapshot(filled(tmp_path).path) == before  # and again, over itself


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_enters_json(folder: CaptureSet, value: float) -> None:
    for write in (
        lambda: folder.write_json("p0000", [value]),
        lambda: folder.write_dynamics({"calm": value}),
        lambda: folder.write_prompt("p0000", tensors(), header() | {"system": value}, META),
        lambda: folder.write_prompt("p0000", tensors(), header(), {"rate": value}),
    ):
        with pytest.raises(StoreError, match="NaN or Infinity"):
            write()
    assert not folder.prompt_done("p0000")


# --- one set, one config --------------------------------------------------------------------------------------------


def test_another_config_is_another_set_and_the_same_one_finds_it_again(tmp_path: Path) -> None:
    first = filled(tmp_path)
    before = snapshot(first.path)
    for change in ({"seed": 2}, {"prompts": ["Why?", "Where?"]}, {"model": {"name": "other"}}, {"tier": 3}):
        other = capture_set(tmp_path, "exp", set_name(2, "prompts_few", {**CONFIG, **change}))
        assert other.path != first.path
        assert other.open({**CONFIG, **change}) is False
    assert snapshot(first.path) == before
    assert set_name(2, "prompts_few", ELSEWHERE) == first.path.name
    assert first.open(ELSEWHERE) is True
    assert len(capture_sets(tmp_path, "exp")) == 5


def test_a_set_is_never_overwritten_by_another_config(tmp_path: Path) -> None:
    """Two configs may share eight digits of their fingerprints."""
    folder = filled(tmp_path)
    before = snapshot(folder.path)
    with pytest.raises(RunMismatch, match=r"tier2-prompts_few-.*seed was 1 and is now 2"):
        folder.open({**CONFIG, "seed": 2})
    assert snapshot(folder.path) == before


@pytest.mark.parametrize("harm", ["cut", "empty", "zero", "delete"])
def test_a_harmed_config_stops_the_set(tmp_path: Path, harm: str) -> None:
    folder = filled(tmp_path)
    spoil(folder.config_path, harm)
    with pytest.raises(StoreError, match=r"run\.json: .*delete"):
        folder.open(CONFIG)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_an_intact_set_is_verified_without_torch(finished: CaptureSet) -> None:
    assert finished.verify() == []
    code = "import sys; from extraction.storage.experiment_dir import verify_tree\n"
    code += "print(verify_tree(sys.argv[1]), *sys.modules)"
    command = [sys.executable, "-c", code, str(finished.path)]
    result = subprocess.run(command, capture_output=True, check=True, text=True, env=environment(), cwd="/")
    assert result.stdout.startswith("[] ")
    assert {"torch", "numpy", "safetensors"}.isdisjoint(result.stdout.split())


@settings(QUICK, max_examples=150)
@given(data=st.data())
def test_verify_finds_any_flipped_bit_and_any_cut(finished: CaptureSet, data: st.DataObject) -> None:
    checked = [name for name in contents(finished.path) if name.endswith((".safetensors", ".receipt.json"))]
    name = data.draw(st.sampled_from(sorted([*checked, "run.json", "dynamics.json"])))
    path = finished.path / name
    whole = path.read_bytes()
    body, position = bytearray(whole), data.draw(st.integers(0, len(whole) - 1))
    harm = data.draw(st.sampled_from(["flip", "cut", "zero", "grow"]))
    if harm == "flip":
        body[position] ^= 1 << data.draw(st.integers(0, 7))
    elif harm == "cut":
        del body[position:]
    elif harm == "zero":
        assume(any(body[position:]))
        body[position:] = bytes(len(body) - position)
    else:
        body.append(position % 256)
    try:
        path.write_bytes(body)
        found = {finding.path.name.split(".")[0] for finding in finished.verify()}
        assert path.name.split(".")[0] in found
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("end", ["safetensors", "receipt.json"])
@pytest.mark.parametrize("harm", ["delete", "cut", "empty"])
def test_a_harmed_prompt_is_not_done(tmp_path: Path, end: str, harm: str) -> None:
    folder = filled(tmp_path)
    before = snapshot(tmp_path)
    spoil(folder.path / f"prompts/p0001.{end}", harm)
    assert not folder.prompt_done("p0001")
    assert folder.prompt_ids() == ["p0000"]
    assert [finding.path.name for finding in folder.verify()] == ["p0001.safetensors"] or end == "receipt.json"
    assert folder.verify()
    job(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_flipped_bit_is_never_read(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    path = folder.prompt_path("p0000")
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    assert folder.prompt_done("p0000")  # the size is right
    for read in (folder.read_prompt, folder.prompt_header):
        with pytest.raises(StoreError, match=r"p0000.*sha256"):
            read("p0000")


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another prompt's": ({"id": "p0007"}, "'p0007'"),
    "a token lost": ({"tokens": ["a"]}, "5 token_ids, but 1 tokens"),
    "a piece too many": ({"pieces": ["a"] * 6}, "5 token_ids, but 6 pieces"),
    "an id lost": ({"token_ids": [1, 2, 3, 4]}, "4 token_ids, but 5 tokens"),
    "a row lost": (
        {name: ["a"] * 6 for name in ("tokens", "pieces", "token_ids")},
        r"'attention' of shape \[2, 2, 5\]",
    ),
    "another seam": ({"n_prompt": 2}, r"'attention' of shape .* \[3, 2, 5\]"),
    "a prompt too long": ({"n_prompt": 6}, "5 tokens.*6"),
    "a prompt below none": ({"n_prompt": -1}, "5 tokens.*-1"),
    "a layer too many": ({"layers": [1, 2, 3]}, "'attention' of shape"),
    "a point lost": ({"points": POINTS[:2]}, "'projections.calm' of shape"),
    "axes lost": (
        {"tensors": {"attention": ["token", "layer", "token"]}},
        "'attention'.*'projections.calm'.*'attention'",
    ),
    "an axis lost": (
        {"tensors": header()["tensors"] | {"projections.calm": ["token", "layer"]}},
        "'projections.calm' of shape",
    ),
    "no labels": ({"tokens": None}, "p0000.*TypeError"),
}


@pytest.mark.parametrize(("change", "problem"), MISFITS.values(), ids=MISFITS.keys())
def test_labels_that_do_not_fit_are_refused_and_found(folder: CaptureSet, change: dict, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        folder.write_prompt("p0000", tensors(), header() | change, META)
    assert not folder.prompt_done("p0000")
    path = folder.prompt_path("p0000")
    write_with_receipt(
        path, safetensors_bytes(path, tensors(), header() | change), {}
    )  # past the store, with a receipt
    with pytest.raises(StoreError, match=problem):
        raise StoreError(*folder.verify())


def test_attention_of_tier_3_has_a_row_for_every_token(folder: CaptureSet) -> None:
    folder.write_prompt("p0000", tensors(3), header(tier=3), META)
    assert folder.verify() == []
    with pytest.raises(StoreError, match=r"'attention' of shape \[2, 2, 5\] .* \[5, 2, 5\]"):
        folder.write_prompt("p0001", tensors(3) | {"attention": tensors()["attention"]}, header("p0001", 3), META)


def test_orphans_are_found_and_go(folder: CaptureSet) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = [f"{part}/.x.{int(dead.stdout)}.tmp" for part in (".", "prompts", "reports")]
    for name in names:
        (folder.path / name).write_bytes(b"x")
    assert [finding.path for finding in folder.verify()] == [folder.path / name for name in names]
    with folder.lock():
        assert folder.verify() == []


def test_verify_tree_finds_sets_wherever_it_is_pointed(tmp_path: Path) -> None:
    sets = [filled(tmp_path / "experiments")]
    for experiment, seed in (("exp", 2), ("other", 1)):
        config = {**CONFIG, "seed": seed}
        sets.append(capture_set(tmp_path / "experiments", experiment, set_name(2, "x", config)))
        sets[-1].open(config)
        sets[-1].write_prompt("p0000", tensors(), header(), META)
    trait_run(tmp_path / "experiments", "exp", "calm").open({"seed": 1})
    assert verify_tree(tmp_path / "experiments") == []
    broken = [folder.prompt_path("p0000") for folder in sets]
    for path in broken:
        spoil(path, "cut")
    top = tmp_path / "experiments"
    seen = {path: [finding.path for finding in verify_tree(path)] for path in (top, top / "exp", top / "exp/captures")}
    assert seen == {top: broken, top / "exp": broken[:2], top / "exp/captures": broken[:2]}
    assert [finding.path for finding in verify_tree(sets[2].path)] == broken[2:]
    assert [folder.path for folder in capture_sets(top, "exp")] == [folder.path for folder in sets[:2]]
    assert [folder.path.name for folder in trait_runs(top, "exp")] == ["calm"]


def test_a_set_that_lost_its_folders_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path)
    shutil.rmtree(folder.path / "prompts")
    folder.dynamics_path.write_bytes(b"{}")
    assert [finding.path.name for finding in verify_tree(folder.path)] == ["dynamics.json"]
    folder.dynamics_path.unlink()
    spoil(folder.config_path, "cut")
    monkeypatch.chdir(folder.path)
    assert "delete" in verify_tree(".")[0].remedy
    assert "--experiment" not in verify_tree(".")[0].remedy


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(tmp_path: Path, name: str) -> None:
    for experiment, set_ in ((name, "tier2-x-01234567"), ("exp", name)):
        with pytest.raises(ConfigError, match=r"experiment|capture set"):
            capture_set(tmp_path, experiment, set_)
    folder = CaptureSet(tmp_path / "set")
    folder.open(CONFIG)
    with pytest.raises(ConfigError):
        folder.write_report(name or "..", b"")
    for call in (folder.prompt_path, lambda id: folder.write_json(id, 1), folder.prompt_done):
        with pytest.raises(ConfigError, match="p0000"):
            call(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert sorted(contents(folder.path)) == ["run.json"]


@pytest.mark.parametrize("id", ["p1", "p00001", "p0000.receipt", "P0000", "p0000\n", "p٠٠٠٠", "p-001"])
def test_an_id_is_a_number_of_four_digits_or_more(tmp_path: Path, id: str) -> None:
    with pytest.raises(ConfigError, match="p0000"):
        CaptureSet(tmp_path).prompt_path(id)


@QUICK
@given(stem=TEXT | st.text(max_size=80) | st.text("aZ09._-/\\\0 ", max_size=80), tier=st.sampled_from([2, 3]))
def test_every_prompt_file_has_its_own_folder(tmp_path: Path, stem: str, tier: int) -> None:
    name = set_name(tier, stem, CONFIG)
    assert check_name(name, "capture set") == name
    path = capture_set(tmp_path, "exp", name).path
    assert path.resolve().parent == (tmp_path / "exp/captures").resolve()
    assert set_name(tier, stem, ELSEWHERE) == name
    assert set_name(tier, stem, {**CONFIG, "seed": 2}) != name


@pytest.mark.parametrize("name", ["captures", "Captures", "CAPTURES"])
def test_no_trait_is_called_captures(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=repr(name)):
        trait_run(tmp_path, "exp", name)
    assert list(tmp_path.iterdir()) == []


def test_no_symbolic_link_leads_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "experiments", tmp_path / "outside"
    for path in (root / "exp", root / "good", outside):
        path.mkdir(parents=True)
    (root / "exp/captures").symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        capture_set(root, "exp", "tier2-x-01234567")
    with pytest.raises(StoreError, match="symbolic link"):
        write_sets_index(root, "exp", b"")
    folder = capture_set(root, "good", "tier2-x-01234567")
    folder.path.mkdir(parents=True)
    (folder.path / "prompts").symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        folder.open(CONFIG)
    assert list(outside.iterdir()) == []


# --- modes and processes --------------------------------------------------------------------------------------------


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        filled(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o600}


def test_two_processes_do_not_share_a_set(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    code = "import sys; from extraction.storage.token_captures import CaptureSet; from pathlib import Path\n"
    code += "with CaptureSet(Path(sys.argv[1])).lock(): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            before = snapshot(folder.path)
            line = rf"pid {other.pid}\b"
            with pytest.raises(StoreError, match=line), folder.lock():
                pass
            assert snapshot(folder.path) == before
        finally:
            other.kill()
    with folder.lock():
        assert folder.open(CONFIG) is True
