"""Folders above a run's: the runs in them, whether all are sound, and the page that leads to their reports."""

from __future__ import annotations

from pathlib import Path

from extraction.atomic import Finding, atomic_write, reporting
from extraction.store import RunFolder, run_folder, safe_name

INDEX = "index.html"


def runs_of(root: str | Path, experiment: str) -> list[RunFolder]:
    """The runs of one experiment, by name. Raises StoreError when a symbolic link leads out of `root`."""
    top = Path(root) / safe_name(experiment, "experiment")
    with reporting(top, "read"):
        names = sorted(path.parent.name for path in top.glob("*/run.json"))
    return [run_folder(root, experiment, name) for name in names]


def write_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """<experiment>/index.html, for people to look at."""
    path = run_folder(root, experiment, INDEX).path
    atomic_write(path, data)
    return path


def verify_tree(root: str | Path) -> list[Finding]:
    """Verify every run in `root`: the folder of all experiments, of one, or of one run."""
    top = Path(root)
    with reporting(top, "read"):
        runs = [folder for folder in (top, *sorted(top.glob("*")), *sorted(top.glob("*/*"))) if _is_run(folder)]
    return [finding for folder in runs for finding in RunFolder(folder).verify()]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("run.json", "responses/shards"))
