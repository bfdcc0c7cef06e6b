"""Vectors of other programs: whole files made by hand, round trips, and what a wrong layer convention does."""

from __future__ import annotations

import io
import json
import pickle
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
FACTS = VectorMetadata(model_type="llama", n_layers=5)
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
    return FORMATS[name].write(direction, FACTS).data


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def said(work: Any, *arguments: Any, **options: Any) -> str:
    """The message of the VectorError that must come: one line."""
    with pytest.raises(VectorError) as failure:
        work(*arguments, **options)
    assert "\n" not in str(failure.value)
    return str(failure.value)


# --- golden files ---------------------------------------------------------------------------------------------------


def test_gguf_is_the_file_made_by_hand():
    tensors = {f"direction.{k}": f32(VALUES[k]) for k in (1, 2, 3)}
    made = write_by_hand([ARCHITECTURE, ("controlvector.layer_count", UINT32, 3)], tensors)
    assert written("gguf") == made
    assert FORMATS["gguf"].write(DIRECTION, FACTS).notes == (
        "layer 0 was left out: this format can't address the output of decoder block 0",
    )
    assert FORMATS["gguf"].write(WITHOUT_BLOCK_0, FACTS).notes == ()


def test_repeng_is_the_file_made_by_hand():
    metadata = [
        ARCHITECTURE,
        ("controlvector.model_hint", STRING, "llama"),
        ("controlvector.layer_count", UINT32, 3),
    ]
    assert written("repeng") == write_by_hand(metadata, {f"direction.{k}": f32(VALUES[k]) for k in (1, 2, 3)})
    untyped = FORMATS["repeng"].write(DIRECTION, VectorMetadata())
    assert load_as_llama_cpp(untyped.data)[2]["controlvector.model_hint"] == "m"
    assert "model_hint is its name, m" in untyped.notes[-1]


@pytest.mark.parametrize("name", ["gguf", "repeng"])
def test_llama_cpp_adds_each_vector_to_the_output_of_its_block(name):
    hidden, steering, _ = load_as_llama_cpp(written(name))
    assert hidden == 3
    assert steering == {k: VALUES[k] for k in (1, 2, 3)}


def test_the_strict_reader_rejects_what_llama_cpp_rejects(tmp_path):
    for tensors in (
        {"direction.0": f32([1])},
        {"direction.1": f32([1]), "direction.2": f32([1, 2])},
        {"other.1": f32([1])},
    ):
        data = write_by_hand([ARCHITECTURE], tensors)
        with pytest.raises(Rejected):
            load_as_llama_cpp(data)
        assert str(tmp_path) in said(load_direction, put(tmp_path, data))


def test_persona_vectors_has_the_embeddings_in_front(tmp_path):
    rows = torch.load(put(tmp_path, written("persona_vectors")), weights_only=True)
    assert rows.tolist() == [[0, 0, 0], VALUES[0], VALUES[1], VALUES[2], VALUES[3], [0, 0, 0]]
    theirs = torch.tensor([[9.0, 9, 9], VALUES[0], VALUES[1], VALUES[2], [8.0, 8, 8]])
    loaded = read_direction(put(tmp_path, torch_bytes(theirs)), format="persona_vectors")
    assert loaded.direction == Direction.from_layers({k: torch.tensor(VALUES[k]) for k in (0, 1, 2)})
    assert "rows 0 (embeddings) and 4 (after the final norm)" in loaded.notes[0]


def test_assistant_axis_has_a_row_a_block(tmp_path):
    data = torch.load(put(tmp_path, written("assistant_axis")), weights_only=True)
    assert data["axis"].tolist() == [VALUES[0], VALUES[1], VALUES[2], VALUES[3], [0, 0, 0]]
    rows = torch.tensor([VALUES[0], VALUES[1]])
    for theirs, format in (({"axis": rows}, None), ({"vector": rows, "type": "pos_3"}, None), (rows, "assistant_axis")):
        found = load_direction(put(tmp_path, torch_bytes(theirs)), format=format, model="m")
        assert found == DIRECTION.select([0, 1])


def test_steering_vectors_is_what_their_class_takes(tmp_path):
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


# --- a wrong convention ---------------------------------------------------------------------------------------------


def test_a_file_that_is_one_late_is_read_with_its_base_and_wrongly_without(tmp_path):
    metadata = [ARCHITECTURE, ("controlvector.layer_count", INT32, 3)]
    late = put(tmp_path, write_by_hand(metadata, {f"direction.{k + 1}": f32(VALUES[k]) for k in (0, 1, 2)}))
    right = DIRECTION.select([0, 1, 2])
    assert load_direction(late, base=1, model="m") == right
    wrong = read_direction(late, model="m")
    assert wrong.direction != right
    assert wrong.direction.layers == (1, 2, 3)
    assert "one late: --base 1 puts it right" in wrong.notes[0]
    assert "one late" not in " ".join(read_direction(late, base=0).notes)
    assert read_direction(put(tmp_path, written("repeng"))).notes == ()
    assert "holds number 1, but --base says that block 0 is number 2" in said(load_direction, late, base=2)


def test_one_convention_read_as_another_is_wrong(tmp_path):
    path = put(tmp_path, written("persona_vectors"))
    assert load_direction(path, model="m") == DIRECTION
    assert load_direction(path, format="assistant_axis", model="m") != DIRECTION
    assert load_direction(path, base=0, format="persona_vectors", model="m") != DIRECTION


def test_a_bare_tensor_does_not_say_what_it_is(tmp_path):
    path = put(tmp_path, torch_bytes(torch.ones(4, 3)))
    assert "give --format persona_vectors (row 1 is block 0) or --format assistant_axis" in said(load_direction, path)


# --- round trips ----------------------------------------------------------------------------------------------------

ROWS = st.dictionaries(
    st.integers(1, 8),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=2).filter(any),
    min_size=1,
)


@pytest.mark.parametrize("name", FORMATS)
@QUICK
@given(rows=ROWS)
def test_what_is_written_reads_back_exactly(name, rows, tmp_path):
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


def test_every_format_documents_what_it_reads_and_writes():
    page = (REPOSITORY / "docs/exchange.md").read_text()
    for name, form in FORMATS.items():
        assert form.write.__doc__
        assert form.read.__doc__
        assert f"| `{name}` |" in page


# --- what is wrong with a file --------------------------------------------------------------------------------------


class Bomb:
    """What a pickle must not do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def _zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("direction.npy", b"")
    data = bytearray(buffer.getvalue())
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 3_000_000_000)  # the size that the directory claims
    return bytes(data)


def _later_version(archive: bytes) -> bytes:
    """A zip archive that says that only a later zip can read it, which is no BadZipFile to Python."""
    at = archive.index(b"PK\x01\x02")
    return archive[: at + 6] + struct.pack("<H", 255) + archive[at + 8 :]


GOOD = written("gguf")
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no file of vectors that is known"),
    "text": (b"What is rain?\n", "no file of vectors that is known"),
    "gguf cut in its header": (GOOD[:40], "no whole GGUF file"),
    "gguf cut in a tensor": (GOOD[:-40], "no whole GGUF file"),
    "gguf of many tensors": (GOOD[:8] + b"\xff" * 7 + b"\x00" + GOOD[16:], "no whole GGUF file"),
    "gguf of a model": (write_by_hand([ARCHITECTURE], {"blk.0.w": f32([1])}), "'blk.0.w' is no direction.1"),
    "gguf without tensors": (write_by_hand([ARCHITECTURE], {}), "it needs direction.1"),
    "gguf in half precision": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([1]).astype(np.float16)}),
        "direction.1 is F16 [1]",
    ),
    "gguf in two dimensions": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([[1, 2]])}),
        "float32 in one dimension",
    ),
    "gguf with NaN": (write_by_hand([ARCHITECTURE], {"direction.1": f32([np.nan])}), "layer 1 holds NaN"),
    "gguf twice the same": (
        write_by_hand([ARCHITECTURE], {"direction.1": f32([1]), "direction.01": f32([1])}),
        "1 numbers on 2 tensors",
    ),
    "pickled object": (pickle.dumps(Bomb()), "Python objects, which are not loaded"),
    "pickled object, saved by torch": (torch_bytes({"axis": Bomb()}), "Python objects, which are not loaded"),
    "another layer type": (
        torch_bytes({"layer_activations": {1: torch.ones(2)}, "layer_type": "mlp"}),
        "its layer_type is 'mlp'",
    ),
    "names for numbers": (
        torch_bytes({"layer_activations": {"1": torch.ones(2)}}),
        "no dict of layer number to tensor",
    ),
    "a word": (torch_bytes("hello"), "holds a str, not a tensor"),
    "three dimensions": (torch_bytes({"axis": torch.ones(2, 2, 2)}), "a tensor of float32 [2, 2, 2]"),
    "only zeros": (torch_bytes({"axis": torch.zeros(2, 2)}), "needs one vector a layer"),
    "damaged archive": (written("numpy")[:-30], "a damaged archive"),
    "an archive of the future": (_later_version(written("numpy")), "a damaged archive"),
    "an archive that unpacks to much": (_zip_bomb(), "3000000000 bytes when unpacked"),
    "damaged safetensors": (written("traitline")[:-4], "or damaged"),
    "safetensors of others": (
        len(b'{"direction":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}').to_bytes(8, "little")
        + b'{"direction":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
        + bytes(4),
        "lacks 'direction' or the layer convention",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(name, tmp_path, capfd):
    data, message = BROKEN[name]
    assert message in said(load_direction, put(tmp_path, data))
    assert "it ran" not in capfd.readouterr().out


def test_numpy_archives_hold_no_pickles(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, layers=np.array([0]), direction=np.array([Bomb()], dtype=object))
    assert "no numpy archive with" in said(load_direction, put(tmp_path, buffer.getvalue()))


def test_forms_that_hold_every_layer_need_the_model():
    for name in ("persona_vectors", "assistant_axis"):
        assert "give --model NAME" in said(FORMATS[name].write, DIRECTION, VectorMetadata())
        assert "layer 3: the model has 3 layers" in said(FORMATS[name].write, DIRECTION, VectorMetadata(n_layers=3))
    assert "layer 0 alone" in said(FORMATS["gguf"].write, DIRECTION.select([0]), VectorMetadata())


def test_without_its_package_gguf_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'traitline[exchange]'" in said(FORMATS["gguf"].write, DIRECTION, FACTS)


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with vectors of a run of the tiny model, as the current folder."""
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
def test_what_is_exported_can_be_imported_and_exported_again(name, root):
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
    assert "give --experiment and --to" in refused("export", "--trait", "calm", "--to", "gguf", "--trait-json")


def test_a_file_is_replaced_only_with_force(root):
    to = ("export", *RUN, "--to", "gguf", "--output", "out.gguf")
    succeed(*to)
    succeed(*to)  # the same bytes
    before = Path("out.gguf").read_bytes()
    assert "is there already; give --force" in refused(*to, "--scale", "2")
    assert Path("out.gguf").read_bytes() == before
    succeed(*to, "--scale", "2", "--force")
    assert Path("out.gguf").read_bytes() != before
    succeed("import", "out.gguf", "--as", "x")
    succeed("import", "out.gguf", "--as", "x")
    succeed(*to, "--force")
    assert "another vector is there already" in refused("import", "out.gguf", "--as", "x")
    succeed("import", "out.gguf", "--as", "x", "--force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguff"), "no format of vectors; did you mean 'gguf'?"),
        (("--to", "gguf", "--layers", "9"), "layer 9 is out of range"),
        (("--to", "gguf", "--layers", "0"), "layer 0 alone"),
        (("--to", "gguf", "--scale", "nan"), "--scale nan"),
        (("--to", "gguf", "--scale", "0"), "--scale 0"),
        (("--to", "gguf", "--normalise", "typical-norm"), "no typical norm of layer 0; make it again"),
        (("--to", "gguf", "--output", "no/such/out.gguf"), "its folder does not exist"),
        (("--to", "repeng", "--model", "pocket"), "model pocket has hidden size"),
        ((), "give --experiment and --to for a vector"),
        (("--to", "gguf", "--trait-json", "--output", "x"), "--output names one file"),
        (("--to", "gguf", "--method", "probe"), "no vectors of 'probe'; it has pca"),
        (("--to", "gguf", "--trait", "../x"), "can't be the name of a file"),
        (("--to", "gguf", "--trait", "warm"), "make them first"),
    ],
)
def test_what_export_refuses(arguments, message, root):
    before = sorted(root.iterdir())
    assert message in refused("export", *RUN, *arguments)
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out.gguf", "--as", "../x"), "can't be the name of a file"),
        (("out.gguf", "--as", "x", "--format", "pickle"), "--format 'pickle': not known"),
        (("out.gguf", "out.gguf", "--as", "x"), "import one at a time"),
        (("out.gguf", "--as", "x", "--format", "numpy"), "no numpy archive"),
        (("none.gguf", "--as", "x"), "no such file or directory"),
        (("out.gguf",), "Missing option '--as'"),
        (("out.gguf", "--as", "x", "--model", "tinny"), "did you mean 'tiny'?"),
    ],
)
def test_what_import_refuses(arguments, message, root):
    succeed("export", *RUN, "--to", "gguf", "--output", "out.gguf")
    assert message in refused("import", *arguments)
    assert not (root / "experiments/imported").exists()
