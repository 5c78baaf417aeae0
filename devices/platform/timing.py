"""What the platform's timers share: exact tick arithmetic and one alarm for each device.

A count is never ticked, only derived from guest time when somebody looks; alarms are planned for
nothing but interrupts that the guest asked for.

Rules:
- A tick number is `floor(now * rate / 1e9)` in integers. A period therefore never drifts, however
  long the machine runs and however late an alarm rings.
- A late alarm rings once for all the edges that it missed, as an interrupt controller that was not
  served in time would have seen them.
- A periodic interrupt is repeated no sooner than `MIN_INTERVAL` after the last one. A guest may
  program a period of one tick, more than a million interrupts a second; it gets fewer, each on a
  true edge of the timer, and the machine stays responsive. Counts that it reads are not changed.
- When an interrupt is due is part of a device's state, so that one which is overdue at a snapshot
  is not lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from devices.clock import NS, Alarm, Clock

MIN_INTERVAL = 100_000
"""Nanoseconds between two interrupts of one periodic timer, at least."""

FOREVER = 1 << 62
"""No guest time is as late (146 years); what would happen later never does."""

Nanoseconds = Annotated[int, msgspec.Meta(ge=-FOREVER, lt=FOREVER)]
"""A guest time or a difference of two, in a saved state."""
Ticks = Annotated[int, msgspec.Meta(ge=-FOREVER, lt=FOREVER)]
"""A number of ticks, in a saved state."""


class Oscillator:
    """A source of ticks that runs since guest time 0.

    Args:
        rate: ticks a second, 1..10^9.
    """

    __slots__ = ("rate",)

    def __init__(self, rate: int) -> None:
        self.rate = rate

    def ticks(self, now: int) -> int:
        """Ticks until guest time `now` (ns)."""
        return now * self.rate // NS

    def when(self, tick: int) -> int:
        """The first nanosecond at which `ticks` says `tick`."""
        return -(-tick * NS // self.rate)


class Reminder:
    """The one pending alarm of a device.

    Args:
        callback: called when it rings; by then no alarm is planned.
    """

    __slots__ = ("_alarm", "_callback", "_clock")

    def __init__(self, clock: Clock, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback = callback
        self._alarm: Alarm | None = None

    @property
    def when(self) -> int | None:
        """When it rings, in guest nanoseconds; None: not planned."""
        return None if self._alarm is None else self._alarm.when

    def plan(self, when: int | None) -> None:
        """Ring at `when` and not at the time planned before; None: not at all."""
        alarm = self._alarm
        if alarm is not None:
            if alarm.when == when:
                return
            alarm.cancel()
        if when is None or when >= FOREVER:
            self._alarm = None
        else:
            self._alarm = self._clock.call_at(when, self._ring)

    def renew(self, when: int | None) -> None:
        """Like `plan`, with a new alarm in any case: after a restore the old clock's are void."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self.plan(when)

    def _ring(self) -> None:
        self._alarm = None
        self._callback()
