"""A vsock device under test: the driver's side in Python, and the machine's side by hand."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from virtio_driver import F_VERSION_1, Driver, LocalRig, Request

from devices.virtio.vsock import link
from devices.virtio.vsock.device import EVENT, RX, TX, Vsock
from devices.virtio.vsock.packet import HEADER_SIZE, HOST_CID, STREAM, Header, Op

CID = 5
ROOM = 1 << 16
"""What the driver says that it has room for."""


class Guest:
    """The driver, with `buffers` receive buffers of `size` bytes."""

    def __init__(self, buffers: int = 16, size: int = 4096, features: int = 0) -> None:
        self.machine, self._device_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.machine.setblocking(False)
        fd = self._device_end.fileno()
        self.rig = LocalRig(Vsock, {"path": "x", "cid": CID}, {"path": fd})
        self.driver = Driver(self.rig)
        self.size = size
        self.start(buffers, features)

    def start(self, buffers: int = 16, features: int = 0) -> None:
        self.driver.start(F_VERSION_1 | 1 | features, 64)
        self.received: list[tuple[Header, bytes]] = []
        self.events: list[bytes] = []
        self.give(buffers)
        self.driver.queues[EVENT].send([], [4])

    @property
    def device(self) -> Any:
        return self.rig.device

    def close(self) -> None:
        self.device.close()
        self.machine.close()
        self._device_end.close()

    def give(self, buffers: int) -> None:
        for _ in range(buffers):
            self.driver.queues[RX].send([], [HEADER_SIZE + self.size])

    def look(self) -> None:
        """What a child's loop does between commands, and then the driver."""
        for _ in range(20):
            watched, full = list(self.device.watched()), list(self.device.full())
            ready = [fd for fd in watched if _is_readable(fd)]
            ready += [fd for fd in full if _is_writable(fd) and fd not in ready]
            for fd in ready:
                self.device.ready(fd)
            self.rig.settle()
            if not self.driver.queues:
                return
            done = self.driver.queues[RX].collect()
            for request in done:
                self._receive(request)
            for request in self.driver.queues[EVENT].collect():
                self.events.append(request.written(self.driver.ram))
                self.driver.queues[EVENT].send([], [4])
            if not ready and not done:
                return

    def _receive(self, request: Request) -> None:
        data = request.written(self.driver.ram)
        header = Header.unpack(data[:HEADER_SIZE])
        assert (header.src_cid, header.dst_cid, header.type) == (HOST_CID, CID, STREAM)
        assert header.length == len(data) - HEADER_SIZE
        self.received.append((header, data[HEADER_SIZE:]))
        self.give(1)

    def send(
        self,
        op: int,
        guest: int = 1000,
        host: int = 2000,
        data: bytes = b"",
        *,
        flags: int = 0,
        room: int = ROOM,
        taken: int = 0,
        kind: int = STREAM,
        cids: tuple[int, int] = (CID, HOST_CID),
        length: int | None = None,
    ) -> None:
        count = len(data) if length is None else length
        header = Header(*cids, guest, host, count, kind, op, flags, room, taken & 0xFFFF_FFFF)
        parts = [header.pack()] + ([data] if data else [])
        self.driver.queues[TX].send(parts)
        self.look()
        self.driver.queues[TX].collect()

    def take(self) -> list[tuple[str, bytes]]:
        """What came since the last time: operations and data."""
        self.look()
        found = [(Op(header.op).name, data) for header, data in self.received]
        self.received.clear()
        return found

    # The machine.

    def asked(self) -> int | None:
        """The port that the machine is asked to connect to."""
        try:
            message = self.machine.recv(100)
        except BlockingIOError:
            return None
        return link.asked_port(message)

    def grant(self) -> socket.socket:
        """Give the device a connection; the other end of it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        with theirs:
            socket.send_fds(self.machine, *link.answer(theirs.fileno()))
        self.look()
        return ours

    def visit(self) -> socket.socket:
        """A program of the host connects to the socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        with theirs:
            socket.send_fds(self.machine, [link.VISITED], [theirs.fileno()])
        self.look()
        return ours

    def connected(self, guest: int = 1000, host: int = 2000, **more: Any) -> socket.socket:
        """A connection that the guest began."""
        self.send(Op.REQUEST, guest, host, **more)
        assert self.asked() == host
        ours = self.grant()
        assert self.take() == [("RESPONSE", b"")]
        return ours


@contextmanager
def guest(**how: Any) -> Iterator[Guest]:
    made = Guest(**how)
    try:
        yield made
    finally:
        made.close()


def read_now(stream: socket.socket, count: int = 1 << 20) -> bytes | None:
    """What is there; None: nothing, b"": the end."""
    try:
        return stream.recv(count)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""  # ended with something unread


def read_until(guest: Guest, stream: socket.socket, count: int) -> bytes:
    data = b""
    end = monotonic() + 20
    while len(data) < count and monotonic() < end:
        data += read_now(stream) or b""
        guest.look()
    return data


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
