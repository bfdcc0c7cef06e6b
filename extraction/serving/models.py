"""The models that a server has, and the batch that each kind of generation runs in.

Kinds: PLAIN (one model), AMPLIFY (a pair of models, logit difference) and SPECULATE (one model, with or without a
draft model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from extraction.serving.batch_queue import BatchQueue, QueueName
from extraction.serving.errors import HttpError
from extraction.serving.settings import Settings

if TYPE_CHECKING:
    from extraction.config.experiments import ModelSpec
    from extraction.engine.batch import ContinuousBatch
    from extraction.model.language_model import LanguageModel

PLAIN, AMPLIFY, SPECULATE = "plain", "amplify", "speculate"
NO_MODEL = {
    PLAIN: "no model for plain generation is served; start the server with --model",
    AMPLIFY: "no pair of models is served; start the server with --after and --before",
    SPECULATE: "no model for speculative generation is served; start the server with --model (and --draft)",
}


@dataclass(frozen=True)
class Choice:
    """The models to load, by role; None: no such model."""

    after: ModelSpec | None = None
    before: ModelSpec | None = None
    model: ModelSpec | None = None
    draft: ModelSpec | None = None


@dataclass(frozen=True)
class ServedModels:
    """Loaded models and their names. Without a draft model, speculation proposes by n-gram lookup.

    Args:
        target: The model of PLAIN and SPECULATE.
        draft: Proposes tokens to `target`.
        after: The later model of the pair of AMPLIFY.
        before: The earlier one.
        names: Names by role: model, draft, after, before.
        raw: Kinds whose prompts use no chat template, unless a request asks for it.
    """

    target: LanguageModel | None = None
    draft: LanguageModel | None = None
    after: LanguageModel | None = None
    before: LanguageModel | None = None
    names: Mapping[str, str | None] = field(default_factory=dict)
    raw: frozenset[str] = frozenset()

    @property
    def by_kind(self) -> dict[str, LanguageModel]:
        """The model that responds, for each kind that is served."""
        models = {PLAIN: self.target, AMPLIFY: self.after if self.before else None, SPECULATE: self.target}
        return {kind: lm for kind, lm in models.items() if lm is not None}

    def for_kind(self, kind: str) -> LanguageModel:
        """Return the model that responds. Raises HttpError 404 if the kind is not served."""
        if kind not in self.by_kind:
            raise HttpError(404, NO_MODEL[kind], code="no_model")
        return self.by_kind[kind]

    def pair_compatibility(self) -> dict[str, Any] | None:
        """Compare the vocabularies of the pair; None if there is no pair."""
        from extraction.model.pairs import compatibility

        if self.after is None or self.before is None:
            return None
        return compatibility(self.after, self.before, (str(self.names["after"]), str(self.names["before"])))

    def max_total_tokens(self, kind: str, settings: Settings) -> int:
        """Return the limit on prompt and response together: that of the settings or of the models' context."""
        partner = {AMPLIFY: self.before, SPECULATE: self.draft}.get(kind)
        limits = [lm.max_positions for lm in (self.for_kind(kind), partner) if lm is not None and lm.max_positions]
        return min([settings.max_total_tokens, *limits])

    def queue_factory(self, settings: Settings) -> Callable[[QueueName], BatchQueue]:
        """Return the function that makes the queue of a name.

        A queue of a depth that one request asked for frees its batch when it is empty.
        """

        def open_queue(name: QueueName) -> BatchQueue:
            usual = name.depth in (0, settings.depth)
            return BatchQueue(
                lambda slots: self._make_batch(name, slots, settings), settings.batch_size, keep_batch=usual
            )

        return open_queue

    def _make_batch(self, name: QueueName, slots: int, settings: Settings) -> ContinuousBatch:
        from extraction.engine.batch import ContinuousBatch
        from extraction.engine.sequence import BatchLimits

        longest = self.max_total_tokens(name.kind, settings)
        limits = BatchLimits(slots=slots, longest=longest, budget=min(settings.max_new_tokens, longest))
        return ContinuousBatch(self.for_kind(name.kind), limits, strategy=self._strategy(name))

    def _strategy(self, name: QueueName) -> Any:
        from extraction.engine.logit_diff import Amplify
        from extraction.engine.sampler import Sample
        from extraction.engine.speculation import Speculate

        strategies: dict[str, Callable[[], Any]] = {
            PLAIN: Sample,
            AMPLIFY: lambda: Amplify(before=self.before),  # type: ignore[arg-type]
            SPECULATE: lambda: Speculate(draft=self.draft, depth=name.depth),
        }
        return strategies[name.kind]()


def load_models(choice: Choice, log: Callable[[str], None]) -> ServedModels:
    """Load each chosen model once. Raises ModelError, also for two models with different vocabularies."""
    from transformers.utils import logging

    from extraction.model.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded: dict[ModelSpec, LanguageModel] = {}
    after = before = None
    if choice.after is not None and choice.before is not None:
        from extraction.model.pairs import load_pair

        log(f"loading {choice.after.name} and {choice.before.name}")
        pair = load_pair(choice.after, choice.before)
        after, before = pair.after, pair.before
        for note in pair.notes:
            log(f"{choice.after.name} and {choice.before.name}: {note}")
        loaded |= {choice.before: before, choice.after: after}
    for spec in (choice.model, choice.draft):
        if spec is not None and spec not in loaded:
            log(f"loading {spec.name}")
            loaded[spec] = load(spec)
    target, draft = (loaded[spec] if spec is not None else None for spec in (choice.model, choice.draft))
    if target is not None and draft is not None:
        from extraction.model.pairs import refuse_different, vocabulary_notes

        refuse_different(target, draft)
        for note in vocabulary_notes(target, draft):
            log(f"model and draft: {note}")
    specs = {"model": choice.model, "draft": choice.draft, "after": choice.after, "before": choice.before}
    names = {role: spec.name if spec is not None else None for role, spec in specs.items()}
    responders = {PLAIN: choice.model, SPECULATE: choice.model, AMPLIFY: choice.after}
    raw = frozenset(kind for kind, spec in responders.items() if spec is not None and spec.raw)
    return ServedModels(target, draft, after, before, names, raw)
