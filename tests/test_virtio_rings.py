"""Both formats of virtqueues, driven by the rules of virtio 1.2 (2.7, 2.8) and by chance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_VERSION_1,
    Driver,
    LocalRig,
    PackedQueue,
    SplitQueue,
)
from virtio_echo import LATER, NOW, VirtioEcho

from devices.virtio import transport

FORMATS = [
    pytest.param(F_VERSION_1 | F_INDIRECT | packed | event, id=f"{name}{'-event' if event else ''}")
    for (name, packed), event in itertools.product(
        (("split", 0), ("packed", F_PACKED)), (0, F_EVENT_IDX)
    )
]
EACH_FORMAT = pytest.mark.parametrize("features", FORMATS)

pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
rooms = st.lists(st.integers(1, 40), max_size=6)


def started(features: int, size: int | None = None) -> Driver:
    driver = Driver(LocalRig(VirtioEcho))
    driver.start(features, size)
    return driver


@EACH_FORMAT
@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(
        st.tuples(pieces, rooms, st.booleans(), st.booleans()).filter(lambda r: r[0] or r[1]),
        max_size=30,
    ),
    size=st.sampled_from([16, 64, 128]),
    saved=st.booleans(),
)
def test_any_chain_comes_through(features: int, requests: Any, size: int, saved: bool) -> None:
    """Every cut into descriptors, direct and indirect, at every place of the ring; and with a
    snapshot between every two requests nothing is different."""
    driver = started(features, size)
    for out, into, indirect, later in requests:
        queue = driver.queues[LATER if later else NOW]
        sent = b"".join(out)
        request = queue.ask(out, into, indirect=indirect)
        expected = sent[::-1][: sum(into)]
        assert request.length == len(expected)
        assert request.data(driver.ram) == expected.ljust(sum(into), b"\0")
        if saved:
            driver.rig.replace(driver.rig.snapshot())
    assert driver.rig.logs == []


@EACH_FORMAT
def test_many_at_once_and_out_of_order(features: int) -> None:
    driver = started(features, 32)
    queue = driver.queues[LATER]
    for turn in range(50):
        sent = [b"%d.%d" % (turn, n) for n in range(10)]
        requests = [queue.send([text], [16], kick=False) for text in sent]
        queue.kick()
        driver.rig.settle()
        done = queue.collect()
        assert done == requests[::-1]
        answers = [request.written(driver.ram) for request in requests]
        assert answers == [text[::-1] for text in sent]


@EACH_FORMAT
def test_a_queue_can_be_full(features: int) -> None:
    driver = started(features, 8)
    for queue in driver.queues.values():
        requests = [queue.send([b"x"], kick=False) for _ in range(8)]
        queue.kick()
        driver.rig.settle()
        assert len(queue.collect()) == len(requests)
    assert driver.rig.logs == []


@EACH_FORMAT
def test_in_flight_at_a_snapshot(features: int) -> None:
    """What is in flight is finished before the state is saved; what waits in the ring is kept."""
    driver = started(features, 16)
    queue = driver.queues[LATER]
    first = queue.send([b"abc"], [3])  # taken, not given back
    second = queue.send([b"def"], [3], kick=False)  # nobody told the device
    driver.rig.replace(driver.rig.snapshot())
    queue.collect()
    assert first.written(driver.ram) == b"cba"
    assert second.written(driver.ram) == b"fed"


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_packed_ring_has_any_size(size: int) -> None:
    driver = started(F_VERSION_1 | F_PACKED, size)
    queue = driver.queues[NOW]
    assert queue.size == size
    for number in range(3 * size + 1):
        text = b"%d" % number
        assert queue.ask([text]).length == 0
    assert driver.rig.logs == []


def test_split_indices_run_past_16_bits() -> None:
    driver = started(F_VERSION_1 | F_EVENT_IDX, 4)
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    queue.set_index(0xFFFE)
    queue.next_used = queue.kicked = 0xFFFE
    queue.put(queue.areas[2] + 2, "<H", 0xFFFE)
    queue.put(queue.areas[2] + 4 + 8 * 4, "<H", 0xFFFE)
    saved = driver.rig.snapshot()
    saved["queues"][0]["next_avail"] = saved["queues"][0]["next_used"] = 0xFFFE
    driver.rig.replace(saved)
    for _ in range(4):
        assert queue.ask([b"ab"], [2]).written(driver.ram) == b"ba"
    assert queue.next_used == 2


# Notifications.


def told(driver: Driver) -> bool:
    """Whether there was an interrupt since the last time."""
    asserted = driver.rig.irq
    assert bool(driver.isr() & 1) == asserted
    assert not driver.rig.irq
    return asserted


def test_split_flag_suppresses_notifications() -> None:
    driver = started(F_VERSION_1)
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    queue.ask([b"x"])
    assert told(driver)
    queue.suppress(flag=1, event=1)  # 2.7.7.2: used_event means nothing without the feature
    queue.ask([b"x"])
    assert not told(driver)
    queue.suppress(flag=0)
    queue.ask([b"x"])
    assert told(driver)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_split_used_event(batch: int) -> None:
    """A notification exactly when the used index passes used_event; the flag means nothing."""
    driver = started(F_VERSION_1 | F_EVENT_IDX)
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    queue.suppress(flag=1)
    for event in (0, 3, 4, 11, 0xFFFF, 30):
        for _ in range(8):
            queue.suppress(event=event)
            before = queue.next_used
            for _ in range(batch):
                queue.send([b"x"], kick=False)
            queue.kick()
            queue.collect()
            passed = event in [n & 0xFFFF for n in range(before, before + batch)]
            assert told(driver) == passed, (event, before)


def test_packed_flags_suppress_notifications() -> None:
    driver = started(F_VERSION_1 | F_PACKED)
    queue = driver.queues[NOW]
    assert isinstance(queue, PackedQueue)
    # 2: only with EVENT_IDX; 3 is reserved. A notification too many is never wrong.
    for flag, expected in ((0, True), (1, False), (2, True), (3, True)):
        queue.suppress(flag=flag)
        queue.ask([b"x"])
        assert told(driver) == expected


@pytest.mark.parametrize("batch", [1, 3])
def test_packed_event_descriptor(batch: int) -> None:
    size = 8
    driver = started(F_VERSION_1 | F_PACKED | F_EVENT_IDX, size)
    queue = driver.queues[NOW]
    assert isinstance(queue, PackedQueue)
    for event, wrap in itertools.product(range(size), (True, False)):
        for _ in range(2 * size):
            queue.suppress(flag=2, event=event | wrap << 15)
            place, side = queue.next_used, queue.used_wrap
            crossed = False
            for _ in range(batch):
                crossed |= (place, side) == (event, wrap)
                place += 1
                if place == size:
                    place, side = 0, not side
                queue.send([b"x"], kick=False)
            queue.kick()
            queue.collect()
            assert told(driver) == crossed, (event, wrap, place)


@pytest.mark.parametrize("packed", [0, F_PACKED])
def test_the_driver_need_not_kick_while_nobody_listens(packed: int) -> None:
    """With EVENT_IDX one doorbell is enough for all that is added before the device has looked."""
    driver = started(F_VERSION_1 | F_EVENT_IDX | packed, 16)
    queue = driver.queues[NOW]
    queue.ask([b"x"])
    queue.send([b"x"], kick=False)
    assert queue.wants_kick()
    queue.send([b"x"], kick=False)
    assert not queue.wants_kick()
    driver.doorbell(NOW)
    assert len(queue.collect()) == 2
    driver.doorbell(NOW)  # 2.7.10.2: a doorbell for nothing is harmless
    assert queue.collect() == []


def test_a_driver_that_never_stops_gets_the_cpu_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn ends after a bounded number of requests; the rest comes in later ones."""
    monkeypatch.setattr(transport, "_REQUESTS_PER_TURN", 10)
    rig = LocalRig(VirtioEcho)
    driver = Driver(rig)
    driver.start(F_VERSION_1)
    queue = driver.queues[NOW]
    for _ in range(35):
        queue.send([b"x"], kick=False)
    queue.kick()
    served = [len(queue.collect())]
    while rig.host.count("want_turn"):
        rig.host.forget()
        rig.host.turns.take()
        served.append(len(queue.collect()))
    assert served == [10, 10, 10, 5]
