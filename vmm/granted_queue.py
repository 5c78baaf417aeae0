"""One virtqueue of a device with grants: the driver's ring here, our part of the area there."""

from __future__ import annotations

from typing import NamedTuple

from devices.dma import DmaFault
from devices.virtio.chain import Chain, RingError
from devices.virtio.granted import (
    COUNT,
    GRANT,
    GRANT_BYTES,
    HEADER,
    MISTAKE_AT,
    MISTAKE_BYTES,
    USED,
    USED_AT,
    Part,
)
from devices.virtio.ring import VirtQueue

_ALIGN = 64


class Grant(NamedTuple):
    """One request that the device has: the driver's chain, and its place in the area."""

    chain: Chain
    mark: tuple[int, bool, int]
    offset: int
    end: int
    room: int


class GrantedQueue:
    """One queue: the driver's ring on one side, our part of the area on the other."""

    def __init__(self, queue: VirtQueue, view: memoryview, part: Part) -> None:
        self.queue = queue
        self.granted = self.used = 0
        self.waiting = False
        """More is available than there was room to grant."""
        self.again = False
        """And there is room now."""
        self.mistake = ""
        self._epoch = queue.epoch
        self._grants: dict[int, Grant] = {}
        """By place, the oldest first."""
        self._view, self._part = view, part
        self._quota = 0

    def follow(self) -> None:
        """The guest wrote a register: it may have reset the queue."""
        if self._epoch != self.queue.epoch:
            self._epoch = self.queue.epoch
            self._grants.clear()
            self.granted = self.used = self._quota = 0
            self.waiting = self.again = False
            self.mistake = ""
            COUNT.pack_into(self._view, self._part.base + USED_AT, 0)
            self._tell()

    def begin(self) -> None:
        """Grant what is available, as far as there is room."""
        self.again = False
        if self.mistake:
            return
        try:
            while self._grant_one():
                pass
            quota = self.queue.quota()
        except (RingError, DmaFault) as error:
            self.mistake, quota = str(error), 0
            self._tell()
        if quota != self._quota:
            self._quota = quota
            self._tell()

    def _grant_one(self) -> bool:
        size = self.queue.state.size
        place = self.granted % size
        mark = self.queue.mark()
        chain = self.queue.pop()
        self.waiting = False
        if chain is None:
            return False
        length, room = chain.size, chain.room
        total = length + room
        if total > GRANT_BYTES:
            raise RingError(f"a request of {total} bytes; {GRANT_BYTES} can be granted at once")
        offset = self._find(total)
        if offset < 0 or place in self._grants:
            self.queue.rewind(mark)
            self.waiting = True
            return False
        view, at = self._view, offset
        for source in chain.sources():
            view[at : at + len(source)] = source
            at += len(source)
        self._grants[place] = Grant(chain, mark, offset, offset + total, room)
        GRANT.pack_into(
            view, self._part.grants + GRANT.size * place, offset, length, room, chain.count
        )
        self.granted = (self.granted + 1) % (2 * size)
        self._tell()
        return True

    def _find(self, length: int) -> int:
        """Where in the data there is room for so many bytes in a row; -1 for nowhere.

        The oldest grant and the newest one are the borders of what is taken.
        """
        begin = self._part.data
        if not self._grants:
            return begin
        grants = self._grants.values()
        tail = next(iter(grants)).offset
        newest = next(reversed(grants))
        head = (newest.end + _ALIGN - 1) & -_ALIGN
        if newest.offset >= tail:
            if head + length <= begin + GRANT_BYTES:
                return head
            head = begin
        return head if head + length <= tail else -1

    def _tell(self) -> None:
        text = self.mistake.encode()[:MISTAKE_BYTES]
        start = self._part.base + MISTAKE_AT
        self._view[start : start + len(text)] = text
        HEADER.pack_into(self._view, self._part.base, self.granted, self._quota, len(text))

    def end(self) -> str:
        """Take what was used; what the device did wrong, or ""."""
        count = COUNT.unpack_from(self._view, self._part.base + USED_AT)[0]
        wrong = ""
        if count != self.used:
            size = self.queue.state.size
            new = (count - self.used) % (2 * size)
            if count >= 2 * size or new > len(self._grants):
                return f"used {new} requests of the {len(self._grants)} that it was granted"
            self.again = self.waiting
            try:
                while self.used != count and not wrong:
                    wrong = self._take_back(self.used % size)
                    self.used = (self.used + 1) % (2 * size)
            except (RingError, DmaFault) as error:
                self.mistake = str(error)
                self._tell()
        self.queue.close()
        return wrong

    def _take_back(self, entry: int) -> str:
        place, written, begin, end = USED.unpack_from(
            self._view, self._part.used + USED.size * entry
        )
        grant = self._grants.pop(place, None)
        if grant is None:
            return f"used request {place}, which it was not granted"
        if max(written, end) > grant.room:
            return f"wrote {max(written, end)} bytes to a request with room for {grant.room}"
        chain, room = grant.chain, grant.end - grant.room
        for target in chain.places(0, written):
            length = len(target)
            target[:] = self._view[room : room + length]
            room += length
        chain.wrote(written)
        if begin < end:
            room = grant.end - grant.room
            chain.write_at(begin, self._view[room + begin : room + end])
        self.queue.complete(chain)
        return ""

    def revoke(self) -> None:
        """Make what is granted available again: the device has finished all that it began.

        One whose driver must reset it may have dropped a request before one that it used. Then
        nothing is granted any more until that reset.
        """
        size = self.queue.state.size
        places = [(self.used + n) % size for n in range(len(self._grants))]
        if list(self._grants) == places:
            if places:
                next_avail, wrap, _ = self._grants[places[0]].mark
                self.queue.rewind((next_avail, wrap, 0))
        else:
            self.mistake = self.mistake or "the device has dropped a request"
        self._grants.clear()
        self.waiting = self.again = False
        self.granted = self.used
        self._tell()

    def load(self, granted: int, mistake: str) -> None:
        """Go on where `revoke` ended."""
        self._epoch = self.queue.epoch
        self.granted = self.used = granted
        self.mistake = mistake
        COUNT.pack_into(self._view, self._part.base + USED_AT, granted)
        self._tell()
