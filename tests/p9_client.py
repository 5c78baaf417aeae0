"""A 9P client of the tests' own: speaks to the device over the driver of `virtio_driver`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from virtio_driver import F_VERSION_1, Driver, LocalRig, Request, Rig

from devices.virtio.p9 import messages as m
from devices.virtio.p9.codec import HEADER, Message, Qid, decode, encode
from devices.virtio.p9.device import P9
from devices.virtio.p9.protocol import NO_FID, VERSION

F_MOUNT_TAG = 1
MSIZE = 64 << 10
_R = TypeVar("_R", bound=Message)


class P9Error(OSError):
    """Rlerror."""


_RIGS: list[LocalRig] = []


def local_rig(directory: Path, **options: Any) -> LocalRig:
    """A device in this process, until `close_rigs`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    _RIGS.append(LocalRig(P9, {"path": "shared", **options}, {"path": fd}))
    return _RIGS[-1]


def close_rigs() -> None:
    """Let go of all that `local_rig` made."""
    while _RIGS:
        rig = _RIGS.pop()
        rig.device.close()
        os.close(rig.host.fds["path"])


class Client:
    """A mounted client; fid 0 is the root."""

    def __init__(self, rig: Rig, msize: int = MSIZE, features: int = 0) -> None:
        self.rig = rig
        self.driver = Driver(rig)
        self.driver.start(F_VERSION_1 | F_MOUNT_TAG | features, 64)
        self.next_fid = 1
        self.next_tag = 0
        self.mount(msize)

    def mount(self, msize: int) -> None:
        agreed = self.ask(m.Version(msize, VERSION), m.Rversion)
        assert agreed.version == VERSION
        self.msize = agreed.msize
        self.ask(m.Attach(0, NO_FID, b"root", b"", 0), m.Rattach)

    # Messages.

    def raw(self, data: bytes, room: int | None = None, settle: bool = True) -> Request:
        """Any bytes; what became of them."""
        room = self.msize if room is None else room
        request = self.driver.queues[0].send([data], [room] if room else [])
        end = monotonic() + 20
        while settle and request.length is None and monotonic() < end:
            self.rig.settle()
            self.driver.queues[0].collect()
        return request

    def send(self, message: Message, settle: bool = False) -> tuple[Request, int]:
        self.next_tag = (self.next_tag + 1) & 0x7FFF
        room = 64 << 10 if isinstance(message, m.Version) else self.msize
        return self.raw(encode(message, self.next_tag), room, settle), self.next_tag

    def answer(self, request: Request, tag: int, kind: type[_R]) -> _R:
        data = request.written(self.driver.ram)
        size, number, answered = HEADER.unpack_from(data)
        assert (size, answered) == (len(data), tag)
        body = data[HEADER.size :]
        if number == m.Rlerror.number:
            code = decode(m.Rlerror, body).code
            raise P9Error(code, os.strerror(code))
        assert number == kind.number
        return decode(kind, body)

    def ask(self, message: Message, kind: type[_R]) -> _R:
        request, tag = self.send(message, settle=True)
        return self.answer(request, tag, kind)

    # What file systems do.

    def fid(self) -> int:
        self.next_fid += 1
        return self.next_fid

    def walk(self, path: str | bytes = b"", start: int = 0) -> int:
        """A new fid; OSError ENOENT if not every name is there."""
        path = os.fsencode(path)
        names = tuple(path.split(b"/")) if path else ()
        fid = self.fid()
        qids: Sequence[Qid] = self.ask(m.Walk(start, fid, names), m.Rwalk).qids
        if len(qids) != len(names):
            raise P9Error(errno.ENOENT, "part of the way")
        return fid

    def open(self, path: str | bytes, flags: int = os.O_RDONLY) -> int:
        fid = self.walk(path)
        self.ask(m.Lopen(fid, flags), m.Rlopen)
        return fid

    def create(self, path: str, mode: int = 0o644, flags: int = os.O_RDWR) -> int:
        above, _, name = path.rpartition("/")
        fid = self.walk(above)
        self.ask(m.Lcreate(fid, os.fsencode(name), flags, mode, 0), m.Rlcreate)
        return fid

    def read(self, fid: int, offset: int = 0, count: int = 4096) -> bytes:
        return self.ask(m.Read(fid, offset, count), m.Rread).data

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        return self.ask(m.Write(fid, offset, data), m.Rwrite).count

    def clunk(self, fid: int) -> None:
        self.ask(m.Clunk(fid), m.Rclunk)

    def stat(self, path: str | bytes) -> m.Rgetattr:
        fid = self.walk(path)
        found = self.ask(m.Getattr(fid, 0x7FF), m.Rgetattr)
        self.clunk(fid)
        return found

    def list(self, path: str = "", count: int = 4096) -> dict[bytes, tuple[int, int]]:
        """Names, each with its type (DT_*) and inode number."""
        fid = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        found: dict[bytes, tuple[int, int]] = {}
        offset = 0
        while data := self.ask(m.Readdir(fid, offset, count), m.Rreaddir).data:
            while data:
                number = int.from_bytes(data[5:13], "little")
                offset = int.from_bytes(data[13:21], "little")
                length = int.from_bytes(data[22:24], "little")
                name = data[24 : 24 + length]
                assert name not in found
                found[name] = data[21], number
                data = data[24 + length :]
        self.clunk(fid)
        return found

    def setattr(self, path: str | int, valid: int, **fields: int) -> None:
        fid = path if isinstance(path, int) else self.walk(path)
        names = ("mode", "uid", "gid", "size", "atime", "atime_ns", "mtime", "mtime_ns")
        values = [fields.get(name, 0) for name in names]
        self.ask(m.Setattr(fid, valid, *values), m.Rsetattr)

    def kind(self, path: str) -> int:
        return stat.S_IFMT(self.stat(path).mode)
