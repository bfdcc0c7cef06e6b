"""The model of a run, its encoded prompts, and the context and results that stages hand on.

A `ModelSession` is a process's model and counters. A `TraitContext` is one trait of a run: what every stage needs. A
`TraitResult` is what stages made of it: kept responses, vectors, card, steering sweep.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Prompt, Trait
from extraction.pipeline.lazy_model import LazyModel
from extraction.pipeline.plan import GenerationMode, RunPlan
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from extraction.activations.pooled import Capture
    from extraction.config.experiments import ModelSpec
    from extraction.engine.requests import Completion
    from extraction.judging.filtering import KeptResponses
    from extraction.model.language_model import LanguageModel


class PromptEncoder:
    """Encode examples for a plan's model, each distinct prompt once.

    Examples that repeat a prompt share its text and token ids, so memory grows with a trait's prompts and not with the
    number of examples.
    """

    def __init__(self, plan: RunPlan, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None) -> None:
        self.plan, self.tokenizer, self.max_tokens = plan, tokenizer, max_tokens
        self._encoded: dict[tuple[str | None, str], Prompt] = {}

    def encode(self, examples: Sequence[Example]) -> list[Prompt]:
        """Return the examples' prompts, in order. Raises PromptError for one that the model can't take."""
        return [replace(self._encode(example), example=example) for example in examples]

    def _encode(self, example: Example) -> Prompt:
        from extraction.model.chat_template import encode_example

        key = (example.system, example.question)
        if key not in self._encoded:
            settings = self.plan.experiment
            self._encoded[key] = encode_example(
                self.tokenizer,
                example,
                instruction_as=settings.instruction_as,
                literal=settings.literal,
                thinking=settings.thinking,
                raw=self.plan.spec.raw,
                max_tokens=self.max_tokens,
                max_new_tokens=settings.generation.max_new_tokens,
            )
        return self._encoded[key]

    @cached_property
    def instruction_role(self) -> str:
        """Where instructions go: `system`, `user` (in front of the question) or `raw` (without a chat template)."""
        from extraction.model.chat_template import instruction_policy

        asked = self.plan.experiment.instruction_as
        if self.plan.spec.raw:
            return "raw"
        return instruction_policy(self.tokenizer) if asked == "auto" else asked

    def encodes_alike(self, plan: RunPlan) -> bool:
        """True if the prompts of another plan are encoded as this one's."""
        return _encoding_settings(plan) == _encoding_settings(self.plan)


def _encoding_settings(plan: RunPlan) -> tuple[Any, ...]:
    settings = plan.experiment
    how = settings.instruction_as, settings.literal, settings.thinking
    return plan.spec, *how, settings.generation.max_new_tokens


def control_token_notes(lm: LanguageModel, traits: Iterable[Trait]) -> Iterator[str]:
    """Yield a note if prompts without a chat template hold control tokens."""
    from extraction.model.chat_template import control_tokens_in

    assert lm.tokenizer is not None
    found = control_tokens_in(lm.tokenizer, (text for trait in traits for text in _texts_of(trait)))
    if found:
        yield f"prompts hold control tokens ({', '.join(found)}), read as such; --literal reads them as plain text"


def _texts_of(trait: Trait) -> Iterator[str]:
    yield from trait.questions
    yield from (text for pair in trait.instructions for text in (pair.positive, pair.negative))
    for prompt in (*trait.positive_prompts, *trait.negative_prompts):
        yield from (prompt.prompt, prompt.system or "")


def thinking_notes(lm: LanguageModel, thinking: str) -> Iterator[str]:
    """Yield a note if the chat template makes every response begin with a chain of thought."""
    from extraction.model.chat_template import opens_thought

    if lm.tokenizer is not None and opens_thought(lm.tokenizer):
        how = {
            "close": "it is ended before it begins; --thinking keep lets the model think",
            "keep": "it is judged, and part of the activations; --thinking close ends it before it begins",
        }[thinking]
        yield f"this model's responses begin with a chain of thought: {how}"


@dataclass
class ModelSession(LazyModel):
    """A plan's model, loaded when it is first needed, and counters of the work done with it."""

    plan: RunPlan
    n_made: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    checked: bool = False
    batch_sizes: list[int] = field(default_factory=list)
    fits: int | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model to load."""
        return self.plan.spec

    def notes(self) -> Iterator[str]:
        """Yield what to say once the model is loaded, and of prompts that it reads in a surprising way."""
        yield from super().notes()
        settings = self.plan.experiment
        if not self.plan.spec.raw:
            yield from thinking_notes(self.lm, settings.thinking)
        elif not settings.literal:
            yield from control_token_notes(self.lm, self.plan.traits)

    @cached_property
    def capture(self) -> Capture:
        """The layers, sites and poolings to read of every example."""
        from extraction.activations.pooled import Capture

        settings = self.plan.experiment.capture
        return Capture(self.plan.layers, settings.sites, settings.poolings)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder of this session's prompts; it loads the model."""
        assert self.lm.tokenizer is not None
        return PromptEncoder(self.plan, self.lm.tokenizer, max_tokens=self.lm.max_positions)

    def for_plan(self, plan: RunPlan) -> ModelSession:
        """Return a session for another plan that goes on with these counters, and with the model if it is the same."""
        session = replace(self, plan=plan)
        if self.is_loaded and plan.spec == self.plan.spec:
            session.lm = self.lm
            if self.encoder.encodes_alike(plan):
                session.encoder = self.encoder
        return session

    def take_counters(self, last: ModelSession) -> None:
        """Take over the counters and the model of the last of the sessions that went on from this one."""
        self.n_made, self.n_tokens, self.seconds = last.n_made, last.n_tokens, last.seconds
        self.checked, self.batch_sizes, self.fits = last.checked, last.batch_sizes, last.fits
        if last.is_loaded and not self.is_loaded:
            self.lm = last.lm

    def note_work(self, done: Collection[Completion], batch_size: int, seconds: float) -> None:
        """Count a finished shard."""
        self.n_made += len(done)
        self.n_tokens += sum(len(completion.token_ids) for completion in done)
        self.seconds += seconds
        self.batch_sizes.append(batch_size)

    def prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """Return the encoded prompts of examples."""
        return self.encoder.encode(examples)

    def batch_size(self, mode: GenerationMode, prompt_lengths: Sequence[int]) -> int:
        """Return the batch size for prompts of these lengths: 1 in a serial mode."""
        return 1 if mode.serial else self.slots(self.plan.experiment, prompt_lengths)


@dataclass(frozen=True)
class TraitContext:
    """One trait of a run under way: the session with its plan and model, the run folder, and where progress goes."""

    session: ModelSession
    trait: Trait
    progress: ProgressReporter

    @property
    def plan(self) -> RunPlan:
        """The session's plan."""
        return self.session.plan

    @cached_property
    def run(self) -> TraitRun:
        """The trait's run folder."""
        return self.plan.folder(self.trait)


def trait_contexts(session: ModelSession, progress: ProgressReporter) -> list[TraitContext]:
    """Return a context for each trait of the session's plan."""
    return [TraitContext(session, trait, progress) for trait in session.plan.traits]


@contextmanager
def locked_runs(contexts: Sequence[TraitContext]) -> Iterator[None]:
    """Hold the locks of the traits' runs; a slice of a run shares them with the other slices.

    Raises StoreError where another process holds one, where a run was begun with other settings, or where its folder
    can't be written to.
    """
    with ExitStack() as locks:
        for context in contexts:
            plan, run = context.plan, context.run
            locks.enter_context(run.lock(shared=not plan.is_whole))
            begun = run.stored_config() is not None
            if begun or any(run.shard_done("responses", i) for i in range(len(plan.shards(context.trait)))):
                run.open(plan.config(context.trait))
        yield


@dataclass(frozen=True)
class TraitResult:
    """Results of the stages for one trait, as they are stored; None where there is none.

    `sources` is the checksum of the activations and the kept responses. `methods` have vectors, `card` and `steering`
    are made from those sources. `n_new` counts the files written.
    """

    context: TraitContext
    kept: KeptResponses | None = None
    sources: str | None = None
    methods: tuple[str, ...] = ()
    card: Mapping[str, Any] | None = None
    steering: Mapping[str, Any] | None = None
    n_new: int = 0


@dataclass(frozen=True)
class RunResult:
    """The results of a command's traits, and the session with its counters."""

    session: ModelSession
    traits: tuple[TraitResult, ...]

    @property
    def n_new(self) -> int:
        """Number of files written."""
        return sum(result.n_new for result in self.traits)
