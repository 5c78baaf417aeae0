"""Register tables, the type 0 header, BAR placement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.bus import BusType, Range
from devices.pci.capability import Capability, CapabilityId, vendor_capability
from devices.pci.config import ConfigSpace, Header, Status
from devices.pci.contract import BarInfo, RegionRange
from devices.pci.decode import BAR0, COMMAND, Command, check_bars, difference, placement
from devices.pci.registers import Field, RegisterFile

MEMORY = BarInfo(0, 0, BusType.MMIO, 0x1000)
WIDE = BarInfo(2, 1, BusType.MMIO, 0x10000, is_64bit=True, prefetchable=True)
HUGE = BarInfo(4, 2, BusType.MMIO, 1 << 33, is_64bit=True)
PORTS = BarInfo(1, 3, BusType.PIO, 16)
BARS = (MEMORY, PORTS, WIDE, HUGE)


def space(**changes: object) -> ConfigSpace:
    values = {"interrupt_pin": 1, "bars": BARS, "capabilities": (vendor_capability(b"abc"),)}
    return ConfigSpace(Header(0x1234, 0xC501, 0xFF0102, **{**values, **changes}))  # type: ignore[arg-type]


def put(config: RegisterFile, register: int, value: int) -> None:
    config.write(register, 0, value.to_bytes(4, "little"))


def test_the_header_is_where_the_specification_puts_it() -> None:
    header = Header(
        0x1234,
        0xC501,
        0xFF0102,
        revision=3,
        subsystem_vendor_id=0x5678,
        subsystem_id=0x9ABC,
        interrupt_pin=2,
        bars=BARS,
        capabilities=(vendor_capability(b"abc"),),
    )
    raw = b"".join(value.to_bytes(4, "little") for value in ConfigSpace(header).values)
    assert raw[0x00:0x04].hex() == "341201c5"
    assert raw[0x04:0x08].hex() == "00001000"  # only "capabilities list" is set
    assert raw[0x08:0x0C].hex() == "030201ff"
    assert raw[0x0C:0x10].hex() == "00000000"
    assert raw[0x10:0x28].hex() == "00000000010000000c000000000000000400000000000000"
    assert raw[0x2C:0x30].hex() == "7856bc9a"
    assert raw[0x34] == 0x40
    assert raw[0x3C:0x40].hex() == "00020000"
    assert raw[0x40:0x48].hex() == "0900066162630000"


def test_without_capabilities_there_is_no_pointer() -> None:
    config = space(capabilities=())
    assert config.read(COMMAND) == 0
    assert config.read(13) == 0
    assert config.capability(CapabilityId.VENDOR_SPECIFIC) is None


@pytest.mark.parametrize(
    ("register", "sized"),
    [
        (BAR0, 0xFFFF_F000),
        (BAR0 + 1, 0xFFFF_FFF1),
        (BAR0 + 2, 0xFFFF_000C),
        (BAR0 + 3, 0xFFFF_FFFF),
        (BAR0 + 4, 0x0000_0004),
        (BAR0 + 5, 0xFFFF_FFFE),
    ],
)
def test_all_ones_read_back_as_the_size(register: int, sized: int) -> None:
    config = space()
    put(config, register, 0xFFFF_FFFF)
    assert config.read(register) == sized


@pytest.mark.parametrize("size", [16, 64, 0x1000, 1 << 31])
def test_the_size_of_a_memory_bar_is_what_software_computes(size: int) -> None:
    config = space(bars=(BarInfo(0, 0, BusType.MMIO, size),))
    put(config, BAR0, 0xFFFF_FFFF)
    assert (~(config.read(BAR0) & ~0xF) + 1) & 0xFFFF_FFFF == size
    put(config, BAR0 + 1, 0xFFFF_FFFF)
    assert config.read(BAR0 + 1) == 0, "a BAR that is not there reads zero"


def test_what_a_guest_can_write() -> None:
    config = space()
    before = list(config.values)
    for register in range(64):
        put(config, register, 0xFFFF_FFFF)
    changed = {
        r: a ^ b for r, (a, b) in enumerate(zip(before, config.values, strict=True)) if a != b
    }
    assert changed == {
        1: 0x0547,
        3: 0x0000_00FF,
        4: 0xFFFF_F000,
        5: 0xFFFF_FFF0,
        6: 0xFFFF_0000,
        7: 0xFFFF_FFFF,
        9: 0xFFFF_FFFE,
        15: 0xFF,
    }


def test_decode_bits_of_absent_spaces_are_read_only() -> None:
    config = space(bars=(MEMORY,), interrupt_pin=0)
    put(config, COMMAND, 0xFFFF)
    assert config.read(COMMAND) & 0xFFFF == 0x0146


def test_status_errors_are_cleared_by_ones() -> None:
    config = space()
    errors = int(Status.DETECTED_PARITY_ERROR | Status.RECEIVED_MASTER_ABORT) << 16
    config.update(COMMAND, errors, errors)
    config.write(COMMAND, 0, b"\x00\x00\xff\x00")  # neither of the two is in this byte
    assert config.read(COMMAND) >> 16 == (errors >> 16 | Status.CAPABILITIES_LIST)
    config.write(COMMAND, 2, b"\x00\x20")
    assert config.read(COMMAND) >> 16 == Status.DETECTED_PARITY_ERROR | Status.CAPABILITIES_LIST


@pytest.mark.parametrize(
    ("offset", "data", "result"),
    [
        (0, b"\xaa", 0x4433_22AA),
        (1, b"\xaa", 0x4433_AA11),
        (2, b"\xaa", 0x44AA_2211),
        (3, b"\xaa", 0xAA33_2211),
        (0, b"\xaa\xbb", 0x4433_BBAA),
        (1, b"\xaa\xbb", 0x44BB_AA11),
        (2, b"\xaa\xbb", 0xBBAA_2211),
        (1, b"\xaa\xbb\xcc", 0xCCBB_AA11),
        (0, b"\xaa\xbb\xcc\xdd", 0xDDCC_BBAA),
    ],
)
def test_byte_lanes_of_a_write(offset: int, data: bytes, result: int) -> None:
    file = RegisterFile([Field("all", 0, 4, 0x4433_2211, writable=0xFFFF_FFFF)], 1)
    file.write(0, offset, data)
    assert file.values == [result]


@pytest.mark.parametrize(
    ("register", "offset", "data"),
    [(0, 0, b""), (0, 4, b"a"), (0, 3, b"ab"), (0, -1, b"a"), (1, 0, b"a"), (-1, 0, b"a")],
)
def test_a_write_stays_in_its_dword(register: int, offset: int, data: bytes) -> None:
    file = RegisterFile([], 1)
    with pytest.raises(ValueError, match="no"):
        file.write(register, offset, data)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Field("f", 2, 4),
        lambda: Field("f", 0, 0),
        lambda: Field("f", 0, 1, reset=0x100),
        lambda: Field("f", 0, 1, writable=0x100),
        lambda: Field("f", 0, 1, writable=1, clears=1),
        lambda: RegisterFile([Field("a", 0, 2), Field("b", 1, 1)], 1),
        lambda: RegisterFile([Field("a", 4, 1)], 1),
        lambda: Header(0xFFFF, 0, 0),
        lambda: Header(0x1_0000, 0, 0),
        lambda: Header(0, 0, 0, interrupt_pin=5),
        lambda: Header(0, 0, 0, capabilities=(vendor_capability(bytes(190)),)),
        lambda: Header(0, 0, 0, capabilities=(Capability(1, 4, (Field("x", 0, 1),)),)),
        lambda: Header(0, 0, 0, capabilities=(Capability(1, 4, (Field("x", 4, 1),)),)),
    ],
)
def test_a_wrong_table_is_refused(build: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    "bars",
    [
        [BarInfo(0, 0, BusType.MMIO, 24)],
        [BarInfo(0, 0, BusType.MMIO, 0)],
        [BarInfo(0, 0, BusType.MMIO, -16)],
        [BarInfo(0, 0, BusType.MMIO, 8)],
        [BarInfo(0, 0, BusType.MMIO, 1 << 32)],
        [BarInfo(0, 0, BusType.MMIO, 1 << 63, is_64bit=True)],
        [BarInfo(0, 0, BusType.PIO, 2)],
        [BarInfo(0, 0, BusType.PIO, 512)],
        [BarInfo(0, 0, BusType.PIO, 16, is_64bit=True)],
        [BarInfo(0, 0, BusType.PIO, 16, prefetchable=True)],
        [BarInfo(6, 0, BusType.MMIO, 16)],
        [BarInfo(-1, 0, BusType.MMIO, 16)],
        [BarInfo(5, 0, BusType.MMIO, 16, is_64bit=True)],
        [WIDE, BarInfo(3, 0, BusType.MMIO, 16)],
        [WIDE, MEMORY],
        [MEMORY, BarInfo(1, 0, BusType.MMIO, 16)],
        [BarInfo(0, -1, BusType.MMIO, 16)],
    ],
)
def test_wrong_bars_are_refused(bars: list[BarInfo]) -> None:
    with pytest.raises(ValueError, match="BAR"):
        check_bars(bars)


def test_capabilities_are_chained_and_aligned() -> None:
    pm = Capability(CapabilityId.POWER_MANAGEMENT, 8, (Field("pmcsr", 4, 2, writable=3),))
    config = space(capabilities=(vendor_capability(b"abcd"), pm, vendor_capability(b"")))
    raw = b"".join(value.to_bytes(4, "little") for value in config.values)
    pointer, found = raw[0x34], []
    while pointer:
        found.append((pointer, raw[pointer]))
        pointer = raw[pointer + 1]
    assert found == [(0x40, 9), (0x48, 1), (0x50, 9)]
    assert config.capability(CapabilityId.POWER_MANAGEMENT) == 0x48
    put(config, 0x4C // 4, 0xFFFF_FFFF)
    assert config.read(0x4C // 4) == 3


def placed(info: BarInfo, command: int, *bars: int) -> Range | None:
    registers = [0, command, 0, 0, *bars, *[0] * 60]
    return placement(info, registers)


IO, MEM = int(Command.IO_SPACE), int(Command.MEMORY_SPACE)


@pytest.mark.parametrize(
    ("info", "command", "bars", "start"),
    [
        (MEMORY, MEM, [0xE000_0000], 0xE000_0000),
        (MEMORY, IO, [0xE000_0000], None),
        (MEMORY, 0, [0xE000_0000], None),
        (MEMORY, MEM, [0], None),
        (MEMORY, MEM, [0xFFFF_F000], None),
        (MEMORY, MEM, [0xFFFF_E000], 0xFFFF_E000),
        (PORTS, IO, [0, 0xC001], 0xC000),
        (PORTS, MEM, [0, 0xC001], None),
        (PORTS, IO, [0, 0x0001], None),
        (PORTS, IO, [0, 0xFFF1], 0xFFF0),
        (PORTS, IO, [0, 0xFFFF_FFF1], None),
        (WIDE, MEM, [0, 0, 0xE000_000C, 0], 0xE000_0000),
        (WIDE, MEM, [0, 0, 0xE000_000C, 0x12], 0x12_E000_0000),
        (WIDE, MEM, [0, 0, 0x0000_000C, 0x1], 0x1_0000_0000),
        (WIDE, MEM, [0, 0, 0xFFFF_000C, 0], 0xFFFF_0000),
        (WIDE, MEM, [0, 0, 0xFFFF_000C, 0xFFFF_FFFF], None),
        (WIDE, MEM, [0, 0, 0x0000_000C, 0], None),
        (HUGE, MEM, [0, 0, 0, 0, 0x4, 0x2], 0x2_0000_0000),
    ],
)
def test_placement(info: BarInfo, command: int, bars: list[int], start: int | None) -> None:
    expected = None if start is None else Range(start, info.size)
    assert placed(info, command, *bars) == expected


def test_difference_removes_before_it_adds_and_leaves_the_rest() -> None:
    old, new, still = Range(0x1000, 0x1000), Range(0x2000, 0x1000), Range(0xC000, 16)
    result = difference(BARS[:2], [old, still], [new, still])
    assert result.mmio_remove == [RegionRange(0, old)]
    assert result.mmio_add == [RegionRange(0, new)]
    assert result.io_remove == result.io_add == []
    result = difference(BARS[:2], [None, still], [None, None])
    assert result.io_remove == [RegionRange(3, still)]
    assert not difference(BARS[:2], [old, None], [old, None])


def test_the_device_changes_only_what_can_change() -> None:
    config = space()
    with pytest.raises(ValueError, match="never change"):
        config.update(0, 1, 1)


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (0, 0xC502_1234),
        (2, 0x0600_0000),
        (BAR0, 8),
        (BAR0 + 1, 0),
        (16, 0),
        (15, 0x0200),
        (COMMAND, 0),
    ],
)
def test_a_foreign_space_is_refused(register: int, value: int) -> None:
    config = space()
    values = list(config.values)
    values[register] = value
    with pytest.raises(ValueError, match="read-only bits"):
        config.load(values)
    assert config.values is not values


@pytest.mark.parametrize("values", [[], [0] * 63, [0] * 65, [-1] + [0] * 63, [1 << 32] + [0] * 63])
def test_a_space_of_another_form_is_refused(values: list[int]) -> None:
    with pytest.raises(ValueError, match="register"):
        space().check(values)


@given(
    st.lists(
        st.tuples(st.integers(0, 63), st.integers(0, 3), st.binary(min_size=1, max_size=4)).filter(
            lambda w: w[1] + len(w[2]) <= 4
        ),
        max_size=30,
    )
)
def test_writes_never_touch_read_only_bits_and_the_mirror_follows(
    writes: list[tuple[int, int, bytes]],
) -> None:
    config = space()
    memory = bytearray(256)
    config.mirror(memoryview(memory).cast("I"))
    for register, offset, data in writes:
        config.write(register, offset, data)
        config.check(config.values)
        assert memoryview(memory).cast("I").tolist() == config.values
    other = space()
    other.load(list(config.values))
    assert other.values == config.values
