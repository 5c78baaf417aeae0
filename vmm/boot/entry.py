"""The CPU's state at the first instruction of a guest, and the tables in RAM that it needs.

The contract, for every format unless the format's own module says more:

32-bit protected mode (`Mode.PROTECTED`: flat by default, ELF32, Multiboot)
    CR0 = PE, ET, NE; paging off; CR4 = 0; EFER = 0.
    CS = 0x08, flat 4 GiB 32-bit code; DS, ES, FS, GS, SS = 0x10, flat 4 GiB data.

64-bit long mode (`Mode.LONG`: flat with ``--mode 64``, ELF64)
    CR0 = PG, PE, MP, ET, NE; CR4 = PAE, OSFXSR, OSXMMEXCPT (SSE works); EFER = LME, LMA.
    CS = 0x18, 64-bit code; DS, ES, FS, GS, SS = 0x10.
    CR3 = 0x2000: 2 MiB supervisor pages, writable and executable, map every address to itself:
    the first 4 GiB, and all RAM above in whole GiB.

Both
    EIP/RIP = the entry's *physical* address, ESP/RSP = 0x90000 with 64 KiB of stack below.
    All other general registers 0; EFLAGS = 2: interrupts off, direction up.
    GDT at 0x1000, four entries: null, 0x08 32-bit code, 0x10 data, 0x18 64-bit code.
    IDTR = 0 with limit 0: until the guest has an IDT, any exception ends in a triple fault.
    x87 and SSE as after reset. LDTR and TR hold nothing useful.

Sources: Intel SDM volume 3A, sections 2.2.1 (EFER), 2.5 (control registers), 3.4.5 (segment
descriptors), 4.5 (4-level paging), 10.1.1 (reset).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.errors import UserError
from vmm.boot.options import Mode
from vmm.boot.placement import Placement
from vmm.cpu.state import CODE32, CODE64, DATA32, CpuState, DescriptorTable, flat_segment
from vmm.memory import PAGE

GDT_ADDRESS = 0x1000
PAGE_TABLES = 0x2000
STACK_TOP = 0x90000
STACK_SIZE = 0x10000

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
PTE_PRESENT, PTE_WRITABLE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7

GIB = 1 << 30
LARGE_PAGE = 2 << 20
_RSP = 4


@dataclass(frozen=True, slots=True)
class Gdt:
    """A table of flat segments.

    Attributes:
        kinds: the attributes of each descriptor (see `Segment.attributes`); 0: absent.
        code, data: the selectors that a guest starts with.
        code_kind: the attributes of the code segment.
    """

    kinds: tuple[int, ...]
    code: int
    data: int

    @property
    def code_kind(self) -> int:
        return self.kinds[self.code >> 3]

    def pack(self) -> bytes:
        return struct.pack(
            f"<{len(self.kinds)}Q", *(_descriptor(kind) if kind else 0 for kind in self.kinds)
        )


_KINDS = (0, CODE32, DATA32, CODE64)
GDTS = {Mode.PROTECTED: Gdt(_KINDS, 0x08, 0x10), Mode.LONG: Gdt(_KINDS, 0x18, 0x10)}
"""The table for each mode, unless a protocol wants another."""


def prepare(placement: Placement, mode: Mode, gdt: Gdt | None = None) -> None:
    """Put GDT, stack and, for long mode, page tables into guest RAM.

    Raises:
        UserError: something else lies there already.
    """
    placement.fill("the boot GDT", GDT_ADDRESS, (gdt or GDTS[mode]).pack())
    placement.claim("the boot stack", STACK_TOP - STACK_SIZE, STACK_SIZE)
    if mode is Mode.LONG:
        tables = _identity_tables(max(region.end for region in placement.memory.ram))
        placement.fill("the boot page tables", PAGE_TABLES, tables)


def state(mode: Mode, entry: int, gdt: Gdt | None = None) -> CpuState:
    """The registers with which a guest starts at guest-physical address `entry`.

    Raises:
        UserError: `entry` cannot be reached in that mode.
    """
    if mode is Mode.PROTECTED and entry >> 32:
        raise UserError(f"the entry at {entry:#x} is out of reach of 32-bit mode")
    table = gdt or GDTS[mode]
    cpu = CpuState(
        rip=entry,
        cs=flat_segment(table.code, table.code_kind),
        ss=flat_segment(table.data, DATA32),
        ds=flat_segment(table.data, DATA32),
        es=flat_segment(table.data, DATA32),
        fs=flat_segment(table.data, DATA32),
        gs=flat_segment(table.data, DATA32),
        gdtr=DescriptorTable(GDT_ADDRESS, 8 * len(table.kinds) - 1),
        idtr=DescriptorTable(0, 0),
        cr0=CR0_PE | CR0_ET | CR0_NE,
    )
    cpu.gpr[_RSP] = STACK_TOP
    if mode is Mode.LONG:
        cpu.cr0 |= CR0_PG | CR0_MP
        cpu.cr3 = PAGE_TABLES
        cpu.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
        cpu.efer = EFER_LME | EFER_LMA
    return cpu


def _descriptor(attributes: int) -> int:
    """A descriptor with base 0 and limit 0xFFFFF; `attributes` as in `Segment.attributes`."""
    return (attributes | 0xF0000) << 32 | 0xFFFF


def _identity_tables(ram_end: int) -> bytes:
    """PML4, one page-directory-pointer table and a page directory for each GiB."""
    gibs = max(4, -(-ram_end // GIB))
    flags = PTE_PRESENT | PTE_WRITABLE
    pointers = PAGE_TABLES + PAGE
    directories = pointers + PAGE
    pml4 = struct.pack("<Q", pointers | flags).ljust(PAGE, b"\0")
    pdpt = struct.pack(f"<{gibs}Q", *(directories + i * PAGE | flags for i in range(gibs)))
    pages = range(0, gibs * GIB, LARGE_PAGE)
    directory = struct.pack(f"<{len(pages)}Q", *(page | flags | PTE_LARGE for page in pages))
    return pml4 + pdpt.ljust(PAGE, b"\0") + directory
