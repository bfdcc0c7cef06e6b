"""Control vectors in GGUF, for llama.cpp and repeng.

Their convention: `direction.N` is added to the output of decoder block N, counted from 0, as ours; but N is at least 1,
so block 0 can't be addressed. llama.cpp's loader wants every tensor float32, one-dimensional and of equal length, and
rejects the whole file for a `direction.0`, or a tensor with another name (common_control_vector_load_one and
llama_adapter_cvec::apply). Its own generator writes block i as `direction.{i + 1}`, one
late: read such files with base 1.
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
_NAME = re.compile(r"direction\.([0-9]{1,6})")
_LATE = (
    "this looks like a file of llama.cpp's own generator, which is one late: --base 1 puts it right, --base 0 confirms"
)
_BLOCK_0 = "layer 0 was left out: this format can't address the output of decoder block 0"


def write_gguf(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """llama.cpp's control vector: `direction.N` is block N, N >= 1. Its loader reads no metadata, so there is none."""
    return _written(direction, {})


def write_repeng(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """As repeng's ControlVector.export_gguf: llama.cpp's form with `model_hint` and `layer_count` (its vectors)."""
    hint = facts.model_type or direction.model
    if hint is None:
        raise VectorError("repeng's form names the model's type, which is not known here; take --to gguf")
    written = _written(direction, {"model_hint": hint})
    told = () if facts.model_type else (f"the model's type is not known: model_hint is its name, {hint}",)
    return WrittenFile(written.data, written.notes + told)


def read_gguf(path: Path) -> LayerRows:
    """A control vector by llama.cpp's rules, repeng's metadata where it is there."""
    reader = _opened(path)
    vectors = dict(_tensor(path, tensor) for tensor in reader.tensors)
    if not vectors or len(vectors) < len(reader.tensors):
        raise VectorError(
            f"{path}: {len(vectors)} numbers on {len(reader.tensors)} tensors; it needs direction.1 and on"
        )
    if len({tuple(vector.shape) for vector in vectors.values()}) > 1:
        raise VectorError(f"{path}: its tensors differ in length; all must have the model's hidden size")
    return LayerRows(
        vectors, facts=VectorMetadata(model_type=_hint(reader)), doubt=(_LATE,) if _is_generated(reader) else ()
    )


def _written(direction: Direction, metadata: dict[str, str]) -> WrittenFile:
    layers = [layer for layer in direction.layers if layer > 0]
    if not layers:
        raise VectorError("layer 0 alone: GGUF can't address the output of decoder block 0; take other layers")
    with tempfile.TemporaryDirectory(prefix="traitline-") as folder:
        path = Path(folder) / "vector"
        writer = _gguf().GGUFWriter(str(path), ARCHITECTURE)
        for key, value in metadata.items():
            writer.add_string(f"{ARCHITECTURE}.{key}", value)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", direction.at(layer).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return WrittenFile(path.read_bytes(), (_BLOCK_0,) if 0 in direction.layers else ())


def _opened(path: Path) -> Any:
    """The file's reader. A damaged file can fail anywhere in it, in any way."""
    gguf = _gguf()
    try:
        return gguf.GGUFReader(str(path))
    except Exception as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise VectorError(f"{path}: no whole GGUF file ({reason[:120]}); fetch or make it again") from failure


def _tensor(path: Path, tensor: Any) -> tuple[int, Tensor]:
    import torch

    match = _NAME.fullmatch(tensor.name)
    if match is None or int(match[1]) == 0:
        problem = f"{path}: its tensor {tensor.name[:60]!r} is no direction.1, direction.2 or on"
        raise VectorError(f"{problem}: no control vector, and llama.cpp would reject it too")
    if tensor.tensor_type.name != "F32" or len(tensor.shape) != 1:
        kind = f"{tensor.tensor_type.name} {[int(size) for size in tensor.shape]}"
        raise VectorError(f"{path}: {tensor.name} is {kind}; a control vector holds float32 in one dimension")
    return int(match[1]), torch.tensor(tensor.data)


def _hint(reader: Any) -> str | None:
    field = reader.get_field(f"{ARCHITECTURE}.model_hint")
    return None if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")


def _is_generated(reader: Any) -> bool:
    """llama.cpp's generator alone writes the number of layers as a signed number."""
    field = reader.get_field(f"{ARCHITECTURE}.layer_count")
    return field is not None and [kind.name for kind in field.types] == ["INT32"]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise VectorError("GGUF files need the gguf package: pip install 'traitline[exchange]'") from None
    return gguf
