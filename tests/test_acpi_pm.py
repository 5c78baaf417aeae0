"""ACPI fixed hardware: timer and its overflow, SCI, power button, power off."""

from __future__ import annotations

from fractions import Fraction

import pytest
from fake_clock import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st
from timer_rig import (
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

from devices.platform.acpi_pm import FREQUENCY, AcpiPm

EVENTS, CONTROL, TIMER = 0, 1, 2
STATUS, ENABLE = 0, 2
TMR, BUTTON = 1 << 0, 1 << 8


class Switch:
    """Counts power-offs."""

    offs = 0

    def off(self) -> None:
        self.offs += 1


def make(host: TimedHost, clock: FakeClock) -> AcpiPm:
    return AcpiPm(host, clock, lambda: None)


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def bench(switch: Switch) -> Bench:
    return Bench(lambda host, clock: AcpiPm(host, clock, switch.off))


def wide() -> Bench:
    return Bench(lambda host, clock: AcpiPm(host, clock, lambda: None, timer_bits=32))


@pytest.mark.parametrize("bits", [24, 32])
def test_timer_counts_exactly_and_wraps(bits: int) -> None:
    bench = wide() if bits == 32 else Bench(make)
    for seconds in (0, 1, 3, 4, 100, 1200, 365 * 86_400):
        bench.clock.time = seconds * SECOND
        assert bench.read(0, 4, TIMER) == seconds * FREQUENCY % (1 << bits)
    bench.write(0, 0, 4, TIMER)
    assert bench.read(0, 4, TIMER) == 365 * 86_400 * FREQUENCY % (1 << bits)
    assert bench.read(1, 2, TIMER) == bench.read(0, 4, TIMER) >> 8 & 0xFFFF


@pytest.mark.parametrize("bits", [24, 32])
def test_overflow_interrupt_when_the_top_bit_changes(bits: int) -> None:
    bench = wide() if bits == 32 else Bench(make)
    bench.write(TMR, ENABLE, 2)
    half = Fraction(1 << bits - 1, FREQUENCY) * SECOND
    for index in range(1, 20):
        due = bench.clock.pending()[0]
        assert 0 <= due - index * half < 1
        bench.clock.advance(due - bench.clock.now())
        assert bench.host.irq
        assert bench.read(STATUS, 2) == TMR
        bench.clock.advance(SECOND)
        bench.write(TMR, STATUS, 2)
        assert not bench.host.irq
        assert bench.read(STATUS, 2) == 0


def test_status_is_set_without_an_alarm(bench: Bench) -> None:
    bench.clock.advance(3 * SECOND)
    assert bench.clock.rang == 0
    assert bench.read(STATUS, 2) == TMR
    bench.write(TMR, ENABLE, 2)
    assert bench.host.irq
    bench.write(0, ENABLE, 2)
    assert not bench.host.irq


def test_power_button(bench: Bench) -> None:
    button = bench.device.press_power_button  # type: ignore[attr-defined]
    assert not button()
    assert not bench.host.irq
    bench.write(BUTTON, STATUS, 2)
    bench.write(BUTTON >> 8, ENABLE + 1, 1)
    assert button()
    assert bench.host.irq
    assert bench.read(0, 4) == BUTTON << 16 | BUTTON
    bench.write(0xFE00, STATUS, 2)
    assert bench.host.irq, "a 0 clears nothing"
    bench.write(BUTTON, STATUS, 2)
    assert not bench.host.irq


def test_reserved_bits_stay_clear(bench: Bench) -> None:
    bench.write(0xFFFF, ENABLE, 2)
    assert bench.read(ENABLE, 2) == 0x0721
    bench.write(0xDFFF & ~(7 << 10), 0, 2, CONTROL)
    assert bench.read(0, 2, CONTROL) == 0x0003


def test_sci_en_is_always_set(bench: Bench) -> None:
    assert bench.read(0, 2, CONTROL) == 1
    bench.write(0, 0, 2, CONTROL)
    assert bench.read(0, 2, CONTROL) == 1


@pytest.mark.parametrize("kind", range(8))
def test_sleep(bench: Bench, switch: Switch, kind: int) -> None:
    bench.write(kind << 10, 0, 2, CONTROL)
    assert switch.offs == 0
    bench.write(kind << 10 | 1 << 13, 0, 2, CONTROL)
    assert switch.offs == (kind == 5)
    assert bench.read(0, 2, CONTROL) == kind << 10 | 1


def test_power_off_by_byte_writes(bench: Bench, switch: Switch) -> None:
    bench.write(5 << 2, 1, 1, CONTROL)
    bench.write(0x20, 0, 1, CONTROL)
    assert switch.offs == 0
    bench.write(5 << 2 | 0x20, 1, 1, CONTROL)
    assert switch.offs == 1


def test_timer_has_24_or_32_bits() -> None:
    with pytest.raises(ValueError, match="24 or 32"):
        Bench(lambda host, clock: AcpiPm(host, clock, lambda: None, timer_bits=16))


SCRIPTS = ops([4, 2, 4])


@settings(max_examples=300, deadline=None)
@given(SCRIPTS)
def test_hostile_guest(script: list[Op]) -> None:
    check_hostile(make, script, most=1)


@settings(max_examples=200, deadline=None)
@given(SCRIPTS, st.integers(0, 60))
def test_snapshot_in_the_middle(script: list[Op], cut: int) -> None:
    check_twin(make, script, cut)


def test_spoiled_states_are_refused() -> None:
    check_spoiled(make)
    bad_state(make, "reserved", enable=0x8000)
    bad_state(make, "reserved", control=1 << 13)
