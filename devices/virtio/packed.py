"""The packed virtqueue (2.8): one ring that both sides write, and an event structure of each."""

from __future__ import annotations

import struct
from array import array

from devices.dma import GuestMemory
from devices.virtio.chain import Chain, RingError
from devices.virtio.long_chain import LONG, LongChain
from devices.virtio.ring import (
    DESC_SIZE,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    QueueState,
    advance,
    quota,
    spans_of,
)

_DESC = struct.Struct("<QIHH")  # address, length, id, flags
_USED = struct.Struct("<IHH")  # a used descriptor without its address
_EVENT = struct.Struct("<HH")  # offset and wrap counter, flags
_F_AVAIL, _F_USED = 1 << 7, 1 << 15
_WRAP = 1 << 15
_DISABLE, _DESC_EVENT = 1, 2
_EVENT_FLAGS = 3
"""2.8.10: RING_EVENT_FLAGS_*."""


class PackedRing:
    """A packed ring for one turn.

    Args:
        state: of its queue; positions and wrap counters move on.
        memory: the guest's.
        indirect, event_idx: whether these features were negotiated.

    Raises:
        RingError: an area is not aligned (2.8.10.1).
        DmaFault: an area is not in RAM.
    """

    def __init__(
        self, state: QueueState, memory: GuestMemory, indirect: bool, event_idx: bool
    ) -> None:
        if state.desc % 16 or state.driver % 4 or state.device % 4:
            raise RingError("a part of the queue is not aligned")
        self._state = state
        self._memory = memory
        self._indirect, self._event_idx = indirect, event_idx
        self._ring = memory.window(state.desc, DESC_SIZE * state.size)
        self._driver = memory.window(state.driver, _EVENT.size)
        self._device = memory.window(state.device, _EVENT.size)
        self._first_used, self._first_wrap = state.next_used, state.used_wrap
        self._used = 0

    def take(self) -> Chain | None:
        state = self._state
        flags = _DESC.unpack_from(self._ring, DESC_SIZE * state.next_avail)[3]
        if bool(flags & _F_AVAIL) != state.avail_wrap or bool(flags & _F_USED) == state.avail_wrap:
            self._listen()
            return None
        chain = self._walk()
        state.next_avail, flip = advance(state.next_avail + chain.count, state.size)
        state.avail_wrap ^= flip
        return chain

    def _listen(self) -> None:
        """Be notified when the driver fills the next place; without EVENT_IDX we always are."""
        if not self._event_idx:
            return
        state = self._state
        wanted = state.next_avail | (_WRAP if state.avail_wrap else 0), _DESC_EVENT
        if _EVENT.unpack_from(self._device) != wanted:
            _EVENT.pack_into(self._device, 0, *wanted)
            self._memory.mark(state.device, _EVENT.size)

    def _walk(self) -> Chain:
        state = self._state
        chain = Chain(self._memory)
        position, count = state.next_avail, 0
        while True:
            address, length, chain.id, flags = _DESC.unpack_from(self._ring, DESC_SIZE * position)
            count += 1
            if flags & F_INDIRECT:
                # 2.8.19: a list is either of one kind or of the other.
                if count > 1 or flags & F_NEXT:
                    raise RingError("an indirect descriptor in a list of others")
                return self._of_table(chain, address, length)
            chain.add(address, length, bool(flags & F_WRITE))
            if not flags & F_NEXT:
                break
            if count >= state.size:
                raise RingError("a descriptor list loops or is longer than the queue")
            position = (position + 1) % state.size
        chain.count = count
        return chain

    def _of_table(self, chain: Chain, address: int, length: int) -> Chain:
        if not self._indirect:
            raise RingError("indirect descriptors were not negotiated")
        if not length or length % DESC_SIZE:
            raise RingError(f"an indirect table of {length} bytes")
        if length // DESC_SIZE > self._state.size:
            raise RingError("a descriptor list is longer than the queue")
        # 2.8.7: of its flags only "write" means anything, and of its order nothing but itself.
        table = self._memory.read(address, length)
        if length // DESC_SIZE >= LONG:
            writable = bytes([each & F_WRITE for each in array("H", table)[7::8]])
            readable = writable.count(0)
            if not any(writable[:readable]):
                long = LongChain.make(self._memory, chain.id, spans_of(table), readable)
                if long is not None:
                    return long
        for start, size, _, flags in _DESC.iter_unpack(table):
            chain.add(start, size, flags & F_WRITE)
        return chain

    def use(self, chain: Chain) -> None:
        state = self._state
        flags = _F_AVAIL | _F_USED if state.used_wrap else 0
        if chain.written:
            flags |= F_WRITE
        # A chain can be 4 GiB long, one more than its length field holds.
        written = min(chain.written, 0xFFFF_FFFF)
        _USED.pack_into(self._ring, DESC_SIZE * state.next_used + 8, written, chain.id, flags)
        state.next_used, flip = advance(state.next_used + chain.count, state.size)
        state.used_wrap ^= flip
        self._used += chain.count

    def quota(self) -> int:
        state = self._state
        where, flags = _EVENT.unpack_from(self._driver)
        flags &= _EVENT_FLAGS
        if flags == _DISABLE:
            return 0
        if flags != _DESC_EVENT or not self._event_idx:
            return 1
        event = where & ~_WRAP
        if bool(where & _WRAP) != self._first_wrap:
            event += state.size
        return quota(event, self._first_used)

    def close(self) -> bool:
        if not self._used:
            return False
        self._memory.mark(self._state.desc, len(self._ring))
        return 0 < self.quota() <= self._used
