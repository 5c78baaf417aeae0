"""The PCI transport by the rules of virtio 1.2: registers, status, interrupts (2.1 to 2.6, 4.1)."""

from __future__ import annotations

import itertools
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
    F_INDIRECT,
    F_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    GENERATION,
    NO_VECTOR,
    NUM_QUEUES,
    QUEUE_DESC,
    QUEUE_ENABLE,
    QUEUE_RESET,
    QUEUE_SELECT,
    QUEUE_SIZE,
    QUEUE_VECTOR,
    STATUS,
    Driver,
    LocalRig,
)
from virtio_echo import F_NEEDS_ODD, F_ODD, LATER, NOW, VirtioEcho

from devices.errors import DeviceError
from devices.virtio.blk import Blk
from devices.virtio.rng import Rng


@pytest.fixture
def driver() -> Driver:
    return Driver(LocalRig(VirtioEcho))


def test_identity(driver: Driver) -> None:
    """4.1.2: vendor, device id by type, revision and subsystem of a non-transitional device."""
    rig = driver.rig
    assert rig.read_config(0) == (0x1040 + 63) << 16 | 0x1AF4
    assert rig.read_config(2) & 0xFF >= 1
    assert rig.read_config(11) >> 16 >= 0x40


def test_structures(driver: Driver) -> None:
    """4.1.4: all of them are there, aligned, and do not overlap."""
    assert set(driver.structures) == {1, 2, 3, 4}
    assert driver.window
    assert driver.msix_capability
    spans = sorted((start, start + size) for _, start, size in driver.structures.values())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert all(driver.structures[kind][1] % 4 == 0 for kind in (1, 2, 4))
    queues = driver.get(NUM_QUEUES, 2)
    assert driver.structures[2][2] >= (queues - 1) * driver.multiplier + 2


def test_a_device_without_configuration_has_no_structure_for_it() -> None:
    assert 4 not in Driver(LocalRig(Rng)).structures


# Features and status.


def test_features_by_words(driver: Driver) -> None:
    """4.1.4.3.1: 32 bits at a time, and zero beyond 64."""
    offered = driver.offered()
    assert offered & F_VERSION_1
    for select in (2, 3, 0xFFFF_FFFF):
        driver.set(DEVICE_SELECT, 4, select)
        assert driver.get(DEVICE_FEATURE, 4) == 0
        driver.set(DRIVER_SELECT, 4, select)
        driver.set(DRIVER_FEATURE, 4, 0xFFFF_FFFF)
        assert driver.get(DRIVER_FEATURE, 4) == 0
    for select in (0, 1):
        driver.set(DRIVER_SELECT, 4, select)
        driver.set(DRIVER_FEATURE, 4, 0xFFFF_FFFF)
        assert driver.get(DRIVER_FEATURE, 4) == offered >> 32 * select & 0xFFFF_FFFF


@pytest.mark.parametrize(
    ("features", "good"),
    [
        (F_VERSION_1, True),
        (F_VERSION_1 | F_ODD, True),
        (F_VERSION_1 | F_ODD | F_NEEDS_ODD, True),
        (F_VERSION_1 | F_NEEDS_ODD, False),
        (0, False),
        (F_ODD | F_EVENT_IDX, False),
    ],
)
def test_negotiation(driver: Driver, features: int, good: bool) -> None:
    """2.2.2, 6.1: FEATURES_OK stays clear if they do not go together."""
    assert driver.negotiate(features) == good
    driver.ready()
    assert bool(driver.status & DRIVER_OK) == good


def test_features_are_fixed_after_features_ok(driver: Driver) -> None:
    assert driver.negotiate(F_VERSION_1)
    driver.set(DRIVER_SELECT, 4, 0)
    driver.set(DRIVER_FEATURE, 4, F_EVENT_IDX)
    assert driver.get(DRIVER_FEATURE, 4) == 0


def test_status_bits_only_add_up(driver: Driver) -> None:
    """2.1.1, and NEEDS_RESET is not the driver's to set."""
    driver.set(STATUS, 1, ACKNOWLEDGE | 64)
    driver.set(STATUS, 1, DRIVER)
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.set(STATUS, 1, 0)
    assert driver.status == 0


def test_nothing_before_driver_ok_or_after_failed(driver: Driver) -> None:
    """2.1.2: no buffer is consumed before DRIVER_OK; what was offered before is found then."""
    assert driver.negotiate(F_VERSION_1)
    queue = driver.queue(NOW)
    queue.send([b"ab"], [2])
    assert queue.collect() == []
    assert not driver.rig.irq
    driver.ready()
    driver.rig.settle()
    assert len(queue.collect()) == 1
    driver.set(STATUS, 1, 128)
    queue.send([b"ab"], [2])
    assert queue.collect() == []


def test_no_bus_master_no_dma(driver: Driver) -> None:
    """PCI 3.0, 6.2.2; the doorbell is looked at again once it may."""
    driver.start()
    driver.bus_master(False)
    queue = driver.queues[NOW]
    queue.send([b"ab"], [2])
    driver.rig.settle()
    assert queue.collect() == []
    driver.bus_master(True)
    driver.rig.settle()
    assert len(queue.collect()) == 1


def test_reset_forgets_everything(driver: Driver) -> None:
    fresh = registers(driver)
    driver.start(F_VERSION_1 | F_PACKED)
    driver.queues[NOW].ask([b"x"])
    held = driver.queues[LATER].send([b"ab"], [2])
    driver.reset()
    driver.rig.settle()
    assert not driver.rig.irq
    assert registers(driver) == fresh
    assert held.data(driver.ram) == b"\0\0"


def registers(driver: Driver) -> list[Any]:
    common = [driver.get(offset, 1) for offset in range(56) if offset != GENERATION]
    for index in range(3):
        driver.set(QUEUE_SELECT, 2, index)
        common.append(driver.get(QUEUE_SIZE, 8))
        common += [driver.get(QUEUE_DESC + 8 * n, 8) for n in range(3)]
    driver.set(QUEUE_SELECT, 2, 0)
    return common


# Queues.


def test_queue_registers(driver: Driver) -> None:
    assert driver.negotiate(F_VERSION_1)
    assert driver.get(NUM_QUEUES, 2) == 2
    driver.set(QUEUE_SELECT, 2, 1)
    for value, becomes in ((64, 64), (0, 64), (3, 64), (256, 64), (0xFFFF, 64), (1, 1), (128, 128)):
        driver.set(QUEUE_SIZE, 2, value)
        assert driver.get(QUEUE_SIZE, 2) == becomes
    driver.set(QUEUE_DESC, 8, 0x1122_3344_5566_7788)
    assert driver.get(QUEUE_DESC, 4) == 0x5566_7788
    assert driver.get(QUEUE_DESC + 4, 4) == 0x1122_3344
    driver.set(QUEUE_DESC + 4, 4, 0)
    assert driver.get(QUEUE_DESC, 8) == 0x5566_7788
    for odd in ((QUEUE_DESC, 2), (QUEUE_DESC + 2, 4), (QUEUE_SIZE, 4), (STATUS, 2)):
        driver.set(*odd, 0)
    assert driver.get(QUEUE_DESC, 8) == 0x5566_7788
    assert driver.status


def test_a_queue_that_is_not_there(driver: Driver) -> None:
    """4.1.4.3.1: its size is 0."""
    before = driver.rig.snapshot()
    driver.rig.replace(before)
    driver.set(QUEUE_SELECT, 2, 2)
    assert driver.get(QUEUE_SIZE, 2) == 0
    for offset in (QUEUE_SIZE, QUEUE_ENABLE, QUEUE_RESET, QUEUE_VECTOR):
        driver.set(offset, 2, 1)
        assert driver.get(offset, 2) == 0
    driver.set(QUEUE_SELECT, 2, 0)
    after = driver.rig.snapshot()
    assert after == before
    driver.rig.replace(after)
    driver.rig.write(0, 0x3000 + 4 * 2, 2, 2)  # its doorbell


@pytest.mark.parametrize("packed", [0, F_PACKED])
def test_queue_reset(driver: Driver, packed: int) -> None:
    """2.6.1: one queue begins anew, with another size; the other goes on."""
    driver.start(F_VERSION_1 | F_RING_RESET | packed, 16)
    assert driver.queues[NOW].ask([b"ab"], [2]).length == 2
    held = driver.queues[LATER].send([b"ab"], [2])
    driver.set(QUEUE_SELECT, 2, LATER)
    driver.set(QUEUE_RESET, 2, 1)
    assert driver.get(QUEUE_RESET, 2) == 0
    assert driver.get(QUEUE_ENABLE, 2) == 0
    driver.rig.settle()
    assert held.data(driver.ram) == b"\0\0"
    assert driver.queues[NOW].ask([b"ab"], [2]).length == 2
    again = driver.queue(LATER, 4)
    for _ in range(9):
        assert again.ask([b"ab"], [2]).written(driver.ram) == b"ba"
    assert driver.rig.logs == []


def test_queue_reset_needs_negotiation(driver: Driver) -> None:
    driver.start(F_VERSION_1)
    driver.set(QUEUE_SELECT, 2, NOW)
    driver.set(QUEUE_RESET, 2, 1)
    assert driver.get(QUEUE_ENABLE, 2) == 1


# Configuration.


def test_generation(driver: Driver) -> None:
    """4.1.4.3.1: another value after the driver has read what changed, also after 256 changes."""
    driver.start()
    device: VirtioEcho = driver.rig.device  # type: ignore[attr-defined]
    for changes in (1, 3, 256):
        before = driver.get(GENERATION, 1)
        assert driver.config(0, 4) == int.from_bytes(b"echo", "little")
        assert driver.get(GENERATION, 1) == before
        for _ in range(changes):
            device.config_changed()
        assert driver.rig.irq
        assert driver.isr() == 2
        driver.config(0, 4)
        assert driver.get(GENERATION, 1) != before


def test_configuration_by_bytes(driver: Driver) -> None:
    driver.set_config(4, 4, 0x0403_0201)
    assert [driver.config(4 + n, 1) for n in range(4)] == [1, 2, 3, 4]
    assert driver.config(6, 2) == 0x0403
    assert driver.rig.read(0, 0x2000 + 6, 4) == 0x0403  # zeros after its end
    driver.rig.write(0, 0x2000 + 6, 4, 0xFFFF_FFFF)  # runs past it: ignored
    assert driver.config(6, 2) == 0x0403


# Interrupts.


def test_intx(driver: Driver) -> None:
    """4.1.4.5: ISR and pin go together; reading clears both."""
    driver.start()
    queue = driver.queues[NOW]
    queue.ask([b"x"])
    queue.ask([b"x"])
    assert driver.rig.irq
    assert driver.rig.read_config(1) >> 16 & 8
    assert driver.isr() == 1
    assert not driver.rig.irq
    assert not driver.rig.read_config(1) >> 16 & 8
    assert driver.isr() == 0
    assert driver.rig.messages == []


def test_msix(driver: Driver) -> None:
    """4.1.5.1.2, 4.1.5.3, 4.1.5.4."""
    driver.enable_msix()
    driver.start()
    driver.set(CONFIG_VECTOR, 2, 0)
    for index, vector in ((NOW, 2), (LATER, 1)):
        driver.set(QUEUE_SELECT, 2, index)
        assert driver.get(QUEUE_VECTOR, 2) == NO_VECTOR
        driver.set(QUEUE_VECTOR, 2, vector)
        assert driver.get(QUEUE_VECTOR, 2) == vector
    driver.queues[NOW].ask([b"x"])
    driver.queues[LATER].ask([b"x"])
    driver.rig.device.config_changed()  # type: ignore[attr-defined]
    assert [data for _, data in driver.rig.messages] == [2, 1, 0]
    assert not driver.rig.irq
    driver.set(QUEUE_SELECT, 2, NOW)
    for bad in (3, 0x7FF, NO_VECTOR):
        driver.set(QUEUE_VECTOR, 2, bad)
        assert driver.get(QUEUE_VECTOR, 2) == NO_VECTOR
        driver.set(CONFIG_VECTOR, 2, bad)
        assert driver.get(CONFIG_VECTOR, 2) == NO_VECTOR
    driver.queues[NOW].ask([b"x"])
    driver.rig.device.config_changed()  # type: ignore[attr-defined]
    assert len(driver.rig.messages) == 3
    assert not driver.rig.irq


def test_msix_survives_a_snapshot(driver: Driver) -> None:
    driver.enable_msix()
    driver.start()
    driver.set(QUEUE_SELECT, 2, NOW)
    driver.set(QUEUE_VECTOR, 2, 1)
    driver.rig.replace(driver.rig.snapshot())
    driver.queues[NOW].ask([b"x"])
    assert [data for _, data in driver.rig.messages] == [1]


# The window in configuration space (4.1.4.9).


def window(driver: Driver, bar: int, offset: int, size: int) -> int:
    place = driver.window // 4
    driver.rig.write_config(place + 1, bar, 1)
    driver.rig.write_config(place + 2, offset)
    driver.rig.write_config(place + 3, size)
    return place + 4


def test_window_reads_and_writes(driver: Driver) -> None:
    data = window(driver, 0, NUM_QUEUES, 2)
    assert driver.rig.read_config(data) & 0xFFFF == 2
    data = window(driver, 0, STATUS, 1)
    driver.rig.write_config(data, ACKNOWLEDGE | DRIVER, 1)
    assert driver.status == ACKNOWLEDGE | DRIVER
    assert driver.rig.read_config(data) & 0xFF == ACKNOWLEDGE | DRIVER


def test_window_rings_doorbells(driver: Driver) -> None:
    driver.start()
    queue = driver.queues[NOW]
    request = queue.send([b"ab"], [2], kick=False)
    driver.rig.write_config(window(driver, 0, driver.structures[2][1], 2), 0)
    driver.rig.settle()
    queue.collect()
    assert request.written(driver.ram) == b"ba"


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [(0, 0x4000, 4), (0, 0x3FFF, 2), (0, 1, 2), (0, 0, 3), (0, 0, 0), (0, 0, 8), (5, 0, 4)],
)
def test_window_to_nowhere(driver: Driver, bar: int, offset: int, size: int) -> None:
    data = window(driver, bar, offset, size)
    driver.rig.write_config(data, 0x1234_5678)
    assert driver.rig.read_config(data) == 0x1234_5678


# State.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("driver_features", 1 << 60),
        ("status", 0x20),
        ("status", DRIVER_OK),
        ("isr", 4),
        ("config_vector", 3),
        ("queues", []),
        ("queues/0/size", 0),
        ("queues/0/size", 3),
        ("queues/0/size", 256),
        ("queues/0/vector", 9),
        ("queues/1/desc", 1 << 64),
        ("queues/1/used_wrap", 1),
    ],
)
def test_impossible_states_are_refused(driver: Driver, field: str, value: Any) -> None:
    driver.start(F_VERSION_1 | F_INDIRECT, 64)
    saved = driver.rig.snapshot()
    *path, last = field.split("/")
    part = saved
    for step in path:
        part = part[int(step)] if step.isdigit() else part[step]
    part[last] = value
    with pytest.raises(DeviceError):
        driver.rig.device.restore(saved)  # type: ignore[attr-defined]


def test_a_packed_position_outside_is_refused() -> None:
    driver = Driver(LocalRig(VirtioEcho))
    driver.start(F_VERSION_1 | F_PACKED, 5)
    saved = driver.rig.snapshot()
    saved["queues"][0]["next_used"] = 5
    with pytest.raises(DeviceError):
        driver.rig.device.restore(saved)  # type: ignore[attr-defined]


def test_doorbells_are_synced() -> None:
    """What makes a doorbell a turn."""
    assert [region.synced for region in Driver(LocalRig(Rng)).rig.device.regions()] == [True, False]  # type: ignore[attr-defined]
    assert Blk.dma
