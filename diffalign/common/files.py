"""Files that are either whole or not there: written to the side, synced to disk, renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.common.errors import UserError

_TEMPORARY = ".tmp-"
_LOCK = ".lock"
FULL_HASH_LIMIT = 1_000_000_000
_TAIL_BYTES = 64 * 1024
_held_locks: set[int] = set()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the caller makes there (file or folder) replaces `path`.

    The temporary name keeps the suffix, since some writers choose their format by it. On success the
    content is synced and renamed; on any error it is removed and `path` stays as it was. A folder that is
    already at `path` is moved aside first and removed after the rename.

    Raises:
        FileNotFoundError: the caller made nothing at the temporary path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(4)}-{target.name}"
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {target}")
        _sync_tree(temporary)
        _replace(temporary, target)
        _sync(target.parent)
    except BaseException:
        _remove(temporary)
        raise


def remove_leftovers(folder: str | Path) -> list[str]:
    """Removes what killed writers left in `folder` (call it under `folder_lock`); returns the names."""
    leftovers = sorted(p for p in Path(folder).glob(f"{_TEMPORARY}*"))
    for leftover in leftovers:
        _remove(leftover)
    return [leftover.name for leftover in leftovers]


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` as UTF-8, whole or not at all; returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    return Path(path)


def write_json(path: str | Path, value: object) -> Path:
    """Writes `value` as indented JSON, whole or not at all; see `to_plain` for what is accepted."""
    return write_text(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes one JSON object per line, whole or not at all; `rows` may be a generator."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for row in rows:
            file.write(_line(row))
    return Path(path)


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows and syncs them to disk before returning.

    It repairs nothing: after a kill call `trim_torn_tail` once before the first append.
    """
    with Path(path).open("ab") as file:
        file.write(b"".join(_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())


def trim_torn_tail(path: str | Path) -> int:
    """Cuts an unfinished last line (one without line end) off a jsonl file; returns the bytes removed.

    A missing file is fine (0). Afterwards the file holds what `read_jsonl(drop_torn_tail=True)` reads.
    """
    target = Path(path)
    if not target.exists():
        return 0
    with target.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:  # walk back in blocks to the last line end
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: the file is missing, cannot be read or is not UTF-8.
    """
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error


def read_json(path: str | Path) -> Any:
    """Returns the parsed file.

    Raises:
        UserError: the file is missing or is not JSON; names the file and the line.
    """
    content = read_text(path)
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error


def read_jsonl(path: str | Path, *, drop_torn_tail: bool = False) -> list[dict[str, Any]]:
    """Returns the rows of a jsonl file in order; blank lines are skipped.

    Args:
        path: the file.
        drop_torn_tail: leave out a last line without line end (a writer was killed in the middle of it).

    Raises:
        UserError: the file is missing, or a line is not a JSON object; names file:line.
    """
    lines = _read(path).split(b"\n")
    if drop_torn_tail:
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number}: not a valid JSON line ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        if rb"\ud" in line.lower():
            _refuse_half_characters(row, f"{path}:{number}")
        rows.append(row)
    return rows


def _refuse_half_characters(row: dict[str, Any], where: str) -> None:
    """Raises UserError for a text with one half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode("ascii")
        raise UserError(f"{where}: a text holds half a character ({half}): write its file anew") from error


def file_identity(path: str | Path, *, whole_up_to: int = FULL_HASH_LIMIT) -> dict[str, Any]:
    """Returns what identifies the content of a file or folder.

    A file of at most `whole_up_to` bytes: `{size, sha256}`; a larger one: `{size, tail_sha256}` of its last
    64 KiB (weights and parquet files differ there or in size). A folder: `{files: {relative path:
    identity}}`, names with a leading dot (locks, leftovers) left out.

    Raises:
        UserError: nothing is there.
    """
    target = Path(path)
    if target.is_dir():
        inside = sorted(p for p in target.rglob("*") if p.is_file())
        relative = {p.relative_to(target): p for p in inside}
        visible = {r: p for r, p in relative.items() if not any(part.startswith(".") for part in r.parts)}
        return {
            "files": {r.as_posix(): file_identity(p, whole_up_to=whole_up_to) for r, p in visible.items()}
        }
    if not target.is_file():
        raise UserError(f"{path} does not exist: give the path of an existing file or folder")
    size = target.stat().st_size
    with target.open("rb") as file:
        if size <= whole_up_to:
            return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        file.seek(max(0, size - _TAIL_BYTES))
        return {"size": size, "tail_sha256": hashlib.sha256(file.read()).hexdigest()}


@contextlib.contextmanager
def folder_lock(folder: str | Path, *, member: int | None = None) -> Iterator[None]:
    """Holds `<folder>/.lock` (the folder is made if needed); the lock dies with the process that holds it.

    Children made by fork give their copy back at once, so that a killed run's loader workers, which live
    a few seconds longer, do not keep the folder locked.

    Args:
        folder: what to lock.
        member: this process's number among several of one run, which hold the folder together.

    Raises:
        UserError: another run holds the lock, or another process is that member.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    own = contextlib.nullcontext() if member is None else _lock_file(folder, f"{_LOCK}-{member}")
    with _lock_file(folder, _LOCK, shared=member is not None), own:
        yield


@contextlib.contextmanager
def waiting_lock(folder: str | Path, name: str) -> Iterator[None]:
    """Holds `<folder>/.lock-NAME` alone, after waiting for the process that has it."""
    with _lock_file(folder, f"{_LOCK}-{name}", wait=True):
        yield


@contextlib.contextmanager
def _lock_file(folder: str | Path, name: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    descriptor = os.open(Path(folder) / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder, shared=shared, wait=wait)
        _held_locks.add(descriptor)
        yield
    finally:
        _held_locks.discard(descriptor)
        os.close(descriptor)


def refuse_locked(folder: str | Path) -> None:
    """Raises UserError when another run holds the lock of `folder`; makes nothing.

    For a look before hours of preparation: `folder_lock` is what protects.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(Path(folder) / _LOCK, os.O_RDWR)
        try:
            _lock(descriptor, folder)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: str | Path, *, shared: bool = False, wait: bool = False) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing to {folder}: wait for it, stop it, or choose another out="
        ) from error


def printable(name: str) -> str:
    """Returns a file's name as text that any file and terminal takes: bytes that are no UTF-8 as \\udc9f."""
    return name.encode("utf-8", "backslashreplace").decode()


def to_plain(value: Any) -> Any:
    """Returns `value` in JSON's own types.

    Mappings (keys become text), sequences, sets (sorted), dataclasses, paths, numpy and torch scalars and
    arrays are taken apart; NaN and infinities become None, since JSON has no word for them.

    Raises:
        TypeError: an object of another kind.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [to_plain(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors, without importing either
        return to_plain(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} to JSON: {value!r}")


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(to_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _replace(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; an existing folder cannot be renamed over and steps aside first."""
    if not (target.is_dir() and not target.is_symlink()):
        os.replace(temporary, target)
        return
    aside = target.parent / f"{_TEMPORARY}{secrets.token_hex(4)}-old-{target.name}"
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Syncs a file, or every file and folder below a folder, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    if not path.is_symlink():
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_back_locks() -> None:
    """Closes inherited lock descriptors in a forked child; the parent's lock stays held."""
    for descriptor in _held_locks:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_give_back_locks)
