"""Laws of a run's folder: data reads back as written, equal inputs give equal bytes, and no damage goes unseen."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from extraction.core.errors import ConfigError, RunMismatch, StoreError
from extraction.core.names import check_name
from extraction.core.records import LAYER_CONVENTION
from extraction.storage.atomic import atomic_write, hold_lock
from extraction.storage.experiment_dir import verify_tree
from extraction.storage.run_dir import fingerprint
from extraction.storage.trait_run import TraitRun, trait_run

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model": {"name": "tiny", "device": "cpu"},
    "generation": {"temperature": 0.0, "batch_size": 8, "stop_strings": ["a", "b"]},
}
META = {"model": "tiny", "batch_size": 8}
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TEXT = st.text(st.characters(codec=None, categories=None), max_size=20)  # with control characters and lone surrogates
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
IDS = st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=5)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=5)


def through_json(value: Any) -> Any:
    """Two lone surrogates side by side read back from any JSON as the one character that they make."""
    return json.loads(json.dumps(value))


def rows_of(ids: list[str], **fields: Any) -> list[dict[str, Any]]:
    return [{"id": id, "response": f"{id}\u2028 said\n", "token_ids": [1, 2], **fields} for id in ids]


def tensor(n: int, start: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(n * 6, dtype=torch.float64) / 7 + start).reshape(n, 2, 3).to(dtype)


def opened(path: Path) -> TraitRun:
    folder = TraitRun(path)
    folder.open(CONFIG)
    return folder


def fill(path: Path) -> TraitRun:
    """A finished run of two shards."""
    folder = opened(path)
    for index, ids in enumerate((["pos-0", "neg-0"], ["pos-1", "neg-1"])):
        folder.write_responses_shard(index, rows_of(ids), META)
        folder.write_activations_shard(index, ids, {"residual.response_mean": tensor(2, index)}, META)
    folder.write_responses(
        {side: rows_of([f"{side}-0", f"{side}-1"], scores={"lexical": None}) for side in ("pos", "neg")}
    )
    folder.write_vectors("mean_diff", {"direction": tensor(1)[0]}, {"trait": "calm", "layers": [0, 1]})
    folder.write_card({"auc": 0.75, "n": 4})
    folder.write_report("report.html", b"<html></html>")
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TraitRun:
    return fill(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def folder(tmp_path: Path) -> TraitRun:
    return opened(tmp_path / "run")


# --- round trips ----------------------------------------------------------------------------------------------------


@QUICK
@given(rows=ROWS, data=st.data())
def test_rows_read_back_and_lines_are_lines_for_every_program(
    folder: TraitRun, rows: list, data: st.DataObject
) -> None:
    rows = [{**row, "id": f"pos-{i}"} for i, row in enumerate(rows)]
    folder.write_responses_shard(0, rows, META)
    text = (folder.path / "responses/shards/0000.jsonl").read_bytes().decode("utf-8")
    assert folder.read_responses_shard(0) == through_json(rows)
    assert [json.loads(line) for line in text.splitlines()] == through_json(rows)


@QUICK
@given(rows=ROWS)
def test_assembled_responses_read_back(folder: TraitRun, rows: list) -> None:
    rows = [{**row, "id": f"pos-{i}"} for i, row in enumerate(rows)]
    folder.write_responses({"pos": rows, "neg": []})
    assert list(folder.read_responses("pos")) == through_json(rows)
    assert list(folder.read_responses("neg")) == []


@QUICK
@given(
    shards=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
def test_activations_read_back_in_shard_order(tmp_path_factory, shards: list[int], dtype: str) -> None:
    folder = opened(tmp_path_factory.mktemp("run"))
    ids = [[f"{index}/\u2028{row}" for row in range(n)] for index, n in enumerate(shards)]
    parts = [tensor(n, index, getattr(torch, dtype)) for index, n in enumerate(shards)]
    for index in reversed(range(len(shards))):
        folder.write_activations_shard(index, ids[index], {"residual.response_mean": parts[index]}, META)
    stored = folder.open_activations("residual.response_mean")
    read = stored.pick(stored.ids, range(2)).read_layers(slice(None))
    assert list(stored.ids) == [id for shard_ids in ids for id in shard_ids]
    assert read.dtype == parts[0].dtype
    assert torch.equal(read, torch.cat(parts))


def test_shards_past_9999_stay_in_order(folder: TraitRun) -> None:
    for index in (10000, 9999, 2):
        folder.write_activations_shard(index, [str(index)], {"residual.response_mean": tensor(1)}, META)
    assert list(folder.open_activations("residual.response_mean").ids) == ["2", "9999", "10000"]


def test_views_shared_and_strided_tensors_are_stored_by_value(folder: TraitRun) -> None:
    base = tensor(4)
    tensors = {"residual.a": base, "residual.b": base, "mlp.c": base[::2].repeat(2, 1, 1), "mlp.d": base.flip(0).mT.mT}
    folder.write_activations_shard(0, list("abcd"), tensors, META)
    read = load_file(folder.path / "activations/0000.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_per_token_activations_belong_to_one_example(folder: TraitRun) -> None:
    folder.write_activations_shard(0, ["a", "b"], {"residual.all/a": tensor(5), "residual.all/b": tensor(0)}, META)
    read = load_file(folder.path / "activations/0000.safetensors")
    assert sorted(read) == ["residual.all/a", "residual.all/b"]
    assert read["residual.all/a"].shape == (5, 2, 3)
    with pytest.raises(StoreError, match=r"residual\.all/c"):
        folder.write_activations_shard(1, ["a"], {"residual.all/c": tensor(5)}, META)


def test_vectors_and_card_read_back(finished: TraitRun) -> None:
    tensors, metadata = finished.read_vectors("mean_diff")
    assert torch.equal(tensors["direction"], tensor(1)[0])
    assert metadata == {"trait": "calm", "layers": [0, 1], "layer_convention": LAYER_CONVENTION}
    assert finished.read_card() == {"auc": 0.75, "n": 4}
    assert finished.methods() == ["mean_diff"]
    assert finished.read_config() == CONFIG


def test_other_programs_can_read_the_files(finished: TraitRun) -> None:
    from safetensors import safe_open

    with safe_open(finished.path / "activations/0000.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ids"]) == ["pos-0", "neg-0"]
    assert json.loads(metadata["layer_convention"]) == LAYER_CONVENTION
    receipt = json.loads((finished.path / "activations/0000.receipt.json").read_text())
    assert receipt["tensors"] == {"residual.response_mean": {"dtype": "float32", "shape": [2, 2, 3]}}
    assert receipt["meta"] == META
    assert receipt["rows"] == 2


# --- equal inputs, equal bytes --------------------------------------------------------------------------------------


def test_same_inputs_same_bytes(finished: TraitRun, tmp_path: Path) -> None:
    assert contents(fill(tmp_path / "elsewhere").path) == contents(finished.path)


def test_safetensors_alone_would_not_give_the_same_bytes() -> None:
    """Control of the test above: the reason for sorting the header."""
    from safetensors.torch import save

    metadata = {name: name for name in "abcdefgh"}
    assert len({save({"x": torch.zeros(1)}, metadata=metadata) for _ in range(20)}) > 1


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    before = contents(fill(tmp_path).path)
    assert contents(fill(tmp_path).path) == before


# --- damage ---------------------------------------------------------------------------------------------------------


def test_an_intact_folder_has_no_finding(finished: TraitRun) -> None:
    assert finished.verify() == []
    assert verify_tree(finished.path) == []


@settings(QUICK, max_examples=400)
@given(data=st.data())
def test_verify_finds_any_flipped_bit_and_any_cut(finished: TraitRun, data: st.DataObject) -> None:
    files = {name: body for name, body in contents(finished.path).items() if name != "reports/report.html"}
    name = data.draw(st.sampled_from(sorted(files)))
    body = bytearray(files[name])
    position = data.draw(st.integers(0, len(body) - 1))
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
        (finished.path / name).write_bytes(body)
        found = {path.name.split(".")[0] for path in (finding.path for finding in finished.verify())}
        assert name.rpartition("/")[2].split(".")[0] in found
    finally:
        (finished.path / name).write_bytes(files[name])


def test_every_single_bit_of_a_data_file_counts(folder: TraitRun) -> None:
    folder.write_activations_shard(0, [], {"x.y": torch.empty(0, 1, 1)}, META)
    path = folder.path / "activations/0000.safetensors"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        body = bytearray(whole)
        body[bit // 8] ^= 1 << bit % 8
        path.write_bytes(body)
        assert [finding.path for finding in folder.verify()] == [path]
    path.write_bytes(whole)
    assert folder.verify() == []


@pytest.mark.parametrize("name", ["responses/shards/0000", "activations/0001"])
@pytest.mark.parametrize(
    ("harm", "suffixes"),
    [
        ("delete", ("data", "receipt")),
        ("cut", ("data", "receipt")),
        ("empty", ("data", "receipt")),
        ("zero", ("receipt",)),
    ],
)
def test_a_harmed_shard_is_not_done(tmp_path: Path, name: str, harm: str, suffixes: tuple[str, ...]) -> None:
    folder = fill(tmp_path)
    stage, index = name.partition("/")[0], int(name[-4:])
    data = next(path for path in tmp_path.glob(f"{name}.*") if not path.name.endswith(".json"))
    files = {"data": data, "receipt": tmp_path / f"{name}.receipt.json"}
    for suffix in suffixes:
        path = files[suffix]
        body = path.read_bytes()
        assert folder.shard_done(stage, index)
        spoil(path, harm)
        assert not folder.shard_done(stage, index)
        assert folder.verify()
        path.write_bytes(body)
    assert folder.verify() == []


def spoil(path: Path, harm: str) -> None:
    body = path.read_bytes()
    match harm:
        case "delete":
            path.unlink()
        case "cut":
            path.write_bytes(body[:-1])
        case "empty":
            path.write_bytes(b"")
        case "zero":
            path.write_bytes(bytes(len(body)))


@pytest.mark.parametrize("stage", ["responses", "activations"])
def test_a_flipped_bit_is_never_read(tmp_path: Path, stage: str) -> None:
    folder = fill(tmp_path)
    path = next(tmp_path.glob(f"{stage}/**/0001.[!r]*"))
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    assert folder.shard_done(stage, 1)  # the size is right
    with pytest.raises(StoreError, match=r"0001\..*sha256"):
        folder.read_responses_shard(1) if stage == "responses" else folder.open_activations("residual.response_mean")
    path.unlink()  # the remedy
    assert not folder.shard_done(stage, 1)


def test_a_rewritten_shard_has_no_receipt_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match=r"0000\.jsonl.*No space left"):
        folder.write_responses_shard(0, rows_of(["pos-0", "neg-0"], new=1), META)
    assert not folder.shard_done("responses", 0)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_examples_that_one_side_lacks_are_found(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    folder.write_activations_shard(1, ["pos-1"], {"residual.response_mean": tensor(1)}, META)
    assert [(f.path.name, "neg-1" in f.problem) for f in folder.verify()] == [("0001.safetensors", True)]
    folder.write_responses_shard(1, [*rows_of(["pos-1"]), {"id": "neg-1", "token_ids": []}], META)
    assert folder.verify() == []  # an empty response has no activation
    for path in tmp_path.glob("*/**/0001.*"):
        path.unlink()
    assert [f.path.name for f in folder.verify()] == ["neg.jsonl", "pos.jsonl"]  # a lost shard


def test_shards_that_differ_are_not_joined(folder: TraitRun) -> None:
    folder.write_activations_shard(0, ["a"], {"x.y": tensor(1)}, META)
    folder.write_activations_shard(1, ["b"], {"x.y": tensor(1, dtype=torch.bfloat16)}, META)
    with pytest.raises(StoreError, match=r"'x\.y'.*bfloat16.*float32"):
        folder.open_activations("x.y")
    with pytest.raises(StoreError, match=r"'x\.z'.*x\.y"):
        folder.open_activations("x.z")


def test_rows_must_be_labelled(folder: TraitRun) -> None:
    with pytest.raises(StoreError, match=r"'x\.y' of shape \[2, 2, 3\].*1 ids"):
        folder.write_activations_shard(0, ["a"], {"x.y": tensor(2)}, META)
    with pytest.raises(StoreError, match=r"0000\.safetensors"):
        folder.write_activations_shard(0, ["a", "a"], {"x.y": tensor(2)}, META)
    with pytest.raises(StoreError, match=r"0000\.jsonl"):
        folder.write_responses_shard(0, rows_of(["a", "a"]), META)
    assert folder.verify() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_enters_json(folder: TraitRun, value: float) -> None:
    for write in (
        lambda: folder.write_responses_shard(0, [{"id": "a", "score": value}], META),
        lambda: folder.write_responses_shard(0, [], {"x": value}),
        lambda: folder.write_card({"auc": [value]}),
        lambda: folder.write_vectors("pca", {}, {"auc": value}),
    ):
        with pytest.raises(StoreError, match="NaN or Infinity"):
            write()
    assert not folder.shard_done("responses", 0)


def test_verify_tree_sees_every_run(tmp_path: Path) -> None:
    for trait in ("calm", "brave"):
        fill(tmp_path / "exp" / trait)
        spoil(tmp_path / "exp" / trait / "vectors/card.json", "cut")
    (tmp_path / "study.py").write_text("")
    (tmp_path / "notes").mkdir()
    expected = [tmp_path / "exp" / trait / "vectors/card.json" for trait in ("brave", "calm")]
    for root in (tmp_path, tmp_path / "exp"):
        assert [finding.path for finding in verify_tree(root)] == expected


# --- start and resume -----------------------------------------------------------------------------------------------


def test_open_returns_true_if_the_run_was_begun_before(tmp_path: Path) -> None:
    folder = TraitRun(tmp_path / "a" / "b")
    assert folder.open(CONFIG) is False
    before = contents(folder.path)
    other_machine = {**CONFIG, "model": {"name": "tiny", "device": "cuda"}, "workers": 4}
    assert folder.open(other_machine) is True
    assert contents(folder.path) == before
    assert fingerprint(other_machine) == fingerprint(CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"generation": {"temperature": 0.7, "stop_strings": ["a", "b"]}},
            "generation.temperature was 0.0 and is now 0.7",
        ),
        (
            {"generation": {"temperature": 0.0, "stop_strings": ["a"]}},
            'generation.stop_strings.1 was "b" and is now absent',
        ),
        ({"model": {"kind": "x"}}, 'model.kind was absent and is now "x"'),
        ({"model": {"device": "cpu"}}, "model was absent and is now {}"),
        ({"seed": None}, "seed was absent and is now null"),
    ],
)
def test_another_config_is_refused_by_field(finished: TraitRun, change: dict, message: str) -> None:
    before = contents(finished.path)
    with pytest.raises(RunMismatch) as caught:
        finished.open({**CONFIG, **change})
    assert message in str(caught.value)
    assert "--experiment" in str(caught.value)
    assert f"delete {finished.path}" in str(caught.value)
    assert contents(finished.path) == before
    assert fingerprint({**CONFIG, **change}) != fingerprint(CONFIG)


@pytest.mark.parametrize("harm", ["cut", "empty", "zero", "delete"])
def test_a_harmed_config_stops_the_run(tmp_path: Path, harm: str) -> None:
    folder = fill(tmp_path)
    spoil(tmp_path / "run.json", harm)
    with pytest.raises(StoreError, match=r"run\.json: .*--experiment.*delete"):
        folder.open(CONFIG)


def test_a_document_that_nests_too_deep_is_damage_not_a_crash(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (tmp_path / "vectors/card.json").write_text('{"seal": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(StoreError, match=r"card\.json"):
        folder.read_card()


def test_orphans_of_dead_processes_go_and_others_stay(folder: TraitRun) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = [folder.path / f".run.json.{int(dead.stdout)}.tmp", folder.path / "activations" / f".a.{os.getpid()}.tmp"]
    kept = [folder.path / f".b.{os.getppid()}.tmp", folder.path / "notes.tmp", folder.path / ".mine.tmp"]
    for path in gone + kept:
        path.write_bytes(b"x")
    assert [finding.path for finding in folder.verify()] == gone
    with folder.lock():
        assert not any(path.exists() for path in gone)
        assert all(path.exists() for path in kept)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "Gemma-2b_cognitive.v1", "0" * 64, "console", "com", "COM10"])
def test_good_names(name: str) -> None:
    assert check_name(name, "trait") == name


BAD_NAMES = ("../x", "/etc/x", "CON", "con.txt", "Lpt1", "x" * 300, "x" * 65, "a\0b", "x\n", "é", "a b")
BAD_NAMES += ("", ".", "..", ".x", "-x", "x/y", "x\\y", "x.", "~")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(tmp_path: Path, name: str) -> None:
    for experiment, trait in ((name, "calm"), ("exp", name)):
        with pytest.raises(ConfigError, match=r"experiment|trait") as caught:
            trait_run(tmp_path, experiment, trait)
        assert "\0" not in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError):
        opened(tmp_path / "run").write_vectors(name, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@QUICK
@given(name=st.text(max_size=8) | st.text("aZ09._-/\\\0 ", max_size=8))
def test_a_checked_name_is_one_path_component(tmp_path: Path, name: str) -> None:
    try:
        path = trait_run(tmp_path, "exp", name).path
    except ConfigError:
        return
    assert path.parent == tmp_path / "exp"
    assert path.resolve().parent == (tmp_path / "exp").resolve()


def test_no_symbolic_link_leads_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "experiments", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "exp").symlink_to(outside)
    with pytest.raises(StoreError, match=r"symbolic link"):
        trait_run(root, "exp", "calm")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(StoreError):
        trait_run(root, "loop", "calm").open(CONFIG)
    run = trait_run(root, "good", "calm")
    run.path.mkdir(parents=True)
    (run.path / "activations").symlink_to(outside)
    with pytest.raises(StoreError, match=r"symbolic link"):
        run.open(CONFIG)
    (tmp_path / "alias").symlink_to(root)
    assert trait_run(tmp_path / "alias", "new", "calm").open(CONFIG) is False  # the root itself may be a link
    assert list(outside.iterdir()) == []


def test_a_lock_file_that_is_a_link_is_not_followed(folder: TraitRun, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (folder.path / ".lock").symlink_to(precious)
    with pytest.raises(StoreError), folder.lock():
        pass
    assert precious.read_text() == "keep"


# --- modes, locks, imports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_obey_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        fill(tmp_path / "run")
        assert TraitRun(tmp_path / "run").verify() == []
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()} == {mode}


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    atomic_write(path, b"old")
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                atomic_write(path, b"new")
        assert contents(tmp_path) == {"x": b"old"}


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    atomic_write(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_lock_can_be_shared_or_not(tmp_path: Path) -> None:
    folder = TraitRun(tmp_path)
    mine = rf"\(pid {os.getpid()}\)"
    with folder.lock(shared=True), folder.lock(shared=True), pytest.raises(StoreError, match=mine), folder.lock():
        pass
    with folder.lock(), pytest.raises(StoreError, match=mine), folder.lock(shared=True):
        pass
    with pytest.raises(RuntimeError, match="mine"), folder.lock():
        raise RuntimeError("mine")
    with folder.lock():
        pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with pytest.warns(UserWarning, match="no locks"), hold_lock(tmp_path / ".lock"):
        pass


def test_runs_are_verified_without_torch(finished: TraitRun) -> None:
    code = "import sys; from extraction.storage.experiment_dir import verify_tree\n"
    code += "print(verify_tree(sys.argv[1]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(finished.path)]
    assert subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout == "[] False\n"


# --- logs of judgements ---------------------------------------------------------------------------------------------


LINES = st.lists(st.dictionaries(TEXT.filter(lambda key: key not in ("seal", "key")), JSON, max_size=3), max_size=5)


@QUICK
@given(LINES, LINES)
def test_any_judgements_read_back_by_key(tmp_path: Path, first: list, second: list) -> None:
    folder = opened(tmp_path / os.urandom(8).hex())
    keyed = [{"key": str(i), **row} for i, row in enumerate([*first, *second])]
    folder.add_judgements("openai", keyed[: len(first)])
    folder.add_judgements("openai", keyed[len(first) :])
    assert folder.read_judgements("openai") == {row["key"]: through_json(row) for row in keyed}
    assert folder.read_judgements("local") == {}
    assert folder.verify() == []


def log_of(folder: TraitRun) -> Path:
    folder.add_judgements("openai", [{"key": str(i), "score": 50.0 + i} for i in range(4)])
    return folder.path / "judgements/openai.jsonl"


def test_a_log_torn_anywhere_loses_the_torn_line_alone(folder: TraitRun) -> None:
    path = log_of(folder)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert list(folder.read_judgements("openai")) == [str(i) for i in range(kept)]
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        folder.add_judgements("openai", [{"key": "new", "score": 1.0}])
        assert list(folder.read_judgements("openai")) == [*(str(i) for i in range(kept)), "new"]
        assert folder.verify() == []


def test_a_flipped_bit_of_a_log_loses_at_most_the_lines_it_touches_and_is_found(folder: TraitRun) -> None:
    path = log_of(folder)
    whole, sound = path.read_bytes(), folder.read_judgements("openai")
    for at in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = folder.read_judgements("openai")
        assert all(sound[key] == row for key, row in found.items())
        assert 2 <= len(found) < 4
        assert path in [finding.path for finding in folder.verify()]


def test_the_name_of_a_judges_log_is_checked(folder: TraitRun) -> None:
    with pytest.raises(ConfigError):
        folder.add_judgements("../x", [])


def test_judging_settings_are_no_part_of_a_runs_identity() -> None:
    judged = {"judge": "openai", "judge_model": "m", "judge_url": "u", "judge_concurrency": 1, "judge_price": [1, 2]}
    assert fingerprint(CONFIG | judged | {"coherence_threshold": 9}) == fingerprint(CONFIG)
    assert fingerprint(CONFIG | {"seed": 1}) != fingerprint(CONFIG)
