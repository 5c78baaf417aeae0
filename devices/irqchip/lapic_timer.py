"""The local APIC's timer (SDM volume 3A, 10.5.4): a down-counter, or a deadline of the TSC.

Rules:
- The counter's input runs at 1 GHz, before the divider; the TSC counts nanoseconds of guest time.
- One moment is the whole state of a running timer: when it is due. The count follows from it.
- A period that is over before anybody looked is lost: its interrupt would merge with the next.
  For the same reason a periodic timer rings at most every `SHORTEST_PERIOD`; the count is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from devices.clock import Alarm, Clock
from devices.contract import U32
from devices.irqchip.apic_registers import U4, U63, TimerMode

SHORTEST_PERIOD = 10_000
"""Nanoseconds between two rings of a periodic timer, at least: a guest must not busy the host."""
LATEST = (1 << 63) - 1
_DIVIDE_BITS = 0b1011


@dataclass
class TimerState:
    """The timer, but for its LVT entry.

    Attributes:
        divide: the divide configuration register.
        initial: the initial count.
        due: guest time, in nanoseconds, of the next interrupt; 0: the timer does not run.
    """

    divide: U4 = 0
    initial: U32 = 0
    due: U63 = 0

    def __post_init__(self) -> None:
        if self.divide & ~_DIVIDE_BITS:
            raise ValueError("bit 2 of the divide configuration register is reserved")

    def check(self, mode: int) -> None:
        """Refuse what cannot be in this mode.

        Raises:
            ValueError: a count in TSC-deadline mode, or a counter that runs from nothing.
        """
        if mode == TimerMode.TSC_DEADLINE:
            if self.initial:
                raise ValueError("there is no initial count in TSC-deadline mode")
        elif self.due and not self.initial:
            raise ValueError("a timer without an initial count does not run")

    def divisor(self) -> int:
        """Nanoseconds per count (figure 10-10)."""
        code = self.divide & 3 | (self.divide & 8) >> 1
        return 1 if code == 7 else 2 << code


class ApicTimer:
    """The timer of one local APIC.

    Args:
        expired: called for each interrupt; whether it is masked is the LVT's business.
    """

    def __init__(self, clock: Clock, state: TimerState, expired: Callable[[], None]) -> None:
        self.state = state
        self.mode: int = TimerMode.ONE_SHOT
        self._clock = clock
        self._expired = expired
        self._alarm: Alarm | None = None

    def take_up(self, state: TimerState, mode: int) -> None:
        """Go on from this state: after a restore, or after a reset."""
        self.state = state
        self.mode = mode
        self._plan()

    def set_mode(self, mode: int) -> None:
        """Bits 18:17 of the LVT entry; going to or from TSC-deadline stops the timer (10.5.4.1)."""
        if mode == self.mode:
            return
        if TimerMode.TSC_DEADLINE in (mode, self.mode):
            self.state.initial = 0
            self._start(0)
        self.mode = mode

    def write_initial(self, value: int) -> None:
        """Load the counter and start it; 0 stops it. No effect in TSC-deadline mode."""
        if self.mode == TimerMode.TSC_DEADLINE:
            return
        state = self.state
        state.initial = value
        self._start(self._clock.now() + value * state.divisor() if value else 0)

    def write_divide(self, value: int) -> None:
        """Change how fast a count passes; a running counter goes on from where it is."""
        state = self.state
        count = self.current()
        state.divide = value & _DIVIDE_BITS
        if count:
            self._start(self._clock.now() + count * state.divisor())

    def current(self) -> int:
        """The current count; 0 if the timer does not run, and always in TSC-deadline mode."""
        state = self.state
        if not state.due or self.mode == TimerMode.TSC_DEADLINE:
            return 0
        divisor = state.divisor()
        count = -((self._clock.now() - state.due) // divisor)
        if self.mode == TimerMode.PERIODIC:
            return (count - 1) % state.initial + 1
        return min(max(count, 0), state.initial)

    def write_deadline(self, when: int) -> None:
        """IA32_TSC_DEADLINE: due at this TSC value, soon if it is past; 0 disarms (10.5.4.1).

        No effect in the other modes.
        """
        if self.mode == TimerMode.TSC_DEADLINE:
            self._start(min(when, LATEST))

    def deadline(self) -> int:
        """What IA32_TSC_DEADLINE reads: 0 once it was due, and in the other modes."""
        return self.state.due if self.mode == TimerMode.TSC_DEADLINE else 0

    def _start(self, due: int) -> None:
        self.state.due = due
        self._plan()

    def _plan(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        due = self.state.due
        self._alarm = self._clock.call_at(due, self._rang) if due else None

    def _rang(self) -> None:
        state = self.state
        self._alarm = None
        if self.mode == TimerMode.PERIODIC:
            period = state.initial * state.divisor()
            behind = self._clock.now() + SHORTEST_PERIOD - state.due
            self._start(state.due + period * max(1, -(-behind // period)))
        else:
            state.due = 0
        self._expired()
