"""Batched speculative decoding from texts to texts, for scripts.

A draft model proposes, and the target verifies several tokens in one pass. The result is exact: the target's own tokens
where greedy, its own distribution where sampled. See docs/speculation.md.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extraction.core.errors import ConfigError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.generate import encode_text, run_loop, warn_of_smaller_batch
from extraction.engine.requests import Completion, Request
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits, StepOutput
from extraction.engine.speculation import Speculate
from extraction.model.chat_template import encode_conversation
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIDES = ("left", "right")


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings of `HelixEngine`. Temperature 0 is greedy; top_k 0 and top_p 1 are off.

    `speculation_depth`: largest number of proposed tokens. `batch_size`: prompts that run at once; the others wait for
    a free slot. The same seed gives the same responses at any batch size.
    """

    max_tokens: int = 50
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    speculation_depth: int = 4
    batch_size: int = 16
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is out of range: use at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is out of range: use 0 or more")

    @property
    def sample(self) -> Sample:
        """Temperature, top-k and top-p. Raises ConfigError where one is out of range."""
        return Sample.of(self)


class HelixEngine:
    """A target model and a smaller draft model of the same vocabulary (None: n-gram lookup).

    Each prompt is a user's message, put through the tokenizer's chat template; where there is none, and with `raw`, it
    is an exact text.
    """

    def __init__(
        self,
        target: LanguageModel | PreTrainedModel,
        draft: LanguageModel | PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        raw: bool = False,
    ) -> None:
        self.target = _as_language_model(target, tokenizer)
        self.draft = None if draft is None else _as_language_model(draft, None)
        self.tokenizer = tokenizer or self.target.tokenizer
        if self.tokenizer is None:
            raise ConfigError("HelixEngine needs the target's tokenizer; give tokenizer=")
        self.raw = raw or not getattr(self.tokenizer, "chat_template", None)

    def batch_generate(self, prompts: Sequence[str], config: GenerationConfig | None = None) -> list[dict[str, Any]]:
        """Generate for every prompt; return a dict each, in their order, as `batch_speculative_generate` does.

        Raises PromptError for one that the models can't hold, or that the chat template refuses.
        """
        config = config or GenerationConfig()
        requests = [
            Request(f"prompt {i}", self._encode(prompt), config.max_tokens, config.seed)
            for i, prompt in enumerate(prompts)
        ]
        runs = _run(lambda n_slots: self._batch(requests, config, n_slots), requests, config.batch_size)
        return [_result(self._text(runs[r.id].completion.token_ids), runs[r.id]) for r in requests]

    def _encode(self, prompt: str) -> tuple[int, ...]:
        assert self.tokenizer is not None
        if self.raw:
            return tuple(encode_text(self.tokenizer, prompt))
        return encode_conversation(self.tokenizer, (("user", prompt),))[1]

    def _batch(self, requests: Sequence[Request], config: GenerationConfig, n_slots: int) -> ContinuousBatch:
        strategy = Speculate(self.draft, config.sample, config.speculation_depth)
        longest = max((len(r.token_ids) for r in requests), default=1) + config.max_tokens
        limits = BatchLimits(slots=n_slots, longest=longest, budget=config.max_tokens)
        return ContinuousBatch(self.target, limits, strategy=strategy, stop_strings=config.stop)

    def _text(self, token_ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def batch_speculative_generate(  # noqa: PLR0913 (a script's one call)
    draft_model: LanguageModel | PreTrainedModel | None,
    target_model: LanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int = 50,
    temperature: float = 0.7,
    speculation_depth: int = 4,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
) -> list[dict[str, Any]]:
    """Generate for every prompt with speculation; return a dict each, in their order.

    Keys: text, tokens (ids), num_tokens; time_seconds and time_to_first_token, in seconds from the call until the
    prompt's last and first token (None without tokens); tokens_per_second; stats: total_steps (target passes),
    acceptance_rates (accepted over proposed of each pass with a proposal, in order) and avg_acceptance_rate (all
    accepted over all proposed; None if nothing was).

    Args:
        draft_model: None proposes by n-gram lookup in the row's own tokens.
        prompts: messages of a user, put through the tokenizer's chat template; exact texts where it has none.
        batch_size: prompts that run at once; None: all.
        raw: take prompts as exact texts, though there is a chat template.

    Raises ModelError if the two models have different vocabularies, PromptError for a prompt that they can't hold.
    """
    config = GenerationConfig(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        speculation_depth=speculation_depth,
        batch_size=max(1, len(prompts)) if batch_size is None else batch_size,
        stop=tuple(stop),
    )
    return HelixEngine(target_model, draft_model, tokenizer=tokenizer, raw=raw).batch_generate(prompts, config)


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int = 0, *, side: str = "left") -> Tensor:
    """Return token ids of different lengths as one padded tensor [B, T]; decoders need their padding on the left."""
    lengths = [len(row) for row in sequences]
    padded_BT = torch.full((len(lengths), max(lengths, default=0)), pad_id, dtype=torch.long)
    live_BT = create_attention_mask(lengths, side=side).bool()
    padded_BT[live_BT] = torch.tensor([token for row in sequences for token in row], dtype=torch.long)
    return padded_BT


def create_attention_mask(lengths: Sequence[int], *, side: str = "left") -> Tensor:
    """Return 1 for tokens and 0 for padding: [B, T], T the longest.

    Made from lengths, not from ids: a tokenizer's pad id is often a token that occurs in texts too.
    """
    if side not in SIDES:
        raise ConfigError(f"padding side {side!r}: use one of {', '.join(SIDES)}")
    length_B1 = torch.tensor(lengths, dtype=torch.long).unsqueeze(1)
    width = max(lengths, default=0)
    column_T = torch.arange(width)
    return (column_T >= width - length_B1 if side == "left" else column_T < length_B1).long()


@dataclass(frozen=True)
class _Run:
    """A completion with the seconds from the start until its first token and until its end."""

    completion: Completion
    first_token: float | None
    seconds: float


def _run(make_batch: Callable[[int], ContinuousBatch], requests: Sequence[Request], batch_size: int) -> dict[str, _Run]:
    """Run all requests to their ends, on one clock that starts before the first prefill."""
    started = time.perf_counter()
    now = 0.0
    first: dict[str, float] = {}

    def note_first_tokens(output: StepOutput) -> None:
        nonlocal now
        now = time.perf_counter() - started
        for request_id in output.new_tokens:
            first.setdefault(request_id, now)

    runs: dict[str, _Run] = {}
    for completion in run_loop(
        make_batch, requests, batch_size, on_step=note_first_tokens, on_smaller_batch=warn_of_smaller_batch
    ):
        if completion.fault is not None:
            raise completion.fault
        runs[completion.id] = _Run(completion, first.get(completion.id), now)
    return runs


def _result(text: str, run: _Run) -> dict[str, Any]:
    completion, stats = run.completion, run.completion.speculation
    n_tokens = len(completion.token_ids)
    return {
        "text": text,
        "tokens": list(completion.token_ids),
        "num_tokens": n_tokens,
        "time_seconds": run.seconds,
        "tokens_per_second": n_tokens / run.seconds,
        "time_to_first_token": run.first_token,
        "stats": {
            "total_steps": 0 if stats is None else stats.target_steps,
            "acceptance_rates": [] if stats is None else list(stats.step_rates),
            "avg_acceptance_rate": None if stats is None else stats.acceptance_rate,
        },
    }


def _as_language_model(
    model: LanguageModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> LanguageModel:
    """Wrap a transformers model for the engine. Raises ModelError if the engine can't run it."""
    if not isinstance(model, LanguageModel):
        return wrap(model, tokenizer)
    return model if tokenizer is None or model.tokenizer is not None else replace(model, tokenizer=tokenizer)
