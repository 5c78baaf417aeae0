"""Real-time clock: an MC146818A with 128 bytes of RAM, ports 0x70 and 0x71.

Rules:
- The time of day is derived from guest time. The divider chain started at `origin`; whole seconds
  of it are the updates, its taps the periodic interrupt (data sheet, "Divider Stages" and table 5).
- The flags of register C are settled when somebody looks: what happened between `seen` and now.
  Alarms of the clock are only planned for flags whose interrupt is enabled and that are not set.
- The interrupt line is IRQF, and stays high until register C is read. So a guest that does not
  serve it costs nothing, however short the period.
- While SET is 1 the time registers are plain bytes; without it a byte that the guest writes changes
  the running time at once, and another data mode shows the same time in another form.
- Daylight saving (DSE) and the square wave are not there; their bits are kept.

Sources: Motorola MC146818A data sheet, sections named below; Intel 82371AB, 4.2.5 "Real Time Clock
Registers" (ports, NMI mask); CMOS bytes as the BIOS of the PC AT has them, the memory sizes above
16 MiB and 4 GiB as QEMU's firmware interface has them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec

from devices.bus import BusType
from devices.bytewise import ByteRegisters
from devices.clock import NS, Clock
from devices.contract import U8, Device, DeviceHost, Region
from devices.platform.rtc_calendar import DAY, Format
from devices.platform.timing import Nanoseconds, Oscillator, Reminder

U7 = Annotated[int, msgspec.Meta(ge=0, le=0x7F)]
Seconds = Annotated[int, msgspec.Meta(ge=-(1 << 40), lt=1 << 40)]

RAM_SIZE = 128
UPDATE_NS = 244_000 + 1_984_000
"""UIP is 1 so long before the end of an update: t_BUC + t_UC of table 6, 32.768 kHz."""

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
_TIME = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY)
_ALARM = (0x01, 0x03, 0x05)

UIP = 0x80
VRT = 0x80
"""Register D: the battery is good."""


class RegisterB(enum.IntFlag):
    HOURS24 = 0x02
    BINARY = 0x04
    UPDATE_ENABLE = 0x10
    ALARM_ENABLE = 0x20
    PERIODIC_ENABLE = 0x40
    SET = 0x80


class Flag(enum.IntFlag):
    """Register C; the enable bits of register B are in the same places."""

    UPDATE = 0x10
    ALARM = 0x20
    PERIODIC = 0x40
    REQUEST = 0x80


_UF, _AF, _PF = int(Flag.UPDATE), int(Flag.ALARM), int(Flag.PERIODIC)
_FLAGS = _UF | _AF | _PF
_SET = int(RegisterB.SET)
_REQUEST = int(Flag.REQUEST)
_BINARY, _HOURS24 = int(RegisterB.BINARY), int(RegisterB.HOURS24)
_crystal = Oscillator(32_768)


@dataclass
class RtcState:
    """The clock and its RAM.

    Attributes:
        index: the register that port 0x71 means.
        nmi_masked: bit 7 of port 0x70.
        a: register A without UIP.
        flags: PF, AF and UF of register C, as of `seen`.
        alarm: seconds, minutes, hours, as written.
        epoch: seconds since 1970 at `origin`.
        origin: guest time of a second's begin.
        weekday: see `rtc_calendar.Format.encode`.
        held: the time registers while SET is 1; else empty.
        seen: until when the flags are settled.
        ram: the other bytes.
    """

    index: U7 = 0
    nmi_masked: bool = False
    a: U7 = 0x26
    b: U8 = 0x02
    flags: U8 = 0
    alarm: list[U8] = field(default_factory=lambda: [0, 0, 0])
    epoch: Seconds = 0
    origin: Nanoseconds = 0
    weekday: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    held: list[U8] = field(default_factory=list)
    seen: Nanoseconds = 0
    ram: bytearray = field(default_factory=lambda: bytearray(RAM_SIZE))

    def __post_init__(self) -> None:
        if self.flags & ~_FLAGS:
            raise ValueError(f"register C cannot be {self.flags:#x}")
        if len(self.alarm) != len(_ALARM) or len(self.ram) != RAM_SIZE:
            raise ValueError("the RTC has three alarm registers and 128 bytes")
        if len(self.held) != (len(_TIME) if self.b & _SET else 0):
            raise ValueError("time registers are held while SET is 1, and only then")
        if self.origin > self.seen:
            raise ValueError("the divider chain starts in the future")


class Rtc(ByteRegisters, Device):
    """The clock.

    Args:
        host: pin 0 is IRQ 8.
        clock: what its crystal derives from.
        epoch: the time of day at guest time 0, in seconds since 1970 (UTC).
        low_memory: bytes of RAM below 4 GiB, for the CMOS.
        high_memory: bytes of RAM above 4 GiB.
        ram: further bytes of the CMOS, by index.
    """

    model: ClassVar[str] = "rtc"
    summary: ClassVar[str] = "MC146818 real-time clock and CMOS RAM"
    State = RtcState
    state: RtcState

    def __init__(
        self,
        host: DeviceHost,
        clock: Clock,
        *,
        epoch: int = 0,
        low_memory: int = 0,
        high_memory: int = 0,
        ram: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(host)
        self._clock = clock
        self._reminder = Reminder(clock, self._update)
        self._line = False
        self.state.epoch = epoch
        self.state.ram[:] = cmos_ram(low_memory, high_memory, ram or {})

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.PIO, 2, start=0x70, irq=8),)

    @property
    def nmi_masked(self) -> bool:
        return self.state.nmi_masked

    def read_byte(self, offset: int, /) -> int:
        if offset == 0:
            return 0xFF  # write-only
        index = self.state.index
        if index in _TIME:
            return self._time()[_TIME.index(index)]
        if index in _ALARM:
            return self.state.alarm[_ALARM.index(index)]
        match index:
            case 0x0A:
                return self.state.a | (UIP if self._updating() else 0)
            case 0x0B:
                return self.state.b
            case 0x0C:
                return self._take_flags()
            case 0x0D:
                return VRT
            case _:
                return self.state.ram[index]

    def write_byte(self, offset: int, value: int, /) -> None:
        state = self.state
        if offset == 0:
            state.index = value & 0x7F
            state.nmi_masked = bool(value & 0x80)
            return
        index = state.index
        if index > D and index != CENTURY:
            state.ram[index] = value
            return
        self._settle()
        if index in _TIME:
            self._write_time(_TIME.index(index), value)
        elif index in _ALARM:
            state.alarm[_ALARM.index(index)] = value
        elif index == A:
            self._write_a(value & 0x7F)
        elif index == B:
            self._write_b(value)
        self._update()

    def restored(self) -> None:
        self._line = self._requesting()
        self.host.set_irq(self._line)
        self._reminder.renew(self._next_event())

    # The time.

    @property
    def _format(self) -> Format:
        b = self.state.b
        return Format(bool(b & _BINARY), bool(b & _HOURS24))

    @property
    def _chain_runs(self) -> bool:
        """11X in DV holds the divider chain in reset (table 4)."""
        return self.state.a & 0x60 != 0x60

    def _second(self, now: int) -> int:
        """Seconds since 1970."""
        state = self.state
        return state.epoch + ((now - state.origin) // NS if self._chain_runs else 0)

    def _time(self) -> list[int]:
        state = self.state
        return state.held or self._format.encode(self._second(self._clock.now()), state.weekday)

    def _updating(self) -> bool:
        """UIP: the time may change in the next 244 us, or is about to."""
        if not self._chain_runs or self.state.b & _SET:
            return False
        return (self._clock.now() - self.state.origin) % NS >= NS - UPDATE_NS

    def _write_time(self, index: int, value: int) -> None:
        state = self.state
        if state.held:
            state.held[index] = value
        else:
            registers = self._time()
            registers[index] = value
            self._set_time(registers)

    def _set_time(self, registers: list[int]) -> None:
        """The present second is what `registers` say; the chain runs on as it does."""
        state = self.state
        state.epoch, state.weekday = self._format.decode(registers)
        if self._chain_runs:
            state.origin += (state.seen - state.origin) // NS * NS

    def _write_a(self, value: int) -> None:
        state = self.state
        ran = self._chain_runs
        second = self._second(state.seen)
        state.a = value
        if ran == self._chain_runs:
            return
        state.epoch = second
        # "The first update cycle begins one-half second" after the divider reset is removed.
        state.origin = state.seen - (0 if ran else NS // 2)

    def _write_b(self, value: int) -> None:
        state = self.state
        if value & _SET:
            # "SET going high clears the UIE bit"; it stays clear while no update ends.
            value &= ~_UF
            if not state.held:
                state.held = self._time()
            state.b = value
        else:
            registers, state.held = state.held, []
            state.b = value
            if registers:
                self._set_time(registers)

    # Flags and the interrupt.

    def _period(self) -> int:
        """Crystal ticks of the periodic interrupt; 0: none (table 5)."""
        rate = self.state.a & 0xF
        if not rate or not self._chain_runs:
            return 0
        return 1 << (rate + 6 if rate <= 2 else rate - 1)

    def _periods(self, now: int) -> int:
        return _crystal.ticks(now - self.state.origin) // self._period()

    def _settle(self) -> None:
        """Set the flags for what happened since the last look."""
        state = self.state
        now, seen = self._clock.now(), state.seen
        if now <= seen:
            return
        if not state.flags & _PF and self._period() and self._periods(now) > self._periods(seen):
            state.flags |= _PF
        if self._chain_runs and not state.b & _SET:
            before, after = self._second(seen), self._second(now)
            if after > before:
                state.flags |= _UF
                match = self._format.alarm_after(before % DAY, state.alarm)
                if match is not None and before + match <= after:
                    state.flags |= _AF
        state.seen = now

    def _take_flags(self) -> int:
        self._settle()
        state = self.state
        value = state.flags | (_REQUEST if self._requesting() else 0)
        state.flags = 0
        self._update()
        return value

    def _requesting(self) -> bool:
        return bool(self.state.flags & self.state.b & _FLAGS)

    def _update(self) -> None:
        self._settle()
        level = self._requesting()
        if level != self._line:
            self._line = level
            self.host.set_irq(level)
        self._reminder.plan(self._next_event())

    def _next_event(self) -> int | None:
        """When the line rises; None: it is high, or nothing that is enabled comes."""
        state = self.state
        if self._requesting():
            return None
        events = []
        if state.b & _PF and self._period():
            edge = (self._periods(state.seen) + 1) * self._period()
            events.append(state.origin + _crystal.when(edge))
        if state.b & (_UF | _AF) and self._chain_runs and not state.b & _SET:
            wait: int | None = 1
            if not state.b & _UF:
                wait = self._format.alarm_after(self._second(state.seen) % DAY, state.alarm)
            if wait is not None:
                second = self._second(state.seen) - state.epoch + wait
                events.append(state.origin + second * NS)
        return min(events, default=None)


def cmos_ram(low_memory: int, high_memory: int, more: Mapping[int, int]) -> bytes:
    """The CMOS as a firmware finds it after a good shutdown.

    Args:
        low_memory, high_memory: see `Rtc`.
        more: bytes by index that overrule.
    """
    ram = bytearray(RAM_SIZE)

    def put(index: int, value: int, size: int = 2) -> None:
        value = min(max(value, 0), (1 << 8 * size) - 1)
        ram[index : index + size] = value.to_bytes(size, "little")

    put(0x15, min(640, low_memory >> 10))
    for extended in (0x17, 0x30):
        put(extended, (low_memory - (1 << 20)) >> 10)
    put(0x34, (low_memory - (16 << 20)) >> 16)
    put(0x5B, high_memory >> 16, 3)
    for index, value in more.items():
        ram[index] = value
    ram[0x2E:0x30] = sum(ram[0x10:0x2E]).to_bytes(2, "big")
    return bytes(ram)
