"""Block device (5.2): a disk whose sectors are those of a raw image file, or of a block device.

Reads and writes go straight between the file and guest memory, in the turn that the driver's
doorbell is. What must reach the disk itself, a flush, takes its time: it is done beside the guest
(`work`) and given back in a later turn. A driver that does not negotiate FLUSH is promised more:
each of its writes is on the disk before it is given back (5.2.6.2).

What the host refuses is an I/O error of the guest. After a failed `fdatasync` nobody can say what
is on the disk (the host's kernel forgets the pages that it could not write), so all later flushes
fail as well: a flush that succeeded means that everything before it is there.

A request that is no request at all (no header, no status byte) is the driver's mistake and needs a
reset; one that the disk cannot serve (beyond its end, not whole sectors) gets IOERR.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from devices import host_io
from devices.contract import DeviceHost
from devices.errors import DeviceError, OptionError
from devices.files import HostFile
from devices.virtio.chain import Chain, RingError
from devices.virtio.common import VirtioState
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

SECTOR = 512
QUEUE_SIZE = 512
MOST_QUEUES = 16
SERIAL_LENGTH = 20

F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE = 1 << 1, 1 << 2, 1 << 5, 1 << 6
F_FLUSH, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 12, 1 << 13, 1 << 14
"""5.2.3."""
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
"""5.2.6: kinds of requests, and how they end."""

SIZE_MAX, SEG_MAX = 1 << 20, QUEUE_SIZE - 2
"""One descriptor each is left for header and status."""
DISCARD_SECTORS, DISCARD_SEGMENTS = 1 << 22, 16
ZEROES_SECTORS, ZEROES_SEGMENTS = 1 << 15, 1
"""Most for one request: a host without the call for it has to write the zeros."""

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_SEGMENT = struct.Struct("<QII")  # sector, sectors, flags
_UNMAP = 1
# capacity, size_max, seg_max, geometry, blk_size, topology, writeback, num_queues, discard:
# sectors, segments, alignment; write zeroes: sectors, segments, may unmap
_CONFIG = struct.Struct("<QII4xI8xBxHIIIIIB3x")
_COST = 16
"""A request counts as one more for each 64 KiB."""


@dataclass
class BlkOptions:
    """A disk.

    Attributes:
        path: the raw image, or a block device, of whole sectors of 512 bytes.
        readonly: the guest cannot write to it.
        direct: past the host's page cache (O_DIRECT).
        serial: of the disk, as the guest sees it, up to 20 characters.
        queues: how many request queues, 1 to 16.
    """

    path: Annotated[str, HostFile(read_only_if="readonly", direct_if="direct", unit=SECTOR)] = ""
    readonly: bool = False
    direct: bool = False
    serial: str = ""
    queues: int = 1

    def __post_init__(self) -> None:
        if not self.path:
            raise OptionError("path=FILE is needed: the image of the disk", "path")
        if len(self.serial) > SERIAL_LENGTH or not self.serial.isascii():
            raise OptionError(f"serial is at most {SERIAL_LENGTH} ASCII characters", "serial")
        if not 1 <= self.queues <= MOST_QUEUES:
            raise OptionError(f"queues is 1 to {MOST_QUEUES}", "queues")


@dataclass
class BlkState(VirtioState):
    """`capacity`: in sectors, which must be the same when a snapshot is restored."""

    capacity: int = 0


class Blk(VirtioDevice):
    model: ClassVar[str] = "blk"
    summary: ClassVar[str] = "virtio disk: path=IMAGE,readonly=BOOL,serial=TEXT,queues=N"
    device_type: ClassVar[int] = 2
    class_code: ClassVar[int] = 0x018000  # mass storage, other
    config_size: ClassVar[int] = _CONFIG.size
    Options = BlkOptions
    State = BlkState
    options: BlkOptions
    state: BlkState

    def __init__(self, host: DeviceHost, options: BlkOptions | None = None) -> None:
        if options is None or "path" not in host.fds:
            raise DeviceError(self.model, "a disk needs the file that 'path' names")
        self.queues = [Queue(f"requests {n}", QUEUE_SIZE) for n in range(options.queues)]
        super().__init__(host, options)
        self._fd = host.fds["path"]
        self._direct = host_io.Direct(self._fd) if options.direct else None
        self.state.capacity = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR
        self._syncing: list[tuple[VirtQueue, Chain]] = []
        """Given back when all that was written before is on the disk."""
        self._synced: list[tuple[VirtQueue, Chain]] = []
        self._dirty = True
        self._sync_failed = False
        self._told: set[int | None] = set()

    def features(self) -> int:
        offered = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        offered |= F_MQ if self.options.queues > 1 else 0
        return offered | (F_RO if self.options.readonly else F_DISCARD | F_WRITE_ZEROES)

    def read_device_config(self) -> bytes:
        return _CONFIG.pack(
            self.state.capacity,
            SIZE_MAX,
            SEG_MAX,
            SECTOR,
            0,
            self.options.queues,
            DISCARD_SECTORS,
            DISCARD_SEGMENTS,
            1,
            ZEROES_SECTORS,
            ZEROES_SEGMENTS,
            1,
        )

    def validate(self, state: Any) -> None:
        super().validate(state)
        if state.capacity != self.state.capacity:
            raise ValueError(
                f"the disk had {state.capacity} sectors, its file has {self.state.capacity} now"
            )

    # Requests.

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if chain.size < _HEADER.size or not chain.room:
            raise RingError("a disk request without header or status")
        kind, _, sector = _HEADER.unpack(chain.read(_HEADER.size))
        try:
            status = self._carry_out(kind, sector, chain)
        except OSError as error:
            status = S_IOERR
            self._tell(error)
        if status == S_OK and self._waits_for_disk(kind):
            chain.held = True
            self._syncing.append((queue, chain))
            self.host.want_work()
        else:
            _end(chain, status)

    def _carry_out(self, kind: int, sector: int, chain: Chain) -> int:
        if kind == T_IN:
            return self._read(sector, chain)
        if kind == T_OUT:
            return self._write(sector, chain)
        if kind == T_FLUSH:
            return S_OK
        if kind == T_GET_ID:
            serial = self.options.serial.encode().ljust(SERIAL_LENGTH, b"\0")
            chain.write(serial[: chain.room - 1])
            return S_OK
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            return self._clear(kind, chain)
        return S_UNSUPP

    def _waits_for_disk(self, kind: int) -> bool:
        if kind == T_FLUSH:
            return self._dirty or self._sync_failed
        return kind in (T_OUT, T_WRITE_ZEROES) and not self.negotiated(F_FLUSH)

    def _fits(self, sector: int, length: int) -> bool:
        whole = not length % SECTOR and length <= SIZE_MAX * SEG_MAX
        return whole and sector + length // SECTOR <= self.state.capacity

    def _read(self, sector: int, chain: Chain) -> int:
        length, offset = chain.room - 1, sector * SECTOR
        if not self._fits(sector, length):
            return S_IOERR
        self.spend(length >> _COST)
        while chain.written < length:
            left, at = length - chain.written, offset + chain.written
            if self._direct is None:
                done = chain.preadv(self._fd, left, at)
            else:
                done = self._direct.read(chain.places(chain.written, left), at)
            if not done:
                raise OSError(None, "the file has become shorter")
            chain.wrote(done)
        return S_OK

    def _write(self, sector: int, chain: Chain) -> int:
        length = chain.size
        if self.options.readonly or not self._fits(sector, length):
            return S_IOERR
        self.spend(length >> _COST)
        host_io.must_reach(self._fd, sector * SECTOR + length)
        self._dirty = True
        if self._direct is None:
            chain.pwrite_all(self._fd, sector * SECTOR)
        else:
            self._direct.write_all(chain.sources(), sector * SECTOR)
        return S_OK

    def _clear(self, kind: int, chain: Chain) -> int:
        """Discard or write zeroes."""
        most_segments, most_sectors, allowed = (
            (DISCARD_SEGMENTS, DISCARD_SECTORS, 0)
            if kind == T_DISCARD
            else (ZEROES_SEGMENTS, ZEROES_SECTORS, _UNMAP)
        )
        count, odd = divmod(chain.size, _SEGMENT.size)
        if self.options.readonly or odd or not 1 <= count <= most_segments:
            return S_IOERR
        segments = list(_SEGMENT.iter_unpack(chain.read()))
        if any(flags & ~allowed for _, _, flags in segments):
            return S_UNSUPP
        for sector, sectors, _ in segments:
            if sectors > most_sectors or sector + sectors > self.state.capacity:
                return S_IOERR
            host_io.must_reach(self._fd, (sector + sectors) * SECTOR)
        self._dirty = True
        for sector, sectors, flags in segments:
            if not sectors:
                continue
            offset, length = sector * SECTOR, sectors * SECTOR
            if kind == T_DISCARD:
                host_io.punch_hole(self._fd, offset, length)  # or not: it is a hint
            elif not (flags & _UNMAP and host_io.punch_hole(self._fd, offset, length)):
                host_io.zero(self._fd, offset, length)
        return S_OK

    # Flushes.

    def work(self) -> None:
        if self._syncing:
            self._sync()
            self.host.want_turn()

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
            self._dirty = False
        except OSError as error:
            self._sync_failed = True
            self._tell(error)
        self._synced += self._syncing
        self._syncing.clear()

    def turn(self) -> None:
        self._give_back()
        super().turn()

    def _give_back(self) -> None:
        done, self._synced = self._synced, []
        for queue, chain in done:
            self.guarded(queue, partial(self._end_synced, queue, chain))

    def _end_synced(self, queue: VirtQueue, chain: Chain) -> None:
        if queue.owns(chain):
            _end(chain, S_IOERR if self._sync_failed else S_OK)
            queue.complete(chain)

    def device_reset(self) -> None:
        self._syncing.clear()
        self._synced.clear()

    def sleep(self) -> None:
        """No request is in flight in a snapshot: a flush ends here."""
        if self._syncing:
            self._sync()
        if self._synced:
            self._give_back()
            self.end_turn()
        super().sleep()

    def restored(self) -> None:
        super().restored()
        self.device_reset()
        self._dirty = True

    def _tell(self, error: OSError) -> None:
        """Name each kind of host error once; a guest can provoke them without end."""
        if error.errno not in self._told:
            self._told.add(error.errno)
            self.host.log(f"the disk's file: {error.strerror}")


def _end(chain: Chain, status: int) -> None:
    """Write the status byte, which is the last of the room."""
    last = chain.room - 1
    chain.write_at(last, bytes((status,)))
    if chain.written == last:
        chain.written = chain.room
