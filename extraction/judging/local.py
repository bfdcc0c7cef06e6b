"""The local judge: any causal model of this machine, which answers a rubric with a number from 0 to 100.

Its score is the mean over all numbers that it could write, the sum of n * P(n) over the sum of P(n), as
`number_probabilities` reads them off its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from extraction.config.experiments import Experiment, ModelSpec, resolve_model
from extraction.core.errors import ConfigError, ModelError
from extraction.core.records import Example
from extraction.judging.base import FirstAnswers, ModelJudge, Rating, RatingContext, SaveRatings
from extraction.judging.rubric import NO_NUMBER, expectation

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.model.language_model import LanguageModel

BATCH_SIZE = 16
TOO_LONG = "too long for the judge"
CUE = "\n\nScore:"  # behind a rubric without a chat template

_loaded: dict[ModelSpec, LanguageModel] = {}  # the last judge, kept for the next trait


def _spec(settings: Experiment, root: Path, device: str = "auto") -> ModelSpec:
    """Return the judge's model. Raises ConfigError for an unknown name."""
    try:
        return resolve_model(settings.judge_model or "", root, {"device": None if device == "auto" else device})
    except ConfigError as failure:
        raise ConfigError(f"--judge-model: {failure}") from failure


def _model_name(settings: Experiment, root: Path) -> str:
    """Return the model's short name; of a folder, its last part."""
    return _spec(settings, root).name


def _check_numbers(settings: Experiment, root: Path) -> None:
    """Raise ModelError if the model's tokenizer can't write all numbers."""
    from extraction.judging.number_probabilities import spell_numbers
    from extraction.model.loading import read_tokenizer

    spec = _spec(settings, root)
    spell_numbers(read_tokenizer(spec), spec.name)


def _load(spec: ModelSpec, note: Callable[[str], None]) -> LanguageModel:
    """Load a judge's model, or return the one that is loaded already."""
    if spec not in _loaded:
        from transformers.utils import logging

        from extraction.model.loading import load

        note(f"loading the judge {spec.name}")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        _loaded.clear()
        _loaded[spec] = load(spec)
    return _loaded[spec]


def _rate(context: RatingContext, texts: Mapping[str, str], save: SaveRatings) -> None:
    spec = _spec(context.settings, context.root, context.device)

    def save_and_report(ratings: Mapping[str, Rating]) -> None:
        save(ratings)
        context.reporter.advance(len(ratings), sum(rating.tokens[0] for rating in ratings.values()))

    rate_texts(_load(spec, context.reporter.note), spec.name, texts, save_and_report)


def encode_rubric(lm: LanguageModel, text: str) -> tuple[int, ...]:
    """Encode a filled rubric: as a user's message by the chat template, or as text with a cue if there is none."""
    from extraction.model.chat_template import encode_example

    assert lm.tokenizer is not None
    raw = not getattr(lm.tokenizer, "chat_template", None)
    question = text.rstrip() + CUE if raw else text
    example = Example("judged", "", "", 0, 0, 0, question)
    return encode_example(lm.tokenizer, example, raw=raw).token_ids


def rate_texts(
    lm: LanguageModel, name: str, texts: Mapping[str, str], save: SaveRatings, *, batch_size: int = BATCH_SIZE
) -> None:
    """Rate filled rubrics by key, longest first; halve the batch each time that memory runs out.

    A text that exceeds the model's positions is missing. Raises ModelError for probabilities that are NaN, and if none
    of the first answers has a score.
    """
    from extraction.judging.number_probabilities import number_probabilities, spell_numbers

    assert lm.tokenizer is not None
    spellings = spell_numbers(lm.tokenizer, name)
    prompts = {key: encode_rubric(lm, text) for key, text in texts.items()}
    limit = None if lm.max_positions is None else lm.max_positions - spellings.max_tokens
    too_long = [key for key, ids in prompts.items() if limit is not None and len(ids) > limit]
    save({key: Rating(None, TOO_LONG, how=spellings.description) for key in too_long})
    first = FirstAnswers(save, f"--judge-model {name}")
    waiting = sorted(prompts.keys() - set(too_long), key=lambda key: (-len(prompts[key]), key))
    while waiting:
        batch = waiting[:batch_size]
        if not lm.pads_prompts:
            batch = [key for key in batch if len(prompts[key]) == len(prompts[batch[0]])]
        try:
            p_BN = number_probabilities(lm, [prompts[key] for key in batch], spellings)
        except (RuntimeError, MemoryError) as failure:
            batch_size = _smaller_batch(batch_size, failure, name)
            continue
        rows = dict(zip(batch, _finite(p_BN, lm, name), strict=True))
        first({key: _rating(p_N, spellings.description, len(prompts[key])) for key, p_N in rows.items()})
        waiting = waiting[len(batch) :]
    first.end()


def _smaller_batch(batch_size: int, failure: Exception, name: str) -> int:
    """Return half the batch size after running out of memory; raise any other failure again."""
    from extraction.model.devices import empty_cache
    from extraction.model.memory import is_out_of_memory

    if not is_out_of_memory(failure):
        raise failure
    if batch_size == 1:
        raise ModelError(
            f"--judge-model {name}: out of memory at batch size 1; take a smaller model; finished ratings are kept"
        ) from failure
    empty_cache()
    return batch_size // 2


def _finite(p_BN: Tensor, lm: LanguageModel, name: str) -> list[list[float]]:
    if not p_BN.isfinite().all():
        dtype = str(lm.dtype).removeprefix("torch.")
        raise ModelError(f"--judge-model {name}: its logits are NaN in {dtype}; set another dtype in its config")
    rows: list[list[float]] = p_BN.double().tolist()
    return rows


def _rating(p_N: Sequence[float], how: str, n_tokens: int) -> Rating:
    """Return the mean as a rating; its `raw` is the likeliest number with its probability, and that of all numbers."""
    best = max(range(len(p_N)), key=p_N.__getitem__)
    raw = f"{best} ({p_N[best]:.3f}); numbers {sum(p_N):.3f}"
    score = expectation(dict(enumerate(p_N)))
    return Rating(score, None if score is not None else NO_NUMBER, raw, how, (n_tokens, 0))


def ask_local(settings: Experiment, root: Path, note: Callable[[str], None], max_tokens: int) -> Callable[[str], str]:
    """Load the settings' model; return a function that gives it a prompt and returns the text of its answer.

    Each call draws other random numbers, so that a second answer to a prompt differs.
    """
    from extraction.engine.generate import generate
    from extraction.engine.requests import Request
    from extraction.engine.sampler import Sample
    from extraction.model.chat_template import encode_example

    lm = _load(_spec(settings, root), note)
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    calls = count()

    def ask(prompt: str) -> str:
        """Return the model's answer to a prompt. Raises ModelError for one that does not fit."""
        raw = not getattr(tokenizer, "chat_template", None)
        token_ids = encode_example(tokenizer, Example("prompt", "", "", 0, 0, 0, prompt), raw=raw).token_ids
        room = max_tokens if lm.max_positions is None else min(max_tokens, lm.max_positions - len(token_ids))
        if room < 1:
            raise ModelError(
                f"--judge-model {settings.judge_model}: a prompt of {len(token_ids)} tokens does not fit its "
                f"{lm.max_positions} positions; take another model"
            )
        request = Request(f"answer-{next(calls)}", token_ids, room)
        (completion,) = generate(lm, [request], batch_size=1, strategy=Sample(temperature=0.7, top_p=0.95))
        return str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))

    return ask


JUDGE = ModelJudge(
    model_help="a file of configs/models, a folder or a hub id",
    rate=_rate,
    model_name=_model_name,
    check_settings=_spec,
    check_model=_check_numbers,
)
