"""The machine's clocks: guest time that follows the host, or the code that the guest executes.

Both are a `devices.clock.Clock` for the device models and a `MachineClock` for the vCPU loop, which
asks them when the next alarm is due and lets it ring between two slices of guest code.

Rules:
- Alarms ring in the order of their times, those of the same nanosecond in the order in which they
  were planned. An alarm that is planned while others ring waits for the next round, so a device
  that always plans "now" cannot hold the machine.
- Guest time is all there is to save: alarms are planned anew by the devices (`Device.restored`),
  so time must be set before they are restored.
- Virtual time is a function of what the guest did and nothing else. It moves with the bytes of
  executed code, and while the guest is halted it jumps to the next alarm.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Annotated, Protocol

import msgspec

from devices.clock import NS, Alarm, Clock
from vmm.events import FAR

NS_PER_BYTE = 1
"""Virtual nanoseconds that a byte of executed code takes: about the speed of the engine."""
NO_ALARM_BUDGET = 1 << 32
"""Bytes of code to run while no alarm is planned."""
PATIENCE = 500_000
"""Nanoseconds by which an alarm is late before guest time waits for it."""
CATCH_UP = 2
"""Guest time that lags passes so many times as fast as the host's."""
LONGEST_LAG = NS
"""Nanoseconds that guest time lags behind, at most."""
NEVER = 1 << 63
END = 1 << 61
"""Guest time that nobody lives to see: 73 years."""
_COMPACT = 64


@dataclass
class ClockState:
    """What a snapshot keeps of a clock: guest time in nanoseconds."""

    now: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0


class MachineClock(Clock, Protocol):
    """What the machine asks of its clock, whichever it is."""

    def next_alarm(self) -> int | None:
        """Guest time of the earliest alarm; None: there is none."""
        ...

    def host_due(self) -> float:
        """Host time (`time.monotonic`) of the next alarm, or `FAR`: for `EventLoop.guest_due`."""
        ...

    def run_due(self) -> bool:
        """Let the alarms ring that are due; whether there were any."""
        ...

    def budget_until_next(self) -> int:
        """Bytes of code that the guest may run before an alarm must be looked for, at least 1."""
        ...

    def skip_to_next(self) -> bool:
        """The guest is halted: jump to the next alarm; False: wait for it (or for ever)."""
        ...

    def pause(self) -> None:
        """Time stands still until `resume`; harmless when repeated."""
        ...

    def resume(self) -> None:
        """Time passes again; harmless when repeated."""
        ...

    def start_at(self, now: int) -> None:
        """Go on from this guest time. Before devices are restored, and paused."""
        ...

    def snapshot(self) -> ClockState: ...


class AlarmHeap:
    """Pending alarms, earliest first; of equal times the one that was planned first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Alarm]] = []
        self._order = itertools.count()
        self._limit = _COMPACT

    def add(self, when: int, callback: Callable[[], None]) -> Alarm:
        """Plan a call."""
        alarm = Alarm(when, callback)
        heapq.heappush(self._heap, (when, next(self._order), alarm))
        if len(self._heap) > self._limit:
            # A guest that keeps reprogramming a timer leaves cancelled alarms behind.
            self._heap = [entry for entry in self._heap if not entry[2].cancelled]
            heapq.heapify(self._heap)
            self._limit = max(_COMPACT, 2 * len(self._heap))
        return alarm

    def next(self) -> int | None:
        """When the earliest is due; None: there is none."""
        heap = self._heap
        while heap and heap[0][2].cancelled:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run(self, now: int) -> bool:
        """Let those ring that are due by `now` and were planned before this call."""
        end = next(self._order)
        heap, later, ran = self._heap, [], False
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)
            if entry[2].cancelled:
                continue
            if entry[1] > end:
                later.append(entry)
                continue
            ran = True
            entry[2].callback()
            heap = self._heap  # planning may have made a new one
        for entry in later:
            heapq.heappush(self._heap, entry)
        return ran

    def __len__(self) -> int:
        return len(self._heap)


class RealClock:
    """Guest time follows the host's monotonic clock while the machine runs.

    It is made paused, at guest time 0.

    The host may be too busy to let an alarm ring in time, and a guest that saw its clock run on
    would miss the interrupts that belong to that time: Linux gives up a timer that ticks less than
    five times in 160 ms, and a time-stamp counter that disagrees with others. So guest time waits:
    nobody sees it pass an alarm by more than `PATIENCE` before that has rung. Then it lags behind
    the host, and passes `CATCH_UP` times as fast until it does no more. What a host that stood
    still for longer than `LONGEST_LAG` took beyond that is skipped.

    Args:
        replanned: called when `host_due` has become earlier (`EventLoop.replanned`).
        overdue: called when somebody would see time pass an alarm: it is late to let it ring.
        host_ns: the host's clock, in nanoseconds.
    """

    def __init__(
        self,
        replanned: Callable[[], None],
        overdue: Callable[[], None] = lambda: None,
        host_ns: Callable[[], int] = monotonic_ns,
    ) -> None:
        self._replanned = replanned
        self._overdue = overdue
        self._host_ns = host_ns
        self._alarms = AlarmHeap()
        self._offset: int | None = None
        """Guest time less host time, when it does not lag; None while paused."""
        self._lags_since: tuple[int, int] | None = None
        """Host and guest time from which on it catches up."""
        self._plain_until = 0
        """Up to here guest time is host time and the offset, nothing else."""
        self._reached = 0
        """Guest time never goes back behind this, also not to wait for an alarm of the past."""
        self._stopped_at = 0
        self._host_due = FAR

    def now(self) -> int:
        offset = self._offset
        if offset is None:
            return self._stopped_at
        now = self._host_ns() + offset
        return now if now <= self._plain_until else self._held_back(now - offset, offset)

    def _held_back(self, host: int, offset: int) -> int:
        now = self._catching_up(host, offset)
        due = self._alarms.next()
        if due is None or now <= due + PATIENCE:
            if now == host + offset:
                self._lags_since = None
            self._look_ahead()
            return now
        self._overdue()
        return self._patience_ends(due)

    def _patience_ends(self, due: int) -> int:
        """Up to when guest time passes while an alarm has not rung."""
        return max(due + PATIENCE, self._reached)

    def _catching_up(self, host: int, offset: int) -> int:
        now = host + offset
        if self._lags_since is not None:
            since_host, since_guest = self._lags_since
            now = min(now, since_guest + (host - since_host) * CATCH_UP)
        return now

    def call_at(self, when: int, callback: Callable[[], None]) -> Alarm:
        self._reached = max(self._reached, self.now())
        alarm = self._alarms.add(when, callback)
        if self._offset is not None:
            self._plain_until = min(self._plain_until, when + PATIENCE)
            due = self._host_time(when, self._offset)
            if due < self._host_due:
                self._host_due = due
                self._replanned()
        return alarm

    def next_alarm(self) -> int | None:
        return self._alarms.next()

    def host_due(self) -> float:
        """May be earlier than the next alarm, when that was cancelled. From any thread."""
        return self._host_due

    def run_due(self) -> bool:
        """Let the alarms ring that are due; none while paused."""
        offset = self._offset
        if offset is None:
            return False
        due = self._alarms.next()
        ran = False
        if due is not None:
            host = self._host_ns()
            now = min(self._catching_up(host, offset), self._patience_ends(due))
            if now >= due:
                lag = host + offset - now
                if lag > LONGEST_LAG:
                    now += lag - LONGEST_LAG
                self._reached = now
                self._lags_since = (host, now) if lag > 0 else None
                ran = self._alarms.run(now)
        self._look_ahead()
        return ran

    def budget_until_next(self) -> int:
        """No bound: the event loop kicks the CPU at `host_due`."""
        return NO_ALARM_BUDGET

    def skip_to_next(self) -> bool:
        return False

    def pause(self) -> None:
        """Time that it lags is lost, too."""
        if self._offset is not None:
            self._stopped_at = self.now()
            self._offset = self._lags_since = None
            self._look_ahead()

    def resume(self) -> None:
        if self._offset is None:
            self._offset = self._stopped_at - self._host_ns()
            self._look_ahead()
            self._replanned()

    def start_at(self, now: int) -> None:
        running = self._offset is not None
        self.pause()
        self._stopped_at = self._reached = now
        if running:
            self.resume()

    def snapshot(self) -> ClockState:
        return ClockState(self.now())

    def _host_time(self, when: int, offset: int) -> float:
        """When guest time is `when`, in seconds of the host."""
        host = when - offset
        if self._lags_since is not None:
            since_host, since_guest = self._lags_since
            host = max(host, since_host - (since_guest - when) // CATCH_UP)
        return host / NS

    def _look_ahead(self) -> None:
        due, offset = self._alarms.next(), self._offset
        if offset is None:
            self._host_due = FAR
            return
        self._host_due = FAR if due is None else self._host_time(due, offset)
        if self._lags_since is not None:
            self._plain_until = 0
        else:
            self._plain_until = NEVER if due is None else due + PATIENCE


class VirtualClock:
    """Guest time is the number of bytes executed, plus the idle time that was skipped.

    Args:
        executed: bytes of guest code executed so far, up to date inside device callbacks.
        replanned: called when an alarm was planned that is due before the budget given out last
            ends: the CPU must then come back at the next block. Never called between budgets.
    """

    def __init__(self, executed: Callable[[], int], replanned: Callable[[], None]) -> None:
        self._executed = executed
        self._replanned = replanned
        self._alarms = AlarmHeap()
        self._skipped = 0
        self._budget_ends: int | None = None
        """Guest time at which the running slice ends by itself."""

    @property
    def skipped(self) -> int:
        """Nanoseconds that did not come from executed code; part of `now`."""
        return self._skipped

    def now(self) -> int:
        return self._executed() * NS_PER_BYTE + self._skipped

    def call_at(self, when: int, callback: Callable[[], None]) -> Alarm:
        alarm = self._alarms.add(when, callback)
        if self._budget_ends is not None and when < self._budget_ends:
            self._budget_ends = when
            self._replanned()
        return alarm

    def next_alarm(self) -> int | None:
        return self._alarms.next()

    def host_due(self) -> float:
        """Never: host time means nothing here."""
        return FAR

    def run_due(self) -> bool:
        """Let the alarms ring that are due. Also ends the slice that `budget_until_next` began."""
        self._budget_ends = None
        due = self._alarms.next()
        if due is None:
            return False
        now = self.now()
        return due <= now and self._alarms.run(now)

    def budget_until_next(self) -> int:
        now = self.now()
        due = self._alarms.next()
        budget = NO_ALARM_BUDGET if due is None else max(-((now - due) // NS_PER_BYTE), 1)
        budget = min(budget, NO_ALARM_BUDGET)
        self._budget_ends = now + budget * NS_PER_BYTE
        return budget

    def skip_to(self, when: int) -> None:
        """Let the idle time until `when` be over; a past time changes nothing."""
        self._skipped += max(when - self.now(), 0)

    def skip_to_next(self) -> bool:
        due = self._alarms.next()
        if due is None or due >= END:
            return False
        self.skip_to(due)
        return True

    def pause(self) -> None:
        """Nothing to do: time passes with executed code only."""

    def resume(self) -> None:
        """Nothing to do."""

    def start_at(self, now: int) -> None:
        """Go on from this guest time; the count of executed bytes must be set by now."""
        self._skipped = now - self._executed() * NS_PER_BYTE
        self._budget_ends = None

    def snapshot(self) -> ClockState:
        return ClockState(self.now())
