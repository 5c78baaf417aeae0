"""The example PCI function: every kind of BAR, a capability, an interrupt pin, and nothing hidden.

Vendor id 0x1234 is not assigned by the PCI-SIG; emulators have long used it for made-up devices,
so no driver of a real product binds to it. Device id 0xC501 is none of those that drivers are
known to look for under that vendor (0x1111, a display; 0x11E8, a teaching device). Both can be set
by option.

BAR 0, 32-bit memory, 4 KiB: the registers. BAR 4, I/O, 16 ports: registers 0x00 to 0x0F again.
Any access of 1..8 bytes is fine. What the table does not name reads as zero and ignores writes.

====== ===== ================ ========== ============================================
offset width name             reset      writable
====== ===== ================ ========== ============================================
0x00   4     id               0x43464753 no ("SGFC" in memory)
0x04   4     scratch 0        0          all bits
0x08   4     scratch 1        0          all bits
0x0C   4     scratch 2        0          all bits
0x10   4     interrupt status 0          write 1 to clear: this is the acknowledgement
0x14   4     interrupt raise  0          a 1 sets the bit in the status; reads as zero
0x18   4     interrupt enable 0          all bits
====== ===== ================ ========== ============================================

The pin (INTA#) is asserted while a bit is set in both status and enable. With MSI-X enabled, a
bit n that begins to be set in both triggers vector n mod 4 instead. The MSI-X table lies at 0x800
of BAR 0, the pending bits at 0xC00.

BAR 2, 64-bit prefetchable memory, 64 KiB (or `ram_size`): memory that starts as zeros. Only pages
that were written to are kept and saved.

Capabilities: 0x09 (vendor-specific) with the bytes ``jailed``, 0x01 (power management), 0x13
(function-level reset, which brings back all registers and empties the memory), 0x11 (MSI-X).

Expansion ROM: the file given by `rom`, if any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from devices.bus import BusType
from devices.contract import U16, DeviceHost, FileBytes
from devices.errors import OptionError
from devices.pci.capability import vendor_capability
from devices.pci.config import Header
from devices.pci.contract import BarInfo
from devices.pci.function import PciFunction, PciState
from devices.pci.msix import MsixLayout
from devices.pci.registers import DWORD, Field, RegisterFile

REGISTERS = (
    Field("id", 0x00, 4, reset=0x43464753),
    Field("scratch 0", 0x04, 4, writable=DWORD),
    Field("scratch 1", 0x08, 4, writable=DWORD),
    Field("scratch 2", 0x0C, 4, writable=DWORD),
    Field("interrupt status", 0x10, 4, clears=DWORD),
    Field("interrupt raise", 0x14, 4, writable=DWORD),
    Field("interrupt enable", 0x18, 4, writable=DWORD),
)
REGISTERS_SIZE = 0x1000
STATUS, RAISE, ENABLE = 4, 5, 6
"""Dword numbers of the interrupt registers."""
DWORDS = 7

REGISTERS_BAR, RAM_BAR, PORTS_BAR = 0, 2, 4
PORTS = 16
VECTORS = 4
MSIX = MsixLayout(REGISTERS_BAR, table_offset=0x800, pba_offset=0xC00, vectors=VECTORS)
PAGE = 4096
LARGEST_RAM = 16 << 20


@dataclass
class ConfigSpaceOptions:
    """What a user may set.

    Attributes:
        vendor_id: as the function's header shows it.
        device_id: the same.
        ram_size: bytes behind BAR 2, a power of two from 4 KiB to 16 MiB.
        rom: a file with an expansion ROM, up to 512 KiB.
    """

    vendor_id: U16 = 0x1234
    device_id: U16 = 0xC501
    ram_size: int = 0x10000
    rom: FileBytes = b""

    def __post_init__(self) -> None:
        if self.ram_size & (self.ram_size - 1) or not PAGE <= self.ram_size <= LARGEST_RAM:
            raise OptionError(f"ram-size is a power of two in {PAGE}..{LARGEST_RAM}", "ram_size")
        if self.vendor_id == 0xFFFF:
            raise OptionError("vendor id 0xffff means that there is no function", "vendor_id")


@dataclass
class ConfigSpaceState(PciState):
    """`pages`: the pages of BAR 2 that were written to, by their offset in hex."""

    registers: list[int] = field(default_factory=lambda: [0] * DWORDS)
    pages: dict[str, bytearray] = field(default_factory=dict)


class ConfigSpaceDevice(PciFunction):
    model: ClassVar[str] = "config-space"
    summary: ClassVar[str] = "example PCI function: registers, memory, ports, INTA# or MSI-X"
    Options = ConfigSpaceOptions
    State = ConfigSpaceState
    options: ConfigSpaceOptions
    state: ConfigSpaceState

    def __init__(self, host: DeviceHost, options: ConfigSpaceOptions | None = None) -> None:
        super().__init__(host, options)
        self._file = RegisterFile(REGISTERS, DWORDS, self.state.registers)
        # Names of pages are made once: making one costs more than the access.
        self._names = tuple(f"{page:#x}" for page in range(0, self.options.ram_size, PAGE))

    def header(self) -> Header:
        return Header(
            self.options.vendor_id,
            self.options.device_id,
            class_code=0xFF0000,  # "does not fit in any defined class" (appendix D)
            revision=1,
            subsystem_vendor_id=self.options.vendor_id,
            subsystem_id=self.options.device_id,
            interrupt_pin=1,
            bars=(
                BarInfo(REGISTERS_BAR, 0, BusType.MMIO, REGISTERS_SIZE),
                BarInfo(RAM_BAR, 1, BusType.MMIO, self.options.ram_size, True, True),
                BarInfo(PORTS_BAR, 2, BusType.PIO, PORTS),
            ),
            capabilities=(vendor_capability(b"jailed"),),
            msix=MSIX,
            power_management=True,
            function_reset=True,
            rom=self.options.rom,
        )

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        if bar != RAM_BAR:
            return self._read_registers(offset, size)
        page = self.state.pages.get(self._names[offset // PAGE])
        start = offset % PAGE
        if start + size > PAGE:  # crosses into the next page: one byte at a time
            return sum(self.read_bar(bar, offset + i, 1) << 8 * i for i in range(size))
        return 0 if page is None else int.from_bytes(page[start : start + size], "little")

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar != RAM_BAR:
            self._write_registers(offset, size, value)
            return
        start = offset % PAGE
        if start + size > PAGE:
            for i in range(size):
                self.write_bar(bar, offset + i, 1, value >> 8 * i & 0xFF)
            return
        name = self._names[offset // PAGE]
        page = self.state.pages.get(name)
        if page is None:
            page = self.state.pages[name] = bytearray(PAGE)
        page[start : start + size] = value.to_bytes(size, "little")

    def _read_registers(self, offset: int, size: int) -> int:
        values = self.state.registers
        index, lane = offset >> 2, offset & 3
        value = 0
        for position in range((lane + size + 3) >> 2):
            if index + position < DWORDS:
                value |= values[index + position] << 32 * position
        return value >> 8 * lane & ((1 << 8 * size) - 1)

    def _write_registers(self, offset: int, size: int, value: int) -> None:
        before = self._active()
        data = value.to_bytes(size, "little")
        while data:
            index, lane = offset >> 2, offset & 3
            part, data = data[: 4 - lane], data[4 - lane :]
            if index < DWORDS:
                self._file.write(index, lane, part)
            offset += len(part)
        raised = self.state.registers[RAISE]
        if raised:
            self._file.update(STATUS, raised, raised)
            self._file.update(RAISE, raised, 0)
        self._follow_pin()
        begun = self._active() & ~before
        for bit in range(begun.bit_length() if self.msix.enabled else 0):
            if begun >> bit & 1:
                self.msix.trigger(bit % VECTORS)

    def _active(self) -> int:
        return self.state.registers[STATUS] & self.state.registers[ENABLE]

    def validate(self, state: Any) -> None:
        self._file.check(state.registers)
        if state.registers[RAISE]:
            raise ValueError("the interrupt raise register is never anything but zero")
        for name, page in state.pages.items():
            if name not in self._names or len(page) != PAGE:
                raise ValueError(f"there is no page of {len(page)} bytes at {name}")

    def reset(self) -> None:
        self._file.reset()
        self.state.pages.clear()

    def restored(self) -> None:
        self._file.load(self.state.registers)
        self._follow_pin()

    def _follow_pin(self) -> None:
        self.set_intx(bool(self._active()))
