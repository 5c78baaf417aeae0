"""Waiting: descriptors and timers, all handled on the vCPU thread.

One epoll instance holds every descriptor that the machine listens to. Between slices of guest
execution the vCPU thread polls it; while the guest runs, a watcher thread waits on the epoll
descriptor itself (which is readable when anything in it is) and only kicks the CPU. So no callback
ever runs on another thread, and there are no locks in device or machine code.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
from collections.abc import Callable
from time import monotonic

Callback = Callable[[], None]


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
    """

    def __init__(self, kick: Callback) -> None:
        self._kick = kick
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._armed = threading.Event()
        self._watching = False
        self._closed = False
        self._thread: threading.Thread | None = None

    # Descriptors and timers.

    def add(self, fd: int, callback: Callback) -> None:
        """Call `callback` on the vCPU thread whenever `fd` is readable or its peer is gone.

        Raises:
            PermissionError: this kind of descriptor (a regular file) cannot be waited for.
        """
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Forget `fd`; harmless if it is not there."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Call `callback` on the vCPU thread at `when` (`time.monotonic` seconds)."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        self.interrupt()
        return timer

    def interrupt(self) -> None:
        """Make a `poll` that waits return, and a running guest come back; from any thread."""
        os.eventfd_write(self._wake, 1)

    # The vCPU thread's side.

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Run what is due; wait up to `timeout` seconds (None: until something is).

        Returns whether anything was handled.
        """
        due = self._next_due()
        if due is not None:
            left = max(due - monotonic(), 0.0)
            timeout = left if timeout is None else min(timeout, left)
        handled = False
        for fd, _ in self._epoll.poll(timeout):
            if fd == self._wake:
                self._clear_wake()
                handled = True
                continue
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()
                handled = True
        return self._run_timers() or handled

    def watch(self) -> None:
        """From now on, until something happens, the watcher kicks the CPU when it does."""
        if self._watching:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watcher, name="vmm-watcher", daemon=True)
            self._thread.start()
        self._watching = True
        self._armed.set()

    def close(self) -> None:
        """End the watcher and release the descriptors; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self.interrupt()
        self._armed.set()
        if self._thread is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def _next_due(self) -> float | None:
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def _run_timers(self) -> bool:
        ran = False
        while (due := self._next_due()) is not None and due <= monotonic():
            heapq.heappop(self._timers)[2].callback()
            ran = True
        return ran

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _watcher(self) -> None:
        waiter = select.poll()
        waiter.register(self._epoll.fileno(), select.POLLIN)
        while True:
            self._armed.wait()
            self._armed.clear()
            if self._closed:
                return
            due = self._next_due_for_watcher()
            waiter.poll(None if due is None else max(due - monotonic(), 0.0) * 1000 + 1)
            self._watching = False
            if self._closed:
                return
            self._kick()

    def _next_due_for_watcher(self) -> float | None:
        # Read without popping: the vCPU thread owns the heap. `call_at` interrupts, so a timer
        # that is added later than this look is not missed.
        try:
            return self._timers[0][0]
        except IndexError:
            return None
