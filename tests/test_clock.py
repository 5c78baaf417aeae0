"""The machine's clocks: order of alarms, pausing, budgets, idle skipping, determinism."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict

import msgspec
import pytest
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.clock import NS
from devices.platform.hpet import Hpet
from devices.platform.pit import Pit
from devices.platform.rtc import Rtc
from vmm.clock import (
    END,
    NO_ALARM_BUDGET,
    NS_PER_BYTE,
    PATIENCE,
    AlarmHeap,
    ClockState,
    RealClock,
    VirtualClock,
)
from vmm.events import FAR, EventLoop

# The heap.


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())))
def test_alarms_ring_by_time_then_by_order_of_planning(plan: list[tuple[int, bool]]) -> None:
    heap, rang = AlarmHeap(), []
    for index, (when, wanted) in enumerate(plan):
        alarm = heap.add(when, lambda index=index: rang.append(index))  # type: ignore[misc]
        if not wanted:
            alarm.cancel()
    expected = [i for _, i in sorted((when, i) for i, (when, wanted) in enumerate(plan) if wanted)]
    due = [i for i in expected if plan[i][0] <= 3]
    assert heap.run(3) is bool(due)
    assert rang == due
    heap.run(5)
    assert rang == expected
    assert heap.next() is None


def test_alarm_that_plans_itself_for_now_rings_once_a_round() -> None:
    heap, rang = AlarmHeap(), []

    def again() -> None:
        rang.append(0)
        heap.add(0, again)

    heap.add(0, again)
    for rounds in range(1, 4):
        assert heap.run(10)
        assert len(rang) == rounds
        assert heap.next() == 0


def test_alarm_can_cancel_another_that_is_due() -> None:
    heap, rang = AlarmHeap(), []
    second = heap.add(2, lambda: rang.append(2))
    heap.add(1, second.cancel)
    heap.run(5)
    assert rang == []


def test_cancelled_alarms_do_not_pile_up() -> None:
    heap = AlarmHeap()
    kept = [heap.add(NS + index, lambda: None) for index in range(100)]
    for index in range(100_000):
        heap.add(10 * NS + index, lambda: None).cancel()
        assert len(heap) <= 2 * len(kept) + 65
    heap.run(2 * NS)
    assert heap.next() is None


# Real time.


class Host:
    """A host clock that is turned by hand."""

    def __init__(self) -> None:
        self.ns = 5_000 * NS
        self.replanned = 0

    def now(self) -> int:
        return self.ns

    def note(self) -> None:
        self.replanned += 1


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def real(host: Host) -> RealClock:
    return RealClock(host.note, host_ns=host.now)


def test_real_time_passes_only_while_it_runs(host: Host, real: RealClock) -> None:
    host.ns += NS
    assert real.now() == 0
    real.resume()
    real.resume()
    host.ns += 7
    assert real.now() == 7
    real.pause()
    real.pause()
    host.ns += NS
    assert real.now() == 7
    real.resume()
    host.ns += 3
    assert real.now() == 10
    assert real.snapshot().now == 10


@pytest.mark.parametrize("running", [True, False])
def test_start_at(host: Host, real: RealClock, running: bool) -> None:
    if running:
        real.resume()
    host.ns += NS
    real.call_at(NS, lambda: None).cancel()
    real.start_at(123)
    assert real.now() == 123
    host.ns += 10
    assert real.now() == (133 if running else 123)
    real.resume()
    real.call_at(200, lambda: None)
    host.ns += 5 * PATIENCE
    assert real.now() == 200 + PATIENCE, "what it was before is forgotten"


def test_real_alarms_ring_when_due_and_not_while_paused(host: Host, real: RealClock) -> None:
    rang: list[int] = []
    real.call_at(100, lambda: rang.append(100))
    assert real.host_due() == FAR
    real.resume()
    assert real.host_due() == pytest.approx(5000 + 100e-9, abs=1e-9)
    host.ns += 99
    assert not real.run_due()
    host.ns += 1
    real.pause()
    assert real.host_due() == FAR
    assert not real.run_due()
    real.resume()
    assert real.run_due()
    assert rang == [100]
    assert real.next_alarm() is None
    assert real.host_due() == FAR


def test_only_an_earlier_alarm_disturbs_the_watcher(host: Host, real: RealClock) -> None:
    real.resume()
    host.replanned = 0
    real.call_at(1000, lambda: None)
    assert host.replanned == 1
    real.call_at(2000, lambda: None)
    assert host.replanned == 1
    real.call_at(500, lambda: None).cancel()
    assert host.replanned == 2
    assert not real.run_due()
    assert real.host_due() == pytest.approx(5000 + 1000e-9, abs=1e-9)


def test_time_waits_for_an_alarm_that_is_late(host: Host) -> None:
    overdue: list[int] = []
    real = RealClock(host.note, lambda: overdue.append(1), host.now)
    real.resume()
    real.call_at(NS, lambda: None)
    host.ns += NS + PATIENCE
    assert real.now() == NS + PATIENCE
    assert not overdue
    host.ns += 100_000_000
    assert real.now() == NS + PATIENCE, "nobody sees time pass"
    assert overdue
    assert real.run_due()
    assert real.now() == NS + PATIENCE
    host.ns += 50_000_000
    assert real.now() == NS + PATIENCE + 2 * 50_000_000, "it catches up"
    host.ns += 60_000_000
    assert real.now() == NS + PATIENCE + 160_000_000 + 50_000_000, "and has caught up"
    host.ns += 5
    assert real.now() == NS + PATIENCE + 210_000_005


def test_a_periodic_timer_loses_nothing_while_the_host_stands_still(host: Host) -> None:
    """Linux wants five ticks of 4 ms in 160 ms by the time-stamp counter, or panics."""
    real = RealClock(host.note, host_ns=host.now)
    real.resume()
    rang: list[int] = []

    def tick(due: int) -> None:
        rang.append(real.now())
        real.call_at(due + 4_000_000, lambda: tick(due + 4_000_000))

    real.call_at(4_000_000, lambda: tick(4_000_000))
    host.ns += 170_000_000
    for _ in range(101):
        host.ns = max(host.ns, round(real.host_due() * NS))
        real.run_due()
    assert len(rang) == 101
    assert all(4_000_000 * n <= at <= 4_000_000 * n + PATIENCE for n, at in enumerate(rang, 1))
    assert host.ns - 5_000 * NS == pytest.approx(404_000_000, abs=PATIENCE), "it has caught up"


def test_a_host_that_stood_still_for_long_is_not_caught_up_with(
    host: Host, real: RealClock
) -> None:
    real.resume()
    real.call_at(0, lambda: None)
    host.ns += 3600 * NS
    assert real.run_due()
    assert real.now() == 3599 * NS
    host.ns += NS
    assert real.now() == 3601 * NS


def test_an_alarm_of_the_past_does_not_set_time_back(host: Host, real: RealClock) -> None:
    """As a guest plans it that writes a low TSC deadline."""
    real.resume()
    host.ns += 5 * NS
    assert real.now() == 5 * NS
    rang: list[int] = []
    real.call_at(1, lambda: rang.append(real.now()))
    assert real.host_due() * NS <= host.ns
    assert real.now() == 5 * NS
    assert real.run_due()
    assert rang == [5 * NS]
    host.ns += 7
    assert real.now() == 5 * NS + 7


def test_nor_does_one_of_the_time_that_was_skipped(host: Host, real: RealClock) -> None:
    real.resume()
    seen: list[int] = []
    real.call_at(100, lambda: real.call_at(200, lambda: None))
    real.call_at(300, lambda: seen.append(real.now()))
    host.ns += 3600 * NS
    assert real.run_due()
    assert seen == [3599 * NS]
    assert real.now() == 3599 * NS
    assert real.run_due()
    assert real.now() == 3599 * NS
    host.ns += NS
    assert real.now() == 3601 * NS


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pass", "run", "plan", "past", "read", "pause"]), st.integers(0, 3)
        )
    )
)
def test_real_time_never_goes_back_nor_past_an_alarm(plan: list[tuple[str, int]]) -> None:
    host = Host()
    real = RealClock(host.note, host_ns=host.now)
    real.resume()
    began, seen = host.ns, 0
    skipped = False

    def plan_again() -> None:
        nonlocal skipped
        skipped = True  # perhaps past what it plans now
        real.call_at(seen + 1000, lambda: None)

    for what, size in plan:
        match what:
            case "pass":
                host.ns += 17 * 30 ** (2 * size)
            case "run":
                real.run_due()
                due = real.next_alarm()
                if due is not None:
                    assert real.host_due() <= max(host.ns, due - real.now() + host.ns) / NS + 1e-6
            case "plan":
                real.call_at(seen + 19 * 30 ** (2 * size), lambda: None)
            case "past":
                real.call_at(seen >> 5 * size, plan_again)
            case "pause":
                real.pause()
                real.resume()
        now = real.now()
        assert seen <= now <= host.ns - began
        if skipped:
            seen, skipped = now, False
        due = real.next_alarm()
        assert due is None or now <= max(due + PATIENCE, seen)
        seen = now


def test_real_clock_with_the_event_loop() -> None:
    loop = EventLoop(kick=lambda: None)
    clock = RealClock(loop.replanned)
    loop.guest_due = clock.host_due
    rang: list[int] = []
    clock.call_at(3_000_000, lambda: rang.append(clock.now()))
    clock.call_at(1_000_000, lambda: rang.append(clock.now()))
    clock.resume()
    try:
        while len(rang) < 2:
            loop.poll(None)
            clock.run_due()
    finally:
        loop.close()
    assert rang[0] >= 1_000_000
    assert rang[1] >= 3_000_000


# Virtual time.


class Code:
    """What the CPU executed, and a budget that can be ended."""

    def __init__(self) -> None:
        self.bytes = 0
        self.kicks = 0

    def executed(self) -> int:
        return self.bytes

    def kick(self) -> None:
        self.kicks += 1


@pytest.fixture
def code() -> Code:
    return Code()


@pytest.fixture
def virtual(code: Code) -> VirtualClock:
    return VirtualClock(code.executed, code.kick)


def test_virtual_time_is_executed_code_and_skipped_idleness(
    code: Code, virtual: VirtualClock
) -> None:
    code.bytes = 10
    assert virtual.now() == 10 * NS_PER_BYTE
    virtual.skip_to(1000)
    virtual.skip_to(5)
    assert virtual.now() == 1000
    assert virtual.skipped == 1000 - 10 * NS_PER_BYTE
    virtual.pause()
    virtual.resume()
    code.bytes = 11
    assert virtual.snapshot().now == 1000 + NS_PER_BYTE
    assert virtual.host_due() == FAR


def test_start_at_counts_from_what_was_executed(code: Code, virtual: VirtualClock) -> None:
    code.bytes = 500
    virtual.start_at(7_000)
    assert virtual.now() == 7_000
    code.bytes = 501
    assert virtual.now() == 7_000 + NS_PER_BYTE


def test_budget_ends_at_the_alarm(code: Code, virtual: VirtualClock) -> None:
    assert virtual.budget_until_next() == NO_ALARM_BUDGET
    rang: list[int] = []
    virtual.run_due()
    virtual.call_at(1001 * NS_PER_BYTE, lambda: rang.append(virtual.now()))
    assert virtual.budget_until_next() == 1001
    code.bytes = 1000
    assert not virtual.run_due()
    assert virtual.budget_until_next() == 1
    code.bytes = 1003
    assert virtual.budget_until_next() == 1, "overdue: as soon as can be"
    assert virtual.run_due()
    assert rang == [1003 * NS_PER_BYTE]


def test_earlier_alarm_ends_the_budget(code: Code, virtual: VirtualClock) -> None:
    virtual.call_at(1000, lambda: None)
    assert code.kicks == 0, "nothing runs"
    virtual.budget_until_next()
    virtual.call_at(1000, lambda: None)
    virtual.call_at(2000, lambda: None)
    assert code.kicks == 0, "not earlier"
    virtual.call_at(900, lambda: None)
    assert code.kicks == 1
    virtual.call_at(950, lambda: None)
    assert code.kicks == 1, "it ends already"
    virtual.run_due()
    virtual.call_at(800, lambda: None)
    assert code.kicks == 1


def test_halted_guest_jumps_to_the_next_alarm(code: Code, virtual: VirtualClock) -> None:
    assert not virtual.skip_to_next()
    rang: list[int] = []
    virtual.call_at(50 * NS, lambda: rang.append(virtual.now()))
    virtual.call_at(40 * NS, lambda: None).cancel()
    assert virtual.skip_to_next()
    assert virtual.run_due()
    assert rang == [50 * NS]
    assert code.bytes == 0


# Determinism: a guest of blocks that programs timers, under a loop that is stopped at will.


def test_what_no_run_will_see_is_waited_for(code: Code, virtual: VirtualClock) -> None:
    """A guest may plan at any time of 63 bits; one that was skipped to could not be saved."""
    virtual.call_at(END - 1, lambda: None)
    assert virtual.skip_to_next()
    assert virtual.run_due()
    virtual.call_at((1 << 63) - 1, lambda: None)
    assert not virtual.skip_to_next()
    code.bytes += 1000
    assert not virtual.run_due()
    assert virtual.now() == END - 1 + 1000
    assert msgspec.convert(asdict(virtual.snapshot()), ClockState) == virtual.snapshot()


class Board:
    """Three timers and a guest; `lines` is everything that it could notice."""

    def __init__(self, seed: int) -> None:
        self.code = Code()
        self.limit = 0
        self.clock = VirtualClock(self.code.executed, self._end_budget)
        self.lines: list[tuple[int, str, int, bool]] = []
        self.seed = seed
        self.block = 0
        self.devices = {
            "pit": Pit(self._host("pit"), self.clock),
            "rtc": Rtc(self._host("rtc"), self.clock),
            "hpet": Hpet(FakeHost(), self.clock, self._line("hpet")),
        }

    def _line(self, name: str) -> Callable[[int, bool], None]:
        def note(line: int, level: bool) -> None:
            self.lines.append((self.clock.now(), name, line, level))

        return note

    def _host(self, name: str) -> FakeHost:
        note = self._line(name)

        class Host(FakeHost):
            def set_irq(self, level: bool, pin: int = 0) -> None:
                note(pin, level)

        return Host()

    def _end_budget(self) -> None:
        self.limit = 0

    def _execute(self) -> None:
        """One block: its size and its access follow from its number."""
        chance = random.Random(self.seed * 1_000_003 + self.block)
        self.block += 1
        self.code.bytes += chance.randint(1, 60)
        if chance.random() < 0.9:
            return
        pit, rtc, hpet = (device.handlers() for device in self.devices.values())
        match chance.randrange(6):
            case 0:
                pit[0].write(3, 1, chance.choice([0x30, 0x34, 0x36, 0x38]))
            case 1 | 2:
                pit[0].write(0, 1, chance.randrange(256))
            case 3:
                rtc[0].write(0, 1, chance.choice([0x0A, 0x0B, 0x0C]))
                rtc[0].write(1, 1, chance.choice([0x23, 0x26, 0x42, 0x72]))
                rtc[0].read(1, 1)
            case 4:
                hpet[0].write(0x10, 4, 1)
                hpet[0].write(0x100, 4, 0x4 | 20 << 9 | chance.choice([0, 8, 0x48]))
                hpet[0].write(0x108, 8, hpet[0].read(0xF0, 8) + chance.randrange(300))
            case _:
                self.lines.append((self.clock.now(), "count", 0, bool(pit[0].read(0, 1) & 1)))

    def run(self, blocks: int, look: random.Random | None = None) -> None:
        """Until so many blocks were executed; `look` stops it more often than needed."""
        while self.block < blocks:
            self.clock.run_due()
            if self.block % 1000 == 999:  # HLT
                self.block += 1
                self.clock.skip_to_next()
                continue
            budget = self.clock.budget_until_next()
            self.limit = budget if look is None else min(budget, look.randint(1, 500))
            while self.limit > 0 and self.block < blocks and self.block % 1000 != 999:
                before = self.code.bytes
                self._execute()
                self.limit -= self.code.bytes - before

    def state(self) -> object:
        return [device.snapshot() for device in self.devices.values()], self.clock.now()

    def restored(self) -> Board:
        other = Board(self.seed)
        other.block = self.block
        other.code.bytes = self.code.bytes
        other.clock.start_at(self.clock.snapshot().now)
        for name in reversed(other.devices):
            other.devices[name].restore(self.devices[name].snapshot())
        other.lines = list(self.lines)
        return other


@pytest.mark.parametrize("seed", range(8))
def test_virtual_time_is_the_same_however_often_the_machine_is_stopped(seed: int) -> None:
    plain = Board(seed)
    plain.run(4000)
    assert len(plain.lines) > 50
    for times in range(3):
        looked = Board(seed)
        looked.run(4000, random.Random(times))
        assert looked.lines == plain.lines
        assert looked.state() == plain.state()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 1500))
def test_virtual_time_goes_on_the_same_after_a_restore(seed: int, cut: int) -> None:
    plain = Board(seed)
    plain.run(1500)
    first = Board(seed)
    first.run(cut)
    second = first.restored()
    assert second.state() == first.state()
    second.run(1500)
    assert second.lines == plain.lines
    assert second.state() == plain.state()
