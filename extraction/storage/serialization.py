"""The two formats of a run's data files: rows as JSON lines, tensors as safetensors. Equal input gives equal bytes.

The readers trust their input, whose sha256 has been checked. Torch is imported only by functions of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.storage.atomic import json_round_trip, reject_nan, store_error, to_json

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]


def to_jsonl(path: Path, rows: Iterable[Row]) -> bytes:
    """Return one JSON object a line, its keys in the caller's order."""
    lines, ids = bytearray(), []
    with reject_nan(path):
        for row in rows:
            ids.append(row["id"])
            lines += f"{to_json(row)}\n".encode()
    check_row_ids(path, ids, {})
    return bytes(lines)


def parse_jsonl(data: bytes) -> Iterator[Row]:
    """Yield the rows of JSON lines."""
    return (json.loads(line) for line in data.split(b"\n")[:-1])


def safetensors_bytes(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Return a file's bytes. Each tensor is copied first, since safetensors refuses views and shared memory."""
    import torch
    from safetensors.torch import save

    form = torch.contiguous_format
    owned = {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}
    return _sort_metadata(
        save(owned, metadata={key: json.dumps(json_round_trip(path, value)) for key, value in header.items()})
    )


def _sort_metadata(data: bytes) -> bytes:
    """Sort the header's metadata, which safetensors writes in a random order."""
    header, end = _split_header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def _split_header(data: bytes) -> tuple[dict[str, Any], int]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def read_metadata(data: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file's header. Needs no torch."""
    return {key: json.loads(value) for key, value in _split_header(data)[0]["__metadata__"].items()}


def read_shapes(data: bytes) -> dict[str, list[int]]:
    """Return the shape of every tensor in a safetensors file. Needs no torch."""
    header = _split_header(data)[0]
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, sorted by name (the file's order is random)."""
    from safetensors.torch import load

    return dict(sorted(load(data).items()))


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the shape and dtype of every tensor, JSON-ready."""
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()}


def check_row_ids(path: Path, ids: Sequence[str], shapes: Mapping[str, Any]) -> None:
    """Raise StoreError if two rows have one id, or a tensor's rows don't fit the ids."""
    if len(set(ids)) != len(ids):
        raise store_error(path, "would hold two rows of one example", "give every example its own id")
    for name, entry in shapes.items():
        example, shape = name.partition("/")[2], entry["shape"]
        fits = example in ids if example else shape[:1] == [len(ids)]
        if not fits:
            problem = f"tensor {name!r} of shape {shape} doesn't fit the {len(ids)} ids"
            raise store_error(path, problem, "label every row with the id of its example")
