"""Vectors in PyTorch files: persona_vectors, assistant_axis and steering_vectors. The only reader of pickles.

Pickles are read with `weights_only=True`: tensors, numbers, text, lists and dicts, and nothing that could run.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.errors import VectorError
from extraction.exchange.layer_rows import LayerRows, VectorMetadata, WrittenFile, numbered_rows, row_tensor

if TYPE_CHECKING:
    from extraction.vectors.direction import Direction

LAYER_TYPE = "decoder_block"
_AXIS_KEYS = ("axis", "vector")


def write_persona_vectors(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """`<trait>_response_avg_diff.pt`, [layers + 1, D]: row k + 1 is our layer k, row 0 (the embeddings) is zeros.

    Their last row is read after the final norm, ours before it: good for steering the last block, not for projecting
    on their last hidden state.
    """
    import torch

    rows_LD, notes = row_tensor(direction, facts.n_layers)
    told = "row k + 1 is layer k; row 0 (the embeddings) is zeros"
    if direction.layers[-1] == len(rows_LD) - 1:
        told += "; the last row is from before the final norm, theirs is from after it"
    return WrittenFile(_saved(torch.cat([torch.zeros_like(rows_LD[:1]), rows_LD])), (told, *notes))


def read_persona_vectors(path: Path) -> LayerRows:
    """[layers + 1, D]: row 0 is the embeddings', which is no layer of ours; row k + 1 is layer k.

    The last row was read after the final norm, so it is no block's output, and is left out.
    """
    rows_LD = _tensor(path, load_pickle(path))
    rows, notes = numbered_rows(rows_LD[1:-1], path) if rows_LD.ndim == 2 else numbered_rows(rows_LD, path)
    if not rows:
        raise VectorError(f"{path}: no rows between the embeddings and the final norm; is it [layers + 1, hidden]?")
    told = f"rows 0 (embeddings) and {len(rows_LD) - 1} (after the final norm) are no block's output, and were left out"
    return LayerRows({number + 1: row for number, row in rows.items()}, base=1, notes=(told, *notes))


def write_assistant_axis(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """`{"axis": [layers, D]}`: row k is decoder block k, counted from 0, as ours."""
    rows_LD, notes = row_tensor(direction, facts.n_layers)
    return WrittenFile(_saved({"axis": rows_LD}), notes)


def read_assistant_axis(path: Path) -> LayerRows:
    """A tensor [layers, D], alone or under `axis` or `vector`: row k is decoder block k, counted from 0, as ours."""
    data = load_pickle(path)
    key = next((key for key in _AXIS_KEYS if isinstance(data, Mapping) and key in data), None)
    rows, notes = numbered_rows(_tensor(path, data if key is None else data[key]), path)
    return LayerRows(rows, notes=notes)


def write_steering_vectors(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """`{"layer_activations": {k: [D]}, "layer_type": "decoder_block"}`, the arguments of their SteeringVector.

    Their numbers count decoder blocks from 0, as ours.
    """
    vectors = {layer: direction.at(layer) for layer in direction.layers}
    return WrittenFile(_saved({"layer_activations": vectors, "layer_type": LAYER_TYPE}))


def read_steering_vectors(path: Path) -> LayerRows:
    """`layer_activations` as a plain dict of number to tensor, alone or beside `layer_type`; blocks from 0, as ours."""
    data = load_pickle(path)
    kind = data.get("layer_type", LAYER_TYPE) if isinstance(data, Mapping) else None
    vectors = data.get("layer_activations", data) if isinstance(data, Mapping) else None
    if vectors is None or not is_numbered(vectors):
        raise VectorError(f"{path}: no dict of layer number to tensor; save the vector's layer_activations")
    if kind != LAYER_TYPE:
        raise VectorError(f"{path}: its layer_type is {kind!r}; only {LAYER_TYPE!r} is the residual stream")
    return LayerRows(vectors)


def recognise_pickle(path: Path) -> str:
    """Which of the formats a PyTorch file is. Raises VectorError where its content doesn't tell."""
    data = load_pickle(path)
    if isinstance(data, Mapping) and ("layer_activations" in data or is_numbered(data)):
        return "steering_vectors"
    if isinstance(data, Mapping) and any(key in data for key in _AXIS_KEYS):
        return "assistant_axis"
    rows_LD = _tensor(path, data)
    if rows_LD.ndim == 2 and len(rows_LD) and not rows_LD[0].any():
        return "persona_vectors"  # no block's vector is zero; we write zeros for the embeddings
    choice = "--format persona_vectors (row 1 is block 0) or --format assistant_axis (row 0 is block 0)"
    raise VectorError(f"{path}: a bare tensor doesn't say which row is decoder block 0: give {choice}")


def is_numbered(data: Any) -> bool:
    """Whether this is a dict of layer numbers to tensors."""
    import torch

    if not isinstance(data, Mapping) or not data:
        return False
    return all(type(key) is int and isinstance(value, torch.Tensor) for key, value in data.items())


def load_pickle(path: Path) -> Any:
    """A PyTorch file's plain content. VectorError for anything that would need a program to be made."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:
        remedy = "save plain tensors, numbers and dicts (for steering-vectors: the vector's layer_activations)"
        raise VectorError(f"{path}: damaged, or holds Python objects, which are not loaded; {remedy}") from failure


def _tensor(path: Path, data: Any) -> Any:
    import torch

    if not isinstance(data, torch.Tensor):
        raise VectorError(f"{path}: holds a {type(data).__name__}, not a tensor [rows, hidden]; see docs/exchange.md")
    return data


def _saved(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
