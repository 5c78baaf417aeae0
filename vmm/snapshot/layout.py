"""What a snapshot directory consists of.

- ``manifest.json``: format version, the machine's configuration, the engine's version, the size and
  SHA-256 of every other file, the stretches of memory that hold data, console bytes in flight,
  what became of the files of the host that devices use; itself under a checksum.
- ``cpu.json``: the architectural state (`vmm.cpu.state.CpuState`).
- ``memory.bin``: RAM as a sparse file; what was never touched is a hole and takes no disk.
- ``devices/NAME.json``: one file for each device, its state as plain values.
- ``disks/NAME.OPTION``: the content, at that time, of a file that a device could write.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from vmm.clock import ClockState
from vmm.config import NAME, MachineConfig
from vmm.cpu.state import CpuState
from vmm.vcpu import InterruptWindow

FORMAT = 2
"""Version of the layout above; a reader refuses a newer one."""

DISK = re.compile(rf"{NAME.pattern}\.[A-Za-z_][A-Za-z0-9_]*")
"""A disk's name: that of its device and that of the option that names the file."""
_FILE = re.compile(
    rf"(manifest|cpu)\.json|memory\.bin|devices/{NAME.pattern}\.json|disks/{DISK.pattern}"
)
DIRECTORIES = ("devices", "disks")


def is_file_name(name: str) -> bool:
    """Whether a snapshot may have a file of this name."""
    return _FILE.fullmatch(name) is not None


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


@dataclass(frozen=True)
class FileIdentity:
    """By what a file is known again that nobody has written to.

    Attributes:
        size: in bytes.
        written: its time of modification in nanoseconds since 1970; 0 for a block device, whose
            time says nothing.
    """

    size: int
    written: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return cls(os.lseek(fd, 0, os.SEEK_END), 0)
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class SavedDisk:
    """A file of the host that a device used, as it was at the snapshot's time.

    Attributes:
        original: the file itself.
        copy: that of its copy, ``disks/NAME.OPTION``; None: there is none.
        sha256: of the copy's content (see `vmm.disks.Digest`); "" for a clone, which was not read.
    """

    original: FileIdentity
    copy: FileIdentity | None = None
    sha256: str = ""


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
    disks: dict[str, SavedDisk] = field(default_factory=dict)


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
