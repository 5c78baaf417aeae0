"""Power states, function-level reset, expansion ROM; in the function and in the root's shadow."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fakes import FakeHost

from devices.bus import Bus, BusType
from devices.errors import DeviceError, UserError
from devices.pci.capability import CapabilityId, find_capabilities
from devices.pci.config_space import ConfigSpaceDevice, ConfigSpaceOptions
from devices.pci.contract import ROM_BAR, VIRTUAL_RESET, BarInfo, ConfigWriteResult
from devices.pci.decode import COMMAND, Command, check_bars
from devices.pci.host_bridge import PciRoot
from devices.pci.intx import Slot
from devices.registry import LARGEST_FILE, load, parse_options
from vmm.config import parse_device
from vmm.machine import Machine

DECODE = int(Command.IO_SPACE | Command.MEMORY_SPACE)
MASTER = int(Command.BUS_MASTER)
PM, AF, MSIX = 0x4C, 0x54, 0x5C
PMCSR, AF_CTRL, MSIX_CONTROL = PM + 4, AF + 4, MSIX + 2
ROM_DATA = bytes(range(1, 251)) * 10


class Board:
    """A function on a root, with BAR 0 at 0xE0000000 and all decoding on."""

    def __init__(self, kind: type[ConfigSpaceDevice] = ConfigSpaceDevice) -> None:
        self.mmio, self.io = Bus(BusType.MMIO, 1 << 40), Bus(BusType.PIO, 0x10000)
        self.violations: list[tuple[str, str]] = []
        self.root = PciRoot(
            FakeHost(),
            self.mmio,
            self.io,
            set_irq_line=lambda irq, level: None,
            on_violation=lambda owner, text: self.violations.append((owner, text)),
        )
        self.host = FakeHost()
        self.it = kind(self.host, ConfigSpaceOptions(rom=ROM_DATA))
        self.root.add(Slot(3), self.it, "it", self.it.handlers(), self.it.bars())
        self.put(0x10, 0xE000_0000)
        self.put(0x20, 0xC000)
        self.put(4, DECODE | MASTER, 2)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        data = value.to_bytes(size, "little")
        self.root.write_config(3 << 3, offset // 4, offset % 4, data)

    def get(self, offset: int) -> int:
        return self.root.read_config(3 << 3, offset // 4) >> 8 * (offset % 4)

    def here(self) -> list[int]:
        return sorted(entry.range.start for bus in (self.mmio, self.io) for entry in bus)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    assert made.here() == [0xC000, 0xE000_0000]
    yield made
    assert made.violations == []


def test_the_list_has_them_all(board: Board) -> None:
    found = find_capabilities(board.it.read_config)
    assert found == {
        CapabilityId.VENDOR_SPECIFIC: 0x40,
        CapabilityId.POWER_MANAGEMENT: PM,
        CapabilityId.ADVANCED_FEATURES: AF,
        CapabilityId.MSI_X: MSIX,
    }
    assert board.get(PM) & 0xFFFF_0000 == 0x0003_0000
    assert board.get(AF) >> 16 == 0x0306


@pytest.mark.parametrize(
    "dwords",
    [
        {1: 0x10_0000, 13: 0x40, 16: 0x4009},
        {1: 0x10_0000, 13: 0x40, 16: 0x0009},
        {1: 0x10_0000, 13: 0xFF, 63: 0xFC09},
        {1: 0x10_0000, 13: 0x04},
        {1: 0, 13: 0x40, 16: 0x4009},
        dict.fromkeys(range(64), 0xFFFF_FFFF),
    ],
)
def test_lists_of_a_liar_end(dwords: dict[int, int]) -> None:
    assert len(find_capabilities(lambda register: dwords.get(register, 0))) <= 2


class OddList(ConfigSpaceDevice):
    """Says that its power management registers lie where there is no room for them."""

    model: ClassVar[str] = "odd-list"

    def read_config(self, register: int) -> int:
        return {13: 0xFC, 63: 0x0001}.get(register, super().read_config(register))


def test_a_list_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the file"):
        Board(OddList)


# Power.


def test_in_d3hot_only_configuration_answers(board: Board) -> None:
    board.it.write_bar(0, 4, 4, 0x1234)
    board.put(PMCSR, 3, 2)
    assert board.here() == []
    assert board.get(4) & 0xFFFF == DECODE | MASTER
    assert board.get(PMCSR) & 0xFFFF == 0xB
    board.put(0x10, 0xE100_0000)
    assert board.here() == []
    board.put(PMCSR, 0, 2)
    assert board.here() == [0xC000, 0xE100_0000]
    assert board.it.read_bar(0, 4, 4) == 0x1234, "No_Soft_Reset"


@pytest.mark.parametrize("state", [1, 2])
@pytest.mark.parametrize("before", [0, 3])
def test_states_that_are_not_there_change_nothing(board: Board, state: int, before: int) -> None:
    board.put(PMCSR, before, 2)
    board.put(PMCSR, state, 2)
    assert board.get(PMCSR) & 3 == before
    assert bool(board.here()) is (before == 0)


def test_no_interrupt_leaves_d3hot(board: Board) -> None:
    board.it.write_bar(0, 0x18, 4, 1)
    board.it.write_bar(0, 0x14, 4, 1)
    assert board.host.irq
    board.put(PMCSR, 3, 2)
    assert not board.host.irq
    assert not board.root.may_master(Slot(3))
    board.put(PMCSR, 0, 2)
    assert board.host.irq
    board.put(MSIX_CONTROL, 0x8000, 2)
    bar = board.it.handlers()[0]
    bar.write(0x80C, 4, 0)
    board.put(PMCSR, 3, 2)
    board.it.write_bar(0, 0x10, 4, 1)
    board.it.write_bar(0, 0x14, 4, 1)
    assert board.host.count("send_msi") == 0
    board.put(PMCSR, 0, 2)
    assert board.host.count("send_msi") == 1


# Reset.


def used(board: Board) -> None:
    board.it.write_bar(0, 4, 4, 0x1234)
    board.it.write_bar(0, 0x18, 4, 1)
    board.it.write_bar(0, 0x14, 4, 1)
    board.it.write_bar(2, 0x1000, 4, 0x5678)
    board.it.handlers()[0].write(0x800, 4, 0xFEE0_0000)
    board.put(0x3C, 11, 1)


@pytest.mark.parametrize("how", ["function", "function from d3", "bus"])
def test_a_reset_brings_all_back(board: Board, how: str) -> None:
    fresh = ConfigSpaceDevice(FakeHost(), ConfigSpaceOptions(rom=ROM_DATA)).snapshot()
    used(board)
    assert board.host.irq
    memory = bytearray(256)
    assert board.it.map_config(memoryview(memory), 0, 256)
    match how:
        case "function":
            board.put(AF_CTRL, 1, 1)
        case "function from d3":
            board.put(PMCSR, 3, 2)
            board.put(AF_CTRL, 0xFF01, 2)
        case _:
            board.it.write_virtual_config(VIRTUAL_RESET, 1)
    assert board.it.snapshot() == fresh
    assert memoryview(memory).cast("I").tolist() == fresh["config"]["registers"]
    assert not board.host.irq
    if how != "bus":
        assert board.here() == []
        assert board.get(AF_CTRL) & 0xFF == 0
        board.put(0x10, 0xE200_0000)
        board.put(4, DECODE, 2)
        assert board.here() == [0xE200_0000]


@pytest.mark.parametrize(
    ("offset", "value", "size"),
    [(AF_CTRL, 0, 1), (AF_CTRL, 0xFE, 1), (AF_CTRL + 1, 1, 1), (AF_CTRL - 1, 1, 1), (AF, 1, 4)],
)
def test_what_is_no_reset(board: Board, offset: int, value: int, size: int) -> None:
    used(board)
    before = board.it.snapshot()
    board.put(offset, value, size)
    assert board.it.snapshot() == before
    assert len(board.here()) == 2


class Deaf(ConfigSpaceDevice):
    """Ignores resets and power states, and says nothing of either."""

    model: ClassVar[str] = "deaf"

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        if register in (AF_CTRL // 4, PMCSR // 4):
            return ConfigWriteResult()
        return super().write_config(register, offset, data)


@pytest.mark.parametrize(("offset", "value"), [(AF_CTRL, 1), (PMCSR, 3)])
def test_a_function_that_does_not_obey_is_off_the_bus(offset: int, value: int) -> None:
    board = Board(Deaf)
    board.put(offset, value, 1)
    assert board.here() == []
    assert not board.root.may_master(Slot(3))
    ((owner, text),) = board.violations
    assert owner == "it"
    assert "what the guest programmed is region 0" in text


def test_state_in_d3hot_goes_over(board: Board) -> None:
    board.put(PMCSR, 3, 2)
    saved = [json.loads(json.dumps(x)) for x in (board.root.snapshot(), board.it.snapshot())]
    fresh = Board()
    fresh.root.restore(saved[0])
    fresh.it.restore(saved[1])
    fresh.root.remap()
    assert fresh.here() == []
    assert fresh.violations == []
    fresh.put(PMCSR, 0, 1)
    assert fresh.here() == [0xC000, 0xE000_0000]


# ROM.


def test_the_rom_is_sized_and_decoded_on_its_own(board: Board) -> None:
    board.put(0x30, 0xFFFF_FFFF)
    assert board.get(0x30) == 0xFFFF_F001
    board.put(0x30, 0xE300_0000)
    assert len(board.here()) == 2
    board.put(0x30, 0xE300_0001)
    assert 0xE300_0000 in board.here()
    got = b"".join(board.mmio.read(0xE300_0000 + i, 1).to_bytes(1, "little") for i in range(4096))
    assert got == ROM_DATA.ljust(4096, b"\xff")
    assert board.mmio.read(0xE300_0000 + 2498, 8) == int.from_bytes(
        ROM_DATA[2498:] + b"\xff" * 6, "little"
    )
    board.mmio.write(0xE300_0000, 4, 0)
    assert board.mmio.read(0xE300_0000, 1) == ROM_DATA[0]
    board.put(4, int(Command.IO_SPACE), 2)
    assert board.here() == [0xC000]


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (BarInfo(ROM_BAR, 0, BusType.PIO, 0x1000), "plain 32-bit memory"),
        (BarInfo(ROM_BAR, 0, BusType.MMIO, 0x1000, True), "plain 32-bit memory"),
        (BarInfo(ROM_BAR, 0, BusType.MMIO, 0x400), "not a power of two in 0x800"),
        (BarInfo(ROM_BAR, 0, BusType.MMIO, 1 << 25), "not a power of two in 0x800"),
        (BarInfo(7, 0, BusType.MMIO, 0x1000), "not there"),
    ],
)
def test_roms_that_cannot_be(info: BarInfo, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_bars((info,))
    with pytest.raises(ValueError, match="out of order"):
        check_bars((BarInfo(ROM_BAR, 0, BusType.MMIO, 0x1000), BarInfo(0, 1, BusType.MMIO, 16)))


def test_the_rom_is_assigned_and_left_off(board: Board) -> None:
    board.root.assign_resources()
    assert board.get(0x30) & 0xFFFF_F000
    assert board.get(0x30) & 1 == 0


def test_a_rom_file_becomes_part_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "boot.rom"
    file.write_bytes(ROM_DATA)
    device = parse_device(f"config-space,name=it,rom={file}", [])
    assert base64.b64decode(device.options["rom"]) == ROM_DATA
    file.unlink()
    with Machine(memory="16M", devices=(device,)) as machine:
        machine.boot("counter")
        root: Any = machine.parts.pci
        place = root.read_config(1 << 3, 12)
        root.write_config(1 << 3, 12, 0, (place | 1).to_bytes(4, "little"))
        assert machine.parts.buses[BusType.MMIO].read(place, 4) == 0x0403_0201
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        machine.resume()
        assert machine.parts.buses[BusType.MMIO].read(place, 4) == 0x0403_0201


def test_a_large_rom_reaches_the_jailed_process(tmp_path: Path) -> None:
    file = tmp_path / "boot.rom"
    file.write_bytes(ROM_DATA * 200)
    with Machine(memory="16M", devices=(parse_device(f"config-space,rom={file}", []),)) as machine:
        machine.build()
        assert machine.parts.proxies[0].regions()[-1].length == 512 << 10


@pytest.mark.parametrize("what", ["missing", "directory", "large"])
def test_rom_files_that_cannot_be_read(tmp_path: Path, what: str) -> None:
    file = tmp_path / "rom"
    if what == "directory":
        file.mkdir()
    elif what == "large":
        with file.open("wb") as sparse:
            sparse.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match=f"device 'config-space': rom={file}: ") as error:
        parse_device(f"config-space,rom={file}", [])
    assert "\n" not in str(error.value)


def test_a_state_for_another_rom_is_refused() -> None:
    kind = load("config-space")
    small, large = (kind(FakeHost(), parse_options(kind, {"rom": b"x" * n})) for n in (1, 5000))
    saved = large.snapshot()
    saved["config"]["registers"][12] = 0xE000_0000
    small.restore(saved)
    saved["config"]["registers"][12] = 0xE000_0800
    with pytest.raises(DeviceError, match="read-only bits"):
        large.restore(saved)
    assert small.read_config(COMMAND) & 0xFFFF == 0
