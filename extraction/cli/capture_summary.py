"""Lines that `read` and `internals` print before and after their work, 80 columns wide where names allow."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.cli.summaries import WIDTH, duration, item, ranges, shown, size
from extraction.core.text import one_line

if TYPE_CHECKING:
    from extraction.monitoring.plan import MonitoringPlan
    from extraction.monitoring.postprocess import PostprocessResult
    from extraction.monitoring.run import MonitoringSession

MOST_ROWS = 12  # of a table; the page has all
ROOM = WIDTH - 42  # for a prompt, beside four figures


def of_plan(plan: MonitoringPlan) -> Iterator[str]:
    """Yield what would be read, and the folders that would be written."""
    settings = plan.settings.generation
    yield f"Plan for {plan.settings.name}, tier {plan.tier}"
    yield from item("model", plan.spec.name)
    yield from item("traits", ", ".join(f"{v.trait} ({v.method})" for v in plan.vectors) or "none")
    yield from item("layers", ranges(plan.layers))
    yield from item("responses", f"at most {settings.max_new_tokens} tokens, temperature {settings.temperature:g}")
    for each in plan.sets:
        count, n_done = _counted(len(each.prompt_set.prompts)), len(each.folder.prompt_ids())
        yield from item("set", f"{each.stem}: {count}, {n_done} of them done, in {shown(each.folder.path)}")
    for failure in plan.failures:
        yield from item("failed", one_line(failure))


def of_sets(taking: MonitoringSession, finished: Sequence[PostprocessResult], seconds: float) -> Iterator[str]:
    """Yield the folder of every set, a table of each trait, and the time and memory."""
    for each in finished:
        folder = each.set.folder
        yield f"{each.set.stem} on {taking.plan.spec.name}, tier {taking.plan.tier}"
        yield from item("captures", f"{shown(folder.path)} ({_counted(len(each.set.prompt_set.prompts))})")
        if folder.report_path().exists():
            yield from item("page", shown(folder.report_path()))
        for note in each.notes:
            yield from item("note", one_line(note))
        for trait in each.dynamics["traits"]:
            yield ""
            yield from _table(each.dynamics, trait)
        yield ""
    yield _took(taking, seconds)


def _table(moved: Mapping[str, Any], trait: Mapping[str, Any]) -> Iterator[str]:
    """Yield a trait's table: a row for each prompt, at the layer that the page shows first."""
    place, prompts = moved["layers"].index(trait["layer"]), list(moved["prompts"].values())
    sides = "; sides {:.3g} and {:.3g}".format(*trait["levels"][place]) if trait["levels"] else ""
    words = f"{trait['trait']}, {trait['method']} at layer {trait['layer']}, residual out{sides}"
    yield from textwrap.wrap(words, WIDTH)
    yield f"  {'prompt':<{ROOM}}" + "".join(f"{head:>10}" for head in ("mean", "peak", "commits", "persists"))
    for prompt in prompts[:MOST_ROWS]:
        yield _row(prompt["prompt"], prompt["traits"][trait["trait"]][place])
    if len(prompts) > MOST_ROWS:
        yield f"  and {len(prompts) - MOST_ROWS} more, on the page"


def _row(prompt: str, figures: Mapping[str, Any]) -> str:
    """Return the figures of one response. Commitment: the number of a token, and the side."""
    words = textwrap.shorten(one_line(prompt), ROOM - 1, placeholder="...")
    side = {1: "+", -1: "-", None: ""}[figures["committed_to"]]
    commitment = "never" if figures["commitment"] is None else f"{figures['commitment']} ({side})"
    cells = (_short(figures["mean"]), _short(figures["peak"]), commitment, _short(figures["persistence"]))
    return f"  {words:<{ROOM}}" + "".join(f"{cell:>10}" for cell in cells)


def _counted(n_prompts: int) -> str:
    return f"{n_prompts} prompt{'s' * (n_prompts != 1)}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _took(taking: MonitoringSession, seconds: float) -> str:
    from extraction.model.devices import peak_memory

    if not taking.n_made:
        return f"Nothing left to do ({seconds:.1f} s)."
    rate = taking.n_tokens / taking.seconds if taking.seconds else 0.0
    sizes = "/".join(str(n) for n in sorted(set(taking.batch_sizes)))
    return (
        f"Took {duration(seconds)}: {_counted(taking.n_made)}, {taking.n_tokens:,} tokens at {rate:,.0f}/s, batch size "
        f"{sizes}, peak memory {size(peak_memory())}."
    )
