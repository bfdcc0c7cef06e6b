"""A judge that runs here: any causal model, asked for a number from 0 to 100.

Its score is not the number that it would write, but the mean of all that it could: the sum of n * P(n) over the sum of
P(n), where P(n) is the probability that its answer starts with the number n. Where every number is one token, that is
the softmax over those tokens; where a number is written in several (digit by digit, as most tokenizers do it), the
probabilities of its tokens are multiplied, and "8" counts only where no further digit follows.

Shapes: B rows, P prompt columns, S columns, V vocabulary, N the 101 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.core.records import Example
from extraction.engine.sequence import left_pad
from extraction.judging.registry import Keep, Rating
from extraction.judging.rubric import NO_NUMBER, expectation
from extraction.model.chat_template import encode_example
from extraction.model.devices import empty_cache
from extraction.model.kv_cache import CacheWindow, make_cache
from extraction.model.loading import LanguageModel, load, read_tokenizer
from extraction.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBERS = range(101)
BATCH_SIZE = 16
TOO_LONG = "too long for the judge"
CUE = "\n\nScore:"  # behind a rubric that no chat template closes

TokenIds = tuple[int, ...]


# --- how a tokenizer writes numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spellings:
    """The numbers 0 to 100 by the token ids that write them: one token each, or paths of a tree of tokens."""

    numbers: Mapping[TokenIds, int]

    @cached_property
    def after(self) -> Mapping[TokenIds, tuple[int, ...]]:
        """The tokens that can follow each beginning of a number."""
        found: dict[TokenIds, list[int]] = {}
        for path in self.numbers:
            for n in range(len(path)):
                tokens = found.setdefault(path[:n], [])
                tokens.extend({path[n]} - set(tokens))
        return {prefix: tuple(tokens) for prefix, tokens in found.items()}

    @property
    def longest(self) -> int:
        """The tokens of the longest number."""
        return max(map(len, self.numbers))

    @property
    def how(self) -> str:
        """What the score is the mean of, in words."""
        return "number tokens" if self.longest == 1 else "numbers of several tokens"


def spell_numbers(tokenizer: PreTrainedTokenizerBase, name: str) -> Spellings:
    """Every number at the start of a text, behind a space and behind a line's end; single tokens where each has one.

    Raises ModelError for a tokenizer that can't write all of them: its model can't judge.
    """
    found: dict[TokenIds, int] = {}
    for number in NUMBERS:
        for ids in _ways(tokenizer, str(number)):
            if str(tokenizer.decode(list(ids))).strip() == str(number):
                found.setdefault(ids, number)
    absent = sorted(set(NUMBERS) - set(found.values()))
    if absent:
        raise ModelError(
            f"--judge-model {name}: its tokenizer can't write {len(absent)} of the numbers from 0 to 100 "
            f"({absent[0]} among them), so it can't judge; take another model"
        )
    single: dict[TokenIds, int] = {path: number for path, number in found.items() if len(path) == 1}
    return Spellings(single if set(single.values()) == set(NUMBERS) else found)


def _ways(tokenizer: PreTrainedTokenizerBase, number: str) -> Iterator[TokenIds]:
    def ids(text: str) -> TokenIds:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    yield ids(number)
    yield ids(f" {number}")
    line_end, behind_it = ids("\n"), ids(f"\n{number}")  # tokenizers that mark a text's start write it otherwise here
    if behind_it[: len(line_end)] == line_end:
        yield behind_it[len(line_end) :]


# --- probabilities --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def number_weights(lm: LanguageModel, prompts: Sequence[Sequence[int]], spellings: Spellings) -> Tensor:
    """The probability of every number as each prompt's answer: [B, N], float32.

    One pass over the left-padded prompts; then one token at a time down the tree of spellings, each branch in the
    columns of the one before.
    """
    reading = _Reading(lm, prompts, spellings)
    weights_BN = torch.zeros(len(prompts), len(NUMBERS), device=lm.device)

    def walk(prefix: TokenIds, log_p_B: Tensor, next_BV: Tensor) -> None:
        """Down the tree from a prefix, which is said with probability exp(log_p)."""
        tokens = spellings.after[prefix]
        if prefix in spellings.numbers:  # it ends here where none of them follows
            goes_on_B = next_BV[:, list(tokens)].exp().sum(1)
            weights_BN[:, spellings.numbers[prefix]] += log_p_B.exp() * (1 - goes_on_B).clamp_(min=0)
        for token in tokens:
            path, log_path_B = (*prefix, token), log_p_B + next_BV[:, token]
            if path in spellings.after:
                walk(path, log_path_B, reading.step(path))
            else:
                weights_BN[:, spellings.numbers[path]] += log_path_B.exp()

    walk((), torch.zeros(len(prompts), device=lm.device), reading.prompts())
    return weights_BN


class _Reading:
    """A batch of prompts in a cache, and what follows them."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], spellings: Spellings) -> None:
        self.lm = lm
        self.ids_BP, self.mask_BP = left_pad(prompts, lm.pad_id, lm.device)
        self.length_B1 = self.mask_BP.sum(1, keepdim=True)
        self.width = self.ids_BP.shape[1]
        self.cache = make_cache(lm.model, CacheWindow(len(prompts), self.width + spellings.longest))

    def prompts(self) -> Tensor:
        """Log-probabilities of the token after each prompt: [B, V]."""
        rows_B = torch.arange(len(self.ids_BP), device=self.lm.device)
        with self.cache.window.prefilling(rows_B, self.width):
            return self._forward(self.ids_BP, self.mask_BP, (self.mask_BP.cumsum(1) - 1).clamp_(min=0))

    def step(self, path: TokenIds) -> Tensor:
        """Log-probabilities of the token after prompt and path, of which all but the last token were read before."""
        self.cache.window.cursor = self.width + len(path) - 1
        token_B1 = torch.full_like(self.length_B1, path[-1])
        mask_BS = torch.cat([self.mask_BP, self.mask_BP.new_ones(len(self.mask_BP), len(path))], dim=1)
        return self._forward(token_B1, mask_BS, self.length_B1 + len(path) - 1)

    def _forward(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor) -> Tensor:
        logits_BV = self.lm.last_logits(
            ids_BT, attention_mask=mask_BS, position_ids=position_BT, past_key_values=self.cache, use_cache=True
        )
        return logits_BV.float().log_softmax(-1)


# --- judging --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_judge(spec: ModelSpec) -> LanguageModel:
    """The judge's model, kept in memory for the next trait."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(spec)


def check_numbers(spec: ModelSpec) -> None:
    """Refuse, by its tokenizer alone, a model that can't write the numbers. Raises ModelError."""
    spell_numbers(read_tokenizer(spec), spec.name)


def encode(lm: LanguageModel, text: str) -> TokenIds:
    """A filled rubric as the judge sees it: a user's message where it has a chat template, else text with a cue."""
    assert lm.tokenizer is not None
    raw = not getattr(lm.tokenizer, "chat_template", None)
    question = text.rstrip() + CUE if raw else text
    example = Example("judged", "", "", 0, 0, 0, question)
    return encode_example(lm.tokenizer, example, raw=raw).token_ids


def rate(lm: LanguageModel, name: str, texts: Mapping[str, str], keep: Keep, *, batch_size: int = BATCH_SIZE) -> None:
    """Rate filled rubrics by key, longest first; halves the batch where memory runs out.

    One that the model has no room for is missing. Raises ModelError where the numbers' probabilities are NaN.
    """
    assert lm.tokenizer is not None
    spellings = spell_numbers(lm.tokenizer, name)
    prompts = {key: encode(lm, text) for key, text in texts.items()}
    room = None if lm.max_positions is None else lm.max_positions - spellings.longest
    long = [key for key, ids in prompts.items() if room is not None and len(ids) > room]
    keep({key: Rating(None, TOO_LONG, how=spellings.how) for key in long})
    waiting = sorted(prompts.keys() - set(long), key=lambda key: (-len(prompts[key]), key))
    while waiting:
        batch = waiting[:batch_size]
        try:
            weights_BN = number_weights(lm, [prompts[key] for key in batch], spellings)
        except (RuntimeError, MemoryError) as failure:
            batch_size = _half(batch_size, failure, name)
            continue
        weights = dict(zip(batch, _sound(weights_BN, lm, name), strict=True))
        keep({key: _rating(weights_N, spellings.how, len(prompts[key])) for key, weights_N in weights.items()})
        waiting = waiting[batch_size:]


def _half(batch_size: int, failure: Exception, name: str) -> int:
    if not is_out_of_memory(failure):
        raise failure
    if batch_size == 1:
        raise ModelError(
            f"--judge-model {name}: out of memory with one answer at a time; take a smaller model; what it has judged "
            "is kept"
        ) from failure
    empty_cache()
    return batch_size // 2


def _sound(weights_BN: Tensor, lm: LanguageModel, name: str) -> list[list[float]]:
    if not weights_BN.isfinite().all():
        dtype = str(lm.dtype).removeprefix("torch.")
        raise ModelError(f"--judge-model {name}: its logits are NaN in {dtype}; set another dtype in its config")
    rows: list[list[float]] = weights_BN.double().tolist()
    return rows


def _rating(weights_N: Sequence[float], how: str, n_tokens: int) -> Rating:
    """The expectation; what is told of it is the likeliest number, and how much all numbers weigh."""
    best = max(NUMBERS, key=lambda number: weights_N[number])
    raw = f"{best} ({weights_N[best]:.3f}); numbers {sum(weights_N):.3f}"
    score = expectation(dict(zip(NUMBERS, weights_N, strict=True)))
    return Rating(score, None if score is not None else NO_NUMBER, raw, how, (n_tokens, 0))
