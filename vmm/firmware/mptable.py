"""The Intel MP tables, by which kernels without ACPI find the interrupt controllers.

Source: Intel MultiProcessor Specification 1.4, chapter 4 "MP configuration table". The floating
pointer comes first, the configuration table right behind it.
"""

from __future__ import annotations

import struct

from vmm.firmware.linker import checksum
from vmm.firmware.platform import SCI_IRQ, TIMER_GSI, Platform

ADDRESS = 0xF0000
"""Where kernels look for the pointer: from here to 0xFFFFF on multiples of 16 (4.1)."""
POINTER_SIZE = 16
HEADER_SIZE = 44
PCI_BUS, ISA_BUS = 0, 1
CASCADE_IRQ = 2

_REVISION = 4
_LAPIC_VERSION, _IOAPIC_VERSION = 0x14, 0x11
_ENABLED, _BOOTSTRAP = 1, 2
_PROCESSOR_SIGNATURE, _PROCESSOR_FEATURES = 0x600, 0x201
"""Family 6; FPU and APIC. Kernels ask CPUID itself."""
_ALL_LAPICS = 0xFF

PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
"""Types of entries."""
INT, NMI, SMI, EXT_INT = range(4)
"""Types of interrupts."""
CONFORMS, LEVEL_LOW = 0, 0b1111


def build_mptable(platform: Platform, address: int = ADDRESS) -> bytes:
    """Pointer and table for `address`.

    Raises:
        ValueError: the address is not a multiple of 16.
    """
    if address % POINTER_SIZE:
        raise ValueError(f"the MP floating pointer cannot be at {address:#x}")
    pointer = bytearray(
        struct.pack("<4sIBBB5B", b"_MP_", address + POINTER_SIZE, 1, _REVISION, 0, 0, 0, 0, 0, 0)
    )
    pointer[10] = checksum(pointer)
    return bytes(pointer) + _configuration(platform)


def _configuration(platform: Platform) -> bytes:
    entries = [
        struct.pack(
            "<BBBBII8x",
            PROCESSOR,
            0,
            _LAPIC_VERSION,
            _ENABLED | _BOOTSTRAP,
            _PROCESSOR_SIGNATURE,
            _PROCESSOR_FEATURES,
        ),
        struct.pack("<BB6s", BUS, PCI_BUS, b"PCI   "),
        struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        struct.pack(
            "<BBBBI", IOAPIC, platform.ioapic_id, _IOAPIC_VERSION, _ENABLED, platform.ioapic
        ),
        *_io_interrupts(platform),
        _interrupt(LOCAL_INTERRUPT, EXT_INT, CONFORMS, (ISA_BUS, 0), (_ALL_LAPICS, 0)),
        _interrupt(LOCAL_INTERRUPT, NMI, CONFORMS, (ISA_BUS, 0), (_ALL_LAPICS, 1)),
    ]
    body = b"".join(entries)
    size = HEADER_SIZE + len(body)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP",
        size,
        _REVISION,
        0,
        b"JAILVM  ",
        b"JAILED PC   ",
        0,
        0,
        len(entries),
        platform.lapic,
        0,
        0,
        0,
    )
    table = bytearray(header + body)
    table[7] = checksum(table)
    return bytes(table)


def _io_interrupts(platform: Platform) -> list[bytes]:
    """ISA lines that PCI does not use, then every PCI pin; all arrive at the one I/O APIC."""
    apic = platform.ioapic_id
    entries = []
    for line in range(16):
        if line == CASCADE_IRQ or line in platform.pirqs:
            continue
        pin = TIMER_GSI if line == 0 else line
        flags = LEVEL_LOW if line == SCI_IRQ else CONFORMS
        entries.append(_interrupt(IO_INTERRUPT, INT, flags, (ISA_BUS, line), (apic, pin)))
    for slot, pin, gsi in platform.pci_interrupts():
        source = (PCI_BUS, slot << 2 | pin)
        entries.append(_interrupt(IO_INTERRUPT, INT, LEVEL_LOW, source, (apic, gsi)))
    return entries


def _interrupt(
    entry: int, kind: int, flags: int, source: tuple[int, int], target: tuple[int, int]
) -> bytes:
    """4.3.4 and 4.3.5.

    Args:
        source: bus and interrupt; that of a PCI pin is ``slot << 2 | pin`` (appendix D.3).
        target: APIC id and input.
    """
    return struct.pack("<BBHBBBB", entry, kind, flags, *source, *target)
