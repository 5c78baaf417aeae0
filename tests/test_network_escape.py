"""A network card that was taken over: its link carries bytes to its other end, and leads nowhere.

The code below runs in the device's process, jailed as a network card is, with such a packet socket
as the machine gives it for a cable.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import ClassVar

import pytest
from taken_over import Own, TakenOver, Takeover, Verdict, assert_caught, assert_stopped, takeover

from devices.contract import DeviceHost
from proxy.jail.escape import ATTEMPTS, Attempt

_SIOCGIFCONF, _TIOCSTI, _TUNSETIFF = 0x8912, 0x5412, 0x400454CA
"""Linux: sockios.h, asm-generic/ioctls.h, if_tun.h."""
_UNIX = socket.AF_UNIX.to_bytes(2, "little")


def _control(request: int) -> Own:
    return lambda host: str(fcntl.ioctl(host.fds["link"], request, bytes(40)))


def _call(name: str, *rest: object) -> Own:
    def call(host: DeviceHost) -> str:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
        if function(host.fds["link"], *rest) < 0:
            raise OSError(code := ctypes.get_errno(), os.strerror(code))
        return name

    return call


CAUGHT: dict[str, tuple[Own, str]] = {
    "interfaces": (_control(_SIOCGIFCONF), "ioctl"),
    "type": (_control(_TIOCSTI), "ioctl"),
    "another-tap": (_control(_TUNSETIFF), "ioctl"),
    "bind": (_call("bind", _UNIX + b"\0x", 4), "bind"),
    "listen": (_call("listen", 1), "listen"),
    "accept": (_call("accept", None, None), "accept"),
    "reconnect": (_call("connect", _UNIX + b"\0x", 4), "connect"),
    "option": (_call("setsockopt", 1, 2, b"1234", 4), "setsockopt"),
}
"""What it tries with its link."""


def _send_elsewhere(host: DeviceHost) -> str:
    address = _UNIX + Card.elsewhere
    return _call("sendto", b"hello", 5, 0, address, len(address))(host)


class Card(TakenOver):
    elsewhere: ClassVar[bytes]
    own = (*(each for each, _ in CAUGHT.values()), _send_elsewhere)


@pytest.fixture(scope="module")
def other() -> Iterator[socket.socket]:
    """Somebody else of this host, who takes messages from anybody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("")  # an abstract name of the kernel's choice
        made.setblocking(False)
        yield made


@pytest.fixture(scope="module")
def cards(other: socket.socket) -> Iterator[Takeover]:
    Card.elsewhere = other.getsockname()
    with takeover(Card, "net") as made:
        yield made


def attempt(cards: Takeover, what: Attempt | Own) -> tuple[Verdict, bytes]:
    """How it went, and what came over its link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        verdict = cards.attempt(what, {"link": theirs.fileno()})
        theirs.close()
        return verdict, ours.recv(100)


@pytest.mark.parametrize("tried", ATTEMPTS, ids=lambda each: each.name)
def test_no_way_out_is_open(cards: Takeover, tried: Attempt) -> None:
    assert_stopped(tried, attempt(cards, tried)[0])


@pytest.mark.parametrize("name", CAUGHT)
def test_its_link_is_good_for_nothing_else(cards: Takeover, name: str) -> None:
    function, call = CAUGHT[name]
    assert_caught(attempt(cards, function)[0], call)


def test_what_it_sends_goes_to_the_other_end_alone(cards: Takeover, other: socket.socket) -> None:
    verdict, came = attempt(cards, _send_elsewhere)
    assert (verdict.got, verdict.failure, came) == (True, "", b"hello")
    with pytest.raises(BlockingIOError):
        other.recv(100)
