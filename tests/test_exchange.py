"""Vector formats: files written by hand from their description, round trips, wrong layer conventions, broken files."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from extraction.core.errors import VectorError
from extraction.exchange.formats import FORMATS, load_direction, read_direction, recognise
from extraction.exchange.layer_rows import VectorMetadata
from extraction.storage.experiment_dir import verify_tree
from extraction.storage.trait_run import TraitRun, trait_run
from extraction.vectors.direction import Direction
from tests.gguf_by_hand import INT32, STRING, UINT32, Rejected, load_as_llama_cpp, write_by_hand
from tests.runs import REPOSITORY, make_root, refused, succeed

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
METADATA = VectorMetadata(model_type="llama", n_layers=5)
VALUES = {0: [0.5, -1.0, 2.0], 1: [1.5, 0.25, -8.0], 2: [0.0, 3.0, 1.0], 3: [7.0, -0.125, 4.0]}
DIRECTION = Direction.from_layers(
    {k: torch.tensor(v) for k, v in VALUES.items()}, trait="calm", method="pca", model="m"
)
WITHOUT_BLOCK_0 = DIRECTION.select([1, 2, 3])
ARCHITECTURE = ("general.architecture", STRING, "controlvector")


def f32(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def put(folder: Path, data: bytes) -> Path:
    path = folder / "vector"
    path.write_bytes(data)
    return path


def written(name: str, direction: Direction = DIRECTION) -> bytes:
    return FORMATS[name].write(direction, METADATA).data


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def error_of(work: Any, *arguments: Any, **options: Any) -> str:
    """Return the message of the VectorError that the call must raise: one line."""
    with pytest.raises(VectorError) as failure:
        work(*arguments, **options)
    assert "\n" not in str(failure.value)
    return str(failure.value)


# --- files written by hand --------------------------------------------------------------------------------------------


def test_gguf_equals_the_file_written_by_hand():
    tensors = {f"direction.{k}": f32(VALUES[k]) for k in (1, 2, 3)}
    made = write_by_hand([ARCHITECTURE, ("controlvector.layer_count", UINT32, 3)], tensors)
    assert written("gguf") == made
    (note,) = FORMATS["gguf"].write(DIRECTION, METADATA).notes
    assert "layer 0" in note
    assert FORMATS["gguf"].write(WITHOUT_BLOCK_0, METADATA).notes == ()


def test_repeng_equals_the_file_written_by_hand():
    metadata = [
        ARCHITECTURE,
        ("controlvector.model_hint", STRING, "llama"),
        ("controlvector.layer_count", UINT32, 3),
    ]
    assert written("repeng") == write_by_hand(metadata, {f"direction.{k}": f32(VALUES[k]) for k in (1, 2, 3)})
    untyped = FORMATS["repeng"].write(DIRECTION, VectorMetadata())
    assert load_as_llama_cpp(untyped.data)[2]["controlvector.model_hint"] == "m"
    assert re.search(r"model_hint.*\bm$", untyped.notes[-1])


@pytest.mark.parametrize("name", ["gguf", "repeng"])
def test_llama_cpp_adds_each_vector_to_the_output_of_its_block(name):
    hidden, steering, _ = load_as_llama_cpp(written(name))
    assert hidden == 3
    assert steering == {k: VALUES[k] for k in (1, 2, 3)}


def test_the_reader_rejects_the_files_that_llama_cpp_rejects(tmp_path):
    for tensors in (
        {"direction.0": f32([1])},
        {"direction.1": f32([1]), "direction.2": f32([1, 2])},
        {"other.1": f32([1])},
    ):
        data = write_by_hand([ARCHITECTURE], tensors)
        with pytest.raises(Rejected):
            load_as_llama_cpp(data)
        assert str(tmp_path) in error_of(load_direction, put(tmp_path, data))


def test_persona_vectors_has_the_embeddings_in_front(tmp_path):
    rows = torch.load(put(tmp_path, written("persona_vectors")), weights_only=True)
    assert rows.tolist() == [[0, 0, 0], VALUES[0], VALUES[1], VALUES[2], VALUES[3], [0, 0, 0]]
    theirs = torch.tensor([[9.0, 9, 9], VALUES[0], VALUES[1], VALUES[2], [8.0, 8, 8]])
    loaded = read_direction(put(tmp_path, torch_bytes(theirs)), format="persona_vectors")
    assert loaded.direction == Direction.from_layers({k: torch.tensor(VALUES[k]) for k in (0, 1, 2)})
    assert re.search(r"\b0\b.*\b4\b", loaded.notes[0])  # the rows that were left out


def test_assistant_axis_has_a_row_a_block(tmp_path):
    data = torch.load(put(tmp_path, written("assistant_axis")), weights_only=True)
    assert data["axis"].tolist() == [VALUES[0], VALUES[1], VALUES[2], VALUES[3], [0, 0, 0]]
    rows = torch.tensor([VALUES[0], VALUES[1]])
    for theirs, format in (({"axis": rows}, None), ({"vector": rows, "type": "pos_3"}, None), (rows, "assistant_axis")):
        found = load_direction(put(tmp_path, torch_bytes(theirs)), format=format, model="m")
        assert found == DIRECTION.select([0, 1])


def test_steering_vectors_files_have_the_fields_of_its_class(tmp_path):
    data = torch.load(put(tmp_path, written("steering_vectors")), weights_only=True)
    assert data["layer_type"] == "decoder_block"
    assert {k: v.tolist() for k, v in data["layer_activations"].items()} == VALUES
    plain = {3: torch.tensor(VALUES[3]), 1: torch.tensor(VALUES[1])}
    assert load_direction(put(tmp_path, torch_bytes(plain)), model="m") == DIRECTION.select([1, 3])


def test_numpy_and_traitline_hold_layers_and_directions(tmp_path):
    with np.load(io.BytesIO(written("numpy"))) as archive:
        assert archive["layers"].tolist() == [0, 1, 2, 3]
        assert archive["direction"].dtype == np.float32
        assert archive["direction"].tolist() == list(VALUES.values())
    path = put(tmp_path, written("traitline"))
    assert load_file(path)["direction"].tolist() == list(VALUES.values())
    found = load_direction(path)
    assert (found.trait, found.method, found.model) == ("calm", "pca", "m")


# --- a wrong convention -----------------------------------------------------------------------------------------------


def test_numbers_that_are_one_too_high_need_base_1(tmp_path):
    metadata = [ARCHITECTURE, ("controlvector.layer_count", INT32, 3)]
    late = put(tmp_path, write_by_hand(metadata, {f"direction.{k + 1}": f32(VALUES[k]) for k in (0, 1, 2)}))
    right = DIRECTION.select([0, 1, 2])
    assert load_direction(late, base=1, model="m") == right
    wrong = read_direction(late, model="m")
    assert wrong.direction != right
    assert wrong.direction.layers == (1, 2, 3)
    assert "--base 1" in wrong.notes[0]
    assert "--base" not in " ".join(read_direction(late, base=0).notes)
    assert read_direction(put(tmp_path, written("repeng"))).notes == ()
    assert re.search(r"number 1\b.*--base 2", error_of(load_direction, late, base=2))


def test_a_file_read_by_another_convention_gives_another_direction(tmp_path):
    path = put(tmp_path, written("persona_vectors"))
    assert load_direction(path, model="m") == DIRECTION
    assert load_direction(path, format="assistant_axis", model="m") != DIRECTION
    assert load_direction(path, base=0, format="persona_vectors", model="m") != DIRECTION


def test_a_bare_tensor_needs_a_format(tmp_path):
    path = put(tmp_path, torch_bytes(torch.ones(4, 3)))
    assert re.search("--format persona_vectors.*--format assistant_axis", error_of(load_direction, path))


# --- round trips ------------------------------------------------------------------------------------------------------

ROWS = st.dictionaries(
    st.integers(1, 8),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=2).filter(any),
    min_size=1,
)


@pytest.mark.parametrize("name", FORMATS)
@QUICK
@given(rows=ROWS)
def test_written_vectors_read_back_exactly(name, rows, tmp_path):
    direction = Direction.from_layers({k: torch.tensor(v) for k, v in rows.items()}, model="m")
    data = FORMATS[name].write(direction, VectorMetadata("llama", n_layers=10)).data
    path = put(tmp_path, data)
    assert load_direction(path, format=name, model="m") == direction
    assert load_direction(path, model="m") == direction  # by its content
    assert (
        FORMATS[name].write(load_direction(path, model="m"), VectorMetadata("llama", n_layers=10)).data == data
        or name == "traitline"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_recognised_by_its_content(name, tmp_path):
    assert recognise(put(tmp_path, written(name))) == ("gguf" if name == "repeng" else name)


def test_every_format_documents_its_reading_and_writing():
    page = (REPOSITORY / "docs/exchange.md").read_text()
    for name, form in FORMATS.items():
        assert form.write.__doc__
        assert form.read.__doc__
        assert f"| `{name}` |" in page


# --- broken files -----------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that prints when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def _zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("direction.npy", b"")
    data = bytearray(buffer.getvalue())
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 3_000_000_000)  # the unpacked size in the archive's directory
    return bytes(data)


def _later_version(archive: bytes) -> bytes:
    """Return a zip archive of a later version, for which Python raises another error than BadZipFile."""
    at = archive.index(b"PK\x01\x02")
    return archive[: at + 6] + struct.pack("<H", 255) + archive[at + 8 :]


GOOD = written("gguf")
BROKEN: dict[str, tuple[bytes, str]] = {  # content, and the value or place that the error names
    "empty": (b"", "--format gguf"),
    "text": (b"What is rain?\n", "--format gguf"),
    "gguf cut in its header": (GOOD[:40], "GGUF"),
    "gguf cut in a tensor": (GOOD[:-40], "GGUF"),
    "gguf of many tensors": (GOOD[:8] + b"\xff" * 7 + b"\x00" + GOOD[16:], "GGUF"),
    "gguf of a model": (write_by_hand([ARCHITECTURE], {"blk.0.w": f32([1])}), "'blk.0.w'"),
    "gguf without tensors": (write_by_hand([ARCHITECTURE], {}), "0 tensors"),
    "gguf in half precision": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([1]).astype(np.float16)}),
        "direction.1 is F16 [1]",
    ),
    "gguf in two dimensions": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([[1, 2]])}),
        "direction.1 is F32 [2, 1]",
    ),
    "gguf with NaN": (write_by_hand([ARCHITECTURE], {"direction.1": f32([np.nan])}), "layer 1 "),
    "gguf twice the same": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([1]), "direction.01": f32([1])}),
        "2 tensors with 1 ",
    ),
    "pickled object": (pickle.dumps(Bomb()), "vector: "),
    "pickled object, saved by torch": (torch_bytes({"axis": Bomb()}), "vector: "),
    "another layer type": (
        torch_bytes({"layer_activations": {1: torch.ones(2)}, "layer_type": "mlp"}),
        "'mlp'",
    ),
    "names for numbers": (
        torch_bytes({"layer_activations": {"1": torch.ones(2)}}),
        "layer_activations",
    ),
    "a word": (torch_bytes("hello"), "a str"),
    "three dimensions": (torch_bytes({"axis": torch.ones(2, 2, 2)}), "float32 [2, 2, 2]"),
    "only zeros": (torch_bytes({"axis": torch.zeros(2, 2)}), "vectors of shapes []"),
    "damaged archive": (written("numpy")[:-30], "vector: "),
    "an archive of a later zip version": (_later_version(written("numpy")), "vector: "),
    "an archive that unpacks to much": (_zip_bomb(), "3000000000 bytes"),
    "damaged safetensors": (written("traitline")[:-4], "vector: "),
    "safetensors of others": (
        len(b'{"direction":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}').to_bytes(8, "little")
        + b'{"direction":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
        + bytes(4),
        "vector: ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(name, tmp_path, capfd):
    data, message = BROKEN[name]
    assert message in error_of(load_direction, put(tmp_path, data))
    assert "it ran" not in capfd.readouterr().out


def test_numpy_archives_hold_no_pickles(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, layers=np.array([0]), direction=np.array([Bomb()], dtype=object))
    path = put(tmp_path, buffer.getvalue())
    assert str(path) in error_of(load_direction, path)


def test_formats_with_a_row_for_every_layer_need_the_model():
    for name in ("persona_vectors", "assistant_axis"):
        assert "--model" in error_of(FORMATS[name].write, DIRECTION, VectorMetadata())
        assert "layer 3: " in error_of(FORMATS[name].write, DIRECTION, VectorMetadata(n_layers=3))
    assert "layer 0 " in error_of(FORMATS["gguf"].write, DIRECTION.select([0]), VectorMetadata())


def test_without_the_gguf_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "traitline[exchange]" in error_of(FORMATS["gguf"].write, DIRECTION, METADATA)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a root with vectors of a run of the tiny model the current folder."""
    root = make_root(tmp_path)
    monkeypatch.chdir(root)
    hidden = json.loads((root / "model/config.json").read_text())["hidden_size"]
    run = trait_run(root / "experiments", "demo", "calm")
    run.open({"model": {"name": "tiny"}})
    values = torch.arange(2 * hidden).reshape(2, hidden) + 1.0
    run.write_vectors(
        "pca", {"direction": values}, {"trait": "calm", "method": "pca", "model": "tiny", "layers": [0, 1]}
    )
    return root


RUN = ("--experiment", "demo", "--trait", "calm", "--method", "pca")


def vectors_of(root: Path) -> Direction:
    return Direction.from_run(TraitRun(root / "experiments/demo/calm"), "pca")


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_vector_can_be_imported_and_exported_again(name, root):
    succeed("export", *RUN, "--to", name)
    path = root / FORMATS[name].file_name.format(trait="calm", method="pca")
    output = succeed("import", path, "--as", "back", "--model", "tiny").output
    assert "read as " in output
    back = Direction.from_run(TraitRun(root / "experiments/imported/back"), "imported")
    assert back == vectors_of(root).select(back.layers)
    assert len(back.layers) == (1 if name in ("gguf", "repeng") else 2)
    again = ("--experiment", "imported", "--trait", "back", "--method", "imported")
    succeed("export", *again, "--to", "numpy", "--output", "again.npz")
    assert load_direction("again.npz", model="tiny") == back
    assert "model_hint" not in succeed("export", *again, "--to", "repeng", "--output", "again.gguf").output
    assert verify_tree(root / "experiments") == []


def test_layers_length_and_scale(root):
    direction = vectors_of(root)
    TraitRun(root / "experiments/demo/calm").write_card({"layers": [0, 1], "typical_norm": [2.0, 5.0]})
    for options, wanted in (
        (("--layers", "1"), direction.select([1])),
        (("--scale", "-0.5"), direction * -0.5),
        (("--normalise", "unit"), direction.normalised()),
        (("--normalise", "typical-norm", "--scale", "2"), 2 * direction.normalised([2.0, 5.0])),
    ):
        succeed("export", *RUN, "--to", "traitline", "--output", "out", "--force", *options)
        assert load_direction("out") == wanted


def test_a_vector_and_its_trait_go_out_together(root):
    succeed("export", *RUN, "--to", "persona_vectors", "--trait-json")
    assert recognise("calm_response_avg_diff.pt") == "persona_vectors"
    assert json.loads(Path("calm.json").read_text())["instruction"][0] == {"pos": "Be calm.", "neg": "Be wild."}
    assert "--experiment" in refused("export", "--trait", "calm", "--to", "gguf", "--trait-json")


def test_a_file_is_replaced_only_with_force(root):
    to = ("export", *RUN, "--to", "gguf", "--output", "out.gguf")
    succeed(*to)
    succeed(*to)  # the same bytes
    before = Path("out.gguf").read_bytes()
    assert "--force" in refused(*to, "--scale", "2")
    assert Path("out.gguf").read_bytes() == before
    succeed(*to, "--scale", "2", "--force")
    assert Path("out.gguf").read_bytes() != before
    succeed("import", "out.gguf", "--as", "x")
    succeed("import", "out.gguf", "--as", "x")
    succeed(*to, "--force")
    assert "--force" in refused("import", "out.gguf", "--as", "x")
    succeed("import", "out.gguf", "--as", "x", "--force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguff"), "--to 'gguff'"),
        (("--to", "gguf", "--layers", "9"), "layer 9"),
        (("--to", "gguf", "--layers", "0"), "layer 0"),
        (("--to", "gguf", "--scale", "nan"), "--scale nan"),
        (("--to", "gguf", "--scale", "0"), "--scale 0"),
        (("--to", "gguf", "--normalise", "typical-norm"), "card.json"),
        (("--to", "gguf", "--output", "no/such/out.gguf"), "no/such/out.gguf"),
        (("--to", "repeng", "--model", "pocket"), "model pocket"),
        ((), "--to"),
        (("--to", "gguf", "--trait-json", "--output", "x"), "--output"),
        (("--to", "gguf", "--method", "probe"), "'probe'; it has pca"),
        (("--to", "gguf", "--trait", "../x"), "'../x'"),
        (("--to", "gguf", "--trait", "warm"), "demo/warm"),
    ],
)
def test_export_errors(arguments, message, root):
    before = sorted(root.iterdir())
    assert message in refused("export", *RUN, *arguments)
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out.gguf", "--as", "../x"), "'../x'"),
        (("out.gguf", "--as", "x", "--format", "pickle"), "--format 'pickle'"),
        (("out.gguf", "out.gguf", "--as", "x"), "2 files"),
        (("out.gguf", "--as", "x", "--format", "numpy"), "out.gguf"),
        (("none.gguf", "--as", "x"), "none.gguf"),
        (("out.gguf",), "--as"),
        (("out.gguf", "--as", "x", "--model", "tinny"), "'tinny'"),
    ],
)
def test_import_errors(arguments, message, root):
    succeed("export", *RUN, "--to", "gguf", "--output", "out.gguf")
    assert message in refused("import", *arguments)
    assert not (root / "experiments/imported").exists()
