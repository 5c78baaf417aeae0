"""A device that its guest has taken over: a write of N to its port makes it try to escape by way N.

It does in its own process what an attacker with code execution would do there. What it got it tells
by the console output of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from devices.bus import BusType
from devices.contract import Device, Region
from proxy.jail.escape import ATTEMPTS, Targets

PORT = 0x530
GOT, STOPPED = b"+", b"-"
"""How its output starts: it got what it wanted, or the host refused."""


@dataclass(frozen=True)
class HostileOptions:
    """What it is after; see `proxy.jail.escape.Targets`."""

    pid: int
    address: int
    length: int
    fd: int
    port: int


class Hostile(Device):
    model: ClassVar[str] = "vmm.demo.hostile:Hostile"
    summary: ClassVar[str] = "tries to escape from its jail"
    Options = HostileOptions

    def regions(self) -> tuple[Region, ...]:
        return (Region("attempt", BusType.PIO, 1, PORT),)

    def write(self, offset: int, size: int, value: int) -> None:
        wanted: HostileOptions = self.options
        targets = Targets(wanted.pid, wanted.address, wanted.length, wanted.fd, wanted.port)
        try:
            self.host.output(GOT + ATTEMPTS[value].run(targets).encode())
        except (OSError, ValueError, MemoryError) as error:
            self.host.output(STOPPED + str(error).encode())
