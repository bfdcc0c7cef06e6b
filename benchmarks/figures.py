"""Draw results as PNG pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")

OURS, THEIRS, LIMIT = "#1f6f8b", "#b0b7bd", "#b3402a"
COLOURS = {
    "traitline": OURS,
    "serial": "#8a8f98",
    "batched": "#d08c3f",
    "continuous": "#6b8f4e",
    "static": "#b98ac0",
    "vllm": "#a2555a",
    "nnsight": "#7d6bb0",
    "transformer_lens": "#4f5d75",
}
SHORT = {
    "traitline": "Traitline",
    "serial": "transformers,\none at a time",
    "batched": "transformers,\npadded batches",
    "continuous": "transformers,\ncontinuous batching",
    "static": "transformers,\ncompiled",
    "vllm": "vLLM (CPU build)\n+ second pass",
    "nnsight": "nnsight",
    "transformer_lens": "TransformerLens",
}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw a result into a PNG."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    DRAWINGS[result["kind"]](figure, result)
    figure.savefig(path, dpi=130)
    return path


def _peers(figure: Figure, result: dict[str, Any]) -> None:
    bars, curves = figure.subplots(1, 2)
    figure.suptitle(f"{result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, responses and activations")
    figure.set_figheight(max(3.6, 0.62 * len(result["peers"]) + 0.9))
    _peer_bars(bars, result["peers"])
    for name, peer in result["peers"].items():
        sizes = [int(size) for size in peer["by_batch_size"]]
        curves.plot(sizes, list(peer["by_batch_size"].values()), "o-", color=COLOURS[name], label=name)
    curves.set_xscale("log", base=2)
    ticks = sorted({int(size) for peer in result["peers"].values() for size in peer["by_batch_size"]})
    curves.set_xticks(ticks, [str(size) for size in ticks])
    curves.set_ylim(bottom=0)
    curves.set_xlabel("batch size")
    curves.set_ylabel("response tokens per second")
    curves.legend(frameon=False)
    curves.spines[["top", "right"]].set_visible(False)


def _peer_bars(axes: Axes, peers: dict[str, Any]) -> None:
    names = list(peers)[::-1]
    rates = [peers[name]["tokens_per_second"] for name in names]
    medians = [rate["median"] for rate in rates]
    around = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    labels = [SHORT[name] for name in names]
    axes.barh(labels, medians, xerr=around, color=[COLOURS[name] for name in names], ecolor="#444444", capsize=3)
    for row, rate in enumerate(rates):
        axes.text(rate["max"] + max(medians) * 0.03, row, f"{rate['median']:.0f}", va="center")
    axes.set_xlim(0, max(rate["max"] for rate in rates) * 1.18)
    axes.set_xlabel("response tokens per second, at the best batch size")
    axes.spines[["top", "right"]].set_visible(False)


def _capture(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    ratios = sorted(on / off for on, off in zip(result["seconds_on"], result["seconds_off"], strict=True))
    axes.plot(range(1, len(ratios) + 1), ratios, "o", color=OURS)
    axes.axhline(result["ratio"]["median"], color=OURS, label=f"median {result['ratio']['median']:.3f}")
    axes.axhline(1.05, color=LIMIT, linestyle="--", label="goal: at most 1.05")
    axes.axhline(1.0, color=THEIRS, linewidth=1)
    axes.set_title(f"{result['shape']}: what capture costs")
    axes.set_xlabel("pair of runs, sorted")
    axes.set_ylabel("time with capture / without")
    axes.legend(frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _memory(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    counts = [str(count) for count in result["counts"]]
    for i, by_count in enumerate(result["peak_mib"].values()):
        places = [i + (j - (len(counts) - 1) / 2) * 0.36 for j in range(len(counts))]
        bars = axes.bar(places, [by_count[count] for count in counts], width=0.33, color=[THEIRS, OURS])
        axes.bar_label(bars, [f"{by_count[count]:.0f}\n({int(count):,})" for count in counts], padding=2)
    axes.set_xticks(range(len(result["peak_mib"])), [f"{s}: {g:.2f} times" for s, g in result["growth"].items()])
    axes.margins(y=0.25)
    axes.set_ylabel("peak memory, MiB")
    axes.set_title(f"Peak memory with {' and '.join(f'{int(count):,}' for count in counts)} examples")
    axes.spines[["top", "right"]].set_visible(False)


def _speculation(figure: Figure, result: dict[str, Any]) -> None:
    temperatures = sorted({cell["temperature"] for cell in result["cells"]})
    figure.suptitle(f"{result['shape']}: speculation over plain decoding")
    for axes, temperature in zip(figure.subplots(1, len(temperatures), sharey=True), temperatures, strict=True):
        cells = [cell for cell in result["cells"] if cell["temperature"] == temperature]
        for name, colour in (("draft", OURS), ("lookup", COLOURS["batched"])):
            ratios = [cell["sides"][name]["ratio"]["median"] for cell in cells]
            axes.plot([cell["batch_size"] for cell in cells], ratios, "o-", color=colour, label=name)
        axes.axhline(1.0, color=THEIRS, linewidth=1)
        axes.set_xscale("log", base=2)
        sizes = [cell["batch_size"] for cell in cells]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_title(f"temperature {temperature:g}")
        axes.set_xlabel("batch size")
        axes.spines[["top", "right"]].set_visible(False)
    most = max(cell["sides"][name]["ratio"]["median"] for cell in result["cells"] for name in ("draft", "lookup"))
    figure.axes[0].set_ylim(0, 1.1 * max(most, 1.0))
    figure.axes[0].set_ylabel("tokens per second over plain")
    figure.axes[-1].legend(frameon=False)


def _separation(figure: Figure, result: dict[str, Any]) -> None:
    trait, placebo, layers = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    placebo.sharey(trait)
    colours = {"hedging": OURS, "certain": COLOURS["batched"]}
    for axes, key, title in ((trait, "trait", "the trait's vector"), (placebo, "placebo", "a placebo vector")):
        for course in result["courses"]:
            axes.plot(course[key], color=colours[course["side"]], linewidth=1.4, alpha=0.85)
        axes.set_title(f"{title}, layer {result['layer']}")
        axes.set_xlabel("response token (mean of the last 5)")
        axes.spines[["top", "right"]].set_visible(False)
    trait.set_ylabel("projection")
    for side, colour in colours.items():
        trait.plot([], [], color=colour, label=f"{side} answers")
    trait.margins(y=0.3)
    trait.legend(frameon=False, loc="upper right")
    _separation_by_layer(layers, [found["of_tokens"] for found in result["layers"]])


def _separation_by_layer(axes: Axes, found: list[dict[str, float]]) -> None:
    places = range(len(found))
    low, high = ([each[end] for each in found] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=THEIRS, alpha=0.6, label="placebos, 95%", linewidth=0)
    axes.plot(places, [each["median"] for each in found], color="#6b7178", linewidth=1)
    axes.plot(places, [each["trait"] for each in found], "o-", color=OURS, label="the trait")
    axes.set_title("tokens told apart")
    axes.set_xlabel("layer")
    axes.set_ylabel("AUROC")
    axes.set_ylim(0.2, 1.0)
    axes.legend(frameon=False, loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _reading(figure: Figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    sides = list(result["sides"].items())[::-1]
    medians = [side["median"] for _, side in sides]
    around = [[side["median"] - side["min"] for _, side in sides], [side["max"] - side["median"] for _, side in sides]]
    labels = [side["title"].replace(", ", ",\n", 1) for _, side in sides]
    colours = [OURS if name in ("projections", "attention") else THEIRS for name, _ in sides]
    bars = axes.barh(labels, medians, xerr=around, color=colours, ecolor="#444444", capsize=3)
    axes.bar_label(bars, [f"{median:.0f}" for median in medians], padding=8)
    axes.margins(x=0.15)
    axes.set_title(f"{result['shape']}, {result['device']}: reading every token")
    axes.set_xlabel("response tokens per second")
    axes.spines[["top", "right"]].set_visible(False)


def _roofline(figure: Figure, result: dict[str, Any]) -> None:
    passes = list(dict.fromkeys(cell["pass"] for cell in result["cells"]))
    figure.suptitle(f"{result['shape']}, {result['device']}, {result['dtype']}: measured and floor")
    for axes, name in zip(figure.subplots(1, len(passes)), passes, strict=True):
        cells = [cell for cell in result["cells"] if cell["pass"] == name]
        sizes = [cell["batch_size"] for cell in cells]
        axes.plot(sizes, [1e3 * cell["seconds"]["min"] for cell in cells], "o-", color=OURS, label="the engine")
        if "matrices_seconds" in cells[0]:
            alone = [1e3 * cell["matrices_seconds"] for cell in cells]
            axes.plot(sizes, alone, "o-", color=COLOURS["batched"], label="its matrices alone")
        axes.plot(sizes, [1e3 * cell["floor_seconds"] for cell in cells], "--", color=LIMIT, label="floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_title(name)
        axes.set_xlabel("batch size")
        axes.set_ylabel("milliseconds")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)


def _scaling(figure: Figure, result: dict[str, Any]) -> None:
    axes = result["axes"]
    figure.set_figwidth(14.0)
    figure.suptitle(f"{result['shape']}, {result['device']}: how time and memory grow")
    memory, *times = figure.subplots(1, 1 + len(axes))
    for panel, axis in zip(times, axes.values(), strict=True):
        points = axis["points"]
        panel.plot(points, [axis["start"] + axis["slope"] * point for point in points], "-", color=THEIRS)
        panel.plot(points, axis["seconds"], "o", color=OURS)
        panel.set_title(f"within {axis['largest_deviation']:.1%} of a line")
        panel.set_ylabel("seconds a step" if axis["of"] == "step" else "seconds")
        _from_zero(panel, axis["title"], axis["seconds"])
    memory.plot(axes["examples"]["points"], axes["examples"]["peak_mib"], "o-", color=OURS)
    memory.set_title("memory")
    memory.set_ylabel("peak resident memory, MiB")
    _from_zero(memory, "examples", axes["examples"]["peak_mib"])


def _from_zero(axes: Axes, title: str, values: list[float]) -> None:
    axes.set_xlabel(title)
    axes.set_ylim(0, 1.1 * max(values))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _gpu(figure: Figure, result: dict[str, Any]) -> None:
    bars, step = figure.subplots(1, 2, width_ratios=(2, 1))
    figure.suptitle(f"{result['shape']} on {result['device']}, {result['dtype']}: responses and activations")
    _peer_bars(bars, result["peers"])
    found = result["step"]
    heights = [1e3 * found["floor_seconds"], 1e3 * found["seconds"]["median"]]
    drawn = step.bar(["floor", "measured"], heights, color=[LIMIT, OURS], width=0.6)
    step.bar_label(drawn, [f"{height:.3g}" for height in heights], padding=2)
    step.margins(y=0.15)
    step.set_title(f"decode step, batch {found['batch_size']}")
    step.set_ylabel("milliseconds")
    step.spines[["top", "right"]].set_visible(False)


DRAWINGS = {
    "peers": _peers,
    "capture": _capture,
    "speculation": _speculation,
    "memory": _memory,
    "separation": _separation,
    "reading": _reading,
    "roofline": _roofline,
    "scaling": _scaling,
    "gpu": _gpu,
}
