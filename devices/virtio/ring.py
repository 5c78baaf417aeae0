"""What both kinds of virtqueue share: state, the queue as a device sees it, and when to notify.

Rings are read and written in turns only (see `devices.dma`): the driver stands still meanwhile. So
there are no barriers here, and notifications are decided once, when the turn ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from devices.contract import U16
from devices.spans import Spans
from devices.virtio.chain import Chain, RingError
from devices.virtio.features import NO_VECTOR

LARGEST_QUEUE = 32768
"""2.7: the most entries of a queue."""

DESC_SIZE = 16
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
"""Flags of a descriptor (2.7.5, 2.8.5 to 2.8.7)."""


def spans_of(table: bytes) -> Spans:
    """The ranges of descriptors: in both rings 8 bytes of address, 4 of length, 4 of others."""
    words = array("I", table)
    words[3::4] = array("I", bytes(len(table) // 4))
    return Spans(array("Q", words.tobytes()))


class Queue(NamedTuple):
    """What a device declares: the name, for people, and the most entries, a power of two."""

    name: str
    size: int


@dataclass
class QueueState:
    """One virtqueue.

    Attributes:
        size: entries; 0 never.
        vector: of MSI-X, or NO_VECTOR.
        enabled: the driver has set it up.
        desc, driver, device: guest-physical addresses of the three areas.
        next_avail, next_used: split ring: indices that run freely; packed ring: positions.
        avail_wrap, used_wrap: the device's wrap counters (packed ring, 2.8.1).
    """

    size: U16
    vector: U16 = NO_VECTOR
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0
    next_avail: U16 = 0
    next_used: U16 = 0
    avail_wrap: bool = True
    used_wrap: bool = True

    def check(self, most: int) -> None:
        """See whether it can be the state of a queue of `most` entries, with a ValueError."""
        if not 1 <= self.size <= most:
            raise ValueError(f"a queue of {self.size} entries; it has at most {most}")
        if not all(0 <= area < 1 << 64 for area in (self.desc, self.driver, self.device)):
            raise ValueError("the address of a queue does not fit in 64 bits")


class Ring(Protocol):
    """A split or packed ring within one turn; its methods raise `RingError` and `DmaFault`."""

    def take(self) -> Chain | None:
        """The next available chain; None if there is none: the driver will notify of the next."""
        ...

    def use(self, chain: Chain) -> None:
        """Give a chain back."""
        ...

    def quota(self) -> int:
        """How many places must be used until the driver wants to be notified; 0: it does not."""
        ...

    def close(self) -> bool:
        """The turn ends: whether the driver wants to be notified of what was given back."""
        ...


class VirtQueue:
    """A virtqueue as its device uses it.

    Attributes:
        index: its number in the device.
        name: for people.
        most: the most entries.
        state: see `QueueState`.
        epoch: counts its lives: what was taken before a reset is not given back after it.
    """

    def __init__(
        self, index: int, declared: Queue, open_ring: Callable[[QueueState], Ring]
    ) -> None:
        self.index = index
        self.name, self.most = declared
        self.state = QueueState(self.most)
        self.epoch = 0
        self._open_ring = open_ring
        self._ring: Ring | None = None
        self._taken = 0

    def pop(self) -> Chain | None:
        """The next request, or None.

        Raises:
            RingError, DmaFault: the driver broke a rule; leave this to the transport.
        """
        if not self.state.enabled:
            return None
        chain = self._opened().take()
        if chain is not None:
            self._taken += chain.count
            if self._taken > self.state.size:
                raise RingError("more descriptors are in flight than the queue has")
            chain.epoch = self.epoch
        return chain

    def mark(self) -> tuple[int, bool, int]:
        """Where `pop` is, for `rewind`."""
        return self.state.next_avail, self.state.avail_wrap, self._taken

    def rewind(self, mark: tuple[int, bool, int]) -> None:
        """Put back what was popped since `mark`; none of it may have been completed."""
        self.state.next_avail, self.state.avail_wrap, self._taken = mark

    def owns(self, chain: Chain) -> bool:
        """Whether `chain` can still be given back: it was not taken before a reset."""
        return chain.epoch == self.epoch

    def complete(self, chain: Chain) -> None:
        """Give a request back, `chain.written` bytes long; what is not owned is forgotten."""
        if not self.owns(chain):
            return
        self._taken -= chain.count
        self._opened().use(chain)

    def quota(self) -> int:
        """See `Ring.quota`; only while the queue is enabled.

        Raises:
            RingError, DmaFault: as `pop`.
        """
        return self._opened().quota()

    def close(self) -> bool:
        """The turn ends; whether the driver is to be notified."""
        ring, self._ring = self._ring, None
        return ring is not None and ring.close()

    def _opened(self) -> Ring:
        if self._ring is None:
            self._ring = self._open_ring(self.state)
        return self._ring

    def forget(self) -> None:
        """What was taken will not be given back."""
        self.epoch += 1
        self._taken = 0
        self._ring = None

    def reset(self) -> None:
        """2.6.1: as after power-on."""
        self.forget()
        vars(self.state).update(vars(QueueState(self.most)))


def quota(event: int, next_used: int) -> int:
    """How many places, used from `next_used` on, go past `event` (2.7.7.2), all 16 bits."""
    return (event - next_used & 0xFFFF) + 1


def advance(position: int, size: int) -> tuple[int, bool]:
    """A position that may have run past the end once: where it is, and whether it has."""
    return (position - size, True) if position >= size else (position, False)
