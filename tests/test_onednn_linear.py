"""Linear layers by oneDNN: the same product for any shape, unchanged gradients, and only if checked to be equal.

Shapes: B rows, T tokens, D and E features.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from extraction.engine.generate import generate
from extraction.model import onednn_linear
from extraction.model.loading import wrap
from extraction.model.onednn_linear import OneDnnLinear, is_accurate, is_worthwhile, use_onednn, without_onednn
from extraction.utils_batch import Capture, Request
from tests.tiny import deviation, prompts, tiny_model

needs_op = pytest.mark.skipif(not is_accurate(), reason="this torch has no such operation")


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN as on an AMD CPU, for layers of any size."""
    monkeypatch.setattr(onednn_linear, "is_worthwhile", lambda: True)
    monkeypatch.setattr(onednn_linear, "MIN_MULTIPLICATIONS", 0)


def layer(n_in: int = 64, n_out: int = 96, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n_in, n_out, bias=bias)


@needs_op
@pytest.mark.usefixtures("worthwhile")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64), (2, 3, 4, 64), (0, 64), (300, 64)], ids=str)
def test_the_product_equals_that_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    module = layer(bias=bias)
    use_onednn(module)
    assert type(module) is OneDnnLinear
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    expected = functional.linear(inputs.double(), module.weight.double(), None if not bias else module.bias.double())
    with torch.inference_mode():
        assert module(inputs).shape == expected.shape
        if not inputs.numel():
            return
        assert deviation(module(inputs), expected) < 2e-6
        assert deviation(module(inputs[..., torch.arange(63, -1, -1)].flip(-1)), expected) < 2e-6
        assert deviation(module(inputs.roll(1, -1)), expected) > 1e-2  # negative control


@needs_op
@pytest.mark.usefixtures("worthwhile")
def test_gradients_and_other_dtypes_use_torchs_product() -> None:
    module, inputs = layer(), torch.randn(4, 64, requires_grad=True)
    plain = deepcopy(module)
    use_onednn(module)
    for each in (module, plain):
        each(inputs).square().sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(module.double()(inputs.double()), plain.double()(inputs.double()))
    halves = layer().bfloat16()
    use_onednn(halves)
    assert type(halves) is nn.Linear


@needs_op
@pytest.mark.usefixtures("worthwhile")
def test_responses_are_equal_and_the_models_layers_are_restored() -> None:
    model = tiny_model("llama")
    plain = deepcopy(model)
    requests = [Request(f"e{i}", row, 12) for i, row in enumerate(prompts(6))]
    quick = wrap(model, stop_ids=())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {OneDnnLinear}
    assert type(deepcopy(model).lm_head) is OneDnnLinear

    def responses() -> dict[str, tuple[tuple[int, ...], Tensor]]:
        done = generate(quick, requests, batch_size=3, capture=Capture((0, 1, 2)))
        return {c.id: (c.token_ids, c.activations["residual.response_mean"]) for c in done}

    by_onednn = responses()
    with without_onednn(model):
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
        own = responses()
    assert type(model.lm_head) is OneDnnLinear
    assert {key: tokens for key, (tokens, _) in by_onednn.items()} == {key: tokens for key, (tokens, _) in own.items()}
    assert all(deviation(mean_LD, own[key][1]) < 1e-5 for key, (_, mean_LD) in by_onednn.items())
    with without_onednn(plain):  # a model without oneDNN stays so
        pass
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@needs_op
@pytest.mark.usefixtures("worthwhile")
def test_few_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, own = set(), onednn_linear.onednn_linear

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes.add(inputs.numel() // inputs.shape[-1])
        return own(inputs, weight, bias)

    monkeypatch.setattr(onednn_linear, "onednn_linear", counted)
    module = layer()
    use_onednn(module)
    with torch.inference_mode():
        for n_rows in range(1, 1025):
            inputs = torch.randn(n_rows, 64)
            assert deviation(module(inputs), functional.linear(inputs, module.weight, module.bias)) < 1e-5
    assert len(sizes) < 50
    assert {1, 16, 32, 64, 96, 128, 256, 512, 1024} < sizes  # common batch sizes are not padded
    assert all(onednn_linear.round_up_rows(n) <= n + max(7, n // 8) for n in range(1, 5000))


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "onednn_linear", lambda *_: pytest.fail("asked oneDNN"))
    weight = torch.randn(96, 64)
    n_small = onednn_linear.MIN_MULTIPLICATIONS // weight.numel()
    onednn_linear.linear(torch.randn(n_small, 64), weight, None)
    with pytest.raises(pytest.fail.Exception, match="asked oneDNN"):
        onednn_linear.linear(torch.randn(n_small + 1, 64), weight, None)


def test_with_unequal_products_no_layer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "is_amd", lambda: True)
    monkeypatch.setattr(
        onednn_linear, "onednn_linear", lambda inputs, weight, bias: functional.linear(inputs, weight, bias) * 1.01
    )
    is_worthwhile.cache_clear()
    try:
        assert not is_worthwhile()
        module = layer()
        use_onednn(module)
        assert type(module) is nn.Linear
    finally:
        is_worthwhile.cache_clear()


def test_other_cpus_keep_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "is_amd", lambda: False)
    is_worthwhile.cache_clear()
    try:
        assert not is_worthwhile()
    finally:
        is_worthwhile.cache_clear()
