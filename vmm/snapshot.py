"""Snapshot directories: the format, written atomically and read with suspicion.

A snapshot is a directory:

- ``manifest.json``: format version, the machine's configuration, the engine's version, the size and
  SHA-256 of every other file, the stretches of memory that hold data, console bytes in flight;
  itself under a checksum.
- ``cpu.json``: the architectural state (`vmm.cpu.state.CpuState`).
- ``memory.bin``: RAM as a sparse file; what was never touched is a hole and takes no disk.
- ``devices/NAME.json``: one file for each device, its state as plain values.

It is written into a temporary directory beside its destination, flushed, and renamed. Nothing in it
is ever executed or unpickled; every number is checked before it is used.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from devices.errors import DeviceError, UserError
from vmm.clock import ClockState
from vmm.config import NAME, MachineConfig
from vmm.cpu.state import CpuState
from vmm.memory import PAGE, GuestMemory
from vmm.vcpu import InterruptWindow

FORMAT = 1
"""Version of the layout above; a reader refuses a newer one."""

_MANIFEST_LIMIT = 16 << 20
_FILE_LIMIT = 64 << 20
_CHUNK = 4 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_FILE = re.compile(rf"(manifest|cpu)\.json|memory\.bin|devices/{NAME.pattern}\.json")
_T = TypeVar("_T")


@dataclass
class FileInfo:
    """What the manifest promises about one file."""

    size: int
    sha256: str


@dataclass
class Extent:
    """A stretch of memory with data: offset and length in ``memory.bin``, in bytes."""

    offset: int
    length: int
    sha256: str


@dataclass
class ConsoleState:
    """Bytes that the outside world sent and that no device has accepted yet."""

    pending_input: bytes = b""


@dataclass
class Manifest:
    """What ``manifest.json`` says, apart from its own version and checksum."""

    config: MachineConfig
    engine: str
    files: dict[str, FileInfo]
    memory: list[Extent]
    executed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    clock: ClockState = field(default_factory=ClockState)
    window: InterruptWindow = field(default_factory=InterruptWindow)
    console: ConsoleState = field(default_factory=ConsoleState)


@dataclass
class _Envelope:
    format: int
    sha256: str
    body: msgspec.Raw


@dataclass
class Snapshot:
    """A whole machine at one instruction boundary, without its memory.

    Attributes:
        devices: device name -> state as plain values.
        executed: bytes of code executed so far.
    """

    config: MachineConfig
    engine: str
    cpu: CpuState
    devices: dict[str, Any]
    executed: int = 0
    clock: ClockState = field(default_factory=ClockState)
    window: InterruptWindow = field(default_factory=InterruptWindow)
    console: ConsoleState = field(default_factory=ConsoleState)


def save(path: Path, snapshot: Snapshot, memory: GuestMemory) -> None:
    """Write `snapshot` and `memory` as the directory `path`; all of it or nothing.

    A snapshot that is there already is replaced in one step.

    Raises:
        UserError: the place cannot be written, or holds something that is not a snapshot.
        DeviceError: a device's state is not made of plain values.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not _is_replaceable(path):
        raise UserError(f"snapshot {path}: exists and is not a snapshot; name another place")
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"snapshot {path}: {error.strerror}") from error
    try:
        _write_all(work, snapshot, memory)
        os.chmod(work, 0o755)
        _put_in_place(work, path)
    except OSError as error:
        raise UserError(f"snapshot {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    envelope = _read_envelope(path)
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
    end = 0
    for extent in manifest.memory:
        if extent.offset % PAGE or extent.length <= 0 or extent.offset < end:
            raise UserError(f"{where}: memory stretch at {extent.offset:#x} is out of order")
        end = extent.offset + extent.length
    if end > manifest.config.memory + manifest.config.rom:
        raise UserError(f"{where}: memory stretches end at {end:#x}, past the guest's memory")


# Writing.


def _is_replaceable(path: Path) -> bool:
    """Whether nothing but a snapshot, whole or damaged, is lost with this."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        if any(path.iterdir()):
            _read_envelope(path)
        return all(_belongs(each, str(each.relative_to(path))) for each in path.rglob("*"))
    except (UserError, OSError):
        return False


def _belongs(entry: Path, name: str) -> bool:
    if entry.is_symlink():
        return False
    known = _FILE.fullmatch(name) is not None
    return (known and entry.is_file()) or (name == "devices" and entry.is_dir())


def _write_all(work: Path, snapshot: Snapshot, memory: GuestMemory) -> None:
    (work / "devices").mkdir()
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
        )
    )
    body = msgspec.json.format(body, indent=2)
    head = f'{{"format": {FORMAT}, "sha256": "{hashlib.sha256(body).hexdigest()}", "body": '
    _write_bytes(work / "manifest.json", head.encode() + body + b"}\n")
    _sync_directory(work / "devices")
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
                _write_at(fd, piece, offset)
                extents.append(Extent(offset, len(piece), hashlib.sha256(piece).hexdigest()))
        os.fsync(fd)
    finally:
        os.close(fd)
    return extents


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


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


# Reading.


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


def _read_envelope(path: Path) -> _Envelope:
    data = _read_bounded(path, "manifest.json", _MANIFEST_LIMIT)
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
