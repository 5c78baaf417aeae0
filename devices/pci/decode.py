"""Which addresses a function decodes: its base address registers (BARs) and what switches them.

A function and the root's shadow of it use the same code, so that the two can only differ if the
function lies.

Where a BAR puts its region, see `placement`:
- nowhere while its space is not decoded (Command bits 0 and 1, for a ROM also its own bit 0);
- nowhere while the function is not in power state D0 (PCI Power Management 1.2, 5.4.1);
- nowhere at address 0: that is the reset value, and system software takes it for "not assigned"
  (6.2.5.1 leaves it open; QEMU and Linux do the same);
- nowhere if its last byte is the top of what the register can express: that is what is left by the
  all-ones write of sizing, which careless software does with decoding on;
- otherwise at the address in it. Whether that address exists on the bus (port I/O ends at 64 KiB,
  physical memory at the width of the CPU) is for the root to know, not for the function.

Source: PCI Local Bus Specification 3.0, chapter 6, where nothing else is said.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from devices.bus import BusType, Range
from devices.pci.contract import (
    CONFIG_REGISTERS,
    ROM_BAR,
    BarInfo,
    ConfigWriteResult,
    RegionRange,
)
from devices.pci.registers import DWORD, Field, RegisterFile

COMMAND = 1
"""The dword of Command (low half) and Status (high half)."""
BAR0 = 4
"""The dword of the first base address register."""
BAR_COUNT = 6
ROM = 12
"""The dword of the expansion ROM base address register."""

POWER_STATE = 0b11
"""In the dword of the power management control and status register."""
_RESERVED_STATES = (1, 2)
"""D1 and D2, which no function here has: writing them changes nothing."""
INITIATE_RESET = 1 << 0
"""In the byte of AF_CTRL (Advanced Capabilities for Conventional PCI ECN, 6.x.3)."""

_ROM_ENABLE = 1
_ROM_ADDRESS = DWORD & ~0x7FF
_SMALLEST_ROM, _LARGEST_ROM = 1 << 11, 1 << 24


class Command(enum.IntFlag):
    """The Command register (6.2.2); the bits that are not here read as zero."""

    IO_SPACE = 1 << 0
    MEMORY_SPACE = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY_ERROR_RESPONSE = 1 << 6
    SERR_ENABLE = 1 << 8
    INTERRUPT_DISABLE = 1 << 10


# Plain integers: flag arithmetic is too slow for the path of an access.
BUS_MASTER = int(Command.BUS_MASTER)
DECODES = {BusType.PIO: int(Command.IO_SPACE), BusType.MMIO: int(Command.MEMORY_SPACE)}
"""The Command bit that switches the decoding of a space on."""


def bar_register(bar: int) -> int:
    """The (first) dword of a BAR."""
    return ROM if bar == ROM_BAR else BAR0 + bar


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
        is_rom = info.bar == ROM_BAR
        if is_rom:
            smallest, largest = _SMALLEST_ROM, _LARGEST_ROM
        elif info.bar + info.is_64bit >= BAR_COUNT:
            raise ValueError(f"{name} is not there")
        if info.bar < free:
            raise ValueError(f"{name} is out of order or in use")
        if info.size & (info.size - 1) or not smallest <= info.size <= largest:
            raise ValueError(
                f"{name} has size {info.size:#x}: not a power of two in {smallest:#x}..{largest:#x}"
            )
        if (is_io or info.is_64bit or info.prefetchable) and is_rom:
            raise ValueError("an expansion ROM is plain 32-bit memory")
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
        bits |= DECODES[info.bus]
    return bits


def bar_fields(bars: Sequence[BarInfo]) -> list[Field]:
    """The BARs as table entries: the writable mask is the address part, hence the size."""
    fields = []
    for info in bars:
        offset = 4 * bar_register(info.bar)
        mask = ~(info.size - 1)
        name = f"bar {info.bar}"
        if info.bus is BusType.PIO:
            fields.append(Field(name, offset, 4, 0b01, mask & DWORD & ~0b11))
            continue
        if info.bar == ROM_BAR:
            fields.append(Field("rom", offset, 4, 0, mask & _ROM_ADDRESS | _ROM_ENABLE))
            continue
        kind = (0b1000 if info.prefetchable else 0) | (0b100 if info.is_64bit else 0)
        fields.append(Field(name, offset, 4, kind, mask & DWORD & ~0b1111))
        if info.is_64bit:
            fields.append(Field(f"{name} high", offset + 4, 4, 0, mask >> 32 & DWORD))
    return fields


def placement(info: BarInfo, registers: Sequence[int]) -> Range | None:
    """Where a BAR puts its region, given the dwords of a configuration space; None for nowhere."""
    if not registers[COMMAND] & DECODES[info.bus]:
        return None
    low = registers[bar_register(info.bar)]
    if info.bar == ROM_BAR:
        if not low & _ROM_ENABLE:
            return None
        address, top = low & _ROM_ADDRESS, DWORD
    elif info.bus is BusType.PIO:
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


class Decoder(RegisterFile):
    """A register file that knows where its BARs are.

    Args:
        bars: in ascending order.
        power: the dword of the power management control and status register; 0: none.
        reset: the dword of the AF capability's control register; 0: none.

    Attributes:
        placed: `placements` of `bars` now.
    """

    __slots__ = ("_bars", "_power", "_reset_control", "placed")

    def __init__(
        self,
        fields: Iterable[Field],
        bars: Sequence[BarInfo],
        *,
        power: int = 0,
        reset: int = 0,
        values: list[int] | None = None,
    ) -> None:
        super().__init__(fields, CONFIG_REGISTERS, values)
        self._bars, self._power, self._reset_control = tuple(bars), power, reset
        self.placed = self.placements(self.values)

    @property
    def powered(self) -> bool:
        """Whether the function is in D0: in D3hot it answers to configuration alone."""
        return self._powered(self.values)

    def placements(self, values: Sequence[int]) -> list[Range | None]:
        """Where the BARs are if the dwords are these."""
        if not self._powered(values):
            return [None] * len(self._bars)
        return placements(self._bars, values)

    def _powered(self, values: Sequence[int]) -> bool:
        return not (self._power and values[self._power] & POWER_STATE)

    def may_master(self) -> bool:
        """Whether the function may write to memory at all, by messages or by DMA (6.2.2)."""
        return bool(self.values[COMMAND] & BUS_MASTER) and self.powered

    def asks_reset(self, register: int, offset: int, data: bytes) -> bool:
        """Whether this write asks for a function-level reset; `write` then does not follow."""
        control = self._reset_control
        here = bool(control) and register == control and offset == 0
        return here and bool(data[:1] and data[0] & INITIATE_RESET)

    def decides(self, register: int) -> bool:
        """Whether a write to this dword can change what is decoded, or who may master."""
        if BAR0 <= register < BAR0 + BAR_COUNT:
            return True
        return register in (COMMAND, ROM, self._power, self._reset_control)

    def decode_write(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        """`write`, and what it changes on the buses."""
        before = self.values[register] if 0 <= register < CONFIG_REGISTERS else 0
        self.write(register, offset, data)
        if register == self._power and self.values[register] & POWER_STATE in _RESERVED_STATES:
            self._store(register, self.values[register] & ~POWER_STATE | before & POWER_STATE)
        return self._moved() if self.decides(register) else ConfigWriteResult()

    def decode_reset(self) -> ConfigWriteResult:
        """Go back to the reset values, and what that changes on the buses."""
        self.reset()
        return self._moved()

    def load(self, values: list[int]) -> None:
        super().load(values)
        self.placed = self.placements(self.values)

    def _moved(self) -> ConfigWriteResult:
        before, self.placed = self.placed, self.placements(self.values)
        return difference(self._bars, before, self.placed)
