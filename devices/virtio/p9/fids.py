"""The fids of a session: the client's handles of files, each a path and perhaps an open file.

A fid that is not open holds no descriptor, so a client may have many. Its path follows what the
client itself renames; what the host renames meanwhile is found under the new name only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from devices.contract import U32

MOST_FIDS = 1 << 16
MOST_OPEN = 4000
MOST_PATH_BYTES = 4 << 20
"""Of all fids together, so that a snapshot can hold them."""
LONGEST_PATH = 4095
CLOSED = -1


@dataclass
class FidState:
    """A fid, as a snapshot keeps it.

    Attributes:
        number: the client's name for it.
        path: see `tree`.
        flags: how it is open (the host's O_*), or `CLOSED`.
        inode: of an open file, inode and device numbers, by which a restore knows it again.
        lost: it was open, and a restore did not find the file again.
    """

    number: U32
    path: bytes
    flags: int = CLOSED
    inode: list[int] = field(default_factory=list)
    lost: bool = False

    def check(self) -> None:
        """See whether it can be the state of a fid, with a ValueError."""
        parts = self.path.split(b"/") if self.path else []
        if len(self.path) > LONGEST_PATH or not all(map(is_name, parts)):
            raise ValueError(f"fid {self.number} has a path that cannot be")
        if self.flags != CLOSED and self.flags & ~_REOPEN:
            raise ValueError(f"fid {self.number} is open in a way that cannot be")
        if len(self.inode) not in (0, 3) or any(not 0 <= n < 1 << 64 for n in self.inode):
            raise ValueError(f"fid {self.number} has no such inode")
        if (self.flags == CLOSED) != (not self.inode) or (self.lost and self.flags == CLOSED):
            raise ValueError(f"fid {self.number} is half open")


_REOPEN = os.O_RDWR | os.O_WRONLY | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECTORY


def is_name(name: bytes) -> bool:
    """Whether it can name an entry of a directory."""
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


def kept_flags(flags: int) -> int:
    """Of the host's open flags, those that a file is opened with again."""
    return flags & _REOPEN


class Fids:
    """All fids, and the descriptors of those that are open."""

    def __init__(self) -> None:
        self._fids: dict[int, FidState] = {}
        self._open: dict[int, int] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[FidState]:
        return iter(self._fids.values())

    def __len__(self) -> int:
        return len(self._fids)

    def get(self, number: int) -> FidState:
        """A fid by its number; OSError EBADF if there is none."""
        fid = self._fids.get(number)
        if fid is None:
            raise OSError(errno.EBADF, f"there is no fid {number}")
        return fid

    def add(self, fid: FidState) -> None:
        """Take up a new fid.

        Raises:
            OSError: EBADF if there is one of this number, ENFILE if there are too many.
        """
        if fid.number in self._fids:
            raise OSError(errno.EBADF, f"there is a fid {fid.number} already")
        if len(self._fids) >= MOST_FIDS or self._bytes + len(fid.path) > MOST_PATH_BYTES:
            raise OSError(errno.ENFILE, "too many fids")
        self._fids[fid.number] = fid
        self._bytes += len(fid.path)

    def move(self, number: int, path: bytes) -> None:
        """Give a fid that is not open another path."""
        fid = self.get(number)
        if fid.flags != CLOSED:
            raise OSError(errno.EBADF, "an open fid")
        self._bytes += len(path) - len(fid.path)
        fid.path = path

    def open(self, fid: FidState, fd: int, flags: int, inode: list[int]) -> None:
        """This is its open file from now on."""
        fid.flags, fid.inode, fid.lost = kept_flags(flags), inode, False
        self._open[fid.number] = fd

    def check_room(self) -> None:
        """See whether one more may be open; OSError EMFILE if not."""
        if len(self._open) >= MOST_OPEN:
            raise OSError(errno.EMFILE, "too many open files")

    def fd(self, fid: FidState) -> int | None:
        """Its open file, or None.

        Raises:
            OSError: ESTALE if it was open once and its file is lost.
        """
        if fid.lost:
            raise OSError(errno.ESTALE, "lost in a restore")
        return self._open.get(fid.number)

    def opened(self, number: int) -> int:
        """The open file of a fid; OSError if it is not open."""
        fd = self.fd(self.get(number))
        if fd is None:
            raise OSError(errno.EBADF, f"fid {number} is not open")
        return fd

    def remove(self, number: int) -> FidState:
        """Let go of a fid."""
        fid = self.get(number)
        del self._fids[number]
        self._bytes -= len(fid.path)
        fd = self._open.pop(number, None)
        if fd is not None:
            os.close(fd)
        return fid

    def clear(self) -> None:
        """Let go of all."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        self._fids.clear()
        self._bytes = 0

    def renamed(self, old: bytes, new: bytes) -> list[FidState]:
        """The fids at or beneath `old`, which is about to be renamed.

        Raises:
            OSError: ENFILE if the new paths would be too long all together.
        """
        beneath = old + b"/"
        found = [f for f in self if f.path == old or f.path.startswith(beneath)]
        if self._bytes + len(found) * (len(new) - len(old)) > MOST_PATH_BYTES:
            raise OSError(errno.ENFILE, "too long paths of fids")
        return found

    def rename(self, found: list[FidState], old: bytes, new: bytes) -> None:
        """It was renamed: these are beneath `new` now."""
        for fid in found:
            fid.path = new + fid.path[len(old) :]
        self._bytes += len(found) * (len(new) - len(old))
