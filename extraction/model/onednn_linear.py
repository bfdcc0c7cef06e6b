"""Linear layers computed by oneDNN instead of MKL, on AMD CPUs.

torch's x86 builds multiply float32 matrices with Intel's MKL, which does not use an AMD CPU's wide registers. oneDNN,
which torch contains as well, does, without repacking the weights. Both round as float32 does; the last bits differ.

Shapes: D inputs, E outputs of a linear layer.
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

MIN_MULTIPLICATIONS = 2**21  # for smaller products the call into oneDNN costs more than it saves
SIZES_PER_OCTAVE = 8  # numbers of rows that oneDNN is prepared for, between a power of two and the next
TOLERANCE = 1e-5  # relative to the largest entry of a product


class OneDnnLinear(nn.Linear):
    """A linear layer whose product oneDNN computes, unless gradients are enabled."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute input W^T + b: [..., D] -> [..., E]."""
        if torch.is_grad_enabled() or not is_float32_on_cpu(self.weight) or input.dtype != torch.float32:
            return functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def linear(input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute input W^T + b, by oneDNN where that is faster; the weights are not copied.

    oneDNN compiles and caches a kernel for every number of rows (about a millisecond, up to a megabyte each), so the
    input is padded with rows of zeros up to one of few sizes.
    """
    n_rows = input_.numel() // weight.shape[1]
    if n_rows * weight.numel() < MIN_MULTIPLICATIONS:
        return functional.linear(input_, weight, bias)
    n_padding = round_up_rows(n_rows) - n_rows
    if not n_padding:
        return onednn_linear(input_, weight, bias)
    padded = functional.pad(input_.reshape(n_rows, -1), (0, 0, 0, n_padding))
    return onednn_linear(padded, weight, bias)[:n_rows].view(*input_.shape[:-1], len(weight))


def round_up_rows(n_rows: int) -> int:
    """Round up to a number of rows that kernels are compiled for: steps of an eighth of a power of two, at least 8."""
    step = max(8, (1 << n_rows.bit_length()) // (2 * SIZES_PER_OCTAVE))
    return n_rows if n_rows == 1 else -(-n_rows // step) * step


def onednn_linear(input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute input W^T + b by oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(input_, weight, bias, "none", [], "")
    return out


def matmul(input_: Tensor, weight: Tensor) -> Tensor:
    """Compute input W^T by the library that the engine's linear layers use."""
    return (
        linear(input_, weight, None)
        if is_worthwhile() and is_float32_on_cpu(weight)
        else functional.linear(input_, weight)
    )


def is_float32_on_cpu(weight: Tensor) -> bool:
    """Return True for float32 weights in main memory."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def use_onednn(model: nn.Module) -> None:
    """Switch a model's linear layers to oneDNN on machines where that is faster (`is_worthwhile`)."""
    if is_worthwhile():
        _replace_linears(model, nn.Linear, OneDnnLinear)


@contextmanager
def without_onednn(model: nn.Module) -> Iterator[None]:
    """Use torch's own linear layers while the block lasts."""
    uses_onednn = any(type(module) is OneDnnLinear for module in model.modules())
    _replace_linears(model, OneDnnLinear, nn.Linear)
    try:
        yield
    finally:
        if uses_onednn:
            _replace_linears(model, nn.Linear, OneDnnLinear)


def _replace_linears(model: nn.Module, kind: type[nn.Linear], other: type[nn.Linear]) -> None:
    for module in model.modules():
        if type(module) is kind and is_float32_on_cpu(module.weight):
            module.__class__ = other


@cache
def is_worthwhile() -> bool:
    """Return True on an AMD CPU where torch uses MKL and oneDNN gives the same numbers."""
    return is_amd() and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and is_accurate()


def is_amd() -> bool:
    """Return True if the CPU reports AMD as its vendor."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AuthenticAMD" in platform.processor()  # where there is no /proc, as on Windows


@torch.inference_mode()
def is_accurate() -> bool:
    """Return True if oneDNN's product, with and without a bias, equals torch's within TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    input_BTD, weight_ED = torch.randn(3, 5, 64, generator=generator), torch.randn(96, 64, generator=generator)
    bias_E = torch.randn(96, generator=generator)
    try:
        for bias in (None, bias_E):
            expected = functional.linear(input_BTD, weight_ED, bias)
            torch.testing.assert_close(
                onednn_linear(input_BTD, weight_ED, bias),
                expected,
                rtol=0,
                atol=TOLERANCE * float(expected.abs().max()),
            )
    except (RuntimeError, AttributeError, AssertionError):  # the operation is internal to torch and may change
        return False
    return True
