"""Linux's boot parameters: the "zero page", and the memory map that it carries.

What is filled in: the screen (VGA text of 80 by 25), the ACPI root pointer, the memory map, and the
setup header with the loader's fields. All else is zero; so is the sentinel at 0x1EF, by which the
kernel knows that a loader took care of the page.

Sources: Linux, Documentation/arch/x86/boot.rst and zero-page.rst; struct boot_params and
struct screen_info of arch/x86/include/uapi/asm/bootparam.h and include/uapi/linux/screen_info.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.errors import Subject, UserError, concerning
from devices.pci.ecam import ECAM
from vmm.boot.options import BootOptions
from vmm.boot.placement import MIB, Placement
from vmm.boot.text import c_string
from vmm.memory import HIGH_START, PAGE, GuestMemory

BOOT_PARAMS = 0x50000
COMMAND_LINE = 0x51000
COMMAND_LINE_ROOM = 0x10000

LOW_MEMORY_END = 0x9FC00
"""Where a PC's extended BIOS data area begins."""

BIOS_AREA = 0xE0000
"""From here to 1 MiB lie the tables of the firmware."""

RAM, RESERVED = 1, 2
HEADER = 0x1F1
"""Offset of the setup header, in the file and in the page."""

HEADER_END = 0x290
"""The setup header ends here at most."""

HDRS = b"HdrS"
LOADED_HIGH = 1 << 0
UNKNOWN_LOADER = 0xFF

_SCREEN = struct.Struct("<BBHHBBBBHHBBH")
_TEXT_80X25 = _SCREEN.pack(0, 0, 0, 0, 3, 80, 0, 0, 0, 0, 25, 1, 16)
_RSDP, _E820_COUNT, _E820 = 0x70, 0x1E8, 0x2D0
_E820_ENTRY = struct.Struct("<QQI")
_RAMDISK_IMAGE, _LOADER, _LOADFLAGS, _CODE32_START = 0x218, 0x210, 0x211, 0x214
_CMD_LINE_PTR = 0x228
_SYNTHETIC_VERSION = 0x20C
_VMLINUX_COMMAND_LINE = 2047
_VMLINUX_INITRD_END = 0x8000_0000


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(start, length, type) as a PC's firmware reports it (INT 15h, function E820h)."""
    low = memory.ram[0]
    entries = [
        (0, LOW_MEMORY_END, RAM),
        (LOW_MEMORY_END, 0xA0000 - LOW_MEMORY_END, RESERVED),
        (BIOS_AREA, MIB - BIOS_AREA, RESERVED),
    ]
    if low.end > MIB:
        entries.append((MIB, low.end - MIB, RAM))
    entries.append((ECAM.start, ECAM.length, RESERVED))
    if memory.rom is not None:
        entries.append((memory.rom.start, memory.rom.size, RESERVED))
    entries += [(ram.start, ram.size, RAM) for ram in memory.ram if ram.start >= HIGH_START]
    return entries


def synthetic_setup() -> Setup:
    """For a kernel that comes without a setup header, as a plain vmlinux does."""
    page = bytearray(HEADER_END)
    struct.pack_into("<H", page, 0x1FE, 0xAA55)
    page[0x202:0x206] = HDRS
    struct.pack_into("<H", page, 0x206, _SYNTHETIC_VERSION)
    return Setup(bytes(page[HEADER:]), _VMLINUX_COMMAND_LINE, _VMLINUX_INITRD_END)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a kernel says about its parameters.

    Attributes:
        header: its setup header, from offset 0x1F1 on.
        command_line_limit: bytes that a command line may have, without its NUL.
        initrd_end: the initial RAM disk must lie below this address.
    """

    header: bytes
    command_line_limit: int
    initrd_end: int


def place_command_line(placement: Placement, text: str, limit: int) -> int:
    """Write the command line; its address. `limit`: the bytes it may have, without the NUL.

    Raises:
        UserError: it is too long or no text.
    """
    with concerning(Subject("append")):
        line = c_string("the command line", text)
    limit = min(limit, COMMAND_LINE_ROOM - 1)
    if len(line) - 1 > limit:
        raise UserError(
            f"the command line has {len(line) - 1} bytes, this kernel takes at most {limit}",
            Subject("append"),
        )
    placement.fill("the command line", COMMAND_LINE, line)
    return COMMAND_LINE


def place_initrd(placement: Placement, options: BootOptions, end: int) -> tuple[int, int]:
    """Write the initial RAM disk as high as may be; (address, size), zeros if there is none.

    Args:
        end: the kernel wants all of it below this address.

    Raises:
        UserError: no room.
    """
    if options.initrd is None or not options.initrd.data:
        return 0, 0
    data = options.initrd.data
    start = placement.find_below(len(data), end)
    if start is None or start < MIB:
        raise UserError(
            f"no room for the initrd ({len(data):#x} bytes) beside the kernel in RAM below "
            f"{min(end, placement.low.end):#x}; give the guest more memory",
            Subject("initrd"),
            Subject("mem"),
        )
    placement.fill("the initrd", start, data)
    return start, len(data)


def place(placement: Placement, setup: Setup, options: BootOptions, load_address: int) -> int:
    """Write command line, initial RAM disk and the page, whose address it returns.

    The kernel must have been placed already: it comes first.

    Args:
        load_address: where the protected-mode kernel lies.

    Raises:
        UserError: what cannot be passed, or has no room.
    """
    command_line = place_command_line(placement, options.cmdline, setup.command_line_limit)
    initrd = place_initrd(placement, options, setup.initrd_end)
    page = bytearray(PAGE)
    page[HEADER : HEADER + len(setup.header)] = setup.header
    page[: _SCREEN.size] = _TEXT_80X25
    struct.pack_into("<Q", page, _RSDP, options.rsdp or 0)
    entries = memory_map(placement.memory)
    page[_E820_COUNT] = len(entries)
    for index, entry in enumerate(entries):
        _E820_ENTRY.pack_into(page, _E820 + index * _E820_ENTRY.size, *entry)
    page[_LOADER] = UNKNOWN_LOADER
    # Nothing but where the kernel lies: no KASLR by anyone else, no heap, messages stay on.
    page[_LOADFLAGS] = LOADED_HIGH
    struct.pack_into("<I", page, _CODE32_START, load_address)
    struct.pack_into("<II", page, _RAMDISK_IMAGE, *initrd)
    struct.pack_into("<I", page, _CMD_LINE_PTR, command_line)
    placement.fill("the boot parameters", BOOT_PARAMS, bytes(page))
    return BOOT_PARAMS
