"""Multiboot 1 kernels: header, information structure, modules, entry state."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from boot_images import Segment, elf, multiboot_addresses, multiboot_elf, multiboot_header

from vmm.boot.loader import load
from vmm.boot.options import BootOptions, BootResult, Module
from vmm.cpu.state import CODE32
from vmm.memory import GuestMemory

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(16 * MIB)
    yield ram
    ram.close()


@dataclass
class Info:
    """The information structure as a kernel reads it (specification, section 3.3)."""

    flags: int
    lower: int
    upper: int
    cmdline: bytes
    modules: list[tuple[int, int, bytes]]
    map: list[tuple[int, int, int]]
    loader: bytes


def read_info(memory: GuestMemory, address: int) -> Info:
    def word(offset: int, base: int = address) -> int:
        return int.from_bytes(memory.read(base + offset, 4), "little")

    def text(at: int) -> bytes:
        data = memory.read(at, 0x8000)
        return data[: data.index(b"\0")]

    modules = []
    for number in range(word(20)):
        row = word(24) + 16 * number
        assert word(12, row) == 0, "reserved"
        modules.append((word(0, row), word(4, row), text(word(8, row))))
    entries, at, end = [], word(48), word(48) + word(44)
    while at < end:
        (size, *entry) = struct.unpack("<IQQI", memory.read(at, 24))
        entries.append(tuple(entry))
        at += size + 4
    assert at == end
    return Info(word(0), word(4), word(8), text(word(16)), modules, entries, text(word(64)))


def boot(memory: GuestMemory, image: bytes, **options: object) -> tuple[BootResult, Info]:
    result = load(memory, image, BootOptions(**options))  # type: ignore[arg-type]
    assert result.format == "multiboot"
    assert result.state.gpr[0] == 0x2BADB002
    return result, read_info(memory, result.state.gpr[3])


def test_machine_state(memory: GuestMemory) -> None:
    """Section 3.2: EAX, EBX, flat segments, A20 (always on here), CR0, EFLAGS."""
    state = boot(memory, multiboot_elf())[0].state
    assert state.cs.attributes == CODE32
    assert {segment.limit for segment in (state.cs, state.ds, state.ss)} == {0xFFFF_FFFF}
    assert state.cr0 & 0x80000001 == 1
    assert state.rflags & (1 << 17 | 1 << 9) == 0
    assert state.rip == 0x100000


def test_information(memory: GuestMemory) -> None:
    info = boot(memory, multiboot_elf(), cmdline="a=b c")[1]
    assert info == Info(
        flags=1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9,
        lower=639,
        upper=15 * 1024,
        cmdline=b"a=b c",
        modules=[],
        map=[(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 15 * MIB, 1)],
        loader=b"jailed-vmm",
    )


def test_memory_above_4_gib_is_in_the_map_only() -> None:
    memory = GuestMemory(5 * GIB)
    try:
        info = boot(memory, multiboot_elf())[1]
        assert info.upper == (3 * GIB - MIB) >> 10
        assert info.map[2:] == [(MIB, 3 * GIB - MIB, 1), (4 * GIB, 2 * GIB, 1)]
    finally:
        memory.close()


def test_a_command_line_is_utf8_and_raw_bytes_survive(memory: GuestMemory) -> None:
    assert boot(memory, multiboot_elf(), cmdline="ä\udcff")[1].cmdline == b"\xc3\xa4\xff"


def test_modules_follow_the_kernel_on_page_boundaries(memory: GuestMemory) -> None:
    texts = ("first", "", "third one")
    contents = (b"1" * 5000, b"", b"3")
    modules = tuple(Module(data, text) for data, text in zip(contents, texts, strict=True))
    result, info = boot(memory, multiboot_elf(), modules=modules)
    # The kernel's segment ends at 0x102345.
    assert info.modules == [
        (0x103000, 0x103000 + 5000, b"first"),
        (0x105000, 0x105000, b""),
        (0x106000, 0x106001, b"third one"),
    ]
    assert [memory.read(start, end - start) for start, end, _ in info.modules] == list(contents)
    assert result.state.rip == 0x100000


def test_modules_go_below_a_kernel_at_the_end_of_memory(memory: GuestMemory) -> None:
    image = elf(32, [Segment(b"k" * 4096, vaddr=0xFFF000)], 0xFFF000, front=multiboot_header())
    info = boot(memory, image, modules=(Module(b"m" * 10),))[1]
    assert info.modules[0][:2] == (MIB, MIB + 10)


def test_a_module_may_fill_memory_to_its_end(memory: GuestMemory) -> None:
    room = 16 * MIB - 0x103000
    info = boot(memory, multiboot_elf(), modules=(Module(b"m" * room),))[1]
    assert info.modules[0][:2] == (0x103000, 16 * MIB)


def test_modules_pass_between_the_segments_of_a_kernel() -> None:
    """The hole between two segments is not used while there is room above; then it is."""
    memory = GuestMemory(4 * MIB)
    try:
        segments = [Segment(b"a", vaddr=0x100000), Segment(b"b" * 4096, vaddr=0x3FE000)]
        image = elf(32, segments, front=multiboot_header())
        modules = (Module(b"x" * 4096), Module(b"y" * 4096))
        info = boot(memory, image, modules=modules)[1]
        assert [start for start, _, _ in info.modules] == [0x3FF000, 0x101000]
    finally:
        memory.close()


@pytest.mark.parametrize("offset", [0, 4, 100, 8192 - 12])
def test_the_header_is_found_in_the_first_8192_bytes(memory: GuestMemory, offset: int) -> None:
    """In front of the search limit it counts, whatever the file is otherwise."""
    image = b"\xcc" * offset + multiboot_header(3) + bytes(100)
    with pytest.raises(Exception, match=f"header at offset {offset:#x} has no address fields"):
        load(memory, image, BootOptions())


@pytest.mark.parametrize("offset", [2, 8192 - 8, 8192, 9000])
def test_elsewhere_there_is_no_header(memory: GuestMemory, offset: int) -> None:
    image = b"\xcc" * offset + multiboot_header(3) + bytes(100)
    assert load(memory, image, BootOptions()).format == "flat"


def test_a_wrong_checksum_first_and_a_right_one_later(memory: GuestMemory) -> None:
    image = elf(32, [Segment(b"k")], front=multiboot_header(checksum=1) + multiboot_header())
    assert load(memory, image, BootOptions()).format == "multiboot"


def test_multiboot_wins_over_elf(memory: GuestMemory) -> None:
    assert load(memory, elf(32, [Segment(b"k")]), BootOptions()).format == "elf32"
    assert load(memory, multiboot_elf(), BootOptions()).format == "multiboot"


def test_elf64_kernel_starts_in_32_bit_mode(memory: GuestMemory) -> None:
    state = boot(memory, multiboot_elf(bits=64))[0].state
    assert (state.cs.attributes, state.efer, state.rip) == (CODE32, 0, 0x100000)


def test_symbols_of_an_elf_kernel(memory: GuestMemory) -> None:
    result = boot(memory, multiboot_elf(symbols=[("kmain", 0x100000, 4)]))[0]
    assert result.symbols == [(0x100000, 4, "kmain")]


def test_a_video_request_is_noted_and_not_answered(memory: GuestMemory) -> None:
    result, info = boot(memory, multiboot_elf(flags=7))
    assert ["no display" in note for note in result.notes] == [True]
    assert info.flags & (1 << 11 | 1 << 12) == 0


def test_address_fields(memory: GuestMemory) -> None:
    memory.write(0x200000, b"\xa5" * 0x2000)
    image = multiboot_addresses(load=0x200000, bss_end=0x201000, body=b"code" * 25)
    result, info = boot(memory, image, modules=(Module(b"m"),))
    assert result.state.rip == 0x200000 + 16 + 32
    assert memory.read(0x200000, 16) == b"L" * 16
    assert memory.read(0x200000 + 48, 100) == b"code" * 25
    assert memory.read(0x200000 + 148, 0x1000 - 148) == bytes(0x1000 - 148)
    assert memory.read(0x201000, 1) == b"m"
    assert info.modules[0][:2] == (0x201000, 0x201001)


def test_address_fields_with_a_load_end(memory: GuestMemory) -> None:
    image = multiboot_addresses(load_end=0x200000 + 52, body=b"code, not loaded")
    boot(memory, image)
    assert memory.read(0x200000 + 48, 8) == b"code\0\0\0\0"


def test_address_fields_win_over_elf_headers(memory: GuestMemory) -> None:
    """ "the boot loader should use them instead of the fields in the actual executable header"."""
    addresses = (0x300000 + 84, 0x300000, 0, 0, 0x300000)
    front = multiboot_header(0x10003, addresses)
    image = elf(32, [Segment(b"k")], front=front)
    result, _ = boot(memory, image)
    assert result.state.rip == 0x300000
    assert memory.read(0x300000, len(image)) == image


def test_without_address_flag_the_fields_do_not_count(memory: GuestMemory) -> None:
    front = multiboot_header(0x3, (1, 2, 3, 4, 5))
    assert boot(memory, elf(32, [Segment(b"k")], front=front))[0].state.rip == 0x100000


def test_optional_flags_that_are_not_known_do_not_matter(memory: GuestMemory) -> None:
    assert boot(memory, multiboot_elf(flags=0xFFFE0003))[0].format == "multiboot"
