"""A scripted session with each virtio model, as a generator: it yields what the driver saw at every
step, so that two plays of it can be compared; between two steps, anything may happen to the device.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from virtio_driver import F_VERSION_1, Driver, Request
from virtio_echo import CHANGE, LATER, NOW
from virtio_rigs import Place

from devices.virtio import balloon, blk, console
from devices.virtio.p9 import messages as p9
from devices.virtio.p9.codec import encode
from devices.virtio.p9.protocol import NO_FID, VERSION
from devices.virtio.vsock import device as vsock
from devices.virtio.vsock import link
from devices.virtio.vsock.packet import (
    HEADER_SIZE,
    HOST_CID,
    NO_MORE_RECEIVED,
    NO_MORE_SENT,
    STREAM,
    Header,
    Op,
)

PATIENCE = 20.0
CID = 5
PAGE = balloon.PAGE


class World:
    """A driver, its device, and the files of that."""

    def __init__(
        self, place: Place, model: str, features: int, *, finish_work: bool = True, **options: Any
    ) -> None:
        self.files = {name: place.memory_file() for name in SESSIONS[model].files}
        if model == "9p":
            self.files["path"] = place.directory()
        elif model == "net":
            self.files["link"], self.cable = place.cable()
        elif model == "vsock":
            self.files["path"], self.cable = place.cable(socket.SOCK_SEQPACKET)
        given = {**dict.fromkeys(self.files, "file"), **SESSIONS[model].options, **options}
        self.restores = 0
        self.rig = place.make(model, given, self.files, finish_work=finish_work)
        self.driver = Driver(self.rig)
        self.ram = self.rig.ram
        self.features = features
        self.start()

    def start(self) -> None:
        wanted = F_VERSION_1 | self.features | self.driver.offered() & 0xFF_FFFF
        self.driver.start(wanted, 16)

    def ask(self, queue: int, out: Any = (), into: Any = (), **how: Any) -> tuple[Any, ...]:
        """A request, until it is done: length, content of its room, and the interrupt."""
        request = self.driver.queues[queue].send(out, into, **how)
        self.finish(queue, request)
        return request.length, request.data(self.ram), self.driver.isr()

    def finish(self, queue: int, *requests: Request) -> None:
        """Wait until these have been given back."""
        end = monotonic() + PATIENCE
        while any(request.length is None for request in requests):
            assert monotonic() < end, "the device does not answer"
            self.rig.settle()
            if not self.driver.queues[queue].collect():
                self.rig.wait()

    def restore(self) -> None:
        """Another device goes on."""
        self.rig.replace(self.rig.snapshot())
        self.restores += 1

    def content(self, name: str) -> bytes:
        return os.pread(self.files[name], 1 << 20, 0)


def _echo(world: World) -> Iterator[Any]:
    for number in range(6):
        for queue in (NOW, LATER):
            text = b"%d:%d" % (queue, number)
            yield world.ask(queue, [text[:1], text[1:]], [2, 8], indirect=bool(number % 2))
    world.driver.set_config(CHANGE, 1, 5)
    yield world.driver.isr(), world.driver.config(0, 4), world.driver.config(4, 4)


def disk_request(kind: int, sector: int = 0, data: bytes = b"") -> list[bytes]:
    return [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]


def _blk(world: World) -> Iterator[Any]:
    ask = world.ask
    yield ask(0, disk_request(blk.T_GET_ID), [blk.SERIAL_LENGTH, 1])
    for sector in (0, 5, 255):
        data = bytes([sector]) * blk.SECTOR
        yield ask(0, disk_request(blk.T_OUT, sector, data), [1])
        yield ask(1, disk_request(blk.T_FLUSH), [1])
        yield ask(1, disk_request(blk.T_IN, sector), [100, 412, 1])
    yield ask(0, disk_request(blk.T_OUT, 256, bytes(blk.SECTOR)), [1])  # beyond the end
    yield ask(0, disk_request(blk.T_IN, 0), [511, 1])  # half a sector
    yield ask(0, disk_request(99), [1])
    yield ask(0, disk_request(blk.T_OUT, 6, b"\xaa" * 2048), [1])
    yield ask(0, disk_request(blk.T_WRITE_ZEROES, 0, struct.pack("<QII", 7, 1, 1)), [1])
    yield ask(1, disk_request(blk.T_DISCARD, 0, struct.pack("<QII", 8, 1, 0)), [1])
    yield ask(1, disk_request(blk.T_FLUSH), [1])
    yield ask(0, disk_request(blk.T_IN, 5), [5 * blk.SECTOR, 1])
    yield world.content("path")


def _rng(world: World) -> Iterator[Any]:
    for room in ([1], [64], [7, 9], [1000]):
        length, data, isr = world.ask(0, [], room)
        yield length, len(data), isr
    yield world.ask(0, [], [64])[1] != world.ask(0, [], [64])[1]


def _console(world: World) -> Iterator[Any]:
    ask, rig = world.ask, world.rig

    def control(port: int, event: int) -> None:
        ask(console.CONTROL_TX, [struct.pack("<IHH", port, event, 1)])

    control(0, console.DEVICE_READY)
    yield [ask(console.CONTROL_RX, [], [32]) for _ in range(2)]
    control(0, console.PORT_READY)
    yield ask(console.CONTROL_RX, [], [32])
    control(1, console.PORT_READY)
    yield [ask(console.CONTROL_RX, [], [32]) for _ in range(4)]
    for number in range(4):
        yield ask(console.TX0, [b"line ", b"%d\n" % number])
        yield ask(console.TX1, [b"log %d\n" % number])
        yield rig.receive(b"typed %d" % number)
        yield ask(console.RX0, [], [3, 9])
    for columns, rows in ((100, 30), (100, 30), (101, 30)):
        rig.adjust(columns=columns, rows=rows)
        yield world.driver.config(0, 4)
    yield world.driver.isr()
    yield [ask(console.CONTROL_RX, [], [32]) for _ in range(2)]
    rig.receive(b"twice as much")
    yield "typed before there was room"
    yield ask(console.RX0, [], [5])
    yield ask(console.RX0, [], [50])
    yield rig.printed, world.content("log")


def _balloon(world: World) -> Iterator[Any]:
    first = 0x30_0000 // PAGE
    world.ram[first * PAGE : (first + 8) * PAGE] = b"\xee" * 8 * PAGE
    yield world.driver.config(0, 8)
    pages = b"".join(struct.pack("<I", first + n) for n in (0, 1, 2, 5))
    yield world.ask(balloon.INFLATE, [pages])
    world.driver.set_config(4, 4, 4)
    yield [world.ram[(first + n) * PAGE] for n in range(8)]
    yield world.ask(balloon.DEFLATE, [pages[:8]])
    world.rig.adjust(pages=77)
    yield world.driver.isr(), world.driver.config(0, 4)
    yield world.driver.config(4, 4)


def _net(world: World) -> Iterator[Any]:
    """Frames both ways, over a stream in which the length of each comes first."""
    yield world.driver.config(0, 4), world.driver.config(4, 2), world.driver.config(6, 2)
    for length in (14, 60, 1514):
        frame = bytes([length & 0xFF]) * length
        yield world.ask(1, [bytes(12), frame], indirect=length == 60)
        yield world.cable.recv(4 + length, socket.MSG_WAITALL)
        for arrives_first in (True, False):
            data = struct.pack(">I", length) + frame
            if arrives_first:
                world.cable.sendall(data)
                yield "on its way"
            request = world.driver.queues[0].send([], [12, 2000])
            if not arrives_first:
                world.cable.sendall(data)
            world.finish(0, request)
            yield request.length, request.data(world.ram)


def _p9(world: World) -> Iterator[Any]:
    """What an answer says of the host's own numbers (inodes, times) is left out."""
    tags = itertools.count(1)

    def ask(message: p9.Message) -> tuple[int, bytes]:
        length, data, _ = world.ask(0, [encode(message, next(tags))], [4096])
        kind, body = data[4], data[7:length]
        return kind, body if kind in (p9.Rread.number, p9.Rlerror.number) else b""

    yield ask(p9.Version(8192, VERSION))
    yield ask(p9.Attach(0, NO_FID, b"root", b"", 0))
    yield ask(p9.Walk(0, 1, (b"file",)))
    yield ask(p9.Lopen(1, os.O_RDWR))
    yield ask(p9.Read(1, 0, 100))
    yield ask(p9.Write(1, 3, b"XYZ"))
    yield ask(p9.Fsync(1, 0))
    yield ask(p9.Read(1, 1, 6))
    yield ask(p9.Walk(0, 2, (b"none",)))
    yield ask(p9.Walk(0, 2, ()))
    yield ask(p9.Lcreate(2, b"new", os.O_RDWR, 0o666, 0))
    yield ask(p9.Write(2, 0, b"of the guest"))
    yield ask(p9.Clunk(2))
    yield ask(p9.Read(2, 0, 5))
    with open(f"/proc/self/fd/{world.files['path']}/new", "rb") as file:
        yield file.read()


class _Sockets:
    """Both ends of a socket device: the guest's driver, and the machine with its programs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._restores = 0
        self._event: Request | None = None
        self.want_event()

    def want_event(self) -> None:
        self._event = self.world.driver.queues[vsock.EVENT].send([], [4])

    def told_of_reset(self) -> bool:
        """Whether an event told the driver that all connections are gone (5.10.6.7): it must have
        if the machine was restored since, and else not."""
        self.world.driver.queues[vsock.EVENT].collect()
        restored, self._restores = self.world.restores > self._restores, self.world.restores
        assert self._event is not None
        assert (self._event.length == 4) == restored
        if restored:
            assert self._event.data(self.world.ram) == bytes(4), "TRANSPORT_RESET"
            self.want_event()
        return restored

    def say(self, op: Op, guest: int, host: int, data: bytes = b"", flags: int = 0) -> None:
        header = Header(CID, HOST_CID, guest, host, len(data), STREAM, op, flags, 1 << 16, 0)
        self.world.ask(vsock.TX, [header.pack(), *([data] if data else [])])

    def hear(self) -> tuple[Header, bytes]:
        request = self.world.driver.queues[vsock.RX].send([], [HEADER_SIZE + 100])
        self.world.finish(vsock.RX, request)
        data = request.written(self.world.ram)
        return Header.unpack(data[:HEADER_SIZE]), data[HEADER_SIZE:]

    def hears(self) -> tuple[str, bytes]:
        header, data = self.hear()
        return Op(header.op).name, data

    def hand_over(self, message: bytes = link.CONNECTED) -> socket.socket:
        """Give the device one end of a stream; the program's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(PATIENCE)
        with theirs:
            theirs.setblocking(False)
            socket.send_fds(self.world.cable, [message], [theirs.fileno()])
        return ours

    def asked(self, guest: int) -> None:
        """The guest wants to connect, and the machine hears of it."""
        self.say(Op.REQUEST, guest, 80)
        assert link.asked_port(self.world.cable.recv(100)) == 80

    def connected(self, guest: int) -> socket.socket:
        self.asked(guest)
        program = self.hand_over()
        assert self.hears() == ("RESPONSE", b"")
        return program

    def visited(self, guest: int) -> tuple[socket.socket, int]:
        """A program of the host wants to connect; the device's port is its own choice."""
        program = self.hand_over(link.VISITED)
        program.sendall(b"CONNECT %d\n" % guest)
        header, _ = self.hear()
        assert (header.op, header.dst_port) == (Op.REQUEST, guest)
        return program, header.src_port

    def works(self, program: socket.socket, guest: int, host: int = 80) -> tuple[Any, ...]:
        """Bytes both ways, and the end, which the program begins."""
        with program:
            self.say(Op.RW, guest, host, b"of the guest")
            seen = [program.recv(100)]
            program.sendall(b"of the host")
            seen.append(self.hears())  # type: ignore[arg-type]
        both = NO_MORE_RECEIVED | NO_MORE_SENT
        seen.append(self.hears())  # type: ignore[arg-type]
        self.say(Op.SHUTDOWN, guest, host, flags=both)
        return (*seen, self.hears())

    def is_gone(self, program: socket.socket, guest: int, host: int = 80) -> bool:
        """Both ends find nobody there: the guest by an RST, the program by the end."""
        with program:
            self.say(Op.RW, guest, host, b"is anybody there?")
            assert self.hears() == ("RST", b"")
            while not select.select([program], [], [], 0)[0]:
                self.world.rig.wait()  # the device may not have heard yet what came too late
            with suppress(ConnectionResetError):  # if the device left something unread
                return program.recv(100) == b""
            return True


def _vsock(world: World) -> Iterator[Any]:
    """A restore ends every connection and says so; what is begun after it works."""
    sockets = _Sockets(world)
    yield world.driver.config(0, 8)
    for guest in (1000, 1001):
        yield sockets.works(sockets.connected(guest), guest)
        program, host = sockets.visited(77)
        sockets.say(Op.RESPONSE, 77, host)
        program.recv(100)
        yield sockets.works(program, 77, host)
    sockets.asked(1000)
    world.cable.send(link.answer(OSError())[0][0])
    yield sockets.hears()
    sockets.told_of_reset()

    # Across a restore, at each point of a connection's life.
    sockets.asked(1)
    yield "asked for"
    gone = sockets.told_of_reset()
    program = sockets.hand_over()
    if gone:
        assert sockets.is_gone(program, 1)
    else:
        assert sockets.hears() == ("RESPONSE", b"")
        sockets.works(program, 1)
    program, host = sockets.visited(77)
    yield "offered"
    if sockets.told_of_reset():
        assert sockets.is_gone(program, 77, host)
    else:
        sockets.say(Op.RESPONSE, 77, host)
        assert program.recv(100) == b"OK %d\n" % host
        sockets.works(program, 77, host)
    program = sockets.connected(2)
    yield "open"
    if sockets.told_of_reset():
        assert sockets.is_gone(program, 2)
    else:
        sockets.works(program, 2)
    program = sockets.connected(3)
    program.sendall(b"nobody has taken this yet")
    yield "with data on its way to the guest"
    if sockets.told_of_reset():
        assert sockets.is_gone(program, 3)
    else:
        assert sockets.hears() == ("RW", b"nobody has taken this yet")
        sockets.works(program, 3)
    program = sockets.connected(4)
    sockets.say(Op.SHUTDOWN, 4, 80, flags=NO_MORE_SENT)
    yield program.recv(100) == b"", "half closed"
    if sockets.told_of_reset():
        assert sockets.is_gone(program, 4)
    else:
        program.sendall(b"one way")
        assert sockets.hears() == ("RW", b"one way")
        program.close()
        assert sockets.hears()[0] in ("SHUTDOWN", "RST")
    yield world.driver.config(0, 8)
    sockets.told_of_reset()
    yield sockets.works(sockets.connected(1), 1)


@dataclass(frozen=True)
class Session:
    """Of one model.

    Attributes:
        alive: queue, pieces and room of a request that every such device answers.
    """

    play: Callable[[World], Iterator[Any]]
    alive: tuple[int, list[bytes], list[int]]
    options: Mapping[str, Any]
    files: tuple[str, ...] = ()


SESSIONS: dict[str, Session] = {
    "virtio-echo": Session(_echo, (NOW, [b"ab"], [2]), {}),
    "blk": Session(
        _blk, (0, disk_request(blk.T_GET_ID), [20, 1]), {"serial": "s1", "queues": 2}, ("path",)
    ),
    "rng": Session(_rng, (0, [], [8]), {}),
    "console": Session(_console, (console.TX0, [b"alive"], []), {}, ("log",)),
    "balloon": Session(_balloon, (balloon.DEFLATE, [bytes(4)], []), {"pages": 9}),
    "net": Session(_net, (1, [bytes(12), bytes(60)], []), {"link": "user"}),
    "vsock": Session(_vsock, (vsock.TX, [bytes(HEADER_SIZE)], []), {"cid": CID}),
    "9p": Session(_p9, (0, [encode(p9.Version(8192, VERSION), 1)], [21]), {}),
}
