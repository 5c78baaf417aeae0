"""The IOAPIC: 24 interrupt lines in, messages to the local APIC out.

Rules:
- A rising edge on an edge-triggered pin sends one message; while the pin is masked, or if nobody
  takes the message, it is lost (82093AA, 3.2.4: "ignored").
- A level-triggered pin that is high, not masked and has no *remote IRR* sends a message; one that
  is accepted sets remote IRR, and the EOI of its vector clears it. So a line that is still high at
  its EOI, or when it is unmasked, interrupts again.
- Lines are high when they ask, whatever the guest's tables call active: the polarity bit is kept
  and ignored.
- A pin in ExtINT mode stands for an 8259: while it is high, the CPU may take a vector from there.
- Of the version 0x20, as in the I/O controller hubs, is the EOI register at 0x40; a guest that
  expects the 82093AA (0x11) finds all of that as well.

Source: Intel 82093AA data sheet (290566); for the EOI register the I/O Controller Hub 10 data
sheet (319973), "Advanced Programmable Interrupt Controller (APIC)".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec

from devices.bus import ALL_ONES, BusType
from devices.contract import U8, U32, Device, DeviceHost, Region
from devices.irqchip.apic_registers import U4, DeliveryMode, Entry

PINS = 24
VERSION = 0x20 | (PINS - 1) << 16
DEFAULT_ID = 1
"""The ID that firmware would have given it; after a reset of the real part it is 0."""

_SELECT, _WINDOW, _EOI = 0x00, 0x10, 0x40
_MODE = 0x700
_VECTORED = (DeliveryMode.FIXED << 8, DeliveryMode.LOWEST_PRIORITY << 8)
_EXTINT = int(DeliveryMode.EXTINT) << 8
_MASKED, _LEVEL, _REMOTE_IRR = int(Entry.MASKED), int(Entry.LEVEL), int(Entry.REMOTE_IRR)
_LOGICAL = int(Entry.LOGICAL)
_WRITABLE = 0x1_AFFF


class IndexedRegister(enum.IntEnum):
    """What IOREGSEL selects (82093AA, 3.2); two for each pin from `REDIRECTION` on."""

    ID = 0x00
    VERSION = 0x01
    ARBITRATION = 0x02
    REDIRECTION = 0x10


_REDIRECTION = int(IndexedRegister.REDIRECTION)

Deliver = Callable[[int, bool, int, int, bool], bool]
"""(destination, logical, mode, vector, level): send a message; whether somebody accepted it."""


def _refused(*_: object) -> bool:
    return False


def _nobody(*_: object) -> None:
    """A wire that leads nowhere."""


def is_level(entry: int) -> bool:
    """Whether it acts level-triggered: the other delivery modes are edges always (3.2.4)."""
    return bool(entry & _LEVEL) and entry & _MODE in _VECTORED


@dataclass
class IoApicState:
    """The IOAPIC.

    Attributes:
        select: IOREGSEL.
        lines: the level of each pin.
        entries: the low halves of the redirection entries, with remote IRR.
        destinations: bits 63:56 of the redirection entries.
    """

    select: U8 = 0
    id: U4 = DEFAULT_ID
    lines: Annotated[int, msgspec.Meta(ge=0, lt=1 << PINS)] = 0
    entries: Annotated[list[U32], msgspec.Meta(min_length=PINS, max_length=PINS)] = field(
        default_factory=lambda: [_MASKED] * PINS
    )
    destinations: Annotated[list[U8], msgspec.Meta(min_length=PINS, max_length=PINS)] = field(
        default_factory=lambda: [0] * PINS
    )

    def __post_init__(self) -> None:
        for entry in self.entries:
            if entry & ~(_WRITABLE | _REMOTE_IRR):
                raise ValueError("a redirection entry has reserved bits set")
            if entry & _REMOTE_IRR and not is_level(entry):
                raise ValueError("only a level-triggered pin has a remote IRR")


class IoApic(Device):
    """One IOAPIC.

    Args:
        deliver: how messages reach the local APIC.
        changed: called when `extint` may have changed.
    """

    model: ClassVar[str] = "ioapic"
    summary: ClassVar[str] = "I/O APIC with 24 pins"
    State = IoApicState
    state: IoApicState

    def __init__(
        self,
        host: DeviceHost,
        *,
        deliver: Deliver = _refused,
        changed: Callable[[], None] = _nobody,
    ) -> None:
        super().__init__(host)
        self._deliver = deliver
        self._changed = changed
        self._extint_pins = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.MMIO, 0x1000, start=0xFEC0_0000),)

    # Lines.

    def set_pin(self, pin: int, level: bool) -> None:
        """Drive one of the pins 0..23.

        Raises:
            ValueError: there is no such pin.
        """
        if not 0 <= pin < PINS:
            raise ValueError(f"the IOAPIC has no pin {pin}: there are 0..{PINS - 1}")
        state = self.state
        if state.lines >> pin & 1 == level:
            return
        state.lines ^= 1 << pin
        if level:
            self._send(pin)
        if self._extint_pins >> pin & 1:
            self._changed()

    def end_of_interrupt(self, vector: int) -> None:
        """The local APIC, or the EOI register, says that this vector has ended."""
        entries, lines = self.state.entries, self.state.lines
        for pin, entry in enumerate(entries):
            if entry & _REMOTE_IRR and entry & 0xFF == vector:
                entries[pin] = entry & ~_REMOTE_IRR
                if lines >> pin & 1:
                    self._send(pin)

    def retry(self) -> None:
        """Send again for the levels that nobody accepted so far."""
        lines = self.state.lines
        if not lines:
            return
        for pin, entry in enumerate(self.state.entries):
            if lines >> pin & 1 and is_level(entry):
                self._send(pin)

    @property
    def extint(self) -> bool:
        """Whether a pin in ExtINT mode asks the CPU to take a vector from the 8259."""
        return bool(self.state.lines & self._extint_pins)

    def _send(self, pin: int) -> None:
        """Send the message of a pin that is high, if it may be sent now."""
        state = self.state
        entry = state.entries[pin]
        if entry & (_MASKED | _REMOTE_IRR) or entry & _MODE == _EXTINT:
            return
        level = is_level(entry)
        accepted = self._deliver(
            state.destinations[pin],
            bool(entry & _LOGICAL),
            entry >> 8 & 7,
            entry & 0xFF,
            level,
        )
        if accepted and level:
            state.entries[pin] |= _REMOTE_IRR

    # Registers.

    def read(self, offset: int, size: int) -> int:
        """IOREGSEL and IOWIN want 32 bits (3.1); narrower reads get their part, others 0."""
        within = offset & 0xF
        if within + size > 4:
            return 0
        register = offset - within
        if register == _SELECT:
            value = self.state.select
        elif register == _WINDOW:
            value = self._read_selected()
        else:
            return 0
        return value >> 8 * within & ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        """32 bits at a time, but for the byte of IOREGSEL; everything else is dropped."""
        if offset == _SELECT and size <= 4:
            self.state.select = value & 0xFF
        elif size != 4:
            return
        elif offset == _WINDOW:
            self._write_selected(value)
        elif offset == _EOI:
            self.end_of_interrupt(value & 0xFF)

    def _read_selected(self) -> int:
        state = self.state
        select = state.select
        pin = select - _REDIRECTION >> 1
        if 0 <= pin < PINS:
            return state.destinations[pin] << 24 if select & 1 else state.entries[pin]
        match select:
            case IndexedRegister.ID | IndexedRegister.ARBITRATION:
                return state.id << 24
            case IndexedRegister.VERSION:
                return VERSION
        return ALL_ONES[4]

    def _write_selected(self, value: int) -> None:
        state = self.state
        pin = state.select - _REDIRECTION >> 1
        if 0 <= pin < PINS:
            if state.select & 1:
                state.destinations[pin] = value >> 24
            else:
                self._write_entry(pin, value)
            if is_level(state.entries[pin]) and state.lines >> pin & 1:
                self._send(pin)
        elif state.select == IndexedRegister.ID:
            state.id = value >> 24 & 0xF

    def _write_entry(self, pin: int, value: int) -> None:
        """The low half; a pin that becomes edge-triggered forgets its remote IRR."""
        entries = self.state.entries
        entry = value & _WRITABLE
        if is_level(entry):
            entry |= entries[pin] & _REMOTE_IRR
        entries[pin] = entry
        self._find_extint()
        self._changed()

    # State.

    def restored(self) -> None:
        self._find_extint()
        self._changed()

    def _find_extint(self) -> None:
        self._extint_pins = sum(
            1 << pin
            for pin, entry in enumerate(self.state.entries)
            if entry & (_MODE | _MASKED) == _EXTINT
        )
