"""A run's folder: what its files are called, what is in them, and which of them are done.

The same inputs give the same bytes: no times, no absolute paths, sorted keys. Torch is imported only where tensors are.
Shapes: n examples, T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from extraction.core.errors import ConfigError, StoreError
from extraction.core.names import check_name
from extraction.core.records import POLARITIES
from extraction.storage.atomic import (
    DELETE,
    REMAKE,
    RERUN,
    Finding,
    append_lines,
    check_payload,
    commit,
    read_document,
    read_lines,
    read_payload,
    read_receipt,
    receipt_path,
    store_error,
    write_document,
)
from extraction.storage.lazy_tensors import StoredTensors, checked_part
from extraction.storage.run_dir import RunDir, check_inside, record_location
from extraction.storage.serialization import (
    Row,
    check_labels,
    metadata_of,
    parse_jsonl,
    safetensors_bytes,
    shapes_of,
    tensors_of,
    to_jsonl,
)

if TYPE_CHECKING:
    from torch import Tensor

Labels = Mapping[str, bool]  # an example's id, and whether it must have an activation

LAYER_CONVENTION = "layer k is the output of decoder block k, counted from 0; the embeddings are not a layer"
STAGES = {"responses": "responses/shards", "activations": "activations", "stripped": "stripped"}
CAPTURES = "captures"  # the folder of an experiment where its capture sets lie; so no trait is called that


def trait_run(root: str | Path, experiment: str, trait: str) -> TraitRun:
    """The folder of one trait of one experiment. StoreError when a symbolic link leads it out of `root`."""
    if trait.casefold() == CAPTURES:
        raise ConfigError(f"trait {trait!r} can't be the name of a run: captures lie there; give it another name")
    path = Path(root) / check_name(experiment, "experiment") / check_name(trait, "trait")
    check_inside(path, Path(root))
    return TraitRun(path)


@dataclass(frozen=True)
class TraitRun(RunDir):
    """One run's folder. Work in it under `lock()`, after `open(config)`."""

    PAYLOADS: ClassVar[Mapping[str, str]] = {
        "responses/shards": ".jsonl",
        "responses": ".jsonl",
        "activations": ".safetensors",
        "stripped": ".safetensors",
        "vectors": ".safetensors",
    }
    OTHERS = ("judgements", "reports")
    REPORT = "report.html"
    APART = "choose another --experiment name, or "
    WAIT = "wait for it to end, or give this run another --experiment name"

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
        commit(path, to_jsonl(path, rows), {"rows": len(rows), "meta": dict(meta)})

    def read_responses_shard(self, index: int) -> list[Row]:
        """The rows of one shard, in the order written."""
        return list(parse_jsonl(read_payload(self._shard_path("responses", index))[0]))

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
        path, shapes = self._shard_path(stage, index), shapes_of(tensors)
        check_labels(path, ids, shapes)
        header = {"ids": list(ids), "layer_convention": LAYER_CONVENTION}
        facts = {"rows": len(ids), "layer_convention": LAYER_CONVENTION, "tensors": shapes, "meta": dict(meta)}
        commit(path, safetensors_bytes(path, tensors, header), facts)

    def iter_activations(
        self, names: Sequence[str] | None = None, *, stage: str = "activations"
    ) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """(ids, tensors) of every shard, in shard order; `names` picks tensors. Every sha256 is checked."""
        for path in self._payload_paths(STAGES[stage]):
            data, _ = read_payload(path)
            tensors = tensors_of(data)
            yield metadata_of(data)["ids"], {name: _pick(path, tensors, name) for name in names or tensors}

    def open_activations(self, name: str, *, stage: str = "activations") -> StoredTensors:
        """All rows of one tensor, in shard order, to be read some layers at a time. Every sha256 is checked, once."""
        paths = self._payload_paths(STAGES[stage])
        tensors = [_pick(path, read_receipt(path)["tensors"], name) for path in paths]
        _check_alike(self.path / STAGES[stage], name, tensors)
        n = sum(tensor["shape"][0] for tensor in tensors)
        parts = tuple(checked_part(path) for path in paths)
        return StoredTensors(name, parts, (n, *tensors[0]["shape"][1:]), tensors[0]["dtype"])

    def load_activations(self, name: str, *, stage: str = "activations") -> tuple[list[str], Tensor]:
        """All rows of one tensor, [n, L, D], in shard order; takes the room of the result and of one shard."""
        stored = self.open_activations(name, stage=stage)
        return list(stored.ids), stored.pick(stored.ids, range(stored.shape[1])).read_layers(slice(None))

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
            data = to_jsonl(path, rows_by_polarity[polarity])
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
        return parse_jsonl(read_payload(self.responses_path(polarity))[0])

    def add_judgements(self, judge: str, rows: Iterable[Row]) -> None:
        """Put rows, each with its `key`, into a judge's log; they are on the disk when this returns."""
        append_lines(self._judgements_path(judge), rows)

    def read_judgements(self, judge: str) -> dict[str, Row]:
        """A judge's log by key. A line that was torn or damaged is not in it."""
        return {row["key"]: row for row in read_lines(self._judgements_path(judge)) if row}

    def write_vectors(self, method: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """One method's tensors ([L, D]); every value of `metadata` becomes JSON in the file's header."""
        path = self._vectors_path(method)
        commit(path, vectors_bytes(path, tensors, metadata), {"tensors": shapes_of(tensors)})

    def read_vectors(self, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One method's tensors and metadata."""
        data, _ = read_payload(self._vectors_path(method))
        return tensors_of(data), metadata_of(data)

    def vectors_path(self, method: str) -> Path:
        """Where one method's vectors lie."""
        return self._vectors_path(method)

    def vectors_header(self, method: str) -> dict[str, Any] | None:
        """One method's metadata; None where there are no whole vectors of it. Needs no torch."""
        try:
            return metadata_of(read_payload(self._vectors_path(method))[0])
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

    # Check

    def verify(self) -> list[Finding]:
        """Read the whole folder and return all that is wrong with it; empty when it is sound. Needs no torch."""
        findings = self._orphan_findings()
        with record_location(findings):
            self.read_config()
        with record_location(findings):
            if self.has_card():
                self.read_card()
        with record_location(findings):
            if self.has_steering():
                self.read_steering()
        for path in sorted((self.path / "judgements").glob("*.jsonl")):
            if None in read_lines(path):
                findings.append(
                    Finding(path, "has lines that were changed or damaged", f"{RERUN}: they are judged again")
                )
        labels = {name: self._verify_payloads(name, findings) for name in self.PAYLOADS}
        return [*findings, *self._strangers(labels)]

    def _verify_payloads(self, name: str, findings: list[Finding]) -> dict[Path, Labels]:
        """The examples of every sound payload of a folder; the others go to `findings`."""
        labels: dict[Path, Labels] = {}
        with record_location(findings):
            for path in self._payload_paths(name):
                with record_location(findings):
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
    def card_path(self) -> Path:
        """vectors/card.json."""
        return self.path / "vectors" / "card.json"

    @property
    def steering_path(self) -> Path:
        """vectors/steering.json."""
        return self.path / "vectors" / "steering.json"

    def _shard_path(self, stage: str, index: int) -> Path:
        return self.path / STAGES[stage] / f"{index:04d}{self.PAYLOADS[STAGES[stage]]}"

    def responses_path(self, polarity: str) -> Path:
        """Where one side's responses lie."""
        return self.path / "responses" / f"{polarity}.jsonl"

    def _judgements_path(self, judge: str) -> Path:
        return self.path / "judgements" / f"{check_name(judge, 'judge')}.jsonl"

    def _vectors_path(self, method: str) -> Path:
        return self.path / "vectors" / f"{check_name(method, 'method')}.safetensors"


def vectors_bytes(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A file of vectors: every value of `metadata` becomes JSON in its header, and the layer convention joins it."""
    return safetensors_bytes(path, tensors, {**metadata, "layer_convention": LAYER_CONVENTION})


def _read_labels(path: Path) -> Labels:
    data, receipt = read_payload(path)
    if path.suffix == ".jsonl":
        labels = {row["id"]: bool(row.get("token_ids", True)) for row in parse_jsonl(data)}
    else:
        labels = dict.fromkeys(metadata_of(data).get("ids", []), True)
    if len(labels) != receipt.get("rows", 0):
        raise store_error(path, f"holds {len(labels)} examples, but its receipt says {receipt['rows']}", DELETE)
    return labels


# Checks


def _check_alike(folder: Path, name: str, parts: Sequence[Mapping[str, Any]]) -> None:
    if not parts:
        raise store_error(folder, "holds no activations", "extract them first")
    kinds = sorted({f"{part['dtype']} {part['shape'][1:]}" for part in parts})
    if len(kinds) > 1:
        raise store_error(
            folder, f"the shards disagree about {name!r}: {' and '.join(kinds)}", f"delete it, then {REMAKE}"
        )


def _pick(path: Path, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise store_error(
            path, f"has no {name!r}, but {', '.join(list(tensors)[:6])}", "capture it, or ask for another"
        )
    return tensors[name]
