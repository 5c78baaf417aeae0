"""Where an image and the loader's own structures go in guest RAM, each byte claimed once.

Fixed places below 640 KiB, claimed only by the protocols that need them:

    0x01000  GDT (`entry`)
    0x02000  page tables of long mode (`entry`); 24 KiB, and 4 KiB for each GiB above 4 GiB
    0x50000  what the protocol passes, at most 192 KiB: the Multiboot information structure and its
             texts (`multiboot_info`), Linux's boot parameters and command line (`boot_params`), or
             the PVH start information (`pvh`)
    0x80000  the first stack (`entry`), 64 KiB, growing down from 0x90000

A guest may reuse all of it once it has its own GDT, page tables and stack.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from devices.errors import Subject, UserError
from vmm.memory import PAGE, GuestMemory, RamRegion

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Claim:
    """Guest-physical bytes ``start .. end`` (exclusive) and what lies there."""

    start: int
    end: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} at {span(self.start, self.end - self.start)}"


def span(start: int, size: int) -> str:
    """``0x1000-0x1fff``, as messages print a range that is not empty."""
    return f"{start:#x}-{start + size - 1:#x}"


class Placement:
    """Guest memory being filled by one boot."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._claims: list[Claim] = []
        self._starts: list[int] = []

    @property
    def low(self) -> RamRegion:
        """The RAM that starts at address zero."""
        return self.memory.ram[0]

    def claim(self, what: str, start: int, size: int) -> None:
        """Take ``start .. start + size`` for `what`; nothing happens when `size` is zero.

        Raises:
            UserError: some of it is not RAM, or it is taken already.
        """
        if size == 0:
            return
        if not any(ram.start <= start and start + size <= ram.end for ram in self.memory.ram):
            ranges = " and ".join(span(ram.start, ram.size) for ram in self.memory.ram)
            problem = f"{what} at {span(start, size)} lies outside RAM ({ranges})"
            raise UserError(problem, Subject("mem"))
        # Claims are disjoint and sorted: only the one before and the one behind can be in the way.
        index = bisect_right(self._starts, start)
        for taken in self._claims[max(index - 1, 0) : index + 1]:
            if start < taken.end and taken.start < start + size:
                raise UserError(f"{what} at {span(start, size)} overlaps {taken}")
        self._starts.insert(index, start)
        self._claims.insert(index, Claim(start, start + size, what))

    def fill(self, what: str, start: int, data: bytes | memoryview, size: int = 0) -> None:
        """Claim room for `data`, or for `size` bytes if that is more, and write it.

        What lies past `data` is zeroed.

        Raises:
            UserError: as `claim`.
        """
        self.claim(what, start, max(size, len(data)))
        if data:
            self.memory.write(start, data)
        if size > len(data):
            self._zero(start + len(data), size - len(data))

    def find(self, size: int, above: int) -> int | None:
        """The lowest free page-aligned room for `size` bytes in low RAM, at `above` or higher."""
        place = -(-above // PAGE) * PAGE
        for taken in self._claims:
            if place + size <= taken.start:
                break
            if taken.end > place:
                place = -(-taken.end // PAGE) * PAGE
        return place if place + size <= self.low.end else None

    def find_below(self, size: int, limit: int) -> int | None:
        """The highest free page-aligned room for `size` bytes in low RAM that ends at `limit`."""
        place = (min(limit, self.low.end) - size) // PAGE * PAGE
        for taken in reversed(self._claims):
            if place >= taken.end:
                break
            if place + size > taken.start:
                place = (taken.start - size) // PAGE * PAGE
        return place if place >= 0 else None

    def _zero(self, start: int, size: int) -> None:
        # Pages that nobody touched are zero already: writing them would make RAM less sparse.
        for ram in self.memory.ram:
            if not ram.start <= start < ram.end:
                continue
            first = start - ram.start + ram.offset
            for offset, length in self.memory.extents():
                begin, end = max(offset, first), min(offset + length, first + size)
                if begin < end:
                    self.memory.view[begin:end] = bytes(end - begin)
