"""What reading tokens says before it starts, and when it ends: lines of text, at most 80 columns where names allow."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.schema import one_line
from extraction.summary import WIDTH, duration, item, peak_memory, ranges, shown, size

if TYPE_CHECKING:
    from extraction.monitoring.facts import Reading, SetFacts, TraitFacts
    from extraction.monitoring.finishing import Finished
    from extraction.monitoring.plans import Plan
    from extraction.monitoring.taking import Taking

MOST_ROWS = 12  # of a table; the page has all
TAIL = 34  # columns of figures


def of_plan(plan: Plan) -> Iterator[str]:
    """What would be read, and where it would go."""
    settings = plan.settings.generation
    yield f"Plan for {plan.settings.name}, tier {plan.tier}"
    yield from item("model", plan.spec.name)
    yield from item("traits", ", ".join(f"{v.trait} ({v.method})" for v in plan.vectors) or "none")
    yield from item("layers", ranges(plan.layers))
    yield from item("responses", f"at most {settings.max_new_tokens} tokens, temperature {settings.temperature:g}")
    for each in plan.sets:
        n_prompts = len(each.found.prompts)
        n_done = len(each.folder.prompt_ids())
        yield from item("set", f"{each.stem}: {n_prompts} prompts, {n_done} of them done, in {shown(each.folder.path)}")
    for failure in plan.failures:
        yield from item("failed", one_line(failure))


def of_sets(taking: Taking, finished: Sequence[Finished], seconds: float) -> Iterator[str]:
    """Where every set lies and how its traits move; what it took."""
    for each in finished:
        yield f"{each.set.stem} on {taking.plan.spec.name}, tier {taking.plan.tier}"
        yield from item("captures", f"{shown(each.folder.path)} ({each.n_prompts} prompts)")
        if each.folder.report_path().exists():
            yield from item("page", shown(each.folder.report_path()))
        for note in each.notes:
            yield from item("note", one_line(note))
        for trait in each.facts.traits if each.facts else ():
            yield ""
            yield from _table(each.facts, trait)
        yield ""
    yield _took(taking, seconds)


def _table(facts: SetFacts, trait: TraitFacts) -> Iterator[str]:
    """A row a prompt, at the layer that is shown first."""
    place = facts.layers.index(trait.layer)
    sides = ""
    if trait.levels_L2 is not None:
        low, high = trait.levels_L2[place]
        sides = f"; the run's sides: {low:.3g} and {high:.3g}"
    yield from textwrap.wrap(f"{trait.name}, {trait.method} at layer {trait.layer}, residual out{sides}", WIDTH)
    yield f"{'prompt':<{WIDTH - TAIL}}{'mean':>8}{'peak':>8}{'commits':>10}{'persists':>8}"
    for reading in facts.readings[:MOST_ROWS]:
        yield _row(reading, reading.dynamics[trait.name][place])
    if len(facts.readings) > MOST_ROWS:
        yield f"and {len(facts.readings) - MOST_ROWS} more, on the page"


def _row(reading: Reading, moved: Mapping[str, Any]) -> str:
    """Figures of one response; the commitment is a token of it, and the side."""
    words = textwrap.shorten(one_line(reading.prompt), WIDTH - TAIL - 2, placeholder="...")
    side = {1: "+", -1: "-", None: ""}[moved["committed_to"]]
    commitment = "never" if moved["commitment"] is None else f"{moved['commitment']} ({side})"
    figures = (_short(moved[key]) for key in ("mean", "peak"))
    return f"{words:<{WIDTH - TAIL}}{next(figures):>8}{next(figures):>8}{commitment:>10}{_short(moved['persistence']):>8}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _took(taking: Taking, seconds: float) -> str:
    if not taking.n_made:
        return f"Nothing left to do ({seconds:.1f} s)."
    rate = taking.n_tokens / taking.seconds if taking.seconds else 0.0
    sizes = "/".join(str(n) for n in sorted(set(taking.batch_sizes)))
    return (
        f"Took {duration(seconds)}: {taking.n_made} prompts, {taking.n_tokens:,} tokens at {rate:,.0f}/s, batch size "
        f"{sizes}, peak memory {size(peak_memory())}."
    )
