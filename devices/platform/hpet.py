"""High precision event timer block: a main counter and three timers.

Registers: IA-PC HPET Specification 1.0a, 2.3 "Register Definitions". All timers can be periodic and
count 64 bits; none delivers by front side bus message.

Rules:
- The main counter is `counter` at guest time `since` and runs from there; a timer's next match is
  kept as a guest time, so nothing is ticked. `_settle` lets matches happen whose time has come.
- One-shot timers match when the counter *equals* the comparator: one that was set too late
  matches only after the counter wrapped (2.3.9.2.1).
- An edge-triggered interrupt pulls its line low and high again and leaves it high: the next one
  does the same, and the 8259A wants it high until it acknowledges.
- Lines are named by number: 0 and 8 are the ISA lines of the 8254 and the RTC (IRQ 0 is input 2 of
  the IOAPIC), 20 to 23 inputs of the IOAPIC that nobody else has. The 8254 and the RTC reach their
  lines through `isa_input`, because legacy replacement takes these lines from them.
- Legacy replacement route: timer 0 has IRQ 0 and timer 1 IRQ 8 (2.3.5, LEG_RT_CNF).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec

from devices.bus import BusType
from devices.clock import Clock
from devices.contract import Device, DeviceHost, Region
from devices.platform.timing import FOREVER, MIN_INTERVAL, Nanoseconds, Reminder

BASE = 0xFED0_0000
LENGTH = 0x400
TIMERS = 3
ROUTES = range(20, 24)
"""IOAPIC inputs that a timer can be routed to."""
PIT_LINE, RTC_LINE = 0, 8
"""The ISA lines that legacy replacement takes; of timers 0 and 1."""
LINES = (PIT_LINE, RTC_LINE, *ROUTES)

_VENDOR = 0x8086
_REVISION = 1
_ALL = (1 << 64) - 1
_LOW = (1 << 32) - 1
_FEMTO = 1_000_000

# General registers (2.3.1, table 2).
CAPABILITIES, CONFIGURATION, STATUS, COUNTER = 0x000, 0x010, 0x020, 0x0F0
ENABLE, LEGACY = 1 << 0, 1 << 1
"""Bits of the general configuration register (2.3.5)."""

# A timer's registers (2.3.8, 2.3.9), from 0x100 on.
TIMER_BASE, TIMER_STRIDE = 0x100, 0x20
TIMER_CONFIG, TIMER_COMPARATOR = 0x00, 0x08

LEVEL = 1 << 1
INT_ENABLE = 1 << 2
PERIODIC = 1 << 3
VALUE_SET = 1 << 6
MODE32 = 1 << 8
_PERIODIC_CAPABLE = 1 << 4
_SIZE_CAPABLE = 1 << 5
_ROUTE_SHIFT = 9
_ROUTE = 0x1F << _ROUTE_SHIFT
_WRITABLE = LEVEL | INT_ENABLE | PERIODIC | VALUE_SET | MODE32 | _ROUTE
_FIXED = _PERIODIC_CAPABLE | _SIZE_CAPABLE | sum(1 << 32 + route for route in ROUTES)


@dataclass
class TimerState:
    """One timer.

    Attributes:
        config: the writable bits of the configuration register; VALUE_SET until the next write.
        comparator: as the guest reads it; in periodic mode the next match.
        period: what periodic mode adds.
        match: guest time of the next match; None: never, or the counter stands still.
        high: edge mode holds the line high.
        rang: guest time of the last interrupt.
    """

    config: Annotated[int, msgspec.Meta(ge=0, le=_WRITABLE)] = ROUTES[0] << _ROUTE_SHIFT
    comparator: int = _ALL
    period: int = 0
    match: Nanoseconds | None = None
    high: bool = False
    rang: Nanoseconds = -MIN_INTERVAL

    def __post_init__(self) -> None:
        if self.config & ~_WRITABLE or self.route not in ROUTES:
            raise ValueError(f"a timer cannot be configured as {self.config:#x}")
        if not (0 <= self.comparator <= _ALL and 0 <= self.period <= _ALL):
            raise ValueError("a timer has 64 bits")

    @property
    def route(self) -> int:
        return self.config >> _ROUTE_SHIFT & 0x1F

    @property
    def mask(self) -> int:
        """The bits that the timer compares."""
        return _LOW if self.config & MODE32 else _ALL


@dataclass
class HpetState:
    """The block.

    Attributes:
        config: ENABLE and LEGACY.
        counter: the main counter at guest time `since`.
        status: one bit for each level-triggered timer that matched (2.3.6).
        inputs: the levels of IRQ 0 and 8 as the 8254 and the RTC drive them.
    """

    config: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    counter: int = 0
    since: Nanoseconds = 0
    status: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    timers: list[TimerState] = field(default_factory=lambda: [TimerState() for _ in range(TIMERS)])
    inputs: list[bool] = field(default_factory=lambda: [False, False])

    def __post_init__(self) -> None:
        if len(self.timers) != TIMERS or len(self.inputs) != 2:
            raise ValueError(f"the block has {TIMERS} timers and two inputs")
        if not 0 <= self.counter <= _ALL:
            raise ValueError("the main counter has 64 bits")
        if not self.config & ENABLE and any(timer.match is not None for timer in self.timers):
            raise ValueError("a timer cannot match while the counter stands still")


class Hpet(Device):
    """The block.

    Args:
        host: not asked for interrupts: they have no pin of their own.
        clock: what the main counter derives from.
        set_line: drives one of `LINES`.
        period_ns: nanoseconds of one tick, 10..100 (2.2: 10 MHz at least). The slow default gives
            an emulated guest time to set a comparator before the counter passes it.
    """

    model: ClassVar[str] = "hpet"
    summary: ClassVar[str] = "high precision event timers"
    State = HpetState
    state: HpetState

    def __init__(
        self,
        host: DeviceHost,
        clock: Clock,
        set_line: Callable[[int, bool], None],
        *,
        period_ns: int = 100,
    ) -> None:
        if not 10 <= period_ns <= 100:
            raise ValueError(f"the HPET's period is 10..100 ns, not {period_ns}")
        super().__init__(host)
        self._clock = clock
        self._set_line = set_line
        self._period_ns = period_ns
        self._reminder = Reminder(clock, self._update)
        self._lines = dict.fromkeys(LINES, False)
        self._capabilities = (
            period_ns * _FEMTO << 32
            | _VENDOR << 16
            | 1 << 15  # LEG_RT_CAP
            | 1 << 13  # COUNT_SIZE_CAP
            | TIMERS - 1 << 8
            | _REVISION
        )

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.MMIO, LENGTH, start=BASE),)

    @property
    def legacy(self) -> bool:
        """Whether timers 0 and 1 have the lines of the 8254 and the RTC."""
        return bool(self.state.config & LEGACY)

    @property
    def capabilities(self) -> int:
        """The low half of the capability register: the event timer block ID of the ACPI table."""
        return self._capabilities & _LOW

    def isa_input(self, irq: int, level: bool) -> None:
        """IRQ 0 as the 8254 drives it, or IRQ 8 as the RTC does; passed on unless replaced."""
        self.state.inputs[irq == RTC_LINE] = level
        self._drive()

    def restored(self) -> None:
        wanted = self._levels()
        for line in LINES:
            self._lines[line] = wanted[line]
            self._set_line(line, wanted[line])
        self._reminder.renew(self._next_event())

    # Accesses.

    def read(self, offset: int, size: int) -> int:
        shift = offset & 7
        value = self._read_register(offset - shift)
        if shift + size > 8:
            value |= self._read_register(offset - shift + 8) << 64
        return value >> 8 * shift & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Accesses must be aligned and of 32 or 64 bits (2.3.1); others are ignored."""
        if size not in (4, 8) or offset % size:
            return
        shift = 8 * (offset & 4)
        self._settle()
        self._write_register(offset & ~7, value << shift, (1 << 8 * size) - 1 << shift)
        self._update()

    def _read_register(self, offset: int) -> int:
        if offset == COUNTER:
            return self._counter(self._clock.now())
        state = self.state
        match offset:
            case 0x000:
                return self._capabilities
            case 0x010:
                return state.config
            case 0x020:
                self._update()
                return state.status
        number, register = divmod(offset - TIMER_BASE, TIMER_STRIDE)
        if 0 <= number < TIMERS:
            if register == TIMER_CONFIG:
                return state.timers[number].config & ~VALUE_SET | _FIXED
            if register == TIMER_COMPARATOR:
                self._update()
                return state.timers[number].comparator
        return 0

    def _write_register(self, offset: int, value: int, mask: int) -> None:
        """Write the bits of `mask`."""
        state = self.state
        match offset:
            case 0x010:
                self._configure((state.config & ~mask | value) & (ENABLE | LEGACY))
            case 0x020:
                state.status &= ~value
            case 0x0F0:
                now = self._clock.now()
                state.counter, state.since = self._counter(now) & ~mask | value, now
                self._rematch()
            case _:
                number, register = divmod(offset - TIMER_BASE, TIMER_STRIDE)
                if 0 <= number < TIMERS and register == TIMER_CONFIG:
                    self._configure_timer(number, value, mask)
                elif 0 <= number < TIMERS and register == TIMER_COMPARATOR:
                    self._set_comparator(state.timers[number], value, mask)

    def _configure(self, config: int) -> None:
        """The general configuration register."""
        state = self.state
        changed = config ^ state.config
        if changed & ENABLE:
            now = self._clock.now()
            state.counter, state.since = self._counter(now), now
        state.config = config
        for number, timer in enumerate(state.timers):
            if changed & ENABLE or (changed & LEGACY and number < 2):
                timer.high = False
        if changed & ENABLE:
            self._rematch()

    def _configure_timer(self, number: int, value: int, mask: int) -> None:
        timer = self.state.timers[number]
        config = (timer.config & ~mask | value) & _WRITABLE
        if config >> _ROUTE_SHIFT & 0x1F not in ROUTES:
            # "If the value is not supported, the value read back will not match" (2.3.8).
            config = config & ~_ROUTE | timer.config & _ROUTE
        changed = config ^ timer.config
        timer.config = config
        if changed & ~VALUE_SET:
            timer.high = False
        if changed & MODE32:
            self._match_anew(timer)

    def _set_comparator(self, timer: TimerState, value: int, mask: int) -> None:
        """In periodic mode: of the next match if VALUE_SET is 1, else of the period alone (2.3.8).

        VALUE_SET clears itself; software that writes two halves sets it before each.
        """
        periodic = timer.config & PERIODIC
        if periodic:
            timer.period = timer.period & ~mask | value
        if not periodic or timer.config & VALUE_SET:
            timer.comparator = timer.comparator & ~mask | value
            self._match_anew(timer)
        timer.config &= ~VALUE_SET

    # Time.

    def _counter(self, now: int) -> int:
        state = self.state
        if not state.config & ENABLE:
            return state.counter
        return state.counter + (now - state.since) // self._period_ns & _ALL

    def _rematch(self) -> None:
        for timer in self.state.timers:
            self._match_anew(timer)

    def _match_anew(self, timer: TimerState) -> None:
        """Find the next time at which the counter equals the comparator, after now."""
        state = self.state
        if not state.config & ENABLE:
            timer.match = None
            return
        elapsed = (self._clock.now() - state.since) // self._period_ns
        counter = state.counter + elapsed
        wait = (timer.comparator - counter - 1 & timer.mask) + 1
        self._schedule(timer, state.since + (elapsed + wait) * self._period_ns)

    def _schedule(self, timer: TimerState, match: int) -> None:
        timer.match = match if match < FOREVER else None

    def _settle(self) -> None:
        """Let the matches happen that are due."""
        now = self._clock.now()
        for number, timer in enumerate(self.state.timers):
            if timer.match is not None and timer.match <= now:
                self._advance(timer, timer.match, now)
                self._fire(number, timer)

    def _advance(self, timer: TimerState, match: int, now: int) -> None:
        """On to the first match after `now`."""
        period = timer.period & timer.mask if timer.config & PERIODIC else 0
        step = (period or timer.mask + 1) * self._period_ns
        times = (now - match) // step + 1
        if period:
            timer.comparator = timer.comparator + times * period & timer.mask
        self._schedule(timer, match + times * step)

    # Interrupts.

    def _fire(self, number: int, timer: TimerState) -> None:
        if timer.config & LEVEL:
            self.state.status |= 1 << number
            self._drive()
        elif timer.config & INT_ENABLE:
            timer.high = False
            self._drive()
            timer.high = True
            timer.rang = self._clock.now()
            self._drive()

    def _levels(self) -> dict[int, bool]:
        state = self.state
        levels = dict.fromkeys(LINES, False)
        if not self.legacy:
            levels[PIT_LINE], levels[RTC_LINE] = state.inputs
        if not state.config & ENABLE:
            return levels
        for number, timer in enumerate(state.timers):
            if timer.config & INT_ENABLE:
                asked = state.status >> number & 1 if timer.config & LEVEL else timer.high
                if asked:
                    levels[self._line_of(number, timer)] = True
        return levels

    def _line_of(self, number: int, timer: TimerState) -> int:
        if self.legacy and number < 2:
            return RTC_LINE if number else PIT_LINE
        return timer.route

    def _drive(self) -> None:
        lines = self._lines
        for line, level in self._levels().items():
            if lines[line] != level:
                lines[line] = level
                self._set_line(line, level)

    def _update(self) -> None:
        self._settle()
        self._drive()
        self._reminder.plan(self._next_event())

    def _next_event(self) -> int | None:
        state = self.state
        events = []
        for number, timer in enumerate(state.timers):
            if timer.match is None or not timer.config & INT_ENABLE:
                continue
            if timer.config & LEVEL:
                if not state.status >> number & 1:
                    events.append(timer.match)
            elif timer.config & PERIODIC:
                events.append(max(timer.match, timer.rang + MIN_INTERVAL))
            else:
                events.append(timer.match)
        return min(events, default=None)
