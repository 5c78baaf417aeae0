"""Socket device (5.10): stream sockets between the guest and UNIX sockets of the host.

- A program of the host connects to the socket PATH, writes ``CONNECT PORT`` and a line feed, and
  reads ``OK`` and a number: then it is connected to the guest's PORT. Or the stream just ends.
- The guest connects to PORT of CID 2: that is the socket PATH_PORT, on which a program listens.

This is what Firecracker does, so that its tools work. The machine makes the connections (`link`).

Data goes straight between sockets and guest memory, in turns; what a socket does not take waits, up
to the credit that the guest was given. A restored machine has none of the connections of its
snapshot: the guest is told so (transport reset, 5.10.6.7) and its sockets end.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from devices import host_io
from devices.contract import DeviceHost
from devices.virtio.chain import Chain, RingError
from devices.virtio.features import Status
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice
from devices.virtio.vsock.greeting import Greeting
from devices.virtio.vsock.link import HostSide
from devices.virtio.vsock.options import VsockOptions
from devices.virtio.vsock.packet import (
    HEADER_SIZE,
    HOST_CID,
    NO_MORE_RECEIVED,
    NO_MORE_SENT,
    STREAM,
    Header,
    Op,
)
from devices.virtio.vsock.stream import Phase, Stream

F_STREAM = 1 << 0
RX, TX, EVENT = 0, 1, 2
TRANSPORT_RESET = 0
FIRST_PORT, PORTS = 1 << 30, 1 << 30
"""Of the host's side of connections that the host begins."""
MOST_STREAMS = 256
MOST_REPLIES = 1024
"""Packets that wait for the guest; then it is not heard until it takes some (5.10.6.2)."""
_LONGEST_PACKET = 64 << 10
_COST = 16


class Vsock(VirtioDevice):
    model: ClassVar[str] = "vsock"
    summary: ClassVar[str] = "virtio sockets between guest and host: path=SOCKET,cid=N"
    device_type: ClassVar[int] = 19
    class_code: ClassVar[int] = 0x078000  # communication controller, other
    config_size: ClassVar[int] = 8
    queues = (Queue("receive", 128), Queue("transmit", 128), Queue("event", 16))
    in_order: ClassVar[bool] = True
    Options = VsockOptions
    options: VsockOptions

    def __init__(self, host: DeviceHost, options: VsockOptions) -> None:
        super().__init__(host, options)
        fd = host.fds.get("path")
        self._host = None if fd is None else HostSide(fd)
        self._streams: dict[tuple[int, int], Stream] = {}
        self._by_fd: dict[int, Stream] = {}
        self._asked: deque[Stream] = deque()
        """Connections that the machine was asked for and has not answered yet."""
        self._greetings: dict[int, Greeting] = {}
        """Programs of the host that have not said yet where they want to go."""
        self._replies: deque[bytes] = deque()
        self._readable: deque[Stream] = deque()
        self._next_port = FIRST_PORT
        self._held_up = False
        self._reset_due = False
        self._hung_up: list[int] = []
        self._to_close: list[int] = []

    def features(self) -> int:
        return F_STREAM

    def read_device_config(self) -> bytes:
        return struct.pack("<Q", self.options.cid)

    # Queues.

    def serve(self, queue: VirtQueue) -> None:
        if queue.index == RX:
            self._deliver(queue)
        elif queue.index == TX:
            self._hear(queue)
        elif self._reset_due:
            chain = queue.pop()
            if chain is not None:
                chain.write(struct.pack("<I", TRANSPORT_RESET))
                queue.complete(chain)
                self._reset_due = False

    def _hear(self, queue: VirtQueue) -> None:
        while True:
            self._held_up = len(self._replies) >= MOST_REPLIES
            if self._held_up:
                return
            if not self.may_serve():
                self.ring(queue)
                return
            chain = queue.pop()
            if chain is None:
                return
            self.handle(queue, chain)
            queue.complete(chain)

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if chain.size < HEADER_SIZE:
            raise RingError("a packet without header")
        header = Header.unpack(chain.read(HEADER_SIZE))
        if header.length > chain.size:
            raise RingError("a packet that is shorter than it says")
        # 5.10.6.4: what is not from this guest to this host goes nowhere.
        if (header.src_cid, header.dst_cid) == (self.options.cid, HOST_CID):
            self._packet(header, chain)

    def _deliver(self, queue: VirtQueue) -> None:
        """To the guest: what is to be said first, then data, of each connection in turn."""
        while self._replies or self._readable:
            if not self.may_serve():
                self.ring(queue)
                return
            before = queue.mark()
            chain = queue.pop()
            if chain is None:
                return
            if chain.room <= HEADER_SIZE:
                raise RingError("a receive buffer without room for data")
            if self._replies:
                chain.write(self._replies.popleft())
            elif not self._fill(chain, self._readable.popleft()):
                queue.rewind(before)
                continue
            queue.complete(chain)
            if self._held_up and len(self._replies) < MOST_REPLIES:
                self._held_up = False
                self.ring(self.virtqueues[TX])

    def _fill(self, chain: Chain, stream: Stream) -> bool:
        """One packet of a connection that seems to have something; whether there is one."""
        stream.readable = False
        room = min(chain.room - HEADER_SIZE, stream.credit, _LONGEST_PACKET)
        if self._streams.get(stream.key) is not stream or stream.deaf or not room:
            return False
        try:
            done = os.readv(stream.fd, chain.places(HEADER_SIZE, room))
        except BlockingIOError:
            return False
        except OSError:
            chain.write(stream.header(Op.RST))
            self._drop(stream)
            return True
        if not done:
            stream.ended = True
            chain.write(stream.header(Op.SHUTDOWN, flags=NO_MORE_SENT))
            return True
        self.spend(done >> _COST)
        stream.sent += done
        chain.write(stream.header(Op.RW, done))
        chain.wrote(done)
        self._mark_readable(stream)
        return True

    # What the guest says.

    def _packet(self, header: Header, chain: Chain) -> None:
        stream = self._streams.get((header.src_port, header.dst_port))
        if header.type != STREAM:
            self._refuse(header)
        elif stream is None:
            if header.op == Op.REQUEST:
                self._requested(header)
            elif header.op != Op.RST:
                self._refuse(header)
        else:
            stream.hear(header)
            self._of_stream(stream, header, chain)

    def _requested(self, header: Header) -> None:
        stream = self._stream(header.src_port, header.dst_port, Phase.ASKED, -1)
        stream.hear(header)
        full = len(self._streams) + len(self._greetings) >= MOST_STREAMS
        if self._host is None or full or not self._host.connect(stream.host_port):
            self._say(stream, Op.RST)
            return
        self._asked.append(stream)
        self._streams[stream.key] = stream

    def _of_stream(self, stream: Stream, header: Header, chain: Chain) -> None:
        try:
            match header.op:
                case Op.RST:
                    self._drop(stream)
                case Op.RESPONSE if stream.phase is Phase.OFFERED:
                    os.write(stream.fd, b"OK %d\n" % stream.host_port)
                    stream.phase = Phase.OPEN
                case Op.CREDIT_UPDATE:
                    pass
                case Op.CREDIT_REQUEST:
                    self._say(stream, Op.CREDIT_UPDATE)
                case Op.RW if stream.phase is Phase.OPEN and not stream.finished:
                    self.spend(header.length >> _COST)
                    if not stream.take(chain.sources(header.length), header.length):
                        self._abort(stream)
                    elif stream.owes_credit:
                        self._say(stream, Op.CREDIT_UPDATE)
                case Op.SHUTDOWN:
                    stream.deaf |= bool(header.flags & NO_MORE_RECEIVED)
                    stream.finished |= bool(header.flags & NO_MORE_SENT)
                    self._shut(stream)
                case _:
                    self._abort(stream)
        except OSError:
            self._abort(stream)  # the host's program is gone

    def _shut(self, stream: Stream) -> None:
        if stream.over or stream.phase is not Phase.OPEN:
            self._abort(stream)  # 5.10.6.6: that ends it
        else:
            stream.finish()

    # Connections.

    def _stream(self, guest_port: int, host_port: int, phase: Phase, fd: int) -> Stream:
        return Stream(self.options.cid, guest_port, host_port, phase, fd)

    def _say(self, stream: Stream, op: Op) -> None:
        self._replies.append(stream.header(op))
        self.ring(self.virtqueues[RX])

    def _refuse(self, header: Header) -> None:
        """5.10.6.4: the answer to a packet of no connection."""
        self._say(self._stream(header.src_port, header.dst_port, Phase.OPEN, -1), Op.RST)

    def _abort(self, stream: Stream) -> None:
        self._say(stream, Op.RST)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self._streams.pop(stream.key, None)
        if stream.fd >= 0:
            del self._by_fd[stream.fd]
            self._let_go(stream.fd)

    def _drop_all(self) -> None:
        for stream in list(self._streams.values()):
            self._drop(stream)
        for fd in list(self._greetings):
            self._let_go(fd)
        self._greetings.clear()
        self._replies.clear()
        self._readable.clear()
        self._held_up = False

    def _mark_readable(self, stream: Stream) -> None:
        if stream.listens:
            stream.readable = True
            self._readable.append(stream)
            self.ring(self.virtqueues[RX])

    def _let_go(self, fd: int) -> None:
        """End a connection; its descriptor is closed once nobody can be waiting for it."""
        host_io.hang_up(fd)
        self._hung_up.append(fd)

    def _close_old(self) -> None:
        for fd in self._to_close:
            os.close(fd)
        self._to_close, self._hung_up = self._hung_up, []

    # The host.

    def watched(self) -> Sequence[int]:
        # What was let go since the last time is not among them any more; by the next time the loop
        # has seen that. A number that was free before would be taken by another connection, and
        # the loop would not see the difference.
        self._close_old()
        fds = list(self._greetings)
        if self._host is not None and not self._host.gone:
            fds.append(self._host.fd)
        if self.live:
            fds += [stream.fd for stream in self._by_fd.values() if stream.listens]
        return fds

    def full(self) -> Sequence[int]:
        return [stream.fd for stream in self._by_fd.values() if stream.waits_for_room]

    def ready(self, fd: int) -> None:
        stream = self._by_fd.get(fd)
        if stream is not None:
            self._stream_ready(stream)
        elif fd in self._greetings:
            self._greeted(fd)
        elif self._host is not None and fd == self._host.fd:
            self._machine_says(self._host)

    def _stream_ready(self, stream: Stream) -> None:
        try:
            stream.push()
            if stream.over:
                self._abort(stream)
                return
            stream.finish()
        except OSError:
            self._abort(stream)
            return
        if stream.owes_credit:
            self._say(stream, Op.CREDIT_UPDATE)
        self._mark_readable(stream)

    def _machine_says(self, host: HostSide) -> None:
        answer = host.take()
        if answer is None:
            return
        if not answer.asked:
            if answer.fd < 0:
                return  # it came, but this process can have no more descriptors
            full = len(self._streams) + len(self._greetings) >= MOST_STREAMS
            if full or not self.live:
                self._let_go(answer.fd)
            else:
                self._greetings[answer.fd] = Greeting()
            return
        stream = self._asked.popleft() if self._asked else None
        if stream is None or self._streams.get(stream.key) is not stream:
            if answer.fd >= 0:
                self._let_go(answer.fd)  # the guest does not want it any more
        elif answer.fd < 0:
            self._abort(stream)
        else:
            stream.fd, stream.phase = answer.fd, Phase.OPEN
            self._by_fd[answer.fd] = stream
            self._say(stream, Op.RESPONSE)

    def _greeted(self, fd: int) -> None:
        """A program of the host says where it wants to go."""
        greeting = self._greetings[fd]
        greeting.hear(fd)
        if not greeting.over:
            return
        del self._greetings[fd]
        port = greeting.port
        if port is None or not self.live:
            self._let_go(fd)
            return
        while (port, self._next_port) in self._streams:
            self._step_port()
        stream = self._stream(port, self._next_port, Phase.OFFERED, fd)
        self._step_port()
        self._streams[stream.key] = self._by_fd[fd] = stream
        self._say(stream, Op.REQUEST)

    def _step_port(self) -> None:
        self._next_port = FIRST_PORT + (self._next_port + 1 - FIRST_PORT) % PORTS

    # Its life.

    def device_reset(self) -> None:
        self._drop_all()
        self._reset_due = False

    def close(self) -> None:
        self._drop_all()
        self._close_old()
        self._close_old()
        if self._host is not None:
            self._host.close()
            self._host = None

    def restored(self) -> None:
        super().restored()
        self._drop_all()
        # Whether there were connections is the driver's to know.
        self._reset_due = bool(self.state.status & Status.DRIVER_OK)
