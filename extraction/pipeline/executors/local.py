"""The executor of this process: one model, one run group after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from extraction.core.progress import ProgressReporter
from extraction.core.records import Trait
from extraction.pipeline.executors.base import TraitCallback
from extraction.pipeline.lazy_model import load_model
from extraction.pipeline.pace import TokenPace
from extraction.pipeline.plan import GenerationMode, RunGroup
from extraction.pipeline.run_groups import GroupRunner, pending_shards, shards_to_run
from extraction.pipeline.session import ModelSession


@dataclass(frozen=True)
class LocalExecutor:
    """Runs every group in this process, in order. The model is loaded, and each prompt checked, before the first."""

    session: ModelSession
    mode: GenerationMode
    progress: ProgressReporter

    def run(self, groups: Sequence[RunGroup], on_trait_end: TraitCallback | None = None) -> None:
        """Make all that is missing of the groups; see `base.Executor.run`."""
        pending = [group for group in groups if pending_shards(self.session.plan, group, self.mode)]
        runner = self._prepare(pending) if pending else None
        for stretch in _stretches(self.session.plan.traits, groups):
            if runner is not None:
                self._run_stretch(stretch, runner)
            if on_trait_end is not None:
                for trait in stretch.ending:
                    on_trait_end(trait)

    def _prepare(self, pending: Sequence[RunGroup]) -> GroupRunner:
        """Load the model, encode every prompt that will run, and check the model on the first ones."""
        session, plan = self.session, self.session.plan
        _ = plan.layers  # a layer out of range is an error before the weights are loaded
        load_model(session, self.progress)
        to_run = [shard for group in pending for shard in shards_to_run(plan, group, self.mode)]
        lengths = [len(prompt.token_ids) for shard in to_run for prompt in session.prompts(shard.examples)]
        self._self_check(pending[0])
        pace = TokenPace(len(lengths), sum(lengths), session.lm.device.type)
        return GroupRunner(session, self.mode, pace, self.progress)

    def _self_check(self, group: RunGroup) -> None:
        """Once a process: a few examples of the first pending shard, batched and alone, must agree."""
        from extraction.pipeline.self_check import self_check

        session, plan = self.session, self.session.plan
        if plan.self_check and not session.checked:
            shard = pending_shards(plan, group, self.mode)[0]
            prompts = session.prompts(shard.examples[: plan.self_check])
            deviation = self_check(session.lm, prompts, plan.layers)
            self.progress.note(f"self-check: {len(prompts)} examples alone and in a batch agree within {deviation:.0e}")
        session.checked = True

    def _run_stretch(self, stretch: _Stretch, runner: GroupRunner) -> None:
        """Run the groups of a stretch under one progress bar."""
        plan, shards = self.session.plan, [shard for group in stretch.groups for shard in group]
        pending = pending_shards(plan, shards, self.mode)
        if not pending:
            return
        for trait in stretch.beginning:
            plan.folder(trait).open(plan.config(trait))
        n_examples, n_pending = (sum(len(shard.examples) for shard in some) for some in (shards, pending))
        title = f"{stretch.title}: {self.mode.title}"
        self.progress.begin(title, n_examples, n_examples - n_pending, seconds_left=runner.pace.seconds_left)
        try:
            for group in stretch.groups:
                runner.run(group)
        finally:
            self.progress.end()


@dataclass(frozen=True)
class _Stretch:
    """Consecutive groups that hold shards of the same traits; the traits that begin in them, and that end in them."""

    title: str
    groups: Sequence[RunGroup]
    beginning: Sequence[Trait]
    ending: Sequence[Trait]


def _stretches(traits: Sequence[Trait], groups: Sequence[RunGroup]) -> Iterator[_Stretch]:
    parts = [(names, list(part)) for names, part in groupby(groups, _trait_names)]
    last = {name: i for i, (names, _) in enumerate(parts) for name in names}
    first = {name: i for i, (names, _) in reversed(list(enumerate(parts))) for name in names}
    for i, (names, part) in enumerate(parts):
        title = names[0] if len(names) == 1 else f"{len(names)} traits"
        beginning, ending = ([trait for trait in traits if index.get(trait.name) == i] for index in (first, last))
        yield _Stretch(title, part, beginning, ending)


def _trait_names(group: RunGroup) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shard.trait.name for shard in group))
