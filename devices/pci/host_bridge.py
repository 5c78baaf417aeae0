"""The PCI root: configuration mechanism #1, the functions on bus 0, their ranges and interrupts.

Sources: PCI Local Bus Specification 3.0, section 3.2.2.3.2 (configuration mechanism #1), chapter 6.

Ports 0xCF8..0xCFF:

- CONFIG_ADDRESS, 0xCF8: only a 4-byte access reaches it ("any other types of accesses to this
  address ... must be passed through"); a shorter one is nobody's.
- CONFIG_DATA, 0xCFC..0xCFF: 1, 2 or 4 bytes at any byte lane, as long as they stay in the dword,
  while the enable bit is set; otherwise, again, it is nobody's.
- 0xCF9, one byte: the reset control register of the board, if it has one; chip sets put it there,
  where no access of the mechanism can go.
- An access that straddles 0xCFB/0xCFC or leaves 0xCFF is nobody's: a processor would split it in
  two cycles, and no software that means the bridge does that.

Nobody's accesses read all-ones, write nothing, and are counted. So are reads of functions that
are not there or whose device failed.

The functions may be proxies of hostile processes. The root believes none of them: where ranges go
is in `devices.pci.mapping`, and the multi-function bit of the header type is the root's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from devices.bus import ALL_ONES, Bus, BusDevice, BusType, Range
from devices.contract import Device, DeviceHost, Region, checked_state
from devices.errors import DeviceError
from devices.pci import bridge
from devices.pci.config import ConfigState
from devices.pci.contract import CONFIG_REGISTERS, VIRTUAL_RESET, BarInfo, PciConfig
from devices.pci.ecam import ECAM, Ecam
from devices.pci.intx import PINS, PIRQ_IRQS, IntxRouter, Slot
from devices.pci.mapping import HEADER_TYPE, BarMapper, FunctionState, Seat
from devices.pci.registers import DWORD
from devices.pci.resources import Assignment
from devices.pci.topology import Topology

CONFIG_ADDRESS = 0xCF8
RESET_CONTROL = 1
"""The offset of port 0xCF9 from it."""
ENABLE = 1 << 31
ADDRESS_BITS = ENABLE | 0x00FF_FFFC
"""The bits of CONFIG_ADDRESS that keep what is written; the others are reserved and zero."""

MULTI_FUNCTION = 1 << 23

MMIO_WINDOW = Range(0xE000_0000, 0x1EC0_0000)
"""Where memory BARs go at boot: SeaBIOS too begins there, and at 0xFEC00000 is the IOAPIC."""
IO_WINDOW = Range(0xC000, 0x4000)
"""Where I/O BARs go at boot: above all that ISA boards decode."""


@dataclass
class RootState:
    """CONFIG_ADDRESS, the bridge's own registers, the shadow of each function by its slot.

    Attributes:
        removed: slots of functions that were there at the start and were unplugged.
    """

    address: int = 0
    bridge: ConfigState = field(default_factory=ConfigState)
    functions: dict[str, FunctionState] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


class PciRoot(Device):
    """Lives in the machine's process; drives functions that may live elsewhere.

    Args:
        host: of the host bridge's own function.
        mmio: the bus for memory BARs.
        io: the bus for I/O BARs.
        set_irq_line: told (irq, level) when an interrupt line of the board changes.
        on_violation: told (owner, text) when a device said what the guest did not ask for; it may
            call `fail` or `remove`. The access goes on in any case.
        on_removed: told (owner, slot) when a device unplugged one of its functions.
        irqs: the interrupts of PIRQ A to D.
        reset_control: gets the byte accesses to port 0xCF9, at offset 0.
    """

    model: ClassVar[str] = "pci-root"
    summary: ClassVar[str] = "PCI host bridge with configuration mechanism #1"
    State = RootState
    state: RootState

    def __init__(
        self,
        host: DeviceHost,
        mmio: Bus,
        io: Bus,
        *,
        set_irq_line: Callable[[int, bool], None],
        on_violation: Callable[[str, str], None],
        on_removed: Callable[[str, Slot], None] | None = None,
        irqs: Sequence[int] = PIRQ_IRQS,
        reset_control: BusDevice | None = None,
    ) -> None:
        super().__init__(host)
        self._reset_control = reset_control
        self.unclaimed_reads = 0
        self.unclaimed_writes = 0
        self._mmio, self._io = mmio, io
        self._intx = IntxRouter(set_irq_line, irqs)
        self._on_violation, self._on_removed = on_violation, on_removed
        self._topology = topology = Topology()
        self._mapper = BarMapper(mmio, io, topology.in_order, topology.passes, on_violation)
        self.bridge = bridge.HostBridge(host)
        self.state.bridge = self.bridge.state.config
        self.add(Slot(0), self.bridge, self.bridge.model, (), ())

    # Functions come and go.

    def add(
        self,
        slot: Slot | int,
        function: PciConfig,
        owner: str,
        handlers: Sequence[BusDevice],
        bars: Sequence[BarInfo],
    ) -> None:
        """Plug in a function whose registers are at their reset values.

        Args:
            slot: a number alone is a device whose function 0 this is; so everywhere here.
            owner: the device's configured name; its functions may share one device number.
            handlers: one for each region of the device.
            bars: as the machine knows them from the model, not from the device process.

        Raises:
            ValueError: the slot does not exist, is taken, or has no function 0 yet; the BARs break
                a rule.
        """
        slot = _slot(slot)
        seat = Seat(slot, function, owner, handlers, bars)
        self._topology.add(seat)
        if seat.is_bridge:
            self._intx.bridges[seat.behind] = slot
        if str(slot) in self.state.removed:
            self.state.removed.remove(str(slot))

    def remove(self, slot: Slot | int) -> None:
        """Unplug a function: its ranges leave the buses, its pins fall. Nothing if it is gone."""
        slot = _slot(slot)
        seat = self._topology.remove(slot)
        if seat is None:
            return
        self._leave(seat)
        self.state.removed.append(str(slot))

    def fail(self, owner: str) -> None:
        """A device failed: all its functions read all-ones and leave the buses, pins fall."""
        for seat in self._topology.in_order():
            if seat.owner == owner and not seat.failed:
                seat.failed = True
                self._topology.reroute()
                self._leave(seat)

    def _bridge_written(self, seat: Seat) -> None:
        if seat.shadow.values[bridge.CONTROL] & bridge.SECONDARY_RESET:
            for other in self._topology.behind(seat):
                other.shadow.decode_reset()
                other.function.write_virtual_config(VIRTUAL_RESET, 1)
                self._mapper.follow(other)
        self._topology.reroute()
        self._cut_off(seat)

    def _leave(self, seat: Seat) -> None:
        self._mapper.unmap(seat)
        self._intx.release(seat.slot)
        if seat.is_bridge:
            self._cut_off(seat)

    def _cut_off(self, seat: Seat) -> None:
        """A bridge passes nothing on any more, or something else than before."""
        self._mapper.bridge_changed()
        for other in self._topology.behind(seat):
            if not self._topology.is_connected(other.slot):
                self._intx.release(other.slot)

    def bus_behind(self, owner: str) -> int | None:
        """The bus of `Slot`s behind the bridge of this name; None if it is no bridge."""
        seats = self._topology.in_order()
        return next((s.behind for s in seats if s.owner == owner and s.is_bridge), None)

    def slots(self) -> list[tuple[Slot, str]]:
        """What is plugged in: slots with their owners, in order."""
        return [(seat.slot, seat.owner) for seat in self._topology.in_order()]

    # Configuration space, whatever the mechanism.

    def read_config(self, number: int, register: int) -> int:
        """The dword `register` (0..1023) of the function that the guest knows as `number`.

        That is ``bus << 8 | device << 3 | function``. No function has extended capabilities: from
        register 64 on all is zero (PCI Express 3.0, 7.9.1).
        """
        seat = self._topology.routes.get(number)
        if seat is None or seat.failed:
            return DWORD
        if register >= CONFIG_REGISTERS:
            return 0
        value = seat.function.read_config(register) & DWORD
        if register == HEADER_TYPE and value != DWORD:
            value &= ~MULTI_FUNCTION
            if seat.multi_function:
                value |= MULTI_FUNCTION
        return value

    def write_config(self, number: int, register: int, offset: int, data: bytes) -> None:
        """Write 1..4 bytes at byte `offset` of dword `register`, never past its end."""
        seat = self._topology.routes.get(number)
        if seat is not None and not seat.failed and register < CONFIG_REGISTERS:
            self._write(seat, register, offset, data)

    def _write(self, seat: Seat, register: int, offset: int, data: bytes) -> None:
        shadowed = seat.is_shadowed(register)
        if shadowed:
            seat.write_shadow(register, offset, data)
        answer = seat.function.write_config(register, offset, data)
        seat.written()
        if seat.failed or self._topology.seats.get(seat.slot.number) is not seat:
            return
        if shadowed or answer:
            self._mapper.written(seat, answer)
        if shadowed and seat.is_bridge:
            self._bridge_written(seat)
        if answer.removed_pci_devices:
            self._unplug(seat, answer.removed_pci_devices)

    # Configuration mechanism #1.

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("config", BusType.PIO, 8, start=CONFIG_ADDRESS),
            Region("ecam", BusType.MMIO, ECAM.length, start=ECAM.start),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return self, Ecam(self.read_config, self.write_config)

    def read(self, offset: int, size: int) -> int:
        address = self.state.address
        if offset >= 4:
            lane = offset - 4
            if address & ENABLE and lane + size <= 4:
                value = self.read_config(address >> 8 & 0xFFFF, address >> 2 & 0x3F)
                return value >> 8 * lane & ALL_ONES[size]
        elif offset == 0 and size == 4:
            return address
        elif offset == RESET_CONTROL and size == 1 and self._reset_control is not None:
            return self._reset_control.read(0, 1)
        self.unclaimed_reads += 1
        return ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        address = self.state.address
        if offset >= 4:
            lane = offset - 4
            if address & ENABLE and lane + size <= 4:
                data = value.to_bytes(size, "little")
                self.write_config(address >> 8 & 0xFFFF, address >> 2 & 0x3F, lane, data)
                return
        elif offset == 0 and size == 4:
            self.state.address = value & ADDRESS_BITS
            return
        elif offset == RESET_CONTROL and size == 1 and self._reset_control is not None:
            self._reset_control.write(0, 1, value)
            return
        self.unclaimed_writes += 1

    # Ranges.

    def problems(self) -> list[str]:
        """One line for each BAR that the guest programmed and nobody can reach."""
        return self._mapper.problems()

    @property
    def collisions(self) -> int:
        """How often a BAR was programmed to a place that was taken, or that does not exist."""
        return self._mapper.collisions

    def retry(self) -> None:
        """Another device left a bus: insert what it was in the way of."""
        self._mapper.retry()

    def assign_resources(
        self,
        mmio_window: Range = MMIO_WINDOW,
        io_window: Range = IO_WINDOW,
        *,
        decode: bool = True,
    ) -> list[str]:
        """Do at boot what firmware does: place all BARs, preset interrupt lines.

        The guest may do it all again. Bus mastering stays off, as firmware leaves it.

        Args:
            mmio_window: for memory BARs, 64-bit ones too: below 4 GiB every guest can reach them.
                It ends below 4 GiB: see `devices.pci.config` about the top.
            io_window: for I/O BARs.
            decode: leave the functions with decoding on.

        Returns:
            One line for each BAR that found no place; it stays unassigned.
        """
        windows = ((self._mmio, mmio_window), (self._io, io_window))
        return Assignment(self._topology, self._write, self.irq_for).run(windows, decode)

    # Interrupts.

    def irq_for(self, slot: Slot | int, pin: int) -> int:
        """The board's interrupt of pin 0 (INTA#) to 3 of the device in `slot`."""
        return self._intx.irq_for(_slot(slot), pin)

    def set_intx(self, slot: Slot | int, pin: int, level: bool) -> None:
        """A function drives its pin 0 (INTA#) to 3; from a failed or missing one it is ignored."""
        slot = _slot(slot)
        seat = self._topology.seats.get(slot.number)
        if seat is None or seat.failed or not self._topology.is_connected(slot):
            return
        if not 0 <= pin < PINS:
            self._on_violation(seat.owner, f"drove interrupt pin {pin}; there are {PINS}")
            return
        self._intx.set(slot, pin, level)

    def may_master(self, slot: Slot | int) -> bool:
        """Whether the guest lets this function write to memory, as messages do (6.2.2)."""
        return self._topology.may_master(_slot(slot))

    # State.

    def snapshot(self) -> Any:
        self.state.functions = {
            str(seat.slot): seat.state(self._intx.pins(seat.slot))
            for seat in self._topology.in_order()
        }
        return msgspec.to_builtins(self.state)

    def restore(self, saved: Any) -> None:
        """Take up a state; once the functions have theirs too, call `remap`.

        Raises:
            DeviceError: it is no such state, or other functions are plugged in here; nothing was
                changed.
        """
        state = checked_state(self.model, saved, RootState)
        try:
            self._check(state)
        except ValueError as error:
            raise DeviceError(self.model, f"cannot restore this state: {error}") from error
        for seat in self._topology.in_order():
            if str(seat.slot) not in state.functions:
                self._unplug(seat, [seat.slot.number])
        self.state = state
        self.bridge.config.load(state.bridge.registers)
        self.bridge.state.config = state.bridge
        for seat in self._topology.in_order():
            seat.load(state.functions[str(seat.slot)])
        self._topology.reroute()
        self._intx.load(
            (seat.slot, pin)
            for seat in self._topology.in_order()
            for pin in state.functions[str(seat.slot)].pins
        )

    def remap(self) -> None:
        """Make the buses hold what the restored shadows say; who differs from it is at fault."""
        self._mapper.remap()

    def _check(self, state: RootState) -> None:
        if state.address & ~ADDRESS_BITS:
            raise ValueError(f"CONFIG_ADDRESS {state.address:#x} has reserved bits set")
        self.bridge.config.check(state.bridge.registers)
        self._topology.check(state.functions, state.removed)

    # Inside.

    def _unplug(self, seat: Seat, numbers: Sequence[int]) -> None:
        for number in numbers:
            gone = self._topology.seats.get(number)
            if gone is None or gone.owner != seat.owner:
                self._on_violation(
                    seat.owner, f"unplugged function {number:#x}, which is not its own"
                )
                return
            self.remove(gone.slot)
            if self._on_removed is not None:
                self._on_removed(gone.owner, gone.slot)


def _slot(slot: Slot | int) -> Slot:
    return Slot(slot) if isinstance(slot, int) else slot
