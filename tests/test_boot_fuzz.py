"""No bytes whatever make the loader raise anything but `UserError`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from boot_images import Segment, elf, multiboot_addresses, multiboot_elf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.errors import UserError
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, Mode, Module
from vmm.memory import GuestMemory

SYMBOLS = [("start", 0x100000, 4), ("end", 0x100004, 0)]
SEEDS = [
    elf(32, [Segment(b"code"), Segment(b"d", vaddr=0x200000, memory_size=99)], symbols=SYMBOLS),
    elf(64, [Segment(b"code"), Segment(b"d", vaddr=0x200000, memory_size=99)], symbols=SYMBOLS),
    elf(64, [Segment(b"code"), Segment(b"dyn" * 40, kind=2), Segment(b"n" * 40, kind=4)]),
    multiboot_elf(flags=7, symbols=SYMBOLS),
    multiboot_elf(bits=64),
    multiboot_addresses(),
    multiboot_addresses(prefix=0, load_end=0x200080, bss_end=0x200800),
]
MODULES = (Module(b"m" * 5000, "text"),)

# Headers hold what matters: most changes go there, and most values are at an edge.
EDGES = st.sampled_from(
    [
        *(0, 1, 2, 3, 4, 0x1F, 0x20, 0x7F, 0x80, 0xFE, 0xFF, 0x1000, 0xFFFF, 0x10000, 0x100000),
        *(0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1),
    ]
)
CHANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 160), st.integers(0, 1 << 10)),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(EDGES, st.integers(0, (1 << 64) - 1)),
    ),
    max_size=6,
)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(4 << 20)
    yield ram
    ram.close()


def attempt(memory: GuestMemory, image: bytes, options: BootOptions) -> str:
    """The format, or the error's text."""
    try:
        result = load(memory, image, options)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert line.startswith("image: ")
        return line
    entry = result.state.rip
    assert any(ram.start <= entry < ram.end for ram in memory.regions)
    assert result.symbols == sorted(result.symbols)
    return result.format


@FUZZ
@given(seed=st.sampled_from(SEEDS), changes=CHANGES, cut=st.integers(0, 1 << 10))
def test_changed_images(
    memory: GuestMemory, seed: bytes, changes: list[tuple[int, int, int]], cut: int
) -> None:
    image = bytearray(seed)
    for offset, size, value in changes:
        if offset + size <= len(image):
            image[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    if cut < 200:
        del image[len(image) - cut :]
    attempt(memory, bytes(image), BootOptions())
    attempt(memory, bytes(image), BootOptions(modules=MODULES, cmdline="x"))


@FUZZ
@given(
    image=st.binary(max_size=300),
    magic=st.sampled_from([b"", b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01\x01"]),
    address=st.none() | st.integers(-(1 << 66), 1 << 66) | st.integers(0, 5 << 20),
    mode=st.none() | st.sampled_from(Mode),
)
def test_any_bytes(
    memory: GuestMemory, image: bytes, magic: bytes, address: int | None, mode: Mode | None
) -> None:
    attempt(memory, magic + image, BootOptions(load_addr=address, mode=mode))


@FUZZ
@given(cmdline=st.text(), texts=st.lists(st.text(), max_size=3), size=st.integers(0, 5 << 20))
def test_any_texts_and_modules(
    memory: GuestMemory, cmdline: str, texts: list[str], size: int
) -> None:
    modules = tuple(Module(bytes(size), text) for text in texts)
    attempt(memory, SEEDS[3], BootOptions(cmdline=cmdline, modules=modules))


def test_the_seeds_are_good(memory: GuestMemory) -> None:
    """Else nothing behind the first check was ever fuzzed."""
    formats = [attempt(memory, seed, BootOptions()) for seed in SEEDS]
    assert formats == ["elf32", "elf64", "elf64", *["multiboot"] * 4]


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_every_truncation(memory: GuestMemory, seed: int) -> None:
    for length in range(len(SEEDS[seed])):
        attempt(memory, SEEDS[seed][:length], BootOptions())
