"""The likelihood judge: the run's own model as a generative classifier of its responses.

For a response r to a question q, the model compares how likely r is under the two instructions of a pair. The contrast
is the mean over the trait's pairs k, without the pair that r was made with, of

    (log p(r | q, positive_k) - log p(r | q, negative_k)) / (number of tokens of r)

in nats a token. Both sides are taken to be equally likely beforehand (Krause et al. 2020, GeDi, arXiv 2009.06367). The
score is 100 times the logistic function of SCALE times the contrast, so 50 means that neither side is likelier. Nothing
is generated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from extraction.core.errors import TraitError
from extraction.core.records import Example, Prompt, Trait
from extraction.judging.base import JudgedResponse, OwnModelJudge, judged_part

if TYPE_CHECKING:
    from extraction.engine.teacher_forcing import Text
    from extraction.model.language_model import LanguageModel

SCALE = 20.0  # of the logistic: a contrast of 0.1 nats a token scores 88
Encode = Callable[[Sequence[Example]], list[Prompt]]


def _check(trait: Trait) -> None:
    if len(trait.instructions) < 2:
        raise TraitError(
            f"trait {trait.name}: the likelihood judge needs two instruction pairs or more, so that a response is "
            "judged by other pairs than its own; add pairs, or give another --judge"
        )


def contrasts(
    lm: LanguageModel, encode: Encode, trait: Trait, responses: Sequence[JudgedResponse], batch_size: int
) -> Iterator[tuple[int, float]]:
    """Yield (index, contrast in nats a token) of every response that has tokens, as soon as it is known."""
    from extraction.engine.teacher_forcing import log_likelihoods

    totals: dict[int, float] = defaultdict(float)
    left: dict[int, int] = {}
    texts: list[Text] = []
    for i, response in enumerate(responses):
        of_response = _texts(lm, encode, trait, i, response)
        left[i] = len(of_response)
        texts += of_response
    for text_id, log_p_T in log_likelihoods(lm, texts, batch_size=batch_size):
        key, _, side = text_id.partition("/")
        i = int(key)
        totals[i] += (1 if side == "pos" else -1) * float(log_p_T.double().mean())
        left[i] -= 1
        if not left[i]:
            yield i, totals[i] / len(_other_pairs(trait, responses[i]))


def _other_pairs(trait: Trait, response: JudgedResponse) -> list[int]:
    """Return the indices of the trait's pairs without the one that the response was made with."""
    return [k for k in range(len(trait.instructions)) if k != response.instruction_id]


def _texts(lm: LanguageModel, encode: Encode, trait: Trait, i: int, response: JudgedResponse) -> list[Text]:
    """Return a response's token ids behind the prompts of every other pair, both sides."""
    assert lm.tokenizer is not None
    ids = lm.tokenizer(judged_part(response.text), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        return []
    sides = [(side, pair) for pair in _other_pairs(trait, response) for side in ("pos", "neg")]
    prompts = encode([_example(trait, response.question, side, pair) for side, pair in sides])
    room = None if lm.max_positions is None else lm.max_positions - max(len(prompt.token_ids) for prompt in prompts)
    return [
        (f"{i}/{side}", prompt.token_ids, tuple(ids[:room])) for (side, _), prompt in zip(sides, prompts, strict=True)
    ]


def _example(trait: Trait, question: str, side: str, pair: int) -> Example:
    instructions = trait.instructions[pair]
    system = instructions.positive if side == "pos" else instructions.negative
    return Example("judged", trait.name, side, pair, 0, 0, question, system)


def score_of(contrast: float) -> float:
    """Return the score of a contrast: 0 to 100."""
    return 50 * (1 + math.tanh(SCALE * contrast / 2))  # the logistic function, without overflow


def _score(
    lm: LanguageModel, encode: Encode, trait: Trait, responses: Sequence[JudgedResponse], batch_size: int
) -> Iterator[tuple[int, float]]:
    for i, contrast in contrasts(lm, encode, trait, responses, batch_size):
        yield i, score_of(contrast)


JUDGE = OwnModelJudge(_score, _check)
