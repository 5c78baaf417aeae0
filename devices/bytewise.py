"""Devices of byte-wide registers, as the ISA bus sees them.

The bus splits a 16- or 32-bit access to an 8-bit device into byte accesses at ascending addresses
(ISA System Architecture, "8-bit device, 16-bit access"); each of them is a register access with
its own side effects.
"""

from __future__ import annotations


class ByteRegisters:
    """A `BusDevice` made of `read_byte` and `write_byte`."""

    def read_byte(self, offset: int, /) -> int:
        """The register at `offset`, 0..255."""
        raise NotImplementedError

    def write_byte(self, offset: int, value: int, /) -> None:
        """Write 0..255 to the register at `offset`."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        if size == 1:
            return self.read_byte(offset)
        value = 0
        for index in range(size):
            value |= self.read_byte(offset + index) << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self.write_byte(offset, value)
            return
        for index in range(size):
            self.write_byte(offset + index, value >> 8 * index & 0xFF)
