"""ELF executables: 32-bit ones start in protected mode, 64-bit ones in long mode.

What is honoured: the PT_LOAD segments, each at its physical address (``p_paddr``) with the part
past its file contents zeroed, and the entry point. The entry may be a virtual address: if a
segment's virtual range holds it, it is moved to where that segment lies physically; otherwise it
must be a physical address inside a segment (as in Linux's vmlinux).

``ET_EXEC`` and ``ET_DYN`` are taken. A position-independent executable (ET_DYN) goes to the
addresses that its segments name, and its relocations are its own to apply. What asks for a
dynamic linker (PT_INTERP) is refused.

Source: System V ABI, chapters 4 and 5 ("Object Files", "Program Loading").
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from devices.errors import UserError
from vmm.boot import entry
from vmm.boot.options import BootResult, Mode
from vmm.boot.placement import Placement, span
from vmm.memory import GuestMemory

MAGIC = b"\x7fELF"
MACHINES = {32: "EM_386", 64: "EM_X86_64"}
"""The machine that each class must be for."""

_CLASSES = {1: 32, 2: 64}
_LITTLE_ENDIAN = 1
_HEADER_SIZE = {32: 52, 64: 64}
_PROGRAM_HEADER_SIZE = {32: 32, 64: 56}
_SECTION_HEADER_SIZE = {32: 40, 64: 64}
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
_MAX_COUNT = 0xFEFF
"""From here up, header counts are stored elsewhere (PN_XNUM, SHN_LORESERVE)."""
_STT_FUNC, _STT_NOTYPE, _STT_OBJECT = 2, 0, 1
_SHF_COMPRESSED = 1 << 11
_MAX_NOTES = 1000
_NOTE = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class LoadSegment:
    """A PT_LOAD program header; `index` is its place in the program header table."""

    index: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int

    def __str__(self) -> str:
        return f"segment {self.index}"


class Note(NamedTuple):
    """An entry of a PT_NOTE segment."""

    owner: str
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Executable:
    """What is needed to load an ELF file.

    Attributes:
        bits: 32 or 64, its class.
        entry: the guest-physical address of its first instruction.
        segments: those with a memory size above zero.
        notes: of the PT_NOTE segments, as far as they can be read.
    """

    bits: int
    entry: int
    segments: tuple[LoadSegment, ...]
    notes: tuple[Note, ...] = ()

    def place(self, image: bytes, placement: Placement) -> None:
        """Copy the segments to guest RAM and zero what lies past their file contents.

        Raises:
            UserError: a segment is outside RAM or overlaps something.
        """
        view = memoryview(image)
        for segment in self.segments:
            data = view[segment.offset : segment.offset + segment.file_size]
            placement.fill(str(segment), segment.paddr, data, segment.memory_size)


def load(memory: GuestMemory, image: bytes, executable: Executable) -> BootResult:
    """Load an ELF executable, parsed already; see `entry` for the CPU's state.

    Raises:
        UserError: what is wrong with it, and where.
    """
    mode = Mode(executable.bits)
    placement = Placement(memory)
    entry.prepare(placement, mode)
    executable.place(image, placement)
    state = entry.state(mode, executable.entry)
    return BootResult(f"elf{executable.bits}", state, symbols(image))


def parse(image: bytes) -> Executable:
    """Read and check the headers.

    Raises:
        UserError: they cannot be loaded.
    """
    bits = _check_identification(image)
    elf, headers = _read_headers(image, bits)
    kind, machine = elf["e_type"], elf["e_machine"]
    if machine != MACHINES[bits]:
        raise UserError(
            f"an ELF{bits} file for machine {machine}; this machine runs EM_386 (ELF32) "
            "and EM_X86_64 (ELF64)"
        )
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise UserError(f"an ELF file of type {kind}, which is not an executable")
    segments = []
    notes: list[Note] = []
    for index, header in enumerate(headers):
        if header["p_type"] == "PT_INTERP":
            raise UserError(
                f"program header {index} asks for a dynamic linker (PT_INTERP): this is a program "
                "for an operating system, not a guest"
            )
        if header["p_type"] == "PT_LOAD" and header["p_memsz"]:
            segments.append(_segment(index, header, len(image)))
        if header["p_type"] == "PT_NOTE":
            found = _notes(image, header["p_offset"], header["p_filesz"])
            notes += islice(found, _MAX_NOTES - len(notes))
    if not segments:
        raise UserError("an ELF file with nothing to load: it has no PT_LOAD segment")
    start = _physical_entry(elf["e_entry"], segments)
    return Executable(bits, start, tuple(segments), tuple(notes))


def symbols(image: bytes) -> list[tuple[int, int, str]]:
    """(address, size, name) of the functions and labels of .symtab, by ascending address.

    For reports only: a file without symbols, or with a broken table, has none.
    """
    try:
        return sorted(_read_symbols(image))
    except Exception:  # pyelftools raises many kinds for a broken section table
        return []


def _check_identification(image: bytes) -> int:
    """Check e_ident and the fields that lead to the program headers; the class in bits."""
    if len(image) < 16:
        raise UserError(f"a truncated ELF file: {len(image)} bytes, e_ident alone has 16")
    bits = _CLASSES.get(image[4])
    if bits is None:
        raise UserError(f"an ELF file of unknown class {image[4]} (offset 0x4)")
    if image[5] != _LITTLE_ENDIAN:
        raise UserError(f"an ELF file with data encoding {image[5]} (offset 0x5), x86 has 1")
    if len(image) < _HEADER_SIZE[bits]:
        raise UserError(
            f"a truncated ELF file: {len(image)} bytes, its header has {_HEADER_SIZE[bits]}"
        )
    return bits


def _read_headers(image: bytes, bits: int) -> tuple[Any, list[Any]]:
    """The ELF header and the program headers, parsed by pyelftools."""
    from elftools.elf.elffile import ELFFile

    layout = struct.Struct("<I10xHH" if bits == 32 else "<Q14xHH")
    offset, entry_size, count = layout.unpack_from(image, 28 if bits == 32 else 32)
    end = offset + entry_size * count
    if count == 0:
        raise UserError("an ELF file with nothing to load: it has no program headers")
    if entry_size != _PROGRAM_HEADER_SIZE[bits]:
        raise UserError(
            f"an ELF{bits} file with program headers of {entry_size} bytes, "
            f"not {_PROGRAM_HEADER_SIZE[bits]}"
        )
    if count > _MAX_COUNT:
        raise UserError(f"an ELF file with {count} program headers; at most {_MAX_COUNT} are read")
    if end > len(image):
        raise UserError(
            f"a truncated ELF file: program headers at {span(offset, entry_size * count)}, "
            f"end of file at {len(image):#x}"
        )
    try:
        # Without its section table: a loader needs none, and a broken one must not matter.
        prefix = bytearray(image[:end])
        sections = "<I" if bits == 32 else "<Q"
        struct.pack_into(sections, prefix, 32 if bits == 32 else 40, 0)
        elf = ELFFile(io.BytesIO(prefix))
        return elf, [elf.get_segment(index).header for index in range(count)]
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"an ELF file that does not parse: {reason}") from error


def _segment(index: int, header: Any, file_end: int) -> LoadSegment:
    segment = LoadSegment(
        index,
        header["p_offset"],
        header["p_vaddr"],
        header["p_paddr"],
        header["p_filesz"],
        header["p_memsz"],
    )
    if segment.file_size > segment.memory_size:
        raise UserError(
            f"segment {index} has {segment.file_size:#x} bytes in the file "
            f"but only {segment.memory_size:#x} in memory"
        )
    if segment.file_size and segment.offset + segment.file_size > file_end:
        raise UserError(
            f"a truncated ELF file: segment {index} is at file offset "
            f"{span(segment.offset, segment.file_size)}, end of file at {file_end:#x}"
        )
    # An offset counts for nothing when there are no bytes behind it.
    return segment if segment.file_size else replace(segment, offset=0)


def _notes(image: bytes, offset: int, size: int) -> Iterator[Note]:
    """The notes of a segment up to the first that leads out of it."""
    end = min(offset + size, len(image))
    while offset + _NOTE.size <= end:
        name_size, data_size, kind = _NOTE.unpack_from(image, offset)
        name_at = offset + _NOTE.size
        data_at = name_at + name_size + -name_size % 4
        if data_at + data_size > end:
            return
        name = image[name_at : name_at + name_size].rstrip(b"\0").decode("utf-8", "replace")
        yield Note(name, kind, image[data_at : data_at + data_size])
        offset = data_at + data_size + -data_size % 4


def _physical_entry(address: int, segments: list[LoadSegment]) -> int:
    for segment in segments:
        if 0 <= address - segment.vaddr < segment.memory_size:
            return address - segment.vaddr + segment.paddr
    for segment in segments:
        if 0 <= address - segment.paddr < segment.memory_size:
            return address
    raise UserError(f"the entry point {address:#x} lies in no loaded segment")


def _read_symbols(image: bytes) -> Iterator[tuple[int, int, str]]:
    """May raise anything."""
    from elftools.elf.elffile import ELFFile

    elf: Any = ELFFile(io.BytesIO(image))
    bits = elf.elfclass
    count, entry_size = elf["e_shnum"], elf["e_shentsize"]
    if not 0 < count <= _MAX_COUNT or entry_size != _SECTION_HEADER_SIZE[bits]:
        return
    for table in elf.iter_sections("SHT_SYMTAB"):
        # Rows are unpacked here: through pyelftools the symbols of a Linux kernel take seconds.
        rows = _contents(image, table.header)
        names = _contents(image, elf.get_section(table["sh_link"]).header)
        row = _SYMBOL[bits]
        for fields in row.iter_unpack(rows[: len(rows) // row.size * row.size]):
            if bits == 32:
                name, value, size, info, _, section = fields
            else:
                name, info, _, section, value, size = fields
            if section == 0 or info & 0xF not in (_STT_FUNC, _STT_NOTYPE, _STT_OBJECT):
                continue
            text = names[name : names.index(b"\0", name)].decode("utf-8", "replace")
            if text:
                yield value, size, text


def _contents(image: bytes, header: Any) -> bytes:
    offset, size = header["sh_offset"], header["sh_size"]
    if header["sh_flags"] & _SHF_COMPRESSED or offset + size > len(image):
        raise ValueError("not a plain section of this file")
    return image[offset : offset + size]
