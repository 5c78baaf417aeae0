"""System calls on descriptors and memory that Python's `os` does not have."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from array import array
from collections.abc import Callable, Sequence

from devices.spans import Spans

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
"""Linux, include/uapi/linux/falloc.h."""
_MADV_REMOVE = 9
"""Linux, include/uapi/asm-generic/mman-common.h: free the pages of a shared mapping's file."""
_SHUT_WR, _SHUT_RDWR = 1, 2
"""Linux, include/linux/net.h."""
MOST_PIECES = 1024
"""Of memory in one call (IOV_MAX, include/uapi/linux/uio.h)."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_CHUNK = memoryview(mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ))
"""Zeros, aligned as O_DIRECT wants them."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.preadv.argtypes = _libc.pwritev.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.preadv.restype = _libc.pwritev.restype = ctypes.c_ssize_t
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def write_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write all of `views` at `offset`, however many calls it takes.

    Raises:
        OSError: it cannot be written, or not wholly; a part of it may have been.
    """
    left = list(views)
    while left:
        done = os.pwritev(fd, left, offset)
        if not done:
            raise OSError(errno.EIO, "nothing could be written")
        offset += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


def must_reach(fd: int, end: int) -> None:
    """See that a file still has `end` bytes: a write past its end would make it longer.

    Raises:
        OSError: it has become shorter.
    """
    about = os.fstat(fd)
    if about.st_size < end and stat.S_ISREG(about.st_mode):
        raise OSError(None, "the file has become shorter")


class Vector:
    """Pieces of memory in this process, for one system call: an array of `struct iovec` (readv(2)).

    The pieces must stay mapped and of their size as long as it is used.

    Attributes:
        words: address and length of each piece.
    """

    def __init__(self, words: array[int]) -> None:
        self.words = words

    @classmethod
    def at(cls, base: int, spans: Spans) -> Vector:
        """`spans` of memory that begins at address `base` of this process."""
        words = spans.words[:]
        words[::2] = array("Q", [base + address for address in words[::2]])
        return cls(words)

    @classmethod
    def of(cls, views: Sequence[memoryview]) -> Vector:
        """`views` of memory that can be written."""
        words = array("Q")
        for view in views:
            words.extend((address_of(view), view.nbytes))
        return cls(words)

    def read(self, fd: int, offset: int) -> int:
        """As `os.preadv`."""
        return self._call(_libc.preadv, fd, offset)

    def write_all(self, fd: int, offset: int) -> None:
        """Write all of it at `offset`, however many calls it takes.

        Raises:
            OSError: it cannot be written, or not wholly; a part of it may have been.
        """
        left = self
        while left.words:
            done = left._call(_libc.pwritev, fd, offset)
            if not done:
                raise OSError(errno.EIO, "nothing could be written")
            offset += done
            left = left.behind(done)

    def behind(self, length: int) -> Vector:
        """All but the first `length` bytes."""
        words, at = self.words, 0
        while at < len(words) and length >= words[at + 1]:
            length -= words[at + 1]
            at += 2
        words = words[at:]
        if length:
            words[0] += length
            words[1] -= length
        return Vector(words)

    def _call(self, call: Callable[..., int], fd: int, offset: int) -> int:
        address, words = self.words.buffer_info()
        while True:
            done = call(fd, address, min(words // 2, MOST_PIECES), offset)
            if done >= 0:
                return done
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def address_of(view: memoryview) -> int:
    """Where memory that can be written lies in this process; 0 for none."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0


class Direct:
    """Reads and writes of a file that was opened with O_DIRECT.

    The host wants pieces of memory that begin and end on borders of its blocks; what is not like
    that goes through memory of our own. Offsets and lengths are the caller's to align.
    """

    BLOCK = 512
    """What disks and file systems ask for at least (open(2), "O_DIRECT")."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._own = memoryview(mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE))

    def read(self, views: Sequence[memoryview], offset: int) -> int:
        """As `os.preadv`; it may be less than there is room for."""
        if all(map(self._is_aligned, views)):
            return os.preadv(self._fd, views, offset)
        done = os.preadv(self._fd, [self._own[: sum(map(len, views))]], offset)
        at = 0
        for view in views:
            part = min(len(view), done - at)
            view[:part] = self._own[at : at + part]
            at += part
        return done

    def write_all(self, views: Sequence[memoryview], offset: int) -> None:
        """As `write_all`."""
        if all(map(self._is_aligned, views)):
            write_all(self._fd, views, offset)
            return
        at = 0
        for view in views:
            rest = view
            while rest:
                part = min(len(rest), len(self._own) - at)
                self._own[at : at + part] = rest[:part]
                at, rest = at + part, rest[part:]
                if at == len(self._own):
                    write_all(self._fd, [self._own], offset)
                    at, offset = 0, offset + len(self._own)
        if at:
            write_all(self._fd, [self._own[:at]], offset)

    def _is_aligned(self, view: memoryview) -> bool:
        if len(view) % self.BLOCK:
            return False
        return address_of(view) % self.BLOCK == 0


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Deallocate a part of a file, which reads as zeros afterwards; False if that is not possible.

    Raises:
        OSError: the host failed.
    """
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero(fd: int, offset: int, length: int) -> None:
    """Make a part of a file zeros that are allocated; the file may become longer.

    Raises:
        OSError: the host failed.
    """
    if _fallocate(fd, _ZERO_RANGE, offset, length):
        return
    while length:
        part = min(length, len(_CHUNK))
        write_all(fd, [_CHUNK[:part]], offset)
        offset, length = offset + part, length - part


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def end_of_stream(fd: int) -> None:
    """Say to the other end of a stream socket that nothing more comes; harmless when repeated."""
    _libc.shutdown(fd, _SHUT_WR)


def hang_up(fd: int) -> None:
    """End a stream socket in both directions; the descriptor stays."""
    _libc.shutdown(fd, _SHUT_RDWR)


def release(view: memoryview) -> bool:
    """Give the whole pages of a shared mapping back to the host; they read as zeros afterwards.

    Returns:
        Whether the host could; not for memory that is no shared mapping of a file.
    """
    return bool(_libc.madvise(address_of(view), view.nbytes, _MADV_REMOVE) == 0)
