"""A cable between two machines: who gets one, who comes and goes, who is refused."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_rig import event_loop, received, run_until
from proxy_helpers import open_descriptors

from devices.errors import UserError
from devices.virtio.cable import PLAIN, Cut, Jack, PacketCable
from vmm.events import EventLoop
from vmm.machine import Machine
from vmm.network import pair
from vmm.network.pair import PairEnd
from vmm.opening import HostFileError

FRAME = PLAIN + bytes(range(64))


class Side:
    """A machine's end of a pair, and what its device does with the jack."""

    def __init__(self, name: str, loop: EventLoop) -> None:
        self.end = PairEnd("here", name)
        self.jack = Jack(os.dup(self.end.fd))
        self.cable: PacketCable | None = None
        self.lines: list[str] = []
        self.end.attach(loop, self.lines.append)

    def look(self) -> bool:
        """Take the cable that came, let go of one that is cut; whether there is one."""
        new = self.jack.take()
        if new is not None:
            self._drop()
            self.cable = new
        if self.cable is not None:
            try:
                while self.cable.receive():
                    pass
            except Cut:
                self._drop()
        return self.cable is not None

    def _drop(self) -> None:
        if self.cable is not None:
            os.close(self.cable.fd)
        self.cable = None

    def leave(self) -> None:
        self._drop()
        self.jack.close()
        os.close(self.jack.fd)
        self.end.close()


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with event_loop() as made:
        yield made


def connected(*sides: Side) -> bool:
    looks = [side.look() for side in sides]  # of each
    return all(looks)


def check(loop: EventLoop, one: Side, other: Side) -> None:
    """They find each other, and frames go both ways."""

    def works() -> bool:
        # A cable may still be replaced by the one that counts, until both have heard all.
        if not connected(one, other) or loop.poll(0.02):
            return False
        assert one.cable is not None
        assert other.cable is not None
        return connected(one, other) and one.cable.send(PLAIN, FRAME)

    run_until(loop, works)
    assert other.cable is not None
    assert received(other.cable.fd) == PLAIN + FRAME
    assert other.cable.send(PLAIN, FRAME)
    assert one.cable is not None
    assert received(one.cable.fd) == PLAIN + FRAME


def test_two_meet_and_a_third_is_refused(name: str, loop: EventLoop) -> None:
    before = open_descriptors()
    one, other = Side(name, loop), Side(name, loop)
    check(loop, one, other)
    with pytest.raises(HostFileError, match=f"here: two machines are connected by '{name}'"):
        PairEnd("here", name)
    assert one.lines == other.lines == [f"link pair:{name}: connected"]
    for side in (one, other):
        side.leave()
    assert open_descriptors() == before


def test_one_alone_has_no_link_and_waits(name: str, loop: EventLoop) -> None:
    one = Side(name, loop)
    loop.poll(0.02)
    assert not one.look()
    other = Side(name, loop)
    check(loop, one, other)
    one.leave()
    run_until(loop, lambda: not other.look())
    other.leave()


@pytest.mark.parametrize("seed", range(8))
def test_they_come_and_go(name: str, loop: EventLoop, seed: int) -> None:
    """Whoever leaves, in whatever order: those who are there are connected again."""
    chance = random.Random(seed)
    before = open_descriptors()
    sides: list[Side] = [Side(name, loop), Side(name, loop)]
    for _ in range(12):
        check(loop, *sides)
        gone = chance.randrange(2)
        sides.pop(gone).leave()
        if chance.random() < 0.5:
            run_until(loop, lambda: not sides[0].look())
        if chance.random() < 0.3:
            sides.pop().leave()
            sides.append(Side(name, loop))
        for _ in range(chance.randrange(4)):
            loop.poll(0)
        sides.insert(chance.randrange(2), Side(name, loop))
    for side in sides:
        side.leave()
    assert open_descriptors() == before


def test_strangers_at_the_seats(name: str, loop: EventLoop) -> None:
    """What connects and is no machine gets nothing that a machine would miss."""
    one, other = Side(name, loop), Side(name, loop)
    check(loop, one, other)
    strangers = []
    for seat in (1, 2) * 10:
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.setblocking(False)
        try:
            stranger.connect(pair._address(name, seat))
            stranger.send(b"c")
            with open("/dev/null", "rb") as null:
                socket.send_fds(stranger, [b"c"], [null.fileno()])
        except OSError:
            pass  # it was turned away already
        strangers.append(stranger)
        loop.poll(0.01)
    check(loop, one, other)
    other.leave()
    for stranger in strangers:
        stranger.close()
    other = Side(name, loop)
    check(loop, one, other)
    for side in (one, other):
        side.leave()


def test_another_user_is_refused(
    name: str, loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = PairEnd("here", name), PairEnd("here", name)
    monkeypatch.setattr(pair, "_user_of", lambda connection: os.geteuid() + 1)
    lines: list[str] = []
    one.attach(loop, lines.append)
    other.attach(loop, lines.append)
    for _ in range(5):
        loop.poll(0.01)
    assert set(lines) == {f"link pair:{name}: another user wants to be connected; refused"}
    poll = select.poll()
    for end in (one, other):
        poll.register(end.fd, select.POLLIN)
    assert poll.poll(0) == []
    one.close()
    other.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is another user, too")
def test_whose_the_other_end_is() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as seat:
        seat.bind("")  # an abstract name of the kernel's choice
        seat.listen()
        for user in (0, 65534):
            code = "import os, socket, sys; os.setuid(int(sys.argv[1]))"
            code += "; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)"
            code += "; s.connect(bytes.fromhex(sys.argv[2])); s.recv(1)"
            name = seat.getsockname().hex()
            with subprocess.Popen([sys.executable, "-c", code, str(user), name]) as process:
                with seat.accept()[0] as connection:
                    assert pair._user_of(connection) == user
                assert process.wait(20) == 0


def test_a_device_that_takes_no_cables(name: str, loop: EventLoop) -> None:
    """Its machine goes on, and so does the other."""
    one = PairEnd("here", name)
    one.attach(loop, lambda text: None)
    for _ in range(600):
        other = PairEnd("here", name)
        other.attach(loop, lambda text: None)
        loop.poll(0)
        other.close()
        loop.poll(0)
    one.close()


@pytest.mark.parametrize("isolated", [True, False])
def test_a_restored_machine_takes_its_seat_again(
    name: str, loop: EventLoop, tmp_path: Path, isolated: bool
) -> None:
    saved = tmp_path / "saved"
    other = Side(name, loop)
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("net", link=f"pair:{name}", isolated=isolated)
        machine.boot("counter")
        machine.snapshot(saved)
        run_until(loop, lambda: bool(machine.parts.events.poll(0.01)) or other.look())
        before = open_descriptors()
        with pytest.raises(UserError, match="two machines are connected") as caught:
            Machine.restore(saved)
        assert str(caught.value).startswith(f"snapshot {saved}: device 'net': link=pair:{name}: ")
        assert open_descriptors() == before
    run_until(loop, lambda: not other.look())
    with Machine.restore(saved) as machine:
        machine.resume()
        run_until(loop, lambda: other.look() and not machine.parts.events.poll(0.01))
        assert ("net", f"link pair:{name}: connected") in machine.parts.wiring.log_lines
        assert other.cable is not None
        assert other.cable.send(PLAIN, FRAME)
    other.leave()
