"""What a PCI function is to the machine, whether it lives here or in a jailed child.

Sources: PCI Local Bus Specification 3.0, sections 6.1 (header), 6.2.5 (base addresses).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from devices.bus import BusType, Range

CONFIG_REGISTERS = 64
"""Dwords in the conventional configuration space."""

ROM_BAR = 6
"""As a BAR number: the expansion ROM base address register."""
VIRTUAL_RESET = 0
"""The virtual config register to which 1 is written when the function is reset from outside."""


class BarInfo(NamedTuple):
    """What is fixed about one base address register, told once when the device is built.

    Attributes:
        bar: the number of its (first) register, 0..5, or `ROM_BAR`.
        region: the index of the region it maps, in `Device.regions()` order.
        bus: the address space.
        size: a power of two; memory at least 16 bytes, I/O at least 4.
        is_64bit: it takes the next register too.
    """

    bar: int
    region: int
    bus: BusType
    size: int
    is_64bit: bool = False
    prefetchable: bool = False


class RegionRange(NamedTuple):
    """A region of a device, and where it is (or was) mapped."""

    region: int
    range: Range


@dataclass(slots=True)
class ConfigWriteResult:
    """What a configuration write changes on the buses; removals come before additions."""

    mmio_remove: list[RegionRange] = field(default_factory=list)
    mmio_add: list[RegionRange] = field(default_factory=list)
    io_remove: list[RegionRange] = field(default_factory=list)
    io_add: list[RegionRange] = field(default_factory=list)
    removed_pci_devices: list[int] = field(default_factory=list)
    """Bus/device/function numbers (``bus << 8 | device << 3 | function``) that went away."""

    def __bool__(self) -> bool:
        return bool(
            self.mmio_remove
            or self.mmio_add
            or self.io_remove
            or self.io_add
            or self.removed_pci_devices
        )


class PciConfig(Protocol):
    """The configuration space of one function, as the host bridge drives it."""

    def bars(self) -> tuple[BarInfo, ...]:
        """The implemented base address registers, in ascending order."""
        ...

    def read_config(self, register: int) -> int:
        """The dword at index `register` (0..63)."""
        ...

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        """Write 1..4 bytes at byte `offset` (0..3) of `register`, never past its end."""
        ...

    def read_virtual_config(self, register: int) -> int:
        """A register that only the machine sees (hot-plug state); 0 if there is none."""
        ...

    def write_virtual_config(self, register: int, value: int) -> None: ...
