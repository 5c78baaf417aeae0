"""The entropy device (5.4)."""

from __future__ import annotations

from virtio_driver import F_VERSION_1, Driver, LocalRig

from devices.virtio.rng import Rng


def drawn(driver: Driver, length: int) -> bytes:
    request = driver.queues[0].ask([], [length])
    return request.written(driver.ram)


def test_random_bytes() -> None:
    driver = Driver(LocalRig(Rng))
    driver.start(F_VERSION_1)
    first, second = drawn(driver, 64), drawn(driver, 64)
    assert len(first) == len(second) == 64
    assert first != second
    assert 1 <= len(drawn(driver, 1 << 20)) <= 1 << 20  # 5.4.6.1: fewer will do
    assert driver.queues[0].ask([b"nothing to write"]).length == 0


def test_a_seed_makes_them_repeatable() -> None:
    """In one go, and with a snapshot between every two requests."""
    stories = []
    for saved in (False, True):
        driver = Driver(LocalRig(Rng, {"seed": 7}))
        driver.start(F_VERSION_1)
        story = []
        for length in (1, 64, 100, 63):
            story.append(drawn(driver, length))
            if saved:
                driver.rig.replace(driver.rig.snapshot())
        stories.append(story)
    assert stories[0] == stories[1]
    other = Driver(LocalRig(Rng, {"seed": 8}))
    other.start(F_VERSION_1)
    assert drawn(other, 1) + drawn(other, 64) != b"".join(stories[0][:2])
