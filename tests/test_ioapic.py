"""The IOAPIC: registers, edges and levels, remote IRR, masks; against a model."""

from __future__ import annotations

from typing import Any

import pytest
from device_contract import spoiled
from fakes import FakeHost
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from irqchip_rig import EXTINT, LEVEL, LOGICAL, MASKED, NMI, ioapic_get, ioapic_put

from devices.errors import DeviceError
from devices.irqchip.ioapic import PINS, IoApic

REMOTE_IRR, ACTIVE_LOW, STATUS = 1 << 14, 1 << 13, 1 << 12
LOWEST = 0x100


class Rig:
    """An IOAPIC and a CPU that keeps what it was sent.

    Attributes:
        sent: (destination, logical, mode, vector, level) of each message.
        accepts: whether the CPU takes messages.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[int, bool, int, int, bool]] = []
        self.accepts = True
        self.ioapic = IoApic(FakeHost(), deliver=self._deliver)

    def _deliver(
        self, destination: int, logical: bool, mode: int, vector: int, level: bool
    ) -> bool:
        self.sent.append((destination, logical, mode, vector, level))
        return self.accepts

    def redirect(self, pin: int, low: int, destination: int = 0) -> None:
        ioapic_put(self.ioapic, 0x11 + 2 * pin, destination << 24)
        ioapic_put(self.ioapic, 0x10 + 2 * pin, low)

    def low(self, pin: int) -> int:
        return ioapic_get(self.ioapic, 0x10 + 2 * pin)

    def vectors(self) -> list[int]:
        """Of the messages since the last call."""
        vectors = [message[3] for message in self.sent]
        self.sent.clear()
        return vectors

    def reborn(self) -> Rig:
        other = Rig()
        other.accepts = self.accepts
        other.ioapic.restore(self.ioapic.snapshot())
        return other


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Registers.


def test_identification(rig: Rig) -> None:
    assert ioapic_get(rig.ioapic, 0x01) == 0x170020
    assert ioapic_get(rig.ioapic, 0x00) == 0x01000000
    ioapic_put(rig.ioapic, 0x00, 0xFFFFFFFF)
    assert ioapic_get(rig.ioapic, 0x00) == ioapic_get(rig.ioapic, 0x02) == 0x0F000000
    ioapic_put(rig.ioapic, 0x01, 0)
    ioapic_put(rig.ioapic, 0x02, 0)
    assert ioapic_get(rig.ioapic, 0x01) == 0x170020
    assert ioapic_get(rig.ioapic, 0x02) == 0x0F000000


@pytest.mark.parametrize("pin", range(PINS))
def test_redirection_entries(rig: Rig, pin: int) -> None:
    assert rig.low(pin) == MASKED
    for value in (0xFFFFFFFF, 0, 0x5A5A5A5A, 0xA5A5A5A5):
        ioapic_put(rig.ioapic, 0x10 + 2 * pin, value)
        ioapic_put(rig.ioapic, 0x11 + 2 * pin, value)
        assert rig.low(pin) == value & 0x1AFFF
        assert ioapic_get(rig.ioapic, 0x11 + 2 * pin) == value & 0xFF000000
    others = set(range(PINS)) - {pin}
    assert {rig.low(other) for other in others} == {MASKED}


@pytest.mark.parametrize("index", [0x03, 0x0F, 0x40, 0xFF])
def test_no_such_index(rig: Rig, index: int) -> None:
    before = rig.ioapic.snapshot()
    assert ioapic_get(rig.ioapic, index) == 0xFFFFFFFF
    ioapic_put(rig.ioapic, index, 0)
    assert {**rig.ioapic.snapshot(), "select": 0} == before


def test_accesses_of_other_widths(rig: Rig) -> None:
    rig.ioapic.write(0, 1, 0x01)
    assert rig.ioapic.read(0, 4) == rig.ioapic.read(0, 1) == 0x01
    assert rig.ioapic.read(0x12, 1) == 0x17
    assert rig.ioapic.read(0x10, 8) == rig.ioapic.read(0x14, 4) == rig.ioapic.read(0x20, 4) == 0
    rig.ioapic.write(0, 4, 0x10)
    for offset, size in ((0x10, 1), (0x10, 2), (0x10, 8), (0x11, 4), (0x14, 4), (0x20, 4)):
        rig.ioapic.write(offset, size, 0)
        assert rig.low(0) == MASKED


@pytest.mark.parametrize("pin", [-1, PINS])
def test_there_is_no_such_pin(rig: Rig, pin: int) -> None:
    with pytest.raises(ValueError, match=str(pin)):
        rig.ioapic.set_pin(pin, True)


# Messages.


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (0x55, (9, False, 0, 0x55, False)),
        (LOWEST | LOGICAL | 0x55, (9, True, 1, 0x55, False)),
        (LEVEL | LOWEST | 0x55, (9, False, 1, 0x55, True)),
        (ACTIVE_LOW | 0x55, (9, False, 0, 0x55, False)),
        (NMI, (9, False, 4, 0, False)),
        (NMI | LEVEL, (9, False, 4, 0, False)),
    ],
)
def test_what_a_message_says(rig: Rig, low: int, message: tuple[int, bool, int, int, bool]) -> None:
    rig.redirect(7, low, destination=9)
    rig.ioapic.set_pin(7, True)
    assert rig.sent == [message]


def test_edge(rig: Rig) -> None:
    rig.redirect(4, 0x34)
    for _ in range(2):
        rig.ioapic.set_pin(4, True)
        rig.ioapic.set_pin(4, True)
        assert rig.vectors() == [0x34]
        rig.ioapic.end_of_interrupt(0x34)
        rig.ioapic.set_pin(4, False)
        assert rig.vectors() == []
    assert rig.low(4) == 0x34


def test_a_masked_or_refused_edge_is_lost(rig: Rig) -> None:
    rig.redirect(4, MASKED | 0x34)
    rig.ioapic.set_pin(4, True)
    rig.redirect(4, 0x34)
    assert rig.vectors() == []
    rig.ioapic.set_pin(4, False)
    rig.accepts = False
    rig.ioapic.set_pin(4, True)
    assert rig.vectors() == [0x34]
    rig.accepts = True
    rig.ioapic.retry()
    assert rig.vectors() == []


def test_level_comes_again_after_eoi(rig: Rig) -> None:
    rig.redirect(10, LEVEL | 0x3A)
    rig.ioapic.set_pin(10, True)
    for _ in range(3):
        assert rig.vectors() == [0x3A]
        assert rig.low(10) == LEVEL | REMOTE_IRR | 0x3A
        rig.ioapic.end_of_interrupt(0x3B)
        assert rig.vectors() == []
        rig.ioapic.end_of_interrupt(0x3A)
    rig.sent.clear()
    rig.ioapic.set_pin(10, False)
    rig.ioapic.end_of_interrupt(0x3A)
    assert rig.vectors() == []
    assert rig.low(10) == LEVEL | 0x3A


def test_a_level_that_falls_and_rises_in_service_waits_for_eoi(rig: Rig) -> None:
    rig.redirect(10, LEVEL | 0x3A)
    for level in (True, False, True):
        rig.ioapic.set_pin(10, level)
    assert rig.vectors() == [0x3A]
    rig.ioapic.end_of_interrupt(0x3A)
    assert rig.vectors() == [0x3A]


def test_level_under_the_mask(rig: Rig) -> None:
    """A handler that masks, ends, and unmasks later: the usual way of a threaded one."""
    rig.redirect(10, MASKED | LEVEL | 0x3A)
    rig.ioapic.set_pin(10, True)
    assert rig.vectors() == []
    rig.redirect(10, LEVEL | 0x3A)
    assert rig.vectors() == [0x3A]
    rig.redirect(10, MASKED | LEVEL | 0x3A)
    assert rig.low(10) & REMOTE_IRR
    rig.ioapic.end_of_interrupt(0x3A)
    assert rig.vectors() == []
    rig.redirect(10, LEVEL | 0x3A)
    assert rig.vectors() == [0x3A]


def test_two_pins_of_one_vector(rig: Rig) -> None:
    for pin in (10, 11):
        rig.redirect(pin, LEVEL | 0x3A)
        rig.ioapic.set_pin(pin, True)
    rig.vectors()
    rig.ioapic.set_pin(11, False)
    rig.ioapic.end_of_interrupt(0x3A)
    assert rig.vectors() == [0x3A]
    assert (rig.low(10) & REMOTE_IRR, rig.low(11) & REMOTE_IRR) == (REMOTE_IRR, 0)


def test_a_refused_level_is_sent_again(rig: Rig) -> None:
    rig.accepts = False
    rig.redirect(10, LEVEL | 0x3A)
    rig.ioapic.set_pin(10, True)
    assert rig.vectors() == [0x3A]
    assert not rig.low(10) & REMOTE_IRR
    rig.accepts = True
    rig.ioapic.retry()
    rig.ioapic.retry()
    assert rig.vectors() == [0x3A]
    assert rig.low(10) & REMOTE_IRR


def test_becoming_edge_forgets_remote_irr(rig: Rig) -> None:
    """How kernels end an interrupt that the local APIC did not."""
    rig.redirect(10, LEVEL | 0x3A)
    rig.ioapic.set_pin(10, True)
    rig.redirect(10, MASKED | 0x3A)
    assert rig.low(10) == MASKED | 0x3A
    rig.redirect(10, LEVEL | 0x3A)
    assert rig.vectors() == [0x3A, 0x3A]


def test_eoi_register(rig: Rig) -> None:
    rig.redirect(10, LEVEL | 0x3A)
    rig.ioapic.set_pin(10, True)
    rig.ioapic.write(0x40, 4, 0x3B)
    assert rig.vectors() == [0x3A]
    rig.ioapic.write(0x40, 4, 0x3A)
    assert rig.vectors() == [0x3A]
    assert rig.ioapic.read(0x40, 4) == 0


def test_extint_is_a_level_and_no_message(rig: Rig) -> None:
    rig.redirect(0, EXTINT)
    rig.ioapic.set_pin(0, True)
    assert rig.ioapic.extint
    assert rig.reborn().ioapic.extint
    rig.redirect(0, MASKED | EXTINT)
    assert not rig.ioapic.extint
    rig.redirect(0, EXTINT)
    rig.ioapic.set_pin(0, False)
    assert not rig.ioapic.extint
    assert rig.vectors() == []


# State.


def test_restored_goes_on_like_the_original(rig: Rig) -> None:
    rig.redirect(10, LEVEL | 0x3A, destination=7)
    rig.redirect(4, 0x34)
    rig.ioapic.set_pin(10, True)
    rig.ioapic.set_pin(4, True)
    rig.vectors()
    twin = rig.reborn()
    assert twin.vectors() == [], "a restore sends nothing"
    for each in (rig, twin):
        each.ioapic.set_pin(10, True)
        each.ioapic.set_pin(4, True)
        assert each.vectors() == []
        each.ioapic.end_of_interrupt(0x3A)
        assert each.sent == [(7, False, 0, 0x3A, True)]
    assert twin.ioapic.snapshot() == rig.ioapic.snapshot()


def test_spoiled_states_are_refused(rig: Rig) -> None:
    rig.redirect(10, LEVEL | 0x3A, destination=7)
    rig.ioapic.set_pin(10, True)
    before = rig.ioapic.snapshot()
    for what, wrong in spoiled(before):
        with pytest.raises(DeviceError):
            rig.ioapic.restore(wrong)
        assert rig.ioapic.snapshot() == before, what


@pytest.mark.parametrize(
    "change",
    [
        {"lines": 1 << PINS},
        {"entries": [STATUS, *[MASKED] * (PINS - 1)]},
        {"entries": [REMOTE_IRR, *[MASKED] * (PINS - 1)]},
        {"entries": [REMOTE_IRR | LEVEL | NMI, *[MASKED] * (PINS - 1)]},
        {"entries": [MASKED] * (PINS - 1)},
        {"id": 16},
    ],
)
def test_impossible_states_are_refused(rig: Rig, change: dict[str, Any]) -> None:
    before = rig.ioapic.snapshot()
    with pytest.raises(DeviceError):
        rig.ioapic.restore({**before, **change})
    assert rig.ioapic.snapshot() == before


# Against a model.


USED = st.sampled_from([0, 4, 10, 23])
VECTORS = st.sampled_from([0x31, 0x32])


class IoApicMachine(RuleBasedStateMachine):
    """A pin is (vector, level-triggered, masked); who was sent and not ended is in `waiting`."""

    @initialize()
    def start(self) -> None:
        self.rig = Rig()
        self.pins = dict.fromkeys([0, 4, 10, 23], (0, False, True))
        self.high: set[int] = set()
        self.waiting: set[int] = set()
        self.expected: list[int] = []

    def settle(self) -> None:
        """Levels that are due are sent, by pin number."""
        for pin, (vector, level, masked) in sorted(self.pins.items()):
            if level and not masked and pin in self.high - self.waiting:
                self.expected.append(vector)
                if self.rig.accepts:
                    self.waiting.add(pin)

    @rule(pin=USED, high=st.booleans())
    def line(self, pin: int, high: bool) -> None:
        vector, level, masked = self.pins[pin]
        rises = high and pin not in self.high
        (self.high.add if high else self.high.discard)(pin)
        if rises and not masked and not level:
            self.expected.append(vector)
        elif rises and level and not masked and pin not in self.waiting:
            self.expected.append(vector)
            if self.rig.accepts:
                self.waiting.add(pin)
        self.rig.ioapic.set_pin(pin, high)

    @rule(pin=USED, vector=VECTORS, level=st.booleans(), masked=st.booleans())
    def redirect(self, pin: int, vector: int, level: bool, masked: bool) -> None:
        self.pins[pin] = vector, level, masked
        if not level:
            self.waiting.discard(pin)
        elif not masked and pin in self.high - self.waiting:
            self.expected.append(vector)
            if self.rig.accepts:
                self.waiting.add(pin)
        ioapic_put(
            self.rig.ioapic,
            0x10 + 2 * pin,
            vector | (LEVEL if level else 0) | (MASKED if masked else 0),
        )

    @rule(vector=VECTORS)
    def end(self, vector: int) -> None:
        for pin in sorted(self.waiting):
            if self.pins[pin][0] == vector:
                self.waiting.discard(pin)
                if pin in self.high and not self.pins[pin][2]:
                    self.expected.append(vector)
                    if self.rig.accepts:
                        self.waiting.add(pin)
        self.rig.ioapic.end_of_interrupt(vector)

    @rule(accepts=st.booleans())
    def retry(self, accepts: bool) -> None:
        self.rig.accepts = accepts
        self.settle()
        self.rig.ioapic.retry()

    @rule()
    def snapshot_and_restore(self) -> None:
        saved = self.rig.ioapic.snapshot()
        self.rig = self.rig.reborn()
        assert self.rig.ioapic.snapshot() == saved

    @invariant()
    def agrees(self) -> None:
        assert self.rig.vectors() == self.expected
        self.expected.clear()
        for pin, (vector, level, masked) in self.pins.items():
            low = vector | (LEVEL if level else 0) | (MASKED if masked or not vector else 0)
            assert self.rig.low(pin) == low | (REMOTE_IRR if pin in self.waiting else 0)


IoApicMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIoApicAgainstModel = IoApicMachine.TestCase
