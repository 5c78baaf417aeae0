"""The local APIC: registers, priorities, end of interrupt, IPIs, LVT, timer, x2APIC; a model."""

from __future__ import annotations

from typing import Any

import pytest
from device_contract import spoiled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from irqchip_rig import (
    ALL,
    ENABLE,
    EXTINT,
    INIT,
    LEVEL,
    LOGICAL,
    MASKED,
    NMI,
    OTHERS,
    SELF,
    SPURIOUS,
    Lapic,
)

from devices.errors import DeviceError
from devices.irqchip.apic_registers import Lvt, Register
from devices.irqchip.lapic_timer import SHORTEST_PERIOD
from devices.irqchip.x2apic import MsrFault

R = Register
PERIODIC, DEADLINE = 1 << 17, 2 << 17
SEND_ILLEGAL, RECEIVE_ILLEGAL, ILLEGAL_REGISTER = 0x20, 0x40, 0x80
APIC_BASE, X2APIC_ON, XAPIC_ON, ALL_OFF = 0x1B, 0xFEE00D00, 0xFEE00900, 0xFEE00100


@pytest.fixture
def lapic() -> Lapic:
    return Lapic()


# Registers.


@pytest.mark.parametrize(
    ("register", "reset", "writable"),
    [
        (R.ID, 0, 0xFF000000),
        (R.VERSION, 0x50014, 0),
        (R.TPR, 0, 0xFF),
        (R.EOI, 0, 0),
        (R.RRD, 0, 0),
        (R.LDR, 0, 0xFF000000),
        (R.DFR, 0xFFFFFFFF, 0xF0000000),
        (R.ICR_HIGH, 0, 0xFF000000),
        (R.INITIAL_COUNT, 0, 0xFFFFFFFF),
        (R.DIVIDE, 0, 0xB),
        (R.LVT + Lvt.TIMER, MASKED, 0x700FF),
        (R.LVT + Lvt.THERMAL, MASKED, 0x107FF),
        (R.LVT + Lvt.PERFORMANCE, MASKED, 0x107FF),
        (R.LVT + Lvt.LINT0, MASKED, 0x1A7FF),
        (R.LVT + Lvt.LINT1, MASKED, 0x1A7FF),
        (R.LVT + Lvt.ERROR, MASKED, 0x100FF),
        (R.SVR, 0xFF, 0x3FF),
        *((first + word, 0, 0) for first in (R.ISR, R.TMR, R.IRR) for word in range(8)),
    ],
)
def test_register_table(register: int, reset: int, writable: int) -> None:
    fresh = Lapic(enable=False)
    assert fresh.get(register) == reset
    # Each in turn on a fresh one that is enabled, so that LVT masks can be cleared.
    for value in (0xFFFFFFFF, 0, 0x5A5A5A5A, 0xA5A5A5A5):
        lapic = Lapic(enable=register != R.SVR)
        lapic.put(register, value)
        assert lapic.get(register) == value & writable | reset & ~writable
        lapic.put(R.ESR, 0)
        assert lapic.get(R.ESR) == 0


@pytest.mark.parametrize("number", [0x00, 0x01, 0x04, 0x29, 0x2F, 0x3A, 0x3F, 0x40, 0xFF])
def test_reserved_registers_are_an_error(lapic: Lapic, number: int) -> None:
    assert lapic.get(number) == 0
    assert lapic.get(R.ESR) == 0, "shown before the write that latches"
    lapic.put(R.ESR, 0)
    assert lapic.get(R.ESR) == ILLEGAL_REGISTER
    lapic.put(R.ESR, 0)
    assert lapic.get(R.ESR) == 0
    lapic.put(number, 1)
    lapic.put(R.ESR, 0)
    assert lapic.get(R.ESR) == ILLEGAL_REGISTER


def test_accesses_of_other_widths(lapic: Lapic) -> None:
    window = lapic.apic.handlers()[0]
    lapic.put(R.LDR, 0xAB000000)
    base = R.LDR << 4
    assert window.read(base + 3, 1) == 0xAB
    assert window.read(base + 2, 2) == 0xAB00
    assert window.read(base, 8) == 0xAB000000
    assert window.read(base + 2, 4) == window.read(base + 4, 4) == window.read(base + 12, 4) == 0
    for offset, size in ((base, 1), (base, 8), (base + 3, 1), (base + 4, 4), (base + 2, 4)):
        window.write(offset, size, 0)
        assert lapic.get(R.LDR) == 0xAB000000


# Priorities.


@pytest.mark.parametrize(
    ("tpr", "serving", "ppr"),
    [
        (0x00, None, 0x00),
        (0x35, None, 0x35),
        (0x20, 0x31, 0x30),
        (0x35, 0x31, 0x35),
        (0x30, 0x31, 0x30),
        (0x35, 0x3F, 0x35),
        (0x45, 0x31, 0x45),
        (0x2F, 0xFE, 0xF0),
    ],
)
def test_processor_priority(lapic: Lapic, tpr: int, serving: int | None, ppr: int) -> None:
    if serving is not None:
        lapic.apic.accept(serving, False)
        lapic.take()
    lapic.put(R.TPR, tpr)
    assert lapic.get(R.PPR) == ppr


@pytest.mark.parametrize("vector", [0x10, 0x1F, 0x20, 0x3F, 0x80, 0xFE, 0xFF])
def test_tpr_holds_back_its_class_and_those_below(lapic: Lapic, vector: int) -> None:
    lapic.apic.accept(vector, False)
    lapic.put(R.TPR, vector & 0xF0)
    assert lapic.apic.request < 0
    lapic.put(R.TPR, (vector & 0xF0) - 1)
    assert lapic.take() == vector
    assert lapic.vectors(R.ISR) == {vector}
    assert lapic.vectors(R.IRR) == set()


def test_nesting_by_class(lapic: Lapic) -> None:
    lapic.apic.accept(0x45, False)
    assert lapic.take() == 0x45
    lapic.apic.accept(0x4F, False)
    lapic.apic.accept(0x31, False)
    assert lapic.apic.request < 0, "the same class does not interrupt itself"
    lapic.apic.accept(0x51, False)
    assert lapic.take() == 0x51
    assert lapic.vectors(R.ISR) == {0x45, 0x51}
    lapic.eoi()
    assert lapic.vectors(R.ISR) == {0x45}
    assert lapic.apic.request < 0
    lapic.eoi()
    assert lapic.take() == 0x4F
    lapic.eoi()
    assert lapic.take() == 0x31


def test_the_same_vector_waits_while_in_service(lapic: Lapic) -> None:
    for _ in range(3):
        lapic.apic.accept(0x40, False)
    assert lapic.take() == 0x40
    lapic.apic.accept(0x40, False)
    lapic.apic.accept(0x40, False)
    assert lapic.vectors(R.IRR) == lapic.vectors(R.ISR) == {0x40}
    lapic.eoi()
    assert lapic.take() == 0x40
    lapic.eoi()
    assert lapic.apic.request < 0


def test_eoi_without_service_is_harmless(lapic: Lapic) -> None:
    before = lapic.apic.snapshot()
    lapic.eoi()
    assert lapic.apic.snapshot() == before
    assert lapic.ended == []


def test_only_a_level_interrupt_is_broadcast_at_its_end(lapic: Lapic) -> None:
    lapic.apic.accept(0x40, True)
    lapic.apic.accept(0x60, False)
    assert lapic.vectors(R.TMR) == {0x40}
    assert [lapic.take() for _ in range(1)] == [0x60]
    lapic.eoi()
    assert lapic.ended == []
    lapic.take()
    lapic.eoi()
    assert lapic.ended == [0x40]
    lapic.apic.accept(0x40, False)
    assert lapic.vectors(R.TMR) == set()


@pytest.mark.parametrize(
    ("tpr", "serving", "asking", "apr"),
    [
        (0x25, None, None, 0x25),
        (0x25, None, 0x20, 0x25),
        (0x25, None, 0x31, 0x30),
        (0x25, 0x22, None, 0x20),
        (0x25, 0x41, 0x31, 0x40),
    ],
)
def test_arbitration_priority(
    lapic: Lapic, tpr: int, serving: int | None, asking: int | None, apr: int
) -> None:
    if serving is not None:
        lapic.apic.accept(serving, False)
        lapic.take()
    if asking is not None:
        lapic.apic.accept(asking, False)
    lapic.put(R.TPR, tpr)
    assert lapic.get(R.APR) == apr


def test_spurious_vector_is_not_in_service(lapic: Lapic) -> None:
    lapic.put(R.SVR, ENABLE | 0x6F)
    lapic.apic.accept(0x40, False)
    lapic.put(R.TPR, 0xF0)
    assert lapic.apic.acknowledge() == 0x6F
    assert lapic.vectors(R.ISR) == set()
    lapic.put(R.TPR, 0)
    assert lapic.take() == 0x40


# Software enable.


def test_disabled_refuses_fixed_and_keeps_what_it_has(lapic: Lapic) -> None:
    lapic.apic.accept(0x40, False)
    lapic.put(R.SVR, SPURIOUS)
    assert lapic.apic.request < 0
    assert not lapic.apic.message(0, False, 0, 0x50, False)
    assert lapic.vectors(R.IRR) == {0x40}
    lapic.enable()
    assert lapic.take() == 0x40


def test_disabling_masks_the_lvt_until_enabled(lapic: Lapic) -> None:
    for source in Lvt:
        lapic.put(R.LVT + source, 0x40)
    lapic.put(R.SVR, SPURIOUS)
    assert [lapic.get(R.LVT + source) for source in Lvt] == [MASKED | 0x40] * 6
    lapic.put(R.LVT + Lvt.TIMER, 0x41)
    assert lapic.get(R.LVT + Lvt.TIMER) == MASKED | 0x41
    lapic.enable()
    assert lapic.get(R.LVT + Lvt.TIMER) == MASKED | 0x41
    lapic.put(R.LVT + Lvt.TIMER, 0x41)
    assert lapic.get(R.LVT + Lvt.TIMER) == 0x41


def test_nmi_and_init_arrive_while_disabled() -> None:
    lapic = Lapic(enable=False)
    assert lapic.apic.message(0, False, NMI >> 8, 0, False)
    assert lapic.apic.take_nmi()
    assert not lapic.apic.take_nmi()
    assert lapic.apic.message(0, False, INIT >> 8, 0, False)
    assert lapic.inits == 1


@pytest.mark.parametrize("register", [R.ID, R.LDR, R.DFR, R.SVR])
def test_what_makes_it_reachable_asks_for_a_retry(lapic: Lapic, register: int) -> None:
    lapic.put(register, 0x11000100)
    assert lapic.retries == 1


# Destinations.


@pytest.mark.parametrize(
    ("names", "destination", "logical", "meant"),
    [
        ((0, 0xF), 0x05, False, True),
        ((0, 0xF), 0x04, False, False),
        ((0, 0xF), 0xFF, False, True),
        ((0, 0xF), 0x05, True, False),
        ((0x04, 0xF), 0x05, True, True),
        ((0x04, 0xF), 0x0B, True, False),
        ((0x00, 0xF), 0xFF, True, True),
        ((0x21, 0x0), 0x21, True, True),
        ((0x21, 0x0), 0x23, True, True),
        ((0x21, 0x0), 0x22, True, False),
        ((0x21, 0x0), 0x31, True, False),
        ((0x21, 0x0), 0xF1, True, True),
        ((0x21, 0x0), 0xF2, True, False),
        ((0x21, 0x0), 0xFF, True, True),
    ],
)
def test_destination(
    lapic: Lapic, names: tuple[int, int], destination: int, logical: bool, meant: bool
) -> None:
    ldr, dfr = names
    lapic.put(R.ID, 0x05000000)
    lapic.put(R.LDR, ldr << 24)
    lapic.put(R.DFR, dfr << 28)
    assert lapic.apic.message(destination, logical, 0, 0x40, False) is meant
    lapic.ipi(0x51 | (LOGICAL if logical else 0), destination)
    assert lapic.vectors(R.IRR) == ({0x40, 0x51} if meant else set())


# IPIs.


@pytest.mark.parametrize(
    ("command", "destination", "arrives"),
    [
        (SELF, 9, True),
        (ALL, 9, True),
        (OTHERS, 0, False),
        (0, 0, True),
        (0, 0xFF, True),
        (0, 9, False),
        (0x100, 0, True),
        (0x100 | OTHERS, 0, False),
        (LEVEL, 0, True),
    ],
)
def test_fixed_ipi(lapic: Lapic, command: int, destination: int, arrives: bool) -> None:
    lapic.ipi(command | 0x77, destination)
    assert lapic.vectors(R.IRR) == ({0x77} if arrives else set())
    assert lapic.vectors(R.TMR) == set()
    assert lapic.get(R.ICR) == command | 0x77


def test_icr_status_is_idle_and_reserved_bits_are_clear(lapic: Lapic) -> None:
    lapic.put(R.ICR, 0xFFFFFFFF)
    assert lapic.get(R.ICR) == 0xCCFFF


@pytest.mark.parametrize("command", [SELF, ALL, 0])
def test_nmi_ipi(lapic: Lapic, command: int) -> None:
    lapic.ipi(command | NMI)
    assert lapic.apic.take_nmi()
    assert lapic.vectors(R.IRR) == set()


@pytest.mark.parametrize("mode", [0x200, 0x300, 0x600, 0x700])
def test_smi_reserved_and_startup_do_nothing(lapic: Lapic, mode: int) -> None:
    lapic.ipi(ALL | mode | 0x40)
    assert lapic.vectors(R.IRR) == set()
    assert not lapic.apic.take_nmi()
    assert lapic.inits == 0


def test_init_resets_all_but_the_id(lapic: Lapic) -> None:
    lapic.put(R.ID, 0x03000000)
    lapic.put(R.TPR, 0x20)
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | PERIODIC)
    lapic.put(R.INITIAL_COUNT, 100_000)
    lapic.apic.accept(0x41, False)
    lapic.ipi(INIT | 1 << 14, 3)
    assert lapic.inits == 1
    assert lapic.get(R.ID) == 0x03000000
    assert lapic.get(R.SVR) == 0xFF
    assert lapic.get(R.TPR) == lapic.get(R.PPR) == lapic.get(R.CURRENT_COUNT) == 0
    assert lapic.get(R.LVT + Lvt.TIMER) == MASKED
    assert lapic.vectors(R.IRR) == set()
    assert lapic.clock.pending() == []


def test_init_deassert_is_ignored(lapic: Lapic) -> None:
    lapic.ipi(ALL | INIT | LEVEL)
    assert lapic.inits == 0
    assert lapic.get(R.SVR) == ENABLE | SPURIOUS


# Errors.


@pytest.mark.parametrize(
    ("command", "errors"),
    [(SELF | 0x0F, SEND_ILLEGAL | RECEIVE_ILLEGAL), (OTHERS, SEND_ILLEGAL), (SELF | NMI, 0)],
)
def test_illegal_vectors(lapic: Lapic, command: int, errors: int) -> None:
    lapic.ipi(command)
    lapic.put(R.ESR, 0)
    assert lapic.get(R.ESR) == errors
    assert lapic.vectors(R.IRR) == set()


def test_error_interrupts_once_until_the_esr_is_written(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.ERROR, 0x33)
    for _ in range(2):
        lapic.ipi(SELF | 1)
        assert lapic.take() == 0x33
        lapic.eoi()
        lapic.get(0x40)
        assert lapic.apic.request < 0
        lapic.put(R.ESR, 0)
        assert lapic.get(R.ESR) == SEND_ILLEGAL | RECEIVE_ILLEGAL | ILLEGAL_REGISTER
    lapic.put(R.LVT + Lvt.ERROR, 0x03)
    lapic.put(R.ESR, 0)
    lapic.get(0x40)
    lapic.put(R.ESR, 0)
    assert lapic.get(R.ESR) == ILLEGAL_REGISTER | RECEIVE_ILLEGAL


# LINT pins.


@pytest.mark.parametrize("pin", [0, 1])
def test_lint_edge(lapic: Lapic, pin: int) -> None:
    lapic.put(R.LVT + Lvt.LINT0 + pin, 0x44)
    for _ in range(2):
        lapic.apic.set_lint(pin, True)
        assert lapic.take() == 0x44
        lapic.eoi()
        lapic.apic.set_lint(pin, True)
        assert lapic.apic.request < 0
        lapic.apic.set_lint(pin, False)
    assert lapic.ended == []


def test_a_masked_lint_forgets_edges(lapic: Lapic) -> None:
    lapic.apic.set_lint(0, True)
    lapic.put(R.LVT + Lvt.LINT0, 0x44)
    assert lapic.apic.request < 0


def test_lint0_level(lapic: Lapic) -> None:
    lapic.apic.set_lint(0, True)
    lapic.put(R.LVT + Lvt.LINT0, LEVEL | 0x44)
    assert lapic.get(R.LVT + Lvt.LINT0) == LEVEL | 1 << 14 | 0x44
    for _ in range(3):
        assert lapic.take() == 0x44
        assert lapic.apic.request < 0
        lapic.eoi()
    lapic.take()
    lapic.put(R.LVT + Lvt.LINT0, LEVEL | 0x44)
    assert lapic.get(R.LVT + Lvt.LINT0) == LEVEL | 1 << 14 | 0x44, "a write leaves it waiting"
    lapic.apic.set_lint(0, False)
    lapic.eoi()
    assert lapic.apic.request < 0
    assert lapic.get(R.LVT + Lvt.LINT0) == LEVEL | 0x44


def test_lint1_nmi_and_extint_modes(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.LINT1, NMI)
    lapic.apic.set_lint(1, True)
    assert lapic.apic.take_nmi()
    lapic.apic.set_lint(0, True)
    assert not lapic.apic.extint
    lapic.put(R.LVT + Lvt.LINT0, EXTINT)
    assert lapic.apic.extint
    lapic.put(R.TPR, 0xFF)
    assert lapic.apic.extint
    lapic.apic.set_lint(0, False)
    assert not lapic.apic.extint


def test_software_disabled_lets_the_pins_through() -> None:
    lapic = Lapic(enable=False)
    lapic.apic.set_lint(0, True)
    lapic.apic.set_lint(1, True)
    assert lapic.apic.extint
    assert lapic.apic.take_nmi()
    lapic.enable()
    assert not lapic.apic.extint, "enabled, with LINT0 masked"


def test_firmware_leaves_virtual_wire() -> None:
    lapic = Lapic(enable=False)
    lapic.apic.start_virtual_wire()
    assert lapic.get(R.SVR) == 0x10F
    assert lapic.get(R.LVT + Lvt.LINT0) == EXTINT
    assert lapic.get(R.LVT + Lvt.LINT1) == NMI


# Timer.


DIVISORS = {0b0000: 2, 0b0001: 4, 0b0010: 8, 0b0011: 16, 0b1000: 32, 0b1001: 64, 0b1010: 128}


@pytest.mark.parametrize(("code", "divisor"), [*DIVISORS.items(), (0b1011, 1)])
def test_one_shot(lapic: Lapic, code: int, divisor: int) -> None:
    lapic.put(R.DIVIDE, code)
    lapic.put(R.LVT + Lvt.TIMER, 0x40)
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.clock.advance(divisor)
    assert lapic.get(R.CURRENT_COUNT) == 999
    lapic.clock.advance(divisor * 998)
    assert lapic.get(R.CURRENT_COUNT) == 1
    lapic.clock.advance(divisor - 1)
    assert lapic.apic.request < 0
    lapic.clock.advance(1)
    assert lapic.get(R.CURRENT_COUNT) == 0
    assert lapic.take() == 0x40
    lapic.eoi()
    lapic.clock.advance(10**9)
    assert lapic.apic.request < 0
    assert lapic.get(R.INITIAL_COUNT) == 1000


def test_periodic(lapic: Lapic) -> None:
    lapic.put(R.DIVIDE, 0b0011)
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | PERIODIC)
    lapic.put(R.INITIAL_COUNT, 1000)
    for _ in range(5):
        lapic.clock.advance(16_000 - 16)
        assert lapic.apic.request < 0
        assert lapic.get(R.CURRENT_COUNT) == 1
        lapic.clock.advance(16)
        assert lapic.get(R.CURRENT_COUNT) == 1000
        assert lapic.take() == 0x40
        lapic.eoi()
    assert lapic.clock.pending() == [6 * 16_000]


def test_periods_that_nobody_saw_are_lost_and_the_phase_is_kept(lapic: Lapic) -> None:
    lapic.put(R.DIVIDE, 0b1011)
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | PERIODIC)
    lapic.put(R.INITIAL_COUNT, 100_000)
    # A host that came late: the alarm rings only now.
    lapic.clock.time = 345_000
    assert lapic.get(R.CURRENT_COUNT) == 55_000
    lapic.clock.advance(0)
    assert lapic.take() == 0x40
    lapic.eoi()
    assert lapic.apic.request < 0
    assert lapic.clock.pending() == [400_000]


def test_a_tiny_period_does_not_busy_the_host(lapic: Lapic) -> None:
    lapic.put(R.DIVIDE, 0b1011)
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | PERIODIC)
    lapic.put(R.INITIAL_COUNT, 3)
    rings = 0
    while lapic.clock.time < 1_000_000:
        lapic.clock.advance(lapic.clock.pending()[0] - lapic.clock.time)
        rings += 1
        assert 1 <= lapic.get(R.CURRENT_COUNT) <= 3
        assert lapic.clock.pending()[0] % 3 == 0
    assert rings <= 1_000_000 // SHORTEST_PERIOD + 1


def test_a_masked_timer_counts(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.TIMER, MASKED | PERIODIC)
    lapic.put(R.INITIAL_COUNT, 0xFFFFFFFF)
    lapic.clock.advance(2_000_000)
    assert lapic.get(R.CURRENT_COUNT) == 0xFFFFFFFF - 1_000_000
    lapic.put(R.INITIAL_COUNT, 10)
    lapic.clock.advance(100_000)
    assert lapic.apic.request < 0


def test_zero_stops_and_a_new_count_restarts(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.TIMER, 0x40)
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.clock.advance(500)
    lapic.put(R.INITIAL_COUNT, 1000)
    assert lapic.get(R.CURRENT_COUNT) == 1000
    assert lapic.clock.pending() == [2500]
    lapic.put(R.INITIAL_COUNT, 0)
    assert lapic.get(R.CURRENT_COUNT) == 0
    assert lapic.clock.pending() == []


def test_a_new_divisor_goes_on_from_the_count(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.TIMER, 0x40)
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.clock.advance(2 * 400)
    lapic.put(R.DIVIDE, 0b1010)
    assert lapic.get(R.CURRENT_COUNT) == 600
    lapic.clock.advance(128 * 600 - 1)
    assert lapic.apic.request < 0
    lapic.clock.advance(1)
    assert lapic.take() == 0x40


def test_current_count_is_read_only(lapic: Lapic) -> None:
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.put(R.CURRENT_COUNT, 5)
    assert lapic.get(R.CURRENT_COUNT) == 1000


def test_tsc_deadline(lapic: Lapic) -> None:
    lapic.apic.timer.write_deadline(5000)
    assert lapic.apic.timer.deadline() == 0, "not in this mode"
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | DEADLINE)
    lapic.put(R.INITIAL_COUNT, 100)
    assert lapic.get(R.INITIAL_COUNT) == lapic.get(R.CURRENT_COUNT) == 0
    lapic.apic.timer.write_deadline(5000)
    assert lapic.apic.timer.deadline() == 5000
    lapic.clock.advance(4999)
    assert lapic.apic.request < 0
    lapic.clock.advance(1)
    assert lapic.take() == 0x40
    lapic.eoi()
    assert lapic.apic.timer.deadline() == 0
    lapic.apic.timer.write_deadline(6000)
    lapic.apic.timer.write_deadline(0)
    assert lapic.clock.pending() == []
    lapic.apic.timer.write_deadline(1)
    lapic.clock.advance(0)
    assert lapic.take() == 0x40, "a deadline that is past is due at once"
    lapic.apic.timer.write_deadline((1 << 64) - 1)
    assert lapic.reborn().clock.pending() == lapic.clock.pending()


@pytest.mark.parametrize(("before", "after"), [(0, DEADLINE), (DEADLINE, 0), (DEADLINE, PERIODIC)])
def test_changing_to_or_from_deadline_stops(lapic: Lapic, before: int, after: int) -> None:
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | before)
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.apic.timer.write_deadline(1000)
    assert lapic.clock.pending() != []
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | after)
    assert lapic.clock.pending() == []
    assert lapic.get(R.INITIAL_COUNT) == 0


@pytest.mark.parametrize("mode", [0, PERIODIC, DEADLINE])
def test_restored_in_the_middle_of_a_count(lapic: Lapic, mode: int) -> None:
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | mode)
    lapic.put(R.INITIAL_COUNT, 50_000)
    lapic.apic.timer.write_deadline(100_000)
    lapic.clock.advance(33_333)
    twin = lapic.reborn()
    assert twin.clock.pending() == lapic.clock.pending() == [100_000]
    assert twin.get(R.CURRENT_COUNT) == lapic.get(R.CURRENT_COUNT)
    for each in (lapic, twin):
        each.clock.advance(66_667)
        assert each.take() == 0x40
        each.eoi()
        each.clock.advance(100_000)
    assert twin.apic.request == lapic.apic.request == (0x40 if mode == PERIODIC else -1)
    assert twin.apic.snapshot() == lapic.apic.snapshot()


def test_a_restore_forgets_the_alarms_of_before(lapic: Lapic) -> None:
    fresh = lapic.apic.snapshot()
    lapic.put(R.LVT + Lvt.TIMER, 0x40)
    lapic.put(R.INITIAL_COUNT, 1000)
    lapic.apic.restore(fresh)
    assert lapic.clock.pending() == []


# x2APIC.


@pytest.fixture
def x2(lapic: Lapic) -> Lapic:
    lapic.put(R.ID, 0x23000000)
    lapic.apic.write_msr(APIC_BASE, X2APIC_ON)
    return lapic


def test_x2apic_modes(lapic: Lapic) -> None:
    apic, window = lapic.apic, lapic.apic.handlers()[0]
    assert apic.read_msr(APIC_BASE) == XAPIC_ON
    with pytest.raises(MsrFault):
        apic.read_msr(0x802)
    apic.write_msr(APIC_BASE, X2APIC_ON)
    assert apic.read_msr(APIC_BASE) == X2APIC_ON
    assert window.read(R.VERSION << 4, 4) == 0xFFFFFFFF
    window.write(R.TPR << 4, 4, 0x50)
    assert apic.read_msr(0x808) == 0
    for wrong in (XAPIC_ON, 0xFEE00500, 0xFED00D00, X2APIC_ON | 1, X2APIC_ON & ~0x100):
        with pytest.raises(MsrFault):
            apic.write_msr(APIC_BASE, wrong)
    apic.write_msr(APIC_BASE, ALL_OFF)
    assert window.read(R.VERSION << 4, 4) == 0xFFFFFFFF
    assert not apic.message(0xFF, False, NMI >> 8, 0, False)
    with pytest.raises(MsrFault):
        apic.write_msr(APIC_BASE, X2APIC_ON)
    apic.write_msr(APIC_BASE, XAPIC_ON)
    assert lapic.get(R.SVR) == 0xFF
    assert lapic.get(R.ID) == 0


READABLE = {
    *(R.ID, R.VERSION, R.TPR, R.PPR, R.LDR, R.SVR, R.ESR, R.ICR),
    *range(R.ISR, R.ESR),
    *range(R.LVT, R.LVT + 6),
    *(R.INITIAL_COUNT, R.CURRENT_COUNT, R.DIVIDE),
}
TAKES_ZERO = {
    *(R.TPR, R.EOI, R.SVR, R.ESR, R.ICR, R.INITIAL_COUNT, R.DIVIDE, R.SELF_IPI),
    *range(R.LVT, R.LVT + 6),
}


@pytest.mark.parametrize("number", range(-1, 0x41))
def test_x2apic_msr_table(x2: Lapic, number: int) -> None:
    if number in READABLE:
        x2.apic.read_msr(0x800 + number)
    else:
        with pytest.raises(MsrFault):
            x2.apic.read_msr(0x800 + number)
    if number in TAKES_ZERO:
        x2.apic.write_msr(0x800 + number, 0)
        with pytest.raises(MsrFault):
            x2.apic.write_msr(0x800 + number, 1 << 63 if number != R.ICR else 1 << 20)
    else:
        with pytest.raises(MsrFault):
            x2.apic.write_msr(0x800 + number, 0)


def test_x2apic_values(x2: Lapic) -> None:
    apic = x2.apic
    assert apic.read_msr(0x802) == 0x23
    assert apic.read_msr(0x80D) == 0x2_0008
    apic.write_msr(0x808, 0x31)
    assert apic.read_msr(0x80A) == 0x31
    apic.write_msr(0x83F, 0x45)
    assert apic.read_msr(0x822) == 1 << 5
    apic.write_msr(0x830, 0x23 << 32 | 0x55)
    assert apic.read_msr(0x830) == 0x23 << 32 | 0x55
    assert x2.take() == 0x55
    apic.write_msr(0x80B, 0)
    assert x2.take() == 0x45


@pytest.mark.parametrize(
    ("destination", "logical", "meant"),
    [
        (0x23, False, True),
        (0x123, False, False),
        (0xFFFFFFFF, False, True),
        (0xFFFFFFFF, True, True),
        (0x2_000C, True, True),
        (0x2_0004, True, False),
        (0x1_0008, True, False),
    ],
)
def test_x2apic_destinations(x2: Lapic, destination: int, logical: bool, meant: bool) -> None:
    x2.apic.write_msr(0x830, destination << 32 | (LOGICAL if logical else 0) | 0x66)
    assert (x2.apic.request == 0x66) is meant


def test_tsc_deadline_msr(lapic: Lapic) -> None:
    lapic.put(R.LVT + Lvt.TIMER, 0x40 | DEADLINE)
    lapic.apic.write_msr(0x6E0, 777)
    assert lapic.apic.read_msr(0x6E0) == 777


# State.


def test_restored_goes_on_like_the_original(lapic: Lapic) -> None:
    for vector, level in ((0x31, False), (0x45, True), (0x81, True)):
        lapic.apic.accept(vector, level)
    lapic.take()
    lapic.put(R.TPR, 0x42)
    lapic.ipi(SELF | NMI)
    lapic.get(0)
    twin = lapic.reborn()
    assert twin.apic.snapshot() == lapic.apic.snapshot()
    for each in (lapic, twin):
        assert each.apic.take_nmi()
        each.eoi()
        assert each.apic.request < 0
        each.put(R.TPR, 0)
        assert each.take() == 0x45
        each.eoi()
        assert each.ended == [0x81, 0x45]
    assert twin.apic.snapshot() == lapic.apic.snapshot()


def test_spoiled_states_are_refused(lapic: Lapic) -> None:
    lapic.apic.accept(0x45, True)
    lapic.put(R.INITIAL_COUNT, 1000)
    before = lapic.apic.snapshot()
    for what, wrong in spoiled(before):
        with pytest.raises(DeviceError):
            lapic.apic.restore(wrong)
        assert lapic.apic.snapshot() == before, what


@pytest.mark.parametrize(
    "change",
    [
        {"irr": [1, *[0] * 7]},
        {"isr": [0] * 7},
        {"svr": 0xFF, "lvt": [0x40, *[MASKED] * 5]},
        {"lvt": [MASKED | 0x100, *[MASKED] * 5]},
        {"lvt": [MASKED, MASKED, MASKED, MASKED, MASKED | LEVEL | 1 << 14, MASKED]},
        {"lvt": [MASKED, MASKED, MASKED, MASKED | 1 << 14, MASKED, MASKED]},
        {"icr": 1 << 12},
        {"mode": 1},
        {"timer": {"divide": 4, "initial": 0, "due": 0}},
        {"timer": {"divide": 0, "initial": 0, "due": 5}},
        {"lvt": [MASKED | DEADLINE, *[MASKED] * 5], "timer": {"divide": 0, "initial": 1, "due": 0}},
    ],
    ids=str,
)
def test_impossible_states_are_refused(lapic: Lapic, change: dict[str, Any]) -> None:
    before = lapic.apic.snapshot()
    with pytest.raises(DeviceError):
        lapic.apic.restore({**before, **change})
    assert lapic.apic.snapshot() == before


# Against a model.


VECTORS = st.sampled_from([0x10, 0x1F, 0x20, 0x2F, 0x30, 0x31, 0x7F, 0x80, 0xEC, 0xEF, 0xFE, 0xFF])


class LapicMachine(RuleBasedStateMachine):
    """Requests, services and priorities as sets."""

    @initialize()
    def start(self) -> None:
        self.lapic = Lapic()
        self.asked: set[int] = set()
        self.serving: list[int] = []
        self.level: set[int] = set()
        self.ended: list[int] = []
        self.tpr = 0
        self.enabled = True

    def barrier(self) -> int:
        return max([self.tpr // 16, *(vector // 16 for vector in self.serving)])

    def best(self) -> int:
        able = [vector for vector in self.asked if vector // 16 > self.barrier()]
        return max(able, default=-1) if self.enabled else -1

    @rule(vector=VECTORS, level=st.booleans())
    def arrive(self, vector: int, level: bool) -> None:
        assert self.lapic.apic.message(0, False, 0, vector, level) is self.enabled
        if self.enabled:
            self.asked.add(vector)
            (self.level.add if level else self.level.discard)(vector)

    @rule(vector=VECTORS, shorthand=st.sampled_from([SELF, ALL, OTHERS]))
    def ipi(self, vector: int, shorthand: int) -> None:
        self.lapic.ipi(shorthand | vector)
        if self.enabled and shorthand != OTHERS:
            self.asked.add(vector)
            self.level.discard(vector)

    @rule()
    def acknowledge(self) -> None:
        best = self.best()
        assert self.lapic.apic.acknowledge() == (best if best >= 0 else SPURIOUS)
        if best >= 0:
            self.asked.discard(best)
            self.serving.append(best)

    @precondition(lambda self: self.serving)
    @rule()
    def end(self) -> None:
        vector = max(self.serving)
        self.serving.remove(vector)
        if vector in self.level:
            self.ended.append(vector)
        self.lapic.eoi()

    @rule(tpr=st.integers(0, 255))
    def set_tpr(self, tpr: int) -> None:
        self.lapic.put(R.TPR, tpr)
        self.tpr = tpr

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.lapic.put(R.SVR, SPURIOUS | (ENABLE if enabled else 0))
        self.enabled = enabled

    @rule()
    def snapshot_and_restore(self) -> None:
        saved, ended = self.lapic.apic.snapshot(), self.lapic.ended
        self.lapic = self.lapic.reborn()
        self.lapic.ended.extend(ended)
        assert self.lapic.apic.snapshot() == saved

    @invariant()
    def agrees(self) -> None:
        lapic = self.lapic
        assert lapic.apic.request == self.best()
        assert lapic.vectors(R.IRR) == self.asked
        assert lapic.vectors(R.ISR) == set(self.serving)
        assert lapic.vectors(R.TMR) == self.level
        assert lapic.ended == self.ended
        serving = max(self.serving, default=0)
        above = serving // 16 > self.tpr // 16
        assert lapic.get(R.PPR) == (serving & 0xF0 if above else self.tpr)


LapicMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLapicAgainstModel = LapicMachine.TestCase
