"""The split virtqueue (2.7): descriptor table, available ring, used ring."""

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
    quota,
    spans_of,
)

_DESC = struct.Struct("<QIHH")  # address, length, flags, next
_USED = struct.Struct("<II")  # id, length
_U16 = struct.Struct("<H")
_HEADER = 4  # flags and index, in both rings
_NO_INTERRUPT = 1
_COUNTED = array("H", range(1024))


class SplitRing:
    """A split ring for one turn.

    Args:
        state: of its queue; `next_avail` and `next_used` move on.
        memory: the guest's.
        indirect, event_idx: whether these features were negotiated.

    Raises:
        RingError: an area is not aligned (2.7).
        DmaFault: an area is not in RAM.
    """

    def __init__(
        self, state: QueueState, memory: GuestMemory, indirect: bool, event_idx: bool
    ) -> None:
        if state.desc % 16 or state.driver % 2 or state.device % 4:
            raise RingError("a part of the queue is not aligned")
        size = state.size
        event = 2 * event_idx
        self._state = state
        self._memory = memory
        self._indirect, self._event_idx = indirect, event_idx
        self._table = memory.window(state.desc, DESC_SIZE * size)
        self._avail = memory.window(state.driver, _HEADER + 2 * size + event)
        self._used = memory.window(state.device, _HEADER + _USED.size * size + event)
        self._first_used = state.next_used
        self._dirty = False

    def take(self) -> Chain | None:
        state = self._state
        waiting = (_U16.unpack_from(self._avail, 2)[0] - state.next_avail) & 0xFFFF
        if not waiting:
            self._listen()
            return None
        if waiting > state.size:
            raise RingError(f"the available index jumps by {waiting}")
        slot = state.next_avail % state.size
        chain = self._walk(_U16.unpack_from(self._avail, _HEADER + 2 * slot)[0])
        state.next_avail = (state.next_avail + 1) & 0xFFFF
        return chain

    def _listen(self) -> None:
        """2.7.10: be notified of the next chain. Without EVENT_IDX we always are: flags stay 0."""
        place = _HEADER + _USED.size * self._state.size
        if self._event_idx and _U16.unpack_from(self._used, place)[0] != self._state.next_avail:
            _U16.pack_into(self._used, place, self._state.next_avail)
            self._dirty = True

    def _walk(self, head: int) -> Chain:
        chain = Chain(self._memory, head)
        table, entries, index = self._table, self._state.size, head
        left, in_indirect = entries, False
        add, unpack = chain.add, _DESC.unpack_from
        while True:
            if index >= entries:
                raise RingError(f"there is no descriptor {index}, only {entries}")
            if not left:
                raise RingError("a descriptor chain loops or is longer than the queue")
            address, length, flags, following = unpack(table, DESC_SIZE * index)
            if flags & F_INDIRECT:
                # 2.7.5.3: ends the chain proper; its write flag means nothing.
                if in_indirect:
                    raise RingError("an indirect descriptor in an indirect table")
                if flags & F_NEXT:
                    raise RingError("an indirect descriptor has a next one")
                table, entries = self._table_at(address, length), length // DESC_SIZE
                if LONG <= entries <= min(left, len(_COUNTED)) and left == self._state.size:
                    long = _in_order(self._memory, head, table.tobytes())
                    if long is not None:
                        return long
                in_indirect, index = True, 0
                continue
            left -= 1
            add(address, length, flags & F_WRITE)
            if not flags & F_NEXT:
                return chain
            index = following

    def _table_at(self, address: int, length: int) -> memoryview:
        if not self._indirect:
            raise RingError("indirect descriptors were not negotiated")
        if not length or length % DESC_SIZE:
            raise RingError(f"an indirect table of {length} bytes")
        return self._memory.window(address, length)

    def use(self, chain: Chain) -> None:
        state = self._state
        slot = state.next_used % state.size
        # A chain can be 4 GiB long, one more than its length field holds.
        written = min(chain.written, 0xFFFF_FFFF)
        _USED.pack_into(self._used, _HEADER + _USED.size * slot, chain.id, written)
        state.next_used = (state.next_used + 1) & 0xFFFF
        _U16.pack_into(self._used, 2, state.next_used)

    def quota(self) -> int:
        if self._event_idx:
            event = _U16.unpack_from(self._avail, _HEADER + 2 * self._state.size)[0]
            return quota(event, self._first_used)
        return 0 if _U16.unpack_from(self._avail, 0)[0] & _NO_INTERRUPT else 1

    def close(self) -> bool:
        state = self._state
        used = (state.next_used - self._first_used) & 0xFFFF
        if used or self._dirty:
            self._memory.mark(state.device, len(self._used))
        return used > 0 and 0 < self.quota() <= used


def _in_order(memory: GuestMemory, head: int, table: bytes) -> LongChain | None:
    """A chain whose descriptors follow each other in their table, as drivers make them.

    None: they do not, or not all of them; or see `LongChain.make`.
    """
    halves = array("H", table)
    flags, following = halves[6::8], halves[7::8]
    last = len(flags) - 1
    if following[:last] != _COUNTED[1 : last + 1] or flags[last] & ~F_WRITE:
        return None
    readable = flags.count(F_NEXT)
    expected = array("H", [F_NEXT]) * readable + array("H", [F_NEXT | F_WRITE]) * (last - readable)
    if flags[:last] != expected or (flags[last] == 0 and readable < last):
        return None
    return LongChain.make(memory, head, spans_of(table), readable + (flags[last] == 0))
