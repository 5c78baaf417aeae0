"""Tables that point at each other before anyone knows where they will lie.

The pieces are files with two kinds of notes: "here is a pointer" and "here is a checksum". The
machine resolves them itself when it plays firmware; real firmware gets files and notes through
fw_cfg and does the same (`script`).

Source of the script: SeaBIOS, src/fw/romfile_loader.h; the interface is QEMU's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from devices.platform.fw_cfg import FILE_NAME_SIZE

_ENTRY_SIZE = 128
_ALLOCATE = struct.Struct(f"<I{FILE_NAME_SIZE}sIB")
_POINTER = struct.Struct(f"<I{FILE_NAME_SIZE}s{FILE_NAME_SIZE}sIB")
_CHECKSUM = struct.Struct(f"<I{FILE_NAME_SIZE}sIII")


class Zone(IntEnum):
    """Where firmware shall put a file."""

    HIGH = 1
    FSEG = 2
    """From 0xF0000 to 0xFFFFF, where kernels look for the RSDP."""


class _Command(IntEnum):
    ALLOCATE = 1
    ADD_POINTER = 2
    ADD_CHECKSUM = 3


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The byte that makes the sum of `data` and itself zero, modulo 256."""
    return -sum(data) & 0xFF


@dataclass(frozen=True, slots=True)
class _Pointer:
    """`size` bytes at `offset` of `file` hold an offset in `target`, to become an address."""

    file: str
    offset: int
    size: int
    target: str


@dataclass(frozen=True, slots=True)
class _Checksum:
    """The byte at `offset` of `file` makes the sum from `start` on zero."""

    file: str
    offset: int
    start: int
    length: int


class LinkedFile:
    """One file that grows; `Linker.file` makes it."""

    def __init__(self, linker: Linker, name: str, align: int, zone: Zone) -> None:
        self.name = name
        self.align = align
        self.zone = zone
        self.data = bytearray()
        self._linker = linker

    def add(self, data: bytes, align: int = 1) -> int:
        """Append `data` at the next multiple of `align`; its offset."""
        if self.align % align:
            raise ValueError(f"'{self.name}' is aligned to {self.align}, not to {align}")
        self.data += bytes(-len(self.data) % align)
        offset = len(self.data)
        self.data += data
        return offset

    def point(self, offset: int, size: int, target: LinkedFile, to: int) -> None:
        """Make the `size` bytes at `offset` a pointer to offset `to` of `target`."""
        self.data[offset : offset + size] = to.to_bytes(size, "little")
        self._linker.notes.append(_Pointer(self.name, offset, size, target.name))

    def sum(self, offset: int, start: int, length: int) -> None:
        """Make the byte at `offset` the checksum of `length` bytes from `start` on.

        Checksums are made in the order of the calls, after all pointers so far.
        """
        self.data[offset] = 0
        self._linker.notes.append(_Checksum(self.name, offset, start, length))


class Linker:
    """Files by name, and the notes about them in order."""

    def __init__(self) -> None:
        self.files: dict[str, LinkedFile] = {}
        self.notes: list[_Pointer | _Checksum] = []

    def file(self, name: str, align: int, zone: Zone) -> LinkedFile:
        self.files[name] = LinkedFile(self, name, align, zone)
        return self.files[name]

    def resolve(self, places: Mapping[str, int]) -> dict[str, bytes]:
        """The finished files, given the address of each.

        Raises:
            ValueError: a place is not aligned, or an address does not fit its pointer.
        """
        data = {name: bytearray(file.data) for name, file in self.files.items()}
        for name, file in self.files.items():
            if places[name] % file.align:
                raise ValueError(f"'{name}' at {places[name]:#x} is not aligned to {file.align}")
        for note in self.notes:
            content = data[note.file]
            if isinstance(note, _Checksum):
                content[note.offset] = checksum(content[note.start : note.start + note.length])
                continue
            field = slice(note.offset, note.offset + note.size)
            address = int.from_bytes(content[field], "little") + places[note.target]
            if address >= 1 << 8 * note.size:
                raise ValueError(f"{address:#x} does not fit a pointer of {note.size} bytes")
            content[field] = address.to_bytes(note.size, "little")
        return {name: bytes(content) for name, content in data.items()}

    def script(self) -> bytes:
        """The commands by which firmware does the same: the file ``etc/table-loader``."""
        commands = [
            _ALLOCATE.pack(_Command.ALLOCATE, file.name.encode(), file.align, file.zone)
            for file in self.files.values()
        ]
        for note in self.notes:
            name = note.file.encode()
            if isinstance(note, _Checksum):
                command = _CHECKSUM.pack(
                    _Command.ADD_CHECKSUM, name, note.offset, note.start, note.length
                )
            else:
                command = _POINTER.pack(
                    _Command.ADD_POINTER, name, note.target.encode(), note.offset, note.size
                )
            commands.append(command)
        return b"".join(command.ljust(_ENTRY_SIZE, b"\0") for command in commands)
