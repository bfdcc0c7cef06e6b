"""Run folders: each belongs to one config, kept in run.json, and is worked on under a lock.

`TraitRun` (a run of one trait) and `CaptureSet` (token captures of one prompt file) are its two kinds. Torch is not
imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from extraction.config.settings import ADDED, EXECUTION_FIELDS, REMEMBERED_FIELDS
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
    json_round_trip,
    orphans,
    read_document,
    remove,
    reporting_store_errors,
    store_error,
    to_json,
    write_document,
)

NAMED_FIRST = ("model.name", "model.source")  # of the fields that differ: another model has another dtype too


def check_inside(path: Path, root: Path) -> None:
    """Raise StoreError if a symbolic link leads `path` out of `root`, which may be a link itself."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        inside = False
    if not inside:
        raise store_error(path, f"leads out of {root} through a symbolic link", "put a folder in the link's place")


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config's fields that decide the results: all but EXECUTION_FIELDS, at any depth."""
    return digest(dict(_result_fields(config)))


@dataclass(frozen=True)
class RunDir:
    """A folder whose run.json holds the config of its files. Work in it under `lock()`, after `open(config)`."""

    path: Path

    DATA_FOLDERS: ClassVar[Mapping[str, str]]  # a folder in it: the suffix of its data files
    PLAIN_FOLDERS: ClassVar[tuple[str, ...]]  # folders without data files
    DOCUMENTS: ClassVar[tuple[str, ...]]  # JSON files with a checksum, besides run.json
    MAIN_REPORT: ClassVar[str]  # the page to open first
    RESTART_CHOICE: ClassVar[str]  # starts the remedy for another config
    LOCKED_REMEDY: ClassVar[str]  # the remedy while another process holds the lock

    @contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the folder's lock, exclusive or shared. Raises StoreError if another process holds it."""
        with reporting_store_errors(self.path, "create"):
            self.path.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.path / ".lock", shared=shared, remedy=self.LOCKED_REMEDY):
            if not shared:
                self.clean_orphans()
            yield

    def open(self, config: Mapping[str, Any]) -> bool:
        """Create the folders, check that they are writable, and write run.json. Returns True if it was there before.

        Raises RunMismatch if the folder has another config. run.json keeps the EXECUTION_FIELDS of the first start, but
        takes the REMEMBERED_FIELDS of this one.
        """
        for name in (*self.DATA_FOLDERS, *self.PLAIN_FOLDERS):
            self._make_folder(self.path / name)
        wanted = json_round_trip(self.config_path, config)
        if self.config_path.exists():
            stored = self.read_config()
            self._check_same(stored, wanted)
            remembered = {**stored, **{key: wanted[key] for key in REMEMBERED_FIELDS if key in wanted}}
            if remembered != stored:
                write_document(self.config_path, {"config": remembered, "fingerprint": fingerprint(remembered)})
            return True
        if any(self._data_paths(name) for name in self.DATA_FOLDERS):
            problem = "is missing, so the config of the other files is unknown"
            raise store_error(self.config_path, problem, self._restart_remedy())
        write_document(self.config_path, {"config": wanted, "fingerprint": fingerprint(wanted)})
        return False

    def read_config(self) -> dict[str, Any]:
        """Return the config in run.json. Raises StoreError if there is none."""
        if not self.config_path.exists():
            raise store_error(self.config_path, "is missing", RERUN)
        config: dict[str, Any] = read_document(self.config_path, self._restart_remedy())["config"]
        return config

    def stored_config(self) -> dict[str, Any] | None:
        """Return the config in run.json; None if the run has not begun."""
        return self.read_config() if self.config_path.exists() else None

    def clean_orphans(self) -> None:
        """Delete temporary files of dead processes. Another machine's processes look dead: hold the exclusive lock."""
        for path in self._orphans():
            remove(path)

    def write_report(self, name: str, data: bytes) -> Path:
        """Write reports/<name>, without a receipt: it is not verified."""
        path = self.report_path(name)
        self._make_folder(path.parent)
        atomic_write(path, data)
        return path

    def report_path(self, name: str = "") -> Path:
        """Return the path of reports/<name>; without a name, of the page to open first."""
        return self.path / "reports" / check_name(name or self.MAIN_REPORT, "report")

    @property
    def config_path(self) -> Path:
        """Path of run.json."""
        return self.path / "run.json"

    def _make_folder(self, folder: Path) -> None:
        with reporting_store_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        check_inside(folder, self.path)
        check_writable(folder)

    def _check_same(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Raise RunMismatch with the first field that differs, by dotted name."""
        old, new = dict(_result_fields(stored)), dict(_result_fields(wanted))
        named_first = {name for name in NAMED_FIRST if name in old and name in new}
        for name in sorted(old | new, key=lambda name: (name not in named_first, name)):
            was, now = (_short(fields[name]) if name in fields else "absent" for fields in (old, new))
            if (name in old) != (name in new) or old[name] != new[name]:
                problem = f"holds a run with another config: {name} was {was} and is now {now}"
                raise RunMismatch(Finding(self.path, problem, self._restart_remedy()))

    def _restart_remedy(self) -> str:
        return f"{self.RESTART_CHOICE}delete {self.path} to start again"

    def _data_paths(self, name: str) -> list[Path]:
        """Return a folder's data files by number, including those of which only the receipt is left."""
        folder, suffix = self.path / name, self.DATA_FOLDERS[name]
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
        return [path for name in (".", *self.DATA_FOLDERS, *self.PLAIN_FOLDERS) for path in orphans(self.path / name)]

    def _verify_documents(self) -> list[Finding]:
        """Return the temporary files of killed processes, and the documents that are damaged."""
        findings = self._leftovers()
        with collecting_findings(findings):
            self.read_config()
        for path in (self.path / name for name in self.DOCUMENTS):
            with collecting_findings(findings):
                if path.exists():
                    read_document(path)
        return findings

    def _leftovers(self) -> list[Finding]:
        return [Finding(path, "was left by a process that was killed", RERUN) for path in self._orphans()]


@contextmanager
def collecting_findings(findings: list[Finding]) -> Iterator[None]:
    """Append the finding of a StoreError of the block to `findings`."""
    try:
        yield
    except StoreError as error:
        findings.append(error.args[0])


def _result_fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config's leaves by dotted name, without EXECUTION_FIELDS and without ADDED ones at their default."""
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
        yield from _result_fields(item, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."
