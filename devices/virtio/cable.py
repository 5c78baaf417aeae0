"""The ends of a network card's cable: how frames are taken from a descriptor and put into it.

Every packet here is a frame with its struct virtio_net_hdr before it (5.1.6). Descriptors do not
block, and nothing of a cable is state: what is half read or half written is lost with the cable.
The other end is believed in nothing: what it cannot have meant as a frame is `Cut`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers (5.1.6)."""
PLAIN = bytes(HEADER.size)
SHORTEST, LONGEST = 14, 65550
"""Bytes of a frame: an Ethernet header; what TSO can make (5.1.6.3.1)."""

Piece = bytes | bytearray | memoryview

_LENGTH = struct.Struct(">I")
_STREAM_BUFFER = 256 << 10
_CHUNKS = 8
"""Packets that are read at once where each takes a system call."""
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADFD, errno.ENODEV})

TUNSETOFFLOAD = 0x400454D0
"""Linux, include/uapi/linux/if_tun.h."""
OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_ECN = 1, 2, 4, 8


class Cut(Exception):
    """Nothing will come through this cable any more; the text says why."""


class Cable(Protocol):
    """One end of a cable.

    Attributes:
        fd: its descriptor.
    """

    fd: int

    @property
    def full(self) -> bool:
        """Something waits until the descriptor is writable; then `flush` is to be called."""
        ...

    def receive(self) -> list[bytes]:
        """Packets that have come, some at a time; none if there are none now.

        Raises:
            Cut: the other end is gone, or has lost its mind.
        """
        ...

    def send(self, header: bytes, frame: Piece) -> bool:
        """Send a frame; False if there is no room for it and it is lost.

        Raises:
            Cut: the other end is gone.
        """
        ...

    def flush(self) -> None:
        """Go on with what waits.

        Raises:
            Cut: the other end is gone.
        """
        ...

    def offload(self, flags: int) -> None:
        """What frames the driver takes: of `OFFLOAD_CSUM` and so on."""
        ...


class PacketCable:
    """A descriptor of which each read and write is one packet: a SOCK_SEQPACKET socket, a tap."""

    def __init__(self, fd: int, *, tap: bool = False) -> None:
        self.fd = fd
        self._tap = tap
        self._buffer = memoryview(bytearray(HEADER.size + LONGEST + 1))

    @property
    def full(self) -> bool:
        return False

    def receive(self) -> list[bytes]:
        packets: list[bytes] = []
        buffer = self._buffer
        for _ in range(_CHUNKS):
            try:
                count = os.readv(self.fd, (buffer,))
            except BlockingIOError:
                break
            except OSError as error:
                count, reason = 0, error.strerror
            else:
                reason = "the other end is gone"
            if count:
                packets.append(bytes(buffer[:count]))
            elif packets:
                break  # it is met again next time
            else:
                raise Cut(reason)
        return packets

    def send(self, header: bytes, frame: Piece) -> bool:
        try:
            os.writev(self.fd, (header, frame))
        except OSError as error:
            # A tap refuses what its kernel cannot make sense of, or while it is down.
            if error.errno in _GONE:
                raise Cut("the other end is gone") from None
            return False
        return True

    def flush(self) -> None:
        pass

    def offload(self, flags: int) -> None:
        if self._tap:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, flags)


class StreamCable:
    """A stream socket of frames without header, each after its length: 4 bytes, big endian.

    What QEMU's ``-netdev stream`` and passt speak. A frame is never lost here: one that the socket
    takes only a part of makes the cable `full` until the rest has gone, too.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(_STREAM_BUFFER)
        self._view = memoryview(self._buffer)
        self._held = 0
        """Bytes at the start of the buffer that are a part of a frame."""
        self._rest = memoryview(b"")

    @property
    def full(self) -> bool:
        return bool(self._rest)

    def receive(self) -> list[bytes]:
        view = self._view
        try:
            count = os.readv(self.fd, (view[self._held :],))
        except BlockingIOError:
            return []
        except OSError as error:
            raise Cut(error.strerror) from None
        if not count:
            raise Cut("the other end is gone")
        packets: list[bytes] = []
        place, end = 0, self._held + count
        while end - place >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(view, place)
            if not SHORTEST <= size <= LONGEST:
                raise Cut(f"the other end sent a frame of {size} bytes")
            after = place + _LENGTH.size + size
            if after > end:
                break
            packets.append(PLAIN + view[place + _LENGTH.size : after])
            place = after
        self._held = end - place
        if place:
            view[: self._held] = bytes(view[place:end])
        return packets

    def send(self, header: bytes, frame: Piece) -> bool:
        if self._rest:
            return False
        length = _LENGTH.pack(len(frame))
        done = self._write((length, frame))
        if done < len(length) + len(frame):
            self._rest = memoryview(length + bytes(frame))[done:]
        return True

    def flush(self) -> None:
        if self._rest:
            self._rest = self._rest[self._write((self._rest,)) :]

    def _write(self, pieces: Sequence[Piece]) -> int:
        try:
            return os.writev(self.fd, pieces)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Cut(error.strerror) from None

    def offload(self, flags: int) -> None:
        pass


class Jack:
    """Where the machine plugs cables in: each message on the descriptor brings one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.gone = False
        """The machine will bring no more."""
        # Made now: this asks the kernel what a jail does not let it ask.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)

    def take(self) -> PacketCable | None:
        """The next cable, which the caller owns; None if there is none now."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            data, fds = b"", []
        self.gone = not data
        return PacketCable(fds[0]) if fds else None

    def close(self) -> None:
        """Let go of the descriptor, which stays with its owner."""
        self._socket.detach()
