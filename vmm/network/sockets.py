"""The machine's side of a socket device: it makes connections and hands them over.

See `devices.virtio.vsock.link` for what the two say to each other. What a device asks for is a
number; the path is made here of the one that the user gave.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from time import monotonic

from devices.virtio.vsock import link
from vmm.events import EventLoop
from vmm.network.links import Log
from vmm.opening import HostFileError

_AT_ONCE = 16
_BACKLOG = 64


class SocketsEnd:
    """The listening socket, and the device's link.

    Raises:
        HostFileError: the socket cannot be had.
    """

    def __init__(self, where: str, path: str) -> None:
        self._path = path
        self._listener = _listen(where, path)
        about = os.stat(path)
        self._inode = about.st_dev, about.st_ino
        self._ours, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.fd = self._device.fileno()
        self._events: EventLoop | None = None
        self._log: Log = lambda text: None
        self._closed = False

    def attach(self, events: EventLoop, log: Log) -> None:
        self._events, self._log = events, log
        events.add(self._listener.fileno(), self._visited)
        events.add(self._ours.fileno(), self._asked)

    def _visited(self) -> None:
        """Programs of the host have connected."""
        with suppress(OSError):
            for _ in range(_AT_ONCE):
                stream, _ = self._listener.accept()
                with stream:
                    stream.setblocking(False)
                    self._send([link.VISITED], [stream.fileno()])

    def _asked(self) -> None:
        """The device wants connections. However many: the guest has at least half of the time."""
        assert self._events is not None
        begin = monotonic()
        for _ in range(_AT_ONCE):
            try:
                message = self._ours.recv(8)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            port = link.asked_port(message)
            if port is None:
                self._stop_hearing(bool(message))
                return
            self._connect(port)
        self._events.remove(self._ours.fileno())
        self._events.call_at(2 * monotonic() - begin, self._hear_again)

    def _hear_again(self) -> None:
        if not self._closed:
            assert self._events is not None
            self._events.add(self._ours.fileno(), self._asked)

    def _stop_hearing(self, nonsense: bool) -> None:
        assert self._events is not None
        self._events.remove(self._ours.fileno())
        if nonsense:
            self._log("asks for no connection that there can be; it gets none any more")

    def _connect(self, port: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.setblocking(False)
            try:
                stream.connect(f"{self._path}_{port}")
            except OSError as error:
                self._send(*link.answer(error))
            else:
                self._send(*link.answer(stream.fileno()))

    def _send(self, data: list[bytes], fds: list[int]) -> None:
        """Say something; what the device does not listen to is lost, and the stream with it."""
        with suppress(OSError):
            socket.send_fds(self._ours, data, fds)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for each in (self._listener, self._ours):
            if self._events is not None:
                self._events.remove(each.fileno())
            each.close()
        self._device.close()
        with suppress(OSError):
            about = os.stat(self._path)
            if (about.st_dev, about.st_ino) == self._inode:
                os.unlink(self._path)


def _listen(where: str, path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_behind(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = "is there already; end the machine that uses it, or choose another path"
        raise HostFileError(f"{where}: {reason}") from error
    return listener


def _is_left_behind(path: str) -> bool:
    """Whether it is a socket on which nobody listens: of a machine that did not end well."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return stat.S_ISSOCK(os.lstat(path).st_mode)
        except OSError:
            return False
        return False
