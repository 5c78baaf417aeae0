"""The medium of a drive: a file of the host, by sectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from devices import host_io
from devices.ata.registers import SECTOR

_CHUNK = 1 << 20


class Medium:
    """A raw image. The errors of all methods are `OSError`.

    After a failed `sync` nobody can say what is on the disk (the host's kernel forgets the pages
    that it could not write), so all later ones fail as well.

    Args:
        tell: takes a line about an error of the host; each kind is told once.

    Attributes:
        capacity: in sectors.
    """

    def __init__(self, fd: int, readonly: bool, tell: Callable[[str], None]) -> None:
        self.readonly = readonly
        self.capacity = os.lseek(fd, 0, os.SEEK_END) // SECTOR
        self._fd = fd
        self._tell = tell
        self._told: set[int | None] = set()
        self._sync_failed = False

    def read(self, sector: int, count: int) -> bytearray:
        """`count` sectors; what the file does not have any more is an error."""
        data = bytearray(count * SECTOR)
        self.read_into(sector * SECTOR, [memoryview(data)])
        return data

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill `views` with the bytes from `offset` on."""
        left = list(views)
        while left:
            done = os.preadv(self._fd, left, offset)
            if not done:
                raise OSError(None, "the file has become shorter")
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if left:
                left[0] = left[0][done:]

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write `views` from byte `offset` on; `sync` makes it lasting."""
        host_io.must_reach(self._fd, offset + sum(view.nbytes for view in views))
        host_io.write_all(self._fd, views, offset)

    def verify(self, sector: int, count: int) -> None:
        """See whether these sectors can be read."""
        end = (sector + count) * SECTOR
        for offset in range(sector * SECTOR, end, _CHUNK):
            self.read_into(offset, [memoryview(bytearray(min(_CHUNK, end - offset)))])

    def sync(self) -> None:
        """Return when all that was written is on the host's disk."""
        if self._sync_failed:
            raise OSError(None, "an earlier flush failed")
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._sync_failed = True
            raise

    def tell(self, error: OSError) -> None:
        """Name each kind of error once; a guest can provoke them without end."""
        if error.errno not in self._told:
            self._told.add(error.errno)
            self._tell(f"the disk's file: {error.strerror}")
