"""The configuration space of one PCI function: type 0 header, capabilities, BAR placement.

Source: PCI Local Bus Specification 3.0, chapter 6.

Where a base address register (BAR) puts its region, see `placement`:
- nowhere while its space is not decoded (Command bits 0 and 1);
- nowhere at address 0: that is the reset value, and system software takes it for "not assigned"
  (6.2.5.1 leaves it open; QEMU and Linux do the same);
- nowhere if its last byte is the top of what the register can express: that is what is left by the
  all-ones write of sizing, which careless software does with decoding on;
- otherwise at the address in it. Whether that address exists on the bus (port I/O ends at 64 KiB,
  physical memory at the width of the CPU) is for the root to know, not for the function.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from devices.bus import BusType, Range
from devices.pci.capability import CAPABILITIES_START, Capability, capability_fields
from devices.pci.contract import CONFIG_REGISTERS, BarInfo, ConfigWriteResult, RegionRange
from devices.pci.msi import MsiLayout
from devices.pci.msix import MsixLayout
from devices.pci.registers import DWORD, Field, RegisterFile

COMMAND = 1
"""The dword of Command (low half) and Status (high half)."""
BAR0 = 4
"""The dword of the first base address register."""
BAR_COUNT = 6
INTERRUPT = 15
"""The dword of Interrupt Line (byte 0) and Interrupt Pin (byte 1)."""


class Command(enum.IntFlag):
    """The Command register (6.2.2); the bits that are not here read as zero."""

    IO_SPACE = 1 << 0
    MEMORY_SPACE = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY_ERROR_RESPONSE = 1 << 6
    SERR_ENABLE = 1 << 8
    INTERRUPT_DISABLE = 1 << 10


class Status(enum.IntFlag):
    """The Status register (6.2.3)."""

    INTERRUPT_STATUS = 1 << 3
    CAPABILITIES_LIST = 1 << 4
    MASTER_DATA_PARITY_ERROR = 1 << 8
    SIGNALED_TARGET_ABORT = 1 << 11
    RECEIVED_TARGET_ABORT = 1 << 12
    RECEIVED_MASTER_ABORT = 1 << 13
    SIGNALED_SYSTEM_ERROR = 1 << 14
    DETECTED_PARITY_ERROR = 1 << 15


_ERROR_BITS = int(
    Status.MASTER_DATA_PARITY_ERROR
    | Status.SIGNALED_TARGET_ABORT
    | Status.RECEIVED_TARGET_ABORT
    | Status.RECEIVED_MASTER_ABORT
    | Status.SIGNALED_SYSTEM_ERROR
    | Status.DETECTED_PARITY_ERROR
)
# Plain integers: flag arithmetic is too slow for the path of an access.
INTX_STATUS = int(Status.INTERRUPT_STATUS) << 16
"""Interrupt Status in the `COMMAND` dword."""
INTX_DISABLE = int(Command.INTERRUPT_DISABLE)
BUS_MASTER = int(Command.BUS_MASTER)
_DECODES = {BusType.PIO: int(Command.IO_SPACE), BusType.MMIO: int(Command.MEMORY_SPACE)}


@dataclass(frozen=True, slots=True)
class Header:
    """What a function is, all that is fixed when it is built.

    Attributes:
        class_code: base class, sub-class and programming interface, 24 bits.
        interrupt_pin: 0 for none, 1..4 for INTA# to INTD#.
        capabilities: those that need no code here, in this order; `chain` has all.

    Raises:
        ValueError: a value does not fit, or the BARs break a rule of `check_bars`.
    """

    vendor_id: int
    device_id: int
    class_code: int
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0
    interrupt_pin: int = 0
    bars: tuple[BarInfo, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    msi: MsiLayout | None = None
    msix: MsixLayout | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.interrupt_pin <= 4:
            raise ValueError(f"interrupt pin {self.interrupt_pin}: 0 is none, 1..4 INTA#..INTD#")
        if self.vendor_id == 0xFFFF:
            raise ValueError("vendor id 0xffff means that there is no function")
        check_bars(self.bars)
        if self.msi is not None:
            self.msi.check()
        if self.msix is not None:
            self.msix.check(self.bars)
        self.fields()

    def chain(self) -> tuple[Capability, ...]:
        """The capability list, in order."""
        chain = self.capabilities
        if self.msi is not None:
            chain += (self.msi.capability(),)
        if self.msix is not None:
            chain += (self.msix.capability(),)
        return chain

    def fields(self) -> tuple[Field, ...]:
        """The whole table: header, BARs and capabilities."""
        command = int(Command.BUS_MASTER | Command.PARITY_ERROR_RESPONSE | Command.SERR_ENABLE)
        command |= INTX_DISABLE if self.interrupt_pin else 0
        chain = self.chain()
        status = int(Status.CAPABILITIES_LIST) if chain else 0
        return (
            Field("vendor id", 0x00, 2, self.vendor_id),
            Field("device id", 0x02, 2, self.device_id),
            Field("command", 0x04, 2, writable=command | decoded_spaces(self.bars)),
            Field(
                "status",
                0x06,
                2,
                status,
                clears=_ERROR_BITS,
                volatile=int(Status.INTERRUPT_STATUS) if self.interrupt_pin else 0,
            ),
            Field("revision id", 0x08, 1, self.revision),
            Field("class code", 0x09, 3, self.class_code),
            Field("cache line size", 0x0C, 1, writable=0xFF),
            Field("latency timer", 0x0D, 1),
            # Its bit 7, "multi-function", belongs to the root, which knows the neighbours.
            Field("header type", 0x0E, 1),
            Field("bist", 0x0F, 1),
            *bar_fields(self.bars),
            Field("cardbus cis pointer", 0x28, 4),
            Field("subsystem vendor id", 0x2C, 2, self.subsystem_vendor_id),
            Field("subsystem id", 0x2E, 2, self.subsystem_id),
            Field("expansion rom base address", 0x30, 4),
            Field("capabilities pointer", 0x34, 1, CAPABILITIES_START if status else 0),
            Field("interrupt line", 0x3C, 1, writable=0xFF),
            Field("interrupt pin", 0x3D, 1, self.interrupt_pin),
            Field("min_gnt", 0x3E, 1),
            Field("max_lat", 0x3F, 1),
            *capability_fields(chain),
        )


def check_bars(bars: Sequence[BarInfo]) -> None:
    """See whether `bars` can be the base address registers of one function (6.2.5.1).

    Raises:
        ValueError: a size that is no power of two or too small or too large, a register used
            twice or not there, registers out of order, a region mapped twice.
    """
    free = 0
    regions: set[int] = set()
    for info in bars:
        name = f"BAR {info.bar}"
        is_io = info.bus is BusType.PIO
        # I/O: "must not consume more than 256 bytes per I/O Base Address register".
        smallest, largest = (4, 256) if is_io else (16, 1 << (62 if info.is_64bit else 31))
        if info.bar < free or info.bar + info.is_64bit >= BAR_COUNT:
            raise ValueError(f"{name} is out of order, in use or not there")
        if info.size & (info.size - 1) or not smallest <= info.size <= largest:
            raise ValueError(
                f"{name} has size {info.size:#x}: not a power of two in {smallest:#x}..{largest:#x}"
            )
        if is_io and (info.is_64bit or info.prefetchable):
            raise ValueError(f"{name} maps I/O: neither 64-bit nor prefetchable")
        if info.region < 0 or info.region in regions:
            raise ValueError(f"{name} maps region {info.region}, which is negative or taken")
        regions.add(info.region)
        free = info.bar + (2 if info.is_64bit else 1)


def decoded_spaces(bars: Sequence[BarInfo]) -> int:
    """The Command bits that switch the decoding of these BARs on."""
    bits = 0
    for info in bars:
        bits |= _DECODES[info.bus]
    return bits


def bar_fields(bars: Sequence[BarInfo]) -> list[Field]:
    """The BARs as table entries: the writable mask is the address part, hence the size."""
    fields = []
    for info in bars:
        offset = 4 * (BAR0 + info.bar)
        mask = ~(info.size - 1)
        name = f"bar {info.bar}"
        if info.bus is BusType.PIO:
            fields.append(Field(name, offset, 4, 0b01, mask & DWORD & ~0b11))
            continue
        kind = (0b1000 if info.prefetchable else 0) | (0b100 if info.is_64bit else 0)
        fields.append(Field(name, offset, 4, kind, mask & DWORD & ~0b1111))
        if info.is_64bit:
            fields.append(Field(f"{name} high", offset + 4, 4, 0, mask >> 32 & DWORD))
    return fields


def placement(info: BarInfo, registers: Sequence[int]) -> Range | None:
    """Where a BAR puts its region, given the dwords of a configuration space; None for nowhere."""
    if not registers[COMMAND] & _DECODES[info.bus]:
        return None
    low = registers[BAR0 + info.bar]
    if info.bus is BusType.PIO:
        address, top = low & ~0b11, DWORD
    elif info.is_64bit:
        address, top = (low & ~0b1111) | registers[BAR0 + info.bar + 1] << 32, (1 << 64) - 1
    else:
        address, top = low & ~0b1111, DWORD
    if address == 0 or address + info.size - 1 >= top:
        return None
    return Range(address, info.size)


def placements(bars: Sequence[BarInfo], registers: Sequence[int]) -> list[Range | None]:
    """`placement` of each BAR, in the order of `bars`."""
    return [placement(info, registers) for info in bars]


def difference(
    bars: Sequence[BarInfo], before: Sequence[Range | None], after: Sequence[Range | None]
) -> ConfigWriteResult:
    """What has to change on the buses when the BARs go from one placement to another."""
    result = ConfigWriteResult()
    for info, old, new in zip(bars, before, after, strict=True):
        if old == new:
            continue
        is_io = info.bus is BusType.PIO
        if old is not None:
            removed = result.io_remove if is_io else result.mmio_remove
            removed.append(RegionRange(info.region, old))
        if new is not None:
            added = result.io_add if is_io else result.mmio_add
            added.append(RegionRange(info.region, new))
    return result


def can_move_bars(register: int) -> bool:
    """Whether a write to this dword can change the placement of a BAR."""
    return register == COMMAND or BAR0 <= register < BAR0 + BAR_COUNT


@dataclass
class ConfigState:
    """The 64 dwords of a configuration space, in order."""

    registers: list[int] = field(default_factory=lambda: [0] * CONFIG_REGISTERS)


class ConfigSpace(RegisterFile):
    """The registers of one function.

    Args:
        header: what the function is.
        state: where the dwords are kept; filled with the reset values.
    """

    __slots__ = ("header",)

    def __init__(self, header: Header, state: ConfigState | None = None) -> None:
        values = None if state is None else state.registers
        super().__init__(header.fields(), CONFIG_REGISTERS, values)
        self.header = header

    def read(self, register: int) -> int:
        """The dword at index `register`, 0..63."""
        return self.values[register]

    def capability(self, wanted: int) -> int | None:
        """The offset in bytes of the first capability with this id."""
        start = CAPABILITIES_START
        for item in self.header.chain():
            if item.id == wanted:
                return start
            start += (item.length + 3) // 4 * 4
        return None
