"""The machine's end of the shared-memory lane: when it is open, and waiting on it.

See `proxy.lane` for the rules of the page. This is policy and the slow path; the stores and loads
of each access are in `proxy.accesses`.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter_ns

from proxy import lane
from proxy import messages as m
from proxy.errors import Misuse
from proxy.link import Link
from proxy.placement import Placement, Seat

BURST = 16
"""Accesses on the tube between two looks at the clock and the CPU; a power of two."""
QUICK_NS = 50_000 * BURST
"""`BURST` accesses within this time are worth a lane."""
TURNS = 2
TURNS_NS = 1_500_000 * TURNS
"""`TURNS` synced writes on the tube within this time are worth a CPU of its own for the child."""
LOST_NS, WINDOW_NS = 4_000_000, 50_000_000
"""Time in slow waits, of so much time, that closes a lane: its child does not get the CPU. One that
sleeps on the tube gets it at once, and one that polls has used up its share."""
DENSE_NS = 10_000 * BURST
"""`BURST` accesses on a shared CPU within this time leave the guest next to no time of its own."""
DENSE_BURSTS = 32
"""So many of them in a row are worth a CPU for the child. Shorter ones are not: to wake a child on
another CPU takes as long as some twenty accesses."""
SLOW_NS = 250_000
"""An exchange on a shared CPU that took so long waited for somebody else's process."""
YIELDS = 32
"""Looks of a slow wait that only yield the CPU; after these it sleeps between looks."""
BACKOFF_NS = 20_000_000
BACKOFF_MOST_NS = 1_000_000_000
"""How long a lane stays closed that had to be given up: it doubles from one to the other, unless
there was a long one between."""


class MachineLane:
    """The lane to one child.

    Args:
        link: the tube beside it.
        fd: memfd of the page, or -1 for none; stays with the caller.
        placement: who gives out CPUs; None leaves the child on any CPU and the lane closed.

    Attributes:
        page, words: the shared page, as bytes and as words of 8 bytes; None where there can be
            no lane.
        dozing: the value of `STATE` that says that the child sleeps.
        shares: whether the child of the open lane sits on the CPU of this thread.
        openings: how often it was opened.
        on_change: told when it opens or closes; set by the accesses.
    """

    def __init__(self, link: Link, fd: int, placement: Placement | None) -> None:
        self._link = link
        self._placement = placement
        self.page: mmap.mmap | None = None
        self.words: memoryview | None = None
        if fd >= 0 and placement is not None and placement.lanes and lane.supported():
            lane.check_sealed(fd, lane.LANE_BYTES)
            self.page = lane.map_page(fd)
            self.words = memoryview(self.page).cast("Q")
        self.is_open = False
        self.dozing = 1
        self.shares = False
        self.openings = 0
        self._dense = 0
        self._opened_at = 0
        self._order = (Seat.SHARED, Seat.OWN)
        self.on_change: Callable[[], None] = lambda: None
        self._generation = 0
        self._door = 0
        self._lost = self._lost_since = 0
        self._roaming: set[int] | None = None
        self._backoff_ns = BACKOFF_NS
        self._not_before = dict.fromkeys(Seat, 0)
        self._cpu = -1
        self._last_tick = 0

    def idle(self) -> bool:
        """Whether the child is asleep on its open lane."""
        return self.words is not None and self.words[lane.STATE] == self.dozing

    def open(self, order: Sequence[Seat] = ()) -> bool:
        """Take accesses through the page from here on; whether it could be.

        Args:
            order: the seats that will do, the best first; by default both, as they proved before.
        """
        words, placement, link = self.words, self._placement, self._link
        if words is None or placement is None or self.is_open or link.failed is not None:
            return False
        if words[lane.CLOSED] != self._generation:
            return False  # the child has not met the last `LaneClose` yet
        now = perf_counter_ns()
        seat = next(
            (
                seat
                for seat in order or self._order
                if now >= self._not_before[seat] and placement.grant(self, link.child.pid, seat)
            ),
            None,
        )
        if seat is None:
            return False
        self._lost = self._dense = 0
        self._opened_at = words[lane.HEAD]
        self.shares = seat is Seat.SHARED
        if not self._post(m.LaneOpen(int(self.shares), self._generation + 1)):
            placement.release(self)
            return False
        self._generation += 1
        self.dozing = self._generation << 1 | 1
        self.openings += 1
        self.is_open = True
        self.on_change()
        return True

    def close(self) -> None:
        """Take accesses through the tube from here on; what is in the ring comes first."""
        if not self.is_open or self._link.session.awaiting is not None:
            return
        long = self._long()
        self._order = (Seat.OWN, Seat.SHARED) if long else (Seat.SHARED, Seat.OWN)
        self.abandon()
        if long:
            self._backoff_ns = BACKOFF_NS
        if self._post(m.LaneClose()) and self._placement is not None:
            self._ring_door()
            self._cpu = self._placement.follow(self._link.child.pid, -1)

    def _long(self) -> bool:
        words = self.words
        return words is not None and words[lane.HEAD] - self._opened_at >= DENSE_BURSTS * BURST

    def abandon(self) -> None:
        """The lane is of no use any more: the child failed or goes away."""
        if self.is_open:
            self.is_open = False
            self.on_change()
            if self._placement is not None:
                self._placement.release(self)

    def asked(self) -> None:
        """A command went into the tube: a polling child must look there."""
        if self.is_open:
            self._ring_door()

    def unmap(self) -> None:
        """Give up the page."""
        self.abandon()
        if self.words is not None and self.page is not None:
            self.words.release()
            self.page.close()
        self.words = self.page = None

    def tick(self) -> None:
        """Once in `BURST` accesses on the tube: follow the CPU, open the lane in a burst."""
        placement = self._placement
        if placement is None or self._link.failed is not None:
            return
        self._cpu = placement.follow(self._link.child.pid, self._cpu)
        if self._since_last_tick() < QUICK_NS:
            self.open()

    def tick_turns(self) -> None:
        """Once in `TURNS` synced writes on the tube: open the lane in a burst, if it has a CPU.

        With none the tube is better: whoever waits there leaves its own CPU to the child.
        """
        if self._link.failed is None and self._since_last_tick() < TURNS_NS:
            self.open((Seat.OWN,))

    def _since_last_tick(self) -> int:
        before, self._last_tick = self._last_tick, perf_counter_ns()
        return self._last_tick - before

    def stay(self) -> None:
        """Begin to wait for a turn at the tube, on the CPU of the child; see `Placement.stay`."""
        if self._placement is not None and self._link.failed is None:
            self._cpu, self._roaming = self._placement.stay(self._link.child.pid, self._cpu)

    def roam(self) -> None:
        """End that."""
        if self._placement is not None:
            self._placement.roam(self._roaming)

    def give_way(self) -> None:
        """Let the child on this CPU run; once in `BURST` accesses, to see whether it pays.

        A third process may want the CPU, or the child deserves one of its own.
        """
        began = perf_counter_ns()
        os.sched_yield()
        ended = perf_counter_ns()
        dense, self._last_tick = ended - self._last_tick < DENSE_NS, ended
        self._dense = self._dense + 1 if dense else 0
        if ended - began > SLOW_NS:
            self._lose(ended - began)
        elif self._dense >= DENSE_BURSTS:
            self._dense = 0
            if self._placement is not None and self._placement.has_seat(Seat.OWN):
                self.close()

    def wait_tail(self, least: int, head: int, doing: str) -> int | None:
        """Wait until `TAIL` is at least `least`; its value, or None on failure.

        The child may be stuck with upcalls, asleep, on no CPU, hung or dead; the lane may be
        closed when this returns.
        """
        link, words = self._link, self.words
        end = monotonic() + link.deadline
        rounds, since = 0, perf_counter_ns()
        while words is not None and link.failed is None:
            tail = words[lane.TAIL]
            if tail > head or tail < head - lane.RING_SLOTS:
                link.fail("broke the protocol: the shared page counts requests wrongly", doing)
                return None
            if tail >= least:
                self._lose(perf_counter_ns() - since)
                return tail
            if words[lane.STATE] == self.dozing:
                self.close()
            link.drain(64)
            if monotonic() > end:
                link.fail(f"did not answer within {link.deadline:g} s", doing)
                return None
            rounds += 1
            if rounds % YIELDS == 0:
                if link.given_up():
                    link.give_up(doing)
                    return None
                now = perf_counter_ns()
                self._lose(now - since)
                since = now
            if rounds < YIELDS:
                os.sched_yield()
            else:
                time.sleep(50e-6)
        return None

    def _lose(self, ns: int) -> None:
        """A slow wait has taken so long: give up a lane that loses too much."""
        now = perf_counter_ns()
        if now - self._lost_since > WINDOW_NS:
            self._lost_since, self._lost = now, 0
        self._lost += ns
        if self._lost >= LOST_NS and self.is_open:
            seat = Seat.SHARED if self.shares else Seat.OWN
            self.close()
            self._not_before[seat] = now + self._backoff_ns
            self._backoff_ns = min(2 * self._backoff_ns, BACKOFF_MOST_NS)

    def _post(self, command: m.Message) -> bool:
        try:
            self._link.session.command(type(command))
        except Misuse:
            return False
        return self._link.finish_post(command.encode())

    def _ring_door(self) -> None:
        if self.words is not None:
            self._door += 1
            self.words[lane.DOOR] = self._door
