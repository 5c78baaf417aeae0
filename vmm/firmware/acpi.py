"""ACPI tables: RSDP, XSDT and RSDT, FADT, FACS, DSDT, MADT, MCFG, HPET.

Source: ACPI 5.0, 5.2 "ACPI System Description Tables"; PCI Firmware Specification 3.0, 4.1.2
(MCFG); IA-PC HPET Specification 1.0a, 3.2.4.
Everything lies below 4 GiB, so that the 32-bit pointers say the same as the 64-bit ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.bus import Range
from vmm.firmware import fadt
from vmm.firmware.dsdt import dsdt_body
from vmm.firmware.linker import LinkedFile, Linker, Zone
from vmm.firmware.platform import SCI_IRQ, TIMER_GSI, Platform

RSDP_FILE, TABLES_FILE, LOADER_FILE = "etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"
"""Names in fw_cfg."""
WINDOW = Range(0xE0000, 0x10000)
"""Where the tables go when there is no firmware: kernels look for the RSDP from 0xE0000 on."""

HEADER = struct.Struct("<4sIBB6s8sI4sI")
"""Signature, length, revision, checksum, OEM id, OEM table id, revision; creator id, revision."""
_CHECKSUM_AT = 9
_OEM, _OEM_TABLE, _CREATOR = b"JAILVM", b"JAILEDPC", b"JVMM"
_RSDP_SIZE, _RSDP_V1_SIZE = 36, 20
_TABLE_ALIGN = 16
_FILE_ALIGN = 64
"""That of the FACS."""

DSDT_REVISION = 2
"""From 2 on integers have 64 bits."""
MADT_REVISION = 3

_PCAT_COMPATIBLE = 1
"""There are also two 8259."""
_ENABLED = 1
_ISA_BUS = 0
_ALL_PROCESSORS = 0xFF
_NMI_LINT = 1
CONFORMS, LEVEL_LOW = 0, 0b1111
"""MPS INTI flags (table 5-50): as the bus has it; level-triggered and active low."""


@dataclass(frozen=True)
class AcpiImage:
    """The tables as bytes for guest RAM.

    Attributes:
        start: guest-physical address of the first byte.
        rsdp: guest-physical address of the RSDP, a multiple of 16.
    """

    start: int
    data: bytes
    rsdp: int


def place_tables(platform: Platform, window: Range = WINDOW) -> AcpiImage:
    """Build all tables for the start of `window`, the RSDP first.

    Raises:
        ValueError: they do not fit, or the window's start is not a multiple of 64.
    """
    linker = link_tables(platform)
    tables = window.start + _FILE_ALIGN
    done = linker.resolve({RSDP_FILE: window.start, TABLES_FILE: tables})
    data = done[RSDP_FILE].ljust(_FILE_ALIGN, b"\0") + done[TABLES_FILE]
    if len(data) > window.length:
        raise ValueError(f"{len(data)} bytes of ACPI tables do not fit in {window}")
    return AcpiImage(window.start, data, window.start)


def firmware_files(platform: Platform) -> dict[str, bytes]:
    """The fw_cfg files from which firmware makes the same tables."""
    linker = link_tables(platform)
    files = {name: bytes(file.data) for name, file in linker.files.items()}
    return {**files, LOADER_FILE: linker.script()}


def link_tables(platform: Platform) -> Linker:
    """The tables as two files with the notes that tie them."""
    linker = Linker()
    rsdp = linker.file(RSDP_FILE, _FILE_ALIGN, Zone.FSEG)
    tables = linker.file(TABLES_FILE, _FILE_ALIGN, Zone.HIGH)
    facs = tables.add(fadt.facs(), _FILE_ALIGN)
    dsdt = _add_table(tables, b"DSDT", DSDT_REVISION, dsdt_body(platform))
    listed = [_add_fadt(tables, platform, facs, dsdt)]
    listed.append(_add_table(tables, b"APIC", MADT_REVISION, _madt_body(platform)))
    listed.append(_add_table(tables, b"MCFG", 1, _mcfg_body(platform)))
    if platform.hpet is not None:
        listed.append(_add_table(tables, b"HPET", 1, _hpet_body(platform, platform.hpet)))
    rsdt = _add_pointers(tables, b"RSDT", 4, listed)
    xsdt = _add_pointers(tables, b"XSDT", 8, listed)
    _add_rsdp(rsdp, tables, rsdt, xsdt)
    return linker


def _add_table(
    tables: LinkedFile, signature: bytes, revision: int, body: bytes, *, seal: bool = True
) -> int:
    """Add a table with its header; with `seal` also its checksum, else `_seal` follows."""
    size = HEADER.size + len(body)
    header = HEADER.pack(signature, size, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1)
    offset = tables.add(header + body, _TABLE_ALIGN)
    if seal:
        _seal(tables, offset, size)
    return offset


def _seal(tables: LinkedFile, offset: int, size: int) -> None:
    tables.sum(offset + _CHECKSUM_AT, offset, size)


def _add_fadt(tables: LinkedFile, platform: Platform, facs: int, dsdt: int) -> int:
    body = fadt.fadt_body(platform)
    offset = _add_table(tables, b"FACP", fadt.FADT_REVISION, body, seal=False)
    tables.point(offset + fadt.FADT_FACS, 4, tables, facs)
    tables.point(offset + fadt.FADT_DSDT, 4, tables, dsdt)
    tables.point(offset + fadt.FADT_X_DSDT, 8, tables, dsdt)
    _seal(tables, offset, HEADER.size + len(body))
    return offset


def _add_pointers(tables: LinkedFile, signature: bytes, width: int, listed: list[int]) -> int:
    body = bytes(width * len(listed))
    offset = _add_table(tables, signature, 1, body, seal=False)
    for index, target in enumerate(listed):
        tables.point(offset + HEADER.size + width * index, width, tables, target)
    _seal(tables, offset, HEADER.size + len(body))
    return offset


def _add_rsdp(rsdp: LinkedFile, tables: LinkedFile, rsdt: int, xsdt: int) -> None:
    """5.2.5.3: the first checksum covers what ACPI 1.0 had, the second one all."""
    rsdp.add(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, _RSDP_SIZE, 0, 0))
    rsdp.point(16, 4, tables, rsdt)
    rsdp.point(24, 8, tables, xsdt)
    rsdp.sum(8, 0, _RSDP_V1_SIZE)
    rsdp.sum(32, 0, _RSDP_SIZE)


def _madt_body(platform: Platform) -> bytes:
    """One processor, one I/O APIC, and where ISA interrupts are not what they seem (5.2.12)."""
    overrides = [(0, TIMER_GSI, CONFORMS), (SCI_IRQ, SCI_IRQ, LEVEL_LOW)]
    return b"".join(
        (
            struct.pack("<II", platform.lapic, _PCAT_COMPATIBLE),
            struct.pack("<BBBBI", 0, 8, 0, 0, _ENABLED),
            struct.pack("<BBBBII", 1, 12, platform.ioapic_id, 0, platform.ioapic, 0),
            *(struct.pack("<BBBBIH", 2, 10, _ISA_BUS, *override) for override in overrides),
            struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, CONFORMS, _NMI_LINT),
        )
    )


def _mcfg_body(platform: Platform) -> bytes:
    """Where configuration space is mapped: segment 0, buses 0 to 255."""
    return struct.pack("<8xQHBB4x", platform.ecam.start, 0, 0, 255)


def _hpet_body(platform: Platform, base: int) -> bytes:
    number, minimum_tick, page_protection = 0, 0, 0
    return (
        struct.pack("<I", platform.hpet_id)
        + fadt.memory_address(base, 8)
        + struct.pack("<BHB", number, minimum_tick, page_protection)
    )
