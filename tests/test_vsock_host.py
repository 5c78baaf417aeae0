"""The machine's side of a socket device: what it connects, and what a hostile device gets."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_rig import event_loop, run_until
from proxy_helpers import open_descriptors
from taken_over import Own, TakenOver, Takeover, Verdict, assert_caught, assert_stopped, takeover

from devices.contract import DeviceHost
from devices.virtio.vsock.link import Answer, HostSide
from proxy.jail.escape import ATTEMPTS, Attempt
from vmm.events import EventLoop
from vmm.network.sockets import SocketsEnd
from vmm.opening import HostFileError


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with event_loop() as made:
        yield made


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, as paths of sockets must be."""
    return tmp_path_factory.mktemp("s") / "v"


class Side:
    """The machine's end, and the device's."""

    def __init__(self, path: Path, loop: EventLoop) -> None:
        self.loop = loop
        self.lines: list[str] = []
        self.end = SocketsEnd("here", str(path))
        self.end.attach(loop, self.lines.append)
        self.device = HostSide(self.end.fd)

    def answer(self) -> Answer:
        found: list[Answer] = []

        def look() -> bool:
            answer = self.device.take()
            if answer is not None:
                found.append(answer)
            return bool(found)

        run_until(self.loop, look)
        return found[0]

    def close(self) -> None:
        self.device.close()
        self.end.close()


@pytest.fixture
def side(path: Path, loop: EventLoop) -> Iterator[Side]:
    made = Side(path, loop)
    yield made
    made.close()


def listen(path: Path, port: int, backlog: int = 8) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}_{port}")
    server.listen(backlog)
    return server


def test_connections_to_a_port(side: Side, path: Path) -> None:
    with listen(path, 0xFFFF_FFFF) as server:
        assert side.device.connect(0xFFFF_FFFF)
        assert side.device.connect(7)
        answer = side.answer()
        assert answer.asked
        assert not os.get_blocking(answer.fd)
        program, _ = server.accept()
        with program:
            os.write(answer.fd, b"x")
            assert program.recv(9) == b"x"
        os.close(answer.fd)
        assert side.answer() == Answer(-1, True)  # nobody listens on 7


def test_a_full_backlog_does_not_hold_up_the_machine(side: Side, path: Path) -> None:
    with listen(path, 1, backlog=0):
        for _ in range(4):
            side.device.connect(1)
        answers = [side.answer() for _ in range(4)]
        assert answers[0].fd >= 0
        assert answers[-1].fd == -1
        for each in answers:
            if each.fd >= 0:
                os.close(each.fd)


def test_programs_that_connect(side: Side, path: Path) -> None:
    programs = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for number, program in enumerate(programs):
        program.connect(str(path))
        program.send(b"%d" % number)
    for number in range(20):
        answer = side.answer()
        assert not answer.asked
        assert not os.get_blocking(answer.fd)
        assert os.read(answer.fd, 9) == b"%d" % number
        os.close(answer.fd)
    for program in programs:
        program.close()


# The path.


def test_it_is_there_while_the_machine_is(path: Path, loop: EventLoop) -> None:
    before = open_descriptors()
    side = Side(path, loop)
    assert stat.S_ISSOCK(path.stat().st_mode)
    with pytest.raises(HostFileError, match="here: is there already"):
        SocketsEnd("here", str(path))
    side.close()
    side.end.close()
    assert not path.exists()
    assert open_descriptors() == before


def test_one_that_was_left_behind_is_replaced(path: Path, loop: EventLoop) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    side = Side(path, loop)
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(path))
    # Of another who came later nothing is taken away.
    path.unlink()
    path.touch()
    side.close()
    assert path.exists()


def test_a_file_is_not_replaced(path: Path) -> None:
    before = open_descriptors()
    path.write_text("precious")
    with pytest.raises(HostFileError, match="is there already"):
        SocketsEnd("here", str(path))
    assert path.read_text() == "precious"
    with pytest.raises(HostFileError, match="No such file"):
        SocketsEnd("here", str(path.parent / "none" / "x"))
    assert open_descriptors() == before


# A hostile device.


@pytest.mark.parametrize("message", [b"x", b"xyz", b"abcde", b"12345678", b"x" * 5000])
def test_nonsense_is_said_once_and_no_more_is_heard(side: Side, path: Path, message: bytes) -> None:
    with listen(path, 5) as server:
        server.setblocking(False)
        device = side.device._socket
        device.send(message)
        side.device.connect(5)
        run_until(side.loop, lambda: bool(side.lines))
        for _ in range(5):
            side.loop.poll(0)
        assert len(side.lines) == 1
        with pytest.raises(BlockingIOError):
            server.accept()
        # What the host begins is not the device's to end.
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(path))
            answer = side.answer()
            assert not answer.asked
            os.close(answer.fd)


def test_requests_without_end_leave_the_machine_time(side: Side, path: Path) -> None:
    count = 0
    while side.device.connect(count):
        count += 1
    assert count > 20
    side.loop.poll(0.05)  # hears some of them, and then lets go
    got = 0
    while side.device.take() is not None:
        got += 1
    assert 0 < got < count
    for _ in range(count - got):
        assert side.answer() == Answer(-1, True)


def test_who_does_not_take_connections_loses_them(side: Side, path: Path) -> None:
    programs = []
    before = len(open_descriptors())
    for _ in range(40):
        program = socket.socket(socket.AF_UNIX)
        program.connect(str(path))
        programs.append(program)
        side.loop.poll(0)
    for _ in range(40):
        side.loop.poll(0)
    assert len(open_descriptors()) == before + 40  # the machine holds none
    for program in programs:
        program.close()


def _connect_elsewhere(host: DeviceHost) -> str:
    """By what it was given: a stream that it may connect once more, elsewhere."""
    address = struct.pack("=H108s", socket.AF_UNIX, b"/run/secret")
    if ctypes.CDLL(None, use_errno=True).connect(host.fds["path"], address, 110):
        raise OSError(ctypes.get_errno(), "connect")
    return "connected"


class Sockets(TakenOver):
    own = (_connect_elsewhere,)


@pytest.fixture(scope="module")
def devices() -> Iterator[Takeover]:
    with takeover(Sockets, "vsock") as made:
        yield made


def attempt(devices: Takeover, what: Attempt | Own) -> Verdict:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        return devices.attempt(what, {"path": theirs.fileno()})


@pytest.mark.parametrize("tried", ATTEMPTS, ids=lambda each: each.name)
def test_no_way_out_is_open(devices: Takeover, tried: Attempt) -> None:
    assert_stopped(tried, attempt(devices, tried))


def test_it_connects_nothing_itself(devices: Takeover) -> None:
    assert_caught(attempt(devices, _connect_elsewhere), "connect")
