"""What a method must beat, and how much it depends on the questions that it was given.

n rows, K draws or methods, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from extraction.errors import TraitError
from extraction.vectors.figures import auroc, cohens_d
from extraction.vectors.methods import CONTROL, find_method
from extraction.vectors.reading import by_draws, by_methods, held_out_scores
from extraction.vectors.splits import Rows, Split, halves, shuffled_labels

DEAR = ("ica",)  # methods whose fit takes as long as all others': fewer halves, and no part in the placebos
HALVINGS = 5
HALVINGS_OF_DEAR = 2


@dataclass(frozen=True)
class Draws:
    """The test figures [K] of random directions, each at the layer that its validation chose."""

    auroc_K: Tensor
    cohens_d_K: Tensor


@dataclass(frozen=True)
class Placebo:
    """One shuffle: the labels, the chosen method and layer index, and the rows' scores there [n]."""

    positive_n: Tensor
    method: str
    index: int
    scores_n: Tensor


def random_draws(rows: Rows, split: Split, *, count: int, seed: int) -> Draws:
    """Gaussian directions, oriented on the fit rows and read like any method's.

    What separates along one that nobody has chosen, separates nearly everywhere in the space.
    """
    generator = torch.Generator().manual_seed(seed)
    draws_KLD = torch.randn(count, *rows.activations_nLD.shape[1:], generator=generator, dtype=torch.float64)
    unit_KLD = draws_KLD / draws_KLD.norm(dim=-1, keepdim=True)
    (scores_nKL,) = held_out_scores(rows, split, by_draws(unit_KLD))
    found = _at_best_layer(scores_nKL, rows.positive_n, split)
    return Draws(*(figure_KL.gather(1, found[1]).flatten() for figure_KL in found[0]))


def placebo(rows: Rows, split: Split, methods: Sequence[str], *, seed: int) -> Placebo | None:
    """The whole way, fit, choice of method and layer, test, on labels that mean nothing.

    None where the shuffle leaves a side too few rows, or none that differ.
    """
    shuffled = rows.relabelled(shuffled_labels(rows, split, seed=seed))
    names = cheap(methods)
    with suppress(TraitError):
        (scores_nKL,) = held_out_scores(shuffled, split, by_methods(names, seed=seed))
        validation = split.part_n["validation"]
        method, index = best(*_figures(scores_nKL[validation], shuffled.positive_n[validation]))
        return Placebo(shuffled.positive_n, names[method], index, scores_nKL[:, method, index])
    return None


def cheap(methods: Sequence[str]) -> list[str]:
    """The methods that placebos are tried with: without the dear ones and the control, if any are left."""
    return [name for name in methods if name not in (*DEAR, CONTROL)] or list(methods)


def best(auroc_KL: Tensor, cohens_d_KL: Tensor) -> tuple[int, int]:
    """(way, layer) of the highest AUROC; among equals the largest Cohen's d, then the earlier way, the lower layer."""
    effect_KL = cohens_d_KL.nan_to_num(nan=-torch.inf)
    ranked = [
        (area, effect, -way, -layer)
        for way, row in enumerate(zip(auroc_KL.nan_to_num(nan=0.0).tolist(), effect_KL.tolist(), strict=True))
        for layer, (area, effect) in enumerate(zip(*row, strict=True))
    ]
    _, _, way, layer = max(ranked)
    return -way, -layer


def split_half_cosine(rows: Rows, method: str, *, seed: int) -> Tensor:
    """Mean cosine [L] of the directions of two disjoint halves of the questions, over several ways to halve them.

    5 of them, 2 for a dear method; NaN where a half has too few rows. 1: the direction does not depend on the
    questions; 0: there is nothing but the questions.
    """
    fit, found = find_method(method), [torch.full(rows.activations_nLD.shape[1:2], torch.nan)]
    for halving in range(HALVINGS_OF_DEAR if method in DEAR else HALVINGS):
        with suppress(TraitError):
            first, second = (fit(*half.sides, seed=seed) for half in halves(rows, seed=seed + halving))
            found.append(cosine_similarity(first.double(), second.double(), dim=-1))
    return torch.stack(found[1:] or found).mean(0)


def _figures(scores_nKL: Tensor, positive_n: Tensor) -> tuple[Tensor, Tensor]:
    sides = scores_nKL[positive_n].flatten(1), scores_nKL[~positive_n].flatten(1)
    shape = scores_nKL.shape[1:]
    return auroc(*sides).view(shape), cohens_d(*sides).view(shape)


def _at_best_layer(scores_nKL: Tensor, positive_n: Tensor, split: Split) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Test figures [K, L], and the layer [K, 1] that validation chooses for each draw."""
    validation, test = (
        _figures(scores_nKL[split.part_n[name]], positive_n[split.part_n[name]]) for name in ("validation", "test")
    )
    layers = [best(*(figure[way : way + 1] for figure in validation))[1] for way in range(scores_nKL.shape[1])]
    return test, torch.tensor(layers).unsqueeze(-1)
