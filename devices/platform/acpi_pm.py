"""ACPI fixed hardware: PM1a event and control blocks, and the power management timer.

Registers (ACPI specification 6.4, 4.8.3 "Fixed Hardware Registers"): status and enable at 0x600,
control at 0x604, timer at 0x608. There are no general-purpose events, and of the sleeping states
only S5, soft off. The machine is born in ACPI mode: SCI_EN is 1 and cannot be cleared, so the FADT
names no SMI command port (5.2.9: SMI_CMD = 0 means that the mode cannot be changed).

The timer's status bit is settled when somebody looks; an alarm is planned only while its event is
enabled. The system control interrupt is a level: high while any enabled status bit is set.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from devices.bus import BusDevice, BusType
from devices.clock import Clock
from devices.contract import U16, Device, DeviceHost, Region
from devices.platform.timing import Nanoseconds, Oscillator, Reminder

FREQUENCY = 3_579_545
"""Hz (4.8.2.1 "Power Management Timer")."""
S5 = 5
"""SLP_TYP that means soft off here; the DSDT's \\_S5 says so too."""


class Event(enum.IntFlag):
    """PM1 status (table 4.13); the enable register has the same bits but for the last."""

    TIMER = 1 << 0
    BUS_MASTER = 1 << 4
    GLOBAL = 1 << 5
    POWER_BUTTON = 1 << 8
    SLEEP_BUTTON = 1 << 9
    RTC = 1 << 10
    WAKE = 1 << 15


class Control(enum.IntFlag):
    """PM1 control (table 4.15)."""

    SCI_EN = 1 << 0
    BM_RLD = 1 << 1
    GBL_RLS = 1 << 2
    SLP_TYP = 7 << 10
    SLP_EN = 1 << 13


_STATUS_BITS = int(
    Event.TIMER
    | Event.BUS_MASTER
    | Event.GLOBAL
    | Event.POWER_BUTTON
    | Event.SLEEP_BUTTON
    | Event.RTC
    | Event.WAKE
)
_ENABLE_BITS = int(Event.TIMER | Event.GLOBAL | Event.POWER_BUTTON | Event.SLEEP_BUTTON | Event.RTC)
_CONTROL_BITS = int(Control.BM_RLD | Control.SLP_TYP)
"""What the guest writes and reads back; SLP_EN and GBL_RLS always read 0."""
_TIMER, _POWER_BUTTON = int(Event.TIMER), int(Event.POWER_BUTTON)
_SCI_EN, _SLP_EN = int(Control.SCI_EN), int(Control.SLP_EN)


@dataclass
class AcpiPmState:
    """The registers; `seen` is the guest time until which the timer's status bit is settled."""

    status: U16 = 0
    enable: U16 = 0
    control: U16 = 0
    seen: Nanoseconds = 0

    def __post_init__(self) -> None:
        if (
            self.status & ~_STATUS_BITS
            or self.enable & ~_ENABLE_BITS
            or self.control & ~_CONTROL_BITS
        ):
            raise ValueError("a reserved bit of a PM1 register is set")


class AcpiPm(Device):
    """The power management registers.

    Args:
        host: pin 0 is the SCI, IRQ 9.
        clock: what the timer derives from.
        power_off: the guest switched itself off.
        timer_bits: 24, or 32 (the FADT then says TMR_VAL_EXT).
    """

    model: ClassVar[str] = "acpi-pm"
    summary: ClassVar[str] = "ACPI power management registers and timer"
    State = AcpiPmState
    state: AcpiPmState

    def __init__(
        self,
        host: DeviceHost,
        clock: Clock,
        power_off: Callable[[], None],
        *,
        timer_bits: int = 24,
    ) -> None:
        if timer_bits not in (24, 32):
            raise ValueError(f"the PM timer has 24 or 32 bits, not {timer_bits}")
        super().__init__(host)
        self._clock = clock
        self._power_off = power_off
        self._oscillator = Oscillator(FREQUENCY)
        self._mask = (1 << timer_bits) - 1
        self._half = timer_bits - 1
        self._reminder = Reminder(clock, self._update)
        self._line = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("events", BusType.PIO, 4, start=0x600, irq=9),
            Region("control", BusType.PIO, 2, start=0x604),
            Region("timer", BusType.PIO, 4, start=0x608),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return (_Events(self), _Control(self), _Timer(self))

    def press_power_button(self) -> bool:
        """Press it shortly; whether the guest wants to be told (4.8.2.2.1)."""
        self.state.status |= _POWER_BUTTON
        self._update()
        return bool(self.state.enable & _POWER_BUTTON)

    def restored(self) -> None:
        self._line = self._level()
        self.host.set_irq(self._line)
        self._reminder.renew(self._next_event())

    # Registers.

    def read_timer(self) -> int:
        return self._oscillator.ticks(self._clock.now()) & self._mask

    def read_events(self) -> int:
        """Status in the low half, enable in the high one."""
        self._settle()
        return self.state.enable << 16 | self.state.status

    def write_events(self, value: int, mask: int) -> None:
        """Write the bits of `mask`: a 1 clears its status bit; enable bits are set as they come."""
        self._settle()
        state = self.state
        state.status &= ~(value & mask)
        state.enable = (state.enable & ~(mask >> 16) | (value & mask) >> 16) & _ENABLE_BITS
        self._update()

    def read_control(self) -> int:
        return self.state.control | _SCI_EN

    def write_control(self, value: int, mask: int) -> None:
        """SLP_EN with a SLP_TYP other than S5's does nothing: no other state is offered."""
        state = self.state
        state.control = (state.control & ~mask | value & mask) & _CONTROL_BITS
        if value & mask & _SLP_EN and state.control >> 10 & 7 == S5:
            self._power_off()

    # The timer's event: "any time the last bit of the timer goes from 0 to 1 or 1 to 0".

    def _halves(self, now: int) -> int:
        return self._oscillator.ticks(now) >> self._half

    def _settle(self) -> None:
        state = self.state
        now = self._clock.now()
        if self._halves(now) > self._halves(state.seen):
            state.status |= _TIMER
        state.seen = now

    def _level(self) -> bool:
        return bool(self.state.status & self.state.enable)

    def _next_event(self) -> int | None:
        state = self.state
        if not state.enable & _TIMER or state.status & _TIMER:
            return None
        return self._oscillator.when(self._halves(state.seen) + 1 << self._half)

    def _update(self) -> None:
        self._settle()
        level = self._level()
        if level != self._line:
            self._line = level
            self.host.set_irq(level)
        self._reminder.plan(self._next_event())


def _lanes(offset: int, size: int, value: int) -> tuple[int, int]:
    """A write of some bytes of a wide register: the value and mask of the whole."""
    shift = 8 * offset
    return value << shift, (1 << 8 * size) - 1 << shift


def _part(whole: int, offset: int, size: int) -> int:
    return whole >> 8 * offset & (1 << 8 * size) - 1


class _Events:
    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        return _part(self._pm.read_events(), offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._pm.write_events(*_lanes(offset, size, value))


class _Control:
    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        return _part(self._pm.read_control(), offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._pm.write_control(*_lanes(offset, size, value))


class _Timer:
    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        return _part(self._pm.read_timer(), offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The timer is read-only."""
