"""9P device (id 9, Linux's include/uapi/linux/virtio_9p.h): a directory of the host for the guest.

Linux mounts it with ``mount -t 9p -o trans=virtio,version=9p2000.L TAG DIR``. A request is one
chain: the message, then room for the reply. Reads and writes go straight between file and guest
memory. An fsync takes its time: it is done beside the guest (`work`) and answered later.

A request that cannot be done gets Rlerror; only one without a header or room for that answer is
the driver's mistake.

In a snapshot the fids are paths. A restore opens the files that were open again, as they are now;
one that is not there any more (it was deleted while it was open, or replaced) is lost: the log
names it, and the guest gets ESTALE.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

from devices.contract import U32, DeviceHost
from devices.errors import DeviceError, OptionError
from devices.files import HostFile
from devices.virtio.chain import Chain, RingError
from devices.virtio.common import VirtioState
from devices.virtio.p9 import messages as m
from devices.virtio.p9 import protocol as p
from devices.virtio.p9.codec import HEADER, CodecError, Message, decode, encode
from devices.virtio.p9.fids import FidState
from devices.virtio.p9.session import Session
from devices.virtio.p9.tree import Tree
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

F_MOUNT_TAG = 1 << 0
LONGEST_TAG = 62
QUEUE_SIZE = 128
MSIZE = 1 << 20
"""The longest message that it agrees to; Linux's transport has a limit of its own, 500 KiB."""
SHORTEST = 4096
"""The shortest that it agrees to: a name, a link's text and a header fit."""
_CONFIG = struct.Struct(f"<H{LONGEST_TAG}s")
_READ_WRITE = struct.Struct("<IQI")  # fid, offset, count
_COUNT = struct.Struct("<IBHI")  # the header, count
_ERROR_SIZE = HEADER.size + 4
_COST = 16
"""A request counts as one more for each 64 KiB."""


@dataclass
class P9Options:
    """A directory.

    Attributes:
        path: the directory.
        tag: the name under which the guest mounts it, up to 62 bytes.
        readonly: the guest cannot change anything in it.
    """

    path: Annotated[str, HostFile(directory=True, read_only_if="readonly")] = ""
    tag: str = "host"
    readonly: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise OptionError("path=DIRECTORY is needed: what the guest is to see", "path")
        if not 1 <= len(self.tag.encode()) <= LONGEST_TAG:
            raise OptionError(f"tag is 1 to {LONGEST_TAG} bytes", "tag")


@dataclass
class P9State(VirtioState):
    """`msize`: as negotiated, 0 before; `fids`: the client's handles."""

    msize: U32 = 0
    fids: list[FidState] = field(default_factory=list)


class _Sync(NamedTuple):
    """An fsync on its way, or a Flush that waits for those before it."""

    queue: VirtQueue
    chain: Chain
    tag: int
    fd: int
    data_only: bool


class P9(VirtioDevice):
    model: ClassVar[str] = "9p"
    summary: ClassVar[str] = "virtio 9P, a host directory: path=DIRECTORY,tag=NAME,readonly=BOOL"
    device_type: ClassVar[int] = 9
    class_code: ClassVar[int] = 0x018000  # mass storage, other
    config_size: ClassVar[int] = _CONFIG.size
    queues = (Queue("requests", QUEUE_SIZE),)
    Options = P9Options
    State = P9State
    options: P9Options
    state: P9State

    def __init__(self, host: DeviceHost, options: P9Options | None = None) -> None:
        if options is None or "path" not in host.fds:
            raise DeviceError(self.model, "it needs the directory that 'path' names")
        super().__init__(host, options)
        try:
            self._tree = Tree(host.fds["path"])
        except OSError as error:
            why = f"the directory cannot be used: openat2: {error.strerror}"
            raise DeviceError(self.model, why) from error
        self._session = Session(self._tree, options.readonly)
        self._syncing: list[_Sync] = []
        self._synced: list[tuple[_Sync, int]] = []
        """Done, each with 0 or its errno."""

    def on_sandboxed(self) -> None:
        self._tree.look_around()
        self._session.looks.find_ids()

    def features(self) -> int:
        return F_MOUNT_TAG

    def read_device_config(self) -> bytes:
        tag = self.options.tag.encode()
        return _CONFIG.pack(len(tag), tag)

    # Requests.

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if chain.size < HEADER.size or chain.room < _ERROR_SIZE:
            raise RingError("a 9P request without header or room for an answer")
        size, number, tag = HEADER.unpack(chain.read(HEADER.size))
        length = size - HEADER.size
        reply: Message
        try:
            if not 0 <= length <= chain.size:
                raise OSError(errno.EBADMSG, "a size that it does not have")
            if number == m.Read.number:
                self._read(chain, tag, length)
                return
            if number == m.Write.number:
                self._write(chain, tag, length)
                return
            kind = m.MESSAGES.get(number, Message)
            request = decode(kind, chain.read(length)) if kind.number else Message()
            if isinstance(request, (m.Fsync, m.Flush)):
                self._later(queue, chain, tag, request)
                return
            if isinstance(request, m.Version):
                reply = self._version(request)
            else:
                reply = self._session.carry_out(request)
            answer = encode(reply, tag)
            if len(answer) > min(chain.room, self.state.msize or SHORTEST):
                raise OSError(errno.EMSGSIZE, "the answer does not fit")
        except OSError as error:
            answer = encode(m.Rlerror(error.errno or errno.EIO), tag)
        except CodecError:
            answer = encode(m.Rlerror(errno.EBADMSG), tag)
        chain.write(answer)

    def _version(self, request: m.Version) -> Message:
        self._session.fids.clear()
        if request.msize < SHORTEST:
            raise OSError(errno.EMSGSIZE, f"msize is at least {SHORTEST}")
        self._agree(min(request.msize, MSIZE))
        known = request.version == p.VERSION
        return m.Rversion(self.state.msize, p.VERSION if known else b"unknown")

    def _agree(self, msize: int) -> None:
        self.state.msize = msize
        self._session.most = max(0, msize - _COUNT.size)

    def _fields(self, chain: Chain, length: int) -> tuple[int, int, int]:
        """The open file, offset and count of a read or write, and nothing of the data."""
        if length < _READ_WRITE.size:
            raise OSError(errno.EBADMSG, "cut short")
        fid, offset, count = _READ_WRITE.unpack(chain.read(_READ_WRITE.size))
        if offset + count >= 1 << 63:
            raise OSError(errno.EINVAL, "beyond what a file can have")
        return self._session.fids.opened(fid), offset, count

    def _read(self, chain: Chain, tag: int, length: int) -> None:
        fd, offset, count = self._fields(chain, length)
        if length != _READ_WRITE.size:
            raise OSError(errno.EBADMSG, "something follows")
        count = min(count, self._session.most, chain.room - _COUNT.size)
        self.spend(count >> _COST)
        done = os.preadv(fd, chain.places(_COUNT.size, count), offset) if count else 0
        chain.write(_COUNT.pack(_COUNT.size + done, m.Rread.number, tag, done))
        chain.wrote(done)

    def _write(self, chain: Chain, tag: int, length: int) -> None:
        fd, offset, count = self._fields(chain, length)
        if length != _READ_WRITE.size + count:
            raise OSError(errno.EBADMSG, "not as many bytes as it says")
        self.spend(count >> _COST)
        done = os.pwritev(fd, chain.sources(count), offset) if count else 0
        chain.write(encode(m.Rwrite(done), tag))

    # What takes time.

    def _later(self, queue: VirtQueue, chain: Chain, tag: int, request: Message) -> None:
        fd, data_only = -1, False
        if isinstance(request, m.Fsync):
            fd, data_only = os.dup(self._session.fids.opened(request.fid)), bool(request.data_only)
        elif not self._syncing:
            chain.write(encode(m.Rflush(), tag))  # all that came before was answered
            return
        chain.held = True
        self._syncing.append(_Sync(queue, chain, tag, fd, data_only))
        self.host.want_work()

    def work(self) -> None:
        if self._syncing:
            self._sync()
            self.host.want_turn()

    def _sync(self) -> None:
        for each in self._syncing:
            code = 0
            if each.fd >= 0:
                try:
                    (os.fdatasync if each.data_only else os.fsync)(each.fd)
                except OSError as error:
                    code = error.errno or errno.EIO
                os.close(each.fd)
            self._synced.append((each, code))
        self._syncing.clear()

    def turn(self) -> None:
        self._give_back()
        super().turn()

    def _give_back(self) -> None:
        done, self._synced = self._synced, []
        for each, code in done:
            self.guarded(each.queue, partial(self._end_sync, each, code))

    def _end_sync(self, sync: _Sync, code: int) -> None:
        if not sync.queue.owns(sync.chain):
            return
        reply: Message = m.Rfsync() if sync.fd >= 0 else m.Rflush()
        sync.chain.write(encode(m.Rlerror(code) if code else reply, sync.tag))
        sync.queue.complete(sync.chain)

    # Its life.

    def device_reset(self) -> None:
        self._forget_syncs()
        self._session.fids.clear()
        self._agree(0)

    def _forget_syncs(self) -> None:
        for each in self._syncing:
            if each.fd >= 0:
                os.close(each.fd)
        self._syncing.clear()
        self._synced.clear()

    def close(self) -> None:
        self._forget_syncs()
        self._session.fids.clear()

    def sleep(self) -> None:
        """No request is in flight in a snapshot: an fsync ends here."""
        if self._syncing:
            self._sync()
        if self._synced:
            self._give_back()
            self.end_turn()
        super().sleep()

    def snapshot(self) -> Any:
        self.state.fids = list(self._session.fids)
        return super().snapshot()

    def validate(self, state: Any) -> None:
        super().validate(state)
        if state.msize and not SHORTEST <= state.msize <= MSIZE:
            raise ValueError(f"msize is {SHORTEST} to {MSIZE}")
        for fid in state.fids:
            fid.check()
        if len({fid.number for fid in state.fids}) < len(state.fids):
            raise ValueError("two fids of the same number")

    def restored(self) -> None:
        super().restored()
        self._forget_syncs()
        self._agree(self.state.msize)
        for path in self._session.restore(self.state.fids):
            self.host.log(f"open file lost: {path!r} is not what it was")
