"""Why the vCPU stopped."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class StopReason(enum.Enum):
    """Why `Cpu.run` came back."""

    BUDGET = "budget"
    """The budget is spent, or `Cpu.kick` was called."""
    HALT = "halt"
    """HLT; nothing runs until `Cpu.inject`."""
    SHUTDOWN = "shutdown"
    """Triple fault; only `Cpu.set_state` helps."""
    REQUESTED = "requested"
    """`Cpu.stop_now` was called. `Cpu.halted` may be set as well."""
    ERROR = "error"
    """The engine did what it should never do."""


@dataclass(frozen=True, slots=True)
class Stop:
    """`detail` is one line for people, mostly empty."""

    reason: StopReason
    detail: str = ""
