"""Registers as a table: a reset value and masks instead of code for each register.

A guest's write changes the bits of the writable mask, clears those of the write-1-to-clear mask
that it writes as 1, and touches nothing else. With that, the sizing of a PCI base address register
("write all ones, read back the size") needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DWORD = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Field:
    """One register, or a part of one, of a table.

    Attributes:
        name: as the specification calls it.
        offset: of its first byte, in bytes.
        width: in bytes, 1..4; it lies within one dword.
        reset: the value after reset; also what its read-only bits always are.
        writable: bits that a guest's write sets.
        clears: bits that a guest's write of 1 clears, and only the device sets.
        volatile: bits that a guest cannot write but the device changes.
    """

    name: str
    offset: int
    width: int
    reset: int = 0
    writable: int = 0
    clears: int = 0
    volatile: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 4 - self.offset % 4 or self.offset < 0:
            raise ValueError(f"register '{self.name}' does not lie within one dword")
        masks = (self.reset, self.writable, self.clears, self.volatile)
        if any(mask >> 8 * self.width for mask in masks):
            raise ValueError(f"register '{self.name}' has bits beyond its {self.width} bytes")
        if self.writable & (self.clears | self.volatile):
            raise ValueError(f"register '{self.name}' has bits of two kinds at once")


class RegisterFile:
    """Dwords that follow a table of fields.

    Args:
        fields: the table; what no field covers reads as zero and ignores writes.
        dwords: how many.
        values: the list to work on, for instance a part of a device's state; it is filled with
            the reset values. A new one by default.

    Raises:
        ValueError: two fields overlap, or one lies outside.
    """

    __slots__ = ("_clears", "_mirror", "_reset", "_volatile", "_writable", "values")

    def __init__(
        self, fields: Iterable[Field], dwords: int, values: list[int] | None = None
    ) -> None:
        self._reset = [0] * dwords
        self._writable = [0] * dwords
        self._clears = [0] * dwords
        self._volatile = [0] * dwords
        self._mirror: memoryview | None = None
        covered: dict[int, str] = {}
        for item in fields:
            for byte in range(item.offset, item.offset + item.width):
                if byte >= 4 * dwords:
                    raise ValueError(f"register '{item.name}' lies outside the file")
                if byte in covered:
                    raise ValueError(f"registers '{covered[byte]}' and '{item.name}' overlap")
                covered[byte] = item.name
            index, shift = item.offset >> 2, 8 * (item.offset & 3)
            self._reset[index] |= item.reset << shift
            self._writable[index] |= item.writable << shift
            self._clears[index] |= item.clears << shift
            self._volatile[index] |= item.volatile << shift
        self.values: list[int] = [] if values is None else values
        self.values[:] = self._reset

    def write(self, register: int, offset: int, data: bytes) -> None:
        """A guest's write of 1..4 bytes at byte `offset` (0..3) of dword `register`.

        Raises:
            ValueError: the bytes do not lie within that dword, or there is no such dword.
        """
        if not (0 <= register < len(self._reset) and offset >= 0 and 0 < len(data) <= 4 - offset):
            raise ValueError(f"no {len(data)} bytes at byte {offset} of register {register}")
        lanes = ((1 << 8 * len(data)) - 1) << 8 * offset
        value = int.from_bytes(data, "little") << 8 * offset
        writable = self._writable[register] & lanes
        kept = self.values[register] & ~(writable | (self._clears[register] & value))
        self._store(register, kept | (value & writable))

    def update(self, register: int, mask: int, value: int) -> None:
        """The device's own change of the bits of `mask`.

        Raises:
            ValueError: `mask` has read-only bits.
        """
        if mask & ~self.changeable(register):
            raise ValueError(f"bits {mask:#x} of register {register} never change")
        self._store(register, (self.values[register] & ~mask) | (value & mask))

    def reset(self) -> None:
        """Back to the reset values."""
        self.values[:] = self._reset
        self._refresh()

    def changed(self, values: dict[int, int]) -> list[int]:
        """All dwords: those of `values` by their index, the others at their reset values."""
        return [values.get(register, reset) for register, reset in enumerate(self._reset)]

    def changeable(self, register: int) -> int:
        """The bits that can differ from their reset value."""
        return self._writable[register] | self._clears[register] | self._volatile[register]

    def check(self, values: list[int]) -> None:
        """See whether `values` could be this file's.

        Raises:
            ValueError: the number of dwords is wrong, or a read-only bit differs.
        """
        if len(values) != len(self._reset):
            raise ValueError(f"there are {len(self._reset)} registers, not {len(values)}")
        for register, value in enumerate(values):
            if not 0 <= value <= DWORD:
                raise ValueError(f"register at {4 * register:#04x} is no 32-bit value: {value}")
            wrong = (value ^ self._reset[register]) & ~self.changeable(register)
            if wrong:
                raise ValueError(
                    f"register at {4 * register:#04x} is {value:#010x}: "
                    f"read-only bits {wrong:#x} differ from {self._reset[register]:#010x}"
                )

    def load(self, values: list[int]) -> None:
        """Work on `values`, the list itself, from now on; as `check` for errors."""
        self.check(values)
        self.values = values
        self._refresh()

    def mirror(self, view: memoryview | None) -> None:
        """Keep `view` (native dwords, format "I") equal to the registers from now on.

        A dword is stored at once, so a reader in another process never sees half of one.
        """
        self._mirror = view
        self._refresh()

    def _store(self, register: int, value: int) -> None:
        self.values[register] = value
        if self._mirror is not None and register < len(self._mirror):
            self._mirror[register] = value

    def _refresh(self) -> None:
        if self._mirror is not None:
            for register in range(min(len(self.values), len(self._mirror))):
                self._mirror[register] = self.values[register]
