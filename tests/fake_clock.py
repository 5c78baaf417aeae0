"""A clock that tests turn by hand."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from devices.clock import Alarm


class FakeClock:
    """Implements `devices.clock.Clock`; time stands still until `advance`."""

    def __init__(self, now: int = 0) -> None:
        self.time = now
        self._alarms: list[tuple[int, int, Alarm]] = []
        self._order = itertools.count()

    def now(self) -> int:
        return self.time

    def call_at(self, when: int, callback: Callable[[], None]) -> Alarm:
        alarm = Alarm(when, callback)
        heapq.heappush(self._alarms, (when, next(self._order), alarm))
        return alarm

    def pending(self) -> list[int]:
        """When the alarms are due that were not cancelled, in order."""
        return sorted(when for when, _, alarm in self._alarms if not alarm.cancelled)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass; alarms ring at their own time, in order."""
        end = self.time + nanoseconds
        while self._alarms and self._alarms[0][0] <= end:
            when, _, alarm = heapq.heappop(self._alarms)
            if not alarm.cancelled:
                self.time = max(self.time, when)
                alarm.callback()
        self.time = end
