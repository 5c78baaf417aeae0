"""Bridges: the type 1 header, bus numbers, windows, pins, messages, resets; hostile ones."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.bus import Bus, BusType, Range
from devices.errors import DeviceError
from devices.pci.bridge import BridgeHeader, PciBridge, windows
from devices.pci.config import Header
from devices.pci.config_space import ConfigSpaceDevice
from devices.pci.contract import BarInfo, ConfigWriteResult, RegionRange
from devices.pci.decode import BAR0, COMMAND, Command
from devices.pci.function import PciFunction
from devices.pci.host_bridge import PciRoot
from devices.pci.intx import IntxRouter, Slot

DECODE = int(Command.IO_SPACE | Command.MEMORY_SPACE)
MASTER = int(Command.BUS_MASTER)
BUSES, IO, MEMORY, PREFETCHABLE = 0x18, 0x1C, 0x20, 0x24
UPPER_BASE, UPPER_LIMIT, CONTROL = 0x28, 0x2C, 0x3E
CLOSED = 0x0000_FFF0


class Board:
    """A root with a bridge ``br1`` at 00:04.0, ``br2`` behind it at device 5, and functions."""

    def __init__(self) -> None:
        self.mmio, self.io = Bus(BusType.MMIO, 1 << 40), Bus(BusType.PIO, 0x10000)
        self.lines: dict[int, bool] = {}
        self.violations: list[tuple[str, str]] = []
        self.root = PciRoot(
            FakeHost(),
            self.mmio,
            self.io,
            set_irq_line=self.lines.__setitem__,
            on_violation=lambda owner, text: self.violations.append((owner, text)),
        )
        self.slots: dict[str, Slot] = {}
        self.functions: dict[str, PciFunction] = {}
        self.plug("br1", Slot(4), PciBridge(FakeHost()))
        self.plug("near", Slot(3, 0, 1))
        self.plug("br2", Slot(5, 0, 1), PciBridge(FakeHost()))
        self.plug("far", Slot(1, 0, 2))

    def plug(self, name: str, slot: Slot, function: PciFunction | None = None) -> None:
        function = function or ConfigSpaceDevice(PinHost(self.root, slot))
        self.slots[name], self.functions[name] = slot, function
        self.root.add(slot, function, name, function.handlers(), function.bars())

    def put(self, number: int, offset: int, value: int, size: int = 4) -> None:
        self.root.write_config(number, offset // 4, offset % 4, value.to_bytes(size, "little"))

    def get(self, bus: int, device: int) -> int:
        return self.root.read_config(bus << 8 | device << 3, 0)

    def here(self) -> list[tuple[str, int]]:
        both = [*self.mmio, *self.io]
        return sorted((entry.owner, entry.range.start) for entry in both)


class PinHost(FakeHost):
    def __init__(self, root: PciRoot, slot: Slot) -> None:
        super().__init__()
        self.root, self.slot = root, slot

    def set_irq(self, level: bool, pin: int = 0) -> None:
        self.root.set_intx(self.slot, pin, level)


BR1, NEAR, BR2, FAR = 4 << 3, 1 << 8 | 3 << 3, 1 << 8 | 5 << 3, 2 << 8 | 1 << 3
"""What the guest calls them after `numbered`."""


def numbered() -> Board:
    board = Board()
    board.put(BR1, BUSES, 0x02_01_00)
    board.put(BR2, BUSES, 0x02_02_01)
    return board


def opened() -> Board:
    """Numbered, with windows 0xE0000000-0xE0FFFFFF over 0xE0000000-0xE01FFFFF, and BARs in them."""
    board = numbered()
    for bridge, end in ((BR1, 0xE0F0), (BR2, 0xE010)):
        board.put(bridge, MEMORY, end << 16 | 0xE000)
        board.put(bridge, PREFETCHABLE, CLOSED)
        board.put(bridge, IO, 0x00F0, 2)
        board.put(bridge, COMMAND * 4, DECODE, 2)
    board.put(FAR, 0x10, 0xE000_1000)
    board.put(NEAR, 0x10, 0xE020_1000)
    for function in (NEAR, FAR):
        board.put(function, COMMAND * 4, DECODE, 2)
    assert board.here() == [("far", 0xE000_1000), ("near", 0xE020_1000)]
    return board


# The header.


@pytest.mark.parametrize(
    ("offset", "reset", "after_ones"),
    [
        (0x00, 0x0604_1234, 0x0604_1234),
        (0x04, 0, 0x0147),
        (0x08, 0x0604_0000, 0x0604_0000),
        (0x0C, 0x0001_0000, 0x0001_00FF),
        (0x10, 0, 0),
        (0x14, 0, 0),
        (0x18, 0, 0x00FF_FFFF),
        (0x1C, 0, 0x0000_F0F0),
        (0x20, 0, 0xFFF0_FFF0),
        (0x24, 0x0001_0001, 0xFFF1_FFF1),
        (0x28, 0, 0xFFFF_FFFF),
        (0x2C, 0, 0xFFFF_FFFF),
        (0x30, 0, 0),
        (0x34, 0, 0),
        (0x38, 0, 0),
        (0x3C, 0, 0x0043_00FF),
    ],
)
def test_the_type_1_header(offset: int, reset: int, after_ones: int) -> None:
    bridge = PciBridge(FakeHost())
    assert bridge.read_config(offset // 4) == reset
    assert not bridge.write_config(offset // 4, 0, b"\xff" * 4)
    assert bridge.read_config(offset // 4) == after_ones


def test_a_bridge_has_no_bars() -> None:
    bar = (BarInfo(0, 0, BusType.MMIO, 16),)
    for wrong in ({"bars": bar}, {"rom": b"x"}, {"subsystem_id": 1}):
        with pytest.raises(ValueError, match="bridge has no BARs"):
            BridgeHeader(1, 1, 0, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "bus", "expected"),
    [
        ({1: 3, 7: 0x00F0, 8: 0xE010_E000, 9: CLOSED}, "mmio", [(0xE000_0000, 0xE01F_FFFF)]),
        ({1: 2, 8: 0xE000_E000, 9: CLOSED}, "mmio", [(0xE000_0000, 0xE00F_FFFF)]),
        ({1: 1, 8: 0xE000_E000}, "mmio", []),
        ({1: 2, 8: 0xE000_E010, 9: CLOSED}, "mmio", []),
        (
            {1: 2, 8: CLOSED, 9: 0x0011_FFF1, 10: 1, 11: 2},
            "mmio",
            [(0x1_FFF0_0000, 0x2_001F_FFFF)],
        ),
        ({1: 2, 8: CLOSED, 9: 0x0001_0001, 10: 2, 11: 1}, "mmio", []),
        ({1: 1, 7: 0xD0C0}, "pio", [(0xC000, 0xDFFF)]),
        ({1: 1, 7: 0xFFFF_C0D0}, "pio", []),
        ({1: 2, 7: 0xD0C0}, "pio", []),
        ({1: 1, 7: 0xF0F0}, "pio", [(0xF000, 0xFFFF)]),
    ],
)
def test_windows(changes: dict[int, int], bus: str, expected: list[tuple[int, int]]) -> None:
    registers = [changes.get(index, 0) for index in range(64)]
    found = [(each.start, each.end - 1) for each in windows(registers, BusType(bus))]
    assert found == expected


# Bus numbers.


def test_nothing_is_behind_a_bridge_that_has_no_numbers() -> None:
    board = Board()
    assert board.get(0, 4) == 0x0604_1234
    assert all(board.get(bus, d) == 0xFFFF_FFFF for bus in range(1, 256) for d in (1, 3, 5))


def test_configuration_goes_by_the_numbers_that_the_guest_wrote() -> None:
    board = Board()
    board.put(BR1, BUSES, 0x90_40_00)
    assert board.get(0x40, 3) == 0xC501_1234
    board.put(0x40 << 8 | 5 << 3, BUSES, 0x80_77_40)
    assert board.get(0x77, 1) == 0xC501_1234
    board.put(BR1, BUSES, 0x76_40_00)
    assert board.get(0x77, 1) == 0xFFFF_FFFF, "past the subordinate number of the bridge before"
    board.put(BR1, BUSES, 0x90_77_00)
    assert board.get(0x40, 3) == 0xFFFF_FFFF
    assert board.get(0x77, 3) == 0xC501_1234
    assert board.get(0x77, 1) == 0xFFFF_FFFF, "two buses of one number: the nearer one has it"


@pytest.mark.parametrize("numbers", [0, 0x01_02_00, 0x01_00_00])
def test_numbers_that_lead_nowhere(numbers: int) -> None:
    board = numbered()
    board.put(BR1, BUSES, numbers)
    assert [board.get(bus, 3) for bus in (1, 2)] == [0xFFFF_FFFF] * 2
    assert board.get(0, 4) == 0x0604_1234, "bus 0 is the root's"


def test_of_two_bridges_the_first_has_a_number() -> None:
    board = Board()
    board.plug("other", Slot(6), PciBridge(FakeHost()))
    board.plug("third", Slot(9, 0, 3))
    board.put(6 << 3, BUSES, 0x02_01_00)
    assert board.get(1, 9) == 0xC501_1234
    board.put(BR1, BUSES, 0x01_01_00)
    assert (board.get(1, 9), board.get(1, 3)) == (0xFFFF_FFFF, 0xC501_1234)


@pytest.mark.parametrize("slot", [Slot(1, 0, 7), Slot(4, 0), Slot(7, 1, 1), Slot(32, 0, 1)])
def test_slots_that_cannot_be(slot: Slot) -> None:
    with pytest.raises(ValueError, match="slot"):
        Board().plug("x", slot)


# Windows.


def test_a_bar_outside_of_a_window_is_unreachable_until_it_is_inside() -> None:
    board = opened()
    board.put(NEAR, 0x10, 0xE100_0000)
    assert board.here() == [("far", 0xE000_1000)]
    (problem,) = board.root.problems()
    assert "does not pass it on" in problem
    assert board.root.collisions == 0
    board.put(BR1, MEMORY, 0xE100_E000)
    assert board.here() == [("far", 0xE000_1000), ("near", 0xE100_0000)]
    assert board.root.problems() == []


@pytest.mark.parametrize(
    ("bridge", "offset", "value", "left"),
    [
        (BR1, MEMORY, 0xE000_E000, ["far"]),
        (BR1, MEMORY, 0xE0F0_E010, ["near"]),
        (BR1, MEMORY, CLOSED, []),
        (BR1, COMMAND * 4, 0, []),
        (BR1, COMMAND * 4, 1, []),
        (BR2, COMMAND * 4, 0, ["near"]),
        (BR2, MEMORY, 0xE020_E010, ["near"]),
        (BR2, MEMORY, 0xE000_E000, ["far", "near"]),
    ],
)
def test_windows_move(bridge: int, offset: int, value: int, left: list[str]) -> None:
    board = opened()
    board.put(bridge, offset, value)
    assert [owner for owner, _ in board.here()] == left
    assert board.violations == []
    board.put(bridge, offset, 0xE0F0_E000 if offset == MEMORY else DECODE)
    assert [owner for owner, _ in board.here()] == ["far", "near"]


def test_ports_and_the_prefetchable_window() -> None:
    board = opened()
    board.put(NEAR, 0x20, 0xD000)
    board.put(NEAR, 0x1C, 0x1)
    board.put(NEAR, 0x18, 0x1000_0000)
    assert len(board.here()) == 2
    board.put(BR1, IO, 0xD0D0, 2)
    assert ("near", 0xD000) in board.here()
    board.put(BR1, UPPER_BASE, 1)
    board.put(BR1, UPPER_LIMIT, 1)
    board.put(BR1, PREFETCHABLE, 0x1000_1000)
    assert ("near", 0x1_1000_0000) in board.here()


def test_a_place_that_is_taken_is_a_collision_behind_a_bridge_too() -> None:
    board = opened()
    board.put(NEAR, 0x10, 0xE000_1000)
    assert board.here() == [("far", 0xE000_1000)]
    assert board.root.collisions == 1
    board.put(BR2, COMMAND * 4, 0)
    assert board.here() == [("near", 0xE000_1000)], "the other one is cut off"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([BR1, BR2]),
            st.sampled_from(
                [4, 4, MEMORY, MEMORY, IO, PREFETCHABLE, UPPER_BASE, UPPER_LIMIT, 0x3C]
            ),
            st.sampled_from([0, 3, 7, 0xE0F0_E000, 0xE010_E000, CLOSED, 0xD0C0, 0x0040_0000, 1])
            | st.integers(0, (1 << 32) - 1),
        ),
        max_size=12,
    ),
    st.lists(st.sampled_from([0xE000_0000, 0xE010_0000, 0xE0F0_1000, 0xF000_0000]), max_size=4),
)
def test_only_what_all_bridges_pass_on_is_reachable(
    writes: list[tuple[int, int, int]], places: list[int]
) -> None:
    board = opened()
    for place in places:
        board.put(NEAR, 0x10, place)
    for bridge, offset, value in writes:
        board.put(bridge, offset, value)
    path = {"near": ["br1"], "far": ["br1", "br2"]}
    for name, bridges in path.items():
        device = board.functions[name]
        registers = device.config.values
        wanted = registers[BAR0] if registers[COMMAND] & 2 else 0
        for before in bridges:
            values = board.functions[before].config.values
            window = windows(values, BusType.MMIO)
            inside = any(each.start <= wanted and wanted + 0xFFF < each.end for each in window)
            if not inside or values[15] & 0x40_0000:
                wanted = 0
        found = [at for owner, at in board.here() if owner == name and at >= 0x10000]
        assert found == ([wanted] if wanted else [])
    assert board.violations == []


# Pins and messages.


@pytest.mark.parametrize("pin", range(4))
def test_pins_are_swizzled(pin: int) -> None:
    board = Board()
    irqs = (10, 11, 12, 13)
    router = IntxRouter(lambda irq, level: None, irqs)
    router.bridges.update({1: Slot(4), 2: Slot(5, 0, 1)})
    assert router.irq_for(Slot(3, 0, 1), pin) == irqs[(4 + 3 + pin) % 4]
    assert router.irq_for(Slot(1, 0, 2), pin) == irqs[(4 + 5 + 1 + pin) % 4]
    assert board.root.irq_for(Slot(1, 0, 2), 0) == (10, 11, 10, 11)[(4 + 5 + 1) % 4]


def raise_pin(board: Board, name: str, level: bool) -> None:
    function = board.functions[name]
    function.write_bar(0, 0x18, 4, 1)
    function.write_bar(0, 0x14 if level else 0x10, 4, 1)


def test_a_shared_line_is_up_while_anyone_behind_any_bridge_says_so() -> None:
    board = opened()
    board.plug("root", Slot(2))
    line = board.root.irq_for(Slot(1, 0, 2), 0)
    assert board.root.irq_for(Slot(2), 0) == line
    raise_pin(board, "far", True)
    raise_pin(board, "root", True)
    raise_pin(board, "far", False)
    assert board.lines[line]
    raise_pin(board, "root", False)
    assert not board.lines[line]


def test_a_message_needs_every_bridge_to_be_a_master() -> None:
    board = opened()
    slot = board.slots["far"]
    for number in (FAR, BR2, BR1):
        assert not board.root.may_master(slot)
        board.put(number, COMMAND * 4, DECODE | MASTER)
    assert board.root.may_master(slot)
    board.put(BR1, COMMAND * 4, DECODE)
    assert not board.root.may_master(slot)


# Resets and failures.


def test_a_secondary_bus_reset_resets_all_that_is_behind() -> None:
    board = opened()
    raise_pin(board, "far", True)
    board.functions["far"].write_bar(0, 4, 4, 0x1234)
    board.put(BR1, CONTROL, 0x40, 2)
    assert board.here() == []
    assert not any(board.lines.values())
    assert board.get(1, 3) == 0xFFFF_FFFF, "held in reset"
    board.put(BR1, CONTROL, 0, 2)
    assert board.get(1, 3) == 0xC501_1234
    assert board.get(2, 1) == 0xFFFF_FFFF, "the bridge between has lost its numbers"
    assert board.root.read_config(NEAR, BAR0) == 0
    assert board.functions["far"].read_bar(0, 4, 4) == 0
    board.put(NEAR, 0x10, 0xE020_1000)
    board.put(NEAR, COMMAND * 4, DECODE)
    assert board.here() == [("near", 0xE020_1000)]
    assert board.violations == []


def test_a_failed_bridge_cuts_off_what_is_behind() -> None:
    board = opened()
    raise_pin(board, "far", True)
    board.root.fail("br1")
    assert board.here() == []
    assert not any(board.lines.values())
    raise_pin(board, "near", True)
    assert not any(board.lines.values())
    assert [board.get(bus, 3) for bus in (0, 1)] == [0xFFFF_FFFF] * 2
    assert board.root.bus_behind("br1") == 1


def test_an_unplugged_bridge_too() -> None:
    board = opened()
    board.root.remove(Slot(4))
    assert board.here() == []
    assert board.get(0, 4) == board.get(1, 3) == 0xFFFF_FFFF
    assert not board.root.may_master(board.slots["near"])


class Liar(PciBridge):
    """Says that a write to its windows moved a BAR, and that its windows are what they are not."""

    model: ClassVar[str] = "liar"

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        super().write_config(register, offset, data)
        place = Range(0xE000_0000, 0x1000)
        return ConfigWriteResult(mmio_add=[RegionRange(0, place)] if register == 8 else [])

    def read_config(self, register: int) -> int:
        return 0xFFF0_0000 if register == 8 else super().read_config(register)


def test_a_bridge_is_not_believed() -> None:
    board = Board()
    board.plug("liar", Slot(7), Liar(FakeHost()))
    board.plug("behind", Slot(0, 0, 3))
    board.put(7 << 3, BUSES, 0x09_09_00)
    board.put(7 << 3, COMMAND * 4, DECODE)
    board.put(9 << 8, 0x10, 0x1000_0000)
    board.put(9 << 8, COMMAND * 4, DECODE)
    assert board.here() == [], "what it says its windows are does not count"
    board.put(7 << 3, MEMORY, 0x1000_1000)
    assert board.here() == [("behind", 0x1000_0000)]
    ((owner, text),) = board.violations
    assert owner == "liar"
    assert "what the guest programmed is nothing" in text


class Impostor(ConfigSpaceDevice):
    """Has BARs and says that it is a bridge."""

    model: ClassVar[str] = "impostor"

    def read_config(self, register: int) -> int:
        return super().read_config(register) | (0x0001_0000 if register == 3 else 0)


def test_a_bridge_with_bars_is_refused() -> None:
    with pytest.raises(ValueError, match="bridge with BARs"):
        Board().plug("impostor", Slot(9), Impostor(FakeHost()))


# State.


def test_state_goes_over() -> None:
    board, fresh = opened(), Board()
    board.put(NEAR, 0x10, 0xE100_0000)
    raise_pin(board, "far", True)
    saved = json.loads(json.dumps(board.root.snapshot()))
    fresh.root.restore(saved)
    for name, function in board.functions.items():
        fresh.functions[name].restore(json.loads(json.dumps(function.snapshot())))
    fresh.root.remap()
    assert fresh.here() == board.here() == [("far", 0xE000_1000)]
    assert fresh.violations == []
    assert json.loads(json.dumps(fresh.root.snapshot())) == saved
    assert fresh.get(2, 1) == 0xC501_1234
    fresh.put(BR1, MEMORY, 0xE100_E000)
    assert ("near", 0xE100_0000) in fresh.here()


@pytest.mark.parametrize(("key", "value"), [("0x18", 1 << 24), ("0x1c", 1), ("0x10", 0)])
def test_a_shadow_that_is_not_a_bridges_is_refused(key: str, value: int) -> None:
    board = opened()
    saved: Any = board.root.snapshot()
    saved["functions"]["00:04.0"]["shadow"][key] = value
    with pytest.raises(DeviceError, match="pci-root"):
        board.root.restore(saved)


# Assigning resources.


class Sized(PciFunction):
    """Memory of both sorts and ports, of any sizes; 0: none."""

    model: ClassVar[str] = "sized"

    def __init__(self, memory: int, ports: int, prefetchable: int = 0, wide: bool = True) -> None:
        self.sizes = memory, ports, prefetchable, wide
        super().__init__(FakeHost())

    def header(self) -> Header:
        memory, ports, prefetchable, wide = self.sizes
        bars = []
        if memory:
            bars.append(BarInfo(0, 0, BusType.MMIO, memory))
        if ports:
            bars.append(BarInfo(1, len(bars), BusType.PIO, ports))
        if prefetchable:
            bars.append(BarInfo(2, len(bars), BusType.MMIO, prefetchable, wide, True))
        return Header(1, 2, 0, bars=tuple(bars))


FUNCTIONS = st.tuples(
    st.sampled_from([0x1000, 0x10_0000, 0x80_0000]),
    st.sampled_from([0, 16]),
    st.sampled_from([0, 0x1000, 0x40_0000]),
    st.booleans(),
)
TREES = st.recursive(
    st.lists(FUNCTIONS, max_size=2),
    lambda inner: st.lists(FUNCTIONS | inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=80, deadline=None)
@given(TREES)
def test_everything_is_reachable_after_assigning(tree: list[Any]) -> None:
    board = Board()
    expected: list[str] = []
    with_ports = []

    def plant(branch: list[Any], bus: int) -> None:
        for device, leaf in enumerate(branch, 10):
            name = f"{bus}-{device}"
            if isinstance(leaf, tuple):
                board.plug(name, Slot(device, 0, bus), Sized(*leaf))
                expected.append(name)
                with_ports.append(bool(leaf[1]))
            else:
                board.plug(name, Slot(device, 0, bus), PciBridge(FakeHost()))
                behind = board.root.bus_behind(name)
                assert behind is not None
                plant(leaf, behind)

    plant(tree, 0)
    # Bridges need 4 KiB of ports each, of which there are four times as many.
    homeless = board.root.assign_resources()
    assert all("pio" in line for line in homeless)
    memory = {entry.owner for entry in board.mmio}
    assert memory == {*expected, "near", "far"}
    ports = {entry.owner for entry in board.io}
    assert homeless or len(ports) == sum(with_ports) + 2
    assert board.violations == []
    assert board.root.collisions == 0
    closed = [line for line in board.root.problems() if "does not pass" not in line]
    assert closed == []
    for entry in board.mmio:
        slot = board.slots[entry.owner]
        if slot.bus:  # each bridge before it has it in the window of its sort
            before = next(n for n in board.slots if board.root.bus_behind(n) == slot.bus)
            plain, prefetchable = bridge_windows(board.functions[before].config.values)
            bars = board.functions[entry.owner].bars()
            index = board.functions[entry.owner].config.placed.index(entry.range)
            window = prefetchable if bars[index].prefetchable else plain
            assert window is not None
            assert window.start <= entry.start
            assert entry.end <= window.end


def bridge_windows(registers: list[int]) -> list[Range | None]:
    """That for memory, and that for prefetchable memory; None: closed."""
    found: list[Range | None] = []
    for register, upper in ((MEMORY // 4, (0, 0)), (PREFETCHABLE // 4, (10, 11))):
        value, high = registers[register], [registers[n] << 32 if n else 0 for n in upper]
        base, limit = high[0] | (value & 0xFFF0) << 16, high[1] | value & 0xFFF0_0000 | 0xF_FFFF
        found.append(Range(base, limit + 1 - base) if base <= limit else None)
    return found


def test_prefetchable_memory_alone_opens_one_window() -> None:
    board = Board()
    board.plug("br3", Slot(9), PciBridge(FakeHost()))
    behind = board.root.bus_behind("br3")
    assert behind is not None
    board.plug("frame buffer", Slot(1, 0, behind), Sized(0, 0, 0x100_0000))
    assert board.root.assign_resources() == []
    plain, prefetchable = bridge_windows(board.functions["br3"].config.values)
    assert plain is None
    assert prefetchable is not None
    assert prefetchable.end - prefetchable.start == 0x100_0000
    assert prefetchable.end <= 1 << 32


def test_bus_numbers_are_given_in_depth_first_order() -> None:
    board = Board()
    board.plug("br3", Slot(9), PciBridge(FakeHost()))
    assert board.root.assign_resources() == []
    numbers = {name: board.functions[name].read_config(6) for name in ("br1", "br2", "br3")}
    assert numbers == {"br1": 0x02_01_00, "br2": 0x02_02_01, "br3": 0x03_03_00}
    closed = board.functions["br3"].config.values
    assert windows(closed, BusType.MMIO) == windows(closed, BusType.PIO) == []
