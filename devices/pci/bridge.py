"""Bridges: the root's own function; the type 1 header and the PCI-to-PCI bridge.

What lies behind a bridge is the root's affair (`devices.pci.topology`): it keeps a shadow of the
bridge's bus numbers and windows, made from the guest's writes, and passes on what they let through.

Sources: PCI-to-PCI Bridge Architecture Specification 1.2, chapter 3; PCI 3.0, chapter 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from devices.bus import BusType, Range
from devices.pci.config import Header
from devices.pci.decode import COMMAND, DECODES, bar_fields
from devices.pci.function import PciFunction
from devices.pci.registers import DWORD, Field

TYPE_1 = 1
"""The header type, without its bit 7."""
BUSES, IO, MEMORY, PREFETCHABLE, UPPER_BASE, UPPER_LIMIT = 6, 7, 8, 9, 10, 11
"""Dwords of the type 1 header: bus numbers and windows."""
CONTROL = 15
"""The dword of Bridge Control (high half)."""
SECONDARY_RESET = 1 << 22
"""In `CONTROL`: the bus behind is held in reset."""

IO_GRANULE, MEMORY_GRANULE = 0x1000, 0x10_0000
"""Windows begin and end at multiples of these."""
SPACES = DECODES[BusType.PIO] | DECODES[BusType.MMIO]
"""A bridge has both Command bits: they switch its windows."""


def window_fields() -> list[Field]:
    """Bus numbers and windows: 16-bit I/O, 32-bit memory, 64-bit prefetchable memory."""
    base_and_limit = 0xFFF0_FFF0
    return [
        Field("primary bus number", 0x18, 1, writable=0xFF),
        Field("secondary bus number", 0x19, 1, writable=0xFF),
        Field("subordinate bus number", 0x1A, 1, writable=0xFF),
        Field("i/o base and limit", 0x1C, 2, writable=0xF0F0),
        Field("memory base and limit", 0x20, 4, writable=base_and_limit),
        Field("prefetchable base and limit", 0x24, 4, 0x0001_0001, writable=base_and_limit),
        Field("prefetchable base upper", 0x28, 4, writable=DWORD),
        Field("prefetchable limit upper", 0x2C, 4, writable=DWORD),
        # Parity error response, SERR#, secondary bus reset; neither ISA nor VGA modes.
        Field("bridge control", 0x3E, 2, writable=0b100_0011),
    ]


def windows(registers: Sequence[int], bus: BusType) -> list[Range]:
    """The addresses that a bridge with these dwords passes on to its secondary bus."""
    if not registers[COMMAND] & DECODES[bus]:
        return []
    found = []
    if bus is BusType.PIO:
        value = registers[IO]
        found.append(((value & 0xF0) << 8, (value >> 8 & 0xF0) << 8 | IO_GRANULE - 1))
    else:
        value = registers[MEMORY]
        found.append(((value & 0xFFF0) << 16, value & 0xFFF0_0000 | MEMORY_GRANULE - 1))
        value = registers[PREFETCHABLE]
        base = (value & 0xFFF0) << 16 | registers[UPPER_BASE] << 32
        limit = value & 0xFFF0_0000 | registers[UPPER_LIMIT] << 32 | MEMORY_GRANULE - 1
        found.append((base, limit))
    return [Range(base, limit + 1 - base) for base, limit in found if base <= limit]


def window_dwords(
    bus: BusType, prefetchable: bool, window: Range | None
) -> list[tuple[int, bytes]]:
    """The dword indices and the bytes that open this window, or close it (None)."""
    if bus is BusType.PIO:
        first, last = (0xF000, 0) if window is None else (window.start, window.end - 1)
        return [(IO, bytes((first >> 8 & 0xF0, last >> 8 & 0xF0)))]
    first, last = (0xFFF0_0000, 0) if window is None else (window.start, window.end - 1)
    low = (first >> 16 & 0xFFF0 | last & 0xFFF0_0000).to_bytes(4, "little")
    if not prefetchable:
        return [(MEMORY, low)]
    upper = ((UPPER_BASE, first), (UPPER_LIMIT, last))
    return [(PREFETCHABLE, low), *((n, (end >> 32).to_bytes(4, "little")) for n, end in upper)]


@dataclass(frozen=True, slots=True)
class BridgeHeader(Header):
    """A type 1 header; its two BARs and its ROM are not implemented.

    Raises:
        ValueError: also if it has BARs, a ROM or subsystem ids.
    """

    def __post_init__(self) -> None:
        if self.every_bar() or self.subsystem_vendor_id or self.subsystem_id:
            raise ValueError("a bridge has no BARs, no ROM and no subsystem ids here")
        Header.__post_init__(self)

    def fields(self) -> tuple[Field, ...]:
        return (
            *self.common_fields(SPACES),
            Field("header type", 0x0E, 1, TYPE_1),
            *bar_fields(self.bars),
            *window_fields(),
        )


class PciBridge(PciFunction):
    """A bridge: functions with ``slot=NAME:DEVICE`` are behind the one of that name.

    Vendor 0x1234 as in `devices.pci.config_space`; drivers of bridges go by the class code.
    """

    model: ClassVar[str] = "pci-bridge"
    summary: ClassVar[str] = "PCI-to-PCI bridge, for functions with slot=NAME:DEVICE"

    def header(self) -> Header:
        return BridgeHeader(0x1234, 0x0604, class_code=0x060400)


class HostBridge(PciFunction):
    """The root's own function, 00:00.0: class 06 00, no BARs, no interrupt.

    Vendor 0x1234 as in `devices.pci.config_space`: it is no chipset that a driver could know.
    The subsystem ids tell SeaBIOS that the board has fw_cfg (src/fw/paravirt.c, qemu_detect).
    """

    model: ClassVar[str] = "pci-host-bridge"
    summary: ClassVar[str] = "the function of the PCI root itself"

    def header(self) -> Header:
        return Header(
            0x1234,
            0x0600,
            class_code=0x060000,
            subsystem_vendor_id=0x1AF4,
            subsystem_id=0x1100,
        )
