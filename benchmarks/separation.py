"""Whether a vector tells hedging tokens from certain ones in answers to prompts that it has never seen, on pocket.

Vectors of many kinds read the same answers in one pass: the trait's own, and placebos, which the same method makes of
the same responses when each side is dealt out at random into two halves.

Shapes: N positive rows, M negative rows, L layers, D hidden, K vectors (the trait's first), T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extraction.activations.per_token import TokenProjections
from extraction.config.prompt_files import read_prompt_set
from extraction.core.progress import ProgressReporter
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.judging.lexical import lexical_score
from extraction.model.chat_template import encode_conversation
from extraction.model.language_model import LanguageModel
from extraction.monitoring.dynamics import smoothed
from extraction.monitoring.prompt_capture import pieces_of
from extraction.pipeline.fit import VectorOptions, fit_inputs
from extraction.pipeline.plan import MODES, make_plan
from extraction.pipeline.session import TraitContext
from extraction.pipeline.stages import generate as make_responses
from extraction.utils_batch import Request
from extraction.vectors.methods import FUNCTIONS
from extraction.vectors.metrics import auroc, cohens_d

TRAIT, METHOD = "uncertainty_calibration", "mean_diff"
PROMPTS = Path(__file__).resolve().parent.parent / "configs" / "prompts"
FILES = ("prompts_uncertainty.txt", "prompts_commitment.txt", "prompts_cognitive.txt", "prompts_sycophancy.txt")
INTERVAL = (0.025, 0.5, 0.975)
SIDES = ("hedging", "certain")
N_DRAWN = 8  # answers whose course is drawn


@dataclass(frozen=True)
class Answer:
    """One prompt's answer. `score`: 100 where all its markers hedge, 0 where all are certain, None without any."""

    prompt: str
    pieces: Sequence[str]
    score: float | None
    projections_TLK: Tensor

    @property
    def side(self) -> str | None:
        """hedging, certain, or None for an answer that is neither or both."""
        return {100.0: "hedging", 0.0: "certain"}.get(-1.0 if self.score is None else self.score)


def separation(n_placebos: int, n_examples: int, say: Callable[[str], None]) -> dict[str, Any]:
    """AUROC of tokens of hedging answers against those of certain ones, by layer: the trait's vector, and placebos."""
    with tempfile.TemporaryDirectory() as folder:
        lm, sides = _sides(folder, n_examples)
    unit_LDK = units(*sides, n_placebos)
    answers = list(_answers(lm, unit_LDK))
    hedging, certain = (
        torch.cat([answer.projections_TLK for answer in answers if answer.side == side]) for side in SIDES
    )
    found_LK = auroc(hedging.flatten(1), certain.flatten(1)).view(hedging.shape[1:])
    layer = _told_apart_best(*sides, unit_LDK)
    means = {side: torch.stack([a.projections_TLK.mean(0) for a in answers if a.side == side]) for side in SIDES}
    means_LK = auroc(*(means[side].flatten(1) for side in SIDES)).view(found_LK.shape)
    say(f"  {len(hedging)} tokens of hedging answers, {len(certain)} of certain ones")
    return {
        "trait": TRAIT,
        "method": METHOD,
        "placebos": n_placebos,
        "answers": {side: sum(each.side == side for each in answers) for side in SIDES},
        "tokens": {"hedging": len(hedging), "certain": len(certain)},
        "layers": [
            {"of_tokens": _beside(tokens_K), "of_answers": _beside(answers_K)}
            for tokens_K, answers_K in zip(found_LK, means_LK, strict=True)
        ],
        "layer": layer,
        "courses": [_course(answer, layer) for answer in answers if answer.side is not None][:N_DRAWN],
    }


def _beside(row_K: Tensor) -> dict[str, float]:
    """The trait's AUROC and the placebos', and how many of them it beats."""
    low, median, high = torch.quantile(row_K[1:], torch.tensor(INTERVAL, dtype=row_K.dtype)).tolist()
    beaten = float((row_K[1:] < row_K[0]).double().mean())
    return {"trait": float(row_K[0]), "low": low, "median": median, "high": high, "beaten": beaten}


def _told_apart_best(positive_NLD: Tensor, negative_MLD: Tensor, unit_LDK: Tensor) -> int:
    """The layer at which the vector holds the rows that it was made from furthest apart."""
    scores = (torch.einsum("nld,ld->nl", side.float(), unit_LDK[..., 0]) for side in (positive_NLD, negative_MLD))
    return int(cohens_d(*scores).argmax())


def _sides(folder: str, n_examples: int) -> tuple[LanguageModel, tuple[Tensor, Tensor]]:
    """The model, and the activations [N, L, D] and [M, L, D] that the trait's vectors are made from."""
    options = {"n_examples": n_examples, "batch_size": 32}
    plan = make_plan("pocket", TRAIT, root=folder, options=options, self_check=0)
    session = make_responses(plan, MODES["batched"], _Silent()).session
    fit = fit_inputs(TraitContext(session, plan.traits[0], _Silent()), VectorOptions())
    rows_nLD = fit.rows.read_layers(slice(None))
    return session.lm, (rows_nLD[: fit.n_positive], rows_nLD[fit.n_positive :])


def units(positive_NLD: Tensor, negative_MLD: Tensor, n_placebos: int) -> Tensor:
    """[L, D, 1 + placebos], each column of length 1: the trait's direction, then the placebos'."""
    fit, generator = FUNCTIONS[METHOD], torch.Generator().manual_seed(0)
    found = [fit(positive_NLD, negative_MLD, seed=0)]
    for _ in range(n_placebos):
        dealt = [side[torch.randperm(len(side), generator=generator)] for side in (positive_NLD, negative_MLD)]
        halves = [torch.cat([side[i::2] for side in dealt]) for i in (0, 1)]
        found.append(fit(*halves, seed=0))
    return torch.nn.functional.normalize(torch.stack(found, dim=-1).float(), dim=1)


def _answers(lm: LanguageModel, unit_LDK: Tensor) -> Iterator[Answer]:
    """Every prompt of the files, answered as the guide does, read along all vectors at once."""
    from extraction.config.experiments import find_root
    from extraction.config.traits import load_trait

    markers = load_trait(TRAIT, find_root(), "pocket").markers
    assert markers is not None
    assert lm.tokenizer is not None
    asked = {f"{name}/{i}": each.prompt for name in FILES for i, each in enumerate(_prompts(name))}
    encoded = {id: encode_conversation(lm.tokenizer, (("user", words),))[1] for id, words in asked.items()}
    requests = [Request(id, token_ids, 50) for id, token_ids in encoded.items()]
    capture = TokenProjections(tuple(range(lm.n_layers)), unit_LDK, attention=False)
    done = {c.id: c for c in generate(lm, requests, batch_size=32, strategy=Sample(0.7), capture=capture)}
    for id, words in asked.items():
        completion, n_prompt = done[id], len(encoded[id])
        text = lm.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
        pieces = pieces_of(lm.tokenizer, [*encoded[id], *completion.token_ids])[n_prompt:]
        projections_TLK = completion.activations["projections"][n_prompt:, :, -1]
        yield Answer(words, pieces, lexical_score(text, markers), projections_TLK)


def _prompts(name: str) -> Sequence[Any]:
    return read_prompt_set(PROMPTS / name).prompts


def _course(answer: Answer, layer: int) -> dict[str, Any]:
    """What is drawn of an answer: its smoothed projections on the trait's vector and on the first placebo's."""
    trait_T, placebo_T = (smoothed(answer.projections_TLK[:, layer, k].numpy()) for k in (0, 1))
    return {"prompt": answer.prompt, "side": answer.side, "trait": trait_T.tolist(), "placebo": placebo_T.tolist()}


class _Silent(ProgressReporter):
    """Nobody listens."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, title: str, n_examples: int, n_done: int, *, seconds_left: object = None) -> None:
        """Nothing."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
