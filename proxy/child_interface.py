"""`ChildInterface`: a device process that is not in use yet, and that can be sent elsewhere."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from proxy.errors import Misuse, ProtocolFault
from proxy.events import Obituary
from proxy.tube import Tube, close_all


class _Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels beside the descriptors."""

    name: str
    pid: int
    has_lane: bool
    jail_report: Any


class ChildInterface:
    """A tube to a device process and all that is needed to make one `ProxyDevice` of it.

    It owns its descriptors until a proxy takes them over. Activation makes it a device exactly
    once; that the child refuses a second one is what counts, also if descriptors were copied.

    Attributes:
        name: the device's configured name.
        pid: the process, as this PID namespace numbers it.
        tube: the machine's end.
        pidfd: readable once the process has ended.
        doorbell: the reading end of a pipe; readable when the child spoke unasked. A pipe and not
            an eventfd, because the flags of an eventfd are shared with the child, who could then
            make a read of it block.
        lane: memfd of the shared page, or -1.
        jail_report: what the child found of its jail, as plain values; None without one.
        obituary_of: asks the warden how the process ended; None if this came from elsewhere.
    """

    def __init__(
        self,
        name: str,
        pid: int,
        tube: socket.socket,
        pidfd: int,
        doorbell: int,
        *,
        doorbell_peer: int = -1,
        lane: int = -1,
        jail_report: Any = None,
    ) -> None:
        self.name = name
        self.pid = pid
        self.tube = tube
        self.pidfd = pidfd
        self.doorbell = doorbell
        self.doorbell_peer = doorbell_peer
        self.lane = lane
        self.jail_report = jail_report
        self.obituary_of: Callable[[int, float], Obituary | None] | None = None
        self.taken = False
        self._closed = False

    def take(self) -> None:
        """Make this the base of a proxy.

        Raises:
            Misuse: it has been taken, sent away or closed before.
        """
        if self.taken or self._closed:
            raise Misuse(f"the child interface of '{self.name}' has been used already")
        self.taken = True

    def send_over(self, tube: Tube) -> None:
        """Send this to the process at the other end of `tube`; it is no longer ours then."""
        self.take()
        fds = [self.tube.fileno(), self.pidfd, self.doorbell, self.doorbell_peer]
        fds += [self.lane] if self.lane >= 0 else []
        label = _Label(self.name, self.pid, self.lane >= 0, self.jail_report)
        tube.send(msgspec.json.encode(label), fds)
        self.close()

    @classmethod
    def receive_over(cls, tube: Tube) -> ChildInterface:
        """Receive what `send_over` sent.

        Raises:
            ProtocolFault: something else came.
        """
        data, fds = tube.receive()
        try:
            label = msgspec.json.decode(data, type=_Label)
            if len(fds) != 4 + label.has_lane:
                raise ProtocolFault(f"a child interface with {len(fds)} descriptors")
        except (msgspec.MsgspecError, ProtocolFault) as error:
            close_all(fds)
            raise ProtocolFault(f"not a child interface: {error}") from error
        return cls.from_fds(label.name, label.pid, fds, label.jail_report)

    @classmethod
    def from_fds(cls, name: str, pid: int, fds: list[int], jail_report: Any) -> ChildInterface:
        """Make one of descriptors: tube, pidfd, doorbell, its peer and perhaps the lane's page."""
        tube = socket.socket(fileno=fds[0])
        return cls(
            name,
            pid,
            tube,
            fds[1],
            fds[2],
            doorbell_peer=fds[3],
            lane=fds[4] if len(fds) > 4 else -1,
            jail_report=jail_report,
        )

    def wait_end(self, timeout: float) -> bool:
        """Whether the process has ended, or does within `timeout` seconds."""
        if self._closed:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def kill(self) -> None:
        """End the process at once; harmless if it has ended."""
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def obituary(self, timeout: float) -> Obituary | None:
        """How the process ended, if the warden says so within `timeout` seconds."""
        return None if self.obituary_of is None else self.obituary_of(self.pid, timeout)

    def close(self) -> None:
        """Give up the descriptors; a child whose tube is closed cleans up and ends."""
        if self._closed:
            return
        self._closed = True
        self.tube.close()
        for fd in (self.pidfd, self.doorbell, self.doorbell_peer, self.lane):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.doorbell = self.doorbell_peer = self.lane = -1
