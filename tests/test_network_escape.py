"""A network card that was taken over: its link carries bytes to its other end, and leads nowhere.

The code below runs in the device's process, jailed as a network card is, with such a packet socket
as the machine gives it for a cable.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
from proxy_helpers import Recorder

from devices.bus import BusType
from devices.contract import Device, Region
from proxy.device import ProxyDevice
from proxy.jail import JailMode
from proxy.jail.escape import ATTEMPTS, Attempt, Targets, bait
from proxy.warden import Warden

_SIOCGIFCONF, _TIOCSTI, _TUNSETIFF = 0x8912, 0x5412, 0x400454CA
"""Linux: sockios.h, asm-generic/ioctls.h, if_tun.h."""
_UNIX = socket.AF_UNIX.to_bytes(2, "little")


def _control(request: int) -> Callable[[int], None]:
    return lambda fd: fcntl.ioctl(fd, request, bytes(40)) and None


def _call(name: str, *rest: object) -> Callable[[int], None]:
    def call(fd: int) -> None:
        if getattr(ctypes.CDLL(None, use_errno=True), name)(fd, *rest) < 0:
            raise OSError(code := ctypes.get_errno(), os.strerror(code))

    return call


OWN = (
    (Attempt("interfaces", "", lambda _: "", ("ioctl",)), _control(_SIOCGIFCONF)),
    (Attempt("type", "", lambda _: "", ("ioctl",)), _control(_TIOCSTI)),
    (Attempt("another-tap", "", lambda _: "", ("ioctl",)), _control(_TUNSETIFF)),
    (Attempt("bind", "", lambda _: "", ("bind",)), _call("bind", _UNIX + b"\0x", 4)),
    (Attempt("listen", "", lambda _: "", ("listen",)), _call("listen", 1)),
    (Attempt("accept", "", lambda _: "", ("accept",)), _call("accept", None, None)),
    (Attempt("reconnect", "", lambda _: "", ("connect",)), _call("connect", _UNIX + b"\0x", 4)),
    (Attempt("option", "", lambda _: "", ("setsockopt",)), _call("setsockopt", 1, 2, b"1234", 4)),
)
"""What it tries with its link."""
SEND_ELSEWHERE = len(ATTEMPTS) + len(OWN)


class TakenOver(Device):
    """A read does attempt number `offset`; gives 1 if it got what it wanted."""

    model: ClassVar[str] = "taken-over"
    targets: ClassVar[Targets]
    elsewhere: ClassVar[bytes]

    def regions(self) -> tuple[Region, ...]:
        return (Region("r", BusType.MMIO, 0x1000, 0x1000_0000, synced=True),)

    def read(self, offset: int, size: int) -> int:
        link = self.host.fds["link"]
        try:
            if offset == SEND_ELSEWHERE:
                address = _UNIX + self.elsewhere
                _call("sendto", b"hello", 5, 0, address, len(address))(link)
            elif offset >= len(ATTEMPTS):
                OWN[offset - len(ATTEMPTS)][1](link)
            else:
                self.host.log(ATTEMPTS[offset].run(self.targets))
        except (OSError, ValueError, MemoryError) as error:
            self.host.log(f"{type(error).__name__}: {error}")
            return 0
        return 1


@pytest.fixture(scope="module")
def other() -> Iterator[socket.socket]:
    """Somebody else of this host, who takes messages from anybody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("")  # an abstract name of the kernel's choice
        made.setblocking(False)
        yield made


@pytest.fixture(scope="module")
def warden(other: socket.socket) -> Iterator[Warden]:
    with bait() as targets:
        TakenOver.targets, TakenOver.elsewhere = targets, other.getsockname()
        with Warden([TakenOver], jail=JailMode.AUTO) as made:
            yield made


def attempt(warden: Warden, number: int) -> tuple[bool, str, bytes]:
    """Whether it got what it wanted, how it ended, and what came over its link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        fds = {"link": theirs.fileno()}
        child = warden.spawn("taken-over", "net", {}, factory=0, fds=fds)
        with ProxyDevice(child, Recorder(), deadline=20) as device:
            got = device.handlers()[0].read(number, 2)
            failure = str(device.failed or "")
        theirs.close()
        return got == 1, failure, ours.recv(100)


@pytest.mark.parametrize("number", range(SEND_ELSEWHERE))
def test_no_way_out_is_open(warden: Warden, number: int) -> None:
    tried = [*ATTEMPTS, *(each for each, _ in OWN)][number]
    got, failure, _ = attempt(warden, number)
    assert not got, tried.name
    if tried.calls:
        assert any(f"forbidden system call '{call}'" in failure for call in tried.calls), failure
    else:
        assert not failure


def test_what_it_sends_goes_to_the_other_end_alone(warden: Warden, other: socket.socket) -> None:
    got, failure, came = attempt(warden, SEND_ELSEWHERE)
    assert (got, failure, came) == (True, "", b"hello")
    with pytest.raises(BlockingIOError):
        other.recv(100)
