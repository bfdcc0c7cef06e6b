"""Above a run and a capture set: which there are, whether all are sound, and the pages that lead to them."""

from __future__ import annotations

from pathlib import Path

from extraction.atomic import Finding, atomic_write, orphans, remove, reporting
from extraction.capture_store import CaptureFolder, capture_folder
from extraction.pinned import safe_name
from extraction.store import CAPTURES, RunFolder, run_folder

INDEX = "index.html"
LEVELS = ("*", "*/*", f"*/{CAPTURES}/*")  # below the folder of all experiments, the deepest that is asked for


def runs_of(root: str | Path, experiment: str) -> list[RunFolder]:
    """The runs of one experiment, by name. Raises StoreError when a symbolic link leads out of `root`."""
    top = Path(root) / safe_name(experiment, "experiment")
    return [run_folder(root, experiment, name) for name in _begun(top) if name.casefold() != CAPTURES]


def capture_sets(root: str | Path, experiment: str) -> list[CaptureFolder]:
    """The capture sets of one experiment, by name. Raises StoreError when a symbolic link leads out of `root`."""
    top = Path(root) / safe_name(experiment, "experiment") / CAPTURES
    return [capture_folder(root, experiment, name) for name in _begun(top)]


def _begun(top: Path) -> list[str]:
    with reporting(top, "read"):
        return sorted(path.parent.name for path in top.glob("*/run.json"))


def write_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """<experiment>/index.html, for people to look at."""
    return _write_page(run_folder(root, experiment, INDEX).path, data)


def write_sets_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """<experiment>/captures/index.html, for people to look at."""
    return _write_page(capture_folder(root, experiment, INDEX).path, data)


def _write_page(path: Path, data: bytes) -> Path:
    """No lock keeps others out of here, but a process that was killed left its temporary file to whoever comes next."""
    for orphan in orphans(path.parent):
        remove(orphan)
    atomic_write(path, data)
    return path


def verify_tree(root: str | Path) -> list[Finding]:
    """Verify every run and capture set in `root`: the folder of all experiments, of one, or of one run or set."""
    top = Path(root)
    with reporting(top, "read"):
        below = [folder for level in LEVELS for folder in sorted(top.glob(level))]
        folders = [kind(folder) for folder in (top, *below) if (kind := _kind_of(folder))]
    return [finding for folder in folders for finding in folder.verify()]


def _kind_of(folder: Path) -> type[RunFolder] | type[CaptureFolder] | None:
    """What begins or has begun there; a set may have lost all but its run.json, so its place tells as well."""
    for kind, signs in ((CaptureFolder, ("prompts", "dynamics.json")), (RunFolder, ("responses/shards",))):
        if any((folder / sign).exists() for sign in signs):
            return kind
    if not (folder / "run.json").exists():
        return None
    return CaptureFolder if folder.resolve().parent.name == CAPTURES else RunFolder
