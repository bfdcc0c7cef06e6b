"""The vector methods against scikit-learn, numpy and closed forms, and the laws that all of them keep."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.covariance import shrunk_covariance
from sklearn.decomposition import PCA, FastICA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cosine_similarity

from extraction.core.errors import ActivationError, ConfigError, TraitError
from extraction.vectors import prepare
from extraction.vectors.method_table import DEFAULT_METHODS, METHODS, find_method
from extraction.vectors.methods import FUNCTIONS, gradient, ica, mean_diff, normalised, pca, probe, random
from extraction.vectors.prepare import check_sides
from tests.runs import REPOSITORY, environment

FITTED = ("probe", "pca", "ica", "gradient")  # methods that depend on the spread of rows


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_sides(n: int = 40, m: int = 30, layers: int = 3, hidden: int = 12, shift: float = 1.0, seed: int = 0):
    """Make correlated rows with another covariance at each layer, the positive side shifted."""
    mix = gaussian(layers, hidden, hidden, seed=seed)
    rows = torch.einsum("nld,lde->nle", gaussian(n + m, layers, hidden, seed=seed + 1), mix)
    centre, way = 5 * gaussian(layers, hidden, seed=seed + 2), gaussian(layers, hidden, seed=seed + 3)
    return rows[:n] + centre + shift * way, rows[n:] + centre - shift * way


def planted(
    n: int = 120, layers: int = 3, hidden: int = 32, seed: int = 0, shift: float = 3.0, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Return positive and negative rows around a known unit direction [L, D] in white noise, and the direction."""
    way = torch.nn.functional.normalize(gaussian(layers, hidden, seed=seed + 9), dim=-1)
    rows = noise * gaussian(2 * n, layers, hidden, seed=seed)
    return rows[:n] + shift * way, rows[n:] - shift * way, way


def turned(hidden: int, seed: int = 77) -> Tensor:
    return torch.linalg.qr(gaussian(hidden, hidden, seed=seed)).Q


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity(a.double(), b.double(), dim=-1)


def scaled_rows(positive: Tensor, negative: Tensor, layer: int) -> np.ndarray:
    """Scale a layer's rows as the docstring of `probe` says, with numpy."""
    rows = torch.cat([positive, negative])[:, layer].double().numpy()
    rows = rows - rows.mean(0)
    return rows / np.sqrt((rows**2).mean())


# --- oracles


def test_mean_diff_is_the_raw_difference_of_means():
    positive, negative = two_sides()
    expected = positive.numpy().mean(0) - negative.numpy().mean(0)
    np.testing.assert_allclose(mean_diff(positive, negative, seed=0).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c", [0.001, 1.0, 30.0])
@pytest.mark.parametrize(("n", "m", "hidden"), [(40, 30, 12), (15, 22, 90), (18, 18, 36)])
def test_probe_is_scikit_learns_logistic_regression(n: int, m: int, hidden: int, c: float):
    positive, negative = two_sides(n, m, 3, hidden)
    ours = probe(positive, negative, seed=0, c=c)
    for layer in range(3):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=20_000)
        model.fit(scaled_rows(positive, negative, layer), [1] * n + [0] * m)
        theirs = torch.from_numpy(model.coef_[0] / np.linalg.norm(model.coef_[0]))
        assert (ours[layer].double() - theirs).norm() < 1e-4


@pytest.mark.parametrize("hidden", [12, 90])
def test_pca_is_scikit_learns_first_axis_when_the_sides_are_equal(hidden: int):
    positive, negative = two_sides(25, 25, 3, hidden)
    ours = pca(positive, negative, seed=0)
    for layer in range(3):
        axis = PCA(1, svd_solver="full").fit(torch.cat([positive, negative])[:, layer].numpy()).components_[0]
        assert cosine(ours[layer], torch.from_numpy(axis)).abs() > 1 - 1e-10


def test_pca_of_unequal_sides_weighs_each_side_one_half():
    positive, negative = two_sides(60, 7, 2, 9, shift=0.5)
    for layer in range(2):
        p, m = positive[:, layer].numpy(), negative[:, layer].numpy()
        d = p.mean(0) - m.mean(0)
        total = (np.cov(p.T, bias=True) + np.cov(m.T, bias=True)) / 2 + np.outer(d, d) / 4
        axis = np.linalg.eigh(total)[1][:, -1]
        assert cosine(pca(positive, negative, seed=0)[layer], torch.from_numpy(axis)).abs() > 1 - 1e-10


def mixed_sources(n: int = 600, hidden: int = 6, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Independent non-Gaussian sources, mixed; the first is high on the positive side."""
    rng = np.random.default_rng(seed)
    sources = rng.laplace(size=(2 * n, hidden))
    sources[:, 1] = rng.uniform(-2, 2, size=2 * n)
    sources[:n, 0] += 4
    rows = torch.from_numpy(sources @ rng.normal(size=(hidden, hidden)))
    return rows[:n, None], rows[n:, None]


def test_ica_is_the_best_component_of_scikit_learns_fast_ica():
    positive, negative = mixed_sources()
    rows = torch.cat([positive, negative])[:, 0].numpy()
    model = FastICA(
        whiten="unit-variance", fun="logcosh", random_state=0, tol=1e-10, max_iter=2000, whiten_solver="svd"
    )
    sources = model.fit_transform(rows)
    gap = np.abs(sources[: len(positive)].mean(0) - sources[len(positive) :].mean(0))
    theirs = torch.from_numpy(model.components_[gap.argmax()])
    assert cosine(ica(positive, negative, seed=0)[0], theirs).abs() > 1 - 1e-6
    assert cosine(ica(positive, negative, seed=0)[0], torch.from_numpy(model.components_[gap.argmin()])).abs() < 0.99


def test_ica_hardly_depends_on_the_seed_where_sources_are_clear():
    positive, negative = mixed_sources()
    assert cosine(ica(positive, negative, seed=1), ica(positive, negative, seed=2)).item() > 1 - 1e-6


def test_ica_does_not_depend_on_rounding():
    """Near-Gaussian rows, where FastICA proper never settles, with a last bit changed."""
    positive, negative = two_sides(20, 25, 5, 60)
    nudged = positive * (1 + 1e-13)
    torch.testing.assert_close(ica(nudged, negative, seed=0), ica(positive, negative, seed=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.001, 0.1, 0.9])
@pytest.mark.parametrize(("n", "m", "hidden"), [(40, 30, 12), (15, 22, 90)])
def test_gradient_reaches_the_closed_form(n: int, m: int, hidden: int, shrinkage: float):
    positive, negative = two_sides(n, m, 3, hidden)
    ours = gradient(positive, negative, seed=0, shrinkage=shrinkage)
    for layer in range(3):
        p, q = positive[:, layer].numpy(), negative[:, layer].numpy()
        within = (np.cov(p.T, bias=True) + np.cov(q.T, bias=True)) / 2
        closed = np.linalg.solve(shrunk_covariance(within, shrinkage), p.mean(0) - q.mean(0))
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.5, 0.5])
        model.fit(np.concatenate([p, q]), [1] * n + [0] * m)
        assert cosine(ours[layer], torch.from_numpy(closed)) > 1 - 1e-9
        assert cosine(ours[layer], torch.from_numpy(model.coef_[0])) > 1 - 1e-9


def test_gradient_reaches_the_closed_form_over_massive_dimensions():
    positive, negative = two_sides(60, 60, 2, 80)
    positive[..., :2] *= 1e3
    negative[..., :2] *= 1e3
    for layer in range(2):
        p, q = positive[:, layer].numpy(), negative[:, layer].numpy()
        within = (np.cov(p.T, bias=True) + np.cov(q.T, bias=True)) / 2
        closed = np.linalg.solve(shrunk_covariance(within, 0.01), p.mean(0) - q.mean(0))
        ours = gradient(positive, negative, seed=0, shrinkage=0.01)[layer]
        assert cosine(ours, torch.from_numpy(closed)) > 1 - 1e-9


def test_no_direction_separates_better_than_that_of_gradient():
    """Compare the standardised separation at random directions and at small steps from gradient's."""
    positive, negative = two_sides(40, 30, 1, 12)
    p, q = positive[:, 0], negative[:, 0]
    within = torch.from_numpy(shrunk_covariance(sum(np.cov(s.T.numpy(), bias=True) for s in (p, q)) / 2, 0.1))

    def merit(way: Tensor) -> float:
        return float((way @ (p.mean(0) - q.mean(0))) ** 2 / (way @ within @ way))

    best = gradient(positive, negative, seed=0, shrinkage=0.1)[0].double()
    others = [gaussian(12, seed=k) for k in range(50)] + [best + 0.01 * gaussian(12, seed=k) for k in range(50)]
    assert all(merit(other) < merit(best) for other in others)


# --- laws


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hidden", [16, 120])
def test_shape_dtype_norm_and_sign(name: str, hidden: int):
    positive, negative = two_sides(21, 34, 4, hidden)
    found = FUNCTIONS[name](positive.float(), negative.float(), seed=5)
    assert found.shape == (4, hidden)
    assert found.dtype == torch.float32
    higher, lower = (torch.einsum("nld,ld->nl", side, found.double()).mean(0) for side in (positive, negative))
    assert (higher > lower).all()
    if name == "mean_diff":
        assert not torch.allclose(found.norm(dim=-1), torch.ones(4), atol=0.1)
    else:
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("name", METHODS)
def test_swapping_the_sides_turns_the_direction_round(name: str):
    positive, negative = two_sides(30, 20, 3, 40)
    there, back = FUNCTIONS[name](positive, negative, seed=1), FUNCTIONS[name](negative, positive, seed=1)
    torch.testing.assert_close(there, -back, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits(name: str):
    positive, negative = two_sides()
    assert torch.equal(FUNCTIONS[name](positive, negative, seed=3), FUNCTIONS[name](positive, negative, seed=3))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hidden", [16, 90])
def test_permuting_rows_changes_nothing(name: str, hidden: int):
    positive, negative, _ = planted(hidden=hidden, n=40)
    shuffled = positive[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    same, moved = FUNCTIONS[name](positive, negative, seed=0), FUNCTIONS[name](shuffled, negative.flip(0), seed=0)
    torch.testing.assert_close(moved, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_adding_a_vector_to_all_rows_changes_nothing(name: str):
    positive, negative, _ = planted()
    constant = 100 * gaussian(3, 32, seed=50)
    found, moved = (
        FUNCTIONS[name](positive, negative, seed=0),
        FUNCTIONS[name](positive + constant, negative + constant, seed=0),
    )
    torch.testing.assert_close(moved, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 7.0, 1e12])
@pytest.mark.parametrize("name", METHODS)
def test_scaling_all_activations_changes_only_mean_diffs_norm(name: str, scale: float):
    positive, negative, _ = planted()
    found, scaled = (
        FUNCTIONS[name](positive, negative, seed=0),
        FUNCTIONS[name](positive * scale, negative * scale, seed=0),
    )
    torch.testing.assert_close(scaled / (scale if name == "mean_diff" else 1), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [16, 90])
@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_turning_the_space_turns_the_direction(name: str, hidden: int):
    positive, negative, _ = planted(n=40, hidden=hidden)
    turn = turned(hidden)
    torch.testing.assert_close(
        FUNCTIONS[name](positive @ turn, negative @ turn, seed=0),
        (FUNCTIONS[name](positive, negative, seed=0).double() @ turn).float(),
        rtol=0,
        atol=2e-5,
    )


def test_random_does_not_turn_with_the_space():
    positive, negative, _ = planted()
    turn = turned(32)
    there = random(positive @ turn, negative @ turn, seed=0)
    assert (cosine(there, random(positive, negative, seed=0).double() @ turn).abs() < 0.9).all()


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_a_layers_vector_depends_on_that_layer_alone(name: str):
    positive, negative = two_sides(20, 25, 5, 60)
    together = FUNCTIONS[name](positive, negative, seed=0)
    for layer in range(5):
        alone = FUNCTIONS[name](positive[:, layer : layer + 1], negative[:, layer : layer + 1], seed=0)
        torch.testing.assert_close(together[layer], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FITTED)
def test_layers_by_the_chunk_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    positive, negative = two_sides(20, 25, 5, 60)
    whole = FUNCTIONS[name](positive, negative, seed=0)
    monkeypatch.setattr(prepare, "LAYER_CHUNK_BYTES", 1)
    torch.testing.assert_close(FUNCTIONS[name](positive, negative, seed=0), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_left_alone(name: str):
    positive, negative = two_sides()
    before = positive.clone(), negative.clone()
    FUNCTIONS[name](positive, negative, seed=0)
    assert torch.equal(positive, before[0])
    assert torch.equal(negative, before[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_planted_direction_is_found(name: str):
    positive, negative, way = planted(n=1000, hidden=16, shift=2.0, noise=1.0)
    found = cosine(FUNCTIONS[name](positive.float(), negative.float(), seed=0), way)
    if name == "random":
        assert (found < 0.7).all()  # the negative control
    else:
        assert (found > 0.9).all(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_large_norms_and_massive_dimensions_stay_finite(name: str, dtype: torch.dtype):
    positive, negative = (1e3 * side for side in two_sides(20, 20, 2, 300))
    positive[..., 7] += 3e4
    negative[..., 7] += 3e4
    found = FUNCTIONS[name](positive.to(dtype), negative.to(dtype), seed=0)
    assert torch.isfinite(found).all()
    assert (found.norm(dim=-1) > 0.5).all()


# --- few rows, no spread, invalid rows


def test_mean_diff_and_random_need_one_example_a_side():
    positive, negative = two_sides(1, 1)
    torch.testing.assert_close(mean_diff(positive, negative, seed=0), (positive - negative)[0].float())
    assert torch.isfinite(random(positive, negative, seed=0)).all()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("name", FITTED)
def test_the_other_methods_refuse_one_example_and_name_mean_diff(name: str, n: int, m: int):
    positive, negative = two_sides(n, m)
    with pytest.raises(TraitError, match=r"tive side: 1 .* 2 .* mean_diff"):
        FUNCTIONS[name](positive, negative, seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_side_is_refused(name: str):
    positive, negative = two_sides()
    with pytest.raises(TraitError, match="negative side: 0 "):
        FUNCTIONS[name](positive, negative[:0], seed=0)


@pytest.mark.parametrize("name", FITTED)
def test_two_rows_a_side_are_enough(name: str):
    positive, negative = two_sides(2, 2, 3, 30)
    found = FUNCTIONS[name](positive, negative, seed=0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("name", FITTED)
def test_sides_without_spread_give_their_difference(name: str):
    positive, negative = (side.expand(3, 2, 30) for side in two_sides(1, 1, 2, 30))
    assert (cosine(FUNCTIONS[name](positive, negative, seed=0), (positive - negative)[0]) > 1 - 1e-6).all()


@pytest.mark.parametrize("name", METHODS)
def test_sides_with_the_same_mean_are_refused_with_their_layer(name: str):
    positive, negative = two_sides(8, 8, 3, 10)
    negative[:, 1] = positive[torch.randperm(8), 1]
    with pytest.raises(TraitError, match="layer 1: "):
        FUNCTIONS[name](positive, negative, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", METHODS)
def test_non_finite_activations_are_refused(name: str, value: float):
    positive, negative = two_sides()
    negative[4, 2, 7] = value
    with pytest.raises(ActivationError, match=rf"layer 2, row 4 .*negative.* 7 is {value} "):
        FUNCTIONS[name](positive, negative, seed=0)


def test_errors_name_absolute_layers_and_examples():
    positive, negative = (side.float() for side in two_sides(3, 2, 2))
    ids = [f"pos-i00-q{k:03d}-r00" for k in range(3)]
    check_sides(positive, negative, layers=[16, 20], positive_ids=ids)
    positive[2, 1, 0] = torch.nan
    with pytest.raises(ActivationError, match=r"layer 20, .*pos-i00-q002-r00: .*float32") as refusal:
        check_sides(positive, negative, layers=[16, 20], positive_ids=ids)
    assert "\n" not in str(refusal.value)


def test_sides_of_different_shapes_raise_value_error():
    positive, negative = two_sides()
    with pytest.raises(ValueError, match="shapes"):
        mean_diff(positive, negative[..., :-1], seed=0)


def test_the_guide_lists_every_method_with_its_summary():
    page = (REPOSITORY / "docs/guide.md").read_text()
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.summary} |" in page


def test_an_unknown_method_names_the_nearest():
    assert FUNCTIONS["probe"] is probe
    with pytest.raises(ConfigError, match=r"'meandiff'.*'mean_diff'"):
        find_method("meandiff")


def test_normalised_has_unit_norm_and_refuses_zero():
    raw = torch.tensor([[3.0, 4.0], [0.0, 1e-30]])
    torch.testing.assert_close(normalised(raw), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="row 1"):
        normalised(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


# --- threads


def test_methods_and_cards_run_on_several_threads_and_leave_them():
    """In a process of its own, since torch 2.13 on two threads hangs in a batch of LU decompositions."""
    code = """
import torch
torch.set_num_threads(2)
from extraction.vectors.method_table import METHODS
from extraction.vectors.methods import FUNCTIONS
from extraction.vectors.card import build_card
rows = torch.randn(200, 6, 193, generator=torch.Generator().manual_seed(0))
for fit in FUNCTIONS.values():
    fit(rows[:100], 1 + rows[100:], seed=0)
sides, questions = [True] * 100 + [False] * 100, [row % 20 for row in range(200)]
build_card(rows, sides, questions, layers=range(6), seed=0, methods=["probe", "pca"], label_shuffles=0, bootstraps=10)
print(torch.get_num_threads())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True, timeout=120
    )
    assert (result.stdout, result.stderr) == ("2\n", "")
