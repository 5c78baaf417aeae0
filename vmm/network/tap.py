"""``--net tap:NAME``: a tap of the host (Linux, Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from devices.virtio.cable import HEADER
from vmm.events import EventLoop
from vmm.network.links import Log
from vmm.opening import HostFileError

TUN = "/dev/net/tun"
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
"""Linux, include/uapi/linux/if_tun.h."""
_TAP, _NO_PI, _VNET_HDR = 0x0002, 0x1000, 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _UP = 0x8913, 0x8914, 1
_REQUEST = struct.Struct("16sh22x")  # struct ifreq: name, flags


class TapEnd:
    """A descriptor of the tap, which is made for as long as this runs if it is not there.

    Raises:
        HostFileError: there are no taps here, or this one may not be had.
    """

    def __init__(self, where: str, name: str) -> None:
        there = _is_there(name)
        try:
            self.fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            mend = "load the kernel's module tun" if error.errno != errno.EACCES else "ask root"
            raise HostFileError(f"{where}: {TUN}: {error.strerror}; {mend}") from error
        try:
            request = _REQUEST.pack(name.encode(), _TAP | _NO_PI | _VNET_HDR)
            fcntl.ioctl(self.fd, TUNSETIFF, request)
            fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER.size))
            if not there:
                _bring_up(name)
        except OSError as error:
            os.close(self.fd)
            raise HostFileError(f"{where}: {_reason(error, name, there)}") from error

    def attach(self, events: EventLoop, log: Log) -> None:
        pass

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _is_there(name: str) -> bool:
    try:
        return bool(socket.if_nametoindex(name))
    except OSError:
        return False


def _reason(error: OSError, name: str, there: bool) -> str:
    if error.errno == errno.EPERM:
        mend = f"let root do: ip tuntap add dev {name} mode tap user $USER; ip link set {name} up"
        what = "this user may not have it" if there else "there is none, and only root makes one"
        return f"{what}; {mend}"
    if error.errno == errno.EBUSY:
        return "is in use by another program"
    if error.errno == errno.EINVAL and there:
        return "is a network device, but no tap of one queue"
    return str(error.strerror)


def _bring_up(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _REQUEST.pack(name.encode(), 0))
        _, flags = _REQUEST.unpack(answer)
        fcntl.ioctl(control, _SIOCSIFFLAGS, _REQUEST.pack(name.encode(), flags | _UP))
