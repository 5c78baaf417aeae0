"""How a run ends, and what exit status the command gives for it.

The guest's own exit codes are the odd statuses (as with QEMU's isa-debug-exit: ``value << 1 | 1``),
so everything that the machine itself has to say is even.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from typing import Any


class Ending(enum.StrEnum):
    """Why `Machine.run` came back."""

    HALTED = "halted"
    """The guest executed HLT with interrupts off: it is finished."""
    POWERED_OFF = "powered-off"
    """The guest switched itself off by ACPI."""
    RESET = "reset"
    """The guest asked for a reset (keyboard controller, port 0x92 or 0xCF9, INIT)."""
    GUEST_EXIT = "guest-exit"
    """The guest wrote to the debug-exit port."""
    PANICKED = "panicked"
    """The guest's kernel said by pvpanic that it gave up."""
    CRASHED = "crashed"
    """Triple fault, or something that the CPU cannot go on from."""
    DEVICE_FAILED = "device-failed"
    """A device process died, hung or broke the protocol, and the policy is to stop."""
    TIMEOUT = "timeout"
    """The run's own time-out."""
    QUIT = "quit"
    """The user asked for the end (escape menu, end of `--snapshot-at`)."""
    INTERRUPTED = "interrupted"
    """Ctrl-C, or a request to terminate (SIGTERM)."""
    PAUSED = "paused"
    """`run` was told to come back here (output seen, time passed); the guest can go on."""


class ExitStatus(enum.IntEnum):
    """Statuses of the command that are not the guest's own; all even."""

    OK = 0
    USAGE = 2
    CRASH = 4
    DEVICE = 6
    TIMEOUT = 8
    JAIL = 10
    RESET = 12
    PANIC = 14
    INTERRUPTED = 130


_STATUS = {
    Ending.HALTED: ExitStatus.OK,
    Ending.POWERED_OFF: ExitStatus.OK,
    Ending.RESET: ExitStatus.RESET,
    Ending.PANICKED: ExitStatus.PANIC,
    Ending.CRASHED: ExitStatus.CRASH,
    Ending.DEVICE_FAILED: ExitStatus.DEVICE,
    Ending.TIMEOUT: ExitStatus.TIMEOUT,
    Ending.QUIT: ExitStatus.OK,
    Ending.INTERRUPTED: ExitStatus.INTERRUPTED,
    Ending.PAUSED: ExitStatus.OK,
}


ENDS_THE_RUN = {"debug-exit": Ending.GUEST_EXIT, "pvpanic": Ending.PANICKED}
"""Models that are there to end the run, and how it ended when they did."""

_PANIC = re.compile(rb"(?<!end )Kernel panic - not syncing: ([^\r\n]*)")
_PANIC_REACH = 64 << 10
"""Bytes at the end of the console's output in which Linux's last words are looked for."""
_PANIC_ENDS = frozenset(
    (Ending.PANICKED, Ending.RESET, Ending.CRASHED, Ending.TIMEOUT, Ending.HALTED)
)


@dataclass(frozen=True)
class Outcome:
    """What `Machine.run` came back with.

    Attributes:
        ending: why.
        detail: one line for people; "" if there is nothing to add.
        guest_value: what the guest wrote to the debug-exit port.
        device: the name of the device that failed.
        report: a crash report of several lines, or "".
    """

    ending: Ending
    detail: str = ""
    guest_value: int | None = None
    device: str | None = None
    report: str = ""

    @property
    def status(self) -> int:
        """The exit status of the command for this outcome, 0..255."""
        if self.guest_value is not None:
            return (self.guest_value << 1 | 1) & 0xFF
        return _STATUS[self.ending]

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "ending": str(self.ending),
            "status": int(self.status),
            "detail": self.detail,
            "guest_value": self.guest_value,
            "device": self.device,
        }

    def with_panic(self, output: bytearray) -> Outcome:
        """Say it if what looks like an ordinary end is that of a kernel that gave up.

        Args:
            output: what the console has printed.
        """
        if self.ending not in _PANIC_ENDS:
            return self
        found = _PANIC.findall(output[-_PANIC_REACH:])
        if not found:
            return self
        said = f"kernel panic: {found[-1].decode('utf-8', 'replace').strip()}"
        return replace(self, detail=f"{self.detail}; {said}" if self.detail else said)
