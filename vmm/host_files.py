"""Opening the files that devices' options name: see `devices.files`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from devices import registry
from devices.contract import Device
from devices.errors import UserError
from devices.files import HostFile, host_files
from proxy.tube import close_all
from vmm.config import DeviceConfig


class HostFileError(UserError):
    """A file that a device needs is not there, not what it must be, or not to be had."""


def open_files(device: DeviceConfig, kind: type[Device]) -> dict[str, int]:
    """The descriptors for a device, by option; the caller owns them.

    Raises:
        HostFileError: one cannot be opened, is of the wrong kind, or is in use by somebody else.
    """
    wanted = host_files(kind.Options)
    if not wanted:
        return {}
    options = registry.parse_options(kind, device.options)
    opened: dict[str, int] = {}
    try:
        for name, file in wanted.items():
            path = getattr(options, name)
            if path:
                where = f"device '{device.name}': {name.replace('_', '-')}={path}"
                opened[name] = _open(path, file, options, where)
    except BaseException:
        close_all(list(opened.values()))
        raise
    return opened


def _open(path: str, file: HostFile, options: object, where: str) -> int:
    writable = file.writable and not (file.read_only_if and getattr(options, file.read_only_if))
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a FIFO must not make us wait
    flags |= os.O_RDWR if writable and not file.directory else os.O_RDONLY
    if file.direct_if and getattr(options, file.direct_if):
        flags |= os.O_DIRECT
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError) and error.errno == errno.EINVAL and flags & os.O_DIRECT:
            reason = f"this file system has no O_DIRECT; leave {file.direct_if} off"
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
        # A block device has no size in its status.
        size = os.lseek(fd, 0, os.SEEK_END)
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
