"""Programs that start in 16-bit real mode: boot sectors and flat binaries; no BIOS is there.

A flat binary goes to its load address below 1 MiB (0x7C00 by default) and starts there:
    below 64 KiB with CS = 0 and IP = the address, else with CS = the address / 16 and IP = the
    remainder; DS, ES, FS, GS = CS. SS:SP = 8000:FFF0.
A boot sector goes to 0x7C00 and starts as a BIOS starts it:
    CS:IP = 0000:7C00; DS, ES, FS, GS = 0; SS:SP = 0000:7C00; DL = 0x80, the first hard disk.

Both: CR0 = ET; all other general registers 0; FLAGS = 2, so interrupts are off; segment limits
64 KiB; IDTR = 0 with limit 0x3FF.

An interrupt vector that the program has not set leads to a stub that ends in a triple fault, with
CS = 0xF000 + the number of the vector: so that a call of a BIOS that is not there is seen, and not
taken for one that worked.

Sources: Intel SDM volume 3A, sections 10.1.1 (reset) and 21.1 (real-address mode); BIOS Boot
Specification 1.01, section 6.5 (hand-off to a boot sector).
"""

from __future__ import annotations

import struct

from devices.errors import Subject, UserError
from vmm.boot.options import BootOptions, BootResult
from vmm.boot.placement import MIB, Placement
from vmm.cpu.state import CpuState, DescriptorTable, Segment
from vmm.memory import GuestMemory

BOOT_ADDRESS = 0x7C00
SECTOR = 512
SIGNATURE = b"\x55\xaa"
FIRST_DISK = 0x80

VECTORS = 256
STUB = 0xFFF53
"""Where every vector leads, by a CS:IP of its own."""

_STUB_SEGMENT = 0xF000
_ZEROS = 0xE000
"""Offset, in each of the vectors' segments, of bytes that are zero: an IDT of limit 0."""

_CODE = 0x9B00
_CR0_ET = 1 << 4
_RDX, _RSP = 2, 4


def is_boot_sector(image: bytes) -> bool:
    return len(image) == SECTOR and image.endswith(SIGNATURE)


def load_boot_sector(memory: GuestMemory, image: bytes) -> BootResult:
    """Load a boot sector and start it as a BIOS would.

    Raises:
        UserError: there is no RAM for it.
    """
    placement = _prepare(memory)
    placement.claim("the boot stack", 0x500, BOOT_ADDRESS - 0x500)
    placement.fill("the boot sector", BOOT_ADDRESS, image)
    state = _state(0, BOOT_ADDRESS, 0, BOOT_ADDRESS)
    state.gpr[_RDX] = FIRST_DISK
    return BootResult("boot-sector", state)


def load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    """Load a flat binary and start it in real mode.

    Raises:
        UserError: it does not fit there.
    """
    address = BOOT_ADDRESS if options.load_addr is None else options.load_addr
    if address < 0 or address + len(image) > MIB:
        raise UserError(
            f"a flat binary of {len(image):#x} bytes at {address:#x} does not fit below 1 MiB, "
            "where 16-bit mode ends",
            Subject("mode"),
        )
    placement = _prepare(memory)
    placement.claim("the boot stack", 0x80000, 0x10000)
    placement.fill(f"the flat binary ({len(image):#x} bytes)", address, image)
    segment = 0 if address < 0x10000 else address >> 4
    return BootResult("real", _state(segment, address - (segment << 4), 0x8000, 0xFFF0))


def _prepare(memory: GuestMemory) -> Placement:
    """The interrupt vectors and what they lead to."""
    placement = Placement(memory)
    vectors = b"".join(
        # Segment n higher and offset 16 n lower is the same place.
        struct.pack("<HH", (STUB & 0xFFFF) - 16 * vector, _STUB_SEGMENT + vector)
        for vector in range(VECTORS)
    )
    placement.fill("the interrupt vectors", 0, vectors)
    # lidt cs:[_ZEROS]; int3
    stub = b"\x2e\x0f\x01\x1e" + struct.pack("<H", _ZEROS) + b"\xcc"
    placement.fill("the interrupt stub", STUB, stub)
    placement.fill("the stub's zeros", 0xF0000 + _ZEROS, b"", 16 * VECTORS)
    return placement


def _state(code: int, start: int, stack: int, stack_pointer: int) -> CpuState:
    def data(selector: int) -> Segment:
        return Segment(selector, selector << 4)

    cpu = CpuState(
        rip=start,
        cs=Segment(code, code << 4, 0xFFFF, _CODE),
        ss=data(stack),
        ds=data(code),
        es=data(code),
        fs=data(code),
        gs=data(code),
        idtr=DescriptorTable(0, 4 * VECTORS - 1),
        cr0=_CR0_ET,
    )
    cpu.gpr[_RSP] = stack_pointer
    return cpu
