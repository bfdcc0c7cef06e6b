"""The probability that a model's answer to a prompt is the number n, for every n from 0 to 100.

P(n) is the probability that the answer starts with n. If every number is one token, that is the softmax over those
tokens. If a number takes several (digit by digit, as most tokenizers write it), the probabilities of its tokens are
multiplied, and "8" counts only if no further digit follows.

Shapes: B rows, P prompt columns, S columns, V vocabulary, N the 101 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.core.errors import ModelError
from extraction.engine.sequence import left_pad
from extraction.model.kv_cache import CacheWindow, make_cache
from extraction.model.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBERS = range(101)
TokenIds = tuple[int, ...]


# --- numbers as tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spellings:
    """Token ids that write the numbers 0 to 100: one token each, or paths in a tree of tokens."""

    numbers: Mapping[TokenIds, int]

    @cached_property
    def next_tokens(self) -> Mapping[TokenIds, tuple[int, ...]]:
        """The tokens that can follow each prefix of a number."""
        children: dict[TokenIds, list[int]] = {}
        for path in self.numbers:
            for n in range(len(path)):
                tokens = children.setdefault(path[:n], [])
                tokens.extend({path[n]} - set(tokens))
        return {prefix: tuple(tokens) for prefix, tokens in children.items()}

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest path."""
        return max(map(len, self.numbers))

    @property
    def description(self) -> str:
        """Description of the way a score is read with these tokens, the `how` of a rating."""
        return "number tokens" if self.max_tokens == 1 else "numbers of several tokens"


def spell_numbers(tokenizer: PreTrainedTokenizerBase, name: str) -> Spellings:
    """Return the ids of every number at the start of a text, behind a space and behind a line's end.

    Only single tokens if each number has one. Raises ModelError for a tokenizer that can't write all numbers.
    """
    spellings: dict[TokenIds, int] = {}
    for number in NUMBERS:
        for ids in _tokenizations(tokenizer, str(number)):
            if str(tokenizer.decode(list(ids))).strip() == str(number):
                spellings.setdefault(ids, number)
    absent = sorted(set(NUMBERS) - set(spellings.values()))
    if absent:
        raise ModelError(
            f"--judge-model {name}: its tokenizer can't write {len(absent)} of the numbers from 0 to 100 "
            f"(such as {absent[0]}), so it can't judge; take another model"
        )
    single: dict[TokenIds, int] = {path: number for path, number in spellings.items() if len(path) == 1}
    return Spellings(single if set(single.values()) == set(NUMBERS) else spellings)


def _tokenizations(tokenizer: PreTrainedTokenizerBase, number: str) -> Iterator[TokenIds]:
    def ids(text: str) -> TokenIds:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    yield ids(number)
    yield ids(f" {number}")
    line_end, with_number = ids("\n"), ids(f"\n{number}")  # differs for tokenizers that mark the start of a text
    if with_number[: len(line_end)] == line_end:
        yield with_number[len(line_end) :]


# --- probabilities --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def number_probabilities(lm: LanguageModel, prompts: Sequence[Sequence[int]], spellings: Spellings) -> Tensor:
    """Return the probability of every number as each prompt's answer: [B, N], float32.

    One pass over the left-padded prompts, then one token at a time down the tree of spellings; each branch writes over
    the cache columns of the one before.
    """
    batch = _PromptBatch(lm, prompts, spellings)
    p_BN = torch.zeros(len(prompts), len(NUMBERS), device=lm.device)

    def walk(prefix: TokenIds, log_p_B: Tensor, next_BV: Tensor) -> None:
        """Descend from a prefix that has probability exp(log_p)."""
        tokens = spellings.next_tokens[prefix]
        if prefix in spellings.numbers:  # a number ends here if none of the tokens follows
            continues_B = next_BV[:, list(tokens)].exp().sum(1)
            p_BN[:, spellings.numbers[prefix]] += log_p_B.exp() * (1 - continues_B).clamp_(min=0)
        for token in tokens:
            path, log_path_B = (*prefix, token), log_p_B + next_BV[:, token]
            if path in spellings.next_tokens:
                walk(path, log_path_B, batch.step(path))
            else:
                p_BN[:, spellings.numbers[path]] += log_path_B.exp()

    walk((), torch.zeros(len(prompts), device=lm.device), batch.prefill())
    return p_BN


class _PromptBatch:
    """A batch of prompts in a KV cache, and the next-token probabilities behind them."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], spellings: Spellings) -> None:
        self.lm = lm
        self.ids_BP, self.mask_BP = left_pad(prompts, lm.pad_id, lm.device)
        self.length_B1 = self.mask_BP.sum(1, keepdim=True)
        self.width = self.ids_BP.shape[1]
        self.cache = make_cache(lm.model, CacheWindow(len(prompts), self.width + spellings.max_tokens))
        self.states: dict[int, list[Tensor]] = {}  # by depth of the tree

    def prefill(self) -> Tensor:
        """Return the log-probabilities of the token after each prompt: [B, V]."""
        rows_B = torch.arange(len(self.ids_BP), device=self.lm.device)
        with self.cache.window.prefilling(rows_B, self.width):
            return self._forward(self.ids_BP, self.mask_BP, (self.mask_BP.cumsum(1) - 1).clamp_(min=0), 0)

    def step(self, path: TokenIds) -> Tensor:
        """Return those of the token after prompt and path: [B, V]. The cache has all of the path but its last token."""
        self.cache.window.cursor = self.width + len(path) - 1
        token_B1 = torch.full_like(self.length_B1, path[-1])
        mask_BS = torch.cat([self.mask_BP, self.mask_BP.new_ones(len(self.mask_BP), len(path))], dim=1)
        return self._forward(token_B1, mask_BS, self.length_B1 + len(path) - 1, len(path))

    def _forward(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, depth: int) -> Tensor:
        """Read tokens at this depth of the tree. Keys and values are overwritten; other states are put back first."""
        if depth:
            self.cache.restore_states(self.states[depth - 1])
        logits_BV = self.lm.cached_logits(ids_BT, mask_BS, position_BT, self.cache)[:, -1]
        self.states[depth] = self.cache.save_states()
        return logits_BV.float().log_softmax(-1)
