"""Control vectors in GGUF, for llama.cpp and repeng.

Layer numbers: `direction.N` is added to the output of decoder block N, counted from 0, as in Traitline; but N is at
least 1, so block 0 can't be addressed. llama.cpp's loader needs float32 tensors of one dimension and equal length, and
rejects the whole file for a `direction.0` or a tensor of another name (common_control_vector_load_one and
llama_adapter_cvec::apply). Its own generator writes block i as `direction.{i + 1}`: read such files with base 1.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.errors import VectorError
from extraction.exchange.layer_rows import LayerRows, VectorMetadata, WrittenFile

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.vectors.direction import Direction

ARCHITECTURE = "controlvector"
_TENSOR_NAME = re.compile(r"direction\.([0-9]{1,6})")
_LATE_NOTE = (
    "this looks like a file of llama.cpp's own generator, whose numbers are one too high: --base 1 corrects them, "
    "--base 0 confirms them"
)
_BLOCK_0_NOTE = "layer 0 was left out: this format can't address the output of decoder block 0"


def write_gguf(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write llama.cpp's control vector: `direction.N` is block N, N >= 1, without metadata (its loader reads none)."""
    return _write_control_vector(direction, {})


def write_repeng(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write what repeng's ControlVector.export_gguf does: llama.cpp's format with `model_hint` and `layer_count`."""
    hint = metadata.model_type or direction.model
    if hint is None:
        raise VectorError("--to repeng: this format has the model's type, which is not known here; give --to gguf")
    written = _write_control_vector(direction, {"model_hint": hint})
    notes = () if metadata.model_type else (f"the model's type is not known: model_hint is its name, {hint}",)
    return WrittenFile(written.data, written.notes + notes)


def read_gguf(path: Path) -> LayerRows:
    """Read a control vector by llama.cpp's rules, and repeng's metadata where there is any."""
    reader = _open_reader(path)
    vectors = dict(_read_tensor(path, tensor) for tensor in reader.tensors)
    if not vectors or len(vectors) < len(reader.tensors):
        raise VectorError(
            f"{path}: {len(reader.tensors)} tensors with {len(vectors)} distinct numbers; it needs direction.1, 2, ..."
        )
    if len({tuple(vector.shape) for vector in vectors.values()}) > 1:
        raise VectorError(f"{path}: its tensors differ in length; all need the model's hidden size")
    return LayerRows(
        vectors,
        metadata=VectorMetadata(model_type=_model_hint(reader)),
        base_notes=(_LATE_NOTE,) if _has_signed_layer_count(reader) else (),
    )


def _write_control_vector(direction: Direction, metadata: dict[str, str]) -> WrittenFile:
    layers = [layer for layer in direction.layers if layer > 0]
    if not layers:
        raise VectorError("layer 0 alone: GGUF can't address the output of decoder block 0; choose other --layers")
    with tempfile.TemporaryDirectory(prefix="traitline-") as folder:
        path = Path(folder) / "vector"
        writer = _import_gguf().GGUFWriter(str(path), ARCHITECTURE)
        for key, value in metadata.items():
            writer.add_string(f"{ARCHITECTURE}.{key}", value)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", direction.at(layer).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return WrittenFile(path.read_bytes(), (_BLOCK_0_NOTE,) if 0 in direction.layers else ())


def _open_reader(path: Path) -> Any:
    """Open the file. A damaged one can raise any exception anywhere in the gguf package, so all are caught."""
    gguf = _import_gguf()
    try:
        return gguf.GGUFReader(str(path))
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise VectorError(f"{path}: not a complete GGUF file ({reason[:120]}); fetch or make it again") from failure


def _read_tensor(path: Path, tensor: Any) -> tuple[int, Tensor]:
    import torch

    match = _TENSOR_NAME.fullmatch(tensor.name)
    if match is None or int(match[1]) == 0:
        problem = f"{path}: its tensor {tensor.name[:60]!r} is not named direction.N, N from 1"
        raise VectorError(f"{problem}: not a control vector, and llama.cpp would reject it too")
    if tensor.tensor_type.name != "F32" or len(tensor.shape) != 1:
        kind = f"{tensor.tensor_type.name} {[int(size) for size in tensor.shape]}"
        raise VectorError(f"{path}: {tensor.name} is {kind}; a control vector holds float32 in one dimension")
    return int(match[1]), torch.tensor(tensor.data)


def _model_hint(reader: Any) -> str | None:
    field = reader.get_field(f"{ARCHITECTURE}.model_hint")
    return None if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")


def _has_signed_layer_count(reader: Any) -> bool:
    """Return True for a signed number of layers, which llama.cpp's generator alone writes."""
    field = reader.get_field(f"{ARCHITECTURE}.layer_count")
    return field is not None and [kind.name for kind in field.types] == ["INT32"]


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise VectorError("GGUF files need the gguf package: pip install 'traitline[exchange]'") from None
    return gguf
