"""The bytes of a run's two formats: rows as JSON lines, tensors as safetensors. The same input gives the same bytes.

What was read has passed its sha256, so it is what was written. Torch is imported only where tensors are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.storage.atomic import reject_nan, store_error, to_builtin, to_json

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]


def to_jsonl(path: Path, rows: Iterable[Row]) -> bytes:
    """One object a line, its keys in the caller's order."""
    lines, ids = bytearray(), []
    with reject_nan(path):
        for row in rows:
            ids.append(row["id"])
            lines += f"{to_json(row)}\n".encode()
    check_labels(path, ids, {})
    return bytes(lines)


def parse_jsonl(data: bytes) -> Iterator[Row]:
    """The rows, one at a time."""
    return (json.loads(line) for line in data.split(b"\n")[:-1])


def safetensors_bytes(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """The file's bytes. Each tensor is copied first, since safetensors refuses views and shared memory."""
    import torch
    from safetensors.torch import save

    form = torch.contiguous_format
    owned = {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}
    return _settled(save(owned, metadata={key: json.dumps(to_builtin(path, value)) for key, value in header.items()}))


def _settled(data: bytes) -> bytes:
    """Sort the header's metadata, which safetensors writes in another order each time."""
    header, end = _split_header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def _split_header(data: bytes) -> tuple[dict[str, Any], int]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def metadata_of(data: bytes) -> dict[str, Any]:
    """What a safetensors file's header holds besides its tensors."""
    return {key: json.loads(value) for key, value in _split_header(data)[0]["__metadata__"].items()}


def shapes_in(data: bytes) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file. Needs no torch."""
    header = _split_header(data)[0]
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def tensors_of(data: bytes) -> dict[str, Tensor]:
    """The tensors, in the order of their names: safetensors has them in another each time."""
    from safetensors.torch import load

    return dict(sorted(load(data).items()))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape and type of every tensor, JSON-ready."""
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()}


def check_labels(path: Path, ids: Sequence[str], shapes: Mapping[str, Any]) -> None:
    """Raise StoreError where two rows have one id, or a tensor doesn't fit the ids."""
    if len(set(ids)) != len(ids):
        raise store_error(path, "would hold two rows of one example", "give every example its own id")
    for name, entry in shapes.items():
        example, shape = name.partition("/")[2], entry["shape"]
        fits = example in ids if example else shape[:1] == [len(ids)]
        if not fits:
            problem = f"tensor {name!r} of shape {shape} doesn't fit the {len(ids)} ids"
            raise store_error(path, problem, "label every row with the id of its example")
