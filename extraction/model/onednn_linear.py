"""Linear layers on a processor that the matrix library is slow on: the same product by oneDNN, which torch brings.

torch's builds for x86 multiply float32 matrices with Intel's MKL, which does not use an AMD processor's wide registers
as it does Intel's. oneDNN does, on the weights as they lie in memory. Neither rounds more than float32 does; the last
bits differ.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALL = 2**21  # multiplications: for fewer, asking oneDNN costs more than it saves
STEPS = 8  # numbers of rows an octave that a product is prepared for
TOLERANCE = 1e-5  # of the largest number of a product


class OneDnnLinear(nn.Linear):
    """A linear layer whose product oneDNN works out, where nobody wants a gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """input W^T + b; any shape [..., D]."""
        if torch.is_grad_enabled() or not is_suited(self.weight) or input.dtype != torch.float32:
            return functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def linear(input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input W^T + b, by oneDNN where that is quicker; the weights are not copied.

    oneDNN writes and keeps a program for every number of rows, in a millisecond and up to a megabyte: so rows of zeros
    fill the input up to the next of few numbers.
    """
    n_rows = input_.numel() // weight.shape[1]
    if n_rows * weight.numel() < SMALL:
        return functional.linear(input_, weight, bias)
    more = round_up_rows(n_rows) - n_rows
    if not more:
        return onednn_linear(input_, weight, bias)
    filled = functional.pad(input_.reshape(n_rows, -1), (0, 0, 0, more))
    return onednn_linear(filled, weight, bias)[:n_rows].view(*input_.shape[:-1], len(weight))


def round_up_rows(n_rows: int) -> int:
    """The next number of rows that products are prepared for: in steps of an eighth of a power of two, at least 8."""
    step = max(8, (1 << n_rows.bit_length()) // (2 * STEPS))
    return n_rows if n_rows == 1 else -(-n_rows // step) * step


def onednn_linear(input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input W^T + b, by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input_, weight, bias, "none", [], "")
    return found


def matmul(input_: Tensor, weight: Tensor) -> Tensor:
    """input W^T, by the library that the engine's linear layers are worked out by."""
    return linear(input_, weight, None) if is_worthwhile() and is_suited(weight) else functional.linear(input_, weight)


def is_suited(weight: Tensor) -> bool:
    """Whether a layer's weights are float32 and in main memory."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def use_onednn(model: nn.Module) -> None:
    """Where it pays, let oneDNN work out a model's linear layers; nothing else of them changes."""
    if is_worthwhile():
        _turn(model, nn.Linear, OneDnnLinear)


@contextmanager
def without_onednn(model: nn.Module) -> Iterator[None]:
    """The model's own linear layers while the block lasts."""
    quick = any(type(module) is OneDnnLinear for module in model.modules())
    _turn(model, OneDnnLinear, nn.Linear)
    try:
        yield
    finally:
        if quick:
            _turn(model, nn.Linear, OneDnnLinear)


def _turn(model: nn.Module, kind: type[nn.Linear], other: type[nn.Linear]) -> None:
    for module in model.modules():
        if type(module) is kind and is_suited(module.weight):
            module.__class__ = other


@cache
def is_worthwhile() -> bool:
    """Whether this is an AMD processor, torch multiplies by MKL on it, and oneDNN gives the same numbers."""
    return is_amd() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and is_proven()


def is_amd() -> bool:
    """By what the processor says of itself."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AuthenticAMD" in platform.processor()  # as Windows has it


@torch.inference_mode()
def is_proven() -> bool:
    """One product, with and without a bias, against torch's own."""
    made = torch.Generator().manual_seed(0)
    input_BTD, weight_ED = torch.randn(3, 5, 64, generator=made), torch.randn(96, 64, generator=made)
    bias_E = torch.randn(96, generator=made)
    try:
        for bias in (None, bias_E):
            wanted = functional.linear(input_BTD, weight_ED, bias)
            torch.testing.assert_close(
                onednn_linear(input_BTD, weight_ED, bias), wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max())
            )
    except (RuntimeError, AttributeError, AssertionError):  # the operation is torch's compiler's, and may change
        return False
    return True
