"""Which models a server has, and how each kind of request runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from extraction.serving.batch_queue import BatchQueue
from extraction.serving.errors import HttpError
from extraction.serving.events import QueueName
from extraction.serving.settings import Settings

if TYPE_CHECKING:
    from extraction.config.experiments import ModelSpec
    from extraction.engine.batch import ContinuousBatch
    from extraction.model.loading import LanguageModel

PLAIN, AMPLIFY, SPECULATE = "plain", "amplify", "speculate"
REMEDIES = {
    PLAIN: "no model for plain generation is served; start the server with --model",
    AMPLIFY: "no pair of models is served; start the server with --after and --before",
    SPECULATE: "no model to speculate for is served; start the server with --model (and --draft)",
}


@dataclass(frozen=True)
class Choice:
    """Which models to load; None: none of that sort."""

    after: ModelSpec | None = None
    before: ModelSpec | None = None
    model: ModelSpec | None = None
    draft: ModelSpec | None = None


@dataclass(frozen=True)
class ServedModels:
    """Loaded models and their names. Without a draft, speculation proposes what a row's own tokens suggest.

    `raw`: the kinds whose prompts are not written with a chat template, unless a request says so.
    """

    target: LanguageModel | None = None
    draft: LanguageModel | None = None
    after: LanguageModel | None = None
    before: LanguageModel | None = None
    names: Mapping[str, str | None] = field(default_factory=dict)
    raw: frozenset[str] = frozenset()

    @property
    def models(self) -> dict[str, LanguageModel]:
        """The model whose tokens come out, by kind."""
        found = {PLAIN: self.target, AMPLIFY: self.after if self.before else None, SPECULATE: self.target}
        return {kind: lm for kind, lm in found.items() if lm is not None}

    def of(self, kind: str) -> LanguageModel:
        """The model of a kind. Raises Refused where there is none."""
        if kind not in self.models:
            raise HttpError(404, REMEDIES[kind], code="no_model")
        return self.models[kind]

    def compatibility(self) -> dict[str, Any] | None:
        """How the pair's vocabularies compare; None where there is no pair."""
        from extraction.model.pairs import compatibility

        if self.after is None or self.before is None:
            return None
        return compatibility(self.after, self.before, (str(self.names["after"]), str(self.names["before"])))

    def longest(self, kind: str, settings: Settings) -> int:
        """Tokens of prompt and answer together, at most."""
        partner = {AMPLIFY: self.before, SPECULATE: self.draft}.get(kind)
        known = [lm.max_positions for lm in (self.of(kind), partner) if lm is not None and lm.max_positions]
        return min([settings.max_total_tokens, *known])

    def opener(self, settings: Settings) -> Callable[[QueueName], BatchQueue]:
        """What makes the batch of a lane."""

        def opening(lane: QueueName) -> BatchQueue:
            usual = lane[1] in (0, settings.depth)
            return BatchQueue(lambda slots: self._running(lane, slots, settings), settings.batch_size, keeps=usual)

        return opening

    def _running(self, lane: QueueName, slots: int, settings: Settings) -> ContinuousBatch:
        from extraction.engine.batch import ContinuousBatch
        from extraction.engine.sequence import BatchLimits

        longest = self.longest(lane[0], settings)
        limits = BatchLimits(slots=slots, longest=longest, budget=min(settings.max_new_tokens, longest))
        return ContinuousBatch(self.of(lane[0]), limits, strategy=self._strategy(lane))

    def _strategy(self, lane: QueueName) -> Any:
        from extraction.engine.logit_diff import Amplify
        from extraction.engine.sampler import Sample
        from extraction.engine.speculation import Speculate

        kind, depth = lane
        strategies: dict[str, Callable[[], Any]] = {
            PLAIN: Sample,
            AMPLIFY: lambda: Amplify(before=self.before),  # type: ignore[arg-type]
            SPECULATE: lambda: Speculate(draft=self.draft, depth=depth),
        }
        return strategies[kind]()


def load_served(choice: Choice, say: Callable[[str], None]) -> ServedModels:
    """Load what was chosen, each model once. Raises ModelError, also where two models don't go together."""
    from transformers.utils import logging

    from extraction.model.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded: dict[ModelSpec, LanguageModel] = {}
    after = before = None
    if choice.after is not None and choice.before is not None:
        from extraction.model.pairs import load_pair

        say(f"loading {choice.after.name} and {choice.before.name}")
        pair = load_pair(choice.after, choice.before)
        after, before = pair.after, pair.before
        loaded |= {choice.before: before, choice.after: after}
    for spec in (choice.model, choice.draft):
        if spec is not None and spec not in loaded:
            say(f"loading {spec.name}")
            loaded[spec] = load(spec)
    target, draft = (loaded[spec] if spec is not None else None for spec in (choice.model, choice.draft))
    if target is not None and draft is not None:
        from extraction.model.pairs import refuse_different

        refuse_different(target, draft)
    roles = {PLAIN: choice.model, SPECULATE: choice.model, AMPLIFY: choice.after}
    raw = frozenset(kind for kind, spec in roles.items() if spec is not None and spec.raw)
    return ServedModels(target, draft, after, before, names_of(choice), raw)


def names_of(choice: Choice) -> dict[str, str | None]:
    """What each is called."""
    specs = {"model": choice.model, "draft": choice.draft, "after": choice.after, "before": choice.before}
    return {role: spec.name if spec is not None else None for role, spec in specs.items()}
