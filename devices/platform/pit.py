"""Programmable interval timer: an 8254 and the speaker port 0x61 that gates its counter 2.

Counter 0 drives IRQ 0, counter 1 (memory refresh) nothing, counter 2 the speaker; counters 0 and 1
have their GATE tied high (IBM PC AT Technical Reference, "System Timers"; Intel 82371AB, 4.2.2 and
"NMI Status and Control", port 0x61).

The interrupt line follows OUT of counter 0, with one liberty: where OUT falls only to rise again
(modes 2 to 5) the line falls in the same instant as it rises. So a tick is not lost when the guest
is slow to take it, and a period costs one alarm, not two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import msgspec

from devices.bus import BusDevice, BusType
from devices.bytewise import ByteRegisters
from devices.clock import Clock
from devices.contract import Device, DeviceHost, Region
from devices.platform.pit_channel import Channel, ChannelState
from devices.platform.timing import MIN_INTERVAL, Nanoseconds, Oscillator, Reminder

FREQUENCY = 1_193_182
"""Hz: a twelfth of 14.31818 MHz, as guests write it down."""
_CHANNELS = 3
_CONTROL = 3
_SPEAKER = 2
_REFRESH = 18
"""Ticks between two memory refreshes, 15 us; each turns bit 4 of port 0x61 over."""


@dataclass
class PitState:
    """The timer.

    Attributes:
        port61: bits 3..0 of port 0x61: GATE of counter 2, speaker, two parity check masks.
        alarm: guest time of the next interrupt that is wanted.
        rang: guest time of the last one.
    """

    channels: list[ChannelState] = field(
        default_factory=lambda: [ChannelState(gate=i != _SPEAKER) for i in range(_CHANNELS)]
    )
    port61: Annotated[int, msgspec.Meta(ge=0, le=0xF)] = 0
    alarm: Nanoseconds | None = None
    rang: Nanoseconds = -MIN_INTERVAL

    def __post_init__(self) -> None:
        gates = [channel.gate for channel in self.channels]
        if gates != [True, True, bool(self.port61 & 1)]:
            raise ValueError("there are three counters, and only bit 0 of port 0x61 is a gate")


class Pit(Device):
    """The timer.

    Args:
        host: pin 0 is IRQ 0.
        clock: what its CLK inputs derive from.
    """

    model: ClassVar[str] = "pit"
    summary: ClassVar[str] = "8254 interval timer with the speaker port"
    State = PitState
    state: PitState

    def __init__(self, host: DeviceHost, clock: Clock) -> None:
        super().__init__(host)
        self._clock = clock
        self._oscillator = Oscillator(FREQUENCY)
        self._reminder = Reminder(clock, self._ring)
        self._channels = [Channel(state) for state in self.state.channels]
        self._line = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("counters", BusType.PIO, 4, start=0x40, irq=0),
            Region("speaker", BusType.PIO, 1, start=0x61),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return (_Counters(self), _Port61(self))

    def read_counter(self, number: int) -> int:
        """One byte of counter 0..2."""
        now = self._now()
        return self._channel(number, now).read(now)

    def write_counter(self, number: int, value: int) -> None:
        """One byte of a count."""
        self._catch_up()
        now = self._now()
        self._channel(number, now).write(value, now)
        self._changed(number, now)

    def write_control(self, value: int) -> None:
        """Port 0x43: a control word, a latch command or a read-back command."""
        number = value >> 6
        now = self._now()
        if number == _CHANNELS:
            self._read_back(value, now)
        elif not value & 0x30:
            self._channel(number, now).latch_count(now)
        else:
            self._catch_up()
            self._channel(number, now).write_control(value, now)
            self._changed(number, now)

    def read_port61(self) -> int:
        """Port 0x61: what was written, the refresh toggle and OUT of counter 2."""
        now = self._now()
        out = self._channel(_SPEAKER, now).out(now)
        return self.state.port61 | (now // _REFRESH & 1) << 4 | out << 5

    def write_port61(self, value: int) -> None:
        now = self._now()
        self.state.port61 = value & 0xF
        self._channel(_SPEAKER, now).set_gate(bool(value & 1), now)

    def snapshot(self) -> Any:
        now = self._now()
        for number in range(_CHANNELS):
            self._channel(number, now)
        return super().snapshot()

    def restored(self) -> None:
        for channel, state in zip(self._channels, self.state.channels, strict=True):
            channel.state = state
        self._line = self._level(self._now())
        self.host.set_irq(self._line)
        self._reminder.renew(self.state.alarm)

    def _now(self) -> int:
        return self._oscillator.ticks(self._clock.now())

    def _channel(self, number: int, now: int) -> Channel:
        channel = self._channels[number]
        channel.settle(now)
        return channel

    def _read_back(self, value: int, now: int) -> None:
        """Bits 3..1 select counters; 0 in bits 5 and 4 says what to latch ("Read-Back Command")."""
        for number in range(_CHANNELS):
            if value & 2 << number:
                channel = self._channel(number, now)
                if not value & 0x20:
                    channel.latch_count(now)
                if not value & 0x10:
                    channel.latch_status(now)

    # The interrupt.

    def _level(self, now: int) -> bool:
        channel = self._channel(0, now)
        return channel.state.mode != 0 or channel.out(now)

    def _drive(self, level: bool) -> None:
        if level != self._line:
            self._line = level
            self.host.set_irq(level)

    def _changed(self, number: int, now: int) -> None:
        """It was written at `now`; a count that has ended since rings, too."""
        if number == 0:
            self._drive(self._level(now))
            self._plan(now)

    def _catch_up(self) -> None:
        """Have an interrupt that is overdue before its counter is reprogrammed."""
        alarm = self.state.alarm
        if alarm is not None and alarm <= self._clock.now():
            self._ring()

    def _ring(self) -> None:
        self._drive(False)
        self._drive(True)
        self.state.rang = self._clock.now()
        now = self._now()
        self._channel(0, now)
        self._plan(now)

    def _plan(self, after: int) -> None:
        if self._channels[0].state.mode in (2, 3):
            earliest = self._oscillator.ticks(self.state.rang + MIN_INTERVAL)
            after = max(after, earliest)
        rise = self._channels[0].next_rise(after)
        self.state.alarm = None if rise is None else self._oscillator.when(rise)
        self._reminder.plan(self.state.alarm)


class _Counters(ByteRegisters):
    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read_byte(self, offset: int, /) -> int:
        # The control word register cannot be read: nobody drives the bus.
        return 0xFF if offset == _CONTROL else self._pit.read_counter(offset)

    def write_byte(self, offset: int, value: int, /) -> None:
        if offset == _CONTROL:
            self._pit.write_control(value)
        else:
            self._pit.write_counter(offset, value)


class _Port61(ByteRegisters):
    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read_byte(self, offset: int, /) -> int:
        return self._pit.read_port61()

    def write_byte(self, offset: int, value: int, /) -> None:
        self._pit.write_port61(value)
