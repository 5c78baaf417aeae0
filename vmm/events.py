"""Waiting: descriptors and timers, all handled on the vCPU thread.

One epoll instance holds every descriptor that the machine listens to, and a timer of the kernel for
what is due next. Between slices of guest execution the vCPU thread polls it. While the guest runs,
a watcher thread waits for that instance to become readable, and only kicks the CPU. So no callback
ever runs on another thread, and there are no locks in device or machine code.

The watcher waits at an epoll instance of its own, which tells it once until it is armed again:
neither to arm it nor to plan a timer wakes it, for a guest does both thousands of times a second.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import threading
from collections.abc import Callable
from time import monotonic

from vmm.timerfd import TimerFd

Callback = Callable[[], None]
FAR = float("inf")
REPEAT = 1e-3
"""Seconds until a kick is repeated that was not heard, which is rare; epoll waits for no less."""
LONGEST = 3600.0
"""Seconds of one wait, at most: epoll refuses waits of more than 24 days."""


class Timer:
    """One pending call; `cancel` it if it is not wanted any more."""

    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class EventLoop:
    """Descriptors, timers and the watcher thread.

    Args:
        kick: called by the watcher thread to make the vCPU thread come back; must be thread-safe.
        unheard: whether the last kick must be repeated; also called by the watcher.

    Attributes:
        guest_due: when (`time.monotonic`) the guest's own next timer is due, `FAR` for never;
            handling it is up to the vCPU loop. Call `replanned` when it has changed.
    """

    def __init__(self, kick: Callback, unheard: Callable[[], bool] = lambda: False) -> None:
        self.guest_due: Callable[[], float] = lambda: FAR
        self._kick = kick
        self._unheard = unheard
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._alarm = TimerFd()
        self._epoll.register(self._alarm.fd, select.EPOLLIN)
        self._alarm_at = self._soon = FAR
        self._watch = select.epoll()
        self._watch.register(self._epoll.fileno(), 0)
        self._armed = False
        self._closed = False
        self._thread: threading.Thread | None = None

    # Descriptors and timers.

    def add(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Call `callback` on the vCPU thread whenever `fd` is readable or its peer is gone.

        Args:
            events: what to wait for instead, as `select.epoll` has it.

        Raises:
            PermissionError: this kind of descriptor (a regular file) cannot be waited for.
        """
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Forget `fd`; harmless if it is not there or closed already, or after `close`."""
        if self._callbacks.pop(fd, None) is not None and not self._closed:
            with contextlib.suppress(OSError):  # one that is closed has left by itself
                self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Call `callback` on the vCPU thread at `when` (`time.monotonic` seconds)."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        self.replanned()
        return timer

    def interrupt(self) -> None:
        """Make a `poll` that waits return, and a running guest come back; from any thread."""
        os.eventfd_write(self._wake, 1)

    def look_within(self, seconds: float) -> None:
        """Kick the CPU after so long, once; before the next `poll`."""
        self._soon = monotonic() + seconds

    def replanned(self) -> None:
        """A timer was planned: see that the watcher does not come too late for it."""
        if self._armed:
            due = self._next_due()
            if due < self._alarm_at:
                self._set_alarm(due)

    # The vCPU thread's side.

    def poll(self, timeout: float | None = 0.0, *, guest: bool = True) -> bool:
        """Run what is due; wait up to `timeout` seconds (None: until something is).

        May come back earlier with nothing handled; after an hour it does.

        Args:
            guest: come back when `guest_due` is reached, too.

        Returns whether anything was handled.
        """
        self._soon = FAR
        if timeout != 0.0:
            if self._armed:
                self._arm(False)  # one of us is enough
            timeout = LONGEST if timeout is None else min(timeout, LONGEST)
            self._set_alarm(self._next_due(guest))
        handled = False
        for fd, _ in self._epoll.poll(timeout):
            callback = self._callbacks.get(fd)
            if fd == self._alarm.fd:
                self._set_alarm(FAR)
                continue
            handled = True
            if fd == self._wake:
                _clear(fd)
            elif callback is not None:
                callback()
        return self._run_timers() or handled

    def watch(self) -> None:
        """From now on, until something happens, the watcher kicks the CPU when it does."""
        due = self._next_due()
        if due != self._alarm_at:
            self._set_alarm(due)
        if not self._armed:
            self._arm(True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watcher, name="vmm-watcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the watcher and release the descriptors; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self.interrupt()
        self._arm(True)
        if self._thread is not None:
            self._thread.join()
        self._armed = False  # nothing is planned any more
        self._watch.close()
        self._epoll.close()
        os.close(self._wake)
        self._alarm.close()

    def _arm(self, armed: bool) -> None:
        self._armed = armed
        events = select.EPOLLIN | select.EPOLLONESHOT if armed else 0
        self._watch.modify(self._epoll.fileno(), events)

    def _set_alarm(self, when: float) -> None:
        self._alarm_at = when
        self._alarm.set(when)

    def _next_due(self, with_guest: bool = True) -> float:
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        guest = min(self.guest_due(), self._soon) if with_guest else FAR
        return min(self._timers[0][0], guest) if self._timers else guest

    def _run_timers(self) -> bool:
        ran = False
        while self._timers and (self._timers[0][2].cancelled or self._timers[0][0] <= monotonic()):
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled:
                timer.callback()
                ran = True
        return ran

    def _watcher(self) -> None:
        while True:
            told = self._watch.poll(REPEAT if self._unheard() else None)
            if self._closed:
                return
            if told:
                self._armed = False  # for it does not tell again
            if told or self._unheard():
                self._kick()


def _clear(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
