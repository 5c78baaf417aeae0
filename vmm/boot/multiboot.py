"""Multiboot 1 kernels: the header, where the kernel goes, and its entry state.

The kernel starts in 32-bit protected mode (see `entry`) with EAX = 0x2BADB002 and EBX = the
physical address of the information structure (see `multiboot_info`). GDTR and stack, which the
specification leaves open, are those of `entry`.

Header flags:
- bit 0 (modules on page boundaries) and bit 1 (memory information): always done.
- bit 2 (video mode wanted): accepted; there is no display, so the information structure has
  neither VBE nor framebuffer fields (its bits 11 and 12 are clear), and `BootResult.notes` says so.
- bits 3..15: requirements that nobody has defined; refused.
- bit 16: the header's address fields are used, also when the file is an ELF file. Without it
  the file must be ELF: 32-bit, or 64-bit with an entry below 4 GiB.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.errors import UserError
from vmm.boot import elf, entry, multiboot_info
from vmm.boot.options import BootOptions, BootResult, Mode
from vmm.boot.placement import Placement
from vmm.memory import GuestMemory

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
SEARCH_LIMIT = 8192
"""The whole header lies in this many first bytes of the file, on a 4-byte boundary."""

FLAG_VIDEO = 1 << 2
FLAG_ADDRESSES = 1 << 16
_KNOWN_MANDATORY = 0b111
_MANDATORY = 0xFFFF

_MAGIC_BYTES = struct.pack("<I", HEADER_MAGIC)
_BASE = struct.Struct("<III")
_ADDRESSES = struct.Struct("<IIIII")
_EAX, _EBX = 0, 3


@dataclass(frozen=True, slots=True)
class Header:
    """A Multiboot header: where in the file it begins, and its flags."""

    offset: int
    flags: int


def find_header(image: bytes) -> Header | None:
    """The first magic number whose checksum is right, if there is one."""
    for offset, flags, checksum in _magics(image):
        if (HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
            return Header(offset, flags)
    return None


def find_broken_header(image: bytes) -> int | None:
    """The offset of a magic number with a wrong checksum, for a file that has no valid header."""
    return next((offset for offset, _, _ in _magics(image)), None)


def _magics(image: bytes) -> list[tuple[int, int, int]]:
    """(offset, flags, checksum) for each aligned magic number in the search range."""
    found = []
    limit = min(len(image), SEARCH_LIMIT)
    offset = image.find(_MAGIC_BYTES, 0, limit)
    while 0 <= offset <= limit - _BASE.size:
        if offset % 4 == 0:
            _, flags, checksum = _BASE.unpack_from(image, offset)
            found.append((offset, flags, checksum))
        offset = image.find(_MAGIC_BYTES, offset + 1, limit)
    return found


def load(memory: GuestMemory, image: bytes, options: BootOptions, header: Header) -> BootResult:
    """Load a kernel, its modules and the information structure.

    Raises:
        UserError: what is wrong, and where.
    """
    unknown = header.flags & _MANDATORY & ~_KNOWN_MANDATORY
    if unknown:
        bits = ", ".join(str(bit) for bit in range(16) if unknown >> bit & 1)
        raise UserError(
            f"the Multiboot header at offset {header.offset:#x} demands features that are not "
            f"known here: flag bits {bits}"
        )
    placement = Placement(memory)
    entry.prepare(placement, Mode.PROTECTED)
    if header.flags & FLAG_ADDRESSES:
        start, kernel_end = _place_by_addresses(image, header, placement)
    elif image.startswith(elf.MAGIC):
        start, kernel_end = _place_elf(image, placement)
    else:
        raise UserError(
            f"the Multiboot header at offset {header.offset:#x} has no address fields (flag bit "
            "16) and the file is not ELF, so nothing says where to load it"
        )
    state = entry.state(Mode.PROTECTED, start)
    given = options.modules if options.initrd is None else (options.initrd, *options.modules)
    modules = multiboot_info.place_modules(placement, given, kernel_end)
    state.gpr[_EAX] = LOADER_MAGIC
    state.gpr[_EBX] = multiboot_info.place(placement, options.cmdline, modules)
    notes = []
    if header.flags & FLAG_VIDEO:
        notes.append("the kernel asks for a video mode; this machine has no display")
    return BootResult("multiboot", state, elf.symbols(image), notes)


def _place_elf(image: bytes, placement: Placement) -> tuple[int, int]:
    """(entry, end of the kernel) of a kernel whose ELF headers say where it goes."""
    executable = elf.parse(image)
    executable.place(image, placement)
    return executable.entry, max(s.paddr + s.memory_size for s in executable.segments)


def _place_by_addresses(image: bytes, header: Header, placement: Placement) -> tuple[int, int]:
    """(entry, end of the kernel) of a kernel whose header says where it goes.

    The field names are the specification's (section 3.1.3).
    """
    fields = header.offset + _BASE.size
    where = f"the Multiboot header at offset {header.offset:#x}"
    if fields + _ADDRESSES.size > min(len(image), SEARCH_LIMIT):
        raise UserError(
            f"{where} is truncated: its address fields end at {fields + _ADDRESSES.size:#x}, "
            f"the file at {len(image):#x} (and the search at {SEARCH_LIMIT:#x})"
        )
    addresses = _ADDRESSES.unpack_from(image, fields)
    header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr = addresses
    if not load_addr <= header_addr <= load_addr + header.offset:
        raise UserError(
            f"{where}: header_addr {header_addr:#x} and load_addr {load_addr:#x} ask for bytes "
            "outside the file"
        )
    first = header.offset - (header_addr - load_addr)
    if load_end_addr == 0:
        load_end_addr = load_addr + len(image) - first
    if load_end_addr <= load_addr:
        raise UserError(
            f"{where}: load_end_addr {load_end_addr:#x} is not above load_addr {load_addr:#x}"
        )
    last = first + load_end_addr - load_addr
    if last > len(image):
        raise UserError(
            f"{where}: the kernel is truncated: it ends at file offset {last:#x}, "
            f"the file at {len(image):#x}"
        )
    if 0 < bss_end_addr < load_end_addr:
        raise UserError(
            f"{where}: bss_end_addr {bss_end_addr:#x} is below load_end_addr {load_end_addr:#x}"
        )
    end = max(load_end_addr, bss_end_addr)
    if not load_addr <= entry_addr < end:
        raise UserError(
            f"{where}: entry_addr {entry_addr:#x} is outside the kernel "
            f"({load_addr:#x}-{end - 1:#x})"
        )
    placement.fill("the kernel", load_addr, memoryview(image)[first:last], end - load_addr)
    return entry_addr, end
