"""Linux with sockets to its host, over its own driver; its programs are socat's."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest
from linux_guests import MAKE_IT, find_guest
from test_linux import Shell, options

from vmm.machine import Machine
from vmm.outcome import Ending

GUEST = find_guest(b"vmw_vsock_virtio_transport.ko", b"bin/socat")
pytestmark = [
    pytest.mark.skipif(GUEST is None, reason=f"NO LINUX WITH VSOCK AND SOCAT: {MAKE_IT}"),
    pytest.mark.timeout(400),
]
EITHER_WAY = pytest.mark.parametrize("isolated", [False, True], ids=["in-process", "jailed"])
SIZE = 8 << 20


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "v"


@contextmanager
def linux(path: Path, isolated: bool) -> Iterator[Shell]:
    with Machine(memory="256M") as machine:
        machine.add_device("vsock", isolated=isolated, path=str(path), cid=42)
        assert GUEST is not None
        machine.boot(GUEST / "vmlinuz", options("quiet", directory=GUEST))
        shell = Shell(machine)
        shell.wait()
        yield shell


@pytest.fixture(scope="module", params=[False, True], ids=["in-process", "jailed"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Shell]]:
    """A guest for all tests that are content with ports of their own; see `linux`."""
    path = tmp_path_factory.mktemp("s") / "v"
    with linux(path, request.param) as shell:
        yield path, shell


class Program(threading.Thread):
    """A program of the host."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.result = error

    def wait(self) -> object:
        self.join(60)
        assert not self.is_alive()
        return self.result


def serving(path: Path, port: int, work: Callable[[socket.socket], object]) -> Program:
    """A program that listens for the guest on a port."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}_{port}")
    server.listen()
    server.settimeout(200)

    def serve() -> object:
        with server:
            stream, _ = server.accept()
        with stream:
            stream.settimeout(200)
            return work(stream)

    return Program(serve)


def read_all(stream: socket.socket) -> bytes:
    with stream.makefile("rb") as file:
        return file.read()


def connect(path: Path, port: int) -> socket.socket:
    """As a program of the host does."""
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(200)
    stream.connect(str(path))
    stream.sendall(b"CONNECT %d\n" % port)
    line = b""
    while not line.endswith(b"\n"):
        more = stream.recv(1)
        if not more:
            raise ConnectionRefusedError
        line += more
    assert re.fullmatch(rb"OK [0-9]+\n", line)
    return stream


def connect_soon(path: Path, port: int) -> socket.socket:
    """To a program of the guest that may not listen yet."""
    end = monotonic() + 60
    while True:
        try:
            return connect(path, port)
        except ConnectionRefusedError:
            if monotonic() > end:
                raise
            sleep(0.1)


def test_there_and_back(shared: tuple[Path, Shell]) -> None:
    path, shell = shared
    data = os.urandom(SIZE)
    sender = serving(path, 1, lambda stream: stream.sendall(data))
    receiver = serving(path, 2, read_all)
    shell.ask("socat -u VSOCK-CONNECT:2:1 CREATE:/got")
    assert sender.wait() is None
    assert hashlib.sha256(data).hexdigest() in shell.ask("sha256sum /got")
    shell.ask("socat -u OPEN:/got VSOCK-CONNECT:2:2")
    assert receiver.wait() == data
    assert "reset by peer" in shell.ask("socat - VSOCK-CONNECT:2:3 </dev/null")
    echo = serving(path, 4, lambda stream: stream.sendall(read_all(stream)))
    assert "half-closed" in shell.ask("echo half-cl_sed | tr _ o | socat -t9 - VSOCK-CONNECT:2:4")
    assert echo.wait() is None


def test_programs_of_the_host_connect(shared: tuple[Path, Shell]) -> None:
    path, shell = shared

    def talk(number: int) -> bool:
        data = os.urandom(100_000 + number)
        with connect_soon(path, 99) as stream:
            sender = Program(lambda: (stream.sendall(data), stream.shutdown(socket.SHUT_WR)))
            got = read_all(stream)
            sender.wait()
            return got == data

    machine = shell.machine
    shell.ask("socat VSOCK-LISTEN:99,fork EXEC:cat &")
    talkers = [Program(lambda n=n: talk(n)) for n in range(6)]  # type: ignore[misc]
    refused = Program(lambda: connect(path, 98))
    while any(each.is_alive() for each in (*talkers, refused)):
        assert machine.run(timeout=0.2).ending is Ending.TIMEOUT
    assert [each.wait() for each in talkers] == [True] * 6
    assert isinstance(refused.wait(), ConnectionRefusedError)


@EITHER_WAY
def test_a_restore_ends_connections(path: Path, tmp_path: Path, isolated: bool) -> None:
    came = threading.Event()
    over = threading.Event()

    def hold(stream: socket.socket) -> None:
        stream.sendall(b"before\n")
        came.set()
        over.wait(200)

    with linux(path, isolated) as shell:
        machine = shell.machine
        holder = serving(path, 1, hold)
        machine.send("socat VSOCK-CONNECT:2:1 -; echo ended with $?\r")
        outcome = machine.run(until=b"before\r", timeout=100)
        assert outcome.ending is Ending.PAUSED, outcome
        machine.snapshot(tmp_path / "saved")
    over.set()
    holder.wait()
    os.unlink(f"{path}_1")
    with Machine.restore(tmp_path / "saved") as machine:
        shell = Shell(machine)
        assert "ended with" in shell.wait()
        again = serving(path, 1, lambda stream: stream.sendall(b"once more\n"))
        assert "once more" in shell.ask("socat -u VSOCK-CONNECT:2:1 -")
        again.wait()
        shell.ask("(sleep 1; echo from the guest) | socat -u - VSOCK-LISTEN:7 &")
        guest = Program(lambda: read_all(connect_soon(path, 7)))
        while guest.is_alive():
            machine.run(timeout=0.2)
        assert guest.wait() == b"from the guest\n"
