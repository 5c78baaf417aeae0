"""The configuration space of one PCI function: type 0 header and capabilities.

Source: PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from devices.bus import BusType
from devices.pci.capability import (
    CAPABILITIES_START,
    FUNCTION_RESET,
    POWER_MANAGEMENT,
    Capability,
    CapabilityId,
    capability_fields,
    capability_start,
)
from devices.pci.contract import CONFIG_REGISTERS, ROM_BAR, BarInfo
from devices.pci.decode import Command, Decoder, bar_fields, check_bars, decoded_spaces
from devices.pci.msi import MsiLayout
from devices.pci.msix import MsixLayout
from devices.pci.registers import Field

INTERRUPT = 15
"""The dword of Interrupt Line (byte 0) and Interrupt Pin (byte 1)."""


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


@dataclass(frozen=True, slots=True)
class Header:
    """What a function is, all that is fixed when it is built.

    Attributes:
        class_code: base class, sub-class and programming interface, 24 bits.
        interrupt_pin: 0 for none, 1..4 for INTA# to INTD#.
        bars: without the ROM's, which `every_bar` has too.
        capabilities: those that need no code here, in this order; `chain` has all.
        power_management: it can be put into D3hot and keeps its state there.
        function_reset: the guest may reset it alone; see `PciFunction.reset`.
        rom: the bytes of its expansion ROM; empty: none.
        registers: device-specific ones, from 0x40 on (6.2).

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
    power_management: bool = False
    function_reset: bool = False
    rom: bytes = b""
    registers: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.interrupt_pin <= 4:
            raise ValueError(f"interrupt pin {self.interrupt_pin}: 0 is none, 1..4 INTA#..INTD#")
        if self.vendor_id == 0xFFFF:
            raise ValueError("vendor id 0xffff means that there is no function")
        check_bars(self.every_bar())
        if self.msi is not None:
            self.msi.check()
        if self.msix is not None:
            self.msix.check(self.bars)
        self.fields()

    def every_bar(self) -> tuple[BarInfo, ...]:
        """The BARs and, last, that of the ROM: a power of two of at least 2 KiB."""
        if not self.rom:
            return self.bars
        size = max(1 << (len(self.rom) - 1).bit_length(), 1 << 11)
        return (*self.bars, BarInfo(ROM_BAR, len(self.bars), BusType.MMIO, size))

    def chain(self) -> tuple[Capability, ...]:
        """The capability list, in order."""
        chain = self.capabilities
        if self.power_management:
            chain += (POWER_MANAGEMENT,)
        if self.function_reset:
            chain += (FUNCTION_RESET,)
        if self.msi is not None:
            chain += (self.msi.capability(),)
        if self.msix is not None:
            chain += (self.msix.capability(),)
        return chain

    def fields(self) -> tuple[Field, ...]:
        """The whole table: header, BARs and capabilities."""
        rom = () if self.rom else (Field("rom", 0x30, 4),)
        return (
            *self.common_fields(decoded_spaces(self.every_bar())),
            # Its bit 7, "multi-function", belongs to the root, which knows the neighbours.
            Field("header type", 0x0E, 1),
            *bar_fields(self.every_bar()),
            Field("cardbus cis pointer", 0x28, 4),
            Field("subsystem vendor id", 0x2C, 2, self.subsystem_vendor_id),
            Field("subsystem id", 0x2E, 2, self.subsystem_id),
            *rom,
            Field("min_gnt", 0x3E, 1),
            Field("max_lat", 0x3F, 1),
            *self.registers,
        )

    def common_fields(self, spaces: int) -> tuple[Field, ...]:
        """What headers of both types have.

        Args:
            spaces: the decode bits that Command has.
        """
        command = int(Command.BUS_MASTER | Command.PARITY_ERROR_RESPONSE | Command.SERR_ENABLE)
        command |= INTX_DISABLE if self.interrupt_pin else 0
        chain = self.chain()
        status = int(Status.CAPABILITIES_LIST) if chain else 0
        return (
            Field("vendor id", 0x00, 2, self.vendor_id),
            Field("device id", 0x02, 2, self.device_id),
            Field("command", 0x04, 2, writable=command | spaces),
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
            Field("bist", 0x0F, 1),
            Field("capabilities pointer", 0x34, 1, CAPABILITIES_START if status else 0),
            Field("interrupt line", 0x3C, 1, writable=0xFF),
            Field("interrupt pin", 0x3D, 1, self.interrupt_pin),
            *capability_fields(chain),
        )


@dataclass
class ConfigState:
    """The 64 dwords of a configuration space, in order."""

    registers: list[int] = field(default_factory=lambda: [0] * CONFIG_REGISTERS)


class ConfigSpace(Decoder):
    """The registers of one function.

    Args:
        header: what the function is.
        state: where the dwords are kept; filled with the reset values.
    """

    __slots__ = ("header",)

    def __init__(self, header: Header, state: ConfigState | None = None) -> None:
        self.header = header
        power = self.capability(CapabilityId.POWER_MANAGEMENT)
        features = self.capability(CapabilityId.ADVANCED_FEATURES)
        super().__init__(
            header.fields(),
            header.every_bar(),
            power=0 if power is None else power // 4 + 1,
            reset=0 if features is None else features // 4 + 1,
            values=None if state is None else state.registers,
        )

    def read(self, register: int) -> int:
        """The dword at index `register`, 0..63."""
        return self.values[register]

    def capability(self, wanted: int) -> int | None:
        """The offset in bytes of the first capability with this id."""
        return capability_start(self.header.chain(), wanted)
