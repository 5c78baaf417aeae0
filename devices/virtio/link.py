"""What a network card's link leads to, as a user writes it.

============= ==================================================================
link          what the card's descriptor is
============= ==================================================================
(empty)       none: no cable is plugged in
user          a user-mode network stack: a stream of frames, see `StreamCable`
pair:NAME     a jack, into which the machine plugs a cable to another machine
tap:NAME      a tap of the host, with struct virtio_net_hdr before each frame
============= ==================================================================
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from typing import NamedTuple

from devices.errors import OptionError

_NAMES = {
    "pair": re.compile(r"[A-Za-z0-9._-]+"),
    "tap": re.compile(r"(?!\.{1,2}$)[^\s/:%]+"),  # linux, net/core/dev.c, dev_valid_name
}
_LONGEST = {
    "pair": 64,
    "tap": 15,
}  # tap: IFNAMSIZ with its final NUL (linux, include/uapi/linux/if.h)


class LinkKind(StrEnum):
    NONE = ""
    USER = "user"
    PAIR = "pair"
    TAP = "tap"


class Link(NamedTuple):
    """A link: its kind, and the name of the pair or tap."""

    kind: LinkKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read what a user wrote.

        Raises:
            ValueError: it is no link.
        """
        kind, colon, name = text.partition(":")
        pattern = _NAMES.get(kind)
        if pattern is not None:
            most = _LONGEST[kind]
            if len(name) > most:
                raise OptionError(f"link={text}: the name has more than {most} characters", "link")
            if not pattern.fullmatch(name):
                raise OptionError(
                    f"link={text}: after {kind}: comes a name, such as {kind}:lan0", "link"
                )
        elif colon or kind not in ("", "user"):
            raise OptionError(f"link is user, pair:NAME or tap:NAME, not {text}", "link")
        return cls(LinkKind(kind), name)


class Forward(NamedTuple):
    """A port of the host that leads to one of the guest.

    Attributes:
        protocol: tcp or udp.
        address: of the host, on which it listens.
        host, guest: the ports.
    """

    protocol: str
    address: str
    host: int
    guest: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Read ``tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT``; an IPv6 address stands in brackets.

        Raises:
            ValueError: it is not of that form.
        """
        match = re.fullmatch(r"(tcp|udp):(?:(\[[^]]*\]|[^:]*):)?([0-9]+):([0-9]+)", text)
        if match is None:
            raise OptionError(
                f"forward={text}: write tcp:8080:80 (port 8080 of the host to 80 of the guest), "
                "udp:... or tcp:ADDRESS:8080:80",
                "forward",
            )
        protocol, address, host, guest = match.groups()
        address = (address or "127.0.0.1").strip("[]")
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise OptionError(f"forward={text}: {address} is no IP address", "forward") from None
        for port in (host, guest):
            if not 0 < int(port) < 1 << 16:
                raise OptionError(f"forward={text}: {port} is no port", "forward")
        return cls(protocol, address, int(host), int(guest))


def parse_forwards(text: str) -> list[Forward]:
    """Several, with ``+`` between.

    Raises:
        ValueError: one is not of the form.
    """
    return [Forward.parse(each) for each in text.split("+")] if text else []
