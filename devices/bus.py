"""The address-range bus: port I/O and MMIO accesses find their device here.

Rules:
- A range is checked once, when it is made: no zero length, nothing past 2**64.
- Two devices never overlap; inserting an overlap raises `RangeConflict` and changes nothing.
- An access belongs to a device only if *all* its bytes lie in one range of it. An access that
  straddles a border, or that nobody claims, reads all-ones, is dropped when it writes, and is
  counted.
- The path of an access is hot: no dictionary, no logging; one tuple, for crash reports.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Protocol

ADDRESS_LIMIT = 1 << 64
ALL_ONES = tuple((1 << 8 * size) - 1 for size in range(9))
"""`ALL_ONES[size]` is what an access of `size` bytes (0..8) reads where nothing answers."""


class BusType(enum.StrEnum):
    """The two address spaces of an x86 machine."""

    PIO = "pio"
    MMIO = "mmio"


KEPT_ACCESSES = 12
"""Accesses that are remembered for a crash report."""


class BusDevice(Protocol):
    """What the bus asks of whatever sits behind a range.

    `offset` counts from the start of the range; `size` is 1..8 bytes and the whole access lies in
    the range; `value` and the result are little-endian integers below ``1 << 8 * size``.
    """

    def read(self, offset: int, size: int, /) -> int: ...

    def write(self, offset: int, size: int, value: int, /) -> None: ...


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """`length` addresses from `start`; it may end exactly at the top of the 64-bit space."""

    start: int
    length: int

    def __post_init__(self) -> None:
        if self.length <= 0:
            raise ValueError(f"a range needs a length above zero, not {self.length}")
        if self.start < 0 or self.end > ADDRESS_LIMIT:
            raise ValueError(f"range {self.start:#x}+{self.length:#x} leaves the address space")

    @property
    def end(self) -> int:
        """The first address past the range."""
        return self.start + self.length

    def overlaps(self, other: Range) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end - 1:#x}"


class RangeConflict(ValueError):
    """A range that is to be inserted overlaps one that is there already.

    Attributes:
        owner: of that one; "" if it is no device's.
    """

    def __init__(self, text: str, owner: str = "") -> None:
        super().__init__(text)
        self.owner = owner


@dataclass(slots=True)
class AccessStats:
    """Accesses of one device on one bus; times are kept only while the bus is timing."""

    reads: int = 0
    writes: int = 0
    read_ns: int = 0
    write_ns: int = 0


@dataclass(slots=True)
class BusEntry:
    """One claimed range. `owner` is the device's configured name."""

    range: Range
    owner: str
    kind: BusType
    device: BusDevice
    stats: AccessStats
    start: int = 0
    end: int = 0
    read: Callable[[int, int], int] = field(init=False)
    write: Callable[[int, int, int], None] = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.range.start
        self.end = self.range.end
        self.set_timed(False)

    def set_timed(self, timed: bool) -> None:
        """Choose between the plain call and one that also measures what it took."""
        read, write, stats = self.device.read, self.device.write, self.stats
        if not timed:
            self.read, self.write = read, write
            return

        def timed_read(offset: int, size: int) -> int:
            begin = perf_counter_ns()
            value = read(offset, size)
            stats.read_ns += perf_counter_ns() - begin
            return value

        def timed_write(offset: int, size: int, value: int) -> None:
            begin = perf_counter_ns()
            write(offset, size, value)
            stats.write_ns += perf_counter_ns() - begin

        self.read, self.write = timed_read, timed_write


Access = tuple["BusEntry | Bus", bool, int, int, int]
"""Whose it was (the bus itself's if nobody claims it), whether it writes, address, size, value."""


class Bus:
    """One address space and the devices in it.

    Args:
        kind: which space this is; used in messages only.
        limit: the first address past the space (0x10000 for port I/O).
        recent: of a bus whose last accesses are remembered in one order with those of this.
    """

    owner = ""

    def __init__(
        self, kind: BusType, limit: int = ADDRESS_LIMIT, recent: deque[Access] | None = None
    ) -> None:
        self.kind = kind
        self.recent: deque[Access] = deque(maxlen=KEPT_ACCESSES) if recent is None else recent
        """The last accesses, the latest at the end."""
        self._note = self.recent.append
        self.limit = limit
        self.unclaimed_reads = 0
        self.unclaimed_writes = 0
        self.on_unclaimed: Callable[[str, int, int, int], None] | None = None
        """Called with ("read" or "write", address, size, value) for each unclaimed access."""
        self._starts: list[int] = []
        self._entries: list[BusEntry] = []
        self._reserved: list[Range] = []
        self._stats: dict[str, AccessStats] = {}
        self._timed = False
        self._muted: tuple[list[int], list[BusEntry]] | None = None

    def __iter__(self) -> Iterator[BusEntry]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, taken: Range) -> None:
        """Keep devices out of `taken`: it is RAM, which the CPU reaches without the bus."""
        self._check_free(taken)
        self._reserved.append(taken)

    def insert(self, claimed: Range, device: BusDevice, owner: str) -> BusEntry:
        """Give `claimed` to `device`; one that has a `base` is told where it starts.

        Raises:
            RangeConflict: the range overlaps RAM or another device, or leaves this space.
        """
        if claimed.end > self.limit:
            raise RangeConflict(f"{self.kind} {claimed} leaves the space of {self.limit:#x}")
        self._check_free(claimed)
        stats = self._stats.setdefault(owner, AccessStats())
        entry = BusEntry(claimed, owner, self.kind, device, stats)
        entry.set_timed(self._timed)
        index = bisect_right(self._starts, claimed.start)
        self._starts.insert(index, claimed.start)
        self._entries.insert(index, entry)
        if hasattr(device, "base"):
            device.base = claimed.start
        return entry

    def remove(self, claimed: Range, owner: str) -> bool:
        """Take back exactly this range from `owner`; False if it does not hold it."""
        index = bisect_right(self._starts, claimed.start) - 1
        if index < 0:
            return False
        entry = self._entries[index]
        if entry.range != claimed or entry.owner != owner:
            return False
        del self._starts[index], self._entries[index]
        return True

    def find(self, address: int, size: int = 1) -> BusEntry | None:
        """The entry that holds the whole of ``address .. address + size``, if any."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address + size <= self._entries[index].end:
            return self._entries[index]
        return None

    def read(self, address: int, size: int) -> int:
        """Read `size` (1..8) bytes at `address`."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            entry = self._entries[index]
            if address + size <= entry.end:
                entry.stats.reads += 1
                value = entry.read(address - entry.start, size)
                self._note((entry, False, address, size, value))
                return value
        self.unclaimed_reads += 1
        self._note((self, False, address, size, ALL_ONES[size]))
        if self.on_unclaimed is not None:
            self.on_unclaimed("read", address, size, ALL_ONES[size])
        return ALL_ONES[size]

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low `size` (1..8) bytes of `value` at `address`."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            entry = self._entries[index]
            if address + size <= entry.end:
                entry.stats.writes += 1
                self._note((entry, True, address, size, value))
                entry.write(address - entry.start, size, value & ALL_ONES[size])
                return
        self.unclaimed_writes += 1
        self._note((self, True, address, size, value))
        if self.on_unclaimed is not None:
            self.on_unclaimed("write", address, size, value)

    @property
    def timed(self) -> bool:
        """Whether the time that devices take is measured (about 0.1 us an access)."""
        return self._timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        self._timed = timed
        for entry in self._entries:
            entry.set_timed(timed)

    def stats(self) -> dict[str, AccessStats]:
        """Per owner, also of owners that hold no range at the moment."""
        return dict(self._stats)

    def mute(self) -> None:
        """Let no access reach a device until `unmute`; neither insert nor remove meanwhile."""
        if self._muted is None:
            self._muted = self._starts, self._entries
            self._starts, self._entries = [], []

    def unmute(self) -> None:
        """End `mute`; harmless if it was not."""
        if self._muted is not None:
            self._starts, self._entries = self._muted
            self._muted = None

    def _check_free(self, wanted: Range) -> None:
        for taken in self._reserved:
            if taken.overlaps(wanted):
                raise RangeConflict(f"{self.kind} {wanted} overlaps RAM at {taken}")
        index = bisect_right(self._starts, wanted.start)
        for entry in self._entries[max(index - 1, 0) : index + 1]:
            if entry.range.overlaps(wanted):
                raise RangeConflict(
                    f"{self.kind} {wanted} overlaps '{entry.owner}' at {entry.range}", entry.owner
                )
