"""Folders that are pinned to a config: their names, their lock, who may begin and go on, and what every one can do.

A run's folder (store) and a capture set's (capture_store) are two such. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from extraction.config.settings import ADDED, EXECUTION_FIELDS
from extraction.core.errors import RunMismatch, StoreError
from extraction.core.names import check_name
from extraction.storage.atomic import (
    RECEIPT,
    RERUN,
    Finding,
    atomic_write,
    check_writable,
    digest,
    hold_lock,
    orphans,
    read_document,
    remove,
    reporting_store_errors,
    store_error,
    to_builtin,
    to_json,
    write_document,
)


def check_inside(path: Path, root: Path) -> None:
    """StoreError when a symbolic link leads `path` out of `root`, which may be a link itself."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        raise store_error(path, f"leads out of {root} through a symbolic link", "put a folder in the link's place")


def fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 of the fields that decide what is computed: all but EXECUTION_FIELDS, at any depth."""
    return digest(dict(_identity(config)))


@dataclass(frozen=True)
class RunDir:
    """A folder whose run.json says what made the rest. Work in it under `lock()`, after `open(config)`."""

    path: Path

    PAYLOADS: ClassVar[Mapping[str, str]]  # a folder in it: the suffix of the payloads there
    OTHERS: ClassVar[tuple[str, ...]]  # folders without payloads
    REPORT: ClassVar[str]  # the page that is opened first
    APART: ClassVar[str]  # how another config gets a folder of its own, as a remedy begins
    WAIT: ClassVar[str]  # the remedy when another process is in

    @contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other processes out, or, shared, only those that want it alone; StoreError if one is in."""
        with reporting_store_errors(self.path, "create"):
            self.path.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.path / ".lock", shared=shared, remedy=self.WAIT):
            if not shared:
                self.clean_orphans()
            yield

    def open(self, config: Mapping[str, Any]) -> bool:
        """Make the folders, check that they are writable, pin `config`. True when this was begun before.

        RunMismatch when the folder holds another config. `run.json` keeps the EXECUTION_FIELDS of the first start.
        """
        for name in (*self.PAYLOADS, *self.OTHERS):
            self._make_folder(self.path / name)
        wanted = to_builtin(self.config_path, config)
        if self.config_path.exists():
            self._check_same(self.read_config(), wanted)
            return True
        if any(self._payload_paths(name) for name in self.PAYLOADS):
            problem = "is missing, and there is no telling what made the rest"
            raise store_error(self.config_path, problem, self._restart())
        write_document(self.config_path, {"config": wanted, "fingerprint": fingerprint(wanted)})
        return False

    def read_config(self) -> dict[str, Any]:
        """The config that this folder was opened with."""
        if not self.config_path.exists():
            raise store_error(self.config_path, "is missing", RERUN)
        config: dict[str, Any] = read_document(self.config_path, self._restart())["config"]
        return config

    def stored_config(self) -> dict[str, Any] | None:
        """The config that this folder was opened with; None where nothing has begun."""
        return self.read_config() if self.config_path.exists() else None

    def clean_orphans(self) -> None:
        """Delete the temporary files of dead processes. Those of another machine look dead: hold the lock alone."""
        for path in self._orphans():
            remove(path)

    def write_report(self, name: str, data: bytes) -> Path:
        """reports/<name>, for people to look at: without a receipt, and not verified."""
        path = self.report_path(name)
        self._make_folder(path.parent)
        atomic_write(path, data)
        return path

    def report_path(self, name: str = "") -> Path:
        """reports/<name>; without a name, the page that is opened first."""
        return self.path / "reports" / check_name(name or self.REPORT, "report")

    @property
    def config_path(self) -> Path:
        """run.json: what the folder is pinned to."""
        return self.path / "run.json"

    def _make_folder(self, folder: Path) -> None:
        with reporting_store_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        check_inside(folder, self.path)
        check_writable(folder)

    def _check_same(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        theirs, ours = dict(_identity(stored)), dict(_identity(wanted))
        for name in sorted(theirs | ours):
            was, now = (_short(fields[name]) if name in fields else "absent" for fields in (theirs, ours))
            if (name in theirs) != (name in ours) or theirs[name] != ours[name]:
                problem = f"holds a run with another config: {name} was {was} and is now {now}"
                raise RunMismatch(Finding(self.path, problem, self._restart()))

    def _restart(self) -> str:
        return f"{self.APART}delete {self.path} to start again"

    def _payload_paths(self, name: str) -> list[Path]:
        """The payloads in a folder, in order of their numbers; with those of which only the receipt is there."""
        folder, suffix = self.path / name, self.PAYLOADS[name]
        with reporting_store_errors(folder, "read"):
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
        stems = {
            file.removesuffix(end)
            for end in (suffix, RECEIPT)
            for file in names
            if file.endswith(end) and file[0] != "."
        }
        return [folder / (stem + suffix) for stem in sorted(stems, key=lambda stem: (len(stem), stem))]

    def _orphans(self) -> list[Path]:
        return [path for name in (".", *self.PAYLOADS, *self.OTHERS) for path in orphans(self.path / name)]

    def _orphan_findings(self) -> list[Finding]:
        return [Finding(path, "was left by a process that was killed", RERUN) for path in self._orphans()]


@contextmanager
def record_location(findings: list[Finding]) -> Iterator[None]:
    """Put the finding of a StoreError of the block into `findings`."""
    try:
        yield
    except StoreError as error:
        findings.append(error.args[0])


def _identity(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a config by dotted name, without EXECUTION_FIELDS and without ADDED ones at their default."""
    if isinstance(value, Mapping):
        items = {key: item for key, item in value.items() if key not in EXECUTION_FIELDS}
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    else:
        if name not in ADDED or value != ADDED[name]:
            yield name, value
        return
    if not items:
        yield name, items if isinstance(value, Mapping) else []
    for key, item in items.items():
        yield from _identity(item, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."
