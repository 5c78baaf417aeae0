"""The MC146818: calendar, formats, SET and divider reset, UIP, three interrupts, CMOS."""

from __future__ import annotations

import datetime

import pytest
from fake_clock import FakeClock
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

from devices.platform.rtc import CENTURY, UPDATE_NS, A, B, C, D, Rtc
from devices.platform.rtc_calendar import DAY, Format, date_from_days, days_from_date

START = int(datetime.datetime(2024, 2, 28, 23, 59, 50, tzinfo=datetime.UTC).timestamp())
HOURS24, BINARY, UIE, AIE, PIE, SET = 0x02, 0x04, 0x10, 0x20, 0x40, 0x80
UF, AF, PF, IRQF = 0x10, 0x20, 0x40, 0x80
TIME = [0, 2, 4, 6, 7, 8, 9, CENTURY]


def make(host: TimedHost, clock: FakeClock) -> Rtc:
    return Rtc(host, clock, epoch=START, low_memory=128 << 20, high_memory=1 << 30)


@pytest.fixture
def bench() -> Bench:
    return Bench(make)


def get(bench: Bench, index: int) -> int:
    bench.write(index, 0)
    return bench.read(1)


def put(bench: Bench, index: int, value: int) -> None:
    bench.write(index, 0)
    bench.write(value, 1)


def time(bench: Bench) -> list[int]:
    return [get(bench, index) for index in TIME]


# Calendar and formats.


@given(st.dates(datetime.date(1, 1, 1)))
def test_calendar_is_that_of_the_standard_library(date: datetime.date) -> None:
    days = date.toordinal() - datetime.date(1970, 1, 1).toordinal()
    assert days_from_date(date.year, date.month, date.day) == days
    assert date_from_days(days) == (date.year, date.month, date.day)


@given(
    st.integers(-62_000_000_000, 250_000_000_000), st.integers(0, 6), st.booleans(), st.booleans()
)
def test_registers_say_what_they_were_made_of(
    seconds: int, weekday: int, binary: bool, hours24: bool
) -> None:
    form = Format(binary, hours24)
    registers = form.encode(seconds, weekday)
    assert all(0 <= byte <= 0xFF for byte in registers)
    assert form.decode(registers) == (seconds, weekday)


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.booleans(), st.booleans())
def test_any_bytes_are_some_time(registers: list[int], binary: bool, hours24: bool) -> None:
    form = Format(binary, hours24)
    again = form.encode(*form.decode(registers))
    assert form.decode(again) == form.decode(registers)


@pytest.mark.parametrize(
    ("hour", "mode", "byte"),
    [
        (0, 0, 0x12),
        (1, 0, 0x01),
        (12, 0, 0x92),
        (23, 0, 0x91),
        (0, BINARY, 12),
        (13, BINARY, 0x81),
        (23, HOURS24, 0x23),
        (23, HOURS24 | BINARY, 23),
    ],
)
def test_hours(bench: Bench, hour: int, mode: int, byte: int) -> None:
    put(bench, B, mode)
    bench.clock.advance((10 + hour * 3600) * SECOND)
    assert get(bench, 4) == byte


def test_leap_day_follows(bench: Bench) -> None:
    assert time(bench) == [0x50, 0x59, 0x23, 4, 0x28, 0x02, 0x24, 0x20]
    bench.clock.advance(10 * SECOND)
    assert time(bench) == [0x00, 0x00, 0x00, 5, 0x29, 0x02, 0x24, 0x20]
    bench.clock.advance(DAY * SECOND)
    assert time(bench) == [0x00, 0x00, 0x00, 6, 0x01, 0x03, 0x24, 0x20]


# Setting the time.


def set_time(bench: Bench, values: list[int]) -> None:
    """As Linux does it: SET, divider reset, registers, both back."""
    put(bench, B, SET | HOURS24)
    put(bench, A, 0x76)
    for index, value in zip(TIME, values, strict=True):
        put(bench, index, value)
    put(bench, B, HOURS24)
    put(bench, A, 0x26)


def test_first_update_comes_half_a_second_after_the_divider_reset(bench: Bench) -> None:
    bench.clock.advance(777 * MS)
    values = [0x58, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19]
    set_time(bench, values)
    bench.clock.advance(500 * MS - 1)
    assert time(bench) == values
    bench.clock.advance(1)
    assert time(bench)[0] == 0x59
    bench.clock.advance(SECOND)
    assert time(bench) == [0, 0, 0, 7, 1, 1, 0, 0x20]


def test_set_holds_the_registers_but_not_the_divider(bench: Bench) -> None:
    bench.clock.advance(300 * MS)
    put(bench, B, SET | HOURS24)
    assert not get(bench, A) & 0x80
    bench.clock.advance(100 * SECOND)
    put(bench, 0, 0x77)
    assert get(bench, 0) == 0x77, "just a byte"
    put(bench, 0, 0x11)
    put(bench, B, HOURS24)
    assert get(bench, 0) == 0x11
    bench.clock.advance(700 * MS - 1)
    assert get(bench, 0) == 0x11
    bench.clock.advance(1)
    assert get(bench, 0) == 0x12


def test_byte_written_to_the_running_clock(bench: Bench) -> None:
    bench.clock.advance(1300 * MS)
    put(bench, 4, 0x07)
    put(bench, 6, 0x01)
    assert time(bench)[:5] == [0x51, 0x59, 0x07, 0x01, 0x28]
    bench.clock.advance(700 * MS)
    assert time(bench)[0] == 0x52


def test_divider_reset_stops_the_time(bench: Bench) -> None:
    put(bench, A, 0x76)
    bench.clock.advance(1000 * SECOND)
    assert time(bench)[0] == 0x50
    assert not get(bench, C)


def test_uip_warns_before_each_update(bench: Bench) -> None:
    bench.clock.advance(SECOND - UPDATE_NS - 1)
    assert get(bench, A) == 0x26
    bench.clock.advance(1)
    assert get(bench, A) == 0xA6
    bench.clock.advance(UPDATE_NS - 1)
    assert get(bench, A) == 0xA6
    assert get(bench, 0) == 0x50
    bench.clock.advance(1)
    assert get(bench, A) == 0x26
    assert get(bench, 0) == 0x51


# Interrupts.


def test_update_interrupt(bench: Bench) -> None:
    bench.clock.advance(400 * MS)
    put(bench, B, HOURS24 | UIE)
    get(bench, C)
    bench.clock.advance(5 * SECOND)
    assert bench.host.rises() == [SECOND], "until it is served there is no other"
    assert get(bench, C) == IRQF | UF | PF
    assert not bench.host.irq
    assert get(bench, C) == 0
    bench.clock.advance(SECOND)
    assert bench.host.rises() == [SECOND, 6 * SECOND]


def test_set_clears_uie(bench: Bench) -> None:
    put(bench, B, HOURS24 | UIE | SET | PIE)
    assert get(bench, B) == HOURS24 | SET | PIE


@pytest.mark.parametrize("rate", range(16))
def test_periodic_interrupt(bench: Bench, rate: int) -> None:
    put(bench, A, 0x20 | rate)
    put(bench, B, HOURS24 | PIE)
    served = 0
    for _ in range(4000):
        due = bench.clock.pending()
        if not due or due[0] > SECOND:
            break
        bench.clock.advance(due[0] - bench.clock.now())
        assert bench.host.irq
        served += bool(get(bench, C) & PF)
    hertz = {0: 0, 1: 256, 2: 128}.get(rate, 32_768 >> max(rate - 1, 0))
    assert served == min(hertz, 4000)


def test_interrupt_that_nobody_serves_costs_nothing(bench: Bench) -> None:
    put(bench, A, 0x23)  # 8192 Hz
    put(bench, B, HOURS24 | PIE | UIE | AIE)
    bench.clock.advance(100 * SECOND)
    assert bench.clock.rang == 1


def test_periodic_interrupt_never_drifts(bench: Bench) -> None:
    put(bench, A, 0x26)  # 1024 Hz
    put(bench, B, HOURS24 | PIE)
    bench.clock.time = 40 * 365 * DAY * SECOND
    bench.clock.advance(0)
    for index in range(1, 100):
        get(bench, C)
        bench.clock.advance(bench.clock.pending()[0] - bench.clock.now())
        exact = index * SECOND // 1024
        assert 0 <= bench.clock.now() % SECOND - exact <= 1


ALARMS = [
    # Alarm bytes (seconds, minutes, hours) and seconds until it rings, from 23:59:50 on.
    ((0x55, 0x59, 0x23), 5),
    ((0x00, 0x00, 0x00), 10),
    ((0x50, 0x59, 0x23), DAY),
    ((0xC0, 0xC0, 0xC0), 1),
    ((0x30, 0xFF, 0xFF), 40),
    ((0x00, 0x30, 0xC0), 1810),
    ((0xFF, 0xFF, 0x01), 3610),
    ((0x49, 0x59, 0x23), DAY - 1),
]


@pytest.mark.parametrize(("alarm", "wait"), ALARMS)
def test_alarm(bench: Bench, alarm: tuple[int, int, int], wait: int) -> None:
    for index, value in zip((1, 3, 5), alarm, strict=True):
        put(bench, index, value)
        assert get(bench, index) == value
    put(bench, B, HOURS24 | AIE)
    bench.clock.advance(2 * DAY * SECOND)
    assert bench.host.rises() == [wait * SECOND]
    assert get(bench, C) == IRQF | AF | UF | PF


@pytest.mark.parametrize("alarm", [(0x60, 0, 0), (0x0A, 0, 0), (0, 0x99, 0), (0, 0, 0x24)])
def test_alarm_that_is_no_time_never_rings(bench: Bench, alarm: tuple[int, int, int]) -> None:
    for index, value in zip((1, 3, 5), alarm, strict=True):
        put(bench, index, value)
    put(bench, B, HOURS24 | AIE)
    bench.clock.advance(3 * DAY * SECOND)
    assert bench.host.rises() == []


@given(
    st.integers(0, DAY - 1),
    st.lists(st.one_of(st.integers(0, 255), st.just(0xFF)), min_size=3, max_size=3),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_alarm_search_is_that_of_a_second_hand(now: int, alarm: list[int], hours24: bool) -> None:
    form = Format(False, hours24)
    found = form.alarm_after(now, alarm)
    span = range(1, DAY + 1) if found is None else range(1, found + 1)
    matches = []
    for wait in span:
        registers = form.encode((now + wait) % DAY, 0)[:3]
        if all(want >= 0xC0 or want == is_ for want, is_ in zip(alarm, registers, strict=True)):
            matches.append(wait)
    assert matches == ([] if found is None else [found])


def test_flags_are_set_without_their_interrupts(bench: Bench) -> None:
    bench.clock.advance(SECOND)
    assert bench.clock.rang == 0
    assert get(bench, C) == UF | PF
    assert bench.host.rises() == []


def test_enabling_an_interrupt_whose_flag_is_set_raises_the_line(bench: Bench) -> None:
    bench.clock.advance(SECOND)
    put(bench, B, HOURS24 | UIE)
    assert bench.host.irq
    put(bench, B, HOURS24)
    assert not bench.host.irq


# CMOS.


def test_cmos_says_how_much_memory_there_is(bench: Bench) -> None:
    def word(index: int) -> int:
        return get(bench, index) | get(bench, index + 1) << 8

    assert word(0x15) == 640
    assert word(0x17) == word(0x30) == 0xFFFF
    assert word(0x34) == (128 - 16) << 4
    assert word(0x5B) | get(bench, 0x5D) << 16 == 1 << 14
    total = sum(get(bench, index) for index in range(0x10, 0x2E))
    assert get(bench, 0x2E) << 8 | get(bench, 0x2F) == total


def test_small_machine_and_overruled_bytes() -> None:
    bench = Bench(lambda host, clock: Rtc(host, clock, low_memory=2 << 20, ram={0x3D: 0x02}))
    assert get(bench, 0x30) | get(bench, 0x31) << 8 == 1024
    assert get(bench, 0x34) == get(bench, 0x35) == get(bench, 0x5B) == 0
    assert get(bench, 0x3D) == 2


def test_every_other_byte_is_ram(bench: Bench) -> None:
    plain = [index for index in range(0x0E, 0x80) if index != CENTURY]
    for index in plain:
        put(bench, index, index ^ 0x5A)
    assert [get(bench, index) for index in plain] == [index ^ 0x5A for index in plain]


def test_register_d_and_c_cannot_be_written(bench: Bench) -> None:
    put(bench, D, 0)
    put(bench, C, 0xFF)
    assert get(bench, D) == 0x80
    assert get(bench, C) == 0


def test_bit_7_of_the_index_masks_nmi(bench: Bench) -> None:
    bench.write(0x8D, 0)
    assert bench.read(1) == 0x80
    assert bench.device.nmi_masked  # type: ignore[attr-defined]
    assert bench.read(0) == 0xFF
    bench.write(0x0D, 0)
    assert not bench.device.nmi_masked  # type: ignore[attr-defined]


# State, hostile guests.


@st.composite
def scripts(draw: st.DrawFn) -> list[Op]:
    """Indexes are chosen with the registers in mind, data at random."""
    script = draw(ops([2]))
    index = st.sampled_from([*range(0x0E), CENTURY, 0x8B, 0x7F])
    return [
        op if op.offset or op.size > 1 or op.value is None else Op(0, 0, 1, draw(index), op.wait)
        for op in script
    ]


@settings(max_examples=150, deadline=None)
@given(scripts())
def test_hostile_guest(script: list[Op]) -> None:
    check_hostile(make, script, most=3)


@settings(max_examples=100, deadline=None)
@given(scripts(), st.integers(0, 60))
def test_snapshot_in_the_middle(script: list[Op], cut: int) -> None:
    check_twin(make, script, cut)


def test_overdue_interrupt_is_not_lost_by_a_snapshot(bench: Bench) -> None:
    put(bench, B, HOURS24 | UIE)
    bench.clock.time = 3 * SECOND
    twin = Bench(make, bench.clock.now())
    twin.device.restore(bench.saved())
    twin.clock.advance(0)
    assert twin.host.irq


def test_spoiled_states_are_refused() -> None:
    check_spoiled(make)
    bad_state(make, "SET", b=0x82)
    bad_state(make, "future", origin=1)
