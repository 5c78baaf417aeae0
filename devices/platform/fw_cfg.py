"""fw_cfg: how a virtual machine tells its firmware what it is made of.

Source: QEMU, docs/specs/fw_cfg.rst. Ports:

- 0x510, 2 bytes, write only: the selector, little-endian; it rewinds the item.
- 0x511, 1 byte, read only: the next byte of the selected item; past its end, 0.
- 0x514..0x51B: the guest-physical address of a DMA descriptor, big-endian, in two dwords; writing
  the low one starts the transfer. Read, they give the signature "QEMU CFG".

All other accesses read all-ones and write nothing. No item can be written: a DMA write is refused
by the error bit, as the specification provides for. So is a transfer that leaves guest RAM.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated, Any, ClassVar, Protocol

import msgspec

from devices.bus import ALL_ONES, BusType
from devices.contract import U16, U32, Device, DeviceHost, Region

U33 = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]

DATA, DMA_HIGH, DMA_LOW = 1, 4, 8
"""Offsets from the selector."""
FIRST_FILE = 0x20
FILE_NAME_SIZE = 56
"""With the zero byte that ends the name."""
_DMA_SIGNATURE = b"QEMU CFG"
_FILE = struct.Struct(f">IHH{FILE_NAME_SIZE}s")
_DESCRIPTOR = struct.Struct(">IIQ")
_OFFSET_LIMIT = 1 << 32
"""Where an offset stays: no item is that long, so all bytes from there on are zero."""
_PAGE_SHIFT = 12
_ZEROS = bytes(1 << 16)


class Key(IntEnum):
    """Selectors of the items that are no files."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NO_GRAPHIC = 0x04
    CPU_COUNT = 0x05
    BOOT_MENU = 0x0E
    MAX_CPUS = 0x0F
    FILE_DIRECTORY = 0x19
    IRQ0_OVERRIDE = 0x8002


class Feature(IntFlag):
    """The item `Key.ID`."""

    TRADITIONAL = 1 << 0
    DMA = 1 << 1


class Control(IntFlag):
    """The control field of a DMA descriptor; with SELECT its high half is the selector."""

    ERROR = 1 << 0
    READ = 1 << 1
    SKIP = 1 << 2
    SELECT = 1 << 3
    WRITE = 1 << 4


class DmaMemory(Protocol):
    """Guest RAM as a device reaches it."""

    def window(self, address: int, length: int, /) -> memoryview:
        """Those guest-physical bytes, writable in place; ValueError if some are not RAM."""
        ...


@dataclass
class FwCfgState:
    """What is selected, how much of it was read, and the high half of the DMA address."""

    selector: U16 = 0
    offset: U33 = 0
    dma_high: U32 = 0


class FwCfg(Device):
    """The items are fixed when it is built: what the machine is made of is no state.

    Args:
        items: by selector; `Key.SIGNATURE`, `Key.ID` and `Key.FILE_DIRECTORY` are made here.
        files: by name (at most 55 ASCII characters), such as ``etc/e820``.
        memory: guest RAM for the DMA interface; without it there is none.

    Raises:
        ValueError: a file name that cannot be, or a selector that belongs to this device.
    """

    model: ClassVar[str] = "fw-cfg"
    summary: ClassVar[str] = "what firmware wants to know of the machine"
    State = FwCfgState
    state: FwCfgState

    def __init__(
        self,
        host: DeviceHost,
        options: Any = None,
        *,
        items: Mapping[int, bytes] | None = None,
        files: Mapping[str, bytes] | None = None,
        memory: DmaMemory | None = None,
    ) -> None:
        super().__init__(host, options)
        self._memory = memory
        features = Feature.TRADITIONAL | (Feature.DMA if memory is not None else Feature(0))
        self._items: dict[int, bytes] = {
            Key.SIGNATURE: b"QEMU",
            Key.ID: features.to_bytes(4, "little"),
        }
        for key, data in (items or {}).items():
            own = key in self._items or FIRST_FILE <= key < 0x8000 or key == Key.FILE_DIRECTORY
            if own or not 0 <= key <= 0xFFFF:
                raise ValueError(f"fw_cfg selector {key:#x} is not free for an item")
            self._items[key] = bytes(data)
        # Sorted, so that the same machine has the same selectors.
        named = sorted((files or {}).items())
        directory = bytearray(len(named).to_bytes(4, "big"))
        for key, (name, data) in enumerate(named, FIRST_FILE):
            self._items[key] = bytes(data)
            directory += _FILE.pack(len(data), key, 0, _file_name(name))
        self._items[Key.FILE_DIRECTORY] = bytes(directory)

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.PIO, 12, start=0x510),)

    def read(self, offset: int, size: int) -> int:
        if offset == DATA and size == 1:
            return self._next_byte()
        if self._memory is not None and offset >= DMA_HIGH and offset + size <= DMA_HIGH + 8:
            start = offset - DMA_HIGH
            return int.from_bytes(_DMA_SIGNATURE[start : start + size], "little")
        return ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            self._select(value)
        elif self._memory is not None and size == 4 and offset in (DMA_HIGH, DMA_LOW):
            half = int.from_bytes(value.to_bytes(4, "little"), "big")
            if offset == DMA_HIGH:
                self.state.dma_high = half
                return
            high, self.state.dma_high = self.state.dma_high, 0
            self._transfer(high << 32 | half, self._memory)

    # Items.

    def _select(self, selector: int) -> None:
        self.state.selector = selector
        self.state.offset = 0

    def _next_byte(self) -> int:
        state = self.state
        item = self._items.get(state.selector, b"")
        if state.offset >= len(item):
            return 0
        state.offset += 1
        return item[state.offset - 1]

    def _skip(self, length: int) -> None:
        self.state.offset = min(self.state.offset + length, _OFFSET_LIMIT)

    # DMA.

    def _transfer(self, address: int, memory: DmaMemory) -> None:
        """Do what the descriptor at `address` says, and tell the outcome in its control field.

        A descriptor that is not in RAM has no field to tell anything in: nothing happens.
        """
        try:
            descriptor = memory.window(address, _DESCRIPTOR.size)
        except ValueError:
            return
        control, length, buffer = _DESCRIPTOR.unpack(descriptor)
        if control & Control.SELECT:
            self._select(control >> 16)
        result = 0
        # Of several operations the specification does the first in this order.
        if control & Control.READ:
            result = 0 if self._read_to(memory, buffer, length) else Control.ERROR
        elif control & Control.WRITE:
            result = Control.ERROR
        elif control & Control.SKIP:
            self._skip(length)
        # Last of all: the guest looks at it to learn that the transfer is over.
        descriptor[:4] = int(result).to_bytes(4, "big")
        self._wrote(address, 4)

    def _read_to(self, memory: DmaMemory, buffer: int, length: int) -> bool:
        """Whether all of it was RAM; if not, nothing was written."""
        if not length:
            return True
        try:
            target = memory.window(buffer, length)
        except ValueError:
            return False
        state = self.state
        item = self._items.get(state.selector, b"")
        data = item[state.offset : state.offset + length]
        target[: len(data)] = data
        for start in range(len(data), length, len(_ZEROS)):
            room = min(len(_ZEROS), length - start)
            target[start : start + room] = _ZEROS[:room]
        self._skip(length)
        self._wrote(buffer, length)
        return True

    def _wrote(self, address: int, length: int) -> None:
        first = address >> _PAGE_SHIFT
        last = address + length - 1 >> _PAGE_SHIFT
        self.host.wrote_pages(first, last - first + 1)


def _file_name(name: str) -> bytes:
    encoded = name.encode("ascii", "replace")
    if not name.isascii() or not 0 < len(encoded) < FILE_NAME_SIZE or b"\0" in encoded:
        raise ValueError(f"{name!r} is no fw_cfg file name: 1 to 55 ASCII characters")
    return encoded
