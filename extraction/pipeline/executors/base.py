"""The interface of an executor: where and in which order the run groups of a plan run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from extraction.core.records import Trait
from extraction.pipeline.plan import RunGroup

TraitCallback = Callable[[Trait], None]


class Executor(Protocol):
    """Run groups until every shard of theirs is committed.

    An executor may assume:

    - The groups are those of one plan, in its order, and no shard is in two of them. Their bytes depend on the plan
      and the group alone, so groups may run in any order, in any process, and again.
    - The caller holds the lock of every trait's run. A run is opened (its run.json written) when its first shard is
      due, not before: a start that fails leaves nothing that pins the next one.
    - Receipts tell what is done. A group whose shards are all committed needs no model.

    It raises a TraitlineError where a group cannot be made; finished shards are kept.
    """

    def run(self, groups: Sequence[RunGroup], on_trait_end: TraitCallback | None = None) -> None:
        """Make all that is missing of the groups, and return when it is committed.

        `on_trait_end` is called with each trait once none of its shards in `groups` is missing, as early as possible.
        """
