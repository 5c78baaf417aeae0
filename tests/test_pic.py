"""The pair of 8259A: commands, priorities, edges and levels, cascade; against a model."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeHost
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devices.errors import DeviceError
from devices.irqchip.i8259 import SPURIOUS, Chip, ChipState, InitStep
from devices.irqchip.pic import PicPair

MASTER, SLAVE, ELCR = 0, 1, 2
MASTER_BASE, SLAVE_BASE = 0x20, 0x28
EOI, ROTATE_ON_EOI = 0x20, 0xA0
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C


def specific_eoi(level: int) -> int:
    return 0x60 | level


class Machine:
    """A PIC pair and the guest that programs it."""

    def __init__(self) -> None:
        self.pic = PicPair(FakeHost())
        self.ports = self.pic.handlers()

    def out(self, chip: int, odd: int, value: int) -> None:
        self.ports[chip].write(odd, 1, value)

    def inb(self, chip: int, odd: int) -> int:
        return self.ports[chip].read(odd, 1)

    def init(self, icw4: int = 0x01, slave_icw4: int = 0x01) -> Machine:
        self.init_chip(MASTER, MASTER_BASE, 0x04, icw4)
        self.init_chip(SLAVE, SLAVE_BASE, 0x02, slave_icw4)
        return self

    def init_chip(self, chip: int, base: int, icw3: int, icw4: int) -> None:
        self.out(chip, 0, 0x11)
        for word in (base, icw3, icw4):
            self.out(chip, 1, word)

    def eoi(self, chip: int = MASTER) -> None:
        self.out(chip, 0, EOI)

    def irr(self, chip: int = MASTER) -> int:
        self.out(chip, 0, READ_IRR)
        return self.inb(chip, 0)

    def isr(self, chip: int = MASTER) -> int:
        self.out(chip, 0, READ_ISR)
        return self.inb(chip, 0)

    def raise_irq(self, *irqs: int) -> None:
        for irq in irqs:
            self.pic.set_irq(irq, True)

    def pulse(self, irq: int) -> None:
        """End a line's request and make a new one."""
        self.pic.set_irq(irq, False)
        self.pic.set_irq(irq, True)

    def take(self) -> int:
        """The vector of an interrupt that must be pending."""
        assert self.pic.pending()
        return self.pic.acknowledge()


@pytest.fixture
def machine() -> Machine:
    return Machine().init()


# Initialization.


def test_delivers_nothing_before_initialization() -> None:
    machine = Machine()
    assert not machine.pic.pending()
    machine.raise_irq(0, 1, 8, 15)
    machine.out(MASTER, 1, 0)
    assert not machine.pic.pending()


@pytest.mark.parametrize("words", [1, 2, 3])
def test_delivers_nothing_during_initialization(machine: Machine, words: int) -> None:
    for odd, word in [(0, 0x11), (1, 0x20), (1, 0x04), (1, 0x01)][:words]:
        machine.out(MASTER, odd, word)
    machine.pulse(1)
    assert not machine.pic.pending()
    for word in [0x20, 0x04, 0x01][words - 1 :]:
        machine.out(MASTER, 1, word)
    assert machine.take() == MASTER_BASE + 1


def test_uninitialized_slave_asks_for_nothing() -> None:
    machine = Machine()
    machine.init_chip(MASTER, MASTER_BASE, 0x04, 0x01)
    machine.raise_irq(9)
    assert not machine.pic.pending()
    machine.init_chip(SLAVE, SLAVE_BASE, 0x02, 0x01)
    assert not machine.pic.pending()
    machine.pulse(9)
    assert machine.take() == SLAVE_BASE + 1


@pytest.mark.parametrize(("icw1", "words"), [(0x10, 2), (0x11, 3), (0x12, 1), (0x13, 2)], ids=hex)
def test_icw1_says_how_many_words_follow(icw1: int, words: int) -> None:
    machine = Machine()
    machine.out(MASTER, 0, icw1)
    for _ in range(words):
        assert machine.pic.state.master.init is not InitStep.READY
        machine.out(MASTER, 1, 0x48)
    assert machine.pic.state.master.init is InitStep.READY
    machine.raise_irq(3)
    assert machine.take() == 0x48 + 3
    assert machine.isr() == 0x08
    assert not machine.pic.state.master.special_fully_nested


def test_icw1_starts_over_but_keeps_lines_and_elcr(machine: Machine) -> None:
    machine.ports[ELCR].write(0, 2, 0x0020)
    machine.raise_irq(3, 5)
    machine.out(MASTER, 0, 0x68)
    machine.out(MASTER, 0, 0xC4)
    machine.out(MASTER, 1, 0xF0)
    machine.take()
    machine.init_chip(MASTER, 0x70, 0x04, 0x01)
    assert machine.inb(MASTER, 1) == 0
    assert machine.isr() == 0
    # The edge of IRQ 3 is forgotten; the level of IRQ 5 is still there.
    assert machine.irr() == 0x20
    assert machine.take() == 0x75
    assert machine.ports[ELCR].read(0, 1) == 0x20
    assert not machine.pic.state.master.special_mask
    assert machine.pic.state.master.lowest == 7


def test_vector_base_drops_its_low_bits() -> None:
    machine = Machine()
    machine.init_chip(MASTER, 0x57, 0x04, 0x01)
    machine.raise_irq(2 + 1)
    assert machine.take() == 0x53


# Lines.


@pytest.mark.parametrize("irq", [0, 1, 3, 4, 5, 6, 7, *range(8, 16)])
def test_each_line_has_its_vector(machine: Machine, irq: int) -> None:
    machine.raise_irq(irq)
    assert machine.take() == MASTER_BASE + irq
    assert not machine.pic.pending()
    assert machine.isr(MASTER) == (1 << irq if irq < 8 else 0x04)
    assert machine.isr(SLAVE) == (1 << irq - 8 if irq >= 8 else 0)


@pytest.mark.parametrize("irq", [-1, 2, 16])
def test_there_is_no_such_line(machine: Machine, irq: int) -> None:
    with pytest.raises(ValueError, match=str(irq)):
        machine.pic.set_irq(irq, True)


def test_edge_interrupts_once(machine: Machine) -> None:
    machine.raise_irq(4)
    assert machine.take() == MASTER_BASE + 4
    machine.eoi()
    machine.raise_irq(4)
    assert not machine.pic.pending()
    machine.pulse(4)
    assert machine.take() == MASTER_BASE + 4


def test_an_edge_during_service_waits_for_the_eoi(machine: Machine) -> None:
    machine.raise_irq(4)
    machine.take()
    machine.pulse(4)
    assert machine.irr() == 0x10
    assert not machine.pic.pending()
    machine.eoi()
    assert machine.take() == MASTER_BASE + 4


def test_level_interrupts_as_long_as_it_is_high(machine: Machine) -> None:
    machine.ports[ELCR].write(0, 1, 0x20)
    machine.raise_irq(5)
    for _ in range(3):
        assert machine.take() == MASTER_BASE + 5
        machine.eoi()
    machine.pic.set_irq(5, False)
    assert not machine.pic.pending()
    assert machine.irr() == 0


@pytest.mark.parametrize("elcr", [0, 0x20])
def test_a_line_that_falls_takes_its_request_back(machine: Machine, elcr: int) -> None:
    machine.ports[ELCR].write(0, 1, elcr)
    machine.raise_irq(5)
    assert machine.pic.pending()
    machine.pic.set_irq(5, False)
    assert not machine.pic.pending()
    assert machine.irr() == 0


def test_elcr_keeps_only_what_may_be_level(machine: Machine) -> None:
    machine.ports[ELCR].write(0, 2, 0xFFFF)
    assert machine.ports[ELCR].read(0, 2) == 0xDEF8
    machine.raise_irq(1)
    machine.take()
    machine.eoi()
    assert not machine.pic.pending()


def test_level_on_the_slave(machine: Machine) -> None:
    machine.ports[ELCR].write(1, 1, 0x08)
    machine.raise_irq(11)
    for _ in range(2):
        assert machine.take() == SLAVE_BASE + 3
        machine.eoi(SLAVE)
        machine.eoi(MASTER)
    machine.pic.set_irq(11, False)
    assert not machine.pic.pending()


# Spurious interrupts.


def test_spurious_irq7_is_not_in_service(machine: Machine) -> None:
    machine.raise_irq(3)
    machine.pic.set_irq(3, False)
    assert machine.pic.acknowledge() == MASTER_BASE + 7
    assert machine.isr() == 0


def test_masking_a_request_makes_it_spurious_and_keeps_it(machine: Machine) -> None:
    machine.raise_irq(3)
    machine.out(MASTER, 1, 0x08)
    assert not machine.pic.pending()
    assert machine.pic.acknowledge() == MASTER_BASE + 7
    machine.out(MASTER, 1, 0)
    assert machine.take() == MASTER_BASE + 3


def test_slave_without_a_request_reports_spurious_level() -> None:
    """Within one process the wire is never late; the chip alone shows what IRQ 15 would be."""
    state = ChipState(init=InitStep.READY, vector=SLAVE_BASE)
    assert Chip(state, 0, 0xDE).acknowledge() == SPURIOUS
    assert state.in_service == 0


# Priorities.


def test_fully_nested(machine: Machine) -> None:
    machine.raise_irq(5)
    assert machine.take() == MASTER_BASE + 5
    machine.raise_irq(6)
    assert not machine.pic.pending()
    machine.raise_irq(1)
    assert machine.take() == MASTER_BASE + 1
    assert machine.isr() == 0x22
    machine.eoi()
    assert machine.isr() == 0x20
    assert not machine.pic.pending()
    machine.eoi()
    assert machine.take() == MASTER_BASE + 6


def test_slave_ranks_between_irq1_and_irq3(machine: Machine) -> None:
    machine.raise_irq(3, 15, 8, 1, 0)
    order = []
    for _ in range(5):
        vector = machine.take()
        order.append(vector)
        if vector >= SLAVE_BASE:
            machine.eoi(SLAVE)
        machine.eoi()
    assert order == [0x20, 0x21, 0x28, 0x2F, 0x23]


def test_slave_in_service_blocks_its_own_higher_request(machine: Machine) -> None:
    machine.raise_irq(12)
    machine.take()
    machine.raise_irq(9)
    assert not machine.pic.pending()
    machine.eoi(SLAVE)
    assert not machine.pic.pending()
    machine.eoi(MASTER)
    assert machine.take() == SLAVE_BASE + 1


def test_special_fully_nested_lets_the_slave_ask_again() -> None:
    machine = Machine().init(icw4=0x11)
    machine.raise_irq(12)
    machine.take()
    machine.raise_irq(14)
    assert not machine.pic.pending()
    machine.raise_irq(3)
    assert not machine.pic.pending()
    machine.raise_irq(9)
    assert machine.take() == SLAVE_BASE + 1
    assert machine.isr(SLAVE) == 0x12


def test_specific_eoi_ends_only_that_one(machine: Machine) -> None:
    machine.raise_irq(5)
    machine.take()
    machine.raise_irq(1)
    machine.take()
    machine.out(MASTER, 0, specific_eoi(5))
    assert machine.isr() == 0x02
    machine.out(MASTER, 0, specific_eoi(4))
    assert machine.isr() == 0x02


def test_eoi_with_nothing_in_service_is_harmless(machine: Machine) -> None:
    machine.eoi()
    machine.out(MASTER, 0, ROTATE_ON_EOI)
    assert machine.isr() == 0
    assert machine.pic.state.master.lowest == 7


def test_auto_eoi_leaves_nothing_in_service() -> None:
    machine = Machine().init(icw4=0x03, slave_icw4=0x03)
    machine.raise_irq(4, 9, 10)
    assert [machine.take() for _ in range(3)] == [SLAVE_BASE + 1, SLAVE_BASE + 2, MASTER_BASE + 4]
    assert machine.isr(MASTER) == machine.isr(SLAVE) == 0
    assert not machine.pic.pending()


def test_rotate_on_nonspecific_eoi_gives_everyone_a_turn(machine: Machine) -> None:
    order = []
    machine.raise_irq(4, 6)
    for _ in range(4):
        vector = machine.take()
        order.append(vector - MASTER_BASE)
        machine.pulse(order[-1])
        machine.out(MASTER, 0, ROTATE_ON_EOI)
    assert order == [4, 6, 4, 6]


def test_rotate_on_specific_eoi(machine: Machine) -> None:
    machine.raise_irq(4)
    machine.take()
    machine.out(MASTER, 0, 0xE0 | 4)
    assert machine.isr() == 0
    machine.pulse(4)
    machine.raise_irq(6)
    assert machine.take() == MASTER_BASE + 6


def test_set_priority(machine: Machine) -> None:
    machine.out(MASTER, 0, 0xC0 | 4)
    machine.raise_irq(4, 6)
    assert machine.take() == MASTER_BASE + 6


def test_rotation_in_auto_eoi_mode() -> None:
    machine = Machine().init(icw4=0x03)
    machine.out(MASTER, 0, 0x80)
    order = []
    machine.raise_irq(4, 6)
    for _ in range(4):
        order.append(machine.take() - MASTER_BASE)
        machine.pulse(order[-1])
    assert order == [4, 6, 4, 6]
    machine.out(MASTER, 0, 0x00)
    before = machine.pic.state.master.lowest
    machine.take()
    assert machine.pic.state.master.lowest == before


def test_ocw2_no_operation(machine: Machine) -> None:
    machine.raise_irq(4)
    machine.take()
    before = machine.pic.snapshot()
    machine.out(MASTER, 0, 0x44)
    assert machine.pic.snapshot() == before


def test_special_mask_mode(machine: Machine) -> None:
    """A handler masks its own level and lets all others in, also those below it."""
    machine.raise_irq(3)
    machine.take()
    machine.raise_irq(6)
    assert not machine.pic.pending()
    machine.out(MASTER, 1, 0x08)
    machine.out(MASTER, 0, 0x68)
    assert machine.take() == MASTER_BASE + 6
    # A non-specific EOI passes over the masked one.
    machine.eoi()
    assert machine.isr() == 0x08
    machine.eoi()
    assert machine.isr() == 0x08
    machine.out(MASTER, 0, specific_eoi(3))
    assert machine.isr() == 0
    machine.out(MASTER, 0, 0x48)
    assert not machine.pic.state.master.special_mask


# Reading.


def test_poll(machine: Machine) -> None:
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 0) == 0
    machine.raise_irq(6, 3)
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 0) == 0x83
    assert machine.isr() == 0x08
    assert not machine.pic.pending()
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 1) == 0
    assert machine.inb(MASTER, 1) == 0


def test_poll_of_the_slave_acknowledges_it(machine: Machine) -> None:
    machine.raise_irq(10)
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 0) == 0x82
    machine.out(SLAVE, 0, POLL)
    assert machine.inb(SLAVE, 0) == 0x82
    machine.eoi(SLAVE)
    machine.eoi(MASTER)
    assert not machine.pic.pending()
    machine.pulse(10)
    assert machine.take() == SLAVE_BASE + 2


def test_a_poll_of_the_master_is_no_new_edge_of_the_slave(machine: Machine) -> None:
    machine.raise_irq(10)
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 0) == 0x82
    machine.eoi(MASTER)
    assert not machine.pic.pending()


def test_a_poll_of_the_slave_uncovers_its_next_request() -> None:
    machine = Machine().init(slave_icw4=0x03)
    machine.raise_irq(10, 11)
    machine.out(MASTER, 0, POLL)
    assert machine.inb(MASTER, 0) == 0x82
    machine.eoi(MASTER)
    machine.out(SLAVE, 0, POLL)
    assert machine.inb(SLAVE, 0) == 0x82
    assert machine.take() == SLAVE_BASE + 3


def test_irr_isr_choice_lasts(machine: Machine) -> None:
    machine.raise_irq(3)
    assert machine.inb(MASTER, 0) == 0x08
    machine.take()
    machine.raise_irq(5)
    machine.out(MASTER, 0, 0x68)
    assert machine.inb(MASTER, 0) == 0x20
    machine.out(MASTER, 0, READ_ISR)
    assert [machine.inb(MASTER, 0) for _ in range(2)] == [0x08, 0x08]
    machine.out(MASTER, 0, READ_IRR)
    assert [machine.inb(MASTER, 0) for _ in range(2)] == [0x20, 0x20]


@pytest.mark.parametrize("chip", [MASTER, SLAVE])
def test_mask_register(machine: Machine, chip: int) -> None:
    machine.out(chip, 1, 0xA5)
    assert machine.inb(chip, 1) == 0xA5
    machine.raise_irq(8 * chip + 0, 8 * chip + 5, 8 * chip + 7)
    assert not machine.pic.pending()
    machine.raise_irq(8 * chip + 3)
    assert machine.take() == MASTER_BASE + 8 * chip + 3


# State.


def test_restore_delivers_what_was_pending(machine: Machine) -> None:
    machine.raise_irq(5)
    machine.take()
    machine.raise_irq(1, 9, 6)
    saved = machine.pic.snapshot()
    twin = Machine()
    twin.pic.restore(saved)
    for each in (machine, twin):
        assert each.take() == MASTER_BASE + 1
        each.eoi()
        assert each.take() == SLAVE_BASE + 1
        each.eoi(SLAVE)
        each.eoi()
        assert not each.pic.pending()
        each.eoi()
        assert each.take() == MASTER_BASE + 6
    assert twin.pic.snapshot() == machine.pic.snapshot()
    assert twin.inb(MASTER, 1) == 0
    assert twin.isr() == 0x40


def test_a_device_that_drives_its_line_again_after_restore_is_no_edge(machine: Machine) -> None:
    machine.raise_irq(4)
    machine.take()
    machine.eoi()
    machine.pic.restore(machine.pic.snapshot())
    machine.raise_irq(4)
    assert not machine.pic.pending()


@pytest.mark.parametrize(
    ("chip", "change"),
    [
        ("master", {"latched": 0x10}),
        ("master", {"vector": 0x21}),
        ("master", {"level": 0x01}),
        ("slave", {"level": 0x20}),
        ("master", {"lines": 0x04}),
        ("slave", {"init": 1}),
        ("slave", {"lowest": 8}),
    ],
)
def test_impossible_states_are_refused(machine: Machine, chip: str, change: dict[str, Any]) -> None:
    before = machine.pic.snapshot()
    with pytest.raises(DeviceError):
        machine.pic.restore({**before, chip: {**before[chip], **change}})
    assert machine.pic.snapshot() == before


# Against a model.


class ModelChip:
    """The rules of one chip in sets of inputs."""

    def __init__(self) -> None:
        self.high: set[int] = set()
        self.asked: set[int] = set()
        self.level: set[int] = set()
        self.masked: set[int] = set()
        self.serving: set[int] = set()
        self.ranking = list(range(8))

    def line(self, number: int, high: bool) -> None:
        if high and number not in self.high | self.level:
            self.asked.add(number)
        if not high:
            self.asked.discard(number)
        (self.high.add if high else self.high.discard)(number)

    def requests(self) -> set[int]:
        return (self.asked - self.level) | (self.high & self.level)

    def best(self) -> int | None:
        rank = self.ranking.index
        bar = min(map(rank, self.serving), default=8)
        able = [n for n in self.requests() - self.masked if rank(n) < bar]
        return min(able, key=rank, default=None)

    def take(self, number: int) -> None:
        self.asked.discard(number)
        self.serving.add(number)

    def set_lowest(self, number: int) -> None:
        while self.ranking[-1] != number:
            self.ranking.append(self.ranking.pop(0))

    def eoi(self, rotate: bool) -> None:
        if self.serving:
            ended = min(self.serving, key=self.ranking.index)
            self.serving.discard(ended)
            if rotate:
                self.set_lowest(ended)


def bits(numbers: set[int]) -> int:
    return sum(1 << number for number in numbers)


CHIPS = st.sampled_from([MASTER, SLAVE])
LEVELS = st.integers(0, 7)


class PicMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.machine = Machine().init()
        self.model = (ModelChip(), ModelChip())

    def settle(self) -> None:
        self.model[MASTER].line(2, self.model[SLAVE].best() is not None)

    @rule(irq=st.sampled_from([0, 1, *range(3, 16)]), high=st.booleans())
    def line(self, irq: int, high: bool) -> None:
        self.machine.pic.set_irq(irq, high)
        self.model[irq // 8].line(irq % 8, high)
        self.settle()

    @precondition(lambda self: self.model[MASTER].best() is not None)
    @rule()
    def acknowledge(self) -> None:
        master, slave = self.model
        number = master.best()
        assert number is not None
        master.take(number)
        expected = MASTER_BASE + number
        if number == 2:
            inner = slave.best()
            assert inner is not None
            slave.take(inner)
            master.line(2, False)
            expected = SLAVE_BASE + inner
        self.settle()
        assert self.machine.pic.acknowledge() == expected

    @rule(chip=CHIPS, mask=st.integers(0, 255))
    def mask(self, chip: int, mask: int) -> None:
        self.machine.out(chip, 1, mask)
        self.model[chip].masked = {n for n in range(8) if mask & 1 << n}
        self.settle()

    @rule(chip=CHIPS, rotate=st.booleans())
    def end(self, chip: int, rotate: bool) -> None:
        self.machine.out(chip, 0, ROTATE_ON_EOI if rotate else EOI)
        self.model[chip].eoi(rotate)
        self.settle()

    @rule(chip=CHIPS, number=LEVELS, rotate=st.booleans())
    def end_specific(self, chip: int, number: int, rotate: bool) -> None:
        self.machine.out(chip, 0, (0xE0 if rotate else 0x60) | number)
        self.model[chip].serving.discard(number)
        if rotate:
            self.model[chip].set_lowest(number)
        self.settle()

    @rule(chip=CHIPS, number=LEVELS)
    def set_priority(self, chip: int, number: int) -> None:
        self.machine.out(chip, 0, 0xC0 | number)
        self.model[chip].set_lowest(number)
        self.settle()

    @rule(value=st.integers(0, 0xFFFF))
    def elcr(self, value: int) -> None:
        self.machine.ports[ELCR].write(0, 2, value)
        value &= 0xDEF8
        for index, chip in enumerate(self.model):
            chip.level = {n for n in range(8) if value & 1 << 8 * index + n}
            chip.asked -= chip.level
            self.settle()

    @rule()
    def snapshot_and_restore(self) -> None:
        saved = self.machine.pic.snapshot()
        self.machine = Machine()
        self.machine.pic.restore(saved)
        assert self.machine.pic.snapshot() == saved

    @invariant()
    def agrees(self) -> None:
        assert self.machine.pic.pending() == (self.model[MASTER].best() is not None)
        for chip in (MASTER, SLAVE):
            assert self.machine.irr(chip) == bits(self.model[chip].requests())
            assert self.machine.isr(chip) == bits(self.model[chip].serving)


PicMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPicAgainstModel = PicMachine.TestCase
