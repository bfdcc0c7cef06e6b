"""The folder of one trait's run: the names and contents of its files, and which of them are complete.

Equal inputs give equal bytes: no times, no absolute paths, sorted keys. Torch is imported only by methods of tensors.
Shapes: n examples, T tokens, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from extraction.core.errors import ConfigError, StoreError
from extraction.core.names import check_name
from extraction.core.records import LAYER_CONVENTION, POLARITIES
from extraction.storage.atomic import (
    DELETE,
    REMAKE,
    RERUN,
    Finding,
    append_lines,
    check_size,
    read_data,
    read_document,
    read_lines,
    read_receipt,
    receipt_path,
    store_error,
    write_document,
    write_with_receipt,
)
from extraction.storage.lazy_tensors import LazyTensor, open_checked
from extraction.storage.run_dir import RunDir, check_inside, collecting_findings
from extraction.storage.serialization import (
    Row,
    check_row_ids,
    describe_tensors,
    load_tensors,
    parse_jsonl,
    read_metadata,
    safetensors_bytes,
    to_jsonl,
)

if TYPE_CHECKING:
    from torch import Tensor

Examples = Mapping[str, bool]  # by id: True if the example must have an activation

STAGES = {"responses": "responses/shards", "activations": "activations", "stripped": "stripped"}
CAPTURES = "captures"  # an experiment's folder of capture sets, so no trait may have that name


def trait_run(root: str | Path, experiment: str, trait: str) -> TraitRun:
    """Return the folder of one trait of one experiment. Raises StoreError if a symbolic link leads out of `root`."""
    if trait.casefold() == CAPTURES:
        raise ConfigError(
            f"trait {trait!r} can't be the name of a run: that folder holds captures; give it another name"
        )
    path = Path(root) / check_name(experiment, "experiment") / check_name(trait, "trait")
    check_inside(path, Path(root))
    return TraitRun(path)


@dataclass(frozen=True)
class TraitRun(RunDir):
    """The folder of one trait's run. Work in it under `lock()`, after `open(config)`."""

    DATA_FOLDERS: ClassVar[Mapping[str, str]] = {
        "responses/shards": ".jsonl",
        "responses": ".jsonl",
        "activations": ".safetensors",
        "stripped": ".safetensors",
        "vectors": ".safetensors",
    }
    PLAIN_FOLDERS = ("judgements", "reports")
    DOCUMENTS = ("vectors/card.json", "vectors/steering.json")
    MAIN_REPORT = "report.html"
    RESTART_CHOICE = "choose another --experiment name, or "
    LOCKED_REMEDY = "wait for it to end, or give this run another --experiment name"

    # --- shards

    def shard_done(self, stage: str, index: int) -> bool:
        """Return True if the shard has a receipt and the receipt's size."""
        try:
            check_size(self._shard_path(stage, index))
        except StoreError:
            return False
        return True

    def write_responses_shard(self, index: int, rows: Sequence[Row], meta: Mapping[str, Any]) -> None:
        """Write one shard's responses, a row an example with its `id`. `meta` goes into the receipt."""
        path = self._shard_path("responses", index)
        write_with_receipt(path, to_jsonl(path, rows), {"rows": len(rows), "meta": dict(meta)})

    def read_responses_shard(self, index: int) -> list[Row]:
        """Return one shard's responses, in the order written."""
        return list(parse_jsonl(read_data(self._shard_path("responses", index))[0]))

    def write_activations_shard(
        self,
        index: int,
        ids: Sequence[str],
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        stage: str = "activations",
    ) -> None:
        """Write one shard's activations.

        `<site>.<pooling>` is [n, L, D], row i of example ids[i]; `<site>.all/<id>` is one example's [T, L, D]. `stage`
        is `activations`, or `stripped` for those of the same responses with the instruction removed from the prompt.
        """
        path, shapes = self._shard_path(stage, index), describe_tensors(tensors)
        check_row_ids(path, ids, shapes)
        header = {"ids": list(ids), "layer_convention": LAYER_CONVENTION}
        facts = {"rows": len(ids), "layer_convention": LAYER_CONVENTION, "tensors": shapes, "meta": dict(meta)}
        write_with_receipt(path, safetensors_bytes(path, tensors, header), facts)

    def open_activations(self, name: str, *, stage: str = "activations") -> LazyTensor:
        """Return all rows of one tensor, in shard order, to be read some layers at a time. Every sha256 is checked."""
        paths = self._data_paths(STAGES[stage])
        tensors = [_tensor_of(path, read_receipt(path)["tensors"], name) for path in paths]
        _check_same_kind(self.path / STAGES[stage], name, tensors)
        n = sum(tensor["shape"][0] for tensor in tensors)
        files = tuple(open_checked(path) for path in paths)
        return LazyTensor(name, files, (n, *tensors[0]["shape"][1:]), tensors[0]["dtype"])

    # --- results

    def shard_checksums(self, stage: str) -> list[str]:
        """Return the sha256 of every shard of a stage, in order."""
        return [str(read_receipt(path)["sha256"]) for path in self._data_paths(STAGES[stage])]

    def shard_receipt(self, stage: str, index: int) -> dict[str, Any]:
        """Return a shard's receipt: the writer's `meta` and, of activations, shape and dtype of the `tensors`."""
        return read_receipt(self._shard_path(stage, index))

    def write_responses(self, rows_by_polarity: Mapping[str, Iterable[Row]], sources: Sequence[str] = ()) -> None:
        """Write responses/pos.jsonl and neg.jsonl: the shards' rows with their scores.

        `sources` goes into both receipts: the checksums of the shards and what else the scores depend on.
        """
        for polarity in POLARITIES:
            path = self.responses_path(polarity)
            data = to_jsonl(path, rows_by_polarity[polarity])
            write_with_receipt(path, data, {"rows": data.count(b"\n"), "sources": list(sources)})

    def response_sources(self) -> list[str] | None:
        """Return the `sources` of both files of responses; None if one is incomplete or they differ."""
        try:
            for path in map(self.responses_path, POLARITIES):
                check_size(path)
            sources = [read_receipt(self.responses_path(polarity))["sources"] for polarity in POLARITIES]
        except StoreError:
            return None
        return list(sources[0]) if sources[0] == sources[1] else None

    def read_responses(self, polarity: str) -> Iterator[Row]:
        """Yield one polarity's responses with their scores."""
        return parse_jsonl(read_data(self.responses_path(polarity))[0])

    def add_judgements(self, judge: str, rows: Iterable[Row]) -> None:
        """Append rows, each with its `key`, to a judge's log, and sync it."""
        append_lines(self._judgements_path(judge), rows)

    def read_judgements(self, judge: str) -> dict[str, Row]:
        """Return a judge's log by key, without torn or damaged lines."""
        return {row["key"]: row for row in read_lines(self._judgements_path(judge)) if row}

    def write_vectors(self, method: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write one method's tensors ([L, D]); every value of `metadata` becomes JSON in the file's header."""
        path = self._vectors_path(method)
        write_with_receipt(path, vectors_bytes(path, tensors, metadata), {"tensors": describe_tensors(tensors)})

    def read_vectors(self, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return one method's tensors and metadata."""
        data, _ = read_data(self._vectors_path(method))
        return load_tensors(data), read_metadata(data)

    def vectors_path(self, method: str) -> Path:
        """Return the path of one method's vectors."""
        return self._vectors_path(method)

    def vectors_header(self, method: str) -> dict[str, Any] | None:
        """Return the metadata of one method's vectors; None if they are missing or damaged. Needs no torch."""
        try:
            return read_metadata(read_data(self._vectors_path(method))[0])
        except StoreError:
            return None

    def methods(self) -> list[str]:
        """Return the methods that have vectors."""
        return [path.stem for path in self._data_paths("vectors") if receipt_path(path).exists()]

    def write_card(self, card: Mapping[str, Any]) -> None:
        """Write vectors/card.json: the vectors' held-out scores, controls and verdict."""
        write_document(self.card_path, card)

    def has_card(self) -> bool:
        """Return True if vectors/card.json exists."""
        return self.card_path.exists()

    def read_card(self) -> dict[str, Any]:
        """Return the card without its checksum."""
        return read_document(self.card_path)

    def write_steering(self, steering: Mapping[str, Any]) -> None:
        """Write vectors/steering.json: the results of the steering sweep."""
        write_document(self.steering_path, steering)

    def has_steering(self) -> bool:
        """Return True if vectors/steering.json exists."""
        return self.steering_path.exists()

    def read_steering(self) -> dict[str, Any]:
        """Return the steering sweep without its checksum."""
        return read_document(self.steering_path)

    # --- verification

    def verify(self) -> list[Finding]:
        """Check every file's checksum and the examples of every shard; return the problems found. Needs no torch."""
        findings = self._verify_documents()
        for path in sorted((self.path / "judgements").glob("*.jsonl")):
            if None in read_lines(path):
                findings.append(
                    Finding(path, "has lines that were changed or damaged", f"{RERUN}: they are judged again")
                )
        labels = {name: self._verify_files(name, findings) for name in self.DATA_FOLDERS}
        return [*findings, *self._unmatched_examples(labels)]

    def _verify_files(self, name: str, findings: list[Finding]) -> dict[Path, Examples]:
        """Return the examples of every intact data file of a folder; append the others to `findings`."""
        labels: dict[Path, Examples] = {}
        with collecting_findings(findings):
            for path in self._data_paths(name):
                with collecting_findings(findings):
                    labels[path] = _examples_in(path)
        return labels

    def _unmatched_examples(self, labels: Mapping[str, Mapping[Path, Examples]]) -> Iterator[Finding]:
        """Yield a finding for examples that only one of two related files has. An empty response has no activation."""
        shards = {path.stem: rows for path, rows in labels["responses/shards"].items()}
        for path, ids in [*labels["activations"].items(), *labels["stripped"].items()]:
            rows = shards.get(path.stem, {})
            unmatched = [*(ids.keys() - rows.keys()), *(id for id, needed in rows.items() if needed and id not in ids)]
            if unmatched:
                problem = f"and the responses of its shard don't agree about example {min(unmatched)!r}"
                yield Finding(path, problem, f"delete both, then {REMAKE}")
        known = {id for rows in shards.values() for id in rows}
        for path, rows in labels["responses"].items():
            if lost := rows.keys() - known:
                yield Finding(path, f"has example {min(lost)!r}, which is in no intact shard", REMAKE)

    # --- paths

    @property
    def card_path(self) -> Path:
        """Path of vectors/card.json."""
        return self.path / "vectors" / "card.json"

    @property
    def steering_path(self) -> Path:
        """Path of vectors/steering.json."""
        return self.path / "vectors" / "steering.json"

    def _shard_path(self, stage: str, index: int) -> Path:
        return self.path / STAGES[stage] / f"{index:04d}{self.DATA_FOLDERS[STAGES[stage]]}"

    def responses_path(self, polarity: str) -> Path:
        """Return the path of one side's responses."""
        return self.path / "responses" / f"{polarity}.jsonl"

    def _judgements_path(self, judge: str) -> Path:
        return self.path / "judgements" / f"{check_name(judge, 'judge')}.jsonl"

    def _vectors_path(self, method: str) -> Path:
        return self.path / "vectors" / f"{check_name(method, 'method')}.safetensors"


def vectors_bytes(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of vectors: every value of `metadata`, and the layer convention, in its header."""
    return safetensors_bytes(path, tensors, {**metadata, "layer_convention": LAYER_CONVENTION})


def _examples_in(path: Path) -> Examples:
    data, receipt = read_data(path)
    if path.suffix == ".jsonl":
        labels = {row["id"]: bool(row.get("token_ids", True)) for row in parse_jsonl(data)}
    else:
        labels = dict.fromkeys(read_metadata(data).get("ids", []), True)
    if len(labels) != receipt.get("rows", 0):
        raise store_error(path, f"holds {len(labels)} examples, but its receipt says {receipt['rows']}", DELETE)
    return labels


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_same_kind(folder: Path, name: str, parts: Sequence[Mapping[str, Any]]) -> None:
    if not parts:
        raise store_error(folder, "holds no activations", "extract them first")
    kinds = sorted({f"{part['dtype']} {part['shape'][1:]}" for part in parts})
    if len(kinds) > 1:
        raise store_error(
            folder, f"the shards disagree about {name!r}: {' and '.join(kinds)}", f"delete it, then {REMAKE}"
        )


def _tensor_of(path: Path, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise store_error(
            path, f"has no {name!r}, but {', '.join(list(tensors)[:6])}", "capture it, or ask for another"
        )
    return tensors[name]
