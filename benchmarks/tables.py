"""Write results as JSON, one file a measurement, and render one Markdown page from all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = "README.md"
AGREED = {"serial": "equal to one at a time", "batched": "equal to batches"}
INTRODUCTION = """# Measurements

Written by `python -m benchmarks`; the figures of every table are in the JSON file beside it.

**Peers.** All libraries do the same job with the same random weights: prompts of 40 to 80 tokens, greedy responses of
forced lengths (gamma distributed, 2 to 150 tokens), and the mean of every layer over each response, in float32. Every
batch size is tried first, to find each library's best; the best ones then run in turn, and the table holds medians.
One at a time is measured on the first examples only. "Equal" counts the responses with the same tokens, in every run;
the deviation is the largest difference of any mean, relative to the largest value of that response. The floor is the
time of a decode step's matrices alone. vLLM, nnsight and TransformerLens run in processes and environments of their
own, from the same saved weights; loading and compiling are not counted.

**Speculation.** Plain decoding, a draft model and n-gram lookup take turns on the same prompts; sampled answers
differ in their words, hence rates of tokens.

**Reading.** Random weights, greedy responses of forced lengths (as for the peers), every token of prompt and
response. "By hand" is a script: a response, a second pass over prompt and response with all hidden states and
attention weights, and their projections on the host. "Equal" counts the responses with the same tokens; the deviation
is the largest difference of any projection (of a layer's input) or attention weight, relative to the largest value of
that response. **Captures.** The commands in fresh processes, on the bundled model.

**Roofline.** A floor is the longer of bytes over bandwidth and operations over peak, both measured just before. A
decode step reads every weight once and each row's cache; a teacher-forced pass reads the weights once. The step is
the engine's, with every layer captured. "Its matrices alone" are the linear layers called in sequence, without
anything between. **How time grows.** One quantity changes along an axis, the others are fixed; a line is fitted to
the medians with relative errors. Examples are varied in whole runs: the command in a fresh process, with start, load
and writing; all responses have the same length.
"""


def save(name: str, result: dict[str, Any], out: Path) -> Path:
    """Write a result and rewrite the page."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / PAGE).write_text(page(out), encoding="utf-8")
    return path


def page(out: Path) -> str:
    """Render all results of a folder as Markdown."""
    parts = [INTRODUCTION]
    for path in sorted(out.glob("*.json"), key=lambda path: (path.stem.partition("-")[0] != "peers", path.stem)):
        result = json.loads(path.read_text(encoding="utf-8"))
        picture = f"![{TITLES[result['kind']]}]({path.stem}.png)\n" if path.with_suffix(".png").is_file() else ""
        parts.append("\n".join([TABLES[result["kind"]](result), picture, _machine(result["machine"]), ""]))
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; "
        f"load before the run {machine.get('load_before', 0):.1f}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table: first column left-aligned, others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def peers_table(result: dict[str, Any]) -> str:
    """Render the comparison of peers on one shape."""
    n_serial, ratio = result["serial_examples"], result["ratio"]
    rows = [_peer_row(name, peer) for name, peer in result["peers"].items()]
    rows.append(["floor: the matrices alone", "", f"{result['floor']:.0f}", "", "", "", "", ""])
    head = ["", "batch", "tokens/s", "min to max", "Traitline over it", *AGREED.values(), "deviation"]
    return (
        f"## Peers, {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters\n\n"
        f"{result['examples']} examples, {result['tokens']} response tokens, {result['repeats']} rounds. "
        f"One at a time is measured on {n_serial} examples.\n\n{table(head, rows)}\n"
        f"Traitline over the best peer of the same round: **{ratio['median']:.2f}** "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}).\n{_isolated_words(result)}"
    )


def _isolated_words(result: dict[str, Any]) -> str:
    """Render the versions of isolated peers, and the peers that did not run."""
    installed = [
        f"{name} ({', '.join(f'{package} {version}' for package, version in found.items())})"
        for name, found in result.get("versions", {}).items()
    ]
    words = f"In environments of their own: {'; '.join(installed)}.\n" if installed else ""
    said = {"Not available": "left_out", "Not run": "not_asked"}
    return words + "".join(f"{text}: {', '.join(result[key])}.\n" for text, key in said.items() if result.get(key))


def _ratio_text(ratio: dict[str, float] | None) -> str:
    """Render a ratio with its range; empty where none was recorded."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _equal_text(found: dict[str, Any] | None) -> str:
    """Render the count of equal answers; empty where the reference did not run."""
    return "" if found is None else f"{found['n_equal']} of {found['n_compared']}"


def _peer_row(name: str, peer: dict[str, Any]) -> list[str]:
    rate, agreement = peer["tokens_per_second"], peer["agreement"]
    equal = [_equal_text(agreement.get(other)) for other in AGREED]
    deviation = max(each["deviation"] for each in agreement.values())
    return [
        peer["title"],
        str(peer["batch_size"]),
        f"{rate['median']:.0f}",
        f"{rate['min']:.0f} to {rate['max']:.0f}",
        "" if name == "traitline" else _ratio_text(peer.get("ratio")),
        *equal,
        f"{deviation:.0e}",
    ]


def capture_table(result: dict[str, Any]) -> str:
    """Render the cost of capture."""
    ratio = result["ratio"]
    rows = [
        ["median of the pairs", f"{ratio['median']:.3f}"],
        ["middle half of the pairs", f"{ratio['quartile_low']:.3f} to {ratio['quartile_high']:.3f}"],
        ["all pairs", f"{ratio['min']:.3f} to {ratio['max']:.3f}"],
        ["quickest with capture over quickest without", f"{result['ratio_of_quickest']:.3f}"],
    ]
    return (
        f"## What capture costs, {result['shape']}\n\n"
        f"{result['pairs']} pairs of runs in turn, {result['examples']} examples, {result['tokens']} response tokens, "
        f"batch {result['batch_size']}, the means of every layer.\n\n{table(['', 'time on / time off'], rows)}"
    )


def memory_table(result: dict[str, Any]) -> str:
    """Render peak memory by number of examples."""
    counts = [str(count) for count in result["counts"]]
    rows = [
        [step, *[f"{by_count[count]:.0f} MiB" for count in counts], f"{result['growth'][step]:.2f}"]
        for step, by_count in result["peak_mib"].items()
    ]
    head = ["peak resident memory", *[f"{int(count):,} examples" for count in counts], "growth"]
    many = _many_rows_words(result["many_rows"]) if "many_rows" in result else ""
    return (
        "## How memory grows\n\nThe commands themselves, each in a fresh process, on a tiny model and with responses "
        "of 4 tokens; where layers are named, on random activations of that shape, written through the store. The "
        f"vectors are mean differences.\n\n{table(head, rows)}{many}"
    )


def _many_rows_words(found: dict[str, Any]) -> str:
    """Render peak memory with many rows, by method."""
    n, n_layers, hidden = found["shape"]
    rows = [[name, f"{cell['peak_mib']:.0f} MiB", f"{cell['seconds']:.1f}"] for name, cell in found["cells"].items()]
    return (
        f"\n{n:,} examples, {n_layers} layers of {hidden}: a layer is {4 * n * hidden / 2**20:.0f} MiB in float32, all "
        f"are {4 * n * n_layers * hidden / 2**20:.0f}. Where not several traits are named, there is one; methods but "
        "mean_diff are fitted at the first layer alone.\n\n"
        f"{table(['', 'peak resident memory', 'seconds'], rows)}"
    )


def validation_table(result: dict[str, Any]) -> str:
    """Render the time of a validation card, by shape."""
    rows = [
        [
            f"{shape}: {found['layers']} layers of {found['hidden']}, {found['rows']} rows",
            str(found["traits"]),
            f"{found['seconds'] / found['traits']:.1f}",
            f"{found['seconds']:.1f}",
        ]
        for shape, found in result["shapes"].items()
    ]
    return (
        "## What a card costs\n\nFive methods with their folds, intervals over questions, halves, random directions "
        "and shuffled labels, on one thread; synthetic rows with a planted trait.\n\n"
        f"{table(['', 'traits', 'seconds a trait', 'seconds'], rows)}"
    )


def speculation_table(result: dict[str, Any]) -> str:
    """Render ratios over plain decoding, by temperature and batch size."""
    rows = [
        [text, *_speculation_row(cell, words, cell["sides"][name])]
        for text, cells in (("answers", result["cells"]), ("a phrase again and again", result["repeating"]))
        for cell in cells
        for name, words in (("draft", "draft model"), ("lookup", "n-gram lookup"))
    ]
    head = [
        "text",
        "",
        "temperature",
        "batch",
        "over plain",
        "min to max",
        "accepted",
        "tokens a step",
        "equal to plain",
    ]
    sizes = result["parameters"]
    return (
        f"## Speculation, {result['shape']}: {sizes['target'] / 1e6:.1f}M parameters, a draft of "
        f"{sizes['draft'] / 1e6:.1f}M\n\n{result['examples']} prompts of up to {result['max_new_tokens']} tokens, "
        f"at most {result['depth']} proposals, {result['repeats']} rounds; tokens per second over plain decoding in "
        f"the same round.\n\n{table(head, rows)}"
    )


def _speculation_row(cell: dict[str, Any], words: str, side: dict[str, Any]) -> list[str]:
    ratio, rate = side["ratio"], side["acceptance_rate"]
    return [
        words,
        f"{cell['temperature']:g}",
        str(cell["batch_size"]),
        f"{ratio['median']:.2f}",
        f"{ratio['min']:.2f} to {ratio['max']:.2f}",
        "" if rate is None else f"{rate:.0%}",
        f"{side['tokens_per_step']:.2f}",
        "" if side["equal"] is None else "{} of {}".format(*side["equal"]),
    ]


def server_table(result: dict[str, Any]) -> str:
    """Render one client and many, by endpoint."""
    head = ["", "clients", "requests/s", "tokens/s", "median wait, s", "95th percentile, s"]
    rows = [
        [
            path,
            str(clients),
            f"{found[who]['requests_per_second']:.1f}",
            f"{found[who]['tokens_per_second']:.0f}",
            f"{found[who]['median_seconds']:.2f}",
            f"{found[who]['p95_seconds']:.2f}",
        ]
        for path, found in result["endpoints"].items()
        for who, clients in (("one", 1), ("many", result["clients"]))
    ]
    ratios = "\n".join(
        f"- `{path}`: **{found['ratio']['median']:.2f}** times the tokens per second ({found['ratio']['min']:.2f} to "
        f"{found['ratio']['max']:.2f}); {found['n_equal']} of {result['requests']} answers equal to those one at a time"
        for path, found in result["endpoints"].items()
    )
    return (
        f"## The server under load\n\n{result['requests']} requests of one client, then the same of "
        f"{result['clients']} at once, {result['repeats']} rounds, server and clients on the same machine.\n\n"
        f"{table(head, rows)}\n{ratios}\n"
    )


def separation_table(result: dict[str, Any]) -> str:
    """Render the AUROC of a trait's vector and placebos, by layer."""
    head = ["layer", "tokens: trait", "placebos", "beaten", "answers: trait", "placebos", "beaten"]
    rows = [
        [str(layer), *(cell for key in ("of_tokens", "of_answers") for cell in _beside(found[key]))]
        for layer, found in enumerate(result["layers"])
    ]
    counts = ", ".join(
        f"{result['answers'][side]} {side} answers of {result['tokens'][side]} tokens" for side in result["answers"]
    )
    return (
        f"## Hedging tokens and certain ones, {result['trait']} on pocket\n\n"
        f"AUROC of hedging against certain, {result['method']}, residual out: {counts}, to prompts that the vector has "
        f"not seen. Placebos: {result['placebos']} vectors of the same method and responses, each side dealt out at "
        f"random into two halves; median, and the middle 95%.\n\n{table(head, rows)}"
    )


def _beside(found: dict[str, float]) -> list[str]:
    placebos = f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
    return [f"{found['trait']:.2f}", placebos, f"{found['beaten']:.0%}"]


WORDS = {
    "plain": "generation alone",
    "projections": "with projections",
    "attention": "with projections and attention",
    "alone": "the same, one prompt at a time",
    "by_hand": "by hand",
}


def reading_table(result: dict[str, Any]) -> str:
    """Render the cost of per-token readings, in one pass and by hand."""
    rows = [
        [side["title"], f"{side['median']:.0f}", f"{side['min']:.0f} to {side['max']:.0f}", *_agreed(result, name)]
        for name, side in result["sides"].items()
    ]
    ratios = "\n".join(
        f"- {WORDS[each['of']]}, over {WORDS[each['over']]}: **{each['median']:.2f}** "
        f"({each['min']:.2f} to {each['max']:.2f})"
        for each in result["ratios"]
    )
    return (
        f"## What reading costs, {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, {result['device']}, "
        f"{result['dtype']}\n\n{result['examples']} examples, {result['tokens']} response tokens, {result['traits']} "
        f"traits at {result['layers']} layers and three points, {result['repeats']} rounds. One at a time runs on "
        f"{result['serial_examples']} examples.\n\n"
        f"{table(['', 'tokens/s', 'min to max', 'equal to those by hand', 'deviation'], rows)}\n"
        f"Tokens per second, side by side in the same round:\n\n{ratios}\n"
    )


def _agreed(result: dict[str, Any], name: str) -> list[str]:
    found = result["agreement"].get(name)
    if found is None:
        return ["", ""]
    deviation = "" if found["deviation"] is None else f"{found['deviation']:.0e}"
    return [f"{found['n_equal']} of {found['n_compared']}", deviation]


def monitoring_table(result: dict[str, Any]) -> str:
    """Render the time of the captures by number of loads, and memory by number of traits."""
    rows = [
        [
            side["title"],
            str(side["processes"]),
            f"{side['median']:.1f}",
            f"{side['min']:.1f} to {side['max']:.1f}",
            "{} of {}".format(*result["equal"][name]),
        ]
        for name, side in result["sides"].items()
    ]
    ratios = "\n".join(
        f"- {result['sides'][name]['title']}: **{ratio['median']:.2f}** times as long as in batches "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})"
        for name, ratio in result["ratios"].items()
    )
    cells = [
        [name, f"{cell['peak_mib']:.0f} MiB", f"{cell['projections_mib']:.1f} MiB", f"{cell['attention_mib']:.1f} MiB"]
        for name, cell in result["memory"]["cells"].items()
    ]
    return (
        f"## {result['captures']} captures, model {result['model']}\n\nGreedy answers of up to "
        f"{result['max_new_tokens']} tokens ({result['tokens']} in all), {result['repeats']} rounds; start, load and "
        "pages are in the time.\n\n"
        f"{table(['', 'processes', 'seconds', 'min to max', 'answers equal to a load a prompt'], rows)}\n{ratios}\n\n"
        f"{result['memory']['prompts']} prompts in one command, all layers:\n\n"
        f"{table(['', 'peak resident memory', 'projections written', 'attention written'], cells)}"
    )


def roofline_table(result: dict[str, Any]) -> str:
    """Render steps and passes over their floors."""
    rows = [
        [
            f"{cell['pass']}, batch {cell['batch_size']}",
            _milliseconds(cell["seconds"]["min"]),
            _milliseconds(cell["seconds"]["median"]),
            _milliseconds(cell["matrices_seconds"]) if "matrices_seconds" in cell else "",
            f"{_milliseconds(cell['floor_seconds'])}, {cell['bound']}",
            f"{cell['over_floor']:.2f}",
        ]
        for cell in result["cells"]
    ]
    by_threads = "; ".join(
        f"with {count} thread{'s' * (count != '1')} {_limit_words(found)}"
        for count, found in result["by_threads"].items()
    )
    head = ["", "best, ms", "median, ms", "its matrices alone, ms", "floor, ms", "best over floor"]
    return (
        f"## Roofline, {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, {result['device']}, "
        f"{result['dtype']}\n\nMeasured here: {_limit_words(result['limits'])}"
        f"{f' ({by_threads})' if by_threads else ''}. Prompts of {result['prompt_tokens']} tokens, "
        f"{result['new_tokens']} new ones; texts of {result['forced_tokens']} tokens; every layer captured; best of "
        f"{result['repeats']}.\n\n{table(head, rows)}"
    )


def _limit_words(limit: dict[str, float]) -> str:
    return f"{limit['bytes_per_second'] / 1e9:.1f} GB/s and {limit['flops_per_second'] / 1e9:.0f} GFLOP/s"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def scaling_table(result: dict[str, Any]) -> str:
    """Render every axis with its points and its fitted line."""
    return (
        f"## How time grows, {result['shape']}: {result['parameters'] / 1e6:.1f}M parameters, {result['device']}, "
        f"{result['dtype']}\n\nMedians of {result['repeats']} rounds; of memory, the highest.\n\n"
        + "\n".join(_axis_table(axis) for axis in result["axes"].values())
    )


def _axis_table(axis: dict[str, Any]) -> str:
    columns = {
        axis["title"]: [str(point) for point in axis["points"]],
        "seconds a step" if axis["of"] == "step" else "seconds": [f"{seconds:.3g}" for seconds in axis["seconds"]],
        "tokens/s": [f"{rate:.0f}" for rate in axis["tokens_per_second"]],
        **_run_columns(axis),
    }
    kept = ", ".join(
        f"{key.removeprefix('n_').replace('_', ' ')} {'all' if value is None else value}"
        for key, value in axis["job"].items()
    )
    return (
        f"{axis['title'].capitalize()} ({kept}): {axis['start']:.3g} s and {axis['slope']:.3g} s for each; the largest "
        f"deviation from that line is **{axis['largest_deviation']:.1%}**.{_memory_words(axis)}\n\n"
        f"{table(list(columns), list(zip(*columns.values(), strict=True)))}"
    )


def _run_columns(axis: dict[str, Any]) -> dict[str, list[str]]:
    """Return the columns that only whole runs have."""
    if axis["of"] != "run":
        return {}
    pairs = zip(axis["points"], axis["seconds"], strict=True)
    return {
        "ms an example, start left out": [f"{1e3 * (seconds - axis['start']) / point:.3g}" for point, seconds in pairs],
        "peak resident memory": [f"{peak:.0f} MiB" for peak in axis["peak_mib"]],
    }


def _memory_words(axis: dict[str, Any]) -> str:
    if axis["of"] != "run":
        return ""
    first, last = axis["peak_mib"][0], axis["peak_mib"][-1]
    return f" From the fewest to the most, the peak of memory changes by **{last - first:+.0f} MiB**."


def gpu_table(result: dict[str, Any]) -> str:
    """Render the comparison, the step over its floor, and the cost of capture."""
    step, cost = result["step"], result["capture"]["ratio"]
    rows = [_peer_row(name, peer) for name, peer in result["peers"].items()]
    head = ["", "batch", "tokens/s", "min to max", "Traitline over it", *AGREED.values(), "deviation"]
    serial = result["tokens"] / result["peers"]["serial"]["tokens_per_second"]["median"]
    return (
        f"## {result['shape']} on {result['device']}: {result['parameters'] / 1e6:.0f}M parameters, "
        f"{result['dtype']}\n\n{result['examples']} prompts of {result['prompt_tokens']} tokens, "
        f"{result['new_tokens']} new ones each, means of all {result['layers']} layers; {result['repeats']} rounds. "
        f"One at a time is measured on {result['serial_examples']} of them; all would take {serial:.0f} s. In half "
        f"precision tokens may differ: sums are rounded in another order.\n\n{table(head, rows)}\n"
        f"- a decode step at batch {step['batch_size']}: {_milliseconds(step['seconds']['median'])} ms (best "
        f"{_milliseconds(step['seconds']['min'])}); its floor, by {step['bound']}, is "
        f"{_milliseconds(step['floor_seconds'])} ms ({_limit_words(result['limits'])}): **{step['over_floor']:.2f}** "
        f"times\n- a step with capture over one without: **{cost['median']:.3f}** ({cost['min']:.3f} to "
        f"{cost['max']:.3f})\n"
    )


TABLES = {
    "peers": peers_table,
    "capture": capture_table,
    "speculation": speculation_table,
    "memory": memory_table,
    "validation": validation_table,
    "server": server_table,
    "separation": separation_table,
    "reading": reading_table,
    "monitoring": monitoring_table,
    "roofline": roofline_table,
    "scaling": scaling_table,
    "gpu": gpu_table,
}
TITLES = {
    "speculation": "Speculation over plain decoding",
    "peers": "Tokens per second by peer",
    "capture": "Cost of capture",
    "memory": "Peak memory",
    "validation": "Cost of a card",
    "server": "The server under load",
    "separation": "Hedging tokens and certain ones",
    "reading": "What reading costs",
    "monitoring": "Captures by number of loads",
    "roofline": "Steps and passes over their floors",
    "scaling": "How time grows",
    "gpu": "Tokens per second by peer, on a GPU",
}
