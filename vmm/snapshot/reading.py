"""Reading a snapshot with suspicion: nothing is executed, every number is checked before use."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from devices.errors import UserError
from vmm.config import NAME
from vmm.cpu.state import CpuState
from vmm.memory import PAGE, GuestMemory
from vmm.snapshot.layout import DISK, FORMAT, FileInfo, Manifest, Snapshot

_MANIFEST_LIMIT = 16 << 20
_FILE_LIMIT = 64 << 20
_T = TypeVar("_T")


@dataclass
class _Envelope:
    format: int
    sha256: str
    body: msgspec.Raw


def load(path: Path, memory: GuestMemory | None = None) -> Snapshot:
    """Read a snapshot; with `memory`, fill it too (its size must be that of the configuration).

    Raises:
        UserError: it is damaged, truncated, of a newer format, or not a snapshot at all.
    """
    manifest = load_manifest(path)
    read = {
        name: _read_checked(path, name, info)
        for name, info in manifest.files.items()
        if name != "memory.bin"
    }
    cpu = _decode(path, "cpu.json", read.pop("cpu.json"), CpuState)
    devices = {
        name[len("devices/") : -len(".json")]: _decode(path, name, data, Any)
        for name, data in read.items()
    }
    if memory is not None:
        _load_memory(path, manifest, memory)
    return Snapshot(
        manifest.config,
        manifest.engine,
        cpu,
        devices,
        manifest.executed,
        manifest.clock,
        manifest.window,
        manifest.console,
    )


def load_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` alone.

    Raises:
        UserError: as `load`.
    """
    envelope = read_envelope(path)
    where = f"snapshot {path}: manifest.json"
    if envelope.format > FORMAT:
        raise UserError(
            f"{where} has format {envelope.format}; this version reads up to {FORMAT}: update vmm"
        )
    if envelope.format < 1:
        raise UserError(f"{where} has format {envelope.format}, which never existed")
    if hashlib.sha256(bytes(envelope.body)).hexdigest() != envelope.sha256:
        raise UserError(f"{where} is damaged: its checksum does not match")
    manifest = _decode(path, "manifest.json", bytes(envelope.body), Manifest)
    _check_names(where, manifest)
    return manifest


def _check_names(where: str, manifest: Manifest) -> None:
    for name in manifest.files:
        stem = name.removeprefix("devices/").removesuffix(".json")
        if name not in ("cpu.json", "memory.bin") and name != f"devices/{stem}.json":
            raise UserError(f"{where}: it lists a file '{name}' that no snapshot has")
        if name.startswith("devices/") and not NAME.fullmatch(stem):
            raise UserError(f"{where}: '{name}' is no device's file")
    if missing := {"cpu.json", "memory.bin"} - manifest.files.keys():
        raise UserError(f"{where}: it lists no {missing.pop()}")
    for name in manifest.disks:
        if not DISK.fullmatch(name):
            raise UserError(f"{where}: '{name}' is no device's disk")
    end = 0
    for extent in manifest.memory:
        if extent.offset % PAGE or extent.length <= 0 or extent.offset < end:
            raise UserError(f"{where}: memory stretch at {extent.offset:#x} is out of order")
        end = extent.offset + extent.length
    if end > manifest.config.memory + manifest.config.rom:
        raise UserError(f"{where}: memory stretches end at {end:#x}, past the guest's memory")


def _open(path: Path, name: str) -> FileIO:
    """A regular file, unbuffered; whatever else is there is not waited for."""
    fd = os.open(path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    file = FileIO(fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise UserError(f"snapshot {path}: {name} is not a file")
    return file


def _decode(path: Path, name: str, data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UserError, ValueError, RecursionError) as error:
        raise UserError(f"snapshot {path}: {name}: {error}") from error


def read_envelope(path: Path) -> _Envelope:
    """The manifest, and what it says of itself, unchecked.

    Raises:
        UserError: it cannot be read, or is no manifest.
    """
    try:
        data = _read_bounded(path, "manifest.json", _MANIFEST_LIMIT)
    except UserError as error:
        match error.__cause__:
            case NotADirectoryError():
                problem = "is no snapshot: it is no directory"
            case FileNotFoundError() as cause:
                lacks = "is no snapshot: it has no manifest.json"
                problem = lacks if os.path.isdir(path) else str(cause.strerror)
            case _:
                raise
        raise UserError(f"snapshot {path}: {problem}") from error
    try:
        return msgspec.json.decode(data, type=_Envelope)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(
            f"snapshot {path}: manifest.json is damaged or not a snapshot's: {error}"
        ) from error


def _read_bounded(path: Path, name: str, limit: int) -> bytes:
    data = b""
    try:
        with _open(path, name) as file:
            while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
                data += more
    except OSError as error:
        raise UserError(f"snapshot {path}: {name}: {error.strerror}") from error
    if len(data) > limit:
        raise UserError(f"snapshot {path}: {name} is larger than {limit >> 20} MiB")
    return data


def _read_checked(path: Path, name: str, info: FileInfo) -> bytes:
    data = _read_bounded(path, name, _FILE_LIMIT)
    if len(data) != info.size:
        raise UserError(f"snapshot {path}: {name} has {len(data)} bytes instead of {info.size}")
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise UserError(f"snapshot {path}: {name} is damaged: its checksum does not match")
    return data


def _load_memory(path: Path, manifest: Manifest, memory: GuestMemory) -> None:
    where = f"snapshot {path}: memory.bin"
    try:
        with _open(path, "memory.bin") as file:
            size = os.fstat(file.fileno()).st_size
            if size != memory.file_size:
                raise UserError(f"{where} has {size} bytes instead of {memory.file_size}")
            for extent in manifest.memory:
                # Straight into guest memory, and hashed there: what is checked is what is used.
                piece = memory.view[extent.offset : extent.offset + extent.length]
                file.seek(extent.offset)
                got = 0
                while got < extent.length:
                    count = file.readinto(piece[got:])
                    if not count:
                        raise UserError(f"{where} ends early, at {extent.offset + got:#x}")
                    got += count
                if hashlib.sha256(piece).hexdigest() != extent.sha256:
                    raise UserError(
                        f"{where} is damaged between {extent.offset:#x} and "
                        f"{extent.offset + extent.length:#x}: the checksum does not match"
                    )
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
