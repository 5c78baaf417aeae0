"""The keyboard controller, and the keyboard behind it."""

from __future__ import annotations

import pytest
from fakes import FakeHost

from devices.errors import DeviceError
from devices.platform.a20 import A20Gate
from devices.platform.i8042 import I8042, I8042Options
from devices.platform.keyboard import QUEUE_SIZE, translate

FULL, SYSTEM, COMMAND, UNLOCKED, TIMEOUT = 0x01, 0x04, 0x08, 0x10, 0x40


class Rig:
    """A controller and the guest's way to it."""

    def __init__(self, keyboard: bool = False) -> None:
        self.host = FakeHost()
        self.resets = 0
        self.gate = A20Gate()
        self.device = I8042(self.host, I8042Options(keyboard), gate=self.gate, reset=self._reset)
        self.data, self.command_port = self.device.handlers()

    def _reset(self) -> None:
        self.resets += 1

    @property
    def status(self) -> int:
        return self.command_port.read(0, 1)

    def command(self, *values: int) -> None:
        """A command and its data bytes."""
        self.command_port.write(0, 1, values[0])
        for value in values[1:]:
            self.data.write(0, 1, value)

    def send(self, value: int) -> None:
        self.data.write(0, 1, value)

    def take(self) -> int:
        """The next byte; there must be one."""
        assert self.status & FULL
        return self.data.read(0, 1)

    def take_all(self) -> bytes:
        taken = bytearray()
        while self.status & FULL:
            taken.append(self.data.read(0, 1))
        return bytes(taken)

    def ask(self, *values: int) -> int:
        self.command(*values)
        return self.take()


def test_regions_are_the_two_ports() -> None:
    regions = Rig().device.regions()
    assert [(r.start, r.length, r.irq) for r in regions] == [(0x60, 1, 1), (0x64, 1, None)]


# What Linux does at boot (drivers/input/serio/i8042.c), the answers that it needs.


def test_probe_of_linux_without_a_keyboard() -> None:
    rig = Rig()
    assert not rig.status & FULL  # i8042_flush
    config = rig.ask(0x20)
    assert rig.ask(0xAA) == 0x55
    rig.command(0x60, config & ~1 | 0x10)
    assert rig.ask(0x20) == config & ~1 | 0x10
    assert rig.ask(0xAB) == 0
    # i8042_check_aux: the loop must not answer as a mouse port would, nor keep the driver waiting.
    rig.command(0xD3, 0x5A)
    assert not rig.status & 0x20
    rig.take_all()
    assert rig.ask(0xA9) not in (0x00, 0xFA, 0xFF)
    # Every command to the keyboard that is not there fails at once.
    for value in (0xF2, 0xED, 0xFF):
        rig.send(value)
        assert rig.status & (FULL | TIMEOUT) == FULL | TIMEOUT
        assert rig.take() == 0xFE
        assert rig.status & (FULL | TIMEOUT) == 0


def test_probe_with_a_keyboard() -> None:
    rig = Rig(keyboard=True)
    rig.command(0x60, 0x45)
    rig.send(0xFF)
    assert rig.take_all() == b"\xfa\xaa"
    rig.send(0xF2)
    assert rig.take_all() == b"\xfa\xab\x41"  # translated, as every PC shows it
    rig.command(0x60, 0x05)
    rig.send(0xF2)
    assert rig.take_all() == b"\xfa\xab\x83"
    for exchange in ((0xED, 0x07), (0xF3, 0x20), (0xF0, 0x02)):
        for value in exchange:
            rig.send(value)
            assert rig.take_all() == b"\xfa"
    assert rig.device.state.keyboard.leds == 7
    rig.send(0xF0)
    rig.send(0x00)
    assert rig.take_all()[-1] == 2
    rig.send(0xEE)
    assert rig.take_all() == b"\xee"
    rig.send(0x01)
    assert rig.take_all() == b"\xfe"
    rig.send(0xFE)
    assert rig.take_all() == b"\xfe"


# The controller.


@pytest.mark.parametrize(
    ("command", "answer"), [(0xAA, 0x55), (0xAB, 0), (0xC0, 0x80), (0xE0, 3), (0xD0, 0xC3)]
)
def test_answers(command: int, answer: int) -> None:
    rig = Rig()
    assert rig.ask(command) == answer
    assert not rig.status & FULL


def test_status_tells_which_port_was_written_last() -> None:
    rig = Rig()
    assert rig.status == SYSTEM | UNLOCKED
    rig.command(0x60)
    assert rig.status == SYSTEM | UNLOCKED | COMMAND
    rig.send(0x00)
    assert rig.status == UNLOCKED


def test_all_of_the_ram_can_be_written_and_read() -> None:
    rig = Rig()
    for index in range(32):
        rig.command(0x60 + index, index * 7 & 0x2F)
    assert [rig.ask(0x20 + index) for index in range(32)] == [i * 7 & 0x2F for i in range(32)]


def test_an_empty_buffer_reads_its_last_value() -> None:
    rig = Rig()
    assert rig.ask(0xAA) == rig.data.read(0, 1) == 0x55


@pytest.mark.parametrize("command", [0x00, 0x1F, 0x80, 0xA4, 0xA7, 0xA8, 0xD4, 0xDE, 0xEF])
def test_unknown_commands_do_nothing(command: int) -> None:
    rig = Rig()
    before = rig.device.snapshot() | {"last_was_command": True}
    rig.command(command)
    assert rig.device.snapshot() == before
    assert rig.host.calls == []


@pytest.mark.parametrize("command", range(0xF0, 0x100))
def test_pulse_resets_when_bit_0_is_low(command: int) -> None:
    rig = Rig()
    rig.command(command)
    assert rig.resets == 1 - (command & 1)


def test_output_port_drives_a20_and_reset() -> None:
    rig = Rig()
    rig.command(0xD1, 0xDD)
    assert (rig.gate.open, rig.resets) == (False, 0)
    assert rig.ask(0xD0) & 0x03 == 0x01
    rig.command(0xD1, 0xDF)
    assert rig.gate.open
    assert rig.ask(0xD0) & 0x03 == 0x03
    rig.command(0xD1, 0xDE)
    assert rig.resets == 1
    rig.command(0xDD)
    assert not rig.gate.open
    rig.command(0xDF)
    assert rig.gate.open


def test_output_port_shows_what_port_92_did() -> None:
    rig = Rig()
    rig.gate.set(False)
    assert not rig.ask(0xD0) & 2


# Interrupts.


def test_line_follows_the_output_buffer_while_enabled() -> None:
    rig = Rig()
    rig.command(0xAA)
    assert rig.host.irq
    rig.take()
    assert not rig.host.irq
    rig.command(0x60, 0x44)
    rig.command(0xAA)
    assert rig.host.edges() == [True, False]
    rig.command(0x60, 0x45)
    assert rig.host.irq


def test_each_byte_of_the_keyboard_is_an_edge() -> None:
    rig = Rig(keyboard=True)
    rig.device.press(b"\x1c\xf0\x1c")
    assert rig.take_all() == b"\x1e\x9e"
    assert rig.host.edges() == [True, False, True, False]


def test_an_answer_over_an_unread_byte_is_a_new_edge() -> None:
    rig = Rig()
    rig.command(0xAA)
    rig.command(0xAB)
    assert rig.host.edges() == [True, False, True]
    assert rig.take() == 0
    assert not rig.status & FULL


# Keys.


def test_disabled_keyboard_waits_until_it_is_enabled_or_spoken_to() -> None:
    rig = Rig(keyboard=True)
    rig.command(0xAD)
    assert rig.device.press(b"\x1c") == 1
    assert not rig.status & FULL
    rig.command(0xAE)
    assert rig.take() == 0x1E
    rig.command(0xAD)
    rig.send(0xEE)
    assert rig.take() == 0xEE


def test_keys_without_translation() -> None:
    rig = Rig(keyboard=True)
    rig.command(0x60, 0x01)
    rig.device.press(b"\xe0\xf0\x75")
    assert rig.take_all() == b"\xe0\xf0\x75"


def test_a_command_byte_is_not_taken_for_an_argument() -> None:
    rig = Rig(keyboard=True)
    rig.send(0xED)
    rig.take_all()
    rig.send(0xF4)
    rig.take_all()
    rig.send(0x02)
    assert rig.take_all() == b"\xfe"
    assert rig.device.state.keyboard.leds == 0


def test_keyboard_that_does_not_scan_reports_nothing() -> None:
    rig = Rig(keyboard=True)
    rig.send(0xF5)
    rig.take_all()
    rig.device.press(b"\x1c")
    assert rig.take_all() == b""
    rig.send(0xF4)
    rig.take_all()
    rig.device.press(b"\x1c")
    assert rig.take_all() == b"\x1e"


def test_queue_takes_whole_keys_or_nothing() -> None:
    rig = Rig(keyboard=True)
    taken = 0
    while rig.device.press(b"\x1c\xf0\x1c"):
        taken += 1
        assert taken <= QUEUE_SIZE
    assert taken >= QUEUE_SIZE // 3
    assert rig.take_all() == b"\x1e\x9e" * taken


def test_absent_keyboard_takes_no_keys() -> None:
    assert Rig().device.press(b"\x1c") == 0


def test_translation_is_one_to_one_on_keys() -> None:
    assert sorted(translate(code) for code in range(0x80))[:-1] == list(range(1, 0x80))
    known = {
        0x76: 1,
        0x16: 2,
        0x15: 0x10,
        0x5A: 0x1C,
        0x29: 0x39,
        0x83: 0x41,
        0x78: 0x57,
        0x07: 0x58,
    }
    assert {code: translate(code) for code in known} == known
    assert [translate(code) for code in (0xAA, 0xE0, 0xFA, 0xFE)] == [0xAA, 0xE0, 0xFA, 0xFE]


# State.


def test_restore_in_the_middle_of_everything() -> None:
    rig = Rig(keyboard=True)
    rig.device.press(b"\x1c\xf0\x1c")
    rig.command(0xD1)
    fresh = Rig(keyboard=True)
    fresh.device.restore(rig.device.snapshot())
    assert fresh.host.irq
    fresh.send(0xDD)
    assert not fresh.gate.open
    assert fresh.take_all() == b"\x1e\x9e"
    fresh.device.press(b"\x1c")
    assert fresh.take_all() == b"\x1e"


@pytest.mark.parametrize(
    ("field", "value"),
    [("ram", "AAAA"), ("argument_of", 0xD4), ("kept_port", 1), ("output", 256), ("full", 1)],
)
def test_states_that_cannot_be_are_refused(field: str, value: object) -> None:
    rig = Rig()
    before = rig.device.snapshot()
    with pytest.raises(DeviceError):
        rig.device.restore(before | {field: value})
    assert rig.device.snapshot() == before


def test_keyboard_states_that_cannot_be_are_refused() -> None:
    rig = Rig(keyboard=True)
    before = rig.device.snapshot()
    for field, value in (("argument_of", 0xF4), ("queue", "A" * 400), ("leds", -1)):
        wrong = before | {"keyboard": before["keyboard"] | {field: value}}
        with pytest.raises(DeviceError):
            rig.device.restore(wrong)
