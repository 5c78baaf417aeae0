"""Virtqueues of a device that gets no guest memory, only the bytes of its requests.

The machine walks the guest's rings itself (`vmm.grants`) and copies what the device may read into
an *area* that both sides map; what the device wrote it copies back when the request is used. Here
is what lies in the area, and the device's side of it: `GrantedRing` in the place of a split or
packed ring, over `GrantedMemory` in the place of guest memory. A request handler cannot tell.

Each queue has a part of the area, all numbers little-endian:

========== ====================================================================================
what       content
========== ====================================================================================
header     u32 each. Of the machine: how many requests were granted; how many used places make
           the driver want a notification (0: it wants none); the length of a mistake's text.
           Of the device, at `USED_AT`: how many requests were used
mistake    what the driver did wrong after the last request that was granted, UTF-8
grants     16 bytes for each place: offset in the area, bytes to read, room after them, places
           that the request takes in the driver's ring
used       16 bytes for each place: the grant's place, bytes written from the start of the room,
           begin and end of what was written elsewhere in it (0, 0 for nothing)
data       `GRANT_BYTES`; of each request what can be read, then the room, in one piece
========== ====================================================================================

The counts run from 0 to twice the queue's size, so that full and empty differ.

The machine reads nothing of this but the device's count, the used entries and the rooms of
requests that are used, once each; it believes none of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from devices.dma import DmaFault
from devices.spans import Spans
from devices.virtio.chain import Chain, RingError
from devices.virtio.ring import QueueState, advance

GRANT_BYTES = 8 << 20
"""The most that is granted of one queue at once, so the longest request. Linux asks for 4 MiB of a
disk at most (BLK_DEF_MAX_SECTORS_CAP)."""
MOST_QUEUES = 32

HEADER = struct.Struct("<III")
COUNT = struct.Struct("<I")
GRANT = struct.Struct("<IIII")
USED = struct.Struct("<IIII")
MISTAKE_AT, MISTAKE_BYTES = 0x40, 0x80
USED_AT = 0xC0
_GRANTS_AT = 0x100
_PAGE = 4096


class Part(NamedTuple):
    """Where in the area the things of one queue are; `most` is its largest size."""

    base: int
    most: int
    grants: int
    used: int
    data: int


def area_parts(sizes: Sequence[int]) -> tuple[tuple[Part, ...], int]:
    """The parts for queues of at most these sizes, and the bytes of the whole area."""
    parts, base = [], 0
    for most in sizes:
        grants = base + _GRANTS_AT
        used = grants + GRANT.size * most
        data = (used + USED.size * most + _PAGE - 1) & -_PAGE
        parts.append(Part(base, most, grants, used, data))
        base = data + GRANT_BYTES
    return tuple(parts), base


AREA_LIMIT = area_parts([32768] * MOST_QUEUES)[1]
"""Bytes of the largest area that there can be."""


class GrantedMemory:
    """The area, as the memory that chains lie in; an address is an offset in it.

    Args:
        view: the whole area.
        sizes: the largest size of each queue.

    Raises:
        ValueError: `view` is shorter than an area for these queues.
    """

    def __init__(self, view: memoryview, sizes: Sequence[int]) -> None:
        self.view = view
        self.parts, length = area_parts(sizes)
        if view.nbytes < length:
            raise ValueError(f"an area of {view.nbytes} bytes; these queues need {length}")

    def window(self, address: int, length: int) -> memoryview:
        if address < 0 or length < 0 or address + length > self.view.nbytes:
            raise DmaFault(f"{address:#x}+{length:#x} was not granted")
        return self.view[address : address + length]

    def read(self, address: int, length: int) -> bytes:
        return self.window(address, length).tobytes()

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.window(address, len(data))[:] = data

    def mark(self, address: int, length: int) -> None:
        """Nothing: a used entry says what was written."""

    def windows(self, spans: Iterable[tuple[int, int]]) -> list[memoryview]:
        return [self.window(address, length) for address, length in spans]

    def host(self, spans: Spans) -> int | None:
        """Not known: what is granted is a few ranges."""
        return None

    def mark_pages(self, runs: Sequence[tuple[int, int]]) -> None:
        """Nothing, as `mark`."""


class GrantedRing:
    """What the machine granted of one queue, for one turn.

    Args:
        state: of its queue: `next_avail` and `next_used` are places, and move on.
        memory: the area.
        index: the queue's number.
    """

    def __init__(self, state: QueueState, memory: GrantedMemory, index: int) -> None:
        self._state = state
        self._memory = memory
        self._view = memory.view
        self._part = memory.parts[index]
        self._used = 0

    def take(self) -> Chain | None:
        state, part = self._state, self._part
        granted, _, mistake = HEADER.unpack_from(self._view, part.base)
        place = state.next_avail
        if granted == (place if state.avail_wrap else place + state.size):
            if mistake:
                start = part.base + MISTAKE_AT
                raise RingError(str(self._view[start : start + mistake], "utf-8", "replace"))
            return None
        offset, size, room, count = GRANT.unpack_from(self._view, part.grants + GRANT.size * place)
        chain = Chain(self._memory, place)
        chain.count = count
        if size:
            chain.add(offset, size, False)
        if room:
            chain.add(offset + size, room, True)
        state.next_avail, flip = advance(place + 1, state.size)
        state.avail_wrap ^= flip
        return chain

    def use(self, chain: Chain) -> None:
        state, part, place = self._state, self._part, self._state.next_used
        begin, end = chain.elsewhere
        begin = max(begin, chain.written)
        if begin >= end:
            begin = end = 0
        at = part.used + USED.size * place
        USED.pack_into(self._view, at, chain.id, chain.written, begin, end)
        state.next_used, flip = advance(place + 1, state.size)
        state.used_wrap ^= flip
        count = state.next_used if state.used_wrap else state.next_used + state.size
        COUNT.pack_into(self._view, part.base + USED_AT, count)
        self._used += chain.count

    def quota(self) -> int:
        told: int = HEADER.unpack_from(self._view, self._part.base)[1]
        return told

    def close(self) -> bool:
        return 0 < self.quota() <= self._used
