"""pvpanic: a guest's kernel says that it has panicked, and that ends the run.

The PCI form of the device (1b36:0011; QEMU's docs/specs/pvpanic): BAR 0 is 16 bytes of memory, of
which byte 0 tells, when it is read, which events the device knows, and is written with those that
happened. The machine decides whether this device may end the run, and with what status.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from devices.bus import BusType
from devices.pci.config import Header
from devices.pci.contract import BarInfo
from devices.pci.function import PciFunction


class Event(enum.IntFlag):
    """What a guest says."""

    PANICKED = 1
    CRASH_LOADED = 2
    """It has panicked and boots a kernel that saves a dump: it goes on."""


_KNOWN = int(Event.PANICKED | Event.CRASH_LOADED)


class PvPanic(PciFunction):
    model: ClassVar[str] = "pvpanic"
    summary: ClassVar[str] = "ends the run when the guest's kernel panics"

    def header(self) -> Header:
        return Header(
            0x1B36,
            0x0011,
            0x088000,  # system peripheral, other
            revision=1,
            subsystem_vendor_id=0x1AF4,
            subsystem_id=0x1100,
            bars=(BarInfo(0, 0, BusType.MMIO, 16),),
        )

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return _KNOWN if offset == 0 else 0

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset:
            return
        if value & Event.PANICKED:
            self.host.log("the guest's kernel has panicked")
            self.host.request_exit(int(Event.PANICKED))
        elif value & Event.CRASH_LOADED:
            self.host.log("the guest's kernel has panicked and goes on to save a dump")
