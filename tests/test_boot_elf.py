"""ELF executables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from boot_images import Segment, elf

import guests
from vmm.boot.loader import load
from vmm.boot.options import BootOptions
from vmm.cpu.state import CODE32, CODE64
from vmm.memory import GuestMemory

DIRT = b"\xa5"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(16 << 20)
    yield ram
    ram.close()


@pytest.mark.parametrize(("bits", "code"), [(32, CODE32), (64, CODE64)])
def test_segments_bss_and_entry(memory: GuestMemory, bits: int, code: int) -> None:
    memory.write(0x100000, DIRT * 0x500000)
    image = elf(
        bits,
        [
            Segment(b"text" * 1000, vaddr=0x100000),
            Segment(b"data", vaddr=0x300010, memory_size=0x12345),
            Segment(vaddr=0x400000, memory_size=0x3000),
        ],
        entry=0x100004,
    )
    result = load(memory, image, BootOptions())
    assert (result.format, result.notes) == (f"elf{bits}", [])
    assert (result.state.rip, result.state.cs.attributes) == (0x100004, code)
    assert memory.read(0x100000, 4001) == b"text" * 1000 + DIRT
    assert memory.read(0x30000F, 5) == DIRT + b"data"
    assert memory.read(0x300014, 0x12341) == bytes(0x12341)
    assert memory.read(0x300010 + 0x12345, 1) == DIRT
    assert memory.read(0x3FFFFF, 0x3002) == DIRT + bytes(0x3000) + DIRT


def test_a_large_bss_does_not_touch_memory() -> None:
    memory = GuestMemory(512 << 20)
    try:
        load(memory, elf(32, [Segment(b"x", memory_size=256 << 20)]), BootOptions())
        assert sum(length for _, length in memory.extents()) < 64 << 10
    finally:
        memory.close()


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_go_to_physical_addresses(memory: GuestMemory, bits: int) -> None:
    base = 0xC0000000 if bits == 32 else 0xFFFFFFFF80000000
    segments = [
        Segment(b"boot", vaddr=0x8000, paddr=0x8000),
        Segment(b"kernel" * 9, vaddr=base + 0x200000, paddr=0x200000),
    ]
    result = load(memory, elf(bits, segments, entry=base + 0x200006), BootOptions())
    assert memory.read(0x200000, 54) == b"kernel" * 9
    assert memory.read(0x8000, 4) == b"boot"
    assert result.state.rip == 0x200006


def test_an_entry_may_be_physical(memory: GuestMemory) -> None:
    """As in vmlinux, whose segments are linked high and whose entry is not."""
    segments = [Segment(b"k" * 99, vaddr=0xFFFFFFFF81000000, paddr=0x200000)]
    assert load(memory, elf(64, segments, entry=0x200007), BootOptions()).state.rip == 0x200007


def test_a_virtual_entry_comes_before_a_physical_one(memory: GuestMemory) -> None:
    segments = [
        Segment(b"a" * 99, vaddr=0x500000, paddr=0x100000),
        Segment(b"b" * 99, vaddr=0x100000, paddr=0x200000),
    ]
    assert load(memory, elf(32, segments, entry=0x100008), BootOptions()).state.rip == 0x200008


def test_other_program_headers_and_empty_segments_do_not_count(memory: GuestMemory) -> None:
    stack, note, dynamic, unknown = 0x6474E551, 4, 2, 0x70000001
    segments = [
        *(
            Segment(b"junk", vaddr=0xFFFF0000, kind=kind, file_size=0x7FFFFFFF)
            for kind in (stack, note, dynamic, unknown)
        ),
        Segment(b"code"),
        Segment(vaddr=0xFFFF0000, memory_size=0),
    ]
    load(memory, elf(32, segments), BootOptions())
    assert memory.read(0x100000, 4) == b"code"


def test_position_independent_goes_to_its_own_addresses(memory: GuestMemory) -> None:
    image = elf(64, [Segment(b"pie")], kind=3)
    assert load(memory, image, BootOptions()).state.rip == 0x100000


@pytest.mark.parametrize("bits", [32, 64])
def test_symbols(memory: GuestMemory, bits: int) -> None:
    symbols = [("later", 0x100008, 4), ("start", 0x100000, 8), ("größe", 0x100010, 0)]
    image = elf(bits, [Segment(b"x" * 99)], symbols=symbols)
    assert load(memory, image, BootOptions()).symbols == [
        (0x100000, 8, "start"),
        (0x100008, 4, "later"),
        (0x100010, 0, "größe"),
    ]


def test_symbols_of_the_crash_guest(memory: GuestMemory) -> None:
    found = load(memory, guests.image("crash"), BootOptions()).symbols
    assert [name for _, _, name in found] == ["start", "hang", "fall", "trip"]
    assert found[0][0] == 0x100054


def test_a_broken_section_table_only_costs_the_symbols(memory: GuestMemory) -> None:
    image = bytearray(elf(64, [Segment(b"code")], symbols=[("start", 0x100000, 4)]))
    for table in (len(image) - 64, 1, 0xFFFF_FFFF_FFFF_FFFF, len(image) + 5):
        image[40:48] = table.to_bytes(8, "little")
        result = load(memory, bytes(image), BootOptions())
        assert result.symbols == []
        assert memory.read(0x100000, 4) == b"code"


def test_undefined_symbols_and_sections_are_left_out(memory: GuestMemory) -> None:
    image = elf(32, [Segment(b"code")], symbols=[("extern", 0, 0), ("start", 0x100000, 4)])
    function_in_section_1 = b"\x12\x00\x01\x00"
    for changed in (b"\x12\x00\x00\x00", b"\x13\x00\x01\x00"):
        broken = image.replace(function_in_section_1, changed, 1)
        assert load(memory, broken, BootOptions()).symbols == [(0x100000, 4, "start")]


def test_compressed_symbols_are_left_out(memory: GuestMemory) -> None:
    image = bytearray(elf(32, [Segment(b"code")], symbols=[("start", 0x100000, 4)]))
    flags = len(image) - 2 * 40 + 8
    assert image[flags : flags + 4] == bytes(4)
    image[flags + 1] = 1 << 11 >> 8
    assert load(memory, bytes(image), BootOptions()).symbols == []


def test_a_bss_segment_has_no_place_in_the_file(memory: GuestMemory) -> None:
    """Linkers give it any offset, also one past the end."""
    segments = [Segment(b"code"), Segment(vaddr=0x200000, memory_size=8, offset=0x99999)]
    memory.write(0x200000, DIRT * 9)
    load(memory, elf(32, segments), BootOptions())
    assert memory.read(0x200000, 9) == bytes(8) + DIRT
