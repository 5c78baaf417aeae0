"""The enhanced configuration access mechanism: all of configuration space, mapped into memory.

Each function has 4 KiB at ``bus << 20 | device << 15 | function << 12`` of the window. An access of
1, 2 or 4 bytes within a dword is one access of configuration space; anything else is nobody's:
reads give all-ones and writes do nothing (the specification leaves it to the root).

Source: PCI Express Base Specification 3.0, section 7.2.2.
"""

from __future__ import annotations

from collections.abc import Callable

from devices.bus import ALL_ONES, Range

ECAM = Range(0xD000_0000, 256 << 20)
"""The window of this board, for all 256 buses: above the RAM, below the BARs."""


class Ecam:
    """The bus device of the window.

    Args:
        read_config: reads (function number, dword).
        write_config: writes (function number, dword, offset, data).
    """

    def __init__(
        self,
        read_config: Callable[[int, int], int],
        write_config: Callable[[int, int, int, bytes], None],
    ) -> None:
        self._read_config, self._write_config = read_config, write_config

    def read(self, offset: int, size: int) -> int:
        lane = offset & 3
        if lane + size > 4:
            return ALL_ONES[size]
        value = self._read_config(offset >> 12, offset >> 2 & 0x3FF)
        return value >> 8 * lane & ALL_ONES[size]

    def write(self, offset: int, size: int, value: int) -> None:
        lane = offset & 3
        if lane + size <= 4:
            data = value.to_bytes(size, "little")
            self._write_config(offset >> 12, offset >> 2 & 0x3FF, lane, data)
