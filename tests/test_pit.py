"""The 8254: every mode against a model that is ticked, latches, GATE, IRQ 0, port 0x61."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from fake_clock import FakeClock
from hypothesis import example, given, settings
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

from devices.platform.pit import FREQUENCY, Pit
from devices.platform.pit_channel import Channel, ChannelState
from devices.platform.timing import MIN_INTERVAL, Oscillator

CONTROL = 3
OUT2 = 0x20


def make(host: TimedHost, clock: FakeClock) -> Pit:
    return Pit(host, clock)


@pytest.fixture
def bench() -> Bench:
    return Bench(make)


def tick(bench: Bench, count: int = 1) -> None:
    """To the time at which `count` more ticks have been."""
    oscillator = Oscillator(FREQUENCY)
    target = oscillator.ticks(bench.clock.now()) + count
    bench.clock.advance(oscillator.when(target) - bench.clock.now())


def program(bench: Bench, channel: int, mode: int, count: int, bcd: int = 0) -> None:
    bench.write(channel << 6 | 0x30 | mode << 1 | bcd, CONTROL)
    bench.write(count & 0xFF, channel)
    bench.write(count >> 8, channel)


def read_count(bench: Bench, channel: int) -> int:
    bench.write(channel << 6, CONTROL)
    return bench.read(channel) | bench.read(channel) << 8


# The modes, against the wave forms of the data sheet (figures 15 to 20), one character a CLK:
# OUT from the CLK after the count was written.

WAVES = [
    (0, 4, "LLLLHHHHHHHHHHHH"),
    (2, 3, "HHLHHLHHLHHLHHLH"),
    (2, 2, "HLHLHLHLHLHLHLHL"),
    (2, 1, "HLHLHLHLHLHLHLHL"),
    (3, 4, "HHLLHHLLHHLLHHLL"),
    (3, 5, "HHHLLHHHLLHHHLLH"),
    (3, 2, "HLHLHLHLHLHLHLHL"),
    (3, 3, "HHLHHLHHLHHLHHLH"),
    (4, 3, "HHHLHHHHHHHHHHHH"),
    (4, 1, "HLHHHHHHHHHHHHHH"),
    (0, 1, "LHHHHHHHHHHHHHHH"),
]


@pytest.mark.parametrize(("mode", "count", "wave"), WAVES)
def test_out(bench: Bench, mode: int, count: int, wave: str) -> None:
    bench.write(1, 0, region=1)
    program(bench, 2, mode, count)
    seen = ""
    for _ in wave:
        tick(bench)
        seen += "H" if bench.read(0, region=1) & OUT2 else "L"
    assert seen == wave


@pytest.mark.parametrize(
    ("mode", "count", "numbers"),
    [
        (0, 3, [3, 2, 1, 0, 0xFFFF, 0xFFFE]),
        (2, 3, [3, 2, 1, 3, 2, 1]),
        (3, 4, [4, 2, 4, 2, 4, 2]),
        (3, 5, [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]),
        (4, 2, [2, 1, 0, 0xFFFF]),
        (2, 0, [0, 0xFFFF, 0xFFFE]),
        (3, 0, [0, 0xFFFE, 0xFFFC]),
    ],
)
def test_count(bench: Bench, mode: int, count: int, numbers: list[int]) -> None:
    program(bench, 0, mode, count)
    for number in numbers:
        tick(bench)
        assert read_count(bench, 0) == number


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    program(bench, 0, 0, 0x0100, bcd=1)
    tick(bench)
    assert read_count(bench, 0) == 0x0100
    tick(bench)
    assert read_count(bench, 0) == 0x0099
    tick(bench, 100)
    assert read_count(bench, 0) == 0x9999
    program(bench, 0, 2, 0, bcd=1)
    tick(bench, 2)
    assert read_count(bench, 0) == 0x9999


@pytest.mark.parametrize(("mode", "wave"), [(1, "HLLLHHHHHH"), (5, "HHHHLHHHHH")])
def test_hardware_trigger(bench: Bench, mode: int, wave: str) -> None:
    program(bench, 2, mode, 3)
    tick(bench, 100)
    assert bench.read(0, region=1) & OUT2
    bench.write(1, 0, region=1)
    seen = ""
    for _ in wave:
        seen += "H" if bench.read(0, region=1) & OUT2 else "L"
        tick(bench)
    assert seen == wave
    # Another rising edge triggers anew, with the count that was written meanwhile.
    bench.write(5, 2)
    bench.write(0, 2)
    bench.write(0, 0, region=1)
    bench.write(1, 0, region=1)
    tick(bench, 5)
    assert bool(bench.read(0, region=1) & OUT2) is (mode == 5)
    tick(bench)
    assert bool(bench.read(0, region=1) & OUT2) is (mode == 1)


def test_one_shot_is_retriggered_without_a_glitch(bench: Bench) -> None:
    program(bench, 2, 1, 10)
    bench.write(1, 0, region=1)
    tick(bench, 8)
    bench.write(0, 0, region=1)
    bench.write(1, 0, region=1)
    for _ in range(10):
        assert not bench.read(0, region=1) & OUT2
        tick(bench)
    assert not bench.read(0, region=1) & OUT2
    tick(bench)
    assert bench.read(0, region=1) & OUT2


@pytest.mark.parametrize("mode", [0, 4])
def test_low_gate_stops_the_count(bench: Bench, mode: int) -> None:
    bench.write(1, 0, region=1)
    program(bench, 2, mode, 100)
    tick(bench, 41)
    bench.write(0, 0, region=1)
    tick(bench, 5000)
    assert read_count(bench, 2) == 60
    bench.write(1, 0, region=1)
    tick(bench, 10)
    assert read_count(bench, 2) == 50


@pytest.mark.parametrize("mode", [2, 3])
def test_gate_reloads_a_periodic_counter(bench: Bench, mode: int) -> None:
    bench.write(1, 0, region=1)
    program(bench, 2, mode, 100)
    tick(bench, 71 if mode == 3 else 100)
    assert not bench.read(0, region=1) & OUT2
    bench.write(0, 0, region=1)
    assert bench.read(0, region=1) & OUT2, "OUT is high at once while GATE is low"
    stopped = read_count(bench, 2)
    tick(bench, 333)
    assert read_count(bench, 2) == stopped
    bench.write(1, 0, region=1)
    tick(bench)
    assert read_count(bench, 2) == 100


def test_new_count_in_mode_2_waits_for_the_period(bench: Bench) -> None:
    program(bench, 0, 2, 10)
    tick(bench, 4)
    bench.write(20, 0)
    bench.write(0, 0)
    tick(bench, 6)
    assert read_count(bench, 0) == 1
    tick(bench)
    assert read_count(bench, 0) == 20


def test_new_count_in_mode_3_waits_for_the_half_period(bench: Bench) -> None:
    bench.write(1, 0, region=1)
    program(bench, 2, 3, 10)
    tick(bench, 2)
    bench.write(4, 2)
    bench.write(0, 2)
    seen = ""
    for _ in range(12):
        seen += "H" if bench.read(0, region=1) & OUT2 else "L"
        tick(bench)
    # Five CLKs high from the old count, of which one is over; then low for two of the new one.
    assert seen == "HHHHLLHHLLHH"


def test_first_byte_stops_mode_0(bench: Bench) -> None:
    program(bench, 0, 0, 10)
    tick(bench, 20)
    assert bench.host.irq
    bench.write(7, 0)
    assert not bench.host.irq
    tick(bench, 200)
    assert not bench.host.irq
    bench.write(0, 0)
    tick(bench, 7)
    assert not bench.host.irq
    tick(bench)
    assert bench.host.irq


@pytest.mark.parametrize(("access", "written"), [(1, 0x0034), (2, 0x3400)])
def test_single_byte_access(bench: Bench, access: int, written: int) -> None:
    bench.write(access << 4 | 4, CONTROL)
    bench.write(0x34, 0)
    tick(bench)
    assert bench.read(0) == 0x34
    assert bench.read(0) == 0x34
    assert bench.device.state.channels[0].loaded == written


# Latches.


def test_latched_count_stays_until_it_is_read(bench: Bench) -> None:
    program(bench, 0, 2, 1000)
    tick(bench, 11)
    bench.write(0, CONTROL)
    tick(bench, 100)
    bench.write(0, CONTROL)
    assert bench.read(0) == 990 & 0xFF
    tick(bench, 100)
    assert bench.read(0) == 990 >> 8
    assert bench.read(0) | bench.read(0) << 8 == 790


READ_BACKS = [
    # (command, what counters 0, 1, 2 say first: "s"tatus, "c"ount or "l"ive)
    (0xC2, "sll"),
    (0xC4, "lsl"),
    (0xCE, "sss"),
    (0xE2, "sll"),
    (0xD2, "cll"),
    (0xDE, "ccc"),
    (0xEE, "sss"),
    (0xF2, "lll"),
    (0xC8, "lls"),
]


@pytest.mark.parametrize(("command", "first"), READ_BACKS, ids=str)
def test_read_back(bench: Bench, command: int, first: str) -> None:
    bench.write(1, 0, region=1)
    for channel in range(3):
        program(bench, channel, 2, 0x1000)
    tick(bench, 1)
    bench.write(command, CONTROL)
    tick(bench, 2)
    for channel, kind in enumerate(first):
        if kind == "s":
            assert bench.read(channel) == 0xB4  # OUT, no null count, both bytes, mode 2
        value = bench.read(channel) | bench.read(channel) << 8
        assert value == (0x1000 if kind != "l" and not command & 0x20 else 0x0FFE)


def test_status_shows_null_count_and_the_mode_as_written(bench: Bench) -> None:
    bench.write(0x3E, CONTROL)  # mode code 7 is mode 3
    bench.write(0xE2, CONTROL)
    assert bench.read(0) == 0x80 | 0x40 | 0x3E
    bench.write(4, 0)
    bench.write(0, 0)
    bench.write(0xE2, CONTROL)
    assert bench.read(0) & 0x40
    tick(bench)
    bench.write(0xE2, CONTROL)
    assert bench.read(0) == 0x80 | 0x3E
    bench.write(6, 0)
    bench.write(0, 0)
    bench.write(0xE2, CONTROL)
    assert bench.read(0) & 0x40, "the new count waits in CR"
    tick(bench, 2)
    bench.write(0xE2, CONTROL)
    assert not bench.read(0) & 0x40


def test_control_word_forgets_latches_and_half_counts(bench: Bench) -> None:
    program(bench, 0, 2, 0x1234)
    bench.write(0xC2, CONTROL)
    bench.read(0)
    bench.write(0x99, 0)
    program(bench, 0, 2, 0x5678)
    tick(bench)
    assert bench.read(0) | bench.read(0) << 8 == 0x5678


def test_control_port_cannot_be_read(bench: Bench) -> None:
    assert bench.read(CONTROL) == 0xFF


# IRQ 0.


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("count", [11_932, 1193, 65536, 4773])
def test_period_never_drifts(bench: Bench, mode: int, count: int) -> None:
    program(bench, 0, mode, count & 0xFFFF)
    bench.host.changes.clear()
    bench.clock.advance(20 * SECOND)
    rises = bench.host.rises()
    assert len(rises) == (20 * FREQUENCY - 1) // count
    for index in (0, 1, 2, len(rises) // 2, len(rises) - 1):
        exact = Fraction((index + 1) * count + 1, FREQUENCY) * SECOND
        assert 0 <= rises[index] - exact < 1


def test_year_later_the_edges_are_still_exact() -> None:
    bench = Bench(make)
    program(bench, 0, 2, 11_932)
    bench.clock.time = 365 * 86_400 * SECOND  # nobody served the alarm for a year
    bench.clock.advance(0)
    bench.host.changes.clear()
    bench.clock.advance(SECOND)
    for rise in bench.host.rises():
        ticks = Oscillator(FREQUENCY).ticks(rise)
        assert (ticks - 1) % 11_932 == 0


def test_one_shot_rings_once(bench: Bench) -> None:
    program(bench, 0, 0, 1193)
    bench.clock.advance(10 * SECOND)
    oscillator = Oscillator(FREQUENCY)
    assert bench.host.rises() == [oscillator.when(1194)]
    assert bench.clock.pending() == []
    program(bench, 0, 0, 1)
    assert not bench.host.irq, "the control word takes OUT down"
    tick(bench, 2)
    assert bench.host.irq


def test_software_strobe_interrupts_as_it_ends(bench: Bench) -> None:
    program(bench, 0, 4, 1193)
    bench.host.changes.clear()
    bench.clock.advance(SECOND)
    assert bench.host.rises() == [Oscillator(FREQUENCY).when(1195)]


def test_mode_1_of_counter_0_waits_for_ever(bench: Bench) -> None:
    program(bench, 0, 1, 5)
    bench.host.changes.clear()
    bench.clock.advance(SECOND)
    assert bench.host.changes == []


def test_shortest_period_does_not_hang_the_machine(bench: Bench) -> None:
    program(bench, 0, 2, 1)
    bench.clock.advance(SECOND)
    rises = bench.host.rises()[1:]
    assert 5_000 < len(rises) <= SECOND // MIN_INTERVAL
    assert all(after - before >= MIN_INTERVAL for before, after in pairwise(rises))
    # Each of them still is an edge of the counter.
    assert all(Oscillator(FREQUENCY).ticks(rise) % 2 == 1 for rise in rises)


def test_overdue_interrupt_is_not_lost_by_reprogramming(bench: Bench) -> None:
    program(bench, 0, 0, 100)
    bench.clock.time = MS
    bench.write(0x30, CONTROL)
    assert bench.host.edges() == [True, False]


def test_overdue_interrupt_is_not_lost_by_a_snapshot(bench: Bench) -> None:
    program(bench, 0, 2, 1193)
    bench.clock.advance(5 * MS)
    bench.clock.time += 10 * MS
    twin = Bench(make, bench.clock.now())
    twin.device.restore(bench.saved())
    for each in (bench, twin):
        each.host.changes.clear()
        each.clock.advance(20 * MS)
    assert bench.host.changes == twin.host.changes
    assert bench.host.changes[1] == (15 * MS, 0, True)


# Port 0x61.


def test_port_61_keeps_four_bits_and_toggles_refresh(bench: Bench) -> None:
    bench.write(0xFF, 0, region=1)
    assert bench.read(0, region=1) & 0xCF == 0x0F
    bench.write(0x02, 0, region=1)
    seen = set()
    for _ in range(10):
        seen.add(bench.read(0, region=1) & 0x10)
        bench.clock.advance(15_086)
    assert seen == {0, 0x10}


def test_linux_calibration_loop(bench: Bench) -> None:
    """Mode 0 on counter 2, GATE on, wait for OUT: the time is that of the count."""
    bench.write(bench.read(0, region=1) & ~0x02 | 0x01, 0, region=1)
    program(bench, 2, 0, FREQUENCY // 20)
    start = bench.clock.now()
    while not bench.read(0, region=1) & OUT2:
        bench.clock.advance(1000)
    assert 50 * MS <= bench.clock.now() - start < 50 * MS + 3000


# A counter that is really ticked, for all modes.


class Ticked:
    """The 8254's counter as a circuit: one call of `clk` for each CLK, modes 0, 2, 3 and 4."""

    def __init__(self, mode: int) -> None:
        self.mode, self.ce, self.out = mode, 0, mode != 0
        self.cr, self.load, self.running, self.gate = 0, False, False, True
        self.odd_high = False
        self.strobed = False

    def write(self, count: int) -> None:
        self.cr = count
        self.load = self.mode in (0, 4) or not self.running

    def _reload(self) -> None:
        self.ce, self.load, self.running, self.strobed = self.cr, False, True, False

    def clk(self) -> None:
        if self.load:
            self._reload()
            self.out = self.mode != 0
            self.phase = 0
            return
        if not self.running or (not self.gate and self.mode in (0, 4)):
            return
        if self.mode in (0, 4):
            self.ce -= 1
            if self.mode == 0:
                self.out = self.out or self.ce == 0
            else:
                self.out = self.ce != 0 or self.strobed
                self.strobed = self.strobed or self.ce == 0
        elif self.mode == 2:
            self.ce -= 1
            if self.ce == 0:
                self.ce = self.cr
            self.out = self.ce != 1
        else:
            self.phase += 1
            half = (self.ce + 1) // 2 if self.out else self.ce // 2
            if self.phase == half:
                self.ce, self.phase, self.out = self.cr, 0, not self.out


@given(
    mode=st.sampled_from([0, 2, 3, 4]),
    steps=st.lists(
        st.tuples(st.integers(0, 40), st.one_of(st.none(), st.integers(2, 30), st.booleans())),
        max_size=12,
    ),
)
@example(mode=4, steps=[(0, 2), (3, 2), (0, False), (1, None)])
def test_same_as_a_ticked_counter(mode: int, steps: list[tuple[int, int | bool | None]]) -> None:
    channel = Channel(ChannelState(control=0x10 | mode << 1))
    model = Ticked(mode)
    now = 0
    for ticks, change in steps:
        for _ in range(ticks):
            before = channel.next_rise(now)
            was = channel.out(now)
            now += 1
            model.clk()
            channel.settle(now)
            assert channel.out(now) == model.out
            assert (before == now) == (not was and model.out)
        if change is None:
            continue
        if change is True or change is False:
            if mode in (0, 4):
                channel.set_gate(change, now)
                model.gate = change
        else:
            channel.write(change, now)
            model.write(change)


# State, hostile guests.

SCRIPTS = ops([4, 1])


@settings(max_examples=300, deadline=None)
@given(SCRIPTS)
def test_hostile_guest(script: list[Op]) -> None:
    check_hostile(make, script, most=501)


@settings(max_examples=200, deadline=None)
@given(SCRIPTS, st.integers(0, 60))
def test_snapshot_in_the_middle(script: list[Op], cut: int) -> None:
    check_twin(make, script, cut)


def test_spoiled_states_are_refused() -> None:
    check_spoiled(make)
    bad_state(make, "gate", port61=1)


@pytest.mark.parametrize("step", [300, 10_000, 40_000])
@pytest.mark.parametrize("count", [1, 15, 40])
def test_a_short_count_that_ends_while_it_is_written_interrupts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, count: int, step: int
) -> None:
    """On a host that stops us anywhere. Linux writes 15 or more, and may wait for that alone."""

    def now() -> int:
        bench.clock.time += step
        return bench.clock.time

    monkeypatch.setattr(bench.clock, "now", now)
    bench.write(0x10, CONTROL)  # mode 0, the low byte alone: each write is a whole count
    for number in range(1, 20):
        bench.write(count, 0)
        bench.clock.advance(MS)
        assert len(bench.host.rises()) == number
