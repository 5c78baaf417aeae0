"""A timer device on a desk: fake clock, recorded lines, hostile guests, twins that are restored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from device_contract import spoiled
from fake_clock import FakeClock
from fakes import FakeHost
from hypothesis import strategies as st

from devices.clock import Alarm
from devices.contract import Device
from devices.errors import DeviceError

MS = 1_000_000
SECOND = 1_000 * MS


class CountingClock(FakeClock):
    """Counts the alarms that rang."""

    rang = 0

    def call_at(self, when: int, callback: Callable[[], None]) -> Alarm:
        def ring() -> None:
            self.rang += 1
            callback()

        return super().call_at(when, ring)


class TimedHost(FakeHost):
    """Notes when lines change.

    Attributes:
        changes: (guest time, line, level).
    """

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.changes: list[tuple[int, int, bool]] = []

    def set_irq(self, level: bool, pin: int = 0) -> None:
        super().set_irq(level, pin)
        self.changes.append((self.clock.now(), pin, level))

    def set_line(self, line: int, level: bool) -> None:
        self.set_irq(level, line)

    def rises(self, pin: int = 0) -> list[int]:
        """When the line rose, in guest nanoseconds."""
        return [when for when, which, level in self.changes if level and which == pin]


Make = Callable[[TimedHost, FakeClock], Device]


class Bench:
    """One device with its clock and host."""

    def __init__(self, make: Make, now: int = 0) -> None:
        self.clock = CountingClock(now)
        self.host = TimedHost(self.clock)
        self.device = make(self.host, self.clock)
        self.handlers = self.device.handlers()

    def write(self, value: int, offset: int, size: int = 1, region: int = 0) -> None:
        self.handlers[region].write(offset, size, value)

    def read(self, offset: int, size: int = 1, region: int = 0) -> int:
        return self.handlers[region].read(offset, size)

    def run(self, op: Op) -> object:
        if op.wait:
            self.clock.advance(op.wait)
        if op.value is None:
            value = self.read(op.offset, op.size, op.region)
            assert 0 <= value < 1 << 8 * op.size
            return value
        self.write(op.value, op.offset, op.size, op.region)
        return None

    def saved(self) -> Any:
        """The state, by way of a file."""
        return json.loads(json.dumps(self.device.snapshot()))

    def twin(self, make: Make) -> Bench:
        """A device in a new process that takes up this one's state."""
        other = Bench(make, self.clock.now())
        other.device.restore(self.saved())
        assert other.saved() == self.saved()
        assert {k: v for k, v in other.host.lines.items() if v} == {
            k: v for k, v in self.host.lines.items() if v
        }
        other.host.changes.clear()
        return other


@dataclass(frozen=True)
class Op:
    """One access of a guest after `wait` nanoseconds; a read if `value` is None."""

    region: int
    offset: int
    size: int
    value: int | None
    wait: int


def ops(
    regions: Sequence[int], offsets: Sequence[int] | None = None, sizes: Sequence[int] = (1, 2, 4)
) -> st.SearchStrategy[list[Op]]:
    """Accesses to regions of these lengths; `offsets`: those that matter in the first one."""

    @st.composite
    def op(draw: st.DrawFn) -> Op:
        region = draw(st.integers(0, len(regions) - 1))
        length = regions[region]
        places = st.integers(0, length - 1)
        if offsets and region == 0:
            places = st.one_of(st.sampled_from(offsets), places)
        offset = draw(places)
        size = draw(st.sampled_from([n for n in sizes if offset + n <= length] or [1]))
        top = (1 << 8 * size) - 1
        values = st.one_of(st.integers(0, top), st.sampled_from([0, 1, 2, top]))
        value = draw(st.one_of(st.none(), values))
        wait = draw(st.sampled_from([0, 0, 1, 400, 839, 5_000, 100_000, 3 * MS, SECOND]))
        return Op(region, offset, size, value, wait)

    return st.lists(op(), max_size=60)


def check_hostile(make: Make, script: list[Op], most: int) -> None:
    """No access raises, and no programming makes more than `most` alarms in 50 ms."""
    bench = Bench(make)
    for op in script:
        bench.run(op)
    before = bench.clock.rang
    bench.clock.advance(50 * MS)
    assert bench.clock.rang - before <= most
    assert len(bench.clock.pending()) <= 1


def check_twin(make: Make, script: list[Op], cut: int) -> None:
    """A snapshot in the middle changes nothing of what follows."""
    bench = Bench(make)
    for op in script[:cut]:
        bench.run(op)
    twin = bench.twin(make)
    bench.host.changes.clear()
    for op in [*script[cut:], Op(0, 0, 1, None, 30 * MS)]:
        assert bench.run(op) == twin.run(op)
        assert bench.host.changes == twin.host.changes
    assert bench.saved() == twin.saved()


def check_spoiled(make: Make) -> None:
    """A state that the model never had is refused, and nothing is changed."""
    bench = Bench(make)
    good = bench.saved()
    refused = 0
    for what, bad in spoiled(good):
        try:
            bench.device.restore(bad)
        except DeviceError:
            refused += 1
            assert bench.saved() == good, what
        else:
            bench.device.restore(good)
    assert refused > 20


def bad_state(make: Make, message: str, **changes: Any) -> None:
    bench = Bench(make)
    with pytest.raises(DeviceError, match=message):
        bench.device.restore(bench.saved() | changes)
