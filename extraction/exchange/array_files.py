"""Vectors without a pickle: numpy archives, and Traitline's own safetensors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.errors import VectorError
from extraction.exchange.layer_rows import LayerRows, VectorMetadata, WrittenFile
from extraction.storage.trait_run import vectors_bytes

if TYPE_CHECKING:
    from extraction.vectors.direction import Direction


def write_numpy(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """An .npz archive: `layers` [L] (decoder blocks from 0, as ours) and `direction` float32 [L, D]."""
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, layers=numpy.array(direction.layers), direction=direction.direction_LD.numpy())
    return WrittenFile(buffer.getvalue())


def read_numpy(path: Path) -> LayerRows:
    """`layers` [L], counted from 0 as ours, and `direction` [L, D]. No pickled arrays."""
    import numpy
    import torch

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            layers, direction_LD = archive["layers"], archive["direction"]
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120]
        raise VectorError(f"{path}: no numpy archive with 'layers' and 'direction' ({reason})") from failure
    sound = layers.dtype.kind in "iu" and direction_LD.dtype.kind == "f" and direction_LD.ndim == 2
    if not sound or layers.shape != direction_LD.shape[:1] or len(set(layers.tolist())) != len(layers):
        kinds = f"layers {layers.dtype} {list(layers.shape)}, direction {direction_LD.dtype} {list(direction_LD.shape)}"
        raise VectorError(f"{path}: {kinds}; it needs distinct whole numbers [L] and floats [L, hidden]")
    rows = torch.from_numpy(direction_LD.astype(numpy.float32))
    return LayerRows(dict(zip(layers.tolist(), rows, strict=True)))


def write_traitline(direction: Direction, facts: VectorMetadata) -> WrittenFile:
    """Our own form: `direction` float32 [L, D], with layers, labels and layer convention in the header."""
    labels = {"trait": direction.trait, "method": direction.method, "model": direction.model}
    header = {**labels, "layers": list(direction.layers), "model_type": facts.model_type}
    return WrittenFile(vectors_bytes(Path("vectors"), {"direction": direction.direction_LD}, header))


def read_traitline(path: Path) -> LayerRows:
    """Our own form, from any place: layer k is the output of decoder block k, counted from 0."""
    from safetensors.torch import load

    from extraction.vectors.direction import Direction

    data = path.read_bytes()
    try:
        tensors = load(data)
        header = {key: json.loads(value) for key, value in _metadata(data).items()}
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120]
        raise VectorError(f"{path}: no vectors of Traitline's, or damaged ({reason})") from failure
    direction = Direction.from_file(tensors, header, str(path))
    labels = {"trait": direction.trait, "method": direction.method, "model": direction.model}
    vectors = {layer: direction.at(layer) for layer in direction.layers}
    return LayerRows(vectors, labels=labels, facts=VectorMetadata(model_type=header.get("model_type")))


def _metadata(data: bytes) -> dict[str, Any]:
    """A safetensors file's metadata; `load` has found its header sound."""
    end = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, Any] = json.loads(data[8:end]).get("__metadata__", {})
    return found
