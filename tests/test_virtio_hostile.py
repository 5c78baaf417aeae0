"""Drivers that break the rules: the device needs a reset and says why, and the machine goes on."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import (
    AVAIL,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    QUEUE_ENABLE,
    QUEUE_SELECT,
    WRITE,
    Driver,
    LocalRig,
    PackedQueue,
    SplitQueue,
)
from virtio_echo import LATER, NOW, VirtioEcho
from virtio_rigs import Place

SIZE = 8
OUTSIDE = 0xFEB0_0000
TOP = (1 << 64) - 8

Attack = Callable[[Driver, Any], None]


def offer(queue: SplitQueue, *parts: tuple[int, int, int, int], head: int = 0) -> None:
    """Descriptors 0, 1, ... of the table as they are, and one available head."""
    for index, part in enumerate(parts):
        queue.descriptor(index, *part)
    queue.make_available(head)


def offer_packed(queue: PackedQueue, *parts: tuple[int, int, int]) -> None:
    for position, (address, length, flags) in enumerate(parts):
        queue.descriptor(position, address, length, 0, flags | AVAIL)


def table(driver: Driver, *parts: tuple[int, int, int, int]) -> int:
    data = b"".join(struct.pack("<QIHH", *part) for part in parts)
    place = driver.memory(len(data))
    driver.ram[place : place + len(data)] = data
    return place


B = 0x30_0000
SPLIT: dict[str, tuple[str, Attack]] = {
    "outside RAM": ("outside RAM", lambda d, q: offer(q, (OUTSIDE, 16, 0, 0))),
    "partly outside": ("outside RAM", lambda d, q: offer(q, (len(d.ram) - 8, 16, WRITE, 0))),
    "address overflows": ("outside RAM", lambda d, q: offer(q, (TOP, 16, 0, 0))),
    "length to the end": ("outside RAM", lambda d, q: offer(q, (B, 0xFFFF_FFFF, WRITE, 0))),
    "no bytes": ("no bytes", lambda d, q: offer(q, (B, 0, 0, 0))),
    "loop to itself": ("loops", lambda d, q: offer(q, (B, 1, NEXT, 0))),
    "loop of two": ("loops", lambda d, q: offer(q, (B, 1, NEXT, 1), (B, 1, NEXT, 0))),
    "next is not there": ("no descriptor", lambda d, q: offer(q, (B, 1, NEXT, SIZE))),
    "head is not there": ("no descriptor", lambda d, q: q.make_available(SIZE)),
    "head far away": ("no descriptor", lambda d, q: q.make_available(0xFFFF)),
    "index jumps": ("jumps", lambda d, q: q.set_index(SIZE + 1)),
    "index goes back": ("jumps", lambda d, q: q.set_index(-1)),
    "read after write": (
        "follows a writable",
        lambda d, q: offer(q, (B, 1, WRITE | NEXT, 1), (B, 1, 0, 0)),
    ),
    "indirect in indirect": (
        "indirect table",
        lambda d, q: offer(
            q, (table(d, (table(d, (B, 1, 0, 0)), 16, INDIRECT, 0)), 16, INDIRECT, 0)
        ),
    ),
    "indirect with next": (
        "has a next",
        lambda d, q: offer(q, (table(d, (B, 1, 0, 0)), 16, INDIRECT | NEXT, 1), (B, 1, 0, 0)),
    ),
    "empty table": ("table of 0", lambda d, q: offer(q, (B, 0, INDIRECT, 0))),
    "odd table": ("table of 24", lambda d, q: offer(q, (B, 24, INDIRECT, 0))),
    "table outside RAM": ("outside RAM", lambda d, q: offer(q, (OUTSIDE, 16, INDIRECT, 0))),
    "next beyond table": (
        "no descriptor",
        lambda d, q: offer(q, (table(d, (B, 1, NEXT, 1)), 16, INDIRECT, 0)),
    ),
    "loop in table": (
        "loops",
        lambda d, q: offer(q, (table(d, (B, 1, NEXT, 0)), 16, INDIRECT, 0)),
    ),
    "long table": (
        "longer than the queue",
        lambda d, q: offer(
            q,
            (table(d, *[(B, 1, NEXT, n + 1) for n in range(SIZE)], (B, 1, 0, 0)), 144, INDIRECT, 0),
        ),
    ),
}
PACKED: dict[str, tuple[str, Attack]] = {
    "outside RAM": ("outside RAM", lambda d, q: offer_packed(q, (OUTSIDE, 16, 0))),
    "address overflows": ("outside RAM", lambda d, q: offer_packed(q, (TOP, 16, WRITE))),
    "no bytes": ("no bytes", lambda d, q: offer_packed(q, (B, 0, 0))),
    "list without end": ("loops", lambda d, q: offer_packed(q, *[(B, 1, NEXT)] * SIZE)),
    "read after write": (
        "follows a writable",
        lambda d, q: offer_packed(q, (B, 1, WRITE | NEXT), (B, 1, 0)),
    ),
    "indirect in a list": (
        "in a list",
        lambda d, q: offer_packed(q, (B, 1, NEXT), (table(d, (B, 1, 0, 0)), 16, INDIRECT)),
    ),
    "indirect with next": (
        "in a list",
        lambda d, q: offer_packed(q, (table(d, (B, 1, 0, 0)), 16, INDIRECT | NEXT), (B, 1, 0)),
    ),
    "empty table": ("table of 0", lambda d, q: offer_packed(q, (B, 0, INDIRECT))),
    "odd table": ("table of 8", lambda d, q: offer_packed(q, (B, 8, INDIRECT))),
    "table outside RAM": ("outside RAM", lambda d, q: offer_packed(q, (OUTSIDE, 16, INDIRECT))),
    "long table": (
        "longer than the queue",
        lambda d, q: offer_packed(q, (table(d, *[(B, 1, 0, 0)] * (SIZE + 1)), 144, INDIRECT)),
    ),
}


def needs_reset(driver: Driver, why: str) -> None:
    """2.1.2: the status bit, a configuration interrupt, silence, and an event with a name."""
    assert driver.status & NEEDS_RESET
    assert driver.rig.irq
    assert driver.isr() & 2
    assert not driver.rig.irq
    (log,) = driver.rig.logs
    assert log.startswith("the driver must reset the device: ")
    assert "queue 0 (now)" in log
    assert why in log


def works_again(driver: Driver, features: int) -> None:
    driver.start(features, SIZE)
    assert driver.queues[NOW].ask([b"ab"], [2]).written(driver.ram) == b"ba"


@pytest.mark.parametrize("name", SPLIT)
def test_split(place: Place, name: str) -> None:
    why, attack = SPLIT[name]
    driver = Driver(place.make("virtio-echo"))
    features = F_VERSION_1 | F_INDIRECT
    driver.start(features, SIZE)
    attack(driver, driver.queues[NOW])
    driver.doorbell(NOW)
    driver.rig.settle()
    needs_reset(driver, why)
    assert driver.queues[NOW].collect() == []
    # Nothing is served until the reset.
    driver.queues[LATER].send([b"ab"], [2])
    driver.rig.settle()
    assert driver.queues[LATER].collect() == []
    works_again(driver, features)


@pytest.mark.parametrize("name", PACKED)
def test_packed(place: Place, name: str) -> None:
    why, attack = PACKED[name]
    driver = Driver(place.make("virtio-echo"))
    features = F_VERSION_1 | F_INDIRECT | F_PACKED
    driver.start(features, SIZE)
    attack(driver, driver.queues[NOW])
    driver.doorbell(NOW)
    driver.rig.settle()
    needs_reset(driver, why)
    works_again(driver, features)


@pytest.mark.parametrize("packed", [0, F_PACKED])
def test_indirect_needs_negotiation(place: Place, packed: int) -> None:
    driver = Driver(place.make("virtio-echo"))
    driver.start(F_VERSION_1 | packed, SIZE)
    driver.queues[NOW].send([b"x"], indirect=True)
    needs_reset(driver, "not negotiated")


def test_packed_tables_ignore_all_flags_but_write(place: Place) -> None:
    """2.8.7: an "indirect" flag in an indirect table of a packed ring means nothing."""
    driver = Driver(place.make("virtio-echo"))
    driver.start(F_VERSION_1 | F_PACKED | F_INDIRECT, SIZE)
    where = table(driver, (B, 4, 0, INDIRECT | NEXT), (B + 64, 4, 0, WRITE | NEXT))
    driver.ram[B : B + 4] = b"abcd"
    queue = driver.queues[NOW]
    assert isinstance(queue, PackedQueue)
    offer_packed(queue, (where, 32, INDIRECT | WRITE))
    driver.doorbell(NOW)
    assert driver.ram[B + 64 : B + 68] == b"dcba"
    assert driver.rig.logs == []


def test_split_direct_then_indirect(place: Place) -> None:
    """2.7.5.3.2: some descriptors, then one that refers to a table."""
    driver = Driver(place.make("virtio-echo"))
    driver.start(F_VERSION_1 | F_INDIRECT, SIZE)
    where = table(driver, (B + 2, 2, NEXT, 1), (B + 64, 4, WRITE, 0))
    driver.ram[B : B + 4] = b"abcd"
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    offer(queue, (B, 2, NEXT, 1), (where, 32, INDIRECT | WRITE, 7))
    driver.doorbell(NOW)
    assert driver.ram[B + 64 : B + 68] == b"dcba"
    assert driver.rig.logs == []


@pytest.mark.parametrize("area", [0, 1, 2])
@pytest.mark.parametrize("where", [OUTSIDE, TOP & ~15, 0x10_0001])
@pytest.mark.parametrize("packed", [0, F_PACKED])
def test_rings_outside_ram_or_not_aligned(place: Place, packed: int, where: int, area: int) -> None:
    driver = Driver(place.make("virtio-echo"))
    assert driver.negotiate(F_VERSION_1 | packed)
    queue = driver.queue(NOW, SIZE)
    driver.set(QUEUE_ENABLE, 2, 0)  # 4.1.4.3.2: does nothing
    driver.set(0x20 + 8 * area, 8, where)  # nor does this while it is enabled
    driver.ready()
    assert queue.ask([b"ab"], [2]).length == 2
    driver.negotiate(F_VERSION_1 | packed)
    driver.set(QUEUE_SELECT, 2, 0)
    for number in range(3):
        driver.set(0x20 + 8 * number, 8, where if number == area else 0x10_0000 + 0x1000 * number)
    driver.set(QUEUE_ENABLE, 2, 1)
    driver.ready()
    driver.doorbell(NOW)
    driver.rig.settle()
    needs_reset(driver, "aligned" if where == 0x10_0001 else "outside RAM")


@pytest.mark.parametrize("packed", [0, F_PACKED])
def test_more_in_flight_than_the_queue_has(packed: int) -> None:
    """The same descriptor offered again and again before it is given back."""
    driver = Driver(LocalRig(VirtioEcho))
    driver.start(F_VERSION_1 | packed, SIZE)
    queue = driver.queues[LATER]
    for number in range(4 * SIZE):
        if isinstance(queue, SplitQueue):
            offer(queue, (B, 1, 0, 0))
        elif isinstance(queue, PackedQueue):
            side = AVAIL if number // SIZE % 2 == 0 else 1 << 15
            queue.descriptor(number % SIZE, B, 1, 0, side)
        if number % 4 == 3:
            driver.doorbell(LATER)
    assert driver.status & NEEDS_RESET
    assert "in flight" in driver.rig.logs[0]


def test_4_gib_of_descriptors() -> None:
    """2.7.5: a chain is at most 2**32 bytes long."""
    from devices.virtio.chain import Chain, RingError

    class Endless:
        def window(self, address: int, length: int) -> memoryview:
            return memoryview(b"")

    chain = Chain(Endless())  # type: ignore[arg-type]
    chain.add(0, 0xFFFF_FFFF, False)
    chain.add(0, 1, True)
    with pytest.raises(RingError, match="4 GiB"):
        chain.add(0, 1, True)


# Chance.


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 32), packed=st.booleans(), event=st.booleans())
def test_random_rings(seed: int, packed: bool, event: bool) -> None:
    """Rings full of random descriptors, half of them plausible."""
    chance = random.Random(seed)
    driver = Driver(LocalRig(VirtioEcho))
    features = F_VERSION_1 | F_INDIRECT | (F_PACKED * packed) | (F_EVENT_IDX * event)
    for _ in range(4):
        driver.start(features, SIZE)
        for index, queue in driver.queues.items():
            for _ in range(3):
                spoil(chance, driver, queue)
                driver.doorbell(index)
                driver.rig.settle()
        if chance.random() < 0.3:
            driver.rig.replace(driver.rig.snapshot())
    works_again(driver, features)


def spoil(chance: random.Random, driver: Driver, queue: Any) -> None:
    places = [B, B + 64, queue.areas[0], queue.areas[2], OUTSIDE, TOP, len(driver.ram) - 4]
    for slot in range(SIZE):
        address = chance.choice(places)
        length = chance.choice([1, 4, 16, 32, 0, 0xFFFF_FFFF, chance.randrange(1 << 32)])
        flags = chance.choice([0, NEXT, WRITE, WRITE | NEXT, INDIRECT, chance.randrange(1 << 16)])
        last = chance.choice([slot + 1, chance.randrange(SIZE), chance.randrange(1 << 16)])
        if isinstance(queue, PackedQueue):
            flags |= chance.choice([AVAIL, 1 << 15, 0])
            queue.descriptor(slot, address, length, last & 0xFFFF, flags)
        else:
            queue.descriptor(slot, address, length, flags, last & 0xFFFF)
            driver.ram[queue.areas[1] + 4 + 2 * slot] = chance.choice([slot, chance.randrange(256)])
    if isinstance(queue, SplitQueue):
        queue.set_index(queue.next_avail + chance.choice([0, 1, 1, 3, SIZE, 1000]))
        # A table among the buffers.
        part = struct.pack("<QIHH", chance.choice(places), 8, chance.choice([0, WRITE, NEXT]), 1)
        driver.ram[B : B + 32] = 2 * part


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 1 << 32))
def test_random_registers(seed: int) -> None:
    """A driver that writes anything to any register, between bits of a real one's work."""
    chance = random.Random(seed)
    driver = Driver(LocalRig(VirtioEcho))
    features = F_VERSION_1 | F_RING_RESET | chance.choice([0, F_PACKED, F_EVENT_IDX])
    for _ in range(300):
        action = chance.random()
        if action < 0.05:
            driver.start(features, SIZE)
        elif action < 0.15 and driver.queues and driver.status & DRIVER_OK:
            queue = driver.queues[chance.choice([NOW, LATER])]
            spoil(chance, driver, queue)
            driver.doorbell(queue.index)
        elif action < 0.2:
            driver.rig.replace(driver.rig.snapshot())
        elif action < 0.6:
            size = chance.choice([1, 2, 4, 8])
            offset = chance.randrange(64 - size) // size * size
            value = chance.choice([0, 1, 2, 0xF, 0xFFFF, B, OUTSIDE, chance.randrange(1 << 64)])
            driver.set(offset, size, value & ((1 << 8 * size) - 1))
        elif action < 0.7:
            driver.rig.write(0, 0x3000 + 4 * chance.randrange(8), 2, chance.randrange(1 << 16))
        elif action < 0.8:
            driver.rig.write_config(chance.choice([1, *range(16, 48)]), chance.randrange(1 << 32))
        else:
            driver.rig.read(0, chance.randrange(0x4000 - 8), chance.choice([1, 2, 4, 8]))
        driver.rig.settle()
    driver.rig.write_config(1, 6, 2)
    if driver.msix_capability:
        driver.rig.write_config(driver.msix_capability // 4, 0, 2, 2)
    works_again(driver, features)
