"""Vectors in PyTorch files: persona_vectors, assistant_axis and steering_vectors. The only module that reads pickles.

Pickles are read with `weights_only=True`: tensors, numbers, text, lists and dicts, and no code.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.errors import VectorError
from extraction.exchange.layer_rows import LayerRows, VectorMetadata, WrittenFile, dense_rows, nonzero_rows

if TYPE_CHECKING:
    from extraction.vectors.direction import Direction

LAYER_TYPE = "decoder_block"
_AXIS_KEYS = ("axis", "vector")


def write_persona_vectors(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write [layers + 1, D]: row k + 1 is decoder block k, row 0 (the embeddings) is zeros.

    persona_vectors takes its last row after the final norm, Traitline before it: right for steering the last block, not
    for projecting that program's last hidden state.
    """
    import torch

    rows_LD, notes = dense_rows(direction, metadata.n_layers)
    numbering = "row k + 1 is layer k; row 0 (the embeddings) is zeros"
    if direction.layers[-1] == len(rows_LD) - 1:
        numbering += "; the last row is from before the final norm, that of persona_vectors from after it"
    return WrittenFile(_torch_bytes(torch.cat([torch.zeros_like(rows_LD[:1]), rows_LD])), (numbering, *notes))


def read_persona_vectors(path: Path) -> LayerRows:
    """Read [layers + 1, D]: row k + 1 is decoder block k.

    Row 0 (the embeddings) and the last row (after the final norm) are not the output of a block, and are left out.
    """
    rows_LD = _check_tensor(path, load_pickle(path))
    rows, notes = nonzero_rows(rows_LD[1:-1], path) if rows_LD.ndim == 2 else nonzero_rows(rows_LD, path)
    if not rows:
        raise VectorError(f"{path}: no rows between the embeddings and the final norm; [layers + 1, hidden] is needed")
    left_out = (
        f"rows 0 (embeddings) and {len(rows_LD) - 1} (after the final norm) are not of a block, and were left out"
    )
    return LayerRows({number + 1: row for number, row in rows.items()}, base=1, notes=(left_out, *notes))


def write_assistant_axis(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write `{"axis": [layers, D]}`: row k is decoder block k, counted from 0."""
    rows_LD, notes = dense_rows(direction, metadata.n_layers)
    return WrittenFile(_torch_bytes({"axis": rows_LD}), notes)


def read_assistant_axis(path: Path) -> LayerRows:
    """Read a tensor [layers, D], alone or under `axis` or `vector`: row k is decoder block k, counted from 0."""
    data = load_pickle(path)
    key = next((key for key in _AXIS_KEYS if isinstance(data, Mapping) and key in data), None)
    rows, notes = nonzero_rows(_check_tensor(path, data if key is None else data[key]), path)
    return LayerRows(rows, notes=notes)


def write_steering_vectors(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write the arguments of steering-vectors' class SteeringVector.

    `{"layer_activations": {k: [D]}, "layer_type": "decoder_block"}`, where k is the decoder block, counted from 0.
    """
    vectors = {layer: direction.at(layer) for layer in direction.layers}
    return WrittenFile(_torch_bytes({"layer_activations": vectors, "layer_type": LAYER_TYPE}))


def read_steering_vectors(path: Path) -> LayerRows:
    """Read a dict of decoder block (from 0) to vector [D], alone or under `layer_activations` with `layer_type`."""
    data = load_pickle(path)
    kind = data.get("layer_type", LAYER_TYPE) if isinstance(data, Mapping) else None
    vectors = data.get("layer_activations", data) if isinstance(data, Mapping) else None
    if vectors is None or not is_numbered(vectors):
        raise VectorError(f"{path}: not a dict of layer number to tensor; save the vector's layer_activations")
    if kind != LAYER_TYPE:
        raise VectorError(f"{path}: its layer_type is {kind!r}; {LAYER_TYPE!r}, the residual stream, is needed")
    return LayerRows(vectors)


def recognise_pickle(path: Path) -> str:
    """Return which format a PyTorch file is in. Raises VectorError where its content fits several."""
    data = load_pickle(path)
    if isinstance(data, Mapping) and ("layer_activations" in data or is_numbered(data)):
        return "steering_vectors"
    if isinstance(data, Mapping) and any(key in data for key in _AXIS_KEYS):
        return "assistant_axis"
    rows_LD = _check_tensor(path, data)
    if rows_LD.ndim == 2 and len(rows_LD) and not rows_LD[0].any():
        return "persona_vectors"  # a block's vector is never zero; ours has zeros for the embeddings
    choice = "--format persona_vectors (row 1 is block 0) or --format assistant_axis (row 0 is block 0)"
    raise VectorError(f"{path}: a bare tensor without the number of decoder block 0: give {choice}")


def is_numbered(data: Any) -> bool:
    """Return True for a dict of layer numbers to tensors."""
    import torch

    if not isinstance(data, Mapping) or not data:
        return False
    return all(type(key) is int and isinstance(value, torch.Tensor) for key, value in data.items())


def load_pickle(path: Path) -> Any:
    """Load a PyTorch file's plain content. Raises VectorError for a file that would run code."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:
        remedy = "save plain tensors, numbers and dicts (for steering-vectors: the vector's layer_activations)"
        raise VectorError(f"{path}: damaged, or holds Python objects, which are not loaded; {remedy}") from failure


def _check_tensor(path: Path, data: Any) -> Any:
    import torch

    if not isinstance(data, torch.Tensor):
        raise VectorError(
            f"{path}: holds a {type(data).__name__}; a tensor [rows, hidden] is needed (docs/exchange.md)"
        )
    return data


def _torch_bytes(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
