"""`PciFunction`: the base of every PCI device model.

A model says what it is with a `Header`, and answers for its BARs in `read_bar` and `write_bar`;
registers, relocation, the interrupt pin, state and config mapping are done here. It declares its
state as a dataclass that extends `PciState`::

    @dataclass
    class CounterState(PciState):
        count: int = 0

    class Counter(PciFunction):
        model = "counter"
        State = CounterState
        state: CounterState

        def header(self) -> Header:
            return Header(0x1234, 0x0C01, 0xFF0000, bars=(BarInfo(0, 0, BusType.MMIO, 16),))

        def read_bar(self, bar: int, offset: int, size: int) -> int:
            self.state.count += 1
            return self.state.count
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from devices.bus import ALL_ONES, BusDevice, BusType
from devices.contract import Device, DeviceHost, Region, checked_state
from devices.errors import DeviceError
from devices.pci.capability import CapabilityId
from devices.pci.config import INTX_DISABLE, INTX_STATUS, ConfigSpace, ConfigState, Header
from devices.pci.contract import (
    ROM_BAR,
    VIRTUAL_RESET,
    BarInfo,
    ConfigWriteResult,
    RegionRange,
)
from devices.pci.decode import COMMAND
from devices.pci.msi import Msi
from devices.pci.msix import Msix, MsixState


@dataclass
class PciState:
    """What every function keeps; models extend it."""

    config: ConfigState = field(default_factory=ConfigState)
    msix: MsixState = field(default_factory=MsixState)


class BarHandler:
    """What sits on the bus for one BAR: the function's methods with the number filled in."""

    __slots__ = ("read", "write")

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]

    def __init__(self, function: PciFunction, bar: int) -> None:
        self.read = partial(function.read_bar, bar)
        self.write = partial(function.write_bar, bar)


class Rom:
    """What sits on the bus for an expansion ROM; past its bytes all-ones, as erased flash has."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size].ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""


class PciFunction(Device):
    """A function with a type 0 header; see the module's text for how to write one."""

    is_pci: ClassVar[bool] = True
    State: ClassVar[type] = PciState
    state: PciState

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self.config = ConfigSpace(self.header(), self.state.config)
        header = self.config.header
        self._bars = header.every_bar()
        self._pin = header.interrupt_pin
        control = (self.config.capability(CapabilityId.MSI_X) or 0) // 4
        self.msix = Msix(
            header.msix,
            self.state.msix,
            lambda: self.config.values[control],
            self.config.may_master,
            host.send_msi,
        )
        start = (self.config.capability(CapabilityId.MSI) or 0) // 4
        self.msi = Msi(header.msi, self.config, start, self.config.may_master, host.send_msi)

    # What a model says and does.

    def header(self) -> Header:
        """What the function is; asked for once, when `options` is set."""
        raise NotImplementedError

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """Read 1..8 bytes that lie within the region of BAR number `bar`."""
        return ALL_ONES[size]

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write 1..8 bytes that lie within the region of BAR number `bar`."""

    def reset(self) -> None:
        """The guest reset the function: bring what is the model's own to where it began.

        The configuration space is there already; the model's `restored` does not follow.
        """

    def config_written(self, register: int) -> None:
        """The guest wrote this dword, which has its new value already."""

    def validate(self, state: Any) -> None:
        """Refuse a state that fits the dataclass but not this function, with a ValueError."""

    # Interrupts.

    def may_master(self) -> bool:
        """Whether the guest lets it write to memory: without that it does neither DMA nor send
        messages (6.2.2), which then wait."""
        return self.config.may_master()

    def set_intx(self, level: bool) -> None:
        """Ask for an interrupt on the function's pin, or stop asking.

        Status.InterruptStatus follows in any case; the line only while Command.InterruptDisable
        is clear (6.2.2, 6.2.3) and neither MSI nor MSI-X is enabled (6.8).
        """
        if level != bool(self.config.values[COMMAND] & INTX_STATUS):
            line = self._intx_line()
            self.config.update(COMMAND, INTX_STATUS, INTX_STATUS if level else 0)
            self._follow_intx(line)

    def _intx_line(self) -> bool:
        command_status = self.config.values[COMMAND]
        if not command_status & INTX_STATUS or command_status & INTX_DISABLE:
            return False
        return self.config.powered and not (self.msix.enabled or self.msi.enabled)

    def _follow_intx(self, before: bool) -> None:
        if self._intx_line() != before:
            self.host.set_irq(not before, self._pin - 1)

    # PciConfig.

    def bars(self) -> tuple[BarInfo, ...]:
        return self._bars

    def read_config(self, register: int) -> int:
        return self.config.values[register]

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        if self.config.asks_reset(register, offset, data):
            return self._reset()
        line = self._intx_line()
        result = self.config.decode_write(register, offset, data)
        self.config_written(register)
        self._follow_intx(line)
        # Cheap, since writes are rare: any of them may have been what held a message back.
        self.msi.retry()
        self.msix.retry()
        return result

    def _reset(self) -> ConfigWriteResult:
        line = self._intx_line()
        result = self.config.decode_reset()
        self.msix.reset()
        self._follow_intx(line)
        self.reset()
        return result

    def read_virtual_config(self, register: int) -> int:
        return 0

    def write_virtual_config(self, register: int, value: int) -> None:
        """The machine's side: see `VIRTUAL_RESET`."""
        if register == VIRTUAL_RESET and value & 1:
            self._reset()

    def map_config(self, view: memoryview, base: int, length: int) -> bool:
        """Keep `length` bytes at `base` of `view` equal to the registers from now on.

        `view` is memory shared with the machine, which then reads configuration without asking.
        Each dword is stored at once, in the processor's own byte order; bytes past the 256 of the
        header stay as they are.

        Returns:
            Whether it will; not if the memory is read-only, too short or not aligned to dwords.
        """
        if view.readonly or base < 0 or length <= 0 or base % 4 or length % 4:
            return False
        if base + length > view.nbytes:
            return False
        self.config.mirror(view.cast("B")[base : base + length].cast("I"))
        return True

    def unmap_config(self) -> None:
        """Let go of the memory of `map_config`, so that its owner can close it."""
        self.config.mirror(None)

    # Device.

    def regions(self) -> tuple[Region, ...]:
        """One for each BAR, ordered by its region number."""
        ordered = sorted(self._bars, key=lambda info: info.region)
        return tuple(
            Region("rom" if info.bar == ROM_BAR else f"bar{info.bar}", info.bus, info.size)
            for info in ordered
        )

    def handlers(self) -> Sequence[BusDevice]:
        ordered = sorted(self._bars, key=lambda info: info.region)
        return tuple(self._handler(info.bar) for info in ordered)

    def _handler(self, bar: int) -> BusDevice:
        if bar == ROM_BAR:
            return Rom(self.config.header.rom)
        plain = BarHandler(self, bar)
        layout = self.msix.layout
        return self.msix.handler(plain) if layout is not None and layout.bar == bar else plain

    def current_ranges(self) -> list[tuple[BusType, RegionRange]]:
        """Where the guest has put each region that is decoded now."""
        return [
            (info.bus, RegionRange(info.region, place))
            for info, place in zip(self._bars, self.config.placed, strict=True)
            if place is not None
        ]

    def close(self) -> None:
        self.unmap_config()

    def restore(self, saved: Any) -> None:
        """Take up a state that `snapshot` gave; the machine then asks for `current_ranges`.

        Raises:
            DeviceError: it is not a state of this model, or its read-only configuration bits (ids,
                kinds and sizes of BARs, capabilities) are not this function's; nothing was changed.
        """
        state: PciState = checked_state(self.model, saved, self.State)
        try:
            self.config.check(state.config.registers)
            self.msix.check(state.msix)
            self.validate(state)
        except ValueError as error:
            raise DeviceError(self.model, f"cannot restore this state: {error}") from error
        self.state = state
        self.config.load(state.config.registers)
        self.msix.load(state.msix)
        if self._pin:
            self.host.set_irq(self._intx_line(), self._pin - 1)
        self.restored()
