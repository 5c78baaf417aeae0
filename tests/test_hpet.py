"""The HPET: main counter, one-shot and periodic timers, 32-bit mode, routes, legacy replacement."""

from __future__ import annotations

import pytest
from fake_clock import FakeClock
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st
from timer_rig import (
    MS,
    SECOND,
    Bench,
    Op,
    TimedHost,
    bad_state,
    check_hostile,
    check_spoiled,
    check_twin,
    ops,
)

from devices.platform.hpet import (
    CAPABILITIES,
    CONFIGURATION,
    COUNTER,
    ENABLE,
    INT_ENABLE,
    LEGACY,
    LEVEL,
    LINES,
    MODE32,
    PERIODIC,
    ROUTES,
    STATUS,
    VALUE_SET,
    Hpet,
)
from devices.platform.timing import MIN_INTERVAL

ROUTE = 21
ROUTED = ROUTE << 9
US = 10
"""Ticks in a microsecond at the default period."""


def make(host: TimedHost, clock: FakeClock) -> Hpet:
    return Hpet(host, clock, host.set_line)


@pytest.fixture
def bench() -> Bench:
    return Bench(make)


def config(timer: int) -> int:
    return 0x100 + 0x20 * timer


def comparator(timer: int) -> int:
    return config(timer) + 8


def put(bench: Bench, offset: int, value: int, size: int = 8) -> None:
    bench.write(value, offset, size)


def get(bench: Bench, offset: int, size: int = 8) -> int:
    return bench.read(offset, size)


def start_periodic(bench: Bench, timer: int, bits: int, first: int, period: int) -> None:
    put(bench, config(timer), INT_ENABLE | PERIODIC | VALUE_SET | bits)
    put(bench, comparator(timer), first)
    put(bench, comparator(timer), period)


# The main counter.


@pytest.mark.parametrize("period", [10, 69, 100])
def test_counter_is_exact(period: int) -> None:
    bench = Bench(lambda host, clock: Hpet(host, clock, host.set_line, period_ns=period))
    assert get(bench, CAPABILITIES) == period * 10**6 << 32 | 0x8086A201
    bench.clock.advance(777)
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(100 * 365 * 86_400 * SECOND)
    assert get(bench, COUNTER) == 100 * 365 * 86_400 * SECOND // period
    put(bench, CONFIGURATION, 0)
    stopped = get(bench, COUNTER)
    bench.clock.advance(SECOND)
    assert get(bench, COUNTER) == stopped
    put(bench, COUNTER, 5)
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(period)
    assert get(bench, COUNTER) == 6


def test_counter_is_read_and_written_by_halves(bench: Bench) -> None:
    put(bench, COUNTER + 4, 0x1234, 4)
    put(bench, COUNTER, 0xFFFF_FFFF, 4)
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(100)
    assert get(bench, COUNTER) == 0x1235_0000_0000
    assert get(bench, COUNTER + 4, 4) == 0x1235
    assert get(bench, COUNTER + 5, 1) == 0x12


def test_toggling_other_bits_does_not_shift_the_counter(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    for _ in range(1000):
        bench.clock.advance(99)
        put(bench, CONFIGURATION, ENABLE | LEGACY)
        put(bench, CONFIGURATION, ENABLE)
    assert get(bench, COUNTER) == 990


@pytest.mark.parametrize(("offset", "size"), [(COUNTER, 1), (COUNTER, 2), (COUNTER + 2, 4)])
def test_odd_writes_are_ignored(bench: Bench, offset: int, size: int) -> None:
    put(bench, offset, 0x55, size)
    assert get(bench, COUNTER) == 0


def test_period_is_bounded() -> None:
    for period in (9, 101):
        with pytest.raises(ValueError, match="not "):
            Hpet(FakeHost(), FakeClock(), lambda line, level: None, period_ns=period)


# Timers.


def test_one_shot(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    put(bench, config(0), INT_ENABLE | ROUTED)
    put(bench, comparator(0), 5_000 * US)
    bench.clock.advance(SECOND)
    assert bench.host.changes == [(5 * MS, ROUTE, True)]
    assert bench.clock.pending() == []
    assert get(bench, comparator(0)) == 5_000 * US


def test_set_too_late_matches_after_the_wrap(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(10_000)
    put(bench, config(0), INT_ENABLE | ROUTED | MODE32)
    put(bench, comparator(0), 99)
    assert bench.clock.pending() == [((1 << 32) + 99) * 100]
    bench.clock.advance(1000 * SECOND)
    assert bench.host.rises(ROUTE) == [((n << 32) + 99) * 100 for n in (1, 2)]


def test_32_bit_mode_compares_the_low_half(bench: Bench) -> None:
    put(bench, COUNTER, 0x7_FFFF_FF00)
    put(bench, CONFIGURATION, ENABLE)
    put(bench, config(2), INT_ENABLE | ROUTED | MODE32)
    put(bench, comparator(2), 0x10, 4)
    bench.clock.advance(SECOND)
    assert bench.host.rises(ROUTE) == [0x110 * 100]


@pytest.mark.parametrize("timer", range(3))
@pytest.mark.parametrize("bits", [0, MODE32])
def test_periodic_as_linux_programs_it(bench: Bench, timer: int, bits: int) -> None:
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(333)  # the counter says 3, for 33 ns now
    start_periodic(bench, timer, ROUTED | bits, 3 + 1000 * US, 1000 * US)
    bench.clock.advance(20 * SECOND)
    rises = bench.host.rises(ROUTE)
    assert rises == [300 + n * MS for n in range(1, 20_001)]
    bench.clock.time += 1000 * SECOND  # beyond a wrap of 32 bits
    bench.clock.advance(0)
    bench.clock.advance(MS)
    assert bench.host.rises(ROUTE)[20_001:] == [300 + 1_020_001 * MS]
    assert get(bench, comparator(timer)) == (3 + 1_020_002 * 10_000) & (2**32 - 1 if bits else -1)


def test_single_write_sets_first_match_and_period(bench: Bench) -> None:
    put(bench, config(0), INT_ENABLE | PERIODIC | VALUE_SET | ROUTED)
    put(bench, comparator(0), 1000 * US)
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(10 * MS)
    assert bench.host.rises(ROUTE) == [n * MS for n in range(1, 11)]


def test_value_set_clears_itself_with_each_write(bench: Bench) -> None:
    put(bench, config(0), INT_ENABLE | PERIODIC | VALUE_SET | ROUTED)
    put(bench, comparator(0), 0x1111, 4)
    put(bench, config(0), INT_ENABLE | PERIODIC | VALUE_SET | ROUTED)
    put(bench, comparator(0) + 4, 0x2222, 4)
    put(bench, comparator(0), 0x3333, 4)
    assert get(bench, comparator(0)) == 0x2222_0000_1111
    assert bench.device.state.timers[0].period == 0x2222_0000_3333


def test_period_of_zero_is_no_storm(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    start_periodic(bench, 0, ROUTED, 100, 0)
    bench.clock.advance(SECOND)
    assert bench.host.rises(ROUTE) == [100 * 100]


def test_shortest_period_does_not_hang_the_machine(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    for timer in range(3):
        start_periodic(bench, timer, (20 + timer) << 9, 10, 1)
    bench.clock.advance(SECOND)
    for timer in range(3):
        assert len(bench.host.rises(20 + timer)) == SECOND // MIN_INTERVAL
    assert bench.clock.rang <= 3 * SECOND // MIN_INTERVAL
    assert get(bench, comparator(1)) == get(bench, COUNTER) + 1


def test_late_alarm_rings_once_and_keeps_the_phase(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    start_periodic(bench, 0, ROUTED, 1000 * US, 1000 * US)
    bench.clock.time = 12_345_678_901
    bench.clock.advance(0)
    assert bench.host.rises(ROUTE) == [12_345_678_901]
    bench.clock.advance(MS)
    assert bench.host.rises(ROUTE)[1:] == [12_346 * MS]


# Level and edge.


def test_level_interrupt_lasts_until_its_status_is_cleared(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    start_periodic(bench, 1, LEVEL | ROUTED, 1000 * US, 1000 * US)
    bench.clock.advance(10 * MS + 1)
    assert bench.host.changes == [(MS, ROUTE, True)]
    assert get(bench, STATUS) == 2
    put(bench, STATUS, 5, 4)
    assert bench.host.lines[ROUTE]
    put(bench, STATUS, 2, 4)
    assert not bench.host.lines[ROUTE]
    bench.clock.advance(MS)
    assert bench.host.rises(ROUTE) == [MS, 11 * MS]


def test_status_without_interrupt(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    put(bench, config(0), LEVEL | ROUTED)
    put(bench, comparator(0), 10)
    bench.clock.advance(MS)
    assert bench.clock.rang == 0
    assert get(bench, STATUS) == 1
    put(bench, config(0), LEVEL | ROUTED | INT_ENABLE)
    assert bench.host.lines[ROUTE]
    put(bench, CONFIGURATION, 0)
    assert not bench.host.lines[ROUTE], "the block is off: no interrupts"


def test_edge_interrupt_pulses_its_line(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    start_periodic(bench, 0, ROUTED, 1000 * US, 1000 * US)
    bench.clock.advance(2 * MS)
    assert bench.host.changes == [
        (MS, ROUTE, True),
        (2 * MS, ROUTE, False),
        (2 * MS, ROUTE, True),
    ]
    put(bench, config(0), INT_ENABLE | PERIODIC | 23 << 9)
    assert not any(bench.host.lines.values()), "another route is no interrupt"


def test_only_offered_routes_can_be_set(bench: Bench) -> None:
    for route in range(32):
        put(bench, config(0), route << 9)
        read = get(bench, config(0)) >> 9 & 0x1F
        assert (read == route) is (route in ROUTES)
    assert get(bench, config(0)) >> 32 == 0x00F0_0000
    assert get(bench, config(0)) & 0x8030 == 0x30


def test_a_change_of_width_looks_for_another_match(bench: Bench) -> None:
    """2.3.8: with 32 bits the low half of the counter is compared, from that write on."""
    put(bench, COUNTER, 1 << 32)
    put(bench, config(0), INT_ENABLE | ROUTED)
    put(bench, comparator(0), 1000 * US)
    put(bench, CONFIGURATION, ENABLE)
    bench.clock.advance(MS // 2)
    put(bench, config(0), INT_ENABLE | ROUTED | MODE32)
    bench.clock.advance(MS)
    assert bench.host.rises(ROUTE) == [MS]
    put(bench, COUNTER, 5)
    bench.clock.advance(100)
    put(bench, config(0), INT_ENABLE | ROUTED)  # and back to 64
    bench.host.changes.clear()
    bench.clock.advance(2 * MS)
    assert len(bench.host.rises(ROUTE)) == 1


# Legacy replacement.


def test_legacy_replacement_takes_the_lines_of_pit_and_rtc(bench: Bench) -> None:
    hpet = bench.device
    assert isinstance(hpet, Hpet)
    hpet.isa_input(0, True)
    hpet.isa_input(8, True)
    assert bench.host.lines == {0: True, 8: True}
    put(bench, CONFIGURATION, ENABLE | LEGACY)
    assert bench.host.lines == {0: False, 8: False}
    hpet.isa_input(0, False)
    hpet.isa_input(0, True)
    assert not bench.host.lines[0]
    start_periodic(bench, 0, ROUTED, 1000 * US, 1000 * US)
    start_periodic(bench, 1, ROUTED, 1500 * US, 1000 * US)
    start_periodic(bench, 2, ROUTED, 1700 * US, 1000 * US)
    bench.host.changes.clear()
    bench.clock.advance(2 * MS)
    assert bench.host.rises(0) == [MS, 2 * MS]
    assert bench.host.rises(8) == [MS + MS // 2]
    assert bench.host.rises(ROUTE) == [1_700_000]
    hpet.isa_input(8, False)
    put(bench, CONFIGURATION, 0)
    assert bench.host.lines == {0: True, 8: False, ROUTE: False}


@pytest.mark.parametrize(("timer", "line"), [(0, 0), (1, 8)])
@pytest.mark.parametrize("legacy", [0, LEGACY], ids=["to-legacy", "from-legacy"])
def test_an_edge_does_not_move_to_another_line(
    bench: Bench, timer: int, line: int, legacy: int
) -> None:
    """An edge that was given is over when the timer gets another line: none rises there."""
    put(bench, CONFIGURATION, ENABLE | legacy)
    put(bench, config(timer), INT_ENABLE | ROUTED)
    put(bench, comparator(timer), 1000 * US)
    bench.clock.advance(2 * MS)
    assert bench.host.rises(line if legacy else ROUTE) == [MS]
    bench.host.changes.clear()
    put(bench, CONFIGURATION, ENABLE | LEGACY ^ legacy)
    assert not any(bench.host.lines.values())
    assert not any(level for _, _, level in bench.host.changes)


def test_without_legacy_replacement_isa_inputs_pass(bench: Bench) -> None:
    hpet = bench.device
    assert isinstance(hpet, Hpet)
    for irq in (0, 8):
        for level in (True, False, True):
            hpet.isa_input(irq, level)
            assert bench.host.lines[irq] is level


# State, hostile guests.

REGISTERS = [
    *(CONFIGURATION, CONFIGURATION, STATUS, COUNTER, COUNTER + 4),
    *(base + half for n in range(3) for base in (config(n), comparator(n)) for half in (0, 0, 4)),
]
SCRIPTS = ops([0x400], REGISTERS, sizes=(4, 4, 8, 1))
ON = Op(0, CONFIGURATION, 4, ENABLE, 0)
BUSY = [
    Op(0, config(n), 4, INT_ENABLE | PERIODIC | VALUE_SET | MODE32 | (20 + n) << 9, 0)
    for n in range(3)
]


@settings(max_examples=200, deadline=None)
@given(SCRIPTS)
def test_hostile_guest(script: list[Op]) -> None:
    check_hostile(make, [ON, *BUSY, *script], most=3 * 501)


@settings(max_examples=150, deadline=None)
@given(SCRIPTS, st.integers(0, 60))
def test_snapshot_in_the_middle(script: list[Op], cut: int) -> None:
    check_twin(make, [ON, *BUSY, *script], cut)


def test_overdue_interrupt_is_not_lost_by_a_snapshot(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    start_periodic(bench, 0, ROUTED, 1000 * US, 1000 * US)
    bench.clock.time = 5 * MS + 1
    twin = Bench(make, bench.clock.now())
    twin.device.restore(bench.saved())
    for each in (bench, twin):
        each.host.changes.clear()
        each.clock.advance(2 * MS)
    assert bench.host.changes == twin.host.changes
    assert twin.host.rises(ROUTE) == [5 * MS + 1, 6 * MS, 7 * MS]


def test_restore_drives_every_line(bench: Bench) -> None:
    put(bench, CONFIGURATION, ENABLE)
    put(bench, config(0), LEVEL | ROUTED | INT_ENABLE)
    put(bench, comparator(0), 10)
    bench.clock.advance(MS)
    twin = Bench(make, bench.clock.now())
    twin.device.restore(bench.saved())
    assert twin.host.lines == {line: line == ROUTE for line in LINES}


def test_spoiled_states_are_refused() -> None:
    check_spoiled(make)
    bad_state(make, "stands still", timers=[timer() | {"match": 1} for _ in range(3)])
    bad_state(make, "three timers|3 timers", timers=[])
    bad_state(make, "configured", timers=[timer() | {"config": 0} for _ in range(3)])


def timer() -> dict[str, object]:
    saved: dict[str, object] = Bench(make).saved()["timers"][0]
    return saved
