"""``--net pair:NAME``: a cable between two machines of the same user on this host.

Each of the two sits on one of two seats, abstract UNIX sockets (unix(7)) that nobody else can have
at the same time and that vanish with their owner. Whoever comes connects to the other seat; over
that connection the machine on the first seat gives the other one end of a new cable, a socket pair
of packets, and both plug it into their device's jack. The connection stays for as long as both
are there, so that each machine knows when it is alone; then the other may come again, on
whichever seat is free. The device sees its cable end by itself.

Frames go straight from device to device. The machines never touch one.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress

from vmm.events import EventLoop
from vmm.network.links import Log
from vmm.opening import HostFileError

_CABLE = b"c"
_SOCKET_BUFFER = 4 << 20
_MOST_CONNECTIONS = 4
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class PairEnd:
    """A seat, and the jack of the device.

    Raises:
        HostFileError: both seats are taken.
    """

    def __init__(self, where: str, name: str) -> None:
        self._name = name
        self._seat = _seat(where, name)
        self._first = self._seat.getsockname() == _address(name, 1)
        self._jack, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._jack.setblocking(False)
        device.setblocking(False)
        self._device = device
        self.fd = device.fileno()
        self._connections: list[socket.socket] = []
        """The first is that of the cable, if there is one."""
        self._events: EventLoop | None = None
        self._log: Log = lambda text: None
        self.connected = False
        """Whether a cable is plugged in."""

    def attach(self, events: EventLoop, log: Log) -> None:
        self._events, self._log = events, log
        events.add(self._seat.fileno(), self._visited)
        other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other.setblocking(False)
        try:
            other.connect(_address(self._name, 2 if self._first else 1))
        except OSError:
            other.close()  # nobody there: they will come to us
        else:
            self._meet(other)

    def _visited(self) -> None:
        try:
            connection, _ = self._seat.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._meet(connection)

    def _meet(self, connection: socket.socket) -> None:
        """Somebody is at the other end of `connection`."""
        assert self._events is not None
        if _user_of(connection) != os.geteuid():
            self._log(f"link pair:{self._name}: another user wants to be connected; refused")
            connection.close()
            return
        for each in list(self._connections):
            self._hear(each)  # one whose end is known already makes room
        taken = self._first and self.connected
        if taken or len(self._connections) >= _MOST_CONNECTIONS:
            connection.close()  # we met before, or this is a stranger
            return
        self._connections.append(connection)
        self._events.add(connection.fileno(), lambda: self._hear(connection))
        if self._first:
            self._make_cable(connection)

    def _make_cable(self, connection: socket.socket) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            try:
                socket.send_fds(connection, [_CABLE], [theirs.fileno()])
            except OSError:
                self._part(connection)
            else:
                self._plug(ours.fileno(), connection)

    def _hear(self, connection: socket.socket) -> None:
        """A cable came over a connection, or its other end is gone."""
        if connection not in self._connections:
            return
        try:
            data, fds, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        try:
            if data == _CABLE and len(fds) == 1 and not (self._first or self.connected):
                self._plug(fds[0], connection)
            else:
                self._part(connection)
        finally:
            for fd in fds:
                os.close(fd)

    def _plug(self, cable: int, connection: socket.socket) -> None:
        try:
            socket.send_fds(self._jack, [_CABLE], [cable])
        except OSError:  # the device is gone, or takes nothing
            self._part(connection)
            return
        self._connections.remove(connection)
        self._connections.insert(0, connection)
        self.connected = True
        self._log(f"link pair:{self._name}: connected")

    def _part(self, connection: socket.socket) -> None:
        assert self._events is not None
        self._events.remove(connection.fileno())
        if self.connected and connection is self._connections[0]:
            self.connected = False
        self._connections.remove(connection)
        connection.close()

    def close(self) -> None:
        for each in (self._seat, self._jack, self._device, *self._connections):
            if self._events is not None and each.fileno() >= 0:
                self._events.remove(each.fileno())
            each.close()
        self._connections.clear()


def _seat(where: str, name: str) -> socket.socket:
    """The first seat that is free."""
    for number in (1, 2):
        seat = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            seat.bind(_address(name, number))
        except OSError as error:
            seat.close()
            if error.errno != errno.EADDRINUSE:
                raise HostFileError(f"{where}: {error.strerror}") from error
            continue
        seat.setblocking(False)
        seat.listen(_MOST_CONNECTIONS)
        return seat
    raise HostFileError(
        f"{where}: two machines are connected by '{name}' already; end one or take another name"
    )


def _address(name: str, seat: int) -> bytes:
    return f"\0vmm-net/{os.geteuid()}/{name}/{seat}".encode()


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end."""
    with suppress(OSError):
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(data)[1])
    return -1
