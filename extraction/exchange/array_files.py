"""Vectors in numpy archives and in Traitline's own safetensors. Neither holds pickles.

Shapes: L layers, D hidden.
"""

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


def write_numpy(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write an .npz archive: `layers` [L] (decoder blocks, counted from 0) and `direction` float32 [L, D]."""
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, layers=numpy.array(direction.layers), direction=direction.direction_LD.numpy())
    return WrittenFile(buffer.getvalue())


def read_numpy(path: Path) -> LayerRows:
    """Read `layers` [L], counted from 0, and `direction` [L, D]. Pickled arrays are not loaded."""
    import numpy
    import torch

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            layers, direction_LD = archive["layers"], archive["direction"]
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120]
        raise VectorError(f"{path}: not a numpy archive with 'layers' and 'direction' ({reason})") from failure
    valid = layers.dtype.kind in "iu" and direction_LD.dtype.kind == "f" and direction_LD.ndim == 2
    if not valid or layers.shape != direction_LD.shape[:1] or len(set(layers.tolist())) != len(layers):
        kinds = f"layers {layers.dtype} {list(layers.shape)}, direction {direction_LD.dtype} {list(direction_LD.shape)}"
        raise VectorError(f"{path}: {kinds}; distinct whole numbers [L] and floats [L, hidden] are needed")
    rows = torch.from_numpy(direction_LD.astype(numpy.float32))
    return LayerRows(dict(zip(layers.tolist(), rows, strict=True)))


def write_traitline(direction: Direction, metadata: VectorMetadata) -> WrittenFile:
    """Write Traitline's format: `direction` float32 [L, D]; layers, labels and layer convention in the header."""
    labels = {"trait": direction.trait, "method": direction.method, "model": direction.model}
    header = {**labels, "layers": list(direction.layers), "model_type": metadata.model_type}
    return WrittenFile(vectors_bytes(Path("vectors"), {"direction": direction.direction_LD}, header))


def read_traitline(path: Path) -> LayerRows:
    """Read Traitline's format: layer k is the output of decoder block k, counted from 0."""
    from safetensors.torch import load

    from extraction.vectors.direction import Direction

    data = path.read_bytes()
    try:
        tensors = load(data)
        header = {key: json.loads(value) for key, value in _safetensors_metadata(data).items()}
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120]
        raise VectorError(f"{path}: damaged, or not a vectors file of Traitline ({reason})") from failure
    direction = Direction.from_file(tensors, header, str(path))
    labels = {"trait": direction.trait, "method": direction.method, "model": direction.model}
    vectors = {layer: direction.at(layer) for layer in direction.layers}
    return LayerRows(vectors, labels=labels, metadata=VectorMetadata(model_type=header.get("model_type")))


def _safetensors_metadata(data: bytes) -> dict[str, Any]:
    """Return a safetensors file's metadata, once `load` has accepted its header."""
    end = 8 + int.from_bytes(data[:8], "little")
    metadata: dict[str, Any] = json.loads(data[8:end]).get("__metadata__", {})
    return metadata
