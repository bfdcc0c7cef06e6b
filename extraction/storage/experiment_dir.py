"""An experiment's folder: the runs and capture sets in it, their verification, and its index pages."""

from __future__ import annotations

from pathlib import Path

from extraction.core.names import check_name
from extraction.storage.atomic import Finding, atomic_write, orphans, remove, reporting_store_errors
from extraction.storage.token_captures import CaptureSet, capture_set
from extraction.storage.trait_run import CAPTURES, TraitRun, trait_run

INDEX = "index.html"
LEVELS = ("*", "*/*", f"*/{CAPTURES}/*")  # below `experiments/`, the topmost folder that is verified


def trait_runs(root: str | Path, experiment: str) -> list[TraitRun]:
    """Return the runs of one experiment, by name. Raises StoreError if a symbolic link leads out of `root`."""
    top = Path(root) / check_name(experiment, "experiment")
    return [trait_run(root, experiment, name) for name in _run_names(top) if name.casefold() != CAPTURES]


def capture_sets(root: str | Path, experiment: str) -> list[CaptureSet]:
    """Return the capture sets of one experiment, by name. Raises StoreError if a symbolic link leads out of `root`."""
    top = Path(root) / check_name(experiment, "experiment") / CAPTURES
    return [capture_set(root, experiment, name) for name in _run_names(top)]


def _run_names(top: Path) -> list[str]:
    with reporting_store_errors(top, "read"):
        return sorted(path.parent.name for path in top.glob("*/run.json"))


def write_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """Write <experiment>/index.html."""
    return _write_page(trait_run(root, experiment, INDEX).path, data)


def write_sets_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """Write <experiment>/captures/index.html."""
    return _write_page(capture_set(root, experiment, INDEX).path, data)


def _write_page(path: Path, data: bytes) -> Path:
    """Write a page. The folder has no lock, so temporary files of killed processes are removed here."""
    for orphan in orphans(path.parent):
        remove(orphan)
    atomic_write(path, data)
    return path


def verify_tree(root: str | Path) -> list[Finding]:
    """Verify every run and capture set in `root`: `experiments/`, one experiment, or one run or capture set."""
    top = Path(root)
    with reporting_store_errors(top, "read"):
        below = [folder for level in LEVELS for folder in sorted(top.glob(level))]
        folders = [kind(folder) for folder in (top, *below) if (kind := _kind_of(folder))]
    return [finding for folder in folders for finding in folder.verify()]


def _kind_of(folder: Path) -> type[TraitRun] | type[CaptureSet] | None:
    """Return the kind of folder; a capture set that lost all but its run.json is known by its parent's name."""
    for kind, signs in ((CaptureSet, ("prompts", "dynamics.json")), (TraitRun, ("responses/shards",))):
        if any((folder / sign).exists() for sign in signs):
            return kind
    if not (folder / "run.json").exists():
        return None
    return CaptureSet if folder.resolve().parent.name == CAPTURES else TraitRun
