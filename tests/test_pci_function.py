"""PciFunction and the config-space model, without a root."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.bus import BusType, Range
from devices.errors import DeviceError, UserError
from devices.pci.config import ConfigState, Header, Status
from devices.pci.config_space import PAGE, ConfigSpaceDevice, ConfigSpaceOptions
from devices.pci.contract import BarInfo, ConfigWriteResult, PciConfig, RegionRange
from devices.pci.decode import BAR0, COMMAND, Command
from devices.pci.function import PciFunction
from devices.registry import load, parse_options

IO, MEM = int(Command.IO_SPACE), int(Command.MEMORY_SPACE)
ID, SCRATCH, STATUS, RAISE, ENABLE = 0x00, 0x04, 0x10, 0x14, 0x18


def device(**options: int) -> tuple[ConfigSpaceDevice, FakeHost]:
    host = FakeHost()
    return ConfigSpaceDevice(host, ConfigSpaceOptions(**options)), host


def put(function: PciConfig, register: int, value: int, size: int = 4) -> ConfigWriteResult:
    return function.write_config(register, 0, value.to_bytes(size, "little"))


def wire(saved: Any) -> Any:
    return json.loads(json.dumps(saved))


def test_it_is_a_pci_function_of_the_registry() -> None:
    assert load("config-space") is ConfigSpaceDevice
    options = parse_options(ConfigSpaceDevice, {"device-id": "0x42", "ram-size": "0x1000"})
    function: PciConfig = ConfigSpaceDevice(FakeHost(), options)
    assert function.read_config(0) == 0x0042_1234
    assert function.bars()[1].size == 0x1000
    with pytest.raises(UserError, match="ram-size is a power of two"):
        parse_options(ConfigSpaceDevice, {"ram-size": "5000"})


def test_regions_and_handlers_follow_the_bars() -> None:
    function, _ = device()
    regions = function.regions()
    assert [(r.name, r.bus, r.length, r.start) for r in regions] == [
        ("bar0", BusType.MMIO, 0x1000, None),
        ("bar2", BusType.MMIO, 0x10000, None),
        ("bar4", BusType.PIO, 16, None),
    ]
    registers, ram, ports = function.handlers()
    registers.write(SCRATCH, 4, 0xCAFE)
    assert ports.read(SCRATCH, 4) == 0xCAFE
    ram.write(0x8000, 4, 0x1234)
    assert ram.read(0x8000, 2) == 0x1234
    assert registers.read(ID, 4) == 0x43464753


def test_a_bar_appears_moves_and_disappears() -> None:
    function, _ = device()
    assert not put(function, BAR0, 0xE000_0000)  # not decoded yet
    assert function.current_ranges() == []
    first, second = Range(0xE000_0000, 0x1000), Range(0xE100_0000, 0x1000)
    assert put(function, COMMAND, MEM, 2).mmio_add == [RegionRange(0, first)]
    moved = put(function, BAR0, second.start)
    assert (moved.mmio_remove, moved.mmio_add) == (
        [RegionRange(0, first)],
        [RegionRange(0, second)],
    )
    assert not put(function, BAR0, second.start)  # the same again
    assert function.current_ranges() == [(BusType.MMIO, RegionRange(0, second))]
    sizing = put(function, BAR0, 0xFFFF_FFFF)
    assert (sizing.mmio_remove, sizing.mmio_add) == ([RegionRange(0, second)], [])
    assert put(function, BAR0, second.start).mmio_add == [RegionRange(0, second)]
    assert put(function, COMMAND, 0, 2).mmio_remove == [RegionRange(0, second)]


def test_a_64_bit_bar_goes_above_4_gib_by_halves() -> None:
    function, _ = device()
    put(function, COMMAND, MEM, 2)
    low = put(function, BAR0 + 2, 0xD000_0000)
    assert low.mmio_add == [RegionRange(1, Range(0xD000_0000, 0x10000))]
    high = put(function, BAR0 + 3, 0x20)
    assert high.mmio_remove == low.mmio_add
    assert high.mmio_add == [RegionRange(1, Range(0x20_D000_0000, 0x10000))]


def test_io_and_memory_decode_apart() -> None:
    function, _ = device()
    put(function, BAR0, 0xE000_0000)
    put(function, BAR0 + 4, 0xC000)
    result = put(function, COMMAND, IO, 2)
    assert result.io_add == [RegionRange(2, Range(0xC000, 16))]
    assert result.mmio_add == []
    result = put(function, COMMAND, MEM, 2)
    assert result.io_remove == [RegionRange(2, Range(0xC000, 16))]
    assert result.mmio_add == [RegionRange(0, Range(0xE000_0000, 0x1000))]


def test_a_byte_write_moves_a_bar() -> None:
    function, _ = device()
    put(function, COMMAND, MEM, 2)
    put(function, BAR0, 0xE000_0000)
    result = function.write_config(BAR0, 2, b"\x12")
    assert result.mmio_add == [RegionRange(0, Range(0xE012_0000, 0x1000))]


# Interrupts.


def test_intx_needs_status_and_enable_and_is_acknowledged() -> None:
    function, host = device()
    function.write_bar(0, RAISE, 4, 0b101)
    assert host.edges() == []
    assert function.read_bar(0, STATUS, 4) == 0b101
    assert function.read_bar(0, RAISE, 4) == 0
    function.write_bar(0, ENABLE, 4, 0b100)
    assert host.edges() == [True]
    function.write_bar(0, STATUS, 4, 0b001)
    assert host.irq
    function.write_bar(0, STATUS, 1, 0b100)
    assert host.edges() == [True, False]


def test_interrupt_disable_masks_the_line_but_not_the_status() -> None:
    function, host = device()
    put(function, COMMAND, int(Command.INTERRUPT_DISABLE), 2)
    function.set_intx(True)
    assert host.edges() == []
    assert function.read_config(COMMAND) >> 16 & Status.INTERRUPT_STATUS
    put(function, COMMAND, 0, 2)
    assert host.edges() == [True]
    put(function, COMMAND, int(Command.INTERRUPT_DISABLE), 2)
    assert host.edges() == [True, False]
    function.set_intx(False)
    assert not function.read_config(COMMAND) >> 16 & Status.INTERRUPT_STATUS
    put(function, COMMAND, 0, 2)
    assert host.edges() == [True, False]


def test_the_guest_cannot_clear_interrupt_status() -> None:
    function, host = device()
    function.set_intx(True)
    function.write_config(COMMAND, 2, b"\xff\xff")
    assert function.read_config(COMMAND) >> 16 & Status.INTERRUPT_STATUS
    assert host.irq


# Memory and registers.


def test_ram_crosses_pages_and_keeps_only_what_was_written() -> None:
    function, _ = device()
    assert function.read_bar(2, PAGE - 4, 8) == 0
    assert function.state.pages == {}
    function.write_bar(2, PAGE - 4, 8, 0x1122_3344_5566_7788)
    assert function.read_bar(2, PAGE - 4, 8) == 0x1122_3344_5566_7788
    assert function.read_bar(2, PAGE - 2, 4) == 0x3344_5566
    assert sorted(function.state.pages) == ["0x0", "0x1000"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 0x20), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)
        ),
        max_size=20,
    )
)
def test_registers_by_any_access_are_bytes(accesses: list[tuple[int, int, int]]) -> None:
    function, host = device()
    model = bytearray(0x30)
    model[:4] = b"SGFC"
    for offset, size, number in accesses:
        value = number & ((1 << 8 * size) - 1)
        function.write_bar(0, offset, size, value)
        written = dict(
            zip(range(offset, offset + size), value.to_bytes(size, "little"), strict=True)
        )
        for address, byte in written.items():
            if 0x04 <= address < 0x10 or 0x18 <= address < 0x1C:
                model[address] = byte
            elif 0x10 <= address < 0x14:
                model[address] &= ~byte
        for address, byte in written.items():
            if 0x14 <= address < 0x18:
                model[address - 4] |= byte
        for width in (1, 2, 4, 8):
            for at in range(0x20):
                expected = int.from_bytes(model[at : at + width], "little")
                assert function.read_bar(0, at, width) == expected
        assert host.irq is any(
            a & b for a, b in zip(model[0x10:0x14], model[0x18:0x1C], strict=True)
        )


# Mapping.


def test_a_mapping_is_filled_and_follows_status_bits() -> None:
    function, _ = device()
    memory = bytearray(b"\xee" * 1024)
    assert function.map_config(memoryview(memory), 512, 256)
    mapped = memoryview(memory)[512:768].cast("I")
    assert mapped.tolist() == [function.read_config(r) for r in range(64)]
    function.set_intx(True)
    assert mapped[COMMAND] >> 16 & Status.INTERRUPT_STATUS
    assert memory[:512] == memory[768:] + memory[:256] == b"\xee" * 512
    function.unmap_config()
    function.set_intx(False)
    assert mapped[COMMAND] >> 16 & Status.INTERRUPT_STATUS


@pytest.mark.parametrize(
    ("base", "length"), [(-4, 256), (1, 256), (0, 255), (772, 256), (0, 0), (0, -4), (1024, 4)]
)
def test_a_mapping_that_does_not_fit_is_refused(base: int, length: int) -> None:
    function, _ = device()
    assert not function.map_config(memoryview(bytearray(1024)), base, length)


def test_a_read_only_mapping_is_refused() -> None:
    function, _ = device()
    assert not function.map_config(memoryview(bytes(256)), 0, 256)


def test_a_mapping_follows_a_restore_to_another_state() -> None:
    function, _ = device()
    older = wire(function.snapshot())
    memory = bytearray(256)
    assert function.map_config(memoryview(memory), 0, 256)
    put(function, BAR0, 0xE000_0000)
    put(function, 15, 0x0B, 1)
    function.restore(older)
    assert memoryview(memory).cast("I").tolist() == [function.read_config(r) for r in range(64)]
    assert function.read_config(BAR0) == 0


def test_a_longer_mapping_leaves_the_rest_and_a_shorter_one_is_no_error() -> None:
    for length in (4096, 64):
        function, _ = device()
        memory = bytearray(4096)
        assert function.map_config(memoryview(memory), 0, length)
        put(function, 15, 0x55, 1)
        mapped = memoryview(memory).cast("I").tolist()
        known = min(length // 4, 64)
        assert mapped[:known] == function.config.values[:known]
        assert not any(mapped[known:])


@settings(max_examples=60)
@given(st.data())
def test_mapped_config_equals_read_config_after_every_write(data: st.DataObject) -> None:
    function, host = device()
    memory = bytearray(256)
    assert function.map_config(memoryview(memory), 0, 256)
    mapped = memoryview(memory).cast("I")
    ranges: set[tuple[BusType, RegionRange]] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["config", "intx", "restore"]))
        if kind == "config":
            register, offset = data.draw(st.integers(0, 17)), data.draw(st.integers(0, 3))
            value = data.draw(st.binary(min_size=1, max_size=4 - offset))
            result = function.write_config(register, offset, value)
            gone = [(BusType.MMIO, r) for r in result.mmio_remove]
            gone += [(BusType.PIO, r) for r in result.io_remove]
            assert ranges.issuperset(gone)
            ranges.difference_update(gone)
            ranges |= {(BusType.MMIO, r) for r in result.mmio_add}
            ranges |= {(BusType.PIO, r) for r in result.io_add}
        elif kind == "intx":
            function.set_intx(data.draw(st.booleans()))
        else:
            function.restore(wire(function.snapshot()))
        assert mapped.tolist() == [function.read_config(r) for r in range(64)]
        assert ranges == set(function.current_ranges())
        command = function.read_config(COMMAND)
        asserted = command >> 16 & Status.INTERRUPT_STATUS
        assert host.irq is bool(asserted and not command & Command.INTERRUPT_DISABLE)


# State.


def used() -> tuple[ConfigSpaceDevice, FakeHost]:
    function, host = device()
    put(function, COMMAND, IO | MEM, 2)
    put(function, BAR0, 0xE000_0000)
    put(function, BAR0 + 3, 0x10)
    function.write_bar(0, SCRATCH, 4, 0x1234)
    function.write_bar(0, ENABLE, 4, 1)
    function.write_bar(0, RAISE, 4, 1)
    function.write_bar(2, 0x5000, 2, 0xBEEF)
    return function, host


def test_state_goes_over_to_a_fresh_device() -> None:
    function, _ = used()
    saved = wire(function.snapshot())
    fresh, host = device()
    assert fresh.snapshot() != saved
    fresh.restore(saved)
    assert wire(fresh.snapshot()) == saved
    assert fresh.current_ranges() == function.current_ranges() != []
    assert host.irq, "the line is raised as it was"
    assert fresh.read_bar(2, 0x5000, 2) == 0xBEEF
    fresh.write_bar(0, STATUS, 4, 1)
    assert not host.irq
    moved = put(fresh, BAR0, 0xE100_0000)
    assert moved.mmio_remove == [RegionRange(0, Range(0xE000_0000, 0x1000))]
    assert wire(function.snapshot()) == saved, "the two share nothing"


def test_restoring_an_older_state_lowers_the_line() -> None:
    function, host = device()
    saved = function.snapshot()
    function.write_bar(0, ENABLE, 4, 1)
    function.write_bar(0, RAISE, 4, 1)
    assert host.irq
    function.restore(saved)
    assert not host.irq


def _change(saved: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    saved[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["config", "registers", 0], 0xC501_8086),
        (["config", "registers", BAR0], 0xE000_0001),
        (["config", "registers", BAR0 + 2], 0xD000_0000),
        (["config", "registers", 2], 0),
        (["config", "registers", 16], 0),
        (["config", "registers", 1], 1 << 32),
        (["config", "registers", 1], "text"),
        (["config", "registers"], [0] * 63),
        (["config"], None),
        (["registers"], [0] * 7),
        (["registers"], [0x43464753] + [0] * 7),
        (["registers", 5], 1),
        (["pages"], {"0x10000": "A" * 5462 + "=="}),
        (["pages"], {"0x1": "A" * 5462 + "=="}),
        (["pages"], {"0x1000": "AAAA"}),
        (["surprise"], 1),
    ],
)
def test_a_state_that_is_not_ours_is_refused_whole(path: list[Any], value: Any) -> None:
    function, host = used()
    before, lines = wire(function.snapshot()), list(host.calls)
    saved = wire(function.snapshot())
    _change(saved, path, value)
    with pytest.raises(DeviceError, match="config-space"):
        function.restore(saved)
    assert wire(function.snapshot()) == before
    assert host.calls == lines


def test_a_bar_where_a_bigger_one_cannot_be_is_refused() -> None:
    function, _ = device()
    put(function, BAR0 + 2, 0xE001_0000)
    bigger, _ = device(ram_size=0x20000)
    with pytest.raises(DeviceError, match="read-only bits"):
        bigger.restore(function.snapshot())


# The base.


class Plain(PciFunction):
    model: ClassVar[str] = "plain"

    def header(self) -> Header:
        return Header(
            0x1234, 1, 0, bars=(BarInfo(0, 1, BusType.MMIO, 16), BarInfo(1, 0, BusType.PIO, 4))
        )


def test_regions_are_in_the_order_of_their_numbers() -> None:
    plain = Plain(FakeHost())
    assert [region.name for region in plain.regions()] == ["bar1", "bar0"]
    assert plain.handlers()[1].read(0, 2) == 0xFFFF
    plain.handlers()[0].write(0, 1, 0)
    assert plain.read_virtual_config(0) == 0
    plain.write_virtual_config(0, 1)


def test_a_function_without_pin_drives_none() -> None:
    host = FakeHost()
    plain = Plain(host)
    put(plain, COMMAND, 0xFFFF, 2)
    plain.restore(wire(plain.snapshot()))
    assert host.calls == []
    assert not plain.read_config(COMMAND) & Command.INTERRUPT_DISABLE


def test_state_has_one_list_of_registers() -> None:
    plain = Plain(FakeHost())
    assert isinstance(plain.state.config, ConfigState)
    assert plain.state.config.registers is plain.config.values
    plain.restore(wire(plain.snapshot()))
    assert plain.state.config.registers is plain.config.values
