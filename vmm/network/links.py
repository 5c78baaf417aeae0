"""`HostEnd`: the machine's side of a device's link, and how one is made from what a user wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from devices import registry
from devices.contract import Device
from devices.errors import Subject, concerning
from devices.files import HostLink, host_links
from devices.virtio.link import Link, LinkKind, parse_forwards
from vmm.config import DeviceConfig
from vmm.events import EventLoop

Log = Callable[[str], None]


class HostEnd(Protocol):
    """One link's end on the host.

    Attributes:
        fd: what the device gets; duplicated for it.
    """

    fd: int

    def attach(self, events: EventLoop, log: Log) -> None:
        """The machine is about to run: be ready, and watch the back end from now on.

        Raises:
            HostFileError: it could not be had after all.
        """
        ...

    def close(self) -> None:
        """End what was begun, after the device is gone; harmless when repeated."""
        ...


class Links:
    """The links of one device.

    Attributes:
        device: its name.
        fds: what the device gets, by option.
    """

    def __init__(self, device: str, ends: Mapping[str, HostEnd]) -> None:
        self.device = device
        self._ends = ends
        self.fds = {option: end.fd for option, end in ends.items()}

    def attach(self, events: EventLoop, log: Callable[[str, str], None]) -> None:
        """See `HostEnd.attach`; `log` is told the device's name, too."""
        for name, end in self._ends.items():
            with concerning(Subject(name, self.device)):
                end.attach(events, lambda text: log(self.device, text))

    def close(self) -> None:
        """See `HostEnd.close`."""
        for end in self._ends.values():
            end.close()


def open_links(device: DeviceConfig, kind: type[Device]) -> Links:
    """The links of a device; the caller closes them.

    Raises:
        HostFileError: one cannot be had.
    """
    ends: dict[str, HostEnd] = {}
    links = host_links(kind.Options)
    options = registry.parse_options(kind, device.options) if links else None
    try:
        for name, link in links.items():
            text = getattr(options, name)
            if text:
                where = f"device '{device.name}': {name}={text}"
                with concerning(Subject(name, device.name)):
                    ends[name] = _open(where, link, text, options)
    except BaseException:
        Links(device.name, ends).close()
        raise
    return Links(device.name, ends)


def _open(where: str, note: HostLink, text: str, options: object) -> HostEnd:
    # Each brings what the others do not need.
    if note.kind == "sockets":
        from vmm.network.sockets import SocketsEnd

        return SocketsEnd(where, text)
    link = Link.parse(text)
    if link.kind is LinkKind.USER:
        from vmm.network.user import UserEnd

        return UserEnd(where, parse_forwards(getattr(options, "forward", "")))
    if link.kind is LinkKind.PAIR:
        from vmm.network.pair import PairEnd

        return PairEnd(where, link.name)
    from vmm.network.tap import TapEnd

    return TapEnd(where, link.name)
