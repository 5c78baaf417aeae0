"""How a file of the host is opened for a device, and what it must be."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from devices.errors import UserError
from devices.files import HostFile


class HostFileError(UserError):
    """A file that a device needs is not there, not what it must be, or not to be had."""


def flags_for(file: HostFile, options: object) -> int:
    """With what flags it is opened for a device with these options."""
    writable = file.may_write(options)
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a FIFO must not make us wait
    if file.output:
        return flags | os.O_WRONLY | os.O_CREAT
    flags |= os.O_RDWR if writable and not file.directory else os.O_RDONLY
    if file.direct_if and getattr(options, file.direct_if):
        flags |= os.O_DIRECT
    return flags


def _kind(path: str) -> str:
    """The kind of the file system that a file is on, as ", tmpfs,"; "" if nobody knows."""
    with contextlib.suppress(OSError):
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == wanted and "-" in fields:
                return f", {fields[fields.index('-') + 1]},"
    return ""


def open_file(path: str, file: HostFile, flags: int, where: str) -> int:
    """Open, check and lock it.

    Args:
        where: begins the message of what is wrong.

    Raises:
        HostFileError: it cannot be opened, is of the wrong kind, or in use.
    """
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    try:
        fd = os.open(path, flags, 0o644)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError) and error.errno == errno.EINVAL and flags & os.O_DIRECT:
            reason = f"its file system{_kind(path)} has no O_DIRECT; leave {file.direct_if} off"
        refused = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS)
        if refused and writable and file.read_only_if and os.access(path, os.R_OK):
            reason = f"{reason}; it can be read: give {file.read_only_if}=true"
        raise HostFileError(f"{where}: {reason}") from error
    try:
        _check(fd, file, writable, where)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(fd: int, file: HostFile, writable: bool, where: str) -> None:
    mode = os.fstat(fd).st_mode
    if file.directory:
        if not stat.S_ISDIR(mode):
            raise HostFileError(f"{where}: is not a directory")
        return
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise HostFileError(f"{where}: is neither a file nor a block device")
    if file.unit:
        # A block device has no size in its status, and files of /proc have none at all.
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        except OSError:
            raise HostFileError(f"{where}: has no size, so it is no image") from None
        if not size:
            raise HostFileError(f"{where}: is empty; make it larger, for example with truncate -s")
        if size % file.unit:
            raise HostFileError(
                f"{where}: has {size} bytes, which is no multiple of {file.unit}; "
                f"cut it or fill it up with truncate -s %{file.unit}"
            )
    # The lock is that of the open file: the device's process holds it until it ends.
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        mend = " or open both read-only" if file.read_only_if else ""
        raise HostFileError(f"{where}: is in use by another machine; end that{mend}") from error
    except OSError:
        pass  # a file system without locks


def check_rights(fd: int, writable: bool, where: str) -> None:
    """See whether a device that root starts can use a directory: it is the owner, never root."""
    about = os.fstat(fd)
    needed = stat.S_IROTH | stat.S_IXOTH | (stat.S_IWOTH if writable else 0)
    if about.st_uid == 0 and about.st_mode & needed != needed:
        mend = "share it read-only" if writable else "to all (chmod)"
        reason = "belongs to root, which a device never is; give it to a user (chown)"
        raise HostFileError(f"{where}: {reason} or {mend}")


def describe(fd: int, writable: bool) -> str:
    """A descriptor in words: what it is of, and for what."""
    rights = "read and write" if writable else "read"
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        rights = "write"
    return f"{os.readlink(f'/proc/self/fd/{fd}')}, {rights}"
