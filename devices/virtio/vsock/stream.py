"""One connection: its phase, the credit of both sides, and what was not taken yet.

Credit (5.10.6.3): each side says how much room it has and how much has left it; the other sends no
more than fits. Our room is `ROOM`; what the host's program does not take waits in it.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Sequence

from devices import host_io
from devices.virtio.vsock.packet import HOST_CID, STREAM, Header, Op

ROOM = 256 << 10
"""Bytes of each connection that may wait for the host's program."""
_WRAP = 0xFFFF_FFFF


class Phase(enum.Enum):
    """Where a connection is."""

    ASKED = "the guest waits for the machine"
    OFFERED = "the host's program waits for the guest"
    OPEN = "open"


class Stream:
    """A connection between `guest_port` and `host_port`.

    Attributes:
        fd: of the host's side; -1 while there is none.
        peer_room, peer_taken: the guest's buf_alloc and fwd_cnt.
        sent: bytes that were sent to the guest.
        readable: it is known to have something for the guest, or to be at its end.
        ended: the host sends no more, and the guest was told so.
        deaf: the guest takes no more.
        finished: the guest sends no more.
        taken: bytes that the host's program was given; `told` of them the guest knows.
    """

    def __init__(self, cid: int, guest_port: int, host_port: int, phase: Phase, fd: int) -> None:
        self.cid, self.guest_port, self.host_port = cid, guest_port, host_port
        self.phase = phase
        self.fd = fd
        self.peer_room = self.peer_taken = self.sent = 0
        self.readable = self.ended = self.deaf = self.finished = False
        self.taken = self.told = 0
        self._waiting = bytearray()

    @property
    def key(self) -> tuple[int, int]:
        return self.guest_port, self.host_port

    def header(self, op: Op, length: int = 0, flags: int = 0) -> bytes:
        """A packet to the guest; all of them tell it of our room."""
        self.told = self.taken
        return Header(
            HOST_CID,
            self.cid,
            self.host_port,
            self.guest_port,
            length,
            STREAM,
            op,
            flags,
            ROOM,
            self.taken & _WRAP,
        ).pack()

    def hear(self, header: Header) -> None:
        """Every packet tells of the guest's room."""
        self.peer_room, self.peer_taken = header.buf_alloc, header.fwd_cnt

    @property
    def credit(self) -> int:
        """Bytes that may be sent to the guest."""
        return max(0, self.peer_room - ((self.sent - self.peer_taken) & _WRAP))

    @property
    def listens(self) -> bool:
        """Whether what the host's program sends can go on its way."""
        waits = self.readable or self.ended or self.deaf
        return self.phase is Phase.OPEN and not waits and self.credit > 0

    # From the guest.

    @property
    def waits_for_room(self) -> bool:
        return bool(self._waiting)

    def take(self, sources: Sequence[memoryview], length: int) -> bool:
        """Give data to the host's program, or keep it; False if the guest had no credit for it.

        Raises:
            OSError: the host's program is gone.
        """
        if len(self._waiting) + length > ROOM:
            return False
        done = 0
        if not self._waiting:
            with contextlib.suppress(BlockingIOError):
                done = os.writev(self.fd, sources)
            self.taken += done
        if done < length:
            self._waiting += b"".join(sources)[done:]
        return True

    def push(self) -> None:
        """Give what waits to the host's program, as far as it takes it.

        Raises:
            OSError: it is gone.
        """
        if self._waiting:
            try:
                done = os.write(self.fd, self._waiting)
            except BlockingIOError:
                return
            del self._waiting[:done]
            self.taken += done

    def finish(self) -> None:
        """If the guest sends no more, say so to the host's program, once it has everything."""
        if self.finished and not self._waiting:
            host_io.end_of_stream(self.fd)

    @property
    def owes_credit(self) -> bool:
        """The guest thinks us fuller than we are, by so much that it could matter."""
        return self.taken - self.told >= ROOM // 4

    @property
    def over(self) -> bool:
        """The guest neither sends nor takes any more, and all that it sent is away."""
        return self.finished and self.deaf and not self._waiting
