"""A run's folder: what its files are called, what is in them, and which of them are done.

The same inputs give the same bytes: no times, no absolute paths, sorted keys. Torch is imported only where tensors are.
Shapes: n examples, T tokens, L layers, D hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.atomic import (
    DELETE,
    RECEIPT,
    REMAKE,
    RERUN,
    Finding,
    append_lines,
    atomic_write,
    check_payload,
    check_writable,
    commit,
    complaint,
    digest,
    hold_lock,
    orphans,
    plain,
    read_document,
    read_lines,
    read_payload,
    read_receipt,
    receipt_path,
    refusing_nan,
    remove,
    reporting,
    to_json,
    write_document,
)
from extraction.errors import ConfigError, RunMismatch, StoreError
from extraction.records import POLARITIES

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
Labels = Mapping[str, bool]  # an example's id, and whether it must have an activation

LAYER_CONVENTION = "layer k is the output of decoder block k, counted from 0; the embeddings are not a layer"
# what may differ between two starts: it changes no response and no activation
EXECUTION_FIELDS = (
    *("batch_size", "device", "workers", "self_check", "gpu_price", "threshold", "coherence_threshold"),
    *("judge", "judge_model", "judge_url", "judge_concurrency", "judge_price"),
)
STAGES = {"responses": "responses/shards", "activations": "activations", "stripped": "stripped"}
PAYLOADS = {  # folder: suffix
    "responses/shards": ".jsonl",
    "responses": ".jsonl",
    "activations": ".safetensors",
    "stripped": ".safetensors",
    "vectors": ".safetensors",
}
FOLDERS = (*PAYLOADS, "judgements", "reports")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?", re.IGNORECASE)


def safe_name(name: str, what: str) -> str:
    """Return `name` if it can name a file on every system; ConfigError if not."""
    if _NAME.fullmatch(name) and not _DEVICES.fullmatch(name) and not name.endswith("."):
        return name
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    rule = "use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first, no '.' last, no device name like CON"
    raise ConfigError(f"{what} {shown} can't be the name of a file: {rule}")


def run_folder(root: str | Path, experiment: str, trait: str) -> RunFolder:
    """The folder of one trait of one experiment. StoreError when a symbolic link leads it out of `root`."""
    path = Path(root) / safe_name(experiment, "experiment") / safe_name(trait, "trait")
    _check_inside(path, Path(root))
    return RunFolder(path)


def fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 of the fields that decide what a run computes: all but EXECUTION_FIELDS, at any depth."""
    return digest(dict(_identity(config)))


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Work in it under `lock()`, after `open(config)`."""

    path: Path

    # Start

    @contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other processes out, or, shared, only those that want it alone; StoreError if one is in."""
        with reporting(self.path, "create"):
            self.path.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.path / ".lock", shared=shared):
            if not shared:
                self.clean_orphans()
            yield

    def open(self, config: Mapping[str, Any]) -> bool:
        """Make the folders, check that they are writable, pin `config`. True when this run was begun before.

        RunMismatch when the folder holds another run. `run.json` keeps the EXECUTION_FIELDS of the first start.
        """
        for name in FOLDERS:
            _make_folder(self.path / name, self.path)
        wanted = plain(self.config_path, config)
        if self.config_path.exists():
            _check_same(self.path, self.read_config(), wanted)
            return True
        if any(self._payload_paths(name) for name in PAYLOADS):
            raise complaint(
                self.config_path, "is missing, and there is no telling what made the rest", _restart(self.path)
            )
        write_document(self.config_path, {"config": wanted, "fingerprint": fingerprint(wanted)})
        return False

    def read_config(self) -> dict[str, Any]:
        """The config that this folder was opened with."""
        if not self.config_path.exists():
            raise complaint(self.config_path, "is missing", RERUN)
        config: dict[str, Any] = read_document(self.config_path, _restart(self.path))["config"]
        return config

    def stored_config(self) -> dict[str, Any] | None:
        """The config that this folder was opened with; None where no run has begun."""
        return self.read_config() if self.config_path.exists() else None

    def clean_orphans(self) -> None:
        """Delete the temporary files of dead processes. Those of another machine look dead: hold the lock alone."""
        for path in self._orphans():
            remove(path)

    # Shards

    def shard_done(self, stage: str, index: int, *, deep: bool = False) -> bool:
        """True when the shard's receipt is whole and its payload has the right size (`deep`: the right sha256)."""
        try:
            (read_payload if deep else check_payload)(self._shard_path(stage, index))
        except StoreError:
            return False
        return True

    def write_responses_shard(self, index: int, rows: Sequence[Row], meta: Mapping[str, Any]) -> None:
        """What was generated for one shard, a row an example with its `id`; not changed afterwards."""
        path = self._shard_path("responses", index)
        commit(path, _jsonl(path, rows), {"rows": len(rows), "meta": dict(meta)})

    def read_responses_shard(self, index: int) -> list[Row]:
        """The rows of one shard, in the order written."""
        return list(_rows(read_payload(self._shard_path("responses", index))[0]))

    def write_activations_shard(
        self,
        index: int,
        ids: Sequence[str],
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        stage: str = "activations",
    ) -> None:
        """`<site>.<pooling>` is [n, L, D], row i of example ids[i]; `<site>.all/<id>` is one example's [T, L, D].

        `stage`: activations, or stripped, those of the same responses with the instruction taken out of the prompt.
        """
        path, shapes = self._shard_path(stage, index), _shapes(tensors)
        _check_labels(path, ids, shapes)
        header = {"ids": list(ids), "layer_convention": LAYER_CONVENTION}
        facts = {"rows": len(ids), "layer_convention": LAYER_CONVENTION, "tensors": shapes, "meta": dict(meta)}
        commit(path, _safetensors(path, tensors, header), facts)

    def iter_activations(
        self, names: Sequence[str] | None = None, *, stage: str = "activations"
    ) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """(ids, tensors) of every shard, in shard order; `names` picks tensors. Every sha256 is checked."""
        for path in self._payload_paths(STAGES[stage]):
            data, _ = read_payload(path)
            tensors = _tensors(data)
            yield _metadata(data)["ids"], {name: _pick(path, tensors, name) for name in names or tensors}

    def load_activations(self, name: str, *, stage: str = "activations") -> tuple[list[str], Tensor]:
        """All rows of one tensor, [n, L, D], in shard order; takes the room of the result and of one shard."""
        import torch

        paths = self._payload_paths(STAGES[stage])
        parts = [_pick(path, read_receipt(path)["tensors"], name) for path in paths]
        _check_alike(self.path / STAGES[stage], name, parts)
        n = sum(part["shape"][0] for part in parts)
        result = torch.empty((n, *parts[0]["shape"][1:]), dtype=getattr(torch, parts[0]["dtype"]))
        ids: list[str] = []
        for shard_ids, tensors in self.iter_activations([name], stage=stage):
            result[len(ids) : len(ids) + len(shard_ids)] = tensors[name]
            ids += shard_ids
        return ids, result

    # Results

    def sources(self, stage: str) -> list[str]:
        """The sha256 of every shard of a stage, in order: what later results are made from."""
        return [str(read_receipt(path)["sha256"]) for path in self._payload_paths(STAGES[stage])]

    def shard_facts(self, stage: str, index: int) -> dict[str, Any]:
        """A shard's receipt: the `meta` that its writer gave, and the `tensors` of activations by name."""
        return read_receipt(self._shard_path(stage, index))

    def write_responses(self, rows_by_polarity: Mapping[str, Iterable[Row]], sources: Sequence[str] = ()) -> None:
        """responses/pos.jsonl and neg.jsonl: the shards' rows with their scores, taken one at a time."""
        for polarity in POLARITIES:
            path = self.responses_path(polarity)
            data = _jsonl(path, rows_by_polarity[polarity])
            commit(path, data, {"rows": data.count(b"\n"), "sources": list(sources)})

    def assembled_from(self) -> list[str] | None:
        """The sources that both sides' responses were written with; None while either is not whole."""
        try:
            for path in map(self.responses_path, POLARITIES):
                check_payload(path)
            made_from = [read_receipt(self.responses_path(polarity))["sources"] for polarity in POLARITIES]
        except StoreError:
            return None
        return list(made_from[0]) if made_from[0] == made_from[1] else None

    def read_responses(self, polarity: str) -> Iterator[Row]:
        """The rows of one polarity, one at a time."""
        return _rows(read_payload(self.responses_path(polarity))[0])

    def add_judgements(self, judge: str, rows: Iterable[Row]) -> None:
        """Put rows, each with its `key`, into a judge's log; they are on the disk when this returns."""
        append_lines(self._judgements_path(judge), rows)

    def read_judgements(self, judge: str) -> dict[str, Row]:
        """A judge's log by key. A line that was torn or damaged is not in it."""
        return {row["key"]: row for row in read_lines(self._judgements_path(judge)) if row}

    def write_vectors(self, method: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """One method's tensors ([L, D]); every value of `metadata` becomes JSON in the file's header."""
        path = self._vectors_path(method)
        commit(path, vectors_bytes(path, tensors, metadata), {"tensors": _shapes(tensors)})

    def read_vectors(self, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One method's tensors and metadata."""
        data, _ = read_payload(self._vectors_path(method))
        return _tensors(data), _metadata(data)

    def vectors_path(self, method: str) -> Path:
        """Where one method's vectors lie."""
        return self._vectors_path(method)

    def vectors_header(self, method: str) -> dict[str, Any] | None:
        """One method's metadata; None where there are no whole vectors of it. Needs no torch."""
        try:
            return _metadata(read_payload(self._vectors_path(method))[0])
        except StoreError:
            return None

    def methods(self) -> list[str]:
        """The methods that have vectors here."""
        return [path.stem for path in self._payload_paths("vectors") if receipt_path(path).exists()]

    def write_card(self, card: Mapping[str, Any]) -> None:
        """vectors/card.json: what the vectors are worth."""
        write_document(self.card_path, card)

    def has_card(self) -> bool:
        """Whether vectors/card.json is there."""
        return self.card_path.exists()

    def read_card(self) -> dict[str, Any]:
        """The card, without its seal."""
        return read_document(self.card_path)

    def write_steering(self, steering: Mapping[str, Any]) -> None:
        """vectors/steering.json: what steering with a vector does."""
        write_document(self.steering_path, steering)

    def has_steering(self) -> bool:
        """Whether vectors/steering.json is there."""
        return self.steering_path.exists()

    def read_steering(self) -> dict[str, Any]:
        """The steering sweep, without its seal."""
        return read_document(self.steering_path)

    def write_report(self, name: str, data: bytes) -> Path:
        """reports/<name>, for people to look at: without a receipt, and not verified."""
        path = self.report_path(name)
        _make_folder(path.parent, self.path)
        atomic_write(path, data)
        return path

    # Check

    def verify(self) -> list[Finding]:
        """Read the whole folder and return all that is wrong with it; empty when it is sound. Needs no torch."""
        findings = [Finding(path, "was left by a process that was killed", RERUN) for path in self._orphans()]
        with _noting(findings):
            self.read_config()
        with _noting(findings):
            if self.has_card():
                self.read_card()
        with _noting(findings):
            if self.has_steering():
                self.read_steering()
        for path in sorted((self.path / "judgements").glob("*.jsonl")):
            if None in read_lines(path):
                findings.append(
                    Finding(path, "has lines that were changed or damaged", f"{RERUN}: they are judged again")
                )
        labels = {name: self._verify_payloads(name, findings) for name in PAYLOADS}
        return [*findings, *self._strangers(labels)]

    def _verify_payloads(self, name: str, findings: list[Finding]) -> dict[Path, Labels]:
        """The examples of every sound payload of a folder; the others go to `findings`."""
        labels: dict[Path, Labels] = {}
        with _noting(findings):
            for path in self._payload_paths(name):
                with _noting(findings):
                    labels[path] = _read_labels(path)
        return labels

    def _strangers(self, labels: Mapping[str, Mapping[Path, Labels]]) -> Iterator[Finding]:
        """Examples that one file knows and its counterpart doesn't. A response without tokens needs no activation."""
        shards = {path.stem: rows for path, rows in labels["responses/shards"].items()}
        for path, ids in [*labels["activations"].items(), *labels["stripped"].items()]:
            rows = shards.get(path.stem, {})
            strange = [*(ids.keys() - rows.keys()), *(id for id, needed in rows.items() if needed and id not in ids)]
            if strange:
                problem = f"and the responses of its shard don't agree about example {min(strange)!r}"
                yield Finding(path, problem, f"delete both, then {REMAKE}")
        known = {id for rows in shards.values() for id in rows}
        for path, rows in labels["responses"].items():
            if lost := rows.keys() - known:
                yield Finding(path, f"has example {min(lost)!r}, which is in no sound shard", REMAKE)

    # Names

    @property
    def config_path(self) -> Path:
        """run.json: what the run is pinned to."""
        return self.path / "run.json"

    @property
    def card_path(self) -> Path:
        """vectors/card.json."""
        return self.path / "vectors" / "card.json"

    @property
    def steering_path(self) -> Path:
        """vectors/steering.json."""
        return self.path / "vectors" / "steering.json"

    def report_path(self, name: str = "report.html") -> Path:
        """reports/<name>."""
        return self.path / "reports" / safe_name(name, "report")

    def _shard_path(self, stage: str, index: int) -> Path:
        return self.path / STAGES[stage] / f"{index:04d}{PAYLOADS[STAGES[stage]]}"

    def responses_path(self, polarity: str) -> Path:
        """Where one side's responses lie."""
        return self.path / "responses" / f"{polarity}.jsonl"

    def _judgements_path(self, judge: str) -> Path:
        return self.path / "judgements" / f"{safe_name(judge, 'judge')}.jsonl"

    def _vectors_path(self, method: str) -> Path:
        return self.path / "vectors" / f"{safe_name(method, 'method')}.safetensors"

    def _payload_paths(self, name: str) -> list[Path]:
        """The payloads in a folder, in shard order; with those of which only the receipt is there."""
        folder, suffix = self.path / name, PAYLOADS[name]
        with reporting(folder, "read"):
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
        stems = {
            file.removesuffix(end)
            for end in (suffix, RECEIPT)
            for file in names
            if file.endswith(end) and file[0] != "."
        }
        return [folder / (stem + suffix) for stem in sorted(stems, key=lambda stem: (len(stem), stem))]

    def _orphans(self) -> list[Path]:
        return [path for name in (".", *FOLDERS) for path in orphans(self.path / name)]


# The bytes of the two formats. What was read has passed its sha256, so it is what we wrote.


def _jsonl(path: Path, rows: Iterable[Row]) -> bytes:
    """One object a line, its keys in the caller's order."""
    lines, ids = bytearray(), []
    with refusing_nan(path):
        for row in rows:
            ids.append(row["id"])
            lines += f"{to_json(row)}\n".encode()
    _check_labels(path, ids, {})
    return bytes(lines)


def _rows(data: bytes) -> Iterator[Row]:
    return (json.loads(line) for line in data.split(b"\n")[:-1])


def vectors_bytes(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A file of vectors: every value of `metadata` becomes JSON in its header, and the layer convention joins it."""
    return _safetensors(path, tensors, {**metadata, "layer_convention": LAYER_CONVENTION})


def _safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """The file's bytes. Each tensor is copied first, since safetensors refuses views and shared memory."""
    import torch
    from safetensors.torch import save

    form = torch.contiguous_format
    owned = {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}
    return _settled(save(owned, metadata={key: json.dumps(plain(path, value)) for key, value in header.items()}))


def _settled(data: bytes) -> bytes:
    """Sort the header's metadata, which safetensors writes in another order each time."""
    header, end = _split_header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def _split_header(data: bytes) -> tuple[dict[str, Any], int]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def _metadata(data: bytes) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in _split_header(data)[0]["__metadata__"].items()}


def _tensors(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(data)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()}


def _read_labels(path: Path) -> Labels:
    data, receipt = read_payload(path)
    if path.suffix == ".jsonl":
        labels = {row["id"]: bool(row.get("token_ids", True)) for row in _rows(data)}
    else:
        labels = dict.fromkeys(_metadata(data).get("ids", []), True)
    if len(labels) != receipt.get("rows", 0):
        raise complaint(path, f"holds {len(labels)} examples, but its receipt says {receipt['rows']}", DELETE)
    return labels


# Checks


def _make_folder(folder: Path, root: Path) -> None:
    with reporting(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    _check_inside(folder, root)
    check_writable(folder)


def _check_inside(path: Path, root: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        raise complaint(path, f"leads out of {root} through a symbolic link", "put a folder in the link's place")


def _check_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    theirs, ours = dict(_identity(stored)), dict(_identity(wanted))
    for name in sorted(theirs | ours):
        was, now = (_short(fields[name]) if name in fields else "absent" for fields in (theirs, ours))
        if (name in theirs) != (name in ours) or theirs[name] != ours[name]:
            problem = f"holds a run with another config: {name} was {was} and is now {now}"
            raise RunMismatch(Finding(folder, problem, _restart(folder)))


def _identity(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config by dotted name, without the EXECUTION_FIELDS."""
    if isinstance(value, Mapping):
        items = {key: item for key, item in value.items() if key not in EXECUTION_FIELDS}
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    else:
        yield name, value
        return
    if not items:
        yield name, items if isinstance(value, Mapping) else []
    for key, item in items.items():
        yield from _identity(item, f"{name}.{key}" if name else str(key))


def _restart(folder: Path) -> str:
    return f"choose another --experiment name, or delete {folder} to start again"


def _short(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_labels(path: Path, ids: Sequence[str], shapes: Mapping[str, Any]) -> None:
    if len(set(ids)) != len(ids):
        raise complaint(path, "would hold two rows of one example", "give every example its own id")
    for name, entry in shapes.items():
        example, shape = name.partition("/")[2], entry["shape"]
        fits = example in ids if example else shape[:1] == [len(ids)]
        if not fits:
            problem = f"tensor {name!r} of shape {shape} doesn't fit the {len(ids)} ids"
            raise complaint(path, problem, "label every row with the id of its example")


def _check_alike(folder: Path, name: str, parts: Sequence[Mapping[str, Any]]) -> None:
    if not parts:
        raise complaint(folder, "holds no activations", "extract them first")
    kinds = sorted({f"{part['dtype']} {part['shape'][1:]}" for part in parts})
    if len(kinds) > 1:
        raise complaint(
            folder, f"the shards disagree about {name!r}: {' and '.join(kinds)}", f"delete it, then {REMAKE}"
        )


def _pick(path: Path, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise complaint(path, f"has no {name!r}, but {', '.join(list(tensors)[:6])}", "capture it, or ask for another")
    return tensors[name]


@contextmanager
def _noting(findings: list[Finding]) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        findings.append(error.args[0])
