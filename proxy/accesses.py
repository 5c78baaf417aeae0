"""The hot path of a proxied device: reads and writes of its regions, by tube or by lane.

Nothing here raises for anything that a child does: a failed device reads all-ones, its writes are
dropped and counted. The functions are closures over local variables because that is the fastest
that CPython has.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from devices.bus import ALL_ONES
from proxy import lane
from proxy import messages as m
from proxy.errors import Misuse
from proxy.link import Link
from proxy.machine_lane import BURST, TURNS, MachineLane
from proxy.tube import MAX_DATAGRAM

SPINS = range(2000)
"""Looks at the lane (some 0.1 ms) before the slow wait."""
TURN_SPINS = range(16_000)
"""The same for a turn, which takes longer than a register access."""
ONE_LOOK = range(1)
"""The same where the child sits on this CPU: it cannot run while we look."""

_READ = struct.Struct("<QQQ")
_WRITE = struct.Struct("<QQQQ")
_RESULT = struct.Struct("<QQ")
_RESULT_HEADERS = tuple(m.ReadResult.opcode | size << 8 for size in range(9))
_OK = m.Ok.opcode
_TICK = BURST - 1
_TURNS_TICK = TURNS - 1


class RegionHandler:
    """The bus device of one region.

    Attributes:
        base: where the region is mapped; only told to the child, which may log it.
    """

    __slots__ = ("base", "read", "write")

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]

    def __init__(self, base: int) -> None:
        self.base = base


class Accesses:
    """All accesses of one device.

    Attributes:
        handlers: one for each region of the shape.
        counts: accesses by tube and by lane since the start.
        settled: whether the child has carried out all that was posted, as far as is known.
        settle: a command was sent whose answer comes after all that was posted.
        look: whether anything posted may still be on its way; the next write that is posted is
            told by `Link.on_posted`, once until the next look.
        gate: refuse accesses (as `Misuse`) while the device sleeps (False), or take them again.
    """

    handlers: tuple[RegionHandler, ...]
    counts: Callable[[], tuple[int, int]]
    settled: Callable[[], bool]
    settle: Callable[[], None]
    look: Callable[[], bool]
    gate: Callable[[bool], None]

    def __init__(
        self, link: Link, shape: m.Shape, shared: MachineLane, *, synced: bool = False
    ) -> None:
        # Without a page no lane is ever opened, and these two are never touched.
        words: Any = shared.words
        page: Any = shared.page
        send, receive = link.tube.send, link.tube.recv_into
        buffer = bytearray(MAX_DATAGRAM + 1)
        pack_read, pack_write, unpack = _READ.pack, _WRITE.pack, _RESULT.unpack_from
        put, tick, results, ones = lane.SLOT.pack_into, shared.tick, _RESULT_HEADERS, ALL_ONES
        put_read, ring, slots = lane.READ_SLOT.pack_into, lane.RING, lane.RING_SLOTS
        last_slot, half = slots - 1, slots // 2
        head_word, tail_word, value_word = lane.HEAD, lane.TAIL, lane.VALUE
        state_word, upcalls_word = lane.STATE, lane.UPCALLS
        dont_wait, spins, fence = socket.MSG_DONTWAIT, SPINS, threading.Lock()
        give_way, give_way_timed = os.sched_yield, shared.give_way
        tubed = head = dozing = 0
        limit = slots
        is_open = shares = posted = watched = False

        def changed() -> None:
            nonlocal is_open, shares, spins, dozing
            is_open, dozing = shared.is_open, shared.dozing
            shares = is_open and shared.shares
            spins = ONE_LOOK if shares else SPINS

        def counts() -> tuple[int, int]:
            return tubed, head

        def settle() -> None:
            nonlocal posted
            posted = False

        def settled() -> bool:
            nonlocal posted
            if posted and is_open:
                posted = words[tail_word] != head
            return not posted

        def look() -> bool:
            nonlocal watched
            watched = False
            return not settled()

        def asleep(*_: object) -> int:
            raise Misuse(f"an access to '{link.name}', which is asleep")

        def gate(take: bool) -> None:
            nonlocal send
            send = link.tube.send if take else asleep

        def make_room() -> bool:
            """Wait for free slots; False on failure, or if the lane was closed meanwhile."""
            nonlocal limit
            # A long run of posted writes is no reason to give up the lane: the child is only
            # slower than the guest. Half a ring at a time keeps the two from tripping.
            for _ in spins:
                tail = words[tail_word]
                if head - half <= tail <= head:
                    limit = tail + slots
                    return True
            tail = shared.wait_tail(head - slots + 1, head, "Write")
            if tail is None:
                return False
            limit = tail + slots
            return is_open

        def slow_read(size: int, request: bytes | None, datagram: bytes | None) -> int:
            value = link.finish_read(size, request, datagram)
            return ones[size] if value is None else value & ones[size]

        def lost_read(size: int, request: bytes | None, error: OSError) -> int:
            """A send (with `request`) or a receive of a read did not go through."""
            if not isinstance(error, BlockingIOError):
                link.fail("", "Read")
                return ones[size]
            return slow_read(size, request, None)

        def tube_write(request: bytes | None) -> None:
            """A synced write by the tube."""
            try:
                send(request, dont_wait)  # type: ignore[arg-type]
                request = None
                got = receive(buffer)
            except OSError as error:
                lost_write(request, error)
                return
            except Misuse:
                raise
            except BaseException:
                link.fail("was abandoned in mid-exchange", "SyncedWrite")
                raise
            if (got != 1 or buffer[0] != _OK) and not link.finish_write(None, bytes(buffer[:got])):
                link.dropped_writes += 1

        def lost_write(request: bytes | None, error: OSError) -> None:
            """A send (with `request`) or a receive of a synced write did not go through."""
            if not isinstance(error, BlockingIOError):
                link.fail("", "SyncedWrite")
            elif link.finish_write(request, None):
                return
            link.dropped_writes += 1

        def region(index: int, base: int, waits: bool) -> RegionHandler:
            handler = RegionHandler(base)
            reads = tuple(lane.header(m.Read.opcode, size, index) for size in range(9))
            writes = tuple(lane.header(m.Write.opcode, size, index) for size in range(9))
            synceds = tuple(lane.header(m.SyncedWrite.opcode, size, index) for size in range(9))

            def read(offset: int, size: int, again: bool = False) -> int:
                nonlocal tubed, head, limit, posted
                if is_open:
                    if words[state_word] == dozing:
                        shared.close()
                    elif head < limit or make_room():
                        where = ring[head & last_slot]
                        put_read(page, where, reads[size], offset)
                        head += 1
                        words[head_word] = head
                        if shares:
                            give_way() if head & _TICK else give_way_timed()
                        for _ in spins:
                            if words[tail_word] == head:
                                break
                        else:
                            if shared.wait_tail(head, head, "Read") is None:
                                return ones[size]
                        limit = head + slots
                        posted = False
                        result: int = words[value_word]
                        upcalls = words[upcalls_word]
                        # It may also lag: of an upcall that a slow wait met already, the child may
                        # not have counted what it sent.
                        if upcalls > link.upcalls and not link.catch_up(upcalls, "Read"):
                            return ones[size]
                        return result & ones[size]
                # Once: a child that scribbles on the page could have the lane opened for ever.
                if not tubed & _TICK and not again:
                    tick()
                    if is_open:
                        return read(offset, size, True)
                tubed += 1
                posted = False
                request: bytes | None = pack_read(reads[size], offset, handler.base + offset)
                try:
                    send(request, dont_wait)  # type: ignore[arg-type]
                    request = None
                    got = receive(buffer)
                except OSError as error:
                    return lost_read(size, request, error)
                except Misuse:
                    raise
                except BaseException:
                    # An interrupt: the answer would be taken for that of the next read.
                    link.fail("was abandoned in mid-exchange", "Read")
                    raise
                if got == 16:
                    header, value = unpack(buffer)
                    if header == results[size]:
                        return int(value) & ones[size]
                return slow_read(size, None, bytes(buffer[:got]))

            def write(offset: int, size: int, value: int) -> None:
                nonlocal tubed, head, posted, watched
                posted = True
                if not watched:
                    watched = True
                    link.on_posted()
                if not is_open and not tubed & _TICK:
                    tick()
                if is_open and (head < limit or make_room()):
                    put(
                        page,
                        ring[head & last_slot],
                        writes[size],
                        offset,
                        value,
                    )
                    head += 1
                    words[head_word] = head
                    # The store of HEAD must be seen before STATE is looked at, see `lane`.
                    with fence:
                        pass
                    if words[state_word] == dozing:
                        shared.close()
                    elif shares:
                        give_way() if head & _TICK else give_way_timed()
                    return
                tubed += 1
                datagram = pack_write(writes[size], offset, handler.base + offset, value)
                try:
                    send(datagram, dont_wait)
                except BlockingIOError:
                    if not link.finish_post(datagram):
                        link.dropped_writes += 1
                except OSError:
                    link.fail("", "Write")
                    link.dropped_writes += 1

            def synced_write(offset: int, size: int, value: int) -> None:
                nonlocal tubed, head, limit, posted
                if is_open:
                    # A turn may take long. Where both share a CPU, waiting at the socket leaves it
                    # to the child for as long as that, and costs least.
                    if shares or words[state_word] == dozing:
                        shared.close()
                    elif head < limit or make_room():
                        where = ring[head & last_slot]
                        put(page, where, synceds[size], offset, value)
                        head += 1
                        words[head_word] = head
                        for _ in TURN_SPINS:
                            if words[tail_word] == head:
                                break
                        else:
                            if shared.wait_tail(head, head, "SyncedWrite") is None:
                                link.dropped_writes += 1
                                return
                        limit = head + slots
                        posted = False
                        upcalls = words[upcalls_word]
                        if upcalls > link.upcalls:
                            link.catch_up(upcalls, "SyncedWrite")
                        return
                tubed += 1
                posted = False
                shared.stay()
                try:
                    tube_write(pack_write(synceds[size], offset, handler.base + offset, value))
                finally:
                    shared.roam()
                if not tubed & _TURNS_TICK:
                    shared.tick_turns()

            handler.read, handler.write = read, synced_write if waits else write
            return handler

        shared.on_change = changed
        self.counts, self.gate = counts, gate
        self.settle, self.settled, self.look = settle, settled, look
        self.handlers = tuple(
            region(index, each.start or 0, synced or each.synced)
            for index, each in enumerate(shape.regions)
        )
