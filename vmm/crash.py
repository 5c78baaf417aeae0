"""What is said of a guest that crashed: why, its registers and code, its last accesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from devices.bus import ALL_ONES, Bus, BusType
from vmm.cpu.engine import Cpu


def crash_report(
    cause: str,
    cpu: Cpu,
    symbols: Sequence[tuple[int, int, str]],
    buses: Mapping[BusType, Bus],
) -> str:
    """Several lines."""
    from vmm.cpu import report  # loads the disassembler

    head = report.unknown_instruction(cpu) if cause.startswith("triple fault: #UD") else ""
    return head + report.crash_report(cpu, symbols) + last_accesses(buses)


def last_accesses(buses: Mapping[BusType, Bus]) -> str:
    """The last accesses of the guest to devices, a line for each, the latest at the end."""
    lines = [
        f"  {'write' if writes else 'read '} {where.kind} {address:#x}, {8 * size:2} bits: "
        f"{value & ALL_ONES[size]:#x} ({where.owner or 'nobody answers there'})\n"
        for where, writes, address, size, value in buses[BusType.MMIO].recent
    ]
    return "".join(["last accesses to devices:\n", *lines]) if lines else ""
