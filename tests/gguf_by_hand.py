"""GGUF without the gguf package: a writer from the format's description, and a reader with llama.cpp's rules."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

UINT32, INT32, STRING = 4, 5, 8
F32, F16 = 0, 1
ALIGNMENT = 32


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def write_by_hand(metadata: Sequence[tuple[str, int, Any]], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Write a GGUF file of version 3: header, key-value pairs, tensor descriptions, tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, kind, value in metadata:
        held = _string(value) if kind == STRING else struct.pack({UINT32: "<I", INT32: "<i"}[kind], value)
        head += _string(key) + struct.pack("<I", kind) + held
    body = b""
    for name, values in tensors.items():
        sizes = values.shape[::-1]
        kind = {"float32": F32, "float16": F16}[values.dtype.name]
        head += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(body))
        body += _padded(values.tobytes())
    return _padded(head) + body


class Rejected(Exception):
    """llama.cpp's loader would reject the file."""


def load_as_llama_cpp(data: bytes) -> tuple[int, dict[int, list[float]], dict[str, Any]]:
    """Return (hidden size, {block: vector added to its output}, metadata). Raises Rejected by the loader's rules."""
    magic, version, n_tensors, n_pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version != 3:
        raise Rejected("no GGUF of version 3")
    at = 24

    def text() -> str:
        nonlocal at
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8 + size
        return data[at - size : at].decode()

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, at - struct.calcsize(form))

    metadata = {}
    for _ in range(n_pairs):
        key, (kind,) = text(), take("<I")
        metadata[key] = text() if kind == STRING else take({UINT32: "<I", INT32: "<i"}[kind])[0]
    described = [(text(), take(f"<{take('<I')[0]}Q"), *take("<IQ")) for _ in range(n_tensors)]
    start, steering, hidden = at + -at % ALIGNMENT, {}, None
    for name, sizes, kind, offset in described:
        word, _, number = name.partition(".")
        if word != "direction" or not number.isdecimal() or int(number) == 0:
            raise Rejected(f"{name}: no direction.N with N >= 1")
        if kind != F32 or len(sizes) != 1 or sizes[0] != (hidden or sizes[0]):
            raise Rejected(f"{name}: not float32, not 1-D, or of another length")
        hidden = sizes[0]
        steering[int(number)] = list(struct.unpack_from(f"<{hidden}f", data, start + offset))
    if hidden is None:
        raise Rejected("no directions")
    return hidden, steering, metadata
