"""Writing a snapshot: into a temporary directory beside its destination, flushed, and renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from devices import host_io
from devices.errors import DeviceError, UserError
from vmm.memory import GuestMemory
from vmm.snapshot.layout import (
    DIRECTORIES,
    FORMAT,
    Extent,
    FileInfo,
    Manifest,
    SavedDisk,
    Snapshot,
    is_file_name,
)
from vmm.snapshot.reading import read_envelope

_CHUNK = 4 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_place(path: Path) -> None:
    """Whether a snapshot can be written as `path`, as far as that can be said beforehand.

    Raises:
        UserError: it cannot: no such parent, no right to write there, something else is there.
    """
    os.rmdir(_begin(Path(os.path.abspath(path))))


def save(
    path: Path,
    snapshot: Snapshot,
    memory: GuestMemory,
    keep_disks: Callable[[Path], Mapping[str, SavedDisk]] = lambda _: {},
) -> None:
    """Write `snapshot` and `memory` as the directory `path`; all of it or nothing.

    A snapshot that is there already is replaced in one step.

    Args:
        keep_disks: puts what is kept of disks into the directory that it is given, and describes
            it.

    Raises:
        UserError: the place cannot be written, or holds something that is not a snapshot.
        DeviceError: a device's state is not made of plain values.
    """
    path = Path(os.path.abspath(path))
    work = _begin(path)
    try:
        _write_all(work, snapshot, memory, keep_disks)
        os.chmod(work, 0o755)
        _put_in_place(work, path)
    except OSError as error:
        raise UserError(f"snapshot {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _begin(path: Path) -> Path:
    """An empty directory that is to become `path`."""
    if os.path.lexists(path) and not _is_replaceable(path):
        raise UserError(f"snapshot {path}: exists and is not a snapshot; name another place")
    try:
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"snapshot {path}: {reason}") from error


def _is_replaceable(path: Path) -> bool:
    """Whether nothing but a snapshot, whole or damaged, is lost with this."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        if any(path.iterdir()):
            read_envelope(path)
        return all(_belongs(each, str(each.relative_to(path))) for each in path.rglob("*"))
    except (UserError, OSError):
        return False


def _belongs(entry: Path, name: str) -> bool:
    if entry.is_symlink():
        return False
    return (is_file_name(name) and entry.is_file()) or (name in DIRECTORIES and entry.is_dir())


def _write_all(
    work: Path,
    snapshot: Snapshot,
    memory: GuestMemory,
    keep_disks: Callable[[Path], Mapping[str, SavedDisk]],
) -> None:
    for name in DIRECTORIES:
        (work / name).mkdir()
    files = {"cpu.json": _write_json(work / "cpu.json", snapshot.cpu)}
    for name, state in snapshot.devices.items():
        relative = f"devices/{name}.json"
        try:
            files[relative] = _write_json(work / relative, state)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DeviceError(name, f"its state cannot be saved: {error}") from error
    extents = _write_memory(work / "memory.bin", memory)
    files["memory.bin"] = FileInfo(memory.file_size, "")
    body = msgspec.json.encode(
        Manifest(
            snapshot.config,
            snapshot.engine,
            files,
            extents,
            snapshot.executed,
            snapshot.clock,
            snapshot.window,
            snapshot.console,
            dict(keep_disks(work / "disks")),
        )
    )
    body = msgspec.json.format(body, indent=2)
    head = f'{{"format": {FORMAT}, "sha256": "{hashlib.sha256(body).hexdigest()}", "body": '
    _write_bytes(work / "manifest.json", head.encode() + body + b"}\n")
    for name in DIRECTORIES:
        _sync_directory(work / name)
    _sync_directory(work)


def _write_json(path: Path, value: Any) -> FileInfo:
    return _write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _write_bytes(path: Path, data: bytes) -> FileInfo:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())


def _write_memory(path: Path, memory: GuestMemory) -> list[Extent]:
    extents = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, memory.file_size)
        for begin, length in memory.extents():
            for offset in range(begin, begin + length, _CHUNK):
                piece = memory.view[offset : min(offset + _CHUNK, begin + length)]
                host_io.write_all(fd, [piece], offset)
                extents.append(Extent(offset, len(piece), hashlib.sha256(piece).hexdigest()))
        os.fsync(fd)
    finally:
        os.close(fd)
    return extents


def _put_in_place(work: Path, path: Path) -> None:
    try:
        os.rename(work, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Swap the two names in one step; the old snapshot is then deleted under the other name.
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.renameat2(
            _AT_FDCWD, os.fsencode(work), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE
        )
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())) from error
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
