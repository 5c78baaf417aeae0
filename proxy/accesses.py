"""The hot path of a proxied device: reads and writes of its regions, by tube or by lane.

Rules:
- Nothing here raises for anything that a child does: a failed device reads all-ones, its writes
  are dropped and counted.
- Accesses start on the tube. After `BURST` of them in quick succession the lane is opened, if
  there is a CPU for it; it is closed as soon as the child is found asleep.
- The functions are closures over local variables because that is the fastest that CPython has.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from time import monotonic, perf_counter_ns
from typing import Any

from devices.bus import ALL_ONES
from proxy import lane
from proxy import messages as m
from proxy.errors import Misuse, ProtocolFault
from proxy.link import Link
from proxy.placement import Placement
from proxy.tube import MAX_DATAGRAM

BURST = 16
"""Accesses between two looks at the clock and the CPU; a power of two."""
QUICK_NS = 50_000 * BURST
"""`BURST` accesses within this time are worth a lane."""
SPINS = 2000
"""Looks at the lane (some 0.1 ms) before the slow wait."""
STRIKES = 4
"""Slow waits after which a lane is closed: its child has no CPU to itself."""
YIELDS = 32
"""Looks of a slow wait that only yield the CPU; after these it sleeps between looks."""
BACKOFF_NS = 20_000_000
BACKOFF_MOST_NS = 1_000_000_000

_READ = struct.Struct("<QQQ")
_WRITE = struct.Struct("<QQQQ")
_RESULT = struct.Struct("<QQ")
_RESULT_HEADERS = tuple(m.ReadResult.opcode | size << 8 for size in range(9))


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
    """All accesses of one device and its lane.

    Args:
        link: the commands beside them.
        shape: what the device looks like.
        lane_fd: memfd of the shared page, or -1; stays with the caller.
        placement: None leaves the child on any CPU and the lane closed.
    """

    def __init__(self, link: Link, shape: m.Shape, lane_fd: int, placement: Placement | None):
        self._link = link
        self._placement = placement
        self._page: mmap.mmap | None = None
        self._words: memoryview | None = None
        if lane_fd >= 0 and placement is not None and placement.places and lane.supported():
            lane.check_sealed(lane_fd, lane.LANE_BYTES)
            self._page = lane.map_page(lane_fd)
            self._words = memoryview(self._page).cast("Q")
        self.is_open = False
        self._generation = 0
        self._dozing = 0
        self._door = 0
        self._strikes = 0
        self._backoff_ns = BACKOFF_NS
        self._not_before = 0
        self._cpu = -1
        self._last_tick = 0
        self.lane_openings = 0
        self.handlers: tuple[RegionHandler, ...] = ()
        self.counts: Callable[[], tuple[int, int]]
        self._set_open: Callable[[bool], None]
        self._settle: Callable[[], None]
        self.settled: Callable[[], bool]
        """Whether the child has carried out all that was posted, as far as is known."""
        self.gate: Callable[[bool], None]
        """Refuse accesses (as `Misuse`) while the device sleeps, or take them again."""
        self._build(shape)
        link.sent = self._asked  # type: ignore[method-assign]
        link.stopped = self._stopped  # type: ignore[method-assign]

    # Poller.

    def idle(self) -> bool:
        return self._words is not None and self._words[lane.STATE] == self._dozing

    def open_lane(self) -> bool:
        """Take accesses through the shared page from here on; whether it could be."""
        words, placement = self._words, self._placement
        if words is None or placement is None or self.is_open or self._link.failed:
            return False
        if words[lane.CLOSED] != self._generation:
            return False
        if not placement.grant(self, self._link.child.pid):
            return False
        self._generation += 1
        self._dozing = self._generation << 1 | 1
        self._strikes = 0
        if not self._post(m.LaneOpen(self._generation)):
            placement.release(self)
            return False
        self.lane_openings += 1
        self.is_open = True
        self._set_open(True)
        return True

    def close_lane(self) -> None:
        """Take accesses through the tube from here on; what is in the ring comes first."""
        if not self.is_open:
            return
        self._leave()
        self._backoff_ns = BACKOFF_NS
        if self._post(m.LaneClose()) and self._placement is not None:
            # The door as well: a polling child must not wait for its next look at the clock.
            self._bump_door()
            self._cpu = self._placement.follow(self._link.child.pid, -1)

    def _leave(self) -> None:
        self.is_open = False
        self._set_open(False)
        if self._placement is not None:
            self._placement.release(self)

    def _post(self, command: m.Message) -> bool:
        try:
            self._link.session.command(type(command))
        except Misuse:
            return False
        return self._link.finish_post(command.encode())

    def _asked(self) -> None:
        """A command with an answer went into the tube."""
        self._settle()
        if self.is_open:
            self._bump_door()

    def _bump_door(self) -> None:
        if self._words is not None:
            self._door += 1
            self._words[lane.DOOR] = self._door

    def _stopped(self) -> None:
        if self.is_open:
            self._leave()
        self.gate(True)  # a closed tube refuses for itself

    def unmap(self) -> None:
        """Give up the shared page."""
        self._stopped()
        self._words = None
        self._page = None

    def tick(self) -> None:
        """Once in `BURST` accesses on the tube: follow the CPU, open the lane in a burst."""
        placement = self._placement
        if placement is None or self._link.failed:
            return
        now = perf_counter_ns()
        quick = now - self._last_tick < QUICK_NS
        self._last_tick = now
        self._cpu = placement.follow(self._link.child.pid, self._cpu)
        if quick and self._words is not None and now >= self._not_before:
            self.open_lane()

    def _strike(self) -> None:
        """A slow wait: the child has no CPU to itself. Give up the lane for a while if so."""
        self._strikes += 1
        if self._strikes >= STRIKES and self.is_open:
            backoff = self._backoff_ns
            self.close_lane()
            self._not_before = perf_counter_ns() + backoff
            self._backoff_ns = min(2 * backoff, BACKOFF_MOST_NS)

    def _wait_tail(self, least: int, head: int, doing: str) -> int | None:
        """Wait until `TAIL` is at least `least`; its value, or None on failure."""
        link, words = self._link, self._words
        end = monotonic() + link.deadline
        rounds = 0
        while words is not None and link.failed is None:
            tail = words[lane.TAIL]
            if tail > head or tail < head - lane.RING_SLOTS:
                link.fail("broke the protocol: the shared page counts requests wrongly", doing)
                return None
            if tail >= least:
                return tail
            if words[lane.STATE] == self._dozing:
                self.close_lane()
            link.drain(64)
            if monotonic() > end:
                link.fail(f"did not answer within {link.deadline:g} s", doing)
                return None
            if rounds % YIELDS == 0:
                self._strike()
            rounds += 1
            if rounds < YIELDS:
                os.sched_yield()
            else:
                time.sleep(50e-6)
        return None

    def _build(self, shape: m.Shape) -> None:
        # Without a page no lane is ever opened and these two are never touched.
        words: Any = self._words
        page: Any = self._page
        link = self._link
        send, receive = link.tube.send, link.tube.recv_into
        buffer = bytearray(MAX_DATAGRAM + 1)
        pack_read, pack_write, unpack = _READ.pack, _WRITE.pack, _RESULT.unpack_from
        pack_slot = lane.SLOT.pack_into
        results, ones, tick = _RESULT_HEADERS, ALL_ONES, self.tick
        start, slots, step = lane.RING_START, lane.RING_SLOTS, lane.SLOT_BYTES
        head_word, tail_word, value_word = lane.HEAD, lane.TAIL, lane.VALUE
        state_word, upcalls_word = lane.STATE, lane.UPCALLS
        dont_wait, spins, fence = socket.MSG_DONTWAIT, range(SPINS), threading.Lock()
        count = head = uncounted = 0
        limit = slots
        is_open = posted = False

        def set_open(now: bool) -> None:
            nonlocal is_open
            is_open = now

        def settle() -> None:
            nonlocal posted
            posted = False

        def settled() -> bool:
            nonlocal posted
            if posted and is_open:
                posted = words[tail_word] != head
            return not posted

        def asleep(*_: object) -> int:
            raise Misuse(f"an access to '{link.name}', which is asleep")

        def gate(take: bool) -> None:
            nonlocal send
            send = link.tube.send if take else asleep

        def counts() -> tuple[int, int]:
            return count - uncounted, head

        def dropped() -> None:
            link.dropped_writes += 1

        def make_room() -> bool:
            """Wait for a free slot; False on failure, or if the lane was closed meanwhile."""
            nonlocal limit
            tail = self._wait_tail(head - slots + 1, head, "Write")
            if tail is None:
                return False
            limit = tail + slots
            return is_open

        def slow_read(size: int, request: bytes | None, datagram: bytes | None) -> int:
            value = link.finish_read(size, request, datagram)
            return ones[size] if value is None else value & ones[size]

        def region(index: int, base: int) -> RegionHandler:
            handler = RegionHandler(base)
            reads = tuple(lane.header(m.Read.opcode, size, index) for size in range(9))
            writes = tuple(lane.header(m.Write.opcode, size, index) for size in range(9))

            def lane_read(offset: int, size: int) -> int:
                nonlocal head, limit, posted
                pack_slot(
                    page, start + head % slots * step, reads[size], offset, handler.base + offset, 0
                )
                head += 1
                words[head_word] = head
                for _ in spins:
                    if words[tail_word] == head:
                        break
                else:
                    if self._wait_tail(head, head, "Read") is None:
                        return ones[size]
                limit = head + slots
                posted = False
                value: int = words[value_word]
                upcalls = words[upcalls_word]
                if upcalls != link.upcalls and not link.catch_up(upcalls, "Read"):
                    return ones[size]
                return value & ones[size]

            def read(offset: int, size: int) -> int:
                nonlocal count, posted, uncounted
                if is_open:
                    if words[state_word] == self._dozing:
                        self.close_lane()
                    elif head < limit or make_room():
                        return lane_read(offset, size)
                if not count & (BURST - 1):
                    tick()
                    if is_open and (head < limit or make_room()):
                        count += 1
                        uncounted += 1
                        return lane_read(offset, size)
                count += 1
                posted = False
                request: bytes | None = pack_read(
                    reads[size], offset, handler.base + offset
                )
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
                        return int(value & ones[size])
                return slow_read(size, None, bytes(buffer[:got]))

            def lost_read(size: int, request: bytes | None, error: OSError) -> int:
                if request is not None and isinstance(error, BlockingIOError):
                    return slow_read(size, request, None)
                if isinstance(error, BlockingIOError):
                    link.fail(f"did not answer within {link.deadline:g} s", "Read")
                else:
                    link.fail("", "Read")
                return ones[size]

            def write(offset: int, size: int, value: int) -> None:
                nonlocal count, head, posted, uncounted
                posted = True
                if is_open and (head < limit or make_room()):
                    pack_slot(
                        page,
                        start + head % slots * step,
                        writes[size],
                        offset,
                        handler.base + offset,
                        value,
                    )
                    head += 1
                    words[head_word] = head
                    with fence:
                        pass
                    if words[state_word] == self._dozing:
                        self.close_lane()
                    return
                if not count & (BURST - 1):
                    tick()
                    if is_open:
                        count += 1
                        uncounted += 1
                        write(offset, size, value)
                        return
                count += 1
                datagram = pack_write(writes[size], offset, handler.base + offset, value)
                try:
                    send(datagram, dont_wait)
                except BlockingIOError:
                    if not link.finish_post(datagram):
                        dropped()
                except OSError:
                    link.fail("", "Write")
                    dropped()

            handler.read, handler.write = read, write
            return handler

        self._set_open, self.counts = set_open, counts
        self._settle, self.settled, self.gate = settle, settled, gate
        self.handlers = tuple(
            region(index, each.start or 0) for index, each in enumerate(shape.regions)
        )
