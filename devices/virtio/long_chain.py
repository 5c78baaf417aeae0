"""A chain of hundreds of descriptors, as a request for a megabyte of a disk has.

It is a `Chain` in all that can be seen; but what is done for each of its descriptors is done by
`Spans`, not by a loop in Python.
"""

from __future__ import annotations

from devices.dma import GuestMemory
from devices.host_io import Vector
from devices.spans import Spans
from devices.virtio.chain import LONGEST, Chain

LONG = 16
"""Descriptors from which on it pays."""


class LongChain(Chain):
    """See `make`."""

    __slots__ = ("_all", "_asked", "_cut", "_host", "_read")

    def __init__(
        self, memory: GuestMemory, id: int, spans: Spans, readable: int, host: int
    ) -> None:
        super().__init__(memory, id)
        self._all = spans
        self._host = host
        self._read = 0
        self._asked, self._cut = (-1, -1), spans
        self.size = spans.ends[readable - 1] if readable else 0
        self.room = spans.ends[-1] - self.size

    @classmethod
    def make(cls, memory: GuestMemory, id: int, spans: Spans, readable: int) -> LongChain | None:
        """A chain of `spans`, of which the first `readable` can be read and the others written.

        None: some rule may be broken, or all is well but not simple; `Chain` must look.
        """
        host = memory.host(spans)
        if host is None or spans.ends[-1] > LONGEST:
            return None
        return cls(memory, id, spans, readable, host)

    def add(self, address: int, length: int, writable: int) -> None:
        raise TypeError("it has all its descriptors")

    def sources(self, length: int | None = None) -> list[memoryview]:
        return self._memory.windows(self._next(self.size if length is None else length))

    def pwrite_all(self, fd: int, offset: int) -> None:
        Vector.at(self._host, self._next(self.size)).write_all(fd, offset)

    def preadv(self, fd: int, length: int, offset: int) -> int:
        return Vector.at(self._host, self._spans(self.written, length)).read(fd, offset)

    def spans(self) -> list[tuple[int, int]]:
        return list(self._spans(0, self.room))

    def wrote(self, length: int) -> None:
        if length:
            self._memory.mark_pages(self._spans(self.written, length).pages())
            self.written += length

    def _next(self, length: int) -> Spans:
        length = min(length, self.size)
        found = self._all.cut(self._read, length)
        self._read += length
        self.size -= length
        return found

    def _spans(self, offset: int, length: int) -> Spans:
        """Asked for twice, as a rule: for the places to write to, and when that is done."""
        if (offset, length) != self._asked:
            self._asked = offset, length
            self._cut = self._all.cut(self._read + self.size + offset, length)
        return self._cut
