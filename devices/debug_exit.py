"""Debug exit: a guest ends its run by writing to port 0xF4.

The value that was written, of 1, 2 or 4 bytes and at any offset, is the guest's exit value; the
machine decides whether this device may end the run and what status its command then has. Reads
give 0, so that a guest can tell the device from an empty port, which reads all-ones. The port and
the meaning are those of QEMU's ``isa-debug-exit``, so that guests made for that run here.
"""

from __future__ import annotations

from typing import ClassVar

from devices.bus import BusType
from devices.contract import Device, Region


class DebugExit(Device):
    model: ClassVar[str] = "debug-exit"
    summary: ClassVar[str] = "a port that ends the run with the value written to it"

    def regions(self) -> tuple[Region, ...]:
        return (Region("exit", BusType.PIO, 4, start=0xF4),)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.host.request_exit(value)
