"""Debug consoles: ports 0xE9 (Bochs) and 0x402 (SeaBIOS), where a byte written is a byte printed.

Reads give 0xE9, by which firmware and kernels find out whether the port is there (Bochs, "port E9
hack"; QEMU's ``isa-debugcon`` answers in the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from devices.bus import BusDevice, BusType
from devices.bytewise import ByteRegisters
from devices.contract import Device, Region

READBACK = 0xE9


class DebugConsole(ByteRegisters, Device):
    model: ClassVar[str] = "debug-console"
    summary: ClassVar[str] = "ports 0xE9 and 0x402 that print what is written to them"

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("bochs", BusType.PIO, 1, start=0xE9),
            Region("firmware", BusType.PIO, 1, start=0x402),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return (self, self)

    def read_byte(self, offset: int, /) -> int:
        return READBACK

    def write_byte(self, offset: int, value: int, /) -> None:
        self.host.output(bytes((value,)))
