"""One descriptor chain: what the driver lets the device read, then what it lets it write.

A chain is checked when it is taken from its ring: every descriptor lies in RAM, none is empty, the
readable ones come first (2.7.4.2), and all together are at most 4 GiB (2.7.5). After that a request
handler cannot fail by what the driver wrote; too little or too much is for it to see, by `size` and
`room`. How a request is cut into descriptors means nothing (2.7.4), so this speaks of bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from devices import host_io
from devices.dma import GuestMemory

LONGEST = 1 << 32


class RingError(ValueError):
    """The driver broke a rule of the ring; the device needs a reset."""


class Chain:
    """A request.

    It may be held for longer than a turn: it keeps addresses, not memory.

    Attributes:
        id: the head (split ring) or buffer id (packed ring).
        count: places that it takes in the ring until it is used.
        size: bytes that are still to be read.
        room: bytes that can be written in all.
        written: bytes that were written, from the start without a hole.
        elsewhere: begin and end, in the room, of all that `write_at` wrote.
        held: the handler completes it later, with `VirtQueue.complete`.
        epoch: which life of its queue it belongs to, see `VirtQueue`.
    """

    __slots__ = (
        "_memory",
        "_places",
        "_sources",
        "count",
        "elsewhere",
        "epoch",
        "held",
        "id",
        "room",
        "size",
        "written",
    )

    def __init__(self, memory: GuestMemory, id: int = 0) -> None:
        self._memory = memory
        self._sources: list[tuple[int, int]] = []
        self._places: list[tuple[int, int]] = []
        self.id = id
        self.count = 1
        self.size = 0
        self.room = 0
        self.written = 0
        self.elsewhere = (0, 0)
        self.held = False
        self.epoch = 0

    def add(self, address: int, length: int, writable: int) -> None:
        """Append a descriptor.

        Raises:
            RingError, DmaFault: it breaks a rule, see above.
        """
        if not length:
            raise RingError("a descriptor has no bytes")
        self._memory.window(address, length)
        if writable:
            self._places.append((address, length))
            self.room += length
        elif self._places:
            raise RingError("a readable descriptor follows a writable one")
        else:
            self._sources.append((address, length))
            self.size += length
        if self.size + self.room > LONGEST:
            raise RingError("a descriptor chain is longer than 4 GiB")

    # What the driver wrote for us.

    def read(self, length: int | None = None) -> bytes:
        """The next `length` bytes, or as many as there are; all that is left by default."""
        return b"".join(self.sources(length))

    def sources(self, length: int | None = None) -> list[memoryview]:
        """The same in place, until the turn ends."""
        left = self.size if length is None else min(length, self.size)
        self.size -= left
        views = []
        while left:
            address, there = self._sources[0]
            part = min(left, there)
            views.append(self._memory.window(address, part))
            if part == there:
                del self._sources[0]
            else:
                self._sources[0] = address + part, there - part
            left -= part
        return views

    def pwrite_all(self, fd: int, offset: int) -> None:
        """Write all that is left to a file.

        Raises:
            OSError: see `host_io.write_all`.
        """
        host_io.write_all(fd, self.sources(), offset)

    # What we write for the driver.

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write after what was written before; the number of bytes that there was room for."""
        part = min(len(data), self.room - self.written)
        self._put(self.written, data[:part])
        self.written += part
        return part

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at byte `offset` of the room; `written` stays as it is."""
        begin, end = self.elsewhere
        past = offset + len(data)
        self.elsewhere = (min(begin, offset), max(end, past)) if end else (offset, past)
        self._put(offset, data)

    def _put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        done = 0
        for address, length in self._spans(offset, len(data)):
            self._memory.write(address, data[done : done + length])
            done += length

    def places(self, offset: int, length: int) -> list[memoryview]:
        """Bytes of the room in place, until the turn ends; `wrote` says that they were written."""
        return self._memory.windows(self._spans(offset, length))

    def preadv(self, fd: int, length: int, offset: int) -> int:
        """Read up to `length` bytes of a file to behind `written`; `wrote` says how many came.

        Raises:
            OSError: see `os.preadv`.
        """
        return os.preadv(fd, self.places(self.written, length), offset)

    def spans(self) -> list[tuple[int, int]]:
        """(address, length) of the writable descriptors, for what is about memory itself."""
        return list(self._places)

    def wrote(self, length: int) -> None:
        """`length` bytes after `written` were written in place."""
        for span in self._spans(self.written, length):
            self._memory.mark(*span)
        self.written += length

    def _spans(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """(address, length) of these bytes of the room."""
        spans: list[tuple[int, int]] = []
        for address, there in self._places:
            if offset >= there:
                offset -= there
                continue
            part = there - offset
            if part >= length:
                if length:
                    spans.append((address + offset, length))
                break
            spans.append((address + offset, part))
            length -= part
            offset = 0
        return spans
