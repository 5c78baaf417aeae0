"""A descriptor that becomes readable at a moment (timerfd_create(2)).

Python itself has it from 3.13 on.
"""

from __future__ import annotations

import ctypes
import os
from time import CLOCK_MONOTONIC

_ABSOLUTE = 1
"""TFD_TIMER_ABSTIME; Linux, include/linux/timerfd.h, as the flags below."""
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_LATEST = float(1 << 32)
_NS = 1_000_000_000

# PyDLL: the calls are so short that letting go of the interpreter lock costs more.
_libc = ctypes.PyDLL(None, use_errno=True)
_settime = _libc.timerfd_settime
_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class TimerFd:
    """One timer; `fd` is readable once it is due, until the next `set`.

    Raises:
        OSError: the host has no more descriptors.
    """

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(CLOCK_MONOTONIC, _FLAGS)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "no timer")
        self._value = (ctypes.c_int64 * 4)()  # the interval and the moment: seconds, nanoseconds
        self._address = ctypes.addressof(self._value)

    def set(self, when: float) -> None:
        """Be due at `when` (`time.monotonic`), at once if that is past; never for infinity."""
        value = self._value
        if when > _LATEST:
            value[2] = value[3] = 0
        else:
            # Rounded up, so that the moment has come by any clock; 0 would mean never.
            value[2], value[3] = divmod(int(max(0.0, when) * _NS) + 1, _NS)
        _settime(self.fd, _ABSOLUTE, self._address, None)

    def close(self) -> None:
        os.close(self.fd)
