"""The bus as PCI needs it: ranges anywhere in the 64-bit space, beside RAM, at its very top."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devices.bus import ADDRESS_LIMIT, ALL_ONES, Bus, BusType, Range, RangeConflict


@dataclass
class Recorder:
    tag: int
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        value = (self.tag << 8 | offset) & ALL_ONES[size]
        self.calls.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("write", offset, size, value))


@dataclass
class Claim:
    range: Range
    owner: str
    device: Recorder


def test_a_device_never_sees_more_than_the_bytes_of_the_access() -> None:
    bus, device = Bus(BusType.MMIO), Recorder(1)
    bus.insert(Range(0x100, 8), device, "it")
    bus.write(0x100, 1, 0x1FF)
    assert device.calls == [("write", 0, 1, 0xFF)]


def test_a_device_may_move_while_it_is_accessed() -> None:
    bus = Bus(BusType.MMIO)

    class Mover(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            bus.remove(Range(0x100, 4), "mover")
            bus.insert(Range(value, 4), self, "mover")

    bus.insert(Range(0x100, 4), Mover(1), "mover")
    bus.insert(Range(0x104, 4), Recorder(2), "other")
    bus.write(0x100, 2, 0x40)
    assert [(entry.start, entry.owner) for entry in bus] == [(0x40, "mover"), (0x104, "other")]


class BusMachine(RuleBasedStateMachine):
    """Each address of a small window knows who owns it; the window is anywhere in the space."""

    WINDOW = 48

    @initialize(where=st.sampled_from(["bottom", "middle", "top", "limited"]))
    def build(self, where: str) -> None:
        bases = {"middle": (1 << 32) - 20, "top": ADDRESS_LIMIT - self.WINDOW}
        self.base = bases.get(where, 0)
        self.limit = 40 if where == "limited" else ADDRESS_LIMIT
        self.bus = Bus(BusType.MMIO, self.limit)
        self.owned: dict[int, Claim] = {}
        self.ram: set[int] = set()
        self.claims: list[Claim] = []
        self.unclaimed = [0, 0]
        self.counts: dict[str, list[int]] = {}

    @rule(
        start=st.integers(0, WINDOW - 1), length=st.integers(0, 12), owner=st.sampled_from("abcd")
    )
    def insert(self, start: int, length: int, owner: str) -> None:
        first = self.base + start
        addresses = range(first, first + length)
        if length == 0 or addresses[-1] >= ADDRESS_LIMIT:
            with pytest.raises(ValueError, match="range"):
                Range(first, length)
            return
        wanted, device = Range(first, length), Recorder(len(self.claims) + 1)
        if any(a in self.owned or a in self.ram or a >= self.limit for a in addresses):
            with pytest.raises(RangeConflict):
                self.bus.insert(wanted, device, owner)
            return
        entry = self.bus.insert(wanted, device, owner)
        assert (entry.range, entry.owner) == (wanted, owner)
        claim = Claim(wanted, owner, device)
        self.claims.append(claim)
        self.owned.update(dict.fromkeys(addresses, claim))
        self.counts.setdefault(owner, [0, 0])

    @rule(start=st.integers(0, WINDOW - 1), length=st.integers(1, 12))
    def reserve(self, start: int, length: int) -> None:
        first = self.base + start
        addresses = range(first, min(first + length, ADDRESS_LIMIT))
        if len(self.ram) + len(addresses) > self.WINDOW // 3:
            return  # leave room for devices
        taken = Range(first, len(addresses))
        if any(a in self.owned or a in self.ram for a in addresses):
            with pytest.raises(RangeConflict):
                self.bus.reserve(taken)
        else:
            self.bus.reserve(taken)
            self.ram.update(addresses)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), right=st.booleans())
    def remove(self, data: st.DataObject, right: bool) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        if not right:
            assert not self.bus.remove(claim.range, "somebody else")
            if claim.range.end < ADDRESS_LIMIT:
                longer = Range(claim.range.start, claim.range.length + 1)
                assert not self.bus.remove(longer, claim.owner)
            return
        assert self.bus.remove(claim.range, claim.owner)
        assert not self.bus.remove(claim.range, claim.owner)
        self.claims.remove(claim)
        self.owned = {a: c for a, c in self.owned.items() if c is not claim}

    @rule(
        write=st.booleans(),
        start=st.integers(-4, WINDOW + 4),
        size=st.sampled_from([1, 2, 4, 8]),
        number=st.integers(0, (1 << 64) - 1),
    )
    def access(self, write: bool, start: int, size: int, number: int) -> None:
        address = max(self.base + start, 0)
        claim = self.holder(address, size)
        value = number & ALL_ONES[size]
        if write:
            self.bus.write(address, size, number)
        else:
            value = self.bus.read(address, size)
        if claim is not None:
            kind = "write" if write else "read"
            assert claim.device.calls.pop() == (kind, address - claim.range.start, size, value)
            self.counts[claim.owner][write] += 1
        else:
            assert write or value == ALL_ONES[size]
            self.unclaimed[write] += 1

    @rule(timed=st.booleans())
    def time(self, timed: bool) -> None:
        self.bus.timed = timed
        assert self.bus.timed is timed

    @invariant()
    def agrees(self) -> None:
        claims = sorted(self.claims, key=lambda claim: claim.range.start)
        assert [(e.range, e.owner) for e in self.bus] == [(c.range, c.owner) for c in claims]
        assert [self.bus.unclaimed_reads, self.bus.unclaimed_writes] == self.unclaimed
        assert {o: [s.reads, s.writes] for o, s in self.bus.stats().items()} == self.counts
        assert not any(claim.device.calls for claim in claims)

    def holder(self, address: int, size: int) -> Claim | None:
        holders = {id(self.owned.get(a)) for a in range(address, address + size)}
        return self.owned.get(address) if len(holders) == 1 else None


BusMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBusMachine = BusMachine.TestCase
