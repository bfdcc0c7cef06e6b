"""Atomic writes: JSON documents with a checksum, logs, data files with receipts, and a folder's lock.

A document is JSON that holds the sha256 of its other keys under `seal`; a log has such a checksum in every line. Any
other file is a data file: its receipt, a document with the file's sha256, is written last, so that a file whose receipt
fits is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from extraction.core.errors import StoreError

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
RECEIPT = ".receipt.json"
RERUN = "run the same command again"
REMAKE = "run the command that makes it again"
DELETE = f"delete it, then {REMAKE} (`traitline verify` lists all such files)"
_FREE_SPACE = f"free some disk space, then {RERUN}: finished shards are kept"
_MAKE_WRITABLE = "make the folder writable for this user, or choose another output folder"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.EROFS: _MAKE_WRITABLE,
    errno.ENOENT: f"if it was deleted or moved while in use, {RERUN}",
}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.EOPNOTSUPP}
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")  # line ends to other programs, and what UTF-8 can't hold
_NEW_FILE = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Finding:
    """A problem with one file, and its remedy. A StoreError carries one as its only argument."""

    path: Path
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


def store_error(path: Path, problem: str, remedy: str) -> StoreError:
    """Return the error to raise for a finding."""
    return StoreError(Finding(path, problem, remedy))


@contextmanager
def reporting_store_errors(path: Path, action: str) -> Iterator[None]:
    """Raise an OSError of the block as a StoreError with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"check the path and the disk, then {RERUN}")
        raise store_error(path, f"can't {action} ({error.strerror or error})", remedy) from error


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a kill or a power cut it holds the old bytes or the new ones, never a part."""
    temporary = _temporary(path)
    with reporting_store_errors(path, "write"):
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, if it exists, and sync its folder."""
    with reporting_store_errors(path, "delete"), suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to the disk, if the system can (Windows and some network mounts can't)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Create and delete an empty file: on network mounts, permission bits are no proof. Raises StoreError."""
    probe = _temporary(folder / "probe")
    with reporting_store_errors(folder, "write in this folder"):
        _write_synced(probe, b"")
        os.unlink(probe)


def orphans(folder: Path) -> list[Path]:
    """Return the temporary files in `folder` whose writer is dead, or had this process's number before it."""
    matches = ((path, TEMPORARY.fullmatch(path.name)) for path in sorted(folder.glob(".*.tmp")))
    return [path for path, match in matches if match and not _is_alive_elsewhere(int(match[1]))]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    """Create `path` (mode 0666 less the umask), write all of `data` and sync it to the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | _NEW_FILE, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alive_elsewhere(pid: int) -> bool:
    """Return True if another process of this machine has the number. Not known on Windows, where os.kill kills."""
    if pid == os.getpid() or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: Any, **options: Any) -> str:
    """Return JSON that is one line for every program, and valid UTF-8. Raises ValueError for NaN and Infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@contextmanager
def reject_nan(path: Path) -> Iterator[None]:
    """Raise JSON's ValueError for NaN and Infinity as a StoreError."""
    try:
        yield
    except ValueError as error:
        raise store_error(path, f"can't hold NaN or Infinity ({error})", "write null for a missing value") from None


def json_round_trip(path: Path, value: Any) -> Any:
    """Return `value` as it reads back from JSON: tuples are lists, keys are strings."""
    with reject_nan(path):
        return json.loads(to_json(value))


def digest(value: Any) -> str:
    """Return the sha256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_document(path: Path, body: Mapping[str, Any]) -> None:
    """Write JSON with a checksum."""
    atomic_write(path, _with_checksum(json_round_trip(path, body)))


def read_document(path: Path, remedy: str = REMAKE) -> dict[str, Any]:
    """Return a document without its checksum. Raises StoreError if one bit differs from what was written."""
    data = read_bytes(path)
    try:
        body: dict[str, Any] = json.loads(data.decode())
        del body["seal"]
        intact = _with_checksum(body) == data
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise store_error(path, "was changed or damaged since it was written: its checksum (seal) is wrong", remedy)
    return body


def _with_checksum(body: Mapping[str, Any]) -> bytes:
    assert "seal" not in body
    return (to_json({**body, "seal": digest(body)}, indent=2, sort_keys=True) + "\n").encode()


# --- logs -----------------------------------------------------------------------------------------------------------


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a log, a line with a checksum each, and sync it. A torn last line is cut off first."""
    with reject_nan(path):
        data = b"".join(f"{to_json({**row, 'seal': _line_checksum(row)})}\n".encode() for row in rows)
    with reporting_store_errors(path, "write"):
        is_new = not path.exists()
        handle = os.open(path, os.O_RDWR | _NEW_FILE, 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            _seek_last_line(file)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


def _seek_last_line(file: BinaryIO) -> None:
    """Seek to the end of a log; if a kill has torn its last line, cut that off."""
    end = file.seek(0, os.SEEK_END)
    if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    file.seek(end)


def read_lines(path: Path) -> list[dict[str, Any] | None]:
    """Return a log's rows in order, None for a damaged line. A torn last line is left out."""
    return [_parse_line(line) for line in read_bytes(path).split(b"\n")[:-1]] if path.exists() else []


def _parse_line(data: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(data)
        return row if row.pop("seal") == _line_checksum(row) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _line_checksum(row: Mapping[str, Any]) -> str:
    return digest(json.loads(to_json(row)))[:16]


# --- data files and receipts ----------------------------------------------------------------------------------------


def write_with_receipt(path: Path, data: bytes, facts: Mapping[str, Any]) -> None:
    """Write a data file, then its receipt. A receipt of older bytes is deleted first: it must never fit new ones."""
    receipt = {**facts, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    remove(receipt_path(path))
    atomic_write(path, data)
    write_document(receipt_path(path), receipt)


def receipt_path(path: Path) -> Path:
    """Return the path of a data file's receipt."""
    return path.with_name(path.name.removesuffix(path.suffix) + RECEIPT)


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a data file's receipt. Raises StoreError if it has none."""
    receipt = receipt_path(path)
    if not receipt.exists():
        raise store_error(path, "isn't finished: it has no receipt", REMAKE)
    return read_document(receipt)


def read_data(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return a data file's bytes, after a check of their sha256, and its receipt."""
    receipt = read_receipt(path)
    data = read_bytes(path)
    _check_size(path, len(data), receipt)
    _check_sha256(path, hashlib.sha256(data).hexdigest(), receipt)
    return data, receipt


def verify_checksum(path: Path) -> os.stat_result:
    """Check a data file's sha256 without holding it in memory, and return its file status."""
    receipt = read_receipt(path)
    with reporting_store_errors(path, "read"), path.open("rb") as file:
        status = os.fstat(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _check_size(path, status.st_size, receipt)
    _check_sha256(path, sha256, receipt)
    return status


def check_size(path: Path) -> None:
    """Raise StoreError unless a data file has a receipt and the receipt's size. Does not read the file."""
    receipt = read_receipt(path)
    with reporting_store_errors(path, "read"):
        size = path.stat().st_size
    _check_size(path, size, receipt)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes."""
    with reporting_store_errors(path, "read"):
        return path.read_bytes()


def _check_size(path: Path, size: int, receipt: Mapping[str, Any]) -> None:
    if size != receipt["size"]:
        raise store_error(path, f"has {size} bytes, but its receipt says {receipt['size']}", REMAKE)


def _check_sha256(path: Path, sha256: str, receipt: Mapping[str, Any]) -> None:
    if sha256 != receipt["sha256"]:
        raise store_error(path, "was changed or damaged since it was written: its sha256 is wrong", DELETE)


# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def hold_lock(path: Path, *, shared: bool = False, remedy: str = "wait for it to end") -> Iterator[None]:
    """Hold the lock file at `path`, alone or with other sharers, until the block or the process ends."""
    with reporting_store_errors(path, "lock"):
        handle = os.open(path, os.O_RDWR | _NEW_FILE, 0o666)
    try:
        with reporting_store_errors(path, "lock"):
            if not _try_lock(handle, path, shared):
                holder = os.read(handle, 20).decode("ascii", "replace") or "unknown"
                raise store_error(path.parent, f"another process (pid {holder}) is working on this run", remedy)
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int, path: Path, shared: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # a byte beyond the pid: locks are mandatory on Windows
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return shared
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path}: this file system has no locks; start only one process on this run", stacklevel=4)
    return True
