"""Guest memory as models see it, and whose turn it is: without processes and without a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import FakeHost
from hypothesis import given
from hypothesis import strategies as st

from devices.bus import BusType
from devices.contract import Device, HasWork, Region, TakesTurns
from devices.dma import DmaFault, DmaMemory

PAGE = 4096
LOW, HIGH_START, HIGH = 16 * PAGE, 1 << 32, 4 * PAGE


class Ram:
    """Two regions with a hole between them, as on a machine with more than 3 GiB."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.low, self.high = bytearray(LOW), bytearray(HIGH)
        self.memory = DmaMemory(self.told.extend)
        self.memory.map([(0, memoryview(self.low)), (HIGH_START, memoryview(self.high))])


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (LOW - 4, 8),
        (LOW, 1),
        (LOW + 1, 0),
        (HIGH_START - 1, 2),
        (HIGH_START + HIGH, 1),
        (HIGH_START + HIGH - 1, 2),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        (-1, 1),
        (8, -4),
    ],
)
def test_a_range_that_is_not_wholly_ram_is_a_fault(address: int, length: int) -> None:
    ram = Ram()
    before = bytes(ram.low), bytes(ram.high)
    with pytest.raises(DmaFault):
        ram.memory.window(address, length)
    with pytest.raises(DmaFault):
        ram.memory.read(address, length)
    if length > 0:
        with pytest.raises(DmaFault):
            ram.memory.write(address, bytes([0xFF]) * length)
    assert (bytes(ram.low), bytes(ram.high)) == before
    ram.memory.flush()
    assert ram.told == []


def test_reads_and_writes_reach_the_last_byte_of_each_region() -> None:
    ram = Ram()
    for address in (0, LOW - 4, HIGH_START, HIGH_START + HIGH - 4):
        ram.memory.write(address, b"abcd")
        assert ram.memory.read(address, 4) == b"abcd"
    ram.memory.window(HIGH_START, 2)[:] = b"xy"
    assert ram.high[:4] == b"xycd"
    assert ram.memory.read(LOW, 0) == b""


def test_without_a_region_everything_is_a_fault() -> None:
    memory = DmaMemory(lambda runs: None)
    with pytest.raises(DmaFault):
        memory.read(0, 1)


@given(
    st.lists(
        st.tuples(st.integers(0, LOW - 1), st.integers(0, 3 * PAGE), st.booleans()), max_size=60
    )
)
def test_flush_tells_every_written_page_once(writes: list[tuple[int, int, bool]]) -> None:
    ram = Ram()
    expected = set()
    for address, most, marked in writes:
        length = min(most, LOW - address)
        if marked and length:
            ram.memory.mark(address, length)
        elif not marked:
            ram.memory.write(address, bytes(length))
        if length:
            expected |= set(range(address // PAGE, (address + length - 1) // PAGE + 1))
    ram.memory.flush()
    told = [page for first, count in ram.told for page in range(first, first + count)]
    assert len(told) == len(set(told))
    assert set(told) == expected
    ram.told.clear()
    ram.memory.flush()
    assert ram.told == []


def test_many_scattered_writes_are_kept_in_bounds() -> None:
    told: list[tuple[int, int]] = []
    memory = DmaMemory(told.extend)
    memory.map([(0, memoryview(bytearray(8192 * PAGE)))])
    for round_ in range(3):
        for page in range(0, 8192, 2):
            memory.write((page * 5 + round_) % 8192 * PAGE, b"x")
    assert len(memory._runs) <= 8192
    memory.flush()
    assert sum(count for _, count in told) == 8192


class Worker(Device):
    """Notes what it is asked; `script` says what it wants next."""

    model = "worker"

    def __init__(self, host: FakeHost) -> None:
        super().__init__(host)
        self.story: list[str] = []
        self.more_turns = 0
        self.more_work = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.story.append("write")
        self.host.want_turn()

    def turn(self) -> None:
        self.story.append("turn")
        self.host.memory.write(0, b"turn")
        if self.more_work:
            self.more_work -= 1
            self.host.want_work()
        if self.more_turns:
            self.more_turns -= 1
            self.host.want_turn()

    def work(self) -> None:
        self.story.append("work")
        self.host.want_turn()


def made() -> tuple[FakeHost, Worker]:
    host = FakeHost()
    host.ram(PAGE)
    worker = Worker(host)
    host.turns.attach(worker)
    return host, worker


def test_a_model_takes_up_what_it_is() -> None:
    assert isinstance(Worker(FakeHost()), TakesTurns)
    assert isinstance(Worker(FakeHost()), HasWork)
    assert not isinstance(Device(FakeHost()), TakesTurns)
    assert not isinstance(Device(FakeHost()), HasWork)


def test_a_synced_write_ends_with_the_turn_it_asks_for() -> None:
    host, worker = made()
    host.turns.write(worker.write, 0, 1, 0)
    assert worker.story == ["write", "turn"]
    assert host.calls == [("wrote_pages", 0, 1)], "no announcement: the turn is over already"
    host.turns.take()
    assert worker.story == ["write", "turn"], "nobody asked for another"


def test_a_turn_that_asks_for_another_is_announced_after_the_pages() -> None:
    host, worker = made()
    worker.more_turns = 1
    host.turns.write(worker.write, 0, 1, 0)
    assert host.calls == [("wrote_pages", 0, 1), ("want_turn",)]
    host.turns.take()
    assert worker.story == ["write", "turn", "turn"]


def test_outside_of_a_turn_one_is_announced_once() -> None:
    host, worker = made()
    worker.write(0, 1, 0)
    worker.write(0, 1, 0)
    assert host.calls == [("want_turn",)]
    host.turns.take()
    assert worker.story == ["write", "write", "turn"]


def test_work_is_beside_the_guest_or_in_the_turn() -> None:
    host, worker = made()
    worker.more_work = 1
    host.turns.write(worker.write, 0, 1, 0)
    assert worker.story == ["write", "turn"]
    assert host.turns.work_wanted
    host.turns.work()
    assert not host.turns.work_wanted
    assert host.calls[-1] == ("want_turn",)


def test_with_a_virtual_clock_work_belongs_to_the_turn() -> None:
    host = FakeHost(finish_work=True)
    host.ram(PAGE)
    worker = Worker(host)
    host.turns.attach(worker)
    worker.more_work = 2
    host.turns.write(worker.write, 0, 1, 0)
    assert worker.story == ["write", "turn", "work", "turn", "work", "turn"]
    assert host.calls == [("wrote_pages", 0, 1)]


def test_the_example_of_the_documentation_works() -> None:
    text = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
    block = text.partition("```python\nclass Doubler")[2].partition("```")[0]
    names: dict[str, Any] = {
        "Device": Device,
        "Region": Region,
        "BusType": BusType,
        "DmaFault": DmaFault,
        "__name__": "example",
    }
    exec("class Doubler" + block, names)
    host = FakeHost()
    ram = host.ram(PAGE)
    ram[8:12] = (21).to_bytes(4, "little")
    doubler = names["Doubler"](host)
    assert doubler.dma
    assert doubler.regions()[0].synced
    for address in (8, PAGE - 3, 0xFFFF_FFFF):
        host.turns.write(doubler.write, 0, 4, address)
    assert ram[8:12] == (42).to_bytes(4, "little")
    assert host.calls == [("wrote_pages", 0, 1)]


def test_a_model_that_is_gone_has_no_turn() -> None:
    host, worker = made()
    host.turns.want_turn()
    host.turns.attach(None)
    host.turns.take()
    assert worker.story == []


def test_pages_told_in_runs_are_joined_before_they_are_many() -> None:
    told: list[tuple[int, int]] = []
    memory = DmaMemory(told.extend)
    memory.map([(0, memoryview(bytearray(16 * PAGE)))])
    for _ in range(2000):
        memory.mark_pages([(0, 1), (2, 3), (1, 2), (9, 10)])
    assert len(memory._runs) <= 1024
    memory.flush()
    assert told == [(0, 3), (9, 1)]
