"""Ctrl-C, and requests to terminate, while a guest runs.

Python runs signal handlers only between its own instructions, and the vCPU thread can spend hours
inside the engine; and a KeyboardInterrupt inside an engine callback would tear an access apart. So
while a machine runs, SIGINT, SIGTERM and SIGHUP only leave a note and wake the loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from vmm.events import EventLoop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_early: list[int] = []
"""What came inside `early_signals`."""


class EarlyInterrupt(KeyboardInterrupt):
    """What `early_signals` raises.

    Not KeyboardInterrupt itself: when that passes through the evaluation of a string (as the
    making of a dataclass does), Python ends by SIGINT even if it is caught later.
    """


@contextlib.contextmanager
def early_signals() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does, and none gets lost.

    In the middle of a callback from C an exception goes nowhere; then `noted_signals` hears of it
    later, and any other exception that is a consequence becomes a KeyboardInterrupt here. Signals
    that are ignored, or that somebody else has a handler for, are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        _early.append(number)
        raise EarlyInterrupt

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            old_hook(what)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    previous = {n: old for n in _SIGNALS if (old := signal.getsignal(n)) in usual}
    old_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    except Exception:
        if _early:
            raise EarlyInterrupt from None
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
        sys.unraisablehook = old_hook
        _early.clear()


@contextlib.contextmanager
def noted_signals(events: EventLoop, noted: Callable[[int], None]) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGHUP call `noted` with their number; elsewhere than on
    the main thread, where Python has no say in signals, nothing changes. A SIGHUP that is ignored
    (nohup) stays so."""
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
        for number in _SIGNALS:
            old = signal.getsignal(number)
            # A handler that somebody else installed from C cannot be put back: leave it alone.
            if old is not None and (number, old) != (signal.SIGHUP, signal.SIG_IGN):
                previous[number] = signal.signal(number, handler)
        if _early:
            noted(_early[-1])
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(old_wakeup)
        events.remove(reader)
        os.close(reader)
        os.close(writer)
