"""Above a run and a capture set: which there are, whether all are sound, and the pages that lead to them."""

from __future__ import annotations

from pathlib import Path

from extraction.core.names import check_name
from extraction.storage.atomic import Finding, atomic_write, orphans, remove, reporting_store_errors
from extraction.storage.token_captures import CaptureSet, capture_set
from extraction.storage.trait_run import CAPTURES, TraitRun, trait_run

INDEX = "index.html"
LEVELS = ("*", "*/*", f"*/{CAPTURES}/*")  # below the folder of all experiments, the deepest that is asked for


def trait_runs(root: str | Path, experiment: str) -> list[TraitRun]:
    """The runs of one experiment, by name. Raises StoreError when a symbolic link leads out of `root`."""
    top = Path(root) / check_name(experiment, "experiment")
    return [trait_run(root, experiment, name) for name in _begun(top) if name.casefold() != CAPTURES]


def capture_sets(root: str | Path, experiment: str) -> list[CaptureSet]:
    """The capture sets of one experiment, by name. Raises StoreError when a symbolic link leads out of `root`."""
    top = Path(root) / check_name(experiment, "experiment") / CAPTURES
    return [capture_set(root, experiment, name) for name in _begun(top)]


def _begun(top: Path) -> list[str]:
    with reporting_store_errors(top, "read"):
        return sorted(path.parent.name for path in top.glob("*/run.json"))


def write_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """<experiment>/index.html, for people to look at."""
    return _write_page(trait_run(root, experiment, INDEX).path, data)


def write_sets_index(root: str | Path, experiment: str, data: bytes) -> Path:
    """<experiment>/captures/index.html, for people to look at."""
    return _write_page(capture_set(root, experiment, INDEX).path, data)


def _write_page(path: Path, data: bytes) -> Path:
    """No lock keeps others out of here, but a process that was killed left its temporary file to whoever comes next."""
    for orphan in orphans(path.parent):
        remove(orphan)
    atomic_write(path, data)
    return path


def verify_tree(root: str | Path) -> list[Finding]:
    """Verify every run and capture set in `root`: the folder of all experiments, of one, or of one run or set."""
    top = Path(root)
    with reporting_store_errors(top, "read"):
        below = [folder for level in LEVELS for folder in sorted(top.glob(level))]
        folders = [kind(folder) for folder in (top, *below) if (kind := _kind_of(folder))]
    return [finding for folder in folders for finding in folder.verify()]


def _kind_of(folder: Path) -> type[TraitRun] | type[CaptureSet] | None:
    """What begins or has begun there; a set may have lost all but its run.json, so its place tells as well."""
    for kind, signs in ((CaptureSet, ("prompts", "dynamics.json")), (TraitRun, ("responses/shards",))):
        if any((folder / sign).exists() for sign in signs):
            return kind
    if not (folder / "run.json").exists():
        return None
    return CaptureSet if folder.resolve().parent.name == CAPTURES else TraitRun
