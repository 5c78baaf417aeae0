"""What a child tells the machine, and what may be said of a process that ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Protocol

import msgspec

from devices.errors import DeviceFailure


class ProxyEvents(Protocol):
    """The machine's side of upcalls.

    Called on the thread that drives the proxy, in the order in which the child spoke, also in the
    middle of an access. So none of these may ask the same proxy for anything, nor raise.
    """

    def irq(self, name: str, pin: int, level: bool) -> None: ...

    def msi(self, name: str, address: int, data: int) -> None: ...

    def wrote_pages(self, name: str, runs: Sequence[tuple[int, int]]) -> None:
        """It wrote pages of guest memory: runs of them, (number of the first, how many)."""

    def want_turn(self, name: str) -> None:
        """The device asks for a turn: see `ProxyDevice.sync`."""

    def output(self, name: str, data: bytes) -> None: ...

    def input_wanted(self, name: str) -> None: ...

    def exit_request(self, name: str, value: int) -> None: ...

    def log(self, name: str, text: str) -> None: ...

    def failed(self, failure: DeviceFailure) -> None:
        """Told once for each proxy that fails; `failure.device` is its name."""


class Obituary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device process ended.

    Attributes:
        name: the device's configured name.
        pid: its process, as the machine numbers processes.
        status: the exit status, or None if a signal ended it.
        signal: the signal's number, or None.
        syscall: the name of the forbidden system call that it was killed for, or None.
    """

    name: str
    pid: int
    status: int | None = None
    signal: int | None = None
    syscall: str | None = None

    def text(self) -> str:
        """One line without the name."""
        if self.syscall is not None:
            return f"made the forbidden system call '{self.syscall}' and was killed"
        if self.signal is not None:
            try:
                return f"was killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"was killed by signal {self.signal}"
        return f"exited with status {self.status}"
