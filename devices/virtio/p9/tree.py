"""Files beneath one directory of the host, by paths that cannot leave it.

A path is relative to that directory, b"" for itself, and has no "." or "..". It is resolved by one
system call which refuses every symbolic link on the way and everything that is not beneath the
directory (openat2(2)), so neither a link nor a rename amid a walk leads out. A last component is
only ever used together with a descriptor of its parent.

This is for a model that works as it should. What holds one that was taken over is the jail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

_OPENAT2 = 437  # on every processor
_AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW = 0x1000, 0x100
_BENEATH = 0x08 | 0x04 | 0x02
"""RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS (linux/openat2.h)."""
_STATX_BASIC_AND_BTIME = 0xFFF
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
"""Nanoseconds that mean "now" and "as it is" (utimensat(2))."""

_HOW = struct.Struct("=QQQ")
_STATX = struct.Struct("=IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII")
_STATX_SIZE = 256
_DIRENT = struct.Struct("=QqHB")
_TIMES = struct.Struct("@qqqq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_libc.futimens.argtypes = (ctypes.c_int, ctypes.c_char_p)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_GETDENTS64 = 217 if platform.machine() == "x86_64" else 61


class Time(NamedTuple):
    """Seconds since 1970 and nanoseconds."""

    seconds: int
    ns: int


class Stat(NamedTuple):
    """statx(2), as far as it matters here; `dev` and `rdev` are (major, minor)."""

    mode: int
    ino: int
    dev: tuple[int, int]
    rdev: tuple[int, int]
    links: int
    uid: int
    gid: int
    size: int
    block_size: int
    blocks: int
    atime: Time
    btime: Time
    ctime: Time
    mtime: Time


class Entry(NamedTuple):
    """One entry of a directory; `kind` is DT_* and `offset` where the next one is."""

    ino: int
    offset: int
    kind: int
    name: bytes


class Tree:
    """All that lies beneath a directory.

    Args:
        fd: of the directory; stays the caller's.

    Raises:
        OSError: this kernel (before 5.6) or this container has no openat2.

    Attributes:
        pathwise: the directory is this process's root, so a link that a path ends in cannot lead
            out either. Then what Linux does by path only (the mode of a file that cannot be opened,
            the times of a symbolic link) can be done.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pathwise = False
        try:
            os.close(self.open(b"", os.O_PATH))
        except PermissionError as error:
            # EACCES is of the directory's mode, which the guest may have made 0.
            if error.errno != errno.EACCES:
                raise

    def look_around(self) -> None:
        """Find out whether the directory is the root here; to be called once the jail is up."""
        own, root = self.stat_of(self.fd), _statx(self.fd, b"/", _AT_EMPTY_PATH)
        self.pathwise = (own.ino, own.dev) == (root.ino, root.dev)

    def open(self, path: bytes, flags: int, mode: int = 0) -> int:
        """Open a path; never follows a symbolic link, never waits for a FIFO.

        Raises:
            OSError: as open(2); ELOOP for a symbolic link, EXDEV for what is not beneath.
        """
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
        if flags & os.O_PATH:
            flags &= os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY
        else:
            flags |= os.O_NONBLOCK
        how = _HOW.pack(flags, mode if flags & os.O_CREAT else 0, _BENEATH)
        wanted = ctypes.c_char_p(path or b".")
        size = ctypes.c_long(_HOW.size)
        fd = int(_libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(self.fd), wanted, how, size))
        if fd < 0:
            raise _error()
        return fd

    @contextlib.contextmanager
    def opened(self, path: bytes, flags: int) -> Iterator[int]:
        """`open` for as long as the context lasts."""
        fd = self.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The directory that a path lies in, and its last component.

        Raises:
            OSError: EBUSY for the root, else as `open`.
        """
        if not path:
            raise OSError(errno.EBUSY, "the root of the tree")
        above, _, name = path.rpartition(b"/")
        with self.opened(above, os.O_PATH | os.O_DIRECTORY) as fd:
            yield fd, name

    def stat(self, path: bytes) -> Stat:
        """What a path is; of a symbolic link, itself."""
        with self.opened(path, os.O_PATH) as fd:
            return self.stat_of(fd)

    def stat_of(self, fd: int) -> Stat:
        """What a descriptor is of."""
        return _statx(fd, b"", _AT_EMPTY_PATH)

    def readlink(self, path: bytes) -> bytes:
        """The text of a symbolic link."""
        with self.opened(path, os.O_PATH) as fd:
            return os.readlink(b"", dir_fd=fd)

    def entries(self, fd: int, offset: int, count: int) -> list[Entry]:
        """Entries of an open directory from `offset` on, at most about `count` bytes of them.

        Raises:
            OSError: not a directory, or an offset that it does not have.
        """
        os.lseek(fd, offset, os.SEEK_SET)
        buffer = ctypes.create_string_buffer(count)
        got = _libc.syscall(
            ctypes.c_long(_GETDENTS64), ctypes.c_int(fd), buffer, ctypes.c_long(count)
        )
        if got < 0:
            raise _error()
        data, place, found = buffer.raw[:got], 0, []
        while place < got:
            ino, following, length, kind = _DIRENT.unpack_from(data, place)
            name = data[place + _DIRENT.size : place + length]
            found.append(Entry(ino, following & (1 << 64) - 1, kind, name[: name.index(b"\0")]))
            place += length
        return found

    def chmod(self, path: bytes, fd: int | None, mode: int) -> None:
        """Set permission bits, of an open file or by path."""
        if fd is not None:
            os.fchmod(fd, mode)
            return
        try:
            with self._plain(path) as own:
                os.fchmod(own, mode)
        except OSError:
            if not self.pathwise or stat.S_ISLNK(self.stat(path).mode):
                raise
            with self.parent(path) as (above, name):
                os.chmod(name, mode, dir_fd=above)

    def utimens(self, path: bytes, fd: int | None, atime: Time, mtime: Time) -> None:
        """Set times, of an open file or by path; `UTIME_NOW` and `UTIME_OMIT` as nanoseconds."""
        times = _TIMES.pack(*atime, *mtime)
        if fd is not None:
            _check(_libc.futimens(fd, times))
            return
        try:
            with self._plain(path) as own:
                _check(_libc.futimens(own, times))
        except OSError:
            if not self.pathwise:
                raise
            with self.parent(path) as (above, name):
                _check(_libc.utimensat(above, name, times, _AT_SYMLINK_NOFOLLOW))

    @contextlib.contextmanager
    def _plain(self, path: bytes) -> Iterator[int]:
        """A file or directory, open for nothing but its attributes.

        Raises:
            OSError: EOPNOTSUPP for anything else, which opening might disturb.
        """
        mode = self.stat(path).mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EOPNOTSUPP, "neither a file nor a directory")
        with self.opened(path, os.O_RDONLY) as fd:
            yield fd


def _statx(fd: int, path: bytes, flags: int) -> Stat:
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(fd, path, flags, _STATX_BASIC_AND_BTIME, buffer))
    values: tuple[Any, ...] = _STATX.unpack_from(buffer)
    _, block_size, _, links, uid, gid, mode, ino, size, blocks, _, *more = values
    times = [Time(*more[n : n + 2]) for n in (0, 2, 4, 6)]
    rdev, dev = (more[8], more[9]), (more[10], more[11])
    return Stat(mode, ino, dev, rdev, links, uid, gid, size, block_size, blocks, *times)


def _check(result: int) -> None:
    if result < 0:
        raise _error()


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
