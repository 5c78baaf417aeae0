"""The bus: ranges, routing on whole accesses, unclaimed accesses, statistics; against a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from devices.bus import ADDRESS_LIMIT, ALL_ONES, AccessStats, Bus, BusType, Range, RangeConflict


@dataclass
class Probe:
    """A bus device that notes what reaches it and answers with its own number."""

    number: int = 0x5A
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.number

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


@pytest.fixture
def bus() -> Bus:
    return Bus(BusType.PIO, 0x10000)


# Ranges.


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 0), (5, 0), (5, -1), (-1, 1), (ADDRESS_LIMIT, 1), (ADDRESS_LIMIT - 1, 2), (1, 1 << 64)],
)
def test_impossible_ranges(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="range"):
        Range(start, length)


def test_a_range_may_end_at_the_top() -> None:
    top = Range(ADDRESS_LIMIT - 16, 16)
    assert top.end == ADDRESS_LIMIT
    bus = Bus(BusType.MMIO)
    probe = Probe()
    bus.insert(top, probe, "top")
    bus.write(ADDRESS_LIMIT - 8, 8, 7)
    assert probe.seen == [(8, 8, 7)]
    assert bus.read(ADDRESS_LIMIT - 4, 8) == ALL_ONES[8]
    assert str(top) == "0xfffffffffffffff0-0xffffffffffffffff"


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        (Range(0, 16), False),
        (Range(0, 17), True),
        (Range(16, 1), True),
        (Range(20, 2), True),
        (Range(31, 10), True),
        (Range(32, 10), False),
        (Range(0, 100), True),
    ],
)
def test_overlap(other: Range, overlap: bool) -> None:
    here = Range(16, 16)
    assert here.overlaps(other) is other.overlaps(here) is overlap


# Inserting and removing.


@pytest.mark.parametrize("taken", [Range(0x0F, 2), Range(0x12, 1), Range(0x1F, 9), Range(0, 0x100)])
def test_an_overlap_is_refused_by_name_and_changes_nothing(bus: Bus, taken: Range) -> None:
    first, second = Probe(1), Probe(2)
    bus.insert(Range(0x10, 0x10), first, "first")
    with pytest.raises(RangeConflict, match="'first'"):
        bus.insert(taken, second, "second")
    assert len(bus) == 1
    assert bus.read(0x1F, 1) == 1
    assert bus.read(0x0F, 1) == 0xFF
    assert "second" not in bus.stats()


def test_neighbours_touch(bus: Bus) -> None:
    for number in (1, 0, 2):
        bus.insert(Range(0x10 * number, 0x10), Probe(number), f"p{number}")
    assert [entry.owner for entry in bus] == ["p0", "p1", "p2"]
    assert [bus.read(address, 1) for address in (0x0F, 0x10, 0x1F, 0x20)] == [0, 1, 1, 2]


def test_the_space_has_an_end(bus: Bus) -> None:
    bus.insert(Range(0xFFFF, 1), Probe(), "last")
    with pytest.raises(RangeConflict, match="0x10000"):
        bus.insert(Range(0x10000, 1), Probe(), "past")


def test_devices_stay_out_of_reserved_ranges(bus: Bus) -> None:
    bus.reserve(Range(0x100, 0x100))
    with pytest.raises(RangeConflict, match="RAM"):
        bus.insert(Range(0x1FF, 2), Probe(), "device")
    bus.insert(Range(0x200, 2), Probe(), "device")
    with pytest.raises(RangeConflict, match="'device'"):
        bus.reserve(Range(0x201, 1))


def test_remove_takes_exactly_the_owners_range(bus: Bus) -> None:
    where = Range(0x10, 0x10)
    bus.insert(where, Probe(), "mine")
    assert not bus.remove(Range(0x10, 8), "mine")
    assert not bus.remove(Range(0x11, 0x10), "mine")
    assert not bus.remove(Range(0, 0x10), "mine")
    assert not bus.remove(where, "other")
    assert bus.find(0x10) is not None
    assert bus.remove(where, "mine")
    assert bus.find(0x10) is None
    assert not bus.remove(where, "mine")
    bus.insert(where, Probe(7), "other")
    assert bus.read(0x10, 1) == 7


def test_a_range_moves_while_others_stay(bus: Bus) -> None:
    moving, staying = Probe(1), Probe(2)
    bus.insert(Range(0x10, 4), moving, "moving")
    bus.insert(Range(0x20, 4), staying, "staying")
    bus.remove(Range(0x10, 4), "moving")
    bus.insert(Range(0x30, 4), moving, "moving")
    assert [bus.read(address, 1) for address in (0x10, 0x20, 0x30)] == [0xFF, 2, 1]
    assert bus.stats()["moving"].reads == 1


# Routing.


@pytest.mark.parametrize("size", range(1, 9))
def test_routing_is_on_the_whole_access(bus: Bus, size: int) -> None:
    probe = Probe(0)
    bus.insert(Range(0x10, 0x10), probe, "probe")
    for address in range(0x08, 0x28):
        inside = address >= 0x10 and address + size <= 0x20
        probe.seen.clear()
        assert bus.read(address, size) == (0 if inside else ALL_ONES[size])
        bus.write(address, size, 1)
        offset = address - 0x10
        assert probe.seen == ([(offset, size), (offset, size, 1)] if inside else [])
        assert (bus.find(address, size) is not None) == inside


def test_straddling_two_devices_reaches_neither(bus: Bus) -> None:
    low, high = Probe(), Probe()
    bus.insert(Range(0x10, 4), low, "low")
    bus.insert(Range(0x14, 4), high, "high")
    assert bus.read(0x12, 4) == 0xFFFF_FFFF
    bus.write(0x13, 2, 0)
    assert low.seen == high.seen == []
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (1, 1)


def test_unclaimed_accesses_are_counted_and_told(bus: Bus) -> None:
    told: list[tuple[str, int, int, int]] = []
    bus.read(1, 1)
    bus.on_unclaimed = lambda *what: told.append(what)
    for size in (1, 2, 4, 8):
        assert bus.read(2, size) == (1 << 8 * size) - 1
    bus.write(3, 2, 0x1234)
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (5, 1)
    assert told[0] == ("read", 2, 1, 0xFF)
    assert told[-1] == ("write", 3, 2, 0x1234)
    assert bus.stats() == {}


# Statistics.


def test_accesses_are_counted_for_each_device(bus: Bus) -> None:
    bus.insert(Range(0x10, 4), Probe(), "a")
    bus.insert(Range(0x20, 4), Probe(), "a")
    bus.insert(Range(0x30, 4), Probe(), "b")
    for address in (0x10, 0x20, 0x30):
        bus.read(address, 1)
    bus.write(0x30, 1, 0)
    assert bus.stats() == {"a": AccessStats(reads=2), "b": AccessStats(reads=1, writes=1)}


def test_statistics_outlive_the_range(bus: Bus) -> None:
    bus.insert(Range(0x10, 4), Probe(), "a")
    bus.read(0x10, 1)
    bus.remove(Range(0x10, 4), "a")
    assert bus.stats()["a"].reads == 1


def test_time_is_measured_only_when_asked(bus: Bus) -> None:
    probe = Probe(9)
    bus.insert(Range(0x10, 4), probe, "a")
    bus.read(0x10, 1)
    assert bus.stats()["a"].read_ns == 0
    bus.timed = True
    bus.insert(Range(0x20, 4), probe, "late")
    for address in (0x10, 0x20):
        assert bus.read(address, 1) == 9
        bus.write(address, 1, 3)
    assert all(stats.read_ns > 0 and stats.write_ns > 0 for stats in bus.stats().values())
    bus.timed = False
    before = bus.stats()["a"].read_ns
    bus.read(0x10, 1)
    assert bus.stats()["a"].read_ns == before
    assert probe.seen == [(0, 1), (0, 1), (0, 1, 3), (0, 1), (0, 1, 3), (0, 1)]


# Against a model.

SPACE = 48
PLACES = st.integers(0, SPACE - 1)
LENGTHS = st.integers(1, 12)
SIZES = st.integers(1, 8)
OWNERS = st.sampled_from(["a", "b", "c"])


class BusAgainstMap(RuleBasedStateMachine):
    """The model is a plain map: the address of a byte -> which insertion claimed it."""

    @initialize()
    def start(self) -> None:
        self.bus = Bus(BusType.PIO, SPACE)
        self.claims: dict[int, int] = {}
        self.inserted: dict[int, tuple[Range, str, Probe]] = {}
        self.serial = 0
        self.unclaimed = [0, 0]

    def holder(self, address: int, size: int) -> int | None:
        claims = {self.claims.get(address + index) for index in range(size)}
        return claims.pop() if len(claims) == 1 else None

    @rule(start=PLACES, length=LENGTHS, owner=OWNERS)
    def insert(self, start: int, length: int, owner: str) -> None:
        where = Range(start, length)
        taken = any(address in self.claims for address in range(start, where.end))
        self.serial += 1
        probe = Probe(self.serial)
        if taken or where.end > SPACE:
            with pytest.raises(RangeConflict):
                self.bus.insert(where, probe, owner)
            return
        self.bus.insert(where, probe, owner)
        self.inserted[self.serial] = (where, owner, probe)
        for address in range(start, where.end):
            self.claims[address] = self.serial

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if not self.inserted:
            return
        number = data.draw(st.sampled_from(sorted(self.inserted)))
        where, owner, _ = self.inserted.pop(number)
        assert self.bus.remove(where, owner)
        for address in range(where.start, where.end):
            del self.claims[address]

    @rule(start=PLACES, length=LENGTHS, owner=OWNERS)
    def remove_any(self, start: int, length: int, owner: str) -> None:
        where = Range(start, length)
        found = [n for n, (w, o, _) in self.inserted.items() if (w, o) == (where, owner)]
        assert self.bus.remove(where, owner) == bool(found)
        for number in found:
            del self.inserted[number]
            for address in range(where.start, where.end):
                del self.claims[address]

    @rule(address=PLACES, size=SIZES)
    def read(self, address: int, size: int) -> None:
        holder = self.holder(address, size)
        value = self.bus.read(address, size)
        if holder is None:
            self.unclaimed[0] += 1
            assert value == (1 << 8 * size) - 1
        else:
            where, _, probe = self.inserted[holder]
            assert value == holder
            assert probe.seen[-1] == (address - where.start, size)

    @rule(address=PLACES, size=SIZES, value=st.integers(0, 255))
    def write(self, address: int, size: int, value: int) -> None:
        holder = self.holder(address, size)
        self.bus.write(address, size, value)
        if holder is None:
            self.unclaimed[1] += 1
        else:
            where, _, probe = self.inserted[holder]
            assert probe.seen[-1] == (address - where.start, size, value)

    @rule(timed=st.booleans())
    def time(self, timed: bool) -> None:
        self.bus.timed = timed

    @invariant()
    def agrees(self) -> None:
        ranges = sorted((where, owner) for where, owner, _ in self.inserted.values())
        assert [(entry.range, entry.owner) for entry in self.bus] == ranges
        assert [self.bus.unclaimed_reads, self.bus.unclaimed_writes] == self.unclaimed


BusAgainstMap.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBusAgainstMap = BusAgainstMap.TestCase


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(0, 40), st.integers(1, 10)),
    st.tuples(st.integers(0, 40), st.integers(1, 10)),
)
def test_overlap_means_a_shared_address(first: tuple[int, int], second: tuple[int, int]) -> None:
    one, other = Range(*first), Range(*second)
    shared = set(range(one.start, one.end)) & set(range(other.start, other.end))
    assert one.overlaps(other) == bool(shared)
