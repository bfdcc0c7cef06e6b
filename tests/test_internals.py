"""The internals of a layer against projections named by hand, family by family, alone and in the engine's batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from extraction.activations.experts import find_mixture_of_experts
from extraction.activations.internals import Part, parts_of, stream_of
from extraction.activations.sites import watch_taps
from extraction.core.errors import ModelError
from extraction.engine.generate import generate
from extraction.model.attention_weights import watch_attention
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Request
from tests.tiny import HIDDEN, LAYERS, blocks, deviation, prompts, shared_model, taps, tiny_model

LONG = prompts(1)[0]
HEADS, GROUPS, WIDE, C = 4, 2, 32, 8
Seen = dict[str, Tensor]
Pick = tuple[str, bool, Callable[[Tensor], Tensor]]  # a submodule, True for its input, and the function that reads it


# --- reading the parts ------------------------------------------------------------------------------------------------


@contextmanager
def reading(parts: Sequence[Part], rows: int) -> Iterator[dict[str, list[Tensor]]]:
    """Yield every part of every pass by name: [B, T, ...]."""
    seen: dict[str, list[Tensor]] = {part.name: [] for part in parts}
    passed: list[dict[str, Tensor]] = [{}, {}]

    def note(which: int, at: int, value: Tensor) -> None:
        passed[which][parts[at].name] = value.clone().reshape(rows, -1, value.shape[-1])

    def read(_at: int, _value: Tensor) -> None:
        for part in parts:
            tapped_BTX = passed[0][part.name]
            seen[part.name].append(part.read(tapped_BTX + passed[1][part.name] if part.added else tapped_BTX))

    sums = [(at, part) for at, part in enumerate(parts) if part.added is not None]
    out = next(part for part in parts if part.name == "residual_out")
    with ExitStack() as stack:
        stack.enter_context(watch_taps(tuple(part.tap for part in parts), lambda at, value: note(0, at, value)))
        added = tuple(part.added for _, part in sums if part.added is not None)
        stack.enter_context(watch_taps(added, lambda i, value: note(1, sums[i][0], value)))
        stack.enter_context(watch_taps((out.tap,), read))  # the block ends last
        yield seen


@torch.no_grad()
def read_alone(lm: LanguageModel, parts: Sequence[Part], ids: Sequence[int]) -> Seen:
    """Return every part of one text: [T, ...]."""
    with reading(parts, 1) as seen:
        lm.last_logits(torch.tensor([list(ids)]), use_cache=False)
    return {name: value[0] for name, (value,) in seen.items()}


@cache
def found(name: str, layer: int, dtype: torch.dtype = torch.float32, *, attention: bool = True) -> tuple[Part, ...]:
    return parts_of(wrap(shared_model(name, dtype)), layer, attention=attention)


# --- named by hand ----------------------------------------------------------------------------------------------------


def same(x: Tensor) -> Tensor:
    return x


def heads(n: int, start: int = 0) -> Callable[[Tensor], Tensor]:
    """Read `n` heads of a projection, from a channel on."""
    return lambda x: x[..., start : start + n * C].reshape(len(x), n, C)


def of_each_head(at: int) -> Callable[[Tensor], Tensor]:
    """Read q, k or v of a projection ordered by head (GPT-NeoX, Persimmon)."""
    return lambda x: x.reshape(len(x), HEADS, 3, C)[:, :, at]


def half(at: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(len(x), 2, -1)[:, at]


def separate(attention: str, groups: int, names: str = "q_proj k_proj v_proj") -> dict[str, Pick]:
    """Name three projections."""
    counts = (HEADS, groups, groups)
    named = zip("qkv", names.split(), counts, strict=True)
    return {part: (f"{attention}.{name}", False, heads(n)) for part, name, n in named}


def fused(path: str, *reads: Callable[[Tensor], Tensor]) -> dict[str, Pick]:
    """Name one fused projection."""
    return {part: (path, False, read) for part, read in zip("qkv", reads, strict=True)}


def plain_mlp(up: str, down: str) -> dict[str, Pick]:
    return {
        "mlp_up": (up, False, same),
        "mlp_activation": (down, True, same),
        "mlp_down": (down, False, same),
    }


GATED: dict[str, Pick] = plain_mlp("mlp.up_proj", "mlp.down_proj") | {"mlp_gate": ("mlp.gate_proj", False, same)}
HALVED: dict[str, Pick] = plain_mlp("mlp.gate_up_proj", "mlp.down_proj") | {
    "mlp_gate": ("mlp.gate_up_proj", False, half(0)),
    "mlp_up": ("mlp.gate_up_proj", False, half(1)),
}
LLAMA = separate("self_attn", GROUPS) | GATED | {"residual_mid": ("post_attention_layernorm", True, same)}
GEMMA2 = LLAMA | {"residual_mid": ("pre_feedforward_layernorm", True, same)}
STACKED = fused("attn.c_attn", heads(HEADS), heads(HEADS, WIDE), heads(HEADS, 2 * WIDE))
SHARED = fused("attn.c_attn", heads(HEADS), heads(1, WIDE), heads(1, WIDE + C))
GPT2 = plain_mlp("mlp.c_fc", "mlp.c_proj") | {"residual_mid": ("ln_2", True, same)}
PHI3 = fused("self_attn.qkv_proj", heads(HEADS), heads(GROUPS, WIDE), heads(GROUPS, WIDE + GROUPS * C))
NEOX = fused("attention.query_key_value", *map(of_each_head, range(3)))
NEOX |= plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
PERSIMMON = fused("self_attn.query_key_value", *map(of_each_head, range(3)))
OPT = separate("self_attn", HEADS) | plain_mlp("fc1", "fc2") | {"residual_mid": ("final_layer_norm", True, same)}
MID = {"residual_mid": ("post_attention_layernorm", True, same)}
PLAIN = separate("self_attn", GROUPS) | plain_mlp("mlp.up_proj", "mlp.down_proj") | MID
OLMO2 = LLAMA | {"residual_mid": ("mlp", True, same)}
BY_HAND: dict[str, dict[str, Pick]] = {
    **dict.fromkeys(("llama", "qwen3", "mistral", "granite", "smollm3", "hunyuan", "bitnet"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma4"), GEMMA2),
    "olmo2": OLMO2,
    "nemotron": PLAIN,
    "opt": OPT,
    "opt_post_norm": OPT | {"residual_mid": ("self_attn_layer_norm", True, same)},
    "gpt2": STACKED | GPT2,
    "gpt_bigcode": SHARED | GPT2,
    "phi3": PHI3 | HALVED | MID,
    "glm4": separate("self_attn", GROUPS) | HALVED | MID,
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX | MID,
    "persimmon": PERSIMMON | plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h") | MID,
    "nanochat": separate("self_attn", GROUPS) | plain_mlp("mlp.fc1", "mlp.fc2") | MID,
    "phi": separate("self_attn", HEADS) | plain_mlp("mlp.fc1", "mlp.fc2"),
    "cohere": separate("self_attn", GROUPS) | GATED,
    "ctrl": separate("multi_head_attention", HEADS, "Wq Wk Wv")
    | plain_mlp("ffn.0", "ffn.2")
    | {"residual_mid": ("layernorm2", True, same)},
    "mixtral": separate("self_attn", GROUPS) | MID,
    "gpt_oss": separate("self_attn", GROUPS) | MID,
    "qwen2_moe": separate("self_attn", GROUPS) | MID,
}
PARALLEL = {"gpt_neox": "attention", "phi": "self_attn", "cohere": "self_attn"}
MIXTURES = ("mixtral", "gpt_oss", "qwen2_moe")
FAMILIES = ["llama", "gemma2", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "mixtral"]


@torch.no_grad()
def picked(name: str, layer: int, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> Seen:
    """Return the same parts by transformers alone, with hooks of this file's own."""
    model = shared_model(name, dtype)
    block = blocks(model)[layer]
    text = torch.tensor([list(ids)])
    seen: Seen = {}
    parallel = PARALLEL.get(name)
    for part, (path, inputs, read) in BY_HAND[name].items():
        with taps([block.get_submodule(path)], inputs=inputs) as got:
            model(input_ids=text, use_cache=False)
        seen[part] = read(got[0].reshape(len(ids), -1))
    with (
        taps([block], inputs=True) as inputs,
        taps([block]) as outputs,
        taps([block.get_submodule(parallel or "")]) as added,
    ):
        model(input_ids=text, use_cache=False)
    seen |= {"residual_in": inputs[0][0], "residual_out": outputs[0][0]}
    return seen | ({"residual_mid": inputs[0][0] + added[0][0]} if parallel else {})


@pytest.mark.parametrize(
    ("name", "layer"),
    [(name, layer) for name in BY_HAND for layer in ((0, LAYERS - 1) if name in ("llama", "gemma2") else (0,))],
)
def test_parts_equal_those_named_by_hand(name: str, layer: int) -> None:
    read, expected = (
        read_alone(wrap(shared_model(name, torch.float32)), found(name, layer), LONG),
        picked(name, layer, LONG),
    )
    of_a_mixture = {"mlp_up", "mlp_gate", "mlp_activation", "mlp_down", "experts", "expert_weights"}
    assert set(read) - (of_a_mixture if name in MIXTURES else set()) == set(expected)
    for part, value in expected.items():
        assert deviation(read[part], value) < 1e-6, part


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_found_in_float64_too(name: str) -> None:
    if name == "mixtral":
        pytest.skip("torch multiplies grouped matrices in float32 at most")
    read = read_alone(wrap(shared_model(name, torch.float64)), found(name, 1, torch.float64), LONG)
    expected = picked(name, 1, LONG, torch.float64)
    assert set(read) == set(expected)
    for part, value in expected.items():
        assert read[part].dtype == torch.float64
        assert deviation(read[part], value) < 1e-14, part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_parts_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    exact = {part.name: part for part in found(name, 1)}
    names = dict(blocks(shared_model(name, torch.float32))[1].named_modules())
    halves = dict(blocks(shared_model(name, dtype))[1].named_modules())
    for part in found(name, 1, dtype):
        (path,) = (path for path, module in names.items() if module is exact[part.name].tap.module)
        assert part.tap.module is halves[path]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_parts_is_the_same_everywhere(name: str) -> None:
    order = ["q", "k", "v", "mlp_up", "mlp_gate", "mlp_activation", "mlp_down"]
    order += ["residual_in", "residual_mid", "residual_out", "experts", "expert_weights"]
    names = [part.name for part in found(name, 1)]
    assert names == [part for part in order if part in names]


# --- laws of every family ---------------------------------------------------------------------------------------------

WITHOUT_ATTENTION = ("gptj", "falcon", "bloom", "mpt", "diffllama", "deepseek_v3")  # only their other parts can be read
OTHER_KINDS = (
    "cohere",
    "granite",
    "olmo2",
    "gemma4",
    "bitnet",
    "phi3",
    "opt_post_norm",
    "gpt_oss",
    "qwen2_moe",
    "olmoe",
)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHER_KINDS, *WITHOUT_ATTENTION])
def test_the_stream_adds_up_and_widths_agree(name: str) -> None:
    lm = wrap(shared_model(name, torch.float32))
    attention = name not in WITHOUT_ATTENTION
    read = read_alone(lm, found(name, 1, attention=attention), LONG)
    n = len(LONG)
    assert all(read[part].shape == (n, HIDDEN) for part in ("residual_in", "residual_mid", "residual_out", "mlp_down"))
    assert read["mlp_up"].shape == read["mlp_activation"].shape == read.get("mlp_gate", read["mlp_up"]).shape
    before = read_alone(lm, found(name, 0, attention=attention), LONG)
    assert torch.equal(before["residual_out"], read["residual_in"])
    assert deviation(read["residual_mid"], read["residual_in"]) > 1e-3
    assert deviation(read["residual_mid"], read["residual_out"]) > 1e-3
    for part, value in read_alone(lm, stream_of(lm, 1), LONG).items():
        assert torch.equal(value, read[part])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt_neox"])
def test_the_mlp_adds_its_down_projection_or_the_norm_of_it(name: str) -> None:
    lm = wrap(shared_model(name, torch.float32))
    read = read_alone(lm, found(name, 2), LONG)
    norm = getattr(blocks(shared_model(name, torch.float32))[2], "post_feedforward_layernorm", None)
    added_TD = read["mlp_down"] if norm is None else norm(read["mlp_down"])
    assert deviation(read["residual_mid"] + added_TD, read["residual_out"]) < 1e-5
    assert deviation(read["residual_mid"] - added_TD, read["residual_out"]) > 1e-2


@pytest.mark.parametrize(
    ("name", "attention", "out"),
    [
        *((name, "self_attn", "o_proj") for name in ("llama", "qwen3", "mistral", "gemma2", "mixtral", "gpt_oss")),
        ("gpt2", "attn", "c_proj"),
        ("gpt_neox", "attention", "dense"),
        ("phi3", "self_attn", "o_proj"),
    ],
)
def test_weighted_values_through_the_output_projection_equal_attentions_output(
    name: str, attention: str, out: str
) -> None:
    """Weights and v are captured in different ways and must agree."""
    model = shared_model(name, torch.float32)
    lm, parts, seen = wrap(model), found(name, 1), dict[str, Tensor]()
    with watch_attention(lm, [1], lambda _, a: seen.update(weights=a.weights_BHTS[0].clone())):
        v_TGC = read_alone(lm, parts, LONG)["v"]
    module: Any = blocks(model)[1].get_submodule(attention)
    with taps([module]) as outputs, torch.no_grad():
        model(input_ids=torch.tensor([list(LONG)]), use_cache=False)
        v_THC = v_TGC.repeat_interleave(HEADS // v_TGC.shape[1], dim=1)
        mixed_THC = torch.einsum("hts,shc->thc", seen["weights"], v_THC)
        assert deviation(getattr(module, out)(mixed_THC.flatten(1)), outputs[0][0]) < 1e-5
        assert deviation(getattr(module, out)(mixed_THC.flip(1).flatten(1)), outputs[0][0]) > 1e-2


def test_the_parts_of_llamas_mlp_compose_to_its_output() -> None:
    read = read_alone(wrap(shared_model("llama", torch.float32)), found("llama", 1), LONG)
    activation_TF = functional.silu(read["mlp_gate"]) * read["mlp_up"]
    assert deviation(activation_TF, read["mlp_activation"]) < 1e-6
    assert deviation(functional.silu(read["mlp_up"]) * read["mlp_gate"], read["mlp_activation"]) > 1e-2
    down: Any = blocks(shared_model("llama", torch.float32))[1].mlp.down_proj  # type: ignore[union-attr]
    assert deviation(down(activation_TF), read["mlp_down"]) < 1e-6


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixtral_by_hand(mlp: Any, x_D: Tensor) -> tuple[Tensor, list[tuple[float, Tensor, Tensor, Tensor, Tensor]]]:
    """Return one token's experts, and (weight, up, gate, activation, output) of each."""
    chance_E = (mlp.gate.weight @ x_D).softmax(-1)
    chosen = chance_E.argsort(descending=True)[:2]
    rows = []
    for expert in chosen.tolist():
        gate_F, up_F = (mlp.experts.gate_up_proj[expert] @ x_D).split(48)
        activation_F = functional.silu(gate_F) * up_F
        weight = float(chance_E[expert] / chance_E[chosen].sum())
        rows.append((weight, up_F, gate_F, activation_F, mlp.experts.down_proj[expert] @ activation_F))
    return chosen, rows


def gpt_oss_by_hand(mlp: Any, x_D: Tensor) -> tuple[Tensor, list[tuple[float, Tensor, Tensor, Tensor, Tensor]]]:
    """Do the same with biases, gate and up interleaved, and gpt_oss's activation."""
    score_E = mlp.router.weight @ x_D + mlp.router.bias
    chosen = score_E.argsort(descending=True)[:2]
    rows = []
    for weight, expert in zip(score_E[chosen].softmax(-1).tolist(), chosen.tolist(), strict=True):
        both_X = x_D @ mlp.experts.gate_up_proj[expert] + mlp.experts.gate_up_proj_bias[expert]
        gate_F, up_F = both_X[::2], both_X[1::2]
        cut_F = gate_F.clamp(max=7.0)
        activation_F = (up_F.clamp(-7.0, 7.0) + 1) * cut_F * torch.sigmoid(1.702 * cut_F)
        out_D = activation_F @ mlp.experts.down_proj[expert] + mlp.experts.down_proj_bias[expert]
        rows.append((weight, up_F, gate_F, activation_F, out_D))
    return chosen, rows


@pytest.mark.parametrize(("name", "by_hand"), [("mixtral", mixtral_by_hand), ("gpt_oss", gpt_oss_by_hand)])
def test_the_parts_of_a_mixture_are_those_of_each_tokens_experts(name: str, by_hand: Any) -> None:
    model = shared_model(name, torch.float32)
    read = read_alone(wrap(model), found(name, 1), LONG)
    mlp: Any = blocks(model)[1].mlp
    with taps([mlp], inputs=True) as inputs, torch.no_grad():
        model(input_ids=torch.tensor([list(LONG)]), use_cache=False)
    assert read["experts"].dtype == torch.int64
    for t, x_D in enumerate(inputs[0][0]):
        chosen, rows = by_hand(mlp, x_D)
        weights, ups, gates, activations, outs = zip(*rows, strict=True)
        assert read["experts"][t].tolist() == chosen.tolist()
        assert deviation(read["expert_weights"][t], torch.tensor(weights)) < 1e-5
        for part, expected in {"mlp_up": ups, "mlp_gate": gates, "mlp_activation": activations}.items():
            assert deviation(read[part][t], torch.stack(expected)) < 1e-5, part
        out_D = sum(weight * out_D for weight, out_D in zip(weights, outs, strict=True))
        assert deviation(read["mlp_down"][t], torch.as_tensor(out_D)) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_moe", "ernie4_5_moe", "deepseek_v2"])
def test_mlp_down_includes_a_shared_expert(name: str) -> None:
    model = shared_model(name, torch.float32)
    read = read_alone(wrap(model), found(name, 1, attention=name != "deepseek_v2"), LONG)
    mlp: Any = blocks(model)[1].mlp
    with taps([mlp]) as outputs, taps([mlp.experts]) as routed, torch.no_grad():
        model(input_ids=torch.tensor([list(LONG)]), use_cache=False)
    assert deviation(read["mlp_down"], outputs[0][0]) < 1e-6
    assert deviation(read["mlp_down"], routed[0]) > 1e-2
    weights: Tensor = mlp.experts.down_proj
    out_TkD = torch.einsum("tkf,tkdf->tkd", read["mlp_activation"], weights[read["experts"]])
    assert deviation((out_TkD * read["expert_weights"].unsqueeze(-1)).sum(1), routed[0]) < 1e-5


def test_negative_control_a_mixture_with_another_output_is_not_found() -> None:
    """Weights that did not make an output are not taken for those that did."""
    block: Any = blocks(shared_model("mixtral", torch.float32))[1]
    hidden_ND = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(0))
    _, weights_Nk, experts_Nk = block.mlp.gate(hidden_ND)
    output_ND = block.mlp.experts(hidden_ND, experts_Nk, weights_Nk)
    routers: list[nn.Module] = [block.mlp.gate]
    assert find_mixture_of_experts(routers, block.mlp.experts, hidden_ND, output_ND, 1e-4) is not None
    swapped_ND = block.mlp.experts(hidden_ND, experts_Nk, weights_Nk.flip(-1))
    for wrong_ND in (swapped_ND, 1.01 * output_ND, -output_ND):
        assert find_mixture_of_experts(routers, block.mlp.experts, hidden_ND, wrong_ND, 1e-4) is None
    assert find_mixture_of_experts([block.self_attn.q_proj], block.mlp.experts, hidden_ND, output_ND, 1e-4) is None


# --- in the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_in_the_engines_batch_equal_those_of_one_pass(name: str) -> None:
    """All requests enter at once, longest first, and none ends before the others: row i is request i."""
    lm, n_new = wrap(shared_model(name, torch.float32), stop_ids=()), 5
    requests = [Request(f"r{i}", text, n_new) for i, text in enumerate(sorted(prompts(4), key=len, reverse=True))]
    plain = {c.id: c.token_ids for c in generate(lm, requests, batch_size=4)}
    parts = found(name, 1)
    with watch_attention(lm, [1], lambda _layer, _attended: None), reading(parts, 4) as seen:
        done = {c.id: c.token_ids for c in generate(lm, requests, batch_size=4)}
    assert done == plain
    for row, request in enumerate(requests):
        text = request.token_ids + done[request.id][:-1]
        for part, expected in read_alone(lm, parts, text).items():
            prefill, *steps = (value[row] for value in seen[part])
            read = torch.cat([prefill[-len(request.token_ids) :], *steps])
            assert deviation(read, expected) < 1e-5, part


# --- layouts, and parts that can't be found ---------------------------------------------------------------------------


class Shuffled(nn.Module):
    """A projection whose inner module has its channels in another order."""

    def __init__(self, inner: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.inner, self.order = inner, order
        self.inner.weight.data = self.inner.weight.data[:, order]  # type: ignore[operator,union-attr]
        self.inner.bias.data = self.inner.bias.data[order]  # type: ignore[operator,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[..., self.order.argsort()]


@pytest.mark.parametrize("seed", [0, 2])
def test_a_projection_is_identified_by_its_numbers_not_by_its_width(seed: int) -> None:
    """The inner module is as wide and runs first, but its channels are in another order: the outer one is found."""
    model = tiny_model("gpt2")
    block: Any = blocks(model)[1]
    order = torch.randperm(3 * WIDE, generator=torch.Generator().manual_seed(seed))
    if seed == 2:  # q and k swapped
        order = torch.arange(3 * WIDE).reshape(3, WIDE)[[1, 0, 2]].flatten()
    block.attn.c_attn = Shuffled(block.attn.c_attn, order)
    lm = wrap(model)
    parts = parts_of(lm, 1)
    assert all(part.tap.module is block.attn.c_attn for part in parts[:2])
    for part, expected in picked("gpt2", 1, LONG).items():
        assert deviation(read_alone(lm, parts, LONG)[part], expected) < 1e-5, part


class Nudged(nn.Module):
    """A projection plus a small change, as a LoRA adapter adds: the inner module runs first and is nearly equal."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        return made + self.by * made.roll(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_projection_with_a_small_adapter_includes_the_adapter(name: str, dtype: torch.dtype) -> None:
    """Even if the difference is within the rounding of the dtype."""
    model = tiny_model(name, dtype=dtype)
    block: Any = blocks(model)[1]
    by = 1e-2 if dtype == torch.bfloat16 else 5e-5
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"):
        holder, _, leaf = path.partition(".")
        setattr(getattr(block, holder), leaf, Nudged(block.get_submodule(path), by))
    found_in = {part.name: part.tap.module for part in parts_of(wrap(model), 1)}
    for part in ("q", "v", "mlp_up", "mlp_gate", "mlp_down"):
        assert isinstance(found_in[part], Nudged), part
    assert found_in["k"] is block.self_attn.k_proj


def test_negative_control_heads_in_another_order_differ() -> None:
    """GPT-NeoX holds q, k and v by head; read one after the other they are wrong."""
    read = read_alone(wrap(shared_model("gpt_neox", torch.float32)), found("gpt_neox", 1), LONG)
    with taps([blocks(shared_model("gpt_neox", torch.float32))[1].get_submodule("attention.query_key_value")]) as got:
        shared_model("gpt_neox", torch.float32)(input_ids=torch.tensor([list(LONG)]), use_cache=False)
    for part, start in {"q": 0, "k": WIDE, "v": 2 * WIDE}.items():
        assert deviation(heads(HEADS, start)(got[0][0]), read[part]) > 1e-2


def test_clipped_queries_are_refused() -> None:
    """OLMo may clip its projections, so that attention's queries are no projection's output."""
    model = tiny_model("olmo", clip_qkv=0.05)
    with pytest.raises(ModelError, match=r"layer 1 of OlmoForCausalLM: q .*--no-attention"):
        parts_of(wrap(model), 1)
    assert parts_of(wrap(model), 1, attention=False)[0].name == "mlp_up"


@pytest.mark.parametrize(
    ("name", "place_and_remedy"),
    [
        ("gptj", "GPTJForCausalLM.*--no-attention"),
        ("deepseek_v3", r"layer 1 of DeepseekV3ForCausalLM: q .*--no-attention"),
        ("llama4", r"layer 1 of Llama4ForCausalLM: mlp_up .*capture_tier2"),
        ("jetmoe", r"layer 1 of JetMoeForCausalLM: \w+ "),
        ("gemma4", r"layer 2 of Gemma4ForCausalLM: k .*--no-attention"),  # it reads an earlier layer's
    ],
)
def test_a_part_that_cant_be_found_is_named_with_a_remedy(name: str, place_and_remedy: str) -> None:
    with pytest.raises(ModelError, match=place_and_remedy) as refusal:
        parts_of(wrap(shared_model(name, torch.float32)), 2 if name == "gemma4" else 1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_without_attention_the_other_parts_are_found(name: str) -> None:
    names = [part.name for part in found(name, 0, attention=False)]
    assert not {"q", "k", "v"} & set(names)
    assert {"mlp_up", "mlp_activation", "mlp_down", "residual_in", "residual_mid", "residual_out"} <= set(names)


def test_a_layer_out_of_range_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 3 .*0 to 2"):
        parts_of(wrap(shared_model("llama", torch.float32)), 3)
