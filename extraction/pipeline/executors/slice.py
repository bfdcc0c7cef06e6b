"""The choice of run groups that one process makes: every N-th of the plan's, by `--slice I/N`."""

from __future__ import annotations

from extraction.core.records import Example, Trait
from extraction.pipeline.plan import GenerationMode, RunGroup, RunPlan


def groups_of_slice(plan: RunPlan, mode: GenerationMode) -> list[RunGroup]:
    """Return the run groups of this process, in the plan's order.

    In a serial mode a group is one shard, chosen by its index within its trait: stage 2, which goes trait by trait,
    then has the same shards in the same slice.
    """
    index, count = plan.slice
    groups = plan.run_groups(mode)
    keys = [group[0].index if mode.serial else i for i, group in enumerate(groups)]
    return [group for key, group in zip(keys, groups, strict=True) if key % count == index]


def shards_of_slice(plan: RunPlan, trait: Trait, mode: GenerationMode) -> dict[int, tuple[Example, ...]]:
    """Return the examples of each of a trait's shards that this process makes, by the shard's index."""
    shards = (shard for group in groups_of_slice(plan, mode) for shard in group)
    return {shard.index: shard.examples for shard in shards if shard.trait.name == trait.name}


def empty_slice_note(plan: RunPlan, mode: GenerationMode) -> str:
    """Return the note for a slice that has no group, with the settings that would give it one."""
    index, count = plan.slice
    unit, option = ("shard", "shard-size") if mode.serial else ("run group", "queue-size")
    return (
        f"--slice {index + 1}/{count}: nothing to do, since the run has {len(plan.run_groups(mode))} {unit}s: take "
        f"fewer slices or, for a run that has not begun, give all of them a lower --{option}"
    )
