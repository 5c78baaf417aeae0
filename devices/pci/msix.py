"""MSI-X: a table of messages and a pending bit array (PBA), both in a BAR of the function.

Source: PCI Local Bus Specification 3.0, sections 6.8.2 and 6.8.3.

A vector is held back by its mask bit, by the function mask, and while the function may not write to
memory (`PciFunction.may_master`). What is triggered meanwhile sets the pending bit and is sent
once, as soon as nothing holds it back any more. Vectors start masked. While MSI-X is not enabled
nothing is triggered: the function uses its pin then.

The specification leaves any access to table and PBA undefined that is not an aligned dword or
quadword. Here each byte does what it does in the dword that it is in. The low two bits of an
address and the reserved bits of Vector Control are zero whatever is written; the PBA is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from devices.bus import BusDevice, BusType
from devices.pci.capability import Capability, CapabilityId
from devices.pci.contract import BarInfo
from devices.pci.registers import DWORD, Field

MAX_VECTORS = 2048
ENTRY_SIZE = 16
"""Bytes of one vector in the table: address, upper address, data, control."""
VECTOR_MASKED = 1
"""In the fourth dword of an entry."""

_ENTRY = 4
_CONTROL = 3
_WRITABLE = (DWORD & ~0b11, DWORD, DWORD, VECTOR_MASKED)
_ENABLE, _FUNCTION_MASK = 1 << 31, 1 << 30
"""In the capability's first dword: bits 15 and 14 of Message Control."""


@dataclass(frozen=True, slots=True)
class MsixLayout:
    """Where a function keeps its table and PBA; both may share a BAR with its own registers.

    Attributes:
        bar: the number of a memory BAR of the function.
        table_offset: bytes from the start of the BAR, a multiple of 8; so `pba_offset`.
        vectors: 1 to 2048.
    """

    bar: int
    table_offset: int
    pba_offset: int
    vectors: int

    @property
    def table_size(self) -> int:
        """In bytes."""
        return ENTRY_SIZE * self.vectors

    @property
    def pba_size(self) -> int:
        """In bytes: one bit for each vector, in whole quadwords."""
        return (self.vectors + 63) // 64 * 8

    def check(self, bars: tuple[BarInfo, ...]) -> None:
        """See whether it fits these BARs.

        Raises:
            ValueError: it does not.
        """
        if not 1 <= self.vectors <= MAX_VECTORS:
            raise ValueError(f"MSI-X with {self.vectors} vectors: there are 1 to {MAX_VECTORS}")
        found = [info for info in bars if info.bar == self.bar]
        if not found or found[0].bus is not BusType.MMIO:
            raise ValueError(f"MSI-X in BAR {self.bar}, which is no memory BAR of this function")
        table, pba = self.table_offset, self.pba_offset
        if table % 8 or pba % 8 or min(table, pba) < 0:
            raise ValueError("MSI-X table and PBA begin at multiples of 8")
        if max(table + self.table_size, pba + self.pba_size) > found[0].size:
            raise ValueError(f"MSI-X table and PBA do not fit in BAR {self.bar}")
        if table < pba + self.pba_size and pba < table + self.table_size:
            raise ValueError("MSI-X table and PBA overlap")

    def capability(self) -> Capability:
        """The entry in the capability list."""
        return Capability(
            CapabilityId.MSI_X,
            12,
            (
                Field("msi-x control", 2, 2, self.vectors - 1, (_ENABLE | _FUNCTION_MASK) >> 16),
                Field("msi-x table", 4, 4, self.table_offset | self.bar),
                Field("msi-x pba", 8, 4, self.pba_offset | self.bar),
            ),
        )


@dataclass
class MsixState:
    """The table, four dwords a vector, and the PBA in dwords; both empty without MSI-X."""

    table: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)


class Msix:
    """The vectors of one function; none if it has no `layout`.

    Args:
        state: filled with the reset values.
        control: reads the dword of the configuration space that Message Control is in.
        may_send: whether the function may write to memory.
        send: sends a message (address, data).
    """

    def __init__(
        self,
        layout: MsixLayout | None,
        state: MsixState,
        control: Callable[[], int],
        may_send: Callable[[], bool],
        send: Callable[[int, int], None],
    ) -> None:
        self.layout = layout
        self.vectors = layout.vectors if layout else 0
        self._state = state
        self._control, self._may_send, self._send = control, may_send, send
        self.reset()

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched MSI-X on; the pin is silent then."""
        return bool(self.vectors and self._control() & _ENABLE)

    def trigger(self, vector: int) -> None:
        """Interrupt the guest; nothing while MSI-X is not `enabled`.

        Raises:
            ValueError: the function has no such vector.
        """
        if not 0 <= vector < self.vectors:
            raise ValueError(f"no MSI-X vector {vector}: there are {self.vectors}")
        control = self._control()
        if not control & _ENABLE:
            return
        self._state.pending[vector >> 5] |= 1 << (vector & 31)
        self._deliver(vector, control)

    def masked(self, vector: int) -> bool:
        """Whether the guest holds this vector back, by its own mask or by the function's."""
        mask = self._state.table[_ENTRY * vector + _CONTROL] & VECTOR_MASKED
        return bool(mask or self._control() & _FUNCTION_MASK)

    def pending(self, vector: int) -> bool:
        """Whether this vector waits to be sent."""
        return bool(self._state.pending[vector >> 5] >> (vector & 31) & 1)

    def retry(self) -> None:
        """What holds all vectors back may have changed: send what waits and may go."""
        control = self._control()
        for index, bits in enumerate(self._state.pending):
            if bits:
                for vector in range(32 * index, 32 * index + 32):
                    if bits >> (vector & 31) & 1:
                        self._deliver(vector, control)

    def _deliver(self, vector: int, control: int) -> None:
        table, entry = self._state.table, _ENTRY * vector
        if control & (_ENABLE | _FUNCTION_MASK) != _ENABLE or table[entry + _CONTROL]:
            return
        if self._may_send():
            self._state.pending[vector >> 5] &= ~(1 << (vector & 31))
            self._send(table[entry] | table[entry + 1] << 32, table[entry + 2])

    # The guest's accesses; offsets count from the start of table or PBA.

    def read_table(self, offset: int, size: int) -> int:
        return _read(self._state.table, offset, size)

    def read_pba(self, offset: int, size: int) -> int:
        return _read(self._state.pending, offset, size)

    def write_table(self, offset: int, size: int, value: int) -> None:
        table = self._state.table
        first = offset >> 2
        value <<= 8 * (offset & 3)
        lanes = ((1 << 8 * size) - 1) << 8 * (offset & 3)
        index = first
        while lanes:
            mask = lanes & _WRITABLE[index % _ENTRY]
            table[index] = (table[index] & ~mask) | (value & mask)
            lanes, value, index = lanes >> 32, value >> 32, index + 1
        # The whole write counts: an entry is not looked at before its last dword is in.
        for vector in {first // _ENTRY, (index - 1) // _ENTRY}:
            if self.pending(vector):
                self._deliver(vector, self._control())

    def handler(self, others: BusDevice) -> BusDevice:
        """What sits on the bus for the BAR: table, PBA, and `others` for the rest of it."""
        assert self.layout is not None
        return MsixBar(self, self.layout, others)

    # State.

    def reset(self) -> None:
        """All vectors masked, none pending."""
        self._state.table[:] = [0, 0, 0, VECTOR_MASKED] * self.vectors
        self._state.pending[:] = [0] * ((self.vectors + 63) // 64 * 2)

    def check(self, state: MsixState) -> None:
        """See whether `state` could be this function's.

        Raises:
            ValueError: wrong number of vectors, a reserved bit, a pending vector that is not there.
        """
        table, pending = state.table, state.pending
        if len(table) != len(self._state.table) or len(pending) != len(self._state.pending):
            raise ValueError(f"this function has {self.vectors} MSI-X vectors")
        if any(value & ~_WRITABLE[index % _ENTRY] for index, value in enumerate(table)):
            raise ValueError("the MSI-X table has a reserved bit set")
        for index, bits in enumerate(pending):
            there = (1 << max(min(self.vectors - 32 * index, 32), 0)) - 1
            if bits & ~there:
                raise ValueError("an MSI-X vector is pending that is not there")

    def load(self, state: MsixState) -> None:
        """Take up a state that `check` accepted."""
        self._state = state


class MsixBar:
    """The bus device of a BAR that holds an MSI-X table and PBA."""

    __slots__ = ("_layout", "_msix", "_others", "_pba_end", "_table_end")

    def __init__(self, msix: Msix, layout: MsixLayout, others: BusDevice) -> None:
        self._msix, self._layout, self._others = msix, layout, others
        self._table_end = layout.table_offset + layout.table_size
        self._pba_end = layout.pba_offset + layout.pba_size

    def read(self, offset: int, size: int) -> int:
        layout, end = self._layout, offset + size
        if layout.table_offset <= offset and end <= self._table_end:
            return self._msix.read_table(offset - layout.table_offset, size)
        if layout.pba_offset <= offset and end <= self._pba_end:
            return self._msix.read_pba(offset - layout.pba_offset, size)
        return self._others.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        layout, end = self._layout, offset + size
        if layout.table_offset <= offset and end <= self._table_end:
            self._msix.write_table(offset - layout.table_offset, size, value)
        elif not (layout.pba_offset <= offset and end <= self._pba_end):
            self._others.write(offset, size, value)


def _read(dwords: list[int], offset: int, size: int) -> int:
    first, last = offset >> 2, offset + size - 1 >> 2
    value = 0
    for index in range(last, first - 1, -1):
        value = value << 32 | dwords[index]
    return value >> 8 * (offset & 3) & ((1 << 8 * size) - 1)
