"""A capture set's folder: what was read, token by token, of the prompts of one file under one config.

    experiments/<experiment>/captures/<tier2|tier3>-<stem of the prompt file>-<8 hex of the config>/
      run.json                      the config and its fingerprint, sealed
      prompts/<id>.safetensors      one prompt's tensors, labelled in the file's header; ids p0000, p0001, ...
      prompts/<id>.receipt.json     its sha256; written last
      prompts/<id>.json             the same as plain JSON, where it was asked for
      dynamics.json                 sealed
      reports/                      a page and pictures, for people to look at

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
    check_payload,
    commit,
    read_document,
    read_payload,
    reject_nan,
    store_error,
    to_json,
    write_document,
)
from extraction.storage.run_dir import RunDir, check_inside, fingerprint, record_location
from extraction.storage.serialization import metadata_of, safetensors_bytes, shapes_in, shapes_of, tensors_of
from extraction.storage.trait_run import CAPTURES

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("tokens", "pieces", "token_ids")  # one a token, in a prompt's header
ATTENTION = "attention"  # tier 2 keeps the rows of response tokens alone
_ID = re.compile(r"p([0-9]{4}|[1-9][0-9]{4,8})")
_STRANGE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST = 64 - len("tier2-") - len("-01234567")


def set_name(tier: int, stem: str, config: Mapping[str, Any]) -> str:
    """The folder of a prompt file's captures: another config has another name, and the same one finds it again.

    What no file can be called by on every system becomes '-': the fingerprint tells such names apart.
    """
    return f"tier{tier}-{_STRANGE.sub('-', stem)[:_LONGEST]}-{fingerprint(config)[:8]}"


def prompt_id(index: int) -> str:
    """The id of a set's prompt by its place in the file, from 0."""
    return f"p{index:04d}"


def capture_set(root: str | Path, experiment: str, name: str) -> CaptureSet:
    """The folder of one capture set. StoreError when a symbolic link leads it out of `root`."""
    path = Path(root) / check_name(experiment, "experiment") / CAPTURES / check_name(name, "capture set")
    check_inside(path, Path(root))
    return CaptureSet(path)


@dataclass(frozen=True)
class CaptureSet(RunDir):
    """One capture set's folder. Work in it under `lock()`, after `open(config)`."""

    PAYLOADS: ClassVar[Mapping[str, str]] = {"prompts": ".safetensors"}
    OTHERS = ("reports",)
    REPORT = "page.html"
    APART = ""  # another config has another name already
    WAIT = "wait for it to end"

    # Prompts

    def prompt_done(self, id: str, *, deep: bool = False) -> bool:
        """True when the prompt's receipt is whole and its payload has the right size (`deep`: the right sha256)."""
        try:
            (read_payload if deep else check_payload)(self.prompt_path(id))
        except StoreError:
            return False
        return True

    def prompt_ids(self) -> list[str]:
        """The prompts that are done, in order."""
        stems = [path.stem for path in self._payload_paths("prompts")]
        return [stem for stem in stems if _ID.fullmatch(stem) and self.prompt_done(stem)]

    def write_prompt(
        self, id: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """What was read of one prompt: its tensors, what says what they are, and what the receipt is to remember.

        StoreError unless `header` is of this id and labels every row: `tokens`, `pieces` and `token_ids` one a token,
        and under `tensors` the names of every tensor's axes.
        """
        path, shapes = self.prompt_path(id), shapes_of(tensors)
        _check_labels(path, header, {name: entry["shape"] for name, entry in shapes.items()}, "label every row")
        commit(path, safetensors_bytes(path, tensors, header), {"tensors": shapes, "meta": dict(meta)})

    def read_prompt(self, id: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One prompt's tensors and header, found to be those that were written."""
        data, _ = read_payload(self.prompt_path(id))
        return tensors_of(data), metadata_of(data)

    def prompt_header(self, id: str) -> dict[str, Any]:
        """One prompt's header, of a file found to be sound. Needs no torch."""
        return metadata_of(read_payload(self.prompt_path(id))[0])

    def prompt_path(self, id: str) -> Path:
        """Where one prompt's tensors lie."""
        return self.path / "prompts" / f"{_checked(id)}.safetensors"

    def write_json(self, id: str, value: Any) -> Path:
        """One prompt as plain JSON, keys sorted, for other programs: without a receipt, and not verified."""
        path = self.json_path(id)
        with reject_nan(path):
            data = f"{to_json(value, sort_keys=True)}\n".encode()
        atomic_write(path, data)
        return path

    def json_path(self, id: str) -> Path:
        """Where one prompt's plain JSON lies."""
        return self.path / "prompts" / f"{_checked(id)}.json"

    # Results

    def write_dynamics(self, document: Mapping[str, Any]) -> None:
        """dynamics.json: how every trait's projection moves along every response."""
        write_document(self.dynamics_path, document)

    def has_dynamics(self) -> bool:
        """Whether dynamics.json is there."""
        return self.dynamics_path.exists()

    def read_dynamics(self) -> dict[str, Any]:
        """The dynamics, without their seal."""
        return read_document(self.dynamics_path)

    @property
    def dynamics_path(self) -> Path:
        """dynamics.json."""
        return self.path / "dynamics.json"

    # Check

    def verify(self) -> list[Finding]:
        """Read the whole folder and return all that is wrong with it; empty when it is sound. Needs no torch."""
        findings = self._orphan_findings()
        with record_location(findings):
            self.read_config()
        with record_location(findings):
            if self.has_dynamics():
                self.read_dynamics()
        with record_location(findings):
            for path in self._payload_paths("prompts"):
                with record_location(findings):
                    data, _ = read_payload(path)
                    _check_labels(path, metadata_of(data), shapes_in(data), DELETE)
        return findings


def _checked(id: str) -> str:
    if not _ID.fullmatch(id):
        raise ConfigError(f"prompt {id[:80]!r} is no id: use p0000, p0001, and so on")
    return id


def _check_labels(path: Path, header: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], remedy: str) -> None:
    """StoreError unless the header is this file's and says what every row of every tensor is."""
    try:
        problem = next(_misfits(path.stem, header, shapes), None)
    except (KeyError, TypeError) as error:
        problem = f"has a header that doesn't say what its rows are ({error!r})"
    if problem:
        raise store_error(path, problem, remedy)


def _misfits(id: str, header: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    if header["id"] != id:
        yield f"holds prompt {header['id']!r}"
    n_tokens, n_prompt, axes = len(header["token_ids"]), header["n_prompt"], header["tensors"]
    for name in LABELS:
        if len(header[name]) != n_tokens:
            yield f"has {n_tokens} token_ids, but {len(header[name])} {name}"
    if not 0 <= n_prompt <= n_tokens:
        yield f"has {n_tokens} tokens, of which {n_prompt} are said to be the prompt's"
    if axes.keys() != shapes.keys():
        yield f"has the tensors {sorted(shapes)}, but names the axes of {sorted(axes)}"
    sizes = {"token": n_tokens, "layer": len(header["layers"]), "point": len(header["points"])}
    for name, shape in shapes.items():
        rows = n_tokens - n_prompt if (header["tier"], name) == (2, ATTENTION) else n_tokens
        wanted = [rows, *(sizes.get(axis, size) for axis, size in zip(axes[name][1:], shape[1:], strict=False))]
        if len(shape) != len(axes[name]) or list(shape) != wanted:
            yield f"tensor {name!r} of shape {list(shape)} doesn't fit its axes {list(axes[name])}: {wanted} is due"
