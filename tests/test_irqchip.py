"""The controllers of a PC together: which way an interrupt takes to the CPU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from device_contract import Subject, script, spoiled
from fakes import FakeHost
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from irqchip_rig import (
    ENABLE,
    EXTINT,
    LEVEL,
    LOGICAL,
    MASKED,
    NMI,
    SELF,
    SPURIOUS,
    Board,
    SoloIoApic,
    SoloLapic,
)

from devices.contract import Device
from devices.errors import DeviceError
from devices.irqchip.apic_registers import Lvt, Register

R = Register
AUTO_EOI = 0x03


@pytest.fixture
def board() -> Board:
    """The way of a kernel with an IOAPIC: 8259 masked, local APIC enabled."""
    made = Board().init_pic()
    made.mask_pic()
    made.enable()
    return made


# The 8259's way.


def test_a_guest_that_knows_only_the_8259() -> None:
    board = Board().init_pic()
    assert not board.chip.pending()
    board.chip.set_irq(0, True)
    assert board.kicks == 1
    assert board.take() == 0x20
    assert not board.chip.pending()
    board.chip.set_irq(9, True)
    assert not board.chip.pending(), "IRQ 0 is in service"
    board.pic_eoi()
    assert board.take() == 0x29
    assert board.kicks == 2


def test_enabled_with_lint0_masked_closes_that_way() -> None:
    board = Board().init_pic()
    board.chip.set_irq(1, True)
    assert board.chip.pending()
    board.enable()
    assert not board.chip.pending()
    assert board.chip.acknowledge() == SPURIOUS
    board.put(R.LVT + Lvt.LINT0, EXTINT)
    assert board.kicks == 2
    assert board.take() == 0x21


def test_spurious_of_the_8259_while_it_is_in_charge() -> None:
    board = Board().init_pic()
    assert board.chip.acknowledge() == 0x27


def test_virtual_wire_by_lint0_ignores_the_tpr() -> None:
    board = Board().init_pic()
    board.apic.start_virtual_wire()
    board.put(R.TPR, 0xFF)
    board.chip.set_irq(4, True)
    assert board.take() == 0x24
    assert board.vectors(R.ISR) == set()


def test_virtual_wire_by_the_ioapic() -> None:
    board = Board().init_pic()
    board.enable()
    board.redirect(0, EXTINT)
    board.chip.set_irq(4, True)
    assert board.take() == 0x24
    board.pic_eoi()
    board.redirect(0, MASKED | EXTINT)
    board.chip.set_irq(4, False)
    board.chip.set_irq(4, True)
    assert not board.chip.pending()


def test_the_8259_as_a_fixed_interrupt_of_lint0() -> None:
    """The last resort of a kernel's timer check: LINT0 fixed, the 8259 in automatic EOI mode."""
    board = Board().init_pic(icw4=AUTO_EOI)
    board.enable()
    board.put(R.LVT + Lvt.LINT0, 0x30)
    for _ in range(3):
        board.chip.set_irq(0, True)
        assert board.take() == 0x30
        board.eoi()
        board.chip.set_irq(0, False)
        assert not board.chip.pending()


def test_extint_goes_before_fixed() -> None:
    board = Board().init_pic()
    board.apic.start_virtual_wire()
    board.ipi(SELF | 0xFE)
    board.chip.set_irq(4, True)
    assert [board.take(), board.take()] == [0x24, 0xFE]


def test_masking_at_the_8259_takes_the_request_back() -> None:
    board = Board().init_pic()
    board.chip.set_irq(4, True)
    board.ports[0].write(1, 1, 0xFF)
    assert not board.chip.pending()
    board.ports[0].write(1, 1, 0)
    assert board.take() == 0x24


# The IOAPIC's way.


@pytest.mark.parametrize(
    ("gsi", "pin"), [(0, 2), (1, 1), *((n, n) for n in (3, 8, 15)), (16, 16), (23, 23)]
)
def test_lines_and_pins(board: Board, gsi: int, pin: int) -> None:
    board.redirect(pin, 0x40 + pin)
    board.chip.set_irq(gsi, True)
    assert board.take() == 0x40 + pin
    board.eoi()
    assert not board.chip.pending()


@pytest.mark.parametrize("gsi", [-1, 2, 24])
def test_there_is_no_such_line(board: Board, gsi: int) -> None:
    before = [device.snapshot() for device in board.chip.devices()]
    with pytest.raises(ValueError, match=str(gsi)):
        board.chip.set_irq(gsi, True)
    assert [device.snapshot() for device in board.chip.devices()] == before


def test_one_line_goes_both_ways(board: Board) -> None:
    board.put(R.LVT + Lvt.LINT0, EXTINT)
    board.init_pic()
    board.redirect(4, 0x44)
    board.chip.set_irq(4, True)
    assert {board.take(), board.take()} == {0x24, 0x44}


def test_level_comes_again_after_the_cpus_eoi(board: Board) -> None:
    board.redirect(10, LEVEL | 0x5A)
    board.chip.set_irq(10, True)
    for _ in range(3):
        assert board.take() == 0x5A
        assert not board.chip.pending()
        board.eoi()
    board.take()
    board.chip.set_irq(10, False)
    board.eoi()
    assert not board.chip.pending()
    assert board.redirection(10) == LEVEL | 0x5A


def test_edge_during_service_comes_after_eoi(board: Board) -> None:
    board.redirect(4, 0x44)
    board.chip.set_irq(4, True)
    assert board.take() == 0x44
    board.chip.set_irq(4, False)
    board.chip.set_irq(4, True)
    assert not board.chip.pending()
    board.eoi()
    assert board.take() == 0x44


def test_a_level_waits_for_the_local_apic() -> None:
    board = Board()
    board.redirect(10, LEVEL | 0x5A)
    board.chip.set_irq(10, True)
    assert not board.chip.pending()
    board.enable()
    assert board.take() == 0x5A


def test_a_level_waits_for_its_destination(board: Board) -> None:
    board.redirect(10, LEVEL | LOGICAL | 0x5A, destination=0x01)
    board.chip.set_irq(10, True)
    assert not board.chip.pending()
    board.put(R.LDR, 0x01000000)
    assert board.take() == 0x5A


def test_nmi_by_the_ioapic(board: Board) -> None:
    board.redirect(2, NMI)
    for _ in range(2):
        board.chip.set_irq(0, True)
        board.chip.set_irq(0, False)
        assert board.chip.nmi_pending()
        assert not board.chip.pending()
        assert board.chip.take_nmi()
        assert not board.chip.nmi_pending()
        assert not board.chip.take_nmi()
    assert board.kicks == 2


def test_nmi_line() -> None:
    board = Board()
    board.chip.set_nmi(True)
    assert board.chip.take_nmi(), "hardware default"
    board.chip.set_nmi(False)
    board.enable()
    board.chip.set_nmi(True)
    assert not board.chip.take_nmi(), "LINT1 is masked"
    board.chip.set_nmi(False)
    board.put(R.LVT + Lvt.LINT1, NMI)
    board.chip.set_nmi(True)
    assert board.chip.take_nmi()


def test_init_is_told(board: Board) -> None:
    board.ipi(SELF | 0x500)
    assert board.inits == 1


# Messages of devices.


@pytest.mark.parametrize(
    ("address", "data", "vectors"),
    [
        (0xFEE00000, 0x0061, {0x61}),
        (0xFEEFF000, 0x0061, {0x61}),
        (0xFEE01000, 0x0061, set()),
        (0xFEE02004, 0x0061, {0x61}),
        (0xFEE02008, 0x0061, set()),
        (0xFEE0200C, 0x0161, {0x61}),
        (0xFEE0100C, 0x0161, set()),
        (0xFEE00000, 0xC061, {0x61}),
        (0xFEE00000, 0x8061, set()),
        (0xFEE00000, 0x4061, {0x61}),
        (0xFEE00000, 0x0261, set()),
        (0xFEE00000, 0x0761, set()),
        (0xFEE00000, 0x000F, set()),
        (0xFED00000, 0x0061, set()),
        (0x1_FEE00000, 0x0061, set()),
        (0, 0x0061, set()),
    ],
)
def test_msi(board: Board, address: int, data: int, vectors: set[int]) -> None:
    board.put(R.LDR, 0x02000000)
    assert board.chip.msi(address, data) is bool(vectors)
    assert board.vectors(R.IRR) == vectors
    assert board.vectors(R.TMR) == (vectors if data & 0x8000 else set())
    assert board.kicks == len(vectors)


def test_nmi_by_msi(board: Board) -> None:
    assert board.chip.msi(0xFEE00000, 0x0400)
    assert board.chip.take_nmi()


# Kicks.


def test_it_tells_once_that_something_is_pending(board: Board) -> None:
    board.ipi(SELF | 0x40)
    board.ipi(SELF | 0x50)
    assert board.kicks == 1
    board.take()
    assert board.kicks == 1
    board.eoi()
    assert board.kicks == 2, "0x40 waited behind 0x50"
    assert board.take() == 0x40
    board.ipi(SELF | 0x60)
    assert board.kicks == 3


def test_the_timer_kicks(board: Board) -> None:
    board.put(R.LVT + Lvt.TIMER, 0xEC)
    board.put(R.INITIAL_COUNT, 1000)
    board.clock.advance(2000)
    assert board.kicks == 1
    assert board.take() == 0xEC


def test_lowering_the_tpr_kicks(board: Board) -> None:
    board.put(R.TPR, 0xF0)
    board.ipi(SELF | 0x40)
    assert board.kicks == 0
    board.put(R.TPR, 0)
    assert board.kicks == 1


# State.


def test_restored_goes_on_like_the_original(board: Board) -> None:
    board.init_pic()
    board.put(R.LVT + Lvt.LINT0, EXTINT)
    board.redirect(10, LEVEL | 0x5A)
    board.redirect(4, 0x44)
    for gsi in (10, 4, 1):
        board.chip.set_irq(gsi, True)
    board.take()
    board.ipi(SELF | NMI)
    twin = board.reborn()
    assert twin.kicks > 0
    stories = []
    for each in (board, twin):
        assert each.chip.take_nmi()
        story = []
        for _ in range(6):
            story.append(each.chip.acknowledge() if each.chip.pending() else None)
            each.eoi()
            each.pic_eoi()
        stories.append(story)
    assert stories[0] == stories[1]
    assert 0x5A in stories[0]


def test_a_restore_over_another_story_leaves_nothing_of_it(board: Board) -> None:
    quiet = [device.snapshot() for device in board.chip.devices()]
    busy = Board().init_pic()
    busy.enable()
    busy.redirect(0, 0x99)
    busy.put(R.LVT + Lvt.LINT0, 0x98)
    busy.chip.set_irq(4, True)
    busy.chip.set_irq(16, True)
    assert busy.chip.pending()
    for device, saved in zip(busy.chip.devices(), quiet, strict=True):
        device.restore(saved)
    assert not busy.chip.pending()
    assert [device.snapshot() for device in busy.chip.devices()] == quiet


def test_outputs_that_move_during_a_restore_disturb_nobody(board: Board) -> None:
    board.init_pic()
    board.chip.set_irq(4, True)
    saved = [device.snapshot() for device in board.chip.devices()]
    # As they are, the other's wires from the 8259 lead to fixed interrupts.
    other = Board().init_pic()
    other.enable()
    other.redirect(0, 0x99)
    other.put(R.LVT + Lvt.LINT0, 0x98)
    for device, state in zip(other.chip.devices(), saved, strict=True):
        device.restore(state)
    assert [device.snapshot() for device in other.chip.devices()] == saved
    assert not other.chip.pending()


@pytest.mark.parametrize("kind", [SoloLapic, SoloIoApic])
def test_device_contract(kind: type[Device]) -> None:
    """The same random guest on two of them, across restores; and spoiled states are refused."""
    one, two = Subject(kind(FakeHost()), FakeHost()), Subject(kind(FakeHost()), FakeHost())
    for seed in range(10):
        accesses = script(one, seed)
        assert one.run(accesses) == two.run(accesses)
        saved = one.saved()
        assert saved == two.saved() == msgspec.json.decode(msgspec.json.encode(saved))
        one.run(script(one, seed + 100))
        one.take_up(saved)
        assert one.saved() == saved
    for what, wrong in spoiled(one.saved()):
        with pytest.raises(DeviceError):
            one.take_up(wrong)
        assert one.saved() == saved, what


# Against a model.


GSIS = st.sampled_from([0, 1, 4, 10, 16, 23])
DEVICE_VECTORS = {0: 0x30, 1: 0x31, 4: 0x44, 10: 0x5A, 16: 0x60, 23: 0x67}
LEVEL_GSIS = {10, 16, 23}


class IoApicWay(RuleBasedStateMachine):
    """A kernel with an IOAPIC: level lines are owed an interrupt as long as they are high."""

    @initialize()
    def start(self) -> None:
        self.board = Board().init_pic()
        self.board.mask_pic()
        self.board.enable()
        for gsi, vector in DEVICE_VECTORS.items():
            self.board.redirect(gsi or 2, vector | (LEVEL if gsi in LEVEL_GSIS else 0))
        self.high: set[int] = set()
        self.asked: set[int] = set()
        self.serving: list[int] = []

    def owed(self) -> int:
        barrier = max((vector // 16 for vector in self.serving), default=0)
        return max((v for v in self.asked if v // 16 > barrier), default=-1)

    @rule(gsi=GSIS, high=st.booleans())
    def line(self, gsi: int, high: bool) -> None:
        vector = DEVICE_VECTORS[gsi]
        waits = gsi in LEVEL_GSIS and vector in self.serving
        if high and gsi not in self.high and not waits:
            self.asked.add(vector)
        (self.high.add if high else self.high.discard)(gsi)
        self.board.chip.set_irq(gsi, high)

    @rule(vector=st.sampled_from([0x44, 0x70, 0xEC]))
    def msi(self, vector: int) -> None:
        assert self.board.chip.msi(0xFEE00000, vector)
        self.asked.add(vector)

    @precondition(lambda self: self.owed() >= 0)
    @rule()
    def acknowledge(self) -> None:
        vector = self.owed()
        self.asked.discard(vector)
        self.serving.append(vector)
        assert self.board.chip.acknowledge() == vector

    @precondition(lambda self: self.serving)
    @rule()
    def end(self) -> None:
        vector = self.serving.pop()
        for gsi in self.high & LEVEL_GSIS:
            if DEVICE_VECTORS[gsi] == vector:
                self.asked.add(vector)
        self.board.eoi()

    @rule()
    def snapshot_and_restore(self) -> None:
        self.board = self.board.reborn()

    @invariant()
    def agrees(self) -> None:
        assert self.board.chip.pending() == (self.owed() >= 0)
        assert self.board.vectors(R.IRR) == self.asked
        assert self.board.vectors(R.ISR) == set(self.serving)


IoApicWay.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIoApicWay = IoApicWay.TestCase


class TwoWays(RuleBasedStateMachine):
    """Whatever a guest does, `pending` is what the controllers say, and each rise is told."""

    @initialize()
    def start(self) -> None:
        self.board = Board().init_pic()
        self.was, self.kicks = False, 0

    @rule(gsi=GSIS, high=st.booleans())
    def line(self, gsi: int, high: bool) -> None:
        self.board.chip.set_irq(gsi, high)

    @rule(low=st.sampled_from([0x40, LEVEL | 0x40, EXTINT, NMI, MASKED]), pin=st.integers(0, 4))
    def redirect(self, pin: int, low: int) -> None:
        self.board.redirect(pin, low)

    @rule(entry=st.sampled_from([0x50, LEVEL | 0x50, EXTINT, NMI, MASKED]))
    def lint0(self, entry: int) -> None:
        self.board.put(R.LVT + Lvt.LINT0, entry)

    @rule(svr=st.sampled_from([SPURIOUS, ENABLE | SPURIOUS]))
    def enable(self, svr: int) -> None:
        self.board.put(R.SVR, svr)

    @rule(tpr=st.sampled_from([0, 0x40, 0xFF]))
    def tpr(self, tpr: int) -> None:
        self.board.put(R.TPR, tpr)

    @rule(port=st.integers(0, 1), mask=st.sampled_from([0, 0xFF]))
    def mask(self, port: int, mask: int) -> None:
        self.board.ports[port].write(1, 1, mask)

    @rule()
    def acknowledge(self) -> None:
        self.board.chip.acknowledge()

    @rule()
    def take_nmi(self) -> None:
        waited = self.board.chip.nmi_pending()
        assert self.board.chip.take_nmi() is waited

    @rule()
    def end(self) -> None:
        self.board.eoi()
        self.board.pic_eoi()

    @rule()
    def restore(self) -> None:
        saved = [device.snapshot() for device in self.board.chip.devices()]
        self.board = self.board.reborn()
        assert [device.snapshot() for device in self.board.chip.devices()] == saved
        self.was, self.kicks = False, 0

    @invariant()
    def agrees(self) -> None:
        chip = self.board.chip
        lint0: int = self.board.get(R.LVT + Lvt.LINT0)
        disabled = not self.board.get(R.SVR) & ENABLE
        pin0 = self.board.redirection(0)
        open_ways = (
            disabled,
            lint0 & (MASKED | 0x700) == EXTINT,
            pin0 & (MASKED | 0x700) == EXTINT,
            self._other_extint_pin(),
        )
        extint = chip.pic.pending() and any(open_ways)
        assert chip.pending() == (extint or chip.lapic.request >= 0)
        if chip.pending() and not self.was:
            assert self.board.kicks > self.kicks
        self.was, self.kicks = chip.pending(), self.board.kicks

    def _other_extint_pin(self) -> bool:
        state: Any = self.board.chip.ioapic.state
        return any(
            state.lines >> pin & 1 and self.board.redirection(pin) & (MASKED | 0x700) == EXTINT
            for pin in range(1, 5)
        )


TwoWays.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTwoWays = TwoWays.TestCase
