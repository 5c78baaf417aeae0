"""Flat binaries, and the entry states that all formats share."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from devices.errors import UserError
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, Mode
from vmm.cpu.state import CODE32, CODE64, DATA32, CpuState, Segment
from vmm.memory import GuestMemory

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(16 * MIB)
    yield ram
    ram.close()


def test_goes_to_one_mebibyte_and_starts_there(memory: GuestMemory) -> None:
    result = load(memory, b"\xf4code", BootOptions())
    assert (result.format, result.symbols, result.notes) == ("flat", [], [])
    assert memory.read(0x100000, 6) == b"\xf4code\0"
    assert result.state.rip == 0x100000
    assert result.state.cs.attributes == CODE32


@pytest.mark.parametrize("address", [0, 0x7C00, 0x123457, 16 * MIB - 4])
def test_goes_where_it_is_told(memory: GuestMemory, address: int) -> None:
    result = load(memory, b"here", BootOptions(load_addr=address))
    assert memory.read(address, 4) == b"here"
    assert result.state.rip == address


def test_the_boot_gdt_says_what_the_segments_say(memory: GuestMemory) -> None:
    for mode in (Mode.PROTECTED, Mode.LONG):
        state = load(memory, b"x", BootOptions(mode=mode)).state
        table = memory.read(state.gdtr.base, state.gdtr.limit + 1)
        assert table[:8] == bytes(8)
        for segment in (state.cs, state.ds, state.es, state.fs, state.gs, state.ss):
            (row,) = struct.unpack_from("<Q", table, segment.selector)
            assert segment == decoded(segment.selector, row)


def decoded(selector: int, row: int) -> Segment:
    """A descriptor as the CPU would load it (SDM 3A, 3.4.5)."""
    base = row >> 16 & 0xFFFFFF | row >> 56 << 24
    limit = row & 0xFFFF | row >> 32 & 0xF0000
    if row >> 55 & 1:
        limit = limit << 12 | 0xFFF
    return Segment(selector, base, limit, row >> 32 & 0xFFFF00)


def test_protected_mode_entry(memory: GuestMemory) -> None:
    state = load(memory, b"x", BootOptions(mode=Mode.PROTECTED)).state
    check_common(memory, state)
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x31, 0, 0, 0)
    assert (state.cs.selector, state.cs.attributes) == (0x08, CODE32)


def test_long_mode_entry(memory: GuestMemory) -> None:
    state = load(memory, b"x", BootOptions(mode=Mode.LONG)).state
    check_common(memory, state)
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x80000033, 0x2000, 0x620, 0x500)
    assert (state.cs.selector, state.cs.attributes) == (0x18, CODE64)


def check_common(memory: GuestMemory, state: CpuState) -> None:
    assert (state.rip, state.rflags) == (0x100000, 2)
    assert state.gpr == [0, 0, 0, 0, 0x90000, *[0] * 11]
    assert (state.idtr.base, state.idtr.limit) == (0, 0)
    for segment in (state.ds, state.es, state.fs, state.gs, state.ss):
        assert segment == Segment(0x10, 0, 0xFFFF_FFFF, DATA32)
    assert (state.gdtr.base, state.gdtr.limit) == (0x1000, 31)
    assert not state.halted


def test_each_segment_register_is_its_own_object(memory: GuestMemory) -> None:
    state = load(memory, b"x", BootOptions()).state
    state.ds.selector = 0x99
    assert [s.selector for s in (state.es, state.fs, state.gs, state.ss)] == [0x10] * 4


def translate(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """A page walk of four levels with 2 MiB pages (SDM 3A, 4.5.4)."""
    table = cr3
    for shift in (39, 30, 21):
        (row,) = struct.unpack("<Q", memory.read(table + 8 * (address >> shift & 511), 8))
        if not row & 1:
            return None
        assert row & 2, "writable"
        if row & 0x80:
            assert shift == 21
            return (row & ~0x1FFFFF) + (address & 0x1FFFFF)
        table = row & ~0xFFF
    raise AssertionError("a fourth level")


@pytest.mark.parametrize(("size", "end"), [(MIB, 4 * GIB), (6 * GIB, 7 * GIB), (4 * GIB, 5 * GIB)])
def test_identity_map(size: int, end: int) -> None:
    """RAM above 3 GiB lies above 4 GiB: 6 GiB of it reach to 7 GiB."""
    memory = GuestMemory(size)
    try:
        address = 0xA0000 if size == MIB else None
        state = load(memory, b"x", BootOptions(mode=Mode.LONG, load_addr=address)).state
        for place in (0, 0x100123, GIB, 3 * GIB + 5, 4 * GIB - 1, end - 1):
            assert translate(memory, state.cr3, place) == place
        assert translate(memory, state.cr3, end) is None
    finally:
        memory.close()


def test_long_mode_can_start_above_4_gib() -> None:
    memory = GuestMemory(5 * GIB)
    try:
        high = BootOptions(mode=Mode.LONG, load_addr=4 * GIB + 0x1000)
        assert load(memory, b"high", high).state.rip == 4 * GIB + 0x1000
        assert memory.read(4 * GIB + 0x1000, 4) == b"high"
        with pytest.raises(UserError, match=r"0x100001000 is out of reach of 32-bit mode"):
            load(memory, b"high", BootOptions(load_addr=4 * GIB + 0x1000))
    finally:
        memory.close()


def test_loading_leaves_memory_sparse() -> None:
    memory = GuestMemory(512 * MIB)
    try:
        load(memory, b"x" * 5000, BootOptions(mode=Mode.LONG))
        assert sum(length for _, length in memory.extents()) < 64 << 10
    finally:
        memory.close()
