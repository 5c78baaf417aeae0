"""The Multiboot 1 information structure and the modules it lists.

Present (and their flag bits set): mem_lower and mem_upper (0), cmdline (2), modules (3; the count
may be 0), the memory map (6), the loader's name (9). Absent: boot device, symbol tables, drives,
ROM configuration table, APM, VBE and framebuffer.

The memory map tells the whole machine: RAM up to 0x9FC00, the hole up to 1 MiB as reserved, RAM
from 1 MiB to at most 3 GiB, and RAM above 4 GiB. What the loader itself put into low memory
counts as available: a kernel copies what it wants to keep, as on other loaders.

Source: Multiboot Specification 0.6.96, section 3.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from devices.errors import Subject, UserError, concerning
from vmm.boot.options import Module
from vmm.boot.placement import MIB, Placement
from vmm.boot.text import c_string
from vmm.memory import GuestMemory

INFO_ADDRESS = 0x50000
INFO_LIMIT = 0x30000
"""Room for the structure, its lists and texts."""
TEXTS = Subject("append"), Subject("module")
"""What the texts come from."""

LOADER_NAME = "jailed-vmm"
LOW_MEMORY_END = 0x9FC00
"""Where a PC's extended BIOS data area begins."""

AVAILABLE, RESERVED = 1, 2
_FLAGS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
_INFO = struct.Struct("<11I2I5I")
"""The fields up to, and not including, those of VBE: offsets 0..71."""
_INFO_SIZE = 116
_MAP_ENTRY = struct.Struct("<IQQI")
_MODULE_ENTRY = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """A module in guest RAM: ``start .. end`` (exclusive) and its text."""

    start: int
    end: int
    text: str


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(start, length, type) of the machine's physical address space."""
    low = memory.ram[0]
    entries = [
        (0, LOW_MEMORY_END, AVAILABLE),
        (LOW_MEMORY_END, MIB - LOW_MEMORY_END, RESERVED),
    ]
    if low.end > MIB:
        entries.append((MIB, low.end - MIB, AVAILABLE))
    entries += [(high.start, high.size, AVAILABLE) for high in memory.ram[1:]]
    return entries


def place_modules(
    placement: Placement, modules: Iterable[Module], kernel_end: int
) -> list[PlacedModule]:
    """Copy the modules to page boundaries above the kernel, or to the lowest room above 1 MiB.

    Raises:
        UserError: no room for one.
    """
    placed = []
    for number, module in enumerate(modules):
        # An empty module has an address of its own too.
        size = max(1, len(module.data))
        start = placement.find(size, max(kernel_end, MIB))
        if start is None:
            start = placement.find(size, MIB)
        if start is None:
            raise UserError(
                f"no room for module {number} ({size:#x} bytes) in RAM below "
                f"{placement.low.end:#x}; give the guest more memory",
                Subject("module"),
                Subject("mem"),
            )
        placement.fill(f"module {number}", start, module.data, size)
        placed.append(PlacedModule(start, start + len(module.data), module.text))
    return placed


def place(placement: Placement, cmdline: str, modules: Sequence[PlacedModule]) -> int:
    """Write the information structure; its physical address.

    Raises:
        UserError: a text that cannot be passed, or too much of it.
    """
    entries = memory_map(placement.memory)
    memory_map_at = INFO_ADDRESS + _INFO_SIZE
    memory_map_bytes = b"".join(
        # `size` counts what follows it.
        _MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *entry)
        for entry in entries
    )
    modules_at = memory_map_at + len(memory_map_bytes)
    texts_at = modules_at + len(modules) * _MODULE_ENTRY.size
    texts = bytearray()

    def text_address(what: str, text: str) -> int:
        address = texts_at + len(texts)
        with concerning(*TEXTS):
            texts.extend(c_string(what, text))
        return address

    module_bytes = b"".join(
        _MODULE_ENTRY.pack(m.start, m.end, text_address(f"the text of module {number}", m.text), 0)
        for number, m in enumerate(modules)
    )
    low_end = placement.low.end
    fields = _INFO.pack(
        *(_FLAGS, LOW_MEMORY_END >> 10, max(0, low_end - MIB) >> 10),
        *(0, text_address("the command line", cmdline), len(modules), modules_at),
        *(0, 0, 0, 0),
        *(len(memory_map_bytes), memory_map_at),
        *(0, 0, 0, text_address("the loader's name", LOADER_NAME), 0),
    )
    info = fields.ljust(_INFO_SIZE, b"\0") + memory_map_bytes + module_bytes + texts
    if len(info) > INFO_LIMIT:
        raise UserError(
            f"command line and module texts need {len(info):#x} bytes of Multiboot "
            f"information, there is room for {INFO_LIMIT:#x}",
            *TEXTS,
        )
    placement.fill("the Multiboot information", INFO_ADDRESS, info)
    return INFO_ADDRESS
