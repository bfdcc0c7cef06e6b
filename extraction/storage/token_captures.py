"""Token captures: the folder of a capture set, which holds per-token readings of one file's prompts under one config.

    experiments/<experiment>/captures/<tier2|tier3>-<stem of the prompt file>-<8 hex of the config>/
      run.json                      the config and its fingerprint, with a checksum
      prompts/<id>.safetensors      one prompt's tensors, labelled in the file's header; ids p0000, p0001, ...
      prompts/<id>.receipt.json     its sha256; written last
      prompts/<id>.json             the same as plain JSON (optional)
      dynamics.json                 every trait's projection along every response, with a checksum
      reports/                      a page and pictures

Shapes: T tokens (prompt, then response), P prompt tokens, R response tokens (T = P + R).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from extraction.core.errors import ConfigError, StoreError
from extraction.core.names import check_name
from extraction.storage.atomic import (
    DELETE,
    Finding,
    atomic_write,
    check_size,
    read_data,
    read_document,
    reject_nan,
    store_error,
    to_json,
    write_document,
    write_with_receipt,
)
from extraction.storage.run_dir import RunDir, check_inside, collecting_findings, fingerprint
from extraction.storage.serialization import (
    describe_tensors,
    load_tensors,
    read_metadata,
    read_shapes,
    safetensors_bytes,
)
from extraction.storage.trait_run import CAPTURES

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("tokens", "pieces", "token_ids")  # lists of a prompt's header with one entry a token
ATTENTION = "attention"  # in tier 2 it has rows of response tokens only
_ID = re.compile(r"p([0-9]{4}|[1-9][0-9]{4,8})")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_STEM = 64 - len("tier2-") - len("-01234567")


def set_name(tier: int, stem: str, config: Mapping[str, Any]) -> str:
    """Return the folder name of a prompt file's captures, which depends on the config.

    Characters that are not safe in a file name become '-'; the fingerprint keeps such names apart.
    """
    return f"tier{tier}-{_UNSAFE.sub('-', stem)[:_MAX_STEM]}-{fingerprint(config)[:8]}"


def prompt_id(index: int) -> str:
    """Return the id of a prompt by its index in the file, from 0."""
    return f"p{index:04d}"


def capture_set(root: str | Path, experiment: str, name: str) -> CaptureSet:
    """Return the folder of one capture set. Raises StoreError if a symbolic link leads out of `root`."""
    path = Path(root) / check_name(experiment, "experiment") / CAPTURES / check_name(name, "capture set")
    check_inside(path, Path(root))
    return CaptureSet(path)


@dataclass(frozen=True)
class CaptureSet(RunDir):
    """One capture set's folder. Work in it under `lock()`, after `open(config)`."""

    DATA_FOLDERS: ClassVar[Mapping[str, str]] = {"prompts": ".safetensors"}
    PLAIN_FOLDERS = ("reports",)
    DOCUMENTS = ("dynamics.json",)
    MAIN_REPORT = "page.html"
    RESTART_CHOICE = ""  # another config already has another name
    LOCKED_REMEDY = "wait for it to end"

    # --- prompts

    def prompt_done(self, id: str) -> bool:
        """Return True if the prompt's file has a receipt and the receipt's size."""
        try:
            check_size(self.prompt_path(id))
        except StoreError:
            return False
        return True

    def prompt_ids(self) -> list[str]:
        """Return the ids of the finished prompts, in order."""
        stems = [path.stem for path in self._data_paths("prompts")]
        return [stem for stem in stems if _ID.fullmatch(stem) and self.prompt_done(stem)]

    def write_prompt(
        self, id: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Write one prompt's tensors; `meta` goes into the receipt.

        Raises StoreError unless `header` has this id, one entry a token in each of `tokens`, `pieces` and `token_ids`,
        and under `tensors` the names of every tensor's axes.
        """
        path, shapes = self.prompt_path(id), describe_tensors(tensors)
        _check_labels(path, header, {name: entry["shape"] for name, entry in shapes.items()}, "label every row")
        write_with_receipt(path, safetensors_bytes(path, tensors, header), {"tensors": shapes, "meta": dict(meta)})

    def read_prompt(self, id: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return one prompt's tensors and header, after a check of the file's sha256."""
        data, _ = read_data(self.prompt_path(id))
        return load_tensors(data), read_metadata(data)

    def prompt_header(self, id: str) -> dict[str, Any]:
        """Return one prompt's header, after a check of the file's sha256. Needs no torch."""
        return read_metadata(read_data(self.prompt_path(id))[0])

    def prompt_path(self, id: str) -> Path:
        """Return the path of one prompt's tensors."""
        return self.path / "prompts" / f"{_check_id(id)}.safetensors"

    def write_json(self, id: str, value: Any) -> Path:
        """Write one prompt as plain JSON with sorted keys, without a receipt: it is not verified."""
        path = self.json_path(id)
        with reject_nan(path):
            data = f"{to_json(value, sort_keys=True)}\n".encode()
        atomic_write(path, data)
        return path

    def json_path(self, id: str) -> Path:
        """Return the path of one prompt's plain JSON."""
        return self.path / "prompts" / f"{_check_id(id)}.json"

    # --- results

    def write_dynamics(self, document: Mapping[str, Any]) -> None:
        """Write dynamics.json: every trait's projection along every response."""
        write_document(self.dynamics_path, document)

    def has_dynamics(self) -> bool:
        """Return True if dynamics.json exists."""
        return self.dynamics_path.exists()

    def read_dynamics(self) -> dict[str, Any]:
        """Return dynamics.json without its checksum."""
        return read_document(self.dynamics_path)

    @property
    def dynamics_path(self) -> Path:
        """Path of dynamics.json."""
        return self.path / "dynamics.json"

    # --- verification

    def verify(self) -> list[Finding]:
        """Check every file's checksum and labels and return the problems found. Needs no torch."""
        findings = self._verify_documents()
        with collecting_findings(findings):
            for path in self._data_paths("prompts"):
                with collecting_findings(findings):
                    data, _ = read_data(path)
                    _check_labels(path, read_metadata(data), read_shapes(data), DELETE)
        return findings


def _check_id(id: str) -> str:
    if not _ID.fullmatch(id):
        raise ConfigError(f"prompt {id[:80]!r} is not an id: use p0000, p0001, and so on")
    return id


def _check_labels(path: Path, header: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], remedy: str) -> None:
    """Raise StoreError unless the header has the file's id and labels every row of every tensor."""
    try:
        problem = next(_label_problems(path.stem, header, shapes), None)
    except (KeyError, TypeError) as error:
        problem = f"has a header without labels for its rows ({error!r})"
    if problem:
        raise store_error(path, problem, remedy)


def _label_problems(id: str, header: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    if header["id"] != id:
        yield f"holds prompt {header['id']!r}"
    n_tokens, n_prompt, axes = len(header["token_ids"]), header["n_prompt"], header["tensors"]
    for name in LABELS:
        if len(header[name]) != n_tokens:
            yield f"has {n_tokens} token_ids, but {len(header[name])} {name}"
    if not 0 <= n_prompt <= n_tokens:
        yield f"has {n_tokens} tokens, but n_prompt is {n_prompt}"
    if axes.keys() != shapes.keys():
        yield f"has the tensors {sorted(shapes)}, but names the axes of {sorted(axes)}"
    sizes = {"token": n_tokens, "layer": len(header["layers"]), "point": len(header["points"])}
    for name, shape in shapes.items():
        rows = n_tokens - n_prompt if (header["tier"], name) == (2, ATTENTION) else n_tokens
        wanted = [rows, *(sizes.get(axis, size) for axis, size in zip(axes[name][1:], shape[1:], strict=False))]
        if len(shape) != len(axes[name]) or list(shape) != wanted:
            yield f"tensor {name!r} of shape {list(shape)} doesn't fit its axes {list(axes[name])}: expected {wanted}"
