"""What the server counts, as Prometheus reads it (text exposition format 0.0.4). No prompt and no token is in it."""

from __future__ import annotations

import bisect
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from extraction.serving.events import Event, Finished, PendingRow

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Labels = tuple[tuple[str, str], ...]

HELP = {
    "requests": ("counter", "HTTP requests by path and status."),
    "rows": ("counter", "Rows that ended, by kind and how."),
    "rows_cancelled": ("counter", "Rows whose client left or whose time was over."),
    "prompt_tokens": ("counter", "Prompt tokens of finished rows."),
    "tokens": ("counter", "Response tokens of finished rows."),
    "proposed_tokens": ("counter", "Tokens that speculation proposed."),
    "accepted_tokens": ("counter", "Of those, the ones that the model accepted."),
    "steps": ("counter", "Steps of a running batch."),
    "step_seconds": ("counter", "Seconds spent in them."),
    "out_of_memory": ("counter", "Batches that ran out of memory and were made again."),
    "row_seconds": ("histogram", "From acceptance to the end of a row."),
    "first_token_seconds": ("histogram", "From acceptance to a row's first token."),
}


class Metrics:
    """Counters and histograms, counted by any thread."""

    def __init__(self) -> None:
        self.started = time.time()
        self._lock = threading.Lock()
        self._sums: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._buckets: defaultdict[tuple[str, Labels], list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._sums[name, tuple(labels.items())] += by

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram."""
        key = (name, tuple(labels.items()))
        with self._lock:
            self._buckets[key][bisect.bisect_left(SECONDS, seconds)] += 1
            self._sums[key] += seconds

    def step(self, kind: str, seconds: float, n_out_of_memory: int) -> None:
        """A step of one lane."""
        self.count("steps", kind=kind)
        self.count("step_seconds", seconds, kind=kind)
        if n_out_of_memory:
            self.count("out_of_memory", n_out_of_memory, kind=kind)

    def end(self, row: PendingRow, event: Event) -> None:
        """A row that ended."""
        kind = row.lane[0]
        if not isinstance(event, Finished):
            return self.count("rows", kind=kind, end="failed")
        completion = event.completion
        self.count("rows", kind=kind, end=completion.finish_reason)
        self.count("prompt_tokens", len(row.request.token_ids), kind=kind)
        self.count("tokens", len(completion.token_ids), kind=kind)
        self.observe("row_seconds", event.seconds, kind=kind)
        if event.first_seconds is not None:
            self.observe("first_token_seconds", event.first_seconds, kind=kind)
        if completion.speculation is not None:
            self.count("proposed_tokens", completion.speculation.proposed, kind=kind)
            self.count("accepted_tokens", completion.speculation.accepted, kind=kind)

    def exposition(self, gauges: dict[str, tuple[str, float]]) -> str:
        """Everything as text; `gauges`: name -> what it is, and its value now."""
        with self._lock:
            sums = dict(self._sums)
            buckets = {key: list(counts) for key, counts in self._buckets.items()}
        lines: list[str] = []
        for name, (kind, said) in HELP.items():
            full = f"traitline_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {said}", f"# TYPE {full} {kind}"]
            for key in sorted(key for key in sums if key[0] == name):
                lines += _series(full, key[1], sums[key], buckets.get(key))
        for name, (said, value) in gauges.items():
            full = f"traitline_{name}"
            lines += [f"# HELP {full} {said}", f"# TYPE {full} gauge", f"{full} {_number(value)}"]
        return "\n".join(lines) + "\n"


def _series(name: str, labels: Labels, total: float, buckets: list[int] | None) -> Iterator[str]:
    if buckets is None:
        yield f"{name}{_labels(labels)} {_number(total)}"
        return
    counted = 0
    for limit, count in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
        counted += count
        yield f"{name}_bucket{_labels([*labels, ('le', limit)])} {counted}"
    yield f"{name}_sum{_labels(labels)} {_number(total)}"
    yield f"{name}_count{_labels(labels)} {counted}"


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    inside = ",".join(f'{key}="{value}"' for key, value in escaped)
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
