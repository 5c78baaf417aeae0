"""What the device's process cannot do itself: connect, and be connected to.

The machine does it, and both speak over a pair of packet sockets:

========= ==================================== ==========================================
direction message                              meaning
========= ==================================== ==========================================
to it     port, 4 bytes                        connect to PATH_PORT
from it   b"+", with a descriptor              the connection; answers come in order
from it   b"-" and an errno, 4 bytes           there is none
from it   b"!", with a descriptor              somebody has connected to PATH
========= ==================================== ==========================================

So a device that was taken over can be connected to PATH_PORT, of any port, and to nothing else.
All descriptors are of streams, and none of them blocks.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

_U32 = struct.Struct("<I")
_FD = struct.Struct("@i")
CONNECTED, REFUSED, VISITED = b"+", b"-", b"!"
_LONGEST = 5


class Answer(NamedTuple):
    """A message of the machine: a stream, or -1 if it refuses; `asked`: it answers `connect`."""

    fd: int
    asked: bool


class HostSide:
    """The device's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.gone = False
        """The machine will say no more."""
        # Made now: this asks the kernel what a jail does not let it ask.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)

    def connect(self, port: int) -> bool:
        """Ask for a connection to a port; False if the machine hears no more just now."""
        try:
            self._socket.send(_U32.pack(port), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def take(self) -> Answer | None:
        """What the machine says; the caller owns the descriptor. None: nothing now."""
        # Not socket.recv_fds: it forgets the flags (CPython 3.11).
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            data, rights, _, _ = self._socket.recvmsg(_LONGEST, socket.CMSG_LEN(_FD.size), flags)
        except BlockingIOError:
            return None
        except OSError:
            data, rights = b"", []
        if not data:
            self.gone = True
            return None
        fd = _FD.unpack(rights[0][2])[0] if rights else -1
        return Answer(fd, data[:1] != VISITED)

    def close(self) -> None:
        """Let go of the descriptor, which stays with its owner."""
        self._socket.detach()


def asked_port(message: bytes) -> int | None:
    """For the machine: the port of a `connect`; None if it is no such message."""
    return _U32.unpack(message)[0] if len(message) == _U32.size else None


def answer(connection: int | OSError) -> tuple[list[bytes], list[int]]:
    """For the machine: the answer to `connect`, and the descriptors that ride on it."""
    if isinstance(connection, int):
        return [CONNECTED], [connection]
    return [REFUSED + _U32.pack(connection.errno or 0)], []


def read_some(fd: int, count: int) -> bytes | None:
    """Up to `count` bytes of a stream; b"" at its end, None if there is nothing now."""
    try:
        return os.read(fd, count)
    except BlockingIOError:
        return None
    except OSError:
        return b""
