"""``--net user``: a user-mode network stack that needs no privileges, passt (https://passt.top).

passt is a process of the machine's own, with one end of a stream socket pair; the device has the
other. It ends when that is closed, so it cannot outlive the machine, however that ends. It makes
a jail of its own; started by root it goes on as nobody.

The guest finds a small network: itself 10.0.2.15 (by DHCP), its gateway 10.0.2.2, which is also the
host's own loopback, and through it whatever the host reaches.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from devices.virtio.link import Forward
from devices.virtio.net import USER_MTU
from vmm.events import EventLoop
from vmm.network.links import Log
from vmm.opening import HostFileError

PROGRAM = "passt"
GUEST, GATEWAY, PREFIX = "10.0.2.15", "10.0.2.2", "24"
GATEWAY_MAC = "52:55:0a:00:02:02"
_SOCKET_BUFFER = 4 << 20
_PATIENCE = 10.0
"""Seconds that it has to come up, and to end."""
_FEW_WORDS = 4096
_NOISE = ("Failed to send", "Don't run as root")
"""Lines of it that tell nothing: it always wants a system log, and changes its user by itself."""


def find_program() -> str | None:
    """Where passt is installed, if it is."""
    return shutil.which(PROGRAM, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class UserEnd:
    """A passt process.

    Raises:
        HostFileError: it is not installed or cannot be started.
    """

    def __init__(self, where: str, forwards: Sequence[Forward]) -> None:
        self._where = where
        program = find_program()
        if program is None:
            raise HostFileError(
                f"{where}: the program {PROGRAM} is not there; install the package {PROGRAM}"
            )
        self._ours, theirs = socket.socketpair()
        self._words = os.memfd_create("passt-stderr", os.MFD_CLOEXEC)
        for end in (self._ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._ours.setblocking(False)
        self.fd = self._ours.fileno()
        self._events: EventLoop | None = None
        self._pidfd = -1
        try:
            self._process = subprocess.Popen(
                [program, *_arguments(theirs.fileno(), forwards)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the machine
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            self._close_descriptors()
            raise HostFileError(f"{where}: {program}: {error.strerror}") from error
        finally:
            theirs.close()

    def attach(self, events: EventLoop, log: Log) -> None:
        self._wait_ready()
        self._events, self._log = events, log
        events.add(self._pidfd, self._ended)

    def _wait_ready(self) -> None:
        """It answers ARP for its gateway as soon as all is well with it."""
        question = _arp_question()
        with suppress(OSError):  # it has ended
            self._ours.send(struct.pack(">I", len(question)) + question)
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        wanted, end = 4 + len(question), monotonic() + _PATIENCE
        while wanted:
            got = b""
            if poll.poll(max(end - monotonic(), 0) * 1000):
                with suppress(OSError):
                    got = self._ours.recv(wanted)
            if not got:
                self._give_up()
            wanted -= len(got)

    def _give_up(self) -> None:
        try:
            self._process.wait(1)
            why = self._last_words()
        except subprocess.TimeoutExpired:
            why = "it does not answer"
        self.close()
        raise HostFileError(f"{self._where}: {PROGRAM} cannot start: {why}")

    def _ended(self) -> None:
        assert self._events is not None
        self._events.remove(self._pidfd)
        self._log(f"{PROGRAM} has ended: {self._last_words()}")

    def _last_words(self) -> str:
        """What it said last, or with which status it ended."""
        said = os.pread(self._words, _FEW_WORDS, max(os.fstat(self._words).st_size - _FEW_WORDS, 0))
        lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith(_NOISE)]
        status = self._process.poll()
        return " / ".join(lines[-2:]) or f"status {status}"

    def close(self) -> None:
        if self._pidfd < 0:
            return
        if self._events is not None:
            self._events.remove(self._pidfd)
        self._process.kill()
        self._process.wait(_PATIENCE)
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._ours.close()
        os.close(self._words)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _arguments(fd: int, forwards: Sequence[Forward]) -> list[str]:
    arguments = ["--fd", str(fd), "--foreground", "--quiet", "--stderr"]
    arguments += ["--address", GUEST, "--netmask", PREFIX, "--gateway", GATEWAY]
    arguments += ["--mac-addr", GATEWAY_MAC, "--mtu", str(USER_MTU)]
    if not _has_route():
        # Without a way out it would give up; the host's own loopback is still there.
        arguments += ["--ipv4-only", "--interface", "lo"]
    for forward in forwards:
        option = {"tcp": "--tcp-ports", "udp": "--udp-ports"}[forward.protocol]
        arguments += [option, f"{forward.address}/{forward.host}:{forward.guest}"]
    return arguments


def _has_route() -> bool:
    """Whether there is a default route (Linux, /proc/net/route: destination and mask are 0)."""
    try:
        with open("/proc/net/route") as table:
            rows = [line.split() for line in table][1:]
    except OSError:
        return True
    return any(row[1] == row[7] == "00000000" for row in rows)


def _arp_question() -> bytes:
    """Who has the gateway (RFC 826), from nobody."""
    sender = bytes(6)
    addresses = [socket.inet_aton(address) for address in (GUEST, GATEWAY)]
    frame = b"\xff" * 6 + sender + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    return frame + sender + addresses[0] + bytes(6) + addresses[1]
