"""The PCI root: mechanism #1, ranges on the buses, interrupts, hostile functions, state."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.bus import Bus, BusType, Range
from devices.errors import DeviceError
from devices.pci.config import Header
from devices.pci.config_space import ConfigSpaceDevice
from devices.pci.contract import BarInfo, ConfigWriteResult, RegionRange
from devices.pci.decode import BAR0, COMMAND, Command
from devices.pci.function import PciFunction
from devices.pci.host_bridge import PciRoot
from devices.pci.intx import Slot
from devices.pci.resources import first_fit

IO, MEM = int(Command.IO_SPACE), int(Command.MEMORY_SPACE)
ADDRESS, DATA = 0xCF8, 0xCFC
ENABLE = 1 << 31
LIMIT = 1 << 40


class Board:
    """A root on two buses, and the guest's way to it."""

    def __init__(self, **root: Any) -> None:
        self.mmio = Bus(BusType.MMIO, LIMIT)
        self.io = Bus(BusType.PIO, 0x10000)
        self.lines: list[tuple[int, bool]] = []
        self.violations: list[tuple[str, str]] = []
        self.removed: list[tuple[str, Slot]] = []
        self.fail_violators = False
        self.root = PciRoot(
            FakeHost(),
            self.mmio,
            self.io,
            set_irq_line=lambda irq, level: self.lines.append((irq, level)),
            on_violation=self.violation,
            on_removed=lambda owner, slot: self.removed.append((owner, slot)),
            **root,
        )
        self.io.insert(Range(ADDRESS, 8), self.root, "pci")

    def violation(self, owner: str, text: str) -> None:
        self.violations.append((owner, text))
        if self.fail_violators:
            self.root.fail(owner)

    def plug(
        self, slot: Slot | int, function: PciFunction | None = None, owner: str = ""
    ) -> PciFunction:
        where = Slot(slot) if isinstance(slot, int) else slot
        function = function or ConfigSpaceDevice(PinHost(self.root, where))
        owner = owner or f"dev{where.device}.{where.function}"
        self.root.add(slot, function, owner, function.handlers(), function.bars())
        return function

    def read(self, slot: Slot | int, register: int) -> int:
        self.select(slot, register)
        return self.io.read(DATA, 4)

    def write(
        self, slot: Slot | int, register: int, value: int, size: int = 4, lane: int = 0
    ) -> None:
        self.select(slot, register)
        self.io.write(DATA + lane, size, value)

    def select(self, slot: Slot | int, register: int) -> None:
        where = Slot(slot) if isinstance(slot, int) else slot
        self.io.write(ADDRESS, 4, ENABLE | where.number << 8 | register << 2)

    def ranges(self) -> list[tuple[str, str, Range]]:
        both = [("mmio", e) for e in self.mmio] + [("pio", e) for e in self.io]
        return sorted((kind, e.owner, e.range) for kind, e in both if e.owner != "pci")


class PinHost(FakeHost):
    """As the machine wires it: the pin goes to the root."""

    def __init__(self, root: PciRoot, slot: Slot) -> None:
        super().__init__()
        self.root, self.slot = root, slot

    def set_irq(self, level: bool, pin: int = 0) -> None:
        super().set_irq(level, pin)
        self.root.set_intx(self.slot, pin, level)


class Simple(PciFunction):
    """One 4 KiB memory BAR; the multi-function bit set, which is not its to set."""

    model: ClassVar[str] = "simple"
    id: ClassVar[int] = 1

    def header(self) -> Header:
        return Header(0x1234, self.id, 0, bars=(BarInfo(0, 0, BusType.MMIO, 0x1000),))

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return 0x77

    def read_config(self, register: int) -> int:
        return super().read_config(register) | (0x0080_0000 if register == 3 else 0)


# Mechanism #1.


def test_the_bridge_is_found_first() -> None:
    board = Board()
    assert board.read(0, 0) == 0x0600_1234
    assert board.read(0, 2) >> 16 == 0x0600
    assert board.root.slots() == [(Slot(0), "pci-host-bridge")]


def test_config_address_is_one_dword() -> None:
    board = Board()
    board.io.write(ADDRESS, 4, 0xFFFF_FFFF)
    assert board.io.read(ADDRESS, 4) == 0x80FF_FFFC
    unclaimed = board.root.unclaimed_reads
    for offset in range(4):
        for size in (1, 2):
            assert board.io.read(ADDRESS + offset, size) == (1 << 8 * size) - 1
            board.io.write(ADDRESS + offset, size, 0)
    assert board.io.read(ADDRESS, 4) == 0x80FF_FFFC
    assert board.root.unclaimed_reads == unclaimed + 8
    assert board.root.unclaimed_writes == 8


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("port", range(0xCF5, 0xD01))
def test_byte_lanes(port: int, size: int) -> None:
    board = Board()
    board.plug(3)
    board.select(3, 11)  # subsystem ids: read-only, four different bytes
    whole = 0xC501_1234
    ones = (1 << 8 * size) - 1
    lane = port - DATA
    inside = 0 <= lane <= 4 - size
    expected = whole >> 8 * lane & ones if inside else ones
    if port == ADDRESS and size == 4:
        expected = ENABLE | 3 << 11 | 11 << 2
    assert board.io.read(port, size) == expected


@pytest.mark.parametrize(
    ("lane", "size", "changed"),
    [
        (0, 1, 0xFFFF_FFA5),
        (0, 2, 0xFFFF_5AA5),
        (0, 4, 0x5AA5_5AA5),
        (1, 1, 0xFFFF_A5FF),
        (1, 2, 0xFF5A_A5FF),
        (2, 1, 0xFFA5_FFFF),
        (2, 2, 0x5AA5_FFFF),
        (3, 1, 0xA5FF_FFFF),
        (1, 4, 0xFFFF_FFFF),
        (2, 4, 0xFFFF_FFFF),
        (3, 2, 0xFFFF_FFFF),
        (3, 4, 0xFFFF_FFFF),
    ],
)
def test_byte_lanes_of_writes(lane: int, size: int, changed: int) -> None:
    board = Board()
    board.plug(3)
    board.write(3, BAR0 + 3, 0xFFFF_FFFF)  # all bits of a high half are writable
    board.write(3, BAR0 + 3, 0x5AA5_5AA5 & ((1 << 8 * size) - 1), size, lane)
    assert board.read(3, BAR0 + 3) == changed
    assert board.violations == []


def test_only_the_bytes_of_the_access_are_written() -> None:
    board = Board()
    board.plug(3)
    board.write(3, BAR0 + 3, 0x1_23, 1)
    assert board.read(3, BAR0 + 3) == 0x23


def test_without_the_enable_bit_nobody_answers() -> None:
    board = Board()
    board.io.write(ADDRESS, 4, 0)
    assert board.io.read(DATA, 4) == 0xFFFF_FFFF
    board.io.write(DATA, 4, 0)
    assert (board.root.unclaimed_reads, board.root.unclaimed_writes) == (1, 1)


@pytest.mark.parametrize("slot", [Slot(1), Slot(31, 7), Slot(3, 1), Slot(0, 0, 1), Slot(3, 0, 255)])
def test_missing_functions_read_all_ones(slot: Slot) -> None:
    board = Board()
    board.plug(3)
    for register in (0, 3, 15, 63):
        assert board.read(slot, register) == 0xFFFF_FFFF
    board.write(slot, COMMAND, 0xFFFF)
    assert board.read(3, COMMAND) & 0xFFFF == 0


def test_registers_past_the_conventional_space_are_zero() -> None:
    board = Board()
    assert board.root.read_config(0, 64) == 0
    assert board.root.read_config(8, 64) == 0xFFFF_FFFF, "nobody is there"
    board.root.write_config(0, 64, 0, b"\x00")


def test_the_multi_function_bit_is_the_roots() -> None:
    board = Board()
    board.plug(4, Simple(FakeHost()))
    assert board.read(4, 3) == 0
    board.plug(Slot(4, 2), Simple(FakeHost()))
    assert board.read(4, 3) == 0x0080_0000
    assert board.read(Slot(4, 2), 3) == 0x0080_0000
    board.select(4, 3)
    assert board.io.read(DATA + 2, 1) == 0x80
    board.root.remove(Slot(4, 2))
    assert board.read(4, 3) == 0


@pytest.mark.parametrize(
    "slot", [Slot(0), Slot(32), Slot(-1), Slot(3, 8), Slot(1, 0, 1), Slot(5, 1)]
)
def test_slots_that_cannot_be(slot: Slot) -> None:
    board = Board()
    with pytest.raises(ValueError, match="slot"):
        board.plug(slot)


def test_bars_without_handlers_are_refused() -> None:
    board, function = Board(), Simple(FakeHost())
    with pytest.raises(ValueError, match="region"):
        board.root.add(1, function, "x", (), function.bars())
    with pytest.raises(ValueError, match="power of two"):
        board.root.add(1, function, "x", function.handlers(), [BarInfo(0, 0, BusType.MMIO, 24)])


# Ranges.


def test_a_bar_is_reached_where_the_guest_puts_it() -> None:
    board = Board()
    board.plug(3)
    board.write(3, BAR0, 0xE000_0000)
    assert board.mmio.read(0xE000_0000, 4) == 0xFFFF_FFFF
    board.write(3, COMMAND, MEM | IO, 2)
    assert board.mmio.read(0xE000_0000, 4) == 0x43464753
    board.mmio.write(0xE000_0004, 4, 0x1234_5678)
    board.write(3, BAR0 + 4, 0xC100)
    assert board.io.read(0xC104, 2) == 0x5678
    board.write(3, BAR0, 0xE100_0000)
    assert board.mmio.read(0xE000_0004, 4) == 0xFFFF_FFFF
    assert board.mmio.read(0xE100_0004, 4) == 0x1234_5678
    board.write(3, BAR0 + 2, 0x4000_0000)
    board.write(3, BAR0 + 3, 0x10)
    board.mmio.write(0x10_4000_8000, 8, 0x1122_3344_5566_7788)
    assert board.mmio.read(0x10_4000_8004, 4) == 0x1122_3344
    board.write(3, COMMAND, IO, 2)
    assert [owner for _, owner, _ in board.ranges()] == ["dev3.0"]
    board.write(3, COMMAND, 0, 2)
    assert board.ranges() == []
    assert board.violations == []
    assert board.root.problems() == []


def test_sizing_with_decoding_on_shows_nothing_at_the_top() -> None:
    board = Board()
    board.plug(3)
    board.root.assign_resources()
    before = board.ranges()
    for register in range(BAR0, BAR0 + 6):
        old = board.read(3, register)
        board.write(3, register, 0xFFFF_FFFF)
        board.write(3, register, old)
    assert board.ranges() == before
    assert board.root.problems() == []


def two_on_one_place() -> Board:
    board = Board()
    board.plug(3)
    board.plug(4)
    for slot in (4, 3):  # the later slot is there first
        board.write(slot, BAR0, 0xE000_0000)
        board.write(slot, COMMAND, MEM, 2)
    return board


def test_a_collision_leaves_the_second_unreachable() -> None:
    board = two_on_one_place()
    assert board.ranges() == [("mmio", "dev4.0", Range(0xE000_0000, 0x1000))]
    assert board.root.collisions == 1
    (problem,) = board.root.problems()
    assert "00:03.0 'dev3.0' BAR 0" in problem
    assert "'dev4.0' at 0xe0000000-0xe0000fff" in problem
    assert board.violations == []


@pytest.mark.parametrize("how", ["move", "decode", "remove", "fail", "size"])
def test_when_the_blocker_leaves_the_other_is_reached(how: str) -> None:
    board = two_on_one_place()
    {
        "move": lambda: board.write(4, BAR0, 0xE200_0000),
        "decode": lambda: board.write(4, COMMAND, 0, 2),
        "remove": lambda: board.root.remove(4),
        "fail": lambda: board.root.fail("dev4.0"),
        "size": lambda: board.write(4, BAR0, 0xFFFF_FFFF),
    }[how]()
    assert ("mmio", "dev3.0", Range(0xE000_0000, 0x1000)) in board.ranges()
    assert board.root.problems() == []


def test_the_second_may_give_up_its_wish() -> None:
    board = two_on_one_place()
    board.write(3, BAR0, 0xE300_0000)
    assert board.root.problems() == []
    board.write(4, COMMAND, 0, 2)
    assert board.ranges() == [("mmio", "dev3.0", Range(0xE300_0000, 0x1000))]


def test_another_device_can_be_in_the_way() -> None:
    board = Board()
    board.plug(3)
    blocker = Range(0xC108, 4)
    board.io.insert(blocker, Simple(FakeHost()).handlers()[0], "echo")
    board.write(3, BAR0 + 4, 0xC100)
    board.write(3, COMMAND, IO, 2)
    assert "'echo'" in board.root.problems()[0]
    board.io.remove(blocker, "echo")
    board.root.retry()
    assert board.root.problems() == []
    assert board.io.read(0xC100, 4) == 0x43464753


@pytest.mark.parametrize(("register", "value"), [(BAR0 + 4, 0x1_0000), (BAR0 + 3, 0x1_0000)])
def test_beyond_the_space_is_unreachable(register: int, value: int) -> None:
    board = Board()
    board.plug(3)
    board.write(3, COMMAND, MEM | IO, 2)
    board.write(3, register, value)
    assert board.ranges() == []
    assert "leaves the space" in board.root.problems()[0]


def test_ram_is_never_covered() -> None:
    board = Board()
    board.mmio.reserve(Range(0, 0x800_0000))
    board.plug(3)
    board.write(3, COMMAND, MEM, 2)
    board.write(3, BAR0, 0x10_0000)
    assert board.ranges() == []
    assert "RAM" in board.root.problems()[0]


# At boot.


def test_resources_are_assigned_aligned_and_apart() -> None:
    board = Board()
    board.io.insert(Range(0xC004, 4), Simple(FakeHost()).handlers()[0], "echo")
    for slot in range(1, 6):
        board.plug(slot)
    assert board.root.assign_resources() == []
    mine = [r for r in board.ranges() if r[1] != "echo"]
    assert len(mine) == 15
    for kind, _, place in mine:
        assert place.start % place.length == 0
        window = Range(0xC000_0000, 0x3EC0_0000) if kind == "mmio" else Range(0xC000, 0x4000)
        assert window.start <= place.start
        assert place.end <= window.end
    for slot in range(1, 6):
        assert board.read(slot, 15) & 0xFF == board.root.irq_for(slot, 0)
        assert board.read(slot, COMMAND) & 7 == MEM | IO
    before = board.ranges()
    assert board.root.assign_resources() == []
    assert board.ranges() == before, "doing it again changes nothing"
    board.root.assign_resources(decode=False)
    assert [r[1] for r in board.ranges()] == ["echo"]


def test_what_finds_no_place_stays_unassigned_and_is_named() -> None:
    board = Board()
    board.plug(1)
    board.plug(2)
    lines = board.root.assign_resources(Range(0xE000_0000, 0x1_1000))
    assert len(lines) == 2
    assert "00:02.0 'dev2.0' BAR 2: no 0x10000 bytes are free" in "".join(lines)
    assert board.read(2, BAR0 + 2) == 0xC
    assert board.read(2, COMMAND) & MEM
    assert len(board.mmio) == 2
    assert board.violations == []


def test_largest_first_wastes_nothing() -> None:
    assert first_fit([16, 64, 32, 16], Range(0x80, 0x80), []) == [0xE0, 0x80, 0xC0, 0xF0]


@given(
    st.lists(st.integers(0, 9).map(lambda n: 1 << n), max_size=12),
    st.lists(st.builds(Range, st.integers(0, 1500), st.integers(1, 200)), max_size=4),
    st.integers(1, 700),
    st.integers(1, 1024),
)
def test_first_fit(sizes: list[int], taken: list[Range], start: int, length: int) -> None:
    window = Range(start, length)
    found = first_fit(sizes, window, taken)
    used = list(taken)
    for size, address in zip(sizes, found, strict=True):
        if address is not None:
            place = Range(address, size)
            assert address % size == 0
            assert window.start <= address
            assert place.end <= window.end
            assert not any(place.overlaps(other) for other in used)
            used.append(place)
    for size, address in zip(sizes, found, strict=True):
        if address is None:
            for candidate in range(-(-start // size) * size, window.end - size + 1, size):
                assert any(Range(candidate, size).overlaps(other) for other in used)


# Interrupts.


def test_pins_are_swizzled_over_four_lines() -> None:
    root = Board(irqs=(5, 9, 10, 11)).root
    table = [[root.irq_for(device, pin) for pin in range(4)] for device in range(5)]
    assert table == [[5, 9, 10, 11], [9, 10, 11, 5], [10, 11, 5, 9], [11, 5, 9, 10], [5, 9, 10, 11]]
    assert [Board().root.irq_for(device, 0) for device in range(4)] == [10, 11, 10, 11]
    with pytest.raises(ValueError, match="PIRQ"):
        Board(irqs=(1, 2))


def test_a_shared_line_is_high_while_any_pin_is() -> None:
    board = Board()
    for slot in (1, 2, 3):
        board.plug(slot)
    board.root.set_intx(1, 0, True)
    board.root.set_intx(1, 0, True)
    board.root.set_intx(3, 0, True)  # the same line by another PIRQ
    board.root.set_intx(2, 0, True)
    board.root.set_intx(1, 0, False)
    assert board.lines == [(11, True), (10, True)]
    board.root.set_intx(3, 0, False)
    assert board.lines[2:] == [(11, False)]
    board.root.remove(2)
    assert board.lines[3:] == [(10, False)]
    board.root.set_intx(2, 0, True)
    assert board.lines[4:] == []


def test_a_pin_that_is_not_there_is_a_violation() -> None:
    board = Board()
    board.plug(1)
    for pin in (-1, 4, 1 << 40):
        board.root.set_intx(1, pin, True)
    assert [owner for owner, _ in board.violations] == ["dev1.0"] * 3
    assert board.lines == []


# Failed and removed functions.


def test_a_failed_device_reads_all_ones_and_leaves_the_buses() -> None:
    board = Board()
    board.plug(3)
    board.root.assign_resources()
    board.root.set_intx(3, 0, True)
    board.root.fail("dev3.0")
    assert board.ranges() == []
    assert board.read(3, 0) == 0xFFFF_FFFF
    assert board.read(3, 3) == 0xFFFF_FFFF
    board.write(3, COMMAND, 0xFFFF)
    assert board.ranges() == []
    assert board.lines == [(11, True), (11, False)]
    board.root.set_intx(3, 0, True)
    assert len(board.lines) == 2
    board.root.fail("dev3.0")
    assert board.violations == []


class Proxied(ConfigSpaceDevice):
    """Answers configuration writes as `lie` says."""

    lie: Callable[[ConfigWriteResult], ConfigWriteResult] = staticmethod(lambda honest: honest)

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        return self.lie(super().write_config(register, offset, data))


def test_a_device_that_fails_during_the_write_is_no_liar() -> None:
    board = Board()
    function = Proxied(FakeHost())
    board.plug(3, function, "it")

    def die(honest: ConfigWriteResult) -> ConfigWriteResult:
        board.root.fail("it")
        return ConfigWriteResult()

    board.root.assign_resources()
    function.lie = die
    board.write(3, BAR0, 0xE000_0000)
    assert board.ranges() == []
    assert board.violations == []


def some(region: int, start: int, length: int) -> list[RegionRange]:
    return [RegionRange(region, Range(start, length))]


RIGHT_OLD, RIGHT_NEW = some(0, 0xE000_0000, 0x1000), some(0, 0xE100_0000, 0x1000)
LIES = {
    "nothing": ConfigWriteResult(),
    "no removal": ConfigWriteResult(mmio_add=RIGHT_NEW),
    "no addition": ConfigWriteResult(mmio_remove=RIGHT_OLD),
    "wrong place": ConfigWriteResult(RIGHT_OLD, some(0, 0xE110_0000, 0x1000)),
    "too long": ConfigWriteResult(RIGHT_OLD, some(0, 0xE100_0000, 0x2000)),
    "wrong region": ConfigWriteResult(RIGHT_OLD, some(1, 0xE100_0000, 0x1000)),
    "no region": ConfigWriteResult(RIGHT_OLD, some(99, 0xE100_0000, 0x1000)),
    "negative region": ConfigWriteResult(RIGHT_OLD, some(-1, 0xE100_0000, 0x1000)),
    "wrong bus": ConfigWriteResult(RIGHT_OLD, [], [], RIGHT_NEW),
    "twice": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW * 2),
    "many": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW * 1000),
    "another's": ConfigWriteResult(some(0, 0xE800_0000, 0x1000), RIGHT_NEW),
    "more": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW, [], some(2, 0xC000, 16)),
    "unplugs another": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW, [], [], [Slot(4).number]),
    "unplugs the bridge": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW, [], [], [0]),
    "unplugs nothing": ConfigWriteResult(RIGHT_OLD, RIGHT_NEW, [], [], [-1]),
}


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_function_changes_nothing_but_itself(lie: str, isolate: bool) -> None:
    board = Board()
    board.fail_violators = isolate
    function = Proxied(FakeHost())
    board.plug(3, function, "liar")
    board.plug(4)
    board.write(4, BAR0, 0xE800_0000)
    board.write(4, COMMAND, MEM, 2)
    board.write(3, BAR0, 0xE000_0000)
    board.write(3, COMMAND, MEM, 2)
    function.lie = lambda honest: LIES[lie]
    board.write(3, BAR0, 0xE100_0000)
    assert [owner for owner, _ in board.violations] == ["liar"]
    honest = ("mmio", "dev4.0", Range(0xE800_0000, 0x1000))
    own = ("mmio", "liar", Range(0xE100_0000, 0x1000))
    assert board.ranges() == ([honest] if isolate else [honest, own])
    assert board.removed == []
    assert board.root.slots()[0][0] == Slot(0)


def test_a_lie_about_a_register_that_moves_nothing() -> None:
    board = Board()
    function = Proxied(FakeHost())
    board.plug(3, function, "liar")
    function.lie = lambda honest: ConfigWriteResult(mmio_add=RIGHT_NEW)
    board.write(3, 15, 0x0A, 1)
    assert board.ranges() == []
    assert "mmio_add region 0 at 0xe1000000" in board.violations[0][1]


def test_a_device_unplugs_its_own_function() -> None:
    board = Board()
    function = Proxied(FakeHost())
    board.plug(3, function, "dock")
    board.plug(Slot(3, 1), Simple(FakeHost()), "dock")
    board.root.assign_resources()
    function.lie = lambda honest: ConfigWriteResult(removed_pci_devices=[Slot(3, 1).number])
    board.write(3, 15, 1, 1)
    assert board.removed == [("dock", Slot(3, 1))]
    assert board.read(Slot(3, 1), 0) == 0xFFFF_FFFF
    assert len(board.mmio) == 2
    assert board.violations == []


# State.


def restored(
    board: Board, fresh: Board, functions: Sequence[tuple[PciFunction, PciFunction]]
) -> None:
    for old, new in functions:
        new.restore(json.loads(json.dumps(old.snapshot())))
    fresh.root.restore(json.loads(json.dumps(board.root.snapshot())))
    fresh.root.remap()


def test_state_goes_over_with_collisions_as_they_were() -> None:
    board, fresh = two_on_one_place(), Board()
    old = [board.root._topology.seats[Slot(s).number].function for s in (3, 4)]
    new = [fresh.plug(3), fresh.plug(4)]
    board.write(0, COMMAND, 0x100, 2)
    board.select(3, 7)
    board.mmio.write(0xE000_0018, 4, 1)
    board.mmio.write(0xE000_0014, 4, 1)  # dev4 raises its pin
    assert board.lines == [(10, True)]
    restored(board, fresh, list(zip(old, new, strict=True)))  # type: ignore[arg-type]
    assert fresh.ranges() == board.ranges()
    assert fresh.root.problems() == board.root.problems()
    assert fresh.root.snapshot() == board.root.snapshot()
    assert fresh.io.read(ADDRESS, 4) == board.io.read(ADDRESS, 4)
    assert fresh.lines[-2:] == [(10, True), (11, False)]
    assert fresh.violations == []
    assert fresh.root.collisions == 0
    fresh.mmio.write(0xE000_0010, 4, 1)
    assert fresh.lines[-1] == (10, False)
    assert fresh.read(0, COMMAND) == 0x100
    fresh.write(4, COMMAND, 0, 2)
    assert ("mmio", "dev3.0", Range(0xE000_0000, 0x1000)) in fresh.ranges()


def test_restoring_into_a_machine_that_ran_on() -> None:
    board = Board()
    function = board.plug(3)
    board.root.assign_resources()
    before = board.ranges()
    saved = json.loads(json.dumps([function.snapshot(), board.root.snapshot()]))
    board.write(3, BAR0, 0xE000_0000)
    board.write(3, COMMAND, IO, 2)
    function.restore(saved[0])
    board.root.restore(saved[1])
    board.root.remap()
    assert board.ranges() == before
    assert board.violations == []
    assert json.loads(json.dumps(board.root.snapshot())) == saved[1]


def test_an_unplugged_function_stays_unplugged() -> None:
    board, fresh = Board(), Board()
    board.plug(3)
    fresh.plug(3)
    board.root.remove(3)
    restored(board, fresh, [])
    assert fresh.root.snapshot() == board.root.snapshot()
    assert fresh.removed == [("dev3.0", Slot(3))]
    assert fresh.read(3, 0) == 0xFFFF_FFFF
    with pytest.raises(DeviceError, match="no function at 00:03"):
        board.root.restore(_with_function())


def _with_function() -> Any:
    board = Board()
    board.plug(3)
    return board.root.snapshot()


def test_a_function_that_differs_from_the_saved_shadow_is_at_fault() -> None:
    board = Board()
    function = board.plug(3)
    board.root.assign_resources()
    before = board.ranges()
    saved = board.root.snapshot()
    other = ConfigSpaceDevice(FakeHost())
    function.restore(other.snapshot())  # a child that restored something else
    board.root.restore(saved)
    board.root.remap()
    assert board.ranges() == before
    ((owner, text),) = board.violations
    assert owner == "dev3.0"
    assert "after restore, register 0x04" in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["address"], 0x8000_0001),
        (["address"], 1 << 32),
        (["address"], -1),
        (["address"], "x"),
        (["bridge", "registers", 0], 0),
        (["functions"], {}),
        (["functions", "00:03.0", "owner"], "other"),
        (["functions", "00:03.0", "shadow", "0x04"], 8),
        (["functions", "00:03.0", "shadow", "0x04"], -1),
        (["functions", "00:03.0", "shadow", "0x10"], 0x10),
        (["functions", "00:03.0", "shadow", "0x3c"], 0),
        (["functions", "00:03.0", "shadow"], {}),
        (["functions", "00:03.0", "unreachable"], [3]),
        (["functions", "00:03.0", "unreachable"], [-1]),
        (["functions", "00:03.0", "unreachable"], [0]),
        (["functions", "00:03.0", "pins"], [4]),
        (
            ["functions", "00:07.0"],
            {"owner": "x", "shadow": {}, "unreachable": [], "pins": []},
        ),
        (["surprise"], 1),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(path: list[Any], value: Any) -> None:
    board = Board()
    board.plug(3)
    board.write(3, BAR0, 0xE000_0000)
    before = json.loads(json.dumps(board.root.snapshot()))
    saved = json.loads(json.dumps(before))
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DeviceError, match="pci-root"):
        board.root.restore(saved)
    assert json.loads(json.dumps(board.root.snapshot())) == before


# All of it at random, against a simple statement of what must hold.

SLOTS = [Slot(1), Slot(2), Slot(2, 3), Slot(5)]
ADDRESSES = [0, 0xC000_0000, 0xC000_1000, 0xC001_0000, 0xFFFF_FFFF, 0xFEE0_0000, 0xC000, 0xC010]
VALUES = st.one_of(st.sampled_from([*ADDRESSES, 0x20, 0xFFFF_F000]), st.integers(0, 0xFFFF_FFFF))


def wanted(board: Board, functions: dict[Slot, PciFunction]) -> dict[tuple[str, str, int], Range]:
    """By reading the configuration spaces as software does: (bus, owner, bar) -> place."""
    found: dict[tuple[str, str, int], Range] = {}
    for slot, function in functions.items():
        command = board.root.read_config(slot.number, COMMAND)
        for info in function.bars():
            value = board.root.read_config(slot.number, BAR0 + info.bar)
            width = 1 << 32
            if info.bus is BusType.PIO:
                on, address = command & IO, value & ~3
            else:
                on, address = command & MEM, value & ~15
            if info.is_64bit:
                address |= board.root.read_config(slot.number, BAR0 + info.bar + 1) << 32
                width = 1 << 64
            if on and address and address + info.size != width:
                owner = f"dev{slot.device}.{slot.function}"
                found[info.bus.value, owner, info.bar] = Range(address, info.size)
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_buses_hold_exactly_the_decoded_bars_that_fit(data: st.DataObject) -> None:
    board = Board()
    fixed = Range(0xC000_2000, 0x1000)
    board.mmio.insert(fixed, Simple(FakeHost()).handlers()[0], "fixed")
    functions: dict[Slot, PciFunction] = {}
    for slot in SLOTS:
        functions[slot] = board.plug(slot)
    last: dict[str, set[Range]] = {"mmio": set(), "pio": set()}
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["bar"] * 6 + ["command"] * 3 + ["any", "restore"]))
        slot = data.draw(st.sampled_from(SLOTS))
        if action == "restore":
            saved = json.loads(json.dumps([f.snapshot() for f in functions.values()]))
            root = json.loads(json.dumps(board.root.snapshot()))
            for function, state in zip(functions.values(), saved, strict=True):
                function.restore(state)
            board.root.restore(root)
            board.root.remap()
        elif action == "command":
            board.write(slot, COMMAND, data.draw(st.integers(0, 3)), 2)
        elif action == "bar":
            board.write(slot, BAR0 + data.draw(st.integers(0, 5)), data.draw(VALUES))
        else:
            lane = data.draw(st.integers(0, 3))
            size = data.draw(st.sampled_from([1, 2, 4]))
            register = data.draw(st.integers(0, 20))
            board.write(slot, register, data.draw(VALUES) & ((1 << 8 * size) - 1), size, lane)
        assert board.violations == []
        wishes = wanted(board, functions)
        for kind, bus, limit in (("mmio", board.mmio, LIMIT), ("pio", board.io, 0x10000)):
            mapped = {(e.owner, e.range) for e in bus if e.owner not in ("fixed", "pci")}
            asked = {(owner, r) for (k, owner, _), r in wishes.items() if k == kind}
            assert mapped <= asked, "nothing is mapped that no BAR asks for"
            for owner, place in asked - mapped:
                blocked = place.end > limit or any(e.range.overlaps(place) for e in bus)
                assert blocked, f"{owner} at {place} is in nobody's way"
            for owner, place in mapped:
                entry = bus.find(place.start)
                assert entry is not None
                assert (entry.owner, entry.range) == (owner, place)
            kept = {r for r in last[kind] if any(r == a for _, a in asked)}
            assert kept <= {r for _, r in mapped}, "who is reachable stays reachable"
            last[kind] = {r for _, r in mapped}
        unreachable = sum(
            not any(
                e.range == r and e.owner == owner for e in (board.mmio if k == "mmio" else board.io)
            )
            for (k, owner, _), r in wishes.items()
        )
        assert len(board.root.problems()) == unreachable
