"""The rules of virtio 1.2 as a table: each row names its section, and runs on a device in this
process and on a jailed one, over both kinds of ring.

What a driver must not do is in `test_virtio_hostile`, what each model does in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from virtio_driver import (
    ACKNOWLEDGE,
    CONFIG_VECTOR,
    DEVICE_FEATURE,
    DEVICE_SELECT,
    DRIVER,
    DRIVER_FEATURE,
    DRIVER_OK,
    DRIVER_SELECT,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT,
    F_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    FEATURES_OK,
    GENERATION,
    NEEDS_RESET,
    NO_VECTOR,
    NUM_QUEUES,
    QUEUE_DESC,
    QUEUE_DEVICE,
    QUEUE_DRIVER,
    QUEUE_ENABLE,
    QUEUE_RESET,
    QUEUE_SELECT,
    QUEUE_SIZE,
    QUEUE_VECTOR,
    STATUS,
    Driver,
    PackedQueue,
    SplitQueue,
)
from virtio_echo import CHANGE, F_NEEDS_ODD, F_ODD, LATER, NOW
from virtio_rigs import Place

FAILED = 128
Rule = Callable[[Driver, int], None]
RULES: dict[str, tuple[Rule, tuple[int, ...]]] = {}


def rule(section: str, *formats: int) -> Callable[[Rule], Rule]:
    """A row of the table.

    Args:
        formats: those that it is about; both by default.
    """

    def add(check: Rule) -> Rule:
        RULES[f"{section}:{check.__name__}"] = check, formats or (0, F_PACKED)
        return check

    return add


def echoes(driver: Driver, queue: int = NOW) -> None:
    """One request is answered rightly."""
    assert driver.queues[queue].ask([b"ab"], [4]).written(driver.ram) == b"ba"


# 2.1, 3.1: status.


@rule("3.1.1")
def the_steps_of_initialization_read_back(driver: Driver, ring: int) -> None:
    driver.set(STATUS, 1, 0)
    assert driver.status == 0
    driver.set(STATUS, 1, ACKNOWLEDGE)
    assert driver.status == ACKNOWLEDGE
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER)
    driver.set(DRIVER_SELECT, 4, 1)
    driver.set(DRIVER_FEATURE, 4, (F_VERSION_1 | ring) >> 32)
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    driver.features = F_VERSION_1 | ring
    driver.queue(NOW)
    driver.ready()
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    echoes(driver)


@rule("2.1.1")
def a_status_bit_is_not_cleared_by_the_driver(driver: Driver, ring: int) -> None:
    driver.set(STATUS, 1, ACKNOWLEDGE)
    driver.set(STATUS, 1, DRIVER)
    assert driver.status == ACKNOWLEDGE | DRIVER


@rule("2.1.1")
def needs_reset_is_the_devices_to_set(driver: Driver, ring: int) -> None:
    driver.set(STATUS, 1, ACKNOWLEDGE | NEEDS_RESET)
    assert driver.status == ACKNOWLEDGE


@rule("3.1.1")
def no_driver_ok_without_features_ok(driver: Driver, ring: int) -> None:
    driver.set(STATUS, 1, ACKNOWLEDGE | DRIVER)
    driver.features = ring
    queue = driver.queue(NOW)
    driver.ready()
    assert not driver.status & DRIVER_OK
    request = queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    assert request.data(driver.ram) == b"\0\0"


@rule("2.1.2")
def nothing_is_used_before_driver_ok(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1 | ring)
    queue = driver.queue(NOW)
    request = queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    assert not driver.rig.irq
    driver.ready()  # what was offered meanwhile is found without another doorbell
    driver.rig.settle()
    assert queue.collect() == [request]
    assert driver.rig.irq


@rule("2.1.1")
def nothing_is_used_after_failed(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    driver.set(STATUS, 1, FAILED)
    queue = driver.queues[NOW]
    queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    driver.start(F_VERSION_1 | ring)
    echoes(driver)


@rule("2.4.1")
def a_reset_leaves_nothing(driver: Driver, ring: int) -> None:
    def seen() -> list[Any]:
        found = []
        for index in range(3):
            driver.set(QUEUE_SELECT, 2, index)
            found += [driver.get(n, 1) for n in range(56) if n not in (GENERATION, QUEUE_SELECT)]
        return found

    fresh = seen()
    driver.start(F_VERSION_1 | ring)
    echoes(driver)
    assert driver.rig.irq
    queue = driver.queues[NOW]
    driver.reset()
    assert not driver.rig.irq
    assert driver.isr() == 0
    assert seen() == fresh
    request = queue.send([b"ab"], [2])
    driver.rig.settle()
    assert request.data(driver.ram) == b"\0\0"


@rule("2.1.2")
def needs_reset_is_told_and_ends_with_a_reset(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    driver.queues[NOW].send([b"x"], indirect=True)  # not negotiated
    driver.rig.settle()
    assert driver.status & NEEDS_RESET
    assert driver.status & DRIVER_OK
    assert driver.isr() == 2
    queue = driver.queues[LATER]
    queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    assert len(driver.rig.logs) == 1
    driver.start(F_VERSION_1 | ring)
    assert not driver.status & NEEDS_RESET
    echoes(driver)
    echoes(driver, LATER)


# 2.2, 6: features.


@rule("4.1.4.3.1")
def features_come_in_words_of_32_bits(driver: Driver, ring: int) -> None:
    offered = driver.offered()
    for select in (0, 1, 2, 0xFFFF_FFFF):
        word = offered >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
        driver.set(DEVICE_SELECT, 4, select)
        assert driver.get(DEVICE_FEATURE, 4) == word
        driver.set(DRIVER_SELECT, 4, select)
        driver.set(DRIVER_FEATURE, 4, 0xFFFF_FFFF)
        assert driver.get(DRIVER_FEATURE, 4) == word, "what is not offered cannot be accepted"


@rule("2.2.2")
def features_that_do_not_go_together_are_refused(driver: Driver, ring: int) -> None:
    assert not driver.negotiate(F_VERSION_1 | ring | F_NEEDS_ODD)
    assert driver.negotiate(F_VERSION_1 | ring | F_NEEDS_ODD | F_ODD)


@rule("6.1")
def a_driver_without_version_1_is_refused(driver: Driver, ring: int) -> None:
    assert not driver.negotiate(ring)
    driver.ready()
    assert not driver.status & (FEATURES_OK | DRIVER_OK)


@rule("3.1.1")
def features_are_fixed_by_features_ok(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1 | ring)
    driver.set(DRIVER_SELECT, 4, 0)
    driver.set(DRIVER_FEATURE, 4, F_EVENT_IDX)
    assert driver.get(DRIVER_FEATURE, 4) == 0


# 4.1.4.3: registers of queues.


@rule("4.1.4.3.1")
def a_queue_that_is_not_there_has_size_0(driver: Driver, ring: int) -> None:
    driver.set(QUEUE_SELECT, 2, driver.get(NUM_QUEUES, 2))
    for offset in (QUEUE_SIZE, QUEUE_ENABLE, QUEUE_RESET, QUEUE_VECTOR):
        driver.set(offset, 2, 1)
        assert driver.get(offset, 2) == 0


@rule("2.7", 0)
def a_split_queue_is_a_power_of_two(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1)
    driver.set(QUEUE_SELECT, 2, NOW)
    for value, becomes in ((64, 64), (3, 64), (0, 64), (256, 64), (128, 128)):
        driver.set(QUEUE_SIZE, 2, value)
        assert driver.get(QUEUE_SIZE, 2) == becomes


@rule("2.8.10.1", F_PACKED)
def a_packed_queue_has_any_size(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1 | F_PACKED)
    driver.set(QUEUE_SELECT, 2, NOW)
    for value, becomes in ((64, 64), (3, 3), (0, 3), (129, 3), (128, 128)):
        driver.set(QUEUE_SIZE, 2, value)
        assert driver.get(QUEUE_SIZE, 2) == becomes


@rule("4.1.4.3.2")
def an_enabled_queue_is_not_changed_or_disabled(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring, 16)
    driver.set(QUEUE_SELECT, 2, NOW)
    for offset, size in ((QUEUE_DESC, 8), (QUEUE_DRIVER, 8), (QUEUE_DEVICE, 8), (QUEUE_SIZE, 2)):
        before = driver.get(offset, size)
        driver.set(offset, size, 8)
        assert driver.get(offset, size) == before
    driver.set(QUEUE_ENABLE, 2, 0)
    assert driver.get(QUEUE_ENABLE, 2) == 1
    echoes(driver)


@rule("4.1.3.1")
def only_writes_of_a_registers_width_count(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1 | ring)
    driver.set(QUEUE_SELECT, 2, NOW)
    driver.set(QUEUE_DESC, 8, 0x1122_3344_5566_7780)
    for offset, size in ((QUEUE_DESC, 2), (QUEUE_DESC + 2, 4), (QUEUE_SIZE, 4), (STATUS, 2)):
        driver.set(offset, size, 0)
    assert driver.get(QUEUE_DESC, 8) == 0x1122_3344_5566_7780
    assert driver.status
    driver.set(QUEUE_DESC + 4, 4, 0)  # an address may be written by halves
    assert driver.get(QUEUE_DESC, 8) == 0x5566_7780


# 2.6.1: queue reset.


@rule("2.6.1")
def a_queue_is_reset_alone_and_has_another_size_then(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_RING_RESET | ring, 16)
    echoes(driver)
    echoes(driver, LATER)
    driver.set(QUEUE_SELECT, 2, LATER)
    driver.set(QUEUE_RESET, 2, 1)
    assert driver.get(QUEUE_RESET, 2) == 0
    assert driver.get(QUEUE_ENABLE, 2) == 0
    gone = driver.queues[LATER].send([b"ab"], [2])
    driver.rig.settle()
    assert gone.data(driver.ram) == b"\0\0"
    echoes(driver)
    driver.queue(LATER, 4)
    for _ in range(9):
        echoes(driver, LATER)
    assert driver.rig.logs == []


@rule("2.6.1")
def a_queue_is_not_reset_without_the_feature(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    driver.set(QUEUE_SELECT, 2, NOW)
    driver.set(QUEUE_RESET, 2, 1)
    assert driver.get(QUEUE_ENABLE, 2) == 1
    echoes(driver)


# 2.5: configuration.


@rule("4.1.4.3.1")
def another_generation_after_a_change(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    before = driver.get(GENERATION, 1)
    assert driver.config(0, 4) == int.from_bytes(b"echo", "little")
    assert driver.get(GENERATION, 1) == before
    for _ in range(256):
        driver.set_config(CHANGE, 1, 1)
    assert driver.isr() == 2
    driver.config(0, 4)
    assert driver.get(GENERATION, 1) != before


@rule("2.1.2")
def no_configuration_interrupt_before_driver_ok(driver: Driver, ring: int) -> None:
    assert driver.negotiate(F_VERSION_1 | ring)
    driver.set_config(CHANGE, 1, 1)
    assert not driver.rig.irq
    assert driver.isr() == 0


# 4.1.4.4, 4.1.4.5, 4.1.5: doorbells and interrupts.


@rule("2.7.13.4")
def a_doorbell_for_nothing_is_harmless(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    for index in (NOW, LATER, NOW):
        driver.doorbell(index)
    bar, start, length = driver.structures[2]
    driver.rig.write(bar, start + length - length % 4, 2, 99)
    driver.rig.settle()
    assert not driver.rig.irq
    echoes(driver)


@rule("4.1.4.5.1")
def reading_isr_clears_it_and_the_pin(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    echoes(driver)
    echoes(driver)
    assert driver.rig.irq
    driver.set_config(CHANGE, 1, 1)
    assert driver.isr() == 3
    assert not driver.rig.irq
    assert driver.isr() == 0
    assert driver.rig.messages == []


@rule("4.1.5.1.2")
def msix_vectors_are_mapped_or_read_back_as_none(driver: Driver, ring: int) -> None:
    driver.enable_msix()
    driver.start(F_VERSION_1 | ring)
    for index, vector in ((NOW, 2), (LATER, 1)):
        driver.set(QUEUE_SELECT, 2, index)
        assert driver.get(QUEUE_VECTOR, 2) == NO_VECTOR
        driver.set(QUEUE_VECTOR, 2, vector)
        assert driver.get(QUEUE_VECTOR, 2) == vector
    driver.set(CONFIG_VECTOR, 2, 0)
    echoes(driver)
    echoes(driver, LATER)
    driver.set_config(CHANGE, 1, 1)
    assert [data for _, data in driver.rig.messages] == [2, 1, 0]
    assert not driver.rig.irq
    for bad in (3, 0x7FF, NO_VECTOR):
        driver.set(QUEUE_VECTOR, 2, bad)
        assert driver.get(QUEUE_VECTOR, 2) == NO_VECTOR
        driver.set(CONFIG_VECTOR, 2, bad)
        assert driver.get(CONFIG_VECTOR, 2) == NO_VECTOR
    echoes(driver, LATER)
    assert len(driver.rig.messages) == 3


@rule("4.1.4.9")
def the_window_in_configuration_space_reaches_the_bars(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    request = driver.queues[NOW].send([b"ab"], [2], kick=False)
    window = driver.window // 4
    for bar, offset, size, value in ((0, driver.structures[2][1], 2, NOW), (0, STATUS, 1, None)):
        driver.rig.write_config(window + 1, bar, 1)
        driver.rig.write_config(window + 2, offset)
        driver.rig.write_config(window + 3, size)
        if value is not None:
            driver.rig.write_config(window + 4, value)
            driver.rig.settle()
    assert driver.rig.read_config(window + 4) & 0xFF == driver.status
    driver.queues[NOW].collect()
    assert request.written(driver.ram) == b"ba"


@rule("PCI 3.0, 6.2.2")
def no_dma_of_a_function_that_is_no_bus_master(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    driver.bus_master(False)
    queue = driver.queues[NOW]
    request = queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    assert request.data(driver.ram) == b"\0\0"
    driver.bus_master(True)
    driver.rig.settle()
    assert queue.collect() == [request]


# 2.7, 2.8: rings.


@rule("2.7.8.2")
def the_used_length_is_what_was_written(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring)
    for sent, room, length in ((b"abc", [10], 3), (b"abc", [1, 1], 2), (b"abc", [], 0)):
        request = driver.queues[NOW].ask([sent], room)
        assert request.length == length
        assert request.data(driver.ram) == sent[::-1][: sum(room)].ljust(sum(room), b"\0")
    assert driver.queues[NOW].ask([], [4]).length == 0


@rule("2.7.4")
def how_a_request_is_cut_means_nothing(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_INDIRECT | ring)
    for indirect in (False, True):
        for out in ([b"abcdef"], [b"a", b"bcd", b"ef"], [b"a"] * 3 + [b"def"]):
            for into in ([6], [1] * 6, [2, 4, 7]):
                request = driver.queues[NOW].ask(out, into, indirect=indirect)
                assert request.written(driver.ram) == b"".join(out)[::-1]
    assert driver.rig.logs == []


@rule("2.7.8")
def requests_may_be_used_in_any_order(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring, 16)
    queue = driver.queues[LATER]
    for _ in range(5):
        requests = [queue.send([b"%d" % n], [4], kick=False) for n in range(8)]
        queue.kick()
        driver.rig.settle()
        assert queue.collect() == requests[::-1]
        assert [r.written(driver.ram) for r in requests] == [b"%d" % n for n in range(8)]


@rule("2.7, 2.8")
def a_ring_may_be_full_and_goes_round(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | ring, 8)
    for turn in range(20):
        for queue in driver.queues.values():
            requests = [queue.send([b"%d" % turn], kick=False) for _ in range(8)]
            queue.kick()
            driver.rig.settle()
            assert len(queue.collect()) == len(requests)
    assert driver.rig.logs == []


@rule("2.8.1", F_PACKED)
def wrap_counters_turn_where_lists_cross_the_end(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_PACKED, 7)
    for number in range(40):
        out = [b"%d" % (number % 10)] * (1 + number % 3)
        request = driver.queues[NOW].ask(out, [1 + number % 2, 2])
        assert request.written(driver.ram) == b"".join(out)[: 3 + number % 2]
    assert driver.rig.logs == []


@rule("2.7.7.2", 0)
def the_avail_flag_suppresses_interrupts(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1)
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    for flag, told in ((0, 1), (1, 0), (0, 1)):
        queue.suppress(flag=flag, event=1)  # used_event means nothing without EVENT_IDX
        queue.ask([b"x"])
        assert driver.isr() == told


@rule("2.7.7.2", 0)
def used_event_is_when_to_interrupt(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_EVENT_IDX)
    queue = driver.queues[NOW]
    assert isinstance(queue, SplitQueue)
    queue.suppress(flag=1)  # means nothing now
    for event, told in ((0, 1), (0, 0), (3, 0), (3, 1), (3, 0)):
        queue.suppress(event=event)
        queue.ask([b"x"])
        assert driver.isr() == told, event
    queue.suppress(event=7)
    for _ in range(4):  # 5, 6, 7, 8: passed in the middle of a batch
        queue.send([b"x"], kick=False)
    queue.kick()
    driver.rig.settle()
    assert driver.isr() == 1


@rule("2.8.10", F_PACKED)
def the_event_suppression_structure_is_when_to_interrupt(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_PACKED | F_EVENT_IDX, 4)
    queue = driver.queues[NOW]
    assert isinstance(queue, PackedQueue)
    for flags, event, told in (
        (0, 0, 1),  # 0: always
        (1, 0, 0),  # never
        (2, 2 | 1 << 15, 1),  # at place 2 of the first round
        (2, 1 | 1 << 15, 0),  # of the round that is over
        (2, 0, 1),  # place 0 of the second round
    ):
        queue.suppress(flag=flags, event=event)
        queue.ask([b"x"])
        assert driver.isr() == told, (flags, event)


@rule("2.7.10, 2.8.10")
def the_device_says_when_it_wants_doorbells(driver: Driver, ring: int) -> None:
    driver.start(F_VERSION_1 | F_EVENT_IDX | ring, 16)
    queue = driver.queues[NOW]
    queue.ask([b"x"])
    queue.send([b"x"], kick=False)
    assert queue.wants_kick()
    queue.send([b"x"], kick=False)
    assert not queue.wants_kick(), "one doorbell is for all that was added"
    driver.doorbell(NOW)
    driver.rig.settle()
    assert len(queue.collect()) == 2


CHECKS = [
    pytest.param(name, ring, id=f"{name}-{'packed' if ring else 'split'}")
    for name, (_, formats) in RULES.items()
    for ring in formats
]


@pytest.mark.parametrize(("name", "ring"), CHECKS)
def test_rule(place: Place, name: str, ring: int) -> None:
    check, _ = RULES[name]
    check(Driver(place.make("virtio-echo")), ring)


@pytest.mark.parametrize("ring", [0, F_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("model", ["console", "balloon", "net"])
def test_in_order(place: Place, model: str, ring: int) -> None:
    """2.7.9, 2.8.8: a device that offers IN_ORDER uses requests in the order of their offering."""
    driver = Driver(place.make(model))
    assert driver.offered() & F_IN_ORDER
    driver.start(F_VERSION_1 | F_IN_ORDER | ring, 16)
    queue = driver.queues[1]  # transmit, or deflate
    for _ in range(5):
        requests = [queue.send([bytes(16)] * (1 + n % 2), kick=False) for n in range(7)]
        queue.kick()
        driver.rig.settle()
        assert queue.collect() == requests
        assert [request.length for request in requests] == [0] * 7


@pytest.mark.parametrize("model", ["virtio-echo", "blk"])
def test_what_completes_out_of_order_offers_no_order(place: Place, model: str) -> None:
    fd = place.memory_file()
    rig = place.make(model, *(({"path": "disk"}, {"path": fd}) if model == "blk" else ()))
    assert not Driver(rig).offered() & F_IN_ORDER
