"""Ctrl-C while a guest runs.

Python runs signal handlers only between its own instructions, and the vCPU thread can spend hours
inside the engine; and a KeyboardInterrupt inside an engine callback would tear an access apart. So
while a machine runs, SIGINT and SIGTERM only leave a note and wake the loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from vmm.events import EventLoop


@contextlib.contextmanager
def noted_signals(events: EventLoop, noted: Callable[[int], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call `noted` with their number; elsewhere than on the main
    thread, where Python has no say in signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def handler(number: int, _frame: FrameType | None) -> None:
        noted(number)

    def drain() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 64)

    previous = {}
    old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    events.add(reader, drain)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A handler that somebody else installed from C cannot be put back: leave it alone.
            if signal.getsignal(number) is not None:
                previous[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(old_wakeup)
        events.remove(reader)
        os.close(reader)
        os.close(writer)
