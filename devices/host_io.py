"""System calls on descriptors and memory that Python's `os` does not have."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
"""Linux, include/uapi/linux/falloc.h."""
_MADV_REMOVE = 9
"""Linux, include/uapi/asm-generic/mman-common.h: free the pages of a shared mapping's file."""
_SHUT_WR, _SHUT_RDWR = 1, 2
"""Linux, include/linux/net.h."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_CHUNK = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
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


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Deallocate a part of a file, which reads as zeros afterwards; False if that is not possible.

    Raises:
        OSError: the host failed.
    """
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero(fd: int, offset: int, length: int) -> None:
    """Make a part of a file zeros that are allocated.

    Raises:
        OSError: the host failed.
    """
    if _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length):
        return
    while length:
        part = min(length, len(_CHUNK))
        write_all(fd, [memoryview(_CHUNK)[:part]], offset)
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
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return bool(_libc.madvise(address, view.nbytes, _MADV_REMOVE) == 0)
