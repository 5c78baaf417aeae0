"""System control port A, 0x92: the fast A20 gate and the fast CPU reset.

Bit 0 resets the CPU when it goes from 0 to 1, bit 1 is the A20 gate, the others are kept for the
guest (IBM PS/2 Hardware Interface Technical Reference, "System Control Port A").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from devices.bus import BusType
from devices.contract import U8, Device, DeviceHost, Region
from devices.platform.a20 import A20Gate

RESET = 1 << 0
A20 = 1 << 1


@dataclass
class Port92State:
    """The gate, and the register without the gate's bit."""

    kept: U8 = 0
    a20: bool = True

    def __post_init__(self) -> None:
        if self.kept & A20:
            raise ValueError("the kept bits contain that of the A20 gate")


class Port92(Device):
    """Owns the level of the A20 gate in snapshots.

    Args:
        gate: shared with the keyboard controller.
        reset: called when the guest resets the CPU.
    """

    model: ClassVar[str] = "port92"
    summary: ClassVar[str] = "system control port A: fast A20 and reset"
    State = Port92State
    state: Port92State

    def __init__(
        self,
        host: DeviceHost,
        options: Any = None,
        *,
        gate: A20Gate | None = None,
        reset: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(host, options)
        self.gate = gate or A20Gate()
        self._reset = reset

    def regions(self) -> tuple[Region, ...]:
        return (Region("control", BusType.PIO, 1, start=0x92),)

    def read(self, offset: int, size: int) -> int:
        return self.state.kept | (A20 if self.gate.open else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        rises = value & ~self.state.kept & RESET
        self.state.kept = value & ~A20
        self.gate.set(bool(value & A20))
        if rises and self._reset is not None:
            self._reset()

    def snapshot(self) -> Any:
        self.state.a20 = self.gate.open
        return super().snapshot()

    def restored(self) -> None:
        self.gate.load(self.state.a20)
