"""The balloon (5.5): pages go back to the host, by its own count of them."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from virtio_driver import F_PACKED, F_VERSION_1, NEEDS_RESET, RAM_SIZE, Driver, LocalRig

from devices.virtio.balloon import DEFLATE, F_REPORTING, INFLATE, PAGE, REPORTING, Balloon

FIRST = 0x30_0000 // PAGE


class SharedRig(LocalRig):
    """Guest memory is a memfd, as in the machine."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, RAM_SIZE)
        super().__init__(Balloon, {"pages": 7})
        self.ram = self._memory
        self.host.turns.memory.map([(0, memoryview(self._memory))])


@pytest.fixture(params=[0, F_PACKED], ids=["split", "packed"])
def balloon(request: pytest.FixtureRequest) -> Iterator[tuple[Driver, int]]:
    fd = os.memfd_create("ram")
    os.truncate(fd, RAM_SIZE)
    rig = SharedRig(fd)
    rig.ram[:] = b"\xee" * RAM_SIZE
    driver = Driver(rig)
    driver.start(F_VERSION_1 | F_REPORTING | request.param)
    yield driver, fd
    os.close(fd)


def used(fd: int) -> int:
    """Pages that the host has for it."""
    return os.fstat(fd).st_blocks * 512 // PAGE


def numbers(*pages: int) -> bytes:
    return b"".join(struct.pack("<I", page) for page in pages)


def test_inflated_pages_go_back(balloon: tuple[Driver, int]) -> None:
    driver, fd = balloon
    before = used(fd)
    pages = [*range(FIRST, FIRST + 100), *range(FIRST + 150, FIRST + 140, -1), FIRST + 200]
    driver.queues[INFLATE].ask([numbers(*pages)])
    assert used(fd) == before - len(pages)
    # Not through the mapping: reading it there would fill the hole.
    assert os.pread(fd, 100 * PAGE, FIRST * PAGE) == bytes(100 * PAGE)
    assert driver.ram[(FIRST + 100) * PAGE] == 0xEE
    wrote = [call[1:] for call in driver.rig.host.calls if call[0] == "wrote_pages"]  # type: ignore[attr-defined]
    told = {page for first, count in wrote for page in range(first, first + count)}
    assert told >= set(pages), "the CPU must not execute what was there"
    driver.queues[DEFLATE].ask([numbers(*pages)])
    driver.ram[FIRST * PAGE] = 1
    assert used(fd) == before - len(pages) + 1


def test_reported_pages_go_back(balloon: tuple[Driver, int]) -> None:
    driver, fd = balloon
    before = used(fd)
    queue: Any = driver.queues[REPORTING]
    token = queue.offer([(FIRST * PAGE, 16 * PAGE, 2), ((FIRST + 32) * PAGE, 4 * PAGE, 2)])
    queue.in_flight[token] = None
    driver.doorbell(REPORTING)
    assert used(fd) == before - 20


@pytest.mark.parametrize("page", [RAM_SIZE // PAGE, 0xFFFF_FFFF])
def test_pages_that_are_not_ram(balloon: tuple[Driver, int], page: int) -> None:
    driver, _ = balloon
    driver.queues[INFLATE].send([numbers(FIRST, page)])
    assert driver.status & NEEDS_RESET
    assert "inflate" in driver.rig.logs[0]


def test_sizes(balloon: tuple[Driver, int]) -> None:
    driver, _ = balloon
    assert driver.config(0, 4) == 7
    driver.rig.device.ask(70_000)  # type: ignore[attr-defined]
    assert driver.isr() & 2
    assert driver.config(0, 4) == 70_000
    driver.set_config(4, 4, 123)
    assert driver.rig.snapshot()["actual"] == 123
