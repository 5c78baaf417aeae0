"""The PVH entry: kernels that name a 32-bit entry in an ELF note.

The kernel starts in 32-bit protected mode without paging (see `entry`), CR0 = PE and ET alone, TR a
busy 32-bit TSS of limit 0x67, EBX = the start information: memory map, command line, modules (the
initial RAM disk is the first) and the ACPI root pointer. Linux, FreeBSD, Xen itself and small
kernels made for virtual machines have this entry.

Sources: Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from devices.errors import Subject, UserError, concerning
from vmm.boot import boot_params, elf, entry, multiboot_info
from vmm.boot.options import BootOptions, BootResult, Mode
from vmm.boot.placement import MIB, Placement
from vmm.boot.text import c_string
from vmm.cpu.state import TSS32_BUSY, Segment
from vmm.memory import GuestMemory

OWNER = "Xen"
GUEST_OS = 6
PHYS32_ENTRY = 18
MAGIC = 0x336EC578
VERSION = 1
"""The first version with a memory map."""

INFO_ADDRESS = 0x50000
INFO_LIMIT = 0x30000

_INFO = struct.Struct("<4I4Q2I")
_MODULE = struct.Struct("<4Q")
_MAP_ENTRY = struct.Struct("<QQII")
_EBX = 3


def entry_point(executable: elf.Executable) -> int | None:
    """The physical address in the PVH note, if there is one."""
    for note in executable.notes:
        if note[:2] == (OWNER, PHYS32_ENTRY) and len(note.data) in (4, 8):
            return int.from_bytes(note.data, "little")
    return None


def load(
    memory: GuestMemory, image: bytes, executable: elf.Executable, options: BootOptions
) -> BootResult:
    """Load an ELF kernel that has a PVH note, its modules and the start information.

    Raises:
        UserError: it has no such note, or what does not fit.
    """
    start = entry_point(executable)
    if start is None:
        raise UserError(
            f"it has no PVH entry (ELF note {PHYS32_ENTRY} of {OWNER})", Subject("kernel-entry")
        )
    if not any(0 <= start - s.paddr < s.memory_size for s in executable.segments):
        raise UserError(f"the PVH entry {start:#x} lies in no loaded segment")
    placement = Placement(memory)
    entry.prepare(placement, Mode.PROTECTED)
    executable.place(image, placement)
    state = entry.state(Mode.PROTECTED, start)
    state.cr0 = entry.CR0_PE | entry.CR0_ET
    state.tr = Segment(0, 0, 0x67, TSS32_BUSY)
    modules = []
    initrd = boot_params.place_initrd(placement, options, placement.low.end)
    if options.initrd is not None and initrd[1]:
        modules.append((*initrd, options.initrd.text))
    for module in multiboot_info.place_modules(placement, options.modules, MIB):
        modules.append((module.start, module.end - module.start, module.text))
    state.gpr[_EBX] = _place_info(placement, modules, options)
    return BootResult("pvh", state, elf.symbols(image))


def _place_info(
    placement: Placement, modules: list[tuple[int, int, str]], options: BootOptions
) -> int:
    entries = boot_params.memory_map(placement.memory)
    map_at = INFO_ADDRESS + _INFO.size
    modules_at = map_at + len(entries) * _MAP_ENTRY.size
    texts_at = modules_at + len(modules) * _MODULE.size
    with concerning(*multiboot_info.TEXTS):
        texts = bytearray(c_string("the command line", options.cmdline))
        module_bytes = b""
        for number, (start, size, text) in enumerate(modules):
            module_bytes += _MODULE.pack(start, size, texts_at + len(texts), 0)
            texts += c_string(f"the text of module {number}", text)
    info = _INFO.pack(
        *(MAGIC, VERSION, 0, len(modules)),
        *(modules_at if modules else 0, texts_at, options.rsdp or 0, map_at),
        *(len(entries), 0),
    )
    info += b"".join(_MAP_ENTRY.pack(*entry, 0) for entry in entries) + module_bytes + texts
    if len(info) > INFO_LIMIT:
        raise UserError(
            f"command line and module texts need {len(info):#x} bytes of PVH start information, "
            f"there is room for {INFO_LIMIT:#x}",
            *multiboot_info.TEXTS,
        )
    placement.fill("the PVH start information", INFO_ADDRESS, info)
    return INFO_ADDRESS
