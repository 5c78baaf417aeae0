"""Echo: the smallest complete device, and the one to copy.

Eight bytes of port I/O at 0xEC0, or of MMIO at 0xC8000000 with ``bus=mmio`` (``addr=`` puts it
elsewhere). What the guest writes, it reads back; the register keeps its value across suspend,
snapshot and restore.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from devices.bus import BusType
from devices.contract import Device, Region


@dataclass(frozen=True)
class EchoOptions:
    """What a user may set.

    Attributes:
        bus: the address space that the register lies in.
    """

    bus: BusType = BusType.PIO


@dataclass
class EchoState:
    """`data` is the 8-byte register, little-endian as the guest sees it."""

    data: bytes = bytes(8)

    def __post_init__(self) -> None:
        if len(self.data) != 8:
            raise ValueError(f"the register has 8 bytes, not {len(self.data)}")


class Echo(Device):
    model: ClassVar[str] = "echo"
    summary: ClassVar[str] = "one 8-byte register that reads back what was written"
    Options = EchoOptions
    State = EchoState
    state: EchoState

    def regions(self) -> tuple[Region, ...]:
        bus = self.options.bus
        start = 0xEC0 if bus is BusType.PIO else 0xC800_0000
        return (Region("register", bus, 8, start),)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.state.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        data = bytearray(self.state.data)
        data[offset : offset + size] = value.to_bytes(size, "little")
        self.state.data = bytes(data)
