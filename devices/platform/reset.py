"""The reset control register at port 0xCF9.

Bit 2 resets when it goes from 0 to 1; bits 1 and 3 choose what kind of reset and are kept (Intel
82371AB, 4.2.5.5 "Reset control register"; the ACPI tables name value 6). The port lies inside
CONFIG_ADDRESS of the PCI root, which claims it and hands on byte accesses; so this device has no
region of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from devices.bus import BusDevice
from devices.contract import U8, Device, DeviceHost

RESET_CPU = 1 << 2
_KEPT = 0b1010


@dataclass
class ResetState:
    """`kind` is the register without the bit that resets."""

    kind: U8 = 0

    def __post_init__(self) -> None:
        if self.kind & ~_KEPT:
            raise ValueError(f"the reset control register cannot be {self.kind:#x}")


class ResetControl(Device):
    """Give it to `PciRoot` as `reset_control`.

    Args:
        reset: called when the guest resets the machine.
    """

    model: ClassVar[str] = "reset-control"
    summary: ClassVar[str] = "the reset control register 0xCF9"
    State = ResetState
    state: ResetState

    def __init__(
        self,
        host: DeviceHost,
        options: Any = None,
        *,
        reset: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(host, options)
        self._reset = reset

    def handlers(self) -> Sequence[BusDevice]:
        return ()

    def read(self, offset: int, size: int) -> int:
        return self.state.kind

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.kind = value & _KEPT
        # The reset itself puts bit 2 back to 0: so each 1 that is written is a rising edge.
        if value & RESET_CPU and self._reset is not None:
            self._reset()
