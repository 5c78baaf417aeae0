"""The small ports of the board: POST, A20 and reset, debug consoles."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeHost

from devices.bus import Bus, BusType, Range
from devices.errors import DeviceError
from devices.pci.host_bridge import PciRoot
from devices.platform.a20 import A20Gate
from devices.platform.debug_console import DebugConsole
from devices.platform.port92 import Port92
from devices.platform.post import PostPort
from devices.platform.reset import ResetControl


class Counter:
    """A callback that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


# POST.


def test_post_keeps_the_last_code() -> None:
    port = PostPort(FakeHost())
    (region,) = port.regions()
    assert (region.start, region.length) == (0x80, 1)
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x12)
    port.write(0, 1, 0xFF)
    assert port.read(0, 1) == port.state.code == 0xFF


# The A20 gate and port 0x92.


def test_gate_is_open_at_the_start_and_tells_changes_only() -> None:
    told: list[bool] = []
    gate = A20Gate(told.append)
    assert gate.open
    gate.set(True)
    assert told == []
    gate.set(False)
    gate.set(False)
    gate.set(True)
    assert told == [False, True]


def test_port92_drives_the_gate_and_reads_it_back() -> None:
    told: list[bool] = []
    gate = A20Gate(told.append)
    port = Port92(FakeHost(), gate=gate)
    assert port.read(0, 1) == 2
    port.write(0, 1, 0)
    assert (port.read(0, 1), gate.open) == (0, False)
    gate.set(True)  # the keyboard controller does that
    assert port.read(0, 1) == 2
    port.write(0, 1, 0xF4)
    assert (port.read(0, 1), gate.open) == (0xF4, False)
    assert told == [False, True, False]


def test_port92_resets_on_a_rising_edge_only() -> None:
    reset = Counter()
    port = Port92(FakeHost(), reset=reset)
    for value, expected in ((2, 0), (3, 1), (3, 1), (2, 1), (1, 2)):
        port.write(0, 1, value)
        assert reset.calls == expected, value


def test_restore_puts_the_gate_as_it_was_and_says_so() -> None:
    port = Port92(FakeHost())
    port.write(0, 1, 0x10)
    saved = port.snapshot()
    for level in (True, False):
        told: list[bool] = []
        fresh = Port92(FakeHost(), gate=A20Gate(told.append))
        fresh.gate.open = level
        fresh.restore(saved)
        assert told == [False]
        assert fresh.read(0, 1) == 0x10
        assert fresh.snapshot() == saved


@pytest.mark.parametrize("spoiled", [{"kept": 2, "a20": True}, {"kept": 0, "a20": 1}, {"kept": 0}])
def test_port92_refuses_what_it_cannot_be(spoiled: Any) -> None:
    port = Port92(FakeHost())
    with pytest.raises(DeviceError):
        port.restore(spoiled)
    assert port.snapshot() == {"kept": 0, "a20": True}


# Reset control, behind the PCI root.


class Board:
    def __init__(self, *, with_reset: bool = True) -> None:
        self.reset = Counter()
        self.control = ResetControl(FakeHost(), reset=self.reset)
        self.io = Bus(BusType.PIO, 0x10000)
        self.root = PciRoot(
            FakeHost(),
            Bus(BusType.MMIO),
            self.io,
            set_irq_line=lambda irq, level: None,
            on_violation=lambda owner, text: None,
            reset_control=self.control if with_reset else None,
        )
        self.io.insert(Range(0xCF8, 8), self.root, "pci")


def test_reset_control_has_no_region_of_its_own() -> None:
    control = ResetControl(FakeHost())
    assert control.regions() == control.handlers() == ()


def test_a_byte_at_0xcf9_reaches_the_reset_control() -> None:
    board = Board()
    board.io.write(0xCF8, 4, 0x8000_0000)
    board.io.write(0xCF9, 1, 0xFB)
    assert board.io.read(0xCF9, 1) == 0x0A
    assert board.reset.calls == 0
    board.io.write(0xCF9, 1, 0x06)
    assert board.reset.calls == 1
    assert board.io.read(0xCF9, 1) == 0x02
    assert board.io.read(0xCF8, 4) == 0x8000_0000
    assert (board.root.unclaimed_reads, board.root.unclaimed_writes) == (0, 0)


def test_every_other_access_beside_config_address_still_is_nobodys() -> None:
    board = Board()
    others = [(0xCF8, 1), (0xCF8, 2), (0xCFA, 1), (0xCFB, 1), (0xCF9, 2), (0xCFA, 2)]
    for port, size in others:
        board.io.write(port, size, (1 << 8 * size) - 1)
        assert board.io.read(port, size) == (1 << 8 * size) - 1
    assert board.reset.calls == 0
    assert board.io.read(0xCF8, 4) == 0
    assert board.root.unclaimed_reads == board.root.unclaimed_writes == len(others)


def test_without_a_reset_control_0xcf9_is_nobodys() -> None:
    board = Board(with_reset=False)
    board.io.write(0xCF9, 1, 6)
    assert board.io.read(0xCF9, 1) == 0xFF
    assert board.root.unclaimed_writes == board.root.unclaimed_reads == 1
    assert board.reset.calls == 0


def test_reset_control_state() -> None:
    control = ResetControl(FakeHost())
    control.write(0, 1, 0x0A)
    fresh = ResetControl(FakeHost())
    fresh.restore(control.snapshot())
    assert fresh.read(0, 1) == 0x0A
    for spoiled in ({"kind": 4}, {"kind": -1}, {"kind": 0x100}, {}, None):
        with pytest.raises(DeviceError):
            fresh.restore(spoiled)
    assert fresh.read(0, 1) == 0x0A


# Debug consoles.


def test_debug_consoles_print_in_order_and_tell_that_they_are_there() -> None:
    host = FakeHost()
    console = DebugConsole(host)
    bus = Bus(BusType.PIO, 0x10000)
    for region, handler in zip(console.regions(), console.handlers(), strict=True):
        claimed = region.range()
        assert claimed is not None
        bus.insert(claimed, handler, "debug")
    for port, character in ((0xE9, b"a"), (0x402, b"b"), (0xE9, b"\n")):
        assert bus.read(port, 1) == 0xE9
        bus.write(port, 1, character[0])
    assert host.printed == b"ab\n"
