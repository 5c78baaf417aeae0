"""The tube: a socket pair that keeps message borders and can carry descriptors.

A message of up to `MAX_DATAGRAM` bytes is one datagram, as it is. Longer ones travel as chunks:
`<BxxxII`: 0xF0, the message's total length, this chunk's offset, then the bytes. Several short ones
can travel in one datagram: 0xF2, then each with its length before it (`<H`). Descriptors
are announced by a datagram of their own (0xF1, count) and ride on the next; that way the hot path
may receive by plain `recv`, and whoever does not expect descriptors never holds one: the kernel
drops what the receiver gave no room for.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from proxy.errors import ProtocolFault, TubeClosed

MAX_DATAGRAM = 32 << 10
"""Bytes; well below the default socket buffer, so that a chunk always fits an empty one."""
CHUNK = 0xF0
DESCRIPTORS = 0xF1
GATHERED = 0xF2
MOST_GATHERED = 7
MAX_DESCRIPTORS = 16
_CHUNK_HEADER = struct.Struct("<BxxxII")
_CHUNK_BYTES = MAX_DATAGRAM - _CHUNK_HEADER.size
_LENGTH = struct.Struct("<H")
_FRAMING = 0xF0
"""First bytes from here on are the tube's own."""
_TIMEVAL = struct.Struct("@ll")


def frames(data: bytes) -> Iterator[bytes]:
    """The datagrams that carry one message."""
    if len(data) <= MAX_DATAGRAM:
        yield data
        return
    for offset in range(0, len(data), _CHUNK_BYTES):
        header = _CHUNK_HEADER.pack(CHUNK, len(data), offset)
        yield header + data[offset : offset + _CHUNK_BYTES]


def gathered(messages: Sequence[bytes]) -> bytes:
    """The datagram that carries up to `MOST_GATHERED` messages; together they must fit in one."""
    parts = [bytes((GATHERED,))]
    for message in messages:
        parts += _LENGTH.pack(len(message)), message
    return b"".join(parts)


def scattered(datagram: bytes) -> list[bytes]:
    """The messages in a datagram that begins with `GATHERED`.

    Raises:
        ProtocolFault: it breaks the framing.
    """
    messages, place, end = [], 1, len(datagram)
    while place < end:
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack_from(datagram, place)[0] if start <= end else end + 1
        if not start < place <= end or datagram[start] >= _FRAMING:
            raise ProtocolFault("malformed messages in one datagram")
        messages.append(datagram[start:place])
    if not 1 <= len(messages) <= MOST_GATHERED:
        raise ProtocolFault(f"{len(messages)} messages in one datagram")
    return messages


class Assembler:
    """Makes messages of datagrams; no IO.

    Args:
        limit: bytes of the longest message it will assemble.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts = bytearray()
        self._total = 0

    def feed(self, datagram: bytes) -> bytes | None:
        """Take one datagram; the message if it is whole now.

        Raises:
            ProtocolFault: it breaks the framing.
        """
        if len(datagram) > MAX_DATAGRAM:
            raise ProtocolFault(f"a datagram of more than {MAX_DATAGRAM} bytes")
        if not datagram or datagram[0] != CHUNK:
            if self._total:
                raise ProtocolFault("another message between the chunks of one")
            return datagram
        if len(datagram) <= _CHUNK_HEADER.size:
            raise ProtocolFault("an empty chunk")
        _, total, offset = _CHUNK_HEADER.unpack_from(datagram)
        if datagram[1:4] != b"\0\0\0" or not MAX_DATAGRAM < total <= self.limit:
            raise ProtocolFault(f"a chunk of a message of {total} bytes; {self.limit} at most")
        self._total = self._total or total
        if total != self._total or offset != len(self._parts):
            raise ProtocolFault("a chunk out of order")
        self._parts += datagram[_CHUNK_HEADER.size :]
        if len(self._parts) < total:
            return None
        if len(self._parts) > total:
            raise ProtocolFault("a chunk past the end of its message")
        whole = bytes(self._parts)
        self._parts, self._total = bytearray(), 0
        return whole


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new tube."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def set_receive_deadline(end: socket.socket, seconds: float) -> None:
    """Make a blocking receive give up (BlockingIOError) after `seconds`; 0 waits for ever.

    The kernel counts, so the hot path needs neither a poll nor a clock.
    """
    whole = int(seconds)
    value = _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def send(end: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message, waiting for room as long as it takes.

    Raises:
        TubeClosed: the peer is gone.
    """
    try:
        if fds:
            end.send(bytes((DESCRIPTORS, len(fds))))
        for datagram in frames(data):
            send_with_fds(end, datagram, fds)
            fds = ()
    except (BrokenPipeError, ConnectionResetError) as error:
        raise TubeClosed from error


def send_with_fds(
    end: socket.socket, datagram: bytes, fds: Sequence[int] = (), flags: int = 0
) -> None:
    """Send one datagram, with these descriptors riding on it."""
    if not fds:
        end.send(datagram, flags)
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    end.sendmsg([datagram], rights, flags)


def receive_datagram(end: socket.socket, count: int = 0, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive one datagram with at most `count` descriptors; the caller owns those.

    Raises:
        TubeClosed: the peer is gone.
        BlockingIOError: nothing came (by `flags`, or within the receive deadline).
        OSError: EMFILE: there was no room for its descriptors in this process.
        ProtocolFault: it is oversized, or carries more descriptors; none is kept open.
    """
    room = socket.CMSG_SPACE(4 * count) if count else 0
    try:
        data, ancillary, got, _ = end.recvmsg(MAX_DATAGRAM, room, flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise TubeClosed from error
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    # CMSG_SPACE rounds up, so that one descriptor more than asked for may fit.
    if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > count:
        close_all(fds)
        if got & socket.MSG_CTRUNC and len(fds) < count:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        what = "descriptors" if got & socket.MSG_CTRUNC or fds else "bytes"
        raise ProtocolFault(f"a datagram with more {what} than it may have")
    if not data:
        close_all(fds)
        raise TubeClosed
    return data, list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Close these descriptors, whatever state they are in."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise


class Tube:
    """One end of a tube for rare messages, blocking, with descriptors in both directions."""

    def __init__(self, end: socket.socket, limit: int) -> None:
        self.end = end
        self._assembler = Assembler(limit)

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message; see `send`."""
        send(self.end, data, fds)

    def receive(self, flags: int = 0) -> tuple[bytes, list[int]]:
        """Receive one whole message and its descriptors, which the caller owns.

        Raises:
            TubeClosed, ProtocolFault, OSError: see `receive_datagram`.
            BlockingIOError: nothing came within the receive deadline.
        """
        data, _ = receive_datagram(self.end, 0, flags)
        return self.finish(data)

    def finish(self, data: bytes) -> tuple[bytes, list[int]]:
        """The whole message, of which `data` is the first datagram; see `receive`."""
        fds: list[int] = []
        try:
            if data[0] == DESCRIPTORS:
                if len(data) != 2 or not 1 <= data[1] <= MAX_DESCRIPTORS:
                    raise ProtocolFault("malformed announcement of descriptors")
                data, fds = receive_datagram(self.end, data[1])
            whole = self._assembler.feed(data)
            while whole is None:
                whole = self._assembler.feed(receive_datagram(self.end)[0])
        except BaseException:
            close_all(fds)
            raise
        return whole, fds

    def close(self) -> None:
        self.end.close()
