"""Guest time, as device models see it.

There is one clock under everything: TSC, PIT, local APIC timer, RTC, HPET and PM timer all derive
from `Clock.now`, so that a guest which calibrates one against another finds them in step. Models
never ask the host for the time. Whether guest time follows the host's or the executed code is the
machine's choice, and no model can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

NS = 1_000_000_000
"""Nanoseconds in a second."""


class Alarm:
    """One pending call of a clock; `cancel` it if it is not wanted any more.

    Attributes:
        when: guest time in nanoseconds.
        callback: called once, on the vCPU thread, between two instructions, at or after `when`.
    """

    __slots__ = ("callback", "cancelled", "when")

    def __init__(self, when: int, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock(Protocol):
    """The machine's clock.

    An alarm is not state: after a restore each model plans its alarms anew from its own state, in
    `Device.restored`, when `now` says the saved time already.
    """

    def now(self) -> int:
        """Nanoseconds of guest time since the machine was started; never goes back."""
        ...

    def call_at(self, when: int, callback: Callable[[], None]) -> Alarm:
        """Call `callback` once guest time has reached `when`; a past time means soon."""
        ...
