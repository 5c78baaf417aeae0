"""What a program of the host says first: ``CONNECT PORT`` and a line feed, in whatever pieces."""

from __future__ import annotations

from devices.virtio.vsock.link import read_some

LONGEST = 32
"""Bytes of the line, at most."""


class Greeting:
    """The line of one program, as far as it came.

    Attributes:
        over: it is whole, or will never be.
    """

    def __init__(self) -> None:
        self.over = False
        self._said = b""

    def hear(self, fd: int) -> None:
        """Read what is there, and not a byte more than the line: what follows is the guest's."""
        while not self.over:
            more = read_some(fd, 1)
            if more is None:
                return
            self._said += more
            self.over = not more or more == b"\n" or len(self._said) > LONGEST

    @property
    def port(self) -> int | None:
        """Where it wants to go; None if it is no greeting."""
        return wanted_port(self._said)


def wanted_port(line: bytes) -> int | None:
    """The port of a whole line; None if it does not name one."""
    word, _, number = line.partition(b" ")
    number = number.removesuffix(b"\n").removesuffix(b"\r")
    if word.upper() != b"CONNECT" or not line.endswith(b"\n") or not number.isdigit():
        return None
    port = int(number)
    return port if port <= 0xFFFF_FFFF else None
