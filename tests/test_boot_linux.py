"""Linux by the x86 boot protocol: bzImages, their extracted vmlinux, and plain vmlinux files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from boot_images import Segment, elf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_images import CODE, COMPRESS, LOAD, MIB, bzimage, lz4_legacy, sized, vmlinux

from devices.errors import UserError
from vmm.boot import bzimage as bzimage_module
from vmm.boot import extract, kernel_cache
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, BootResult, KernelEntry, Mode, Module
from vmm.memory import GuestMemory

RSI, RSP, RBX, RBP, RDI = 6, 4, 3, 5, 7
INITRD = Module(b"initial RAM disk" * 1000, "initrd")
AS_BZIMAGE = BootOptions(kernel_entry=KernelEntry.BZIMAGE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jailed-vmm" / "kernels"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


class Page:
    """The boot parameters that a kernel was given."""

    def __init__(self, memory: GuestMemory, result: BootResult) -> None:
        self.memory = memory
        self.data = memory.read(result.state.gpr[RSI], 4096)

    def field(self, layout: str, offset: int) -> int:
        value: int = struct.unpack_from(layout, self.data, offset)[0]
        return value

    @property
    def cmdline(self) -> bytes:
        at = self.field("<I", 0x228)
        return self.memory.read(at, 300).partition(b"\0")[0]

    @property
    def initrd(self) -> tuple[int, int]:
        return self.field("<I", 0x218), self.field("<I", 0x21C)

    @property
    def e820(self) -> list[tuple[int, int, int]]:
        rows = range(0x2D0, 0x2D0 + 20 * self.data[0x1E8], 20)
        return [struct.unpack_from("<QQI", self.data, row) for row in rows]


# The bzImage by its own entries.


def test_64_bit_entry(memory: GuestMemory) -> None:
    result = load(memory, bzimage(), AS_BZIMAGE)
    state = result.state
    assert (result.format, state.rip) == ("linux-bzimage", LOAD + 0x200)
    assert memory.read(LOAD, 6) == b"32-bit"
    assert memory.read(state.rip, 6) == b"64-bit"
    assert (state.cs.selector, state.cs.attributes) == (0x10, 0xAF9B00)
    assert {s.selector for s in (state.ds, state.es, state.ss)} == {0x18}
    assert state.efer == 0x500
    assert state.cr0 & 1 << 31
    assert state.rflags == 2


@pytest.mark.parametrize(
    ("image", "entry"),
    [(bzimage(), KernelEntry.BZIMAGE32), (bzimage(xloadflags=0), KernelEntry.BZIMAGE)],
)
def test_32_bit_entry(memory: GuestMemory, image: bytes, entry: KernelEntry) -> None:
    state = load(memory, image, BootOptions(kernel_entry=entry)).state
    assert state.rip == LOAD
    assert (state.cs.selector, state.cs.attributes, state.cs.limit) == (0x10, 0xCF9B00, 0xFFFF_FFFF)
    assert {s.selector for s in (state.ds, state.es, state.ss)} == {0x18}
    assert (state.cr0 & 1 << 31, state.efer) == (0, 0)
    assert [state.gpr[r] for r in (RBX, RBP, RDI)] == [0, 0, 0]
    assert state.gpr[RSI]


@pytest.mark.parametrize("entry", [KernelEntry.BZIMAGE, KernelEntry.BZIMAGE32])
def test_the_gdt_holds_what_the_segments_say(memory: GuestMemory, entry: KernelEntry) -> None:
    state = load(memory, bzimage(), BootOptions(kernel_entry=entry)).state
    table = memory.read(state.gdtr.base, state.gdtr.limit + 1)
    for segment in (state.cs, state.ds):
        (row,) = struct.unpack_from("<Q", table, segment.selector)
        # Base 0; the attributes' bits 16 to 19 are the limit's highest.
        assert row == segment.attributes << 32 | 0xFFFF


def test_an_old_kernel_goes_to_1_mib(memory: GuestMemory) -> None:
    result = load(memory, bzimage(version=0x202), BootOptions(cmdline="x" * 255))
    assert result.state.rip == 0x100000
    assert len(result.notes) == 1
    with pytest.raises(UserError, match="has 256 bytes, this kernel takes at most 255"):
        load(memory, bzimage(version=0x202), BootOptions(cmdline="x" * 256))


# The extracted kernel.


@pytest.mark.parametrize("method", COMPRESS)
def test_extraction(memory: GuestMemory, method: str, cache: Path) -> None:
    image = bzimage(COMPRESS[method](vmlinux()))
    for _ in range(2):
        result = load(memory, image, BootOptions())
        assert (result.format, result.state.rip, result.notes) == ("linux-vmlinux", LOAD, [])
        assert memory.read(LOAD, len(CODE) + 1) == CODE + b"\0"
        assert result.state.cs.selector == 0x10
    kept = list(cache.glob("*")) if cache.exists() else []
    assert len(kept) == (method in ("gzip", "bzip2", "lzma", "xz"))


def test_lz4_of_many_blocks() -> None:
    kernel = vmlinux(code=bytes(range(256)) * (70 << 10))
    assert extract.vmlinux(memoryview(sized(lz4_legacy)(kernel))) == kernel


def test_a_32_bit_kernel_starts_in_32_bit_mode(memory: GuestMemory) -> None:
    image = bzimage(COMPRESS["xz"](vmlinux(32)), xloadflags=0)
    state = load(memory, image, BootOptions()).state
    assert (state.rip, state.cs.attributes, state.efer) == (LOAD, 0xCF9B00, 0)


def test_kaslr_is_the_decompressors_work(memory: GuestMemory) -> None:
    asked = BootOptions(cmdline="console=ttyS0 kaslr")
    assert load(memory, bzimage(), asked).format == "linux-bzimage"
    for text in ("nokaslr", "kaslr=1", "x=kaslr"):
        assert load(memory, bzimage(), BootOptions(cmdline=text)).format == "linux-vmlinux"
    forced = BootOptions(cmdline="kaslr", kernel_entry=KernelEntry.VMLINUX)
    assert load(memory, bzimage(), forced).format == "linux-vmlinux"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\x89LZO\0\r\n\x1a\n" + bytes(90), "compressed with LZO"),
        (b"what is this" * 9, "its compression is not known (magic 77 68 61 74)"),
        (b"", "the header names no payload"),
        (b"\x1f", "the header names no payload"),
    ],
)
def test_what_cannot_be_extracted_decompresses_itself(
    memory: GuestMemory, payload: bytes, reason: str
) -> None:
    result = load(memory, bzimage(payload), BootOptions())
    assert result.format == "linux-bzimage"
    assert [reason in line for line in result.notes] == [True]
    with pytest.raises(UserError, match="cannot be extracted: ") as caught:
        load(memory, bzimage(payload), BootOptions(kernel_entry=KernelEntry.VMLINUX))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("method", "library"), [("lz4", "lz4.block"), ("zstd", "backports")], ids=["lz4", "zstd"]
)
def test_without_the_library(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, method: str, library: str
) -> None:
    image = bzimage(COMPRESS[method](vmlinux()))
    monkeypatch.setitem(__import__("sys").modules, library, None)
    if method == "zstd":
        monkeypatch.setitem(__import__("sys").modules, "compression", None)
    result = load(memory, image, BootOptions())
    assert result.format == "linux-bzimage"
    assert "install " in result.notes[0]


# The cache.


def test_a_cached_kernel_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = vmlinux()
    payload = memoryview(COMPRESS["xz"](kernel))
    assert extract.vmlinux(payload) == kernel

    def nobody(*_: object) -> bytes:
        raise AssertionError("decompressed again")

    monkeypatch.setattr(extract, "_METHODS", ((b"\xfd7zXZ\0", "xz", nobody, True),))
    assert extract.vmlinux(payload) == kernel


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "header", "directory"])
def test_a_damaged_cache_is_not_believed(cache: Path, damage: str) -> None:
    kernel = vmlinux()
    payload = memoryview(COMPRESS["xz"](kernel))
    extract.vmlinux(payload)
    (file,) = cache.glob("*.vmlinux")
    good = bytearray(file.read_bytes())
    bad = {
        "flip": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:],
        "cut": good[:-1],
        "empty": b"",
        "longer": good + b"x",
        "header": b"VMLINUX" + good[7:],
    }
    if damage == "directory":
        file.unlink()
        file.mkdir()
        assert extract.vmlinux(payload) == kernel
        return
    file.write_bytes(bad[damage])
    assert extract.vmlinux(payload) == kernel
    assert file.read_bytes() == good
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_no_place_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    payload = memoryview(COMPRESS["xz"](vmlinux()))
    for place in (tmp_path / "file", "/proc/nowhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert extract.vmlinux(payload) == vmlinux()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache.directory() == tmp_path / ".cache" / "jailed-vmm" / "kernels"


def test_the_cache_does_not_grow_for_ever(cache: Path) -> None:
    for number in range(kernel_cache.KEEP + 3):
        extract.vmlinux(memoryview(COMPRESS["xz"](vmlinux(code=bytes([number])))))
    assert len(list(cache.iterdir())) == kernel_cache.KEEP


# The boot parameters.


@pytest.mark.parametrize("entry", [KernelEntry.VMLINUX, KernelEntry.BZIMAGE, KernelEntry.BZIMAGE32])
def test_parameters(memory: GuestMemory, entry: KernelEntry) -> None:
    options = BootOptions(
        cmdline="console=ttyS0 ä", initrd=INITRD, kernel_entry=entry, rsdp=0xE0000
    )
    image = bzimage()
    page = Page(memory, load(memory, image, options))
    assert page.cmdline == "console=ttyS0 ä".encode()
    start, size = page.initrd
    assert (start, size) == (64 * MIB - 0x4000, len(INITRD.data))
    assert memory.read(start, size) == INITRD.data
    assert page.field("<Q", 0x70) == 0xE0000
    assert page.field("B", 0x210) == 0xFF
    assert page.field("B", 0x211) == 1
    assert page.field("<I", 0x214) == LOAD
    assert page.field("B", 0x1EF) == 0
    changed = {*range(0x210, 0x212), *range(0x214, 0x220), *range(0x228, 0x22C)}
    for offset in range(0x1F1, 0x26C):
        assert offset in changed or page.data[offset] == image[offset], hex(offset)


def test_memory_map() -> None:
    memory = GuestMemory(5 << 30, 0x20000)
    try:
        page = Page(memory, load(memory, bzimage(), BootOptions()))
        assert page.e820 == [
            (0, 0x9FC00, 1),
            (0x9FC00, 0x400, 2),
            (0xE0000, 0x20000, 2),
            (MIB, 0xC000_0000 - MIB, 1),
            (0xD000_0000, 0x1000_0000, 2),
            (0xFFFE_0000, 0x20000, 2),
            (1 << 32, 2 << 30, 1),
        ]
    finally:
        memory.close()


def test_text_screen(memory: GuestMemory) -> None:
    page = Page(memory, load(memory, bzimage(), BootOptions()))
    assert (page.data[6], page.data[7], page.data[0xE], page.data[0xF]) == (3, 80, 25, 1)
    assert page.field("<H", 0x10) == 16


def test_nothing_asked_for(memory: GuestMemory) -> None:
    page = Page(memory, load(memory, bzimage(), BootOptions()))
    assert (page.cmdline, page.initrd, page.field("<Q", 0x70)) == (b"", (0, 0), 0)
    empty = BootOptions(initrd=Module(b""))
    assert Page(memory, load(memory, bzimage(), empty)).initrd == (0, 0)


def test_the_initrd_stays_below_what_the_kernel_reaches(memory: GuestMemory) -> None:
    options = BootOptions(initrd=INITRD)
    page = Page(memory, load(memory, bzimage(initrd_addr_max=0x2FF_FFFF), options))
    assert page.initrd[0] == 0x300_0000 - 0x4000
    # Its limit lies within the kernel: below it then.
    page = Page(memory, load(memory, bzimage(initrd_addr_max=LOAD + 0x5FF), options))
    assert page.initrd[0] == LOAD - 0x4000


# Plain vmlinux files.


@pytest.mark.parametrize("bits", [32, 64])
def test_vmlinux(memory: GuestMemory, bits: int) -> None:
    options = BootOptions(cmdline="quiet", initrd=INITRD)
    result = load(memory, vmlinux(bits), options)
    assert (result.format, result.state.rip) == ("linux-vmlinux", LOAD)
    assert bool(result.state.efer) == (bits == 64)
    page = Page(memory, result)
    assert page.cmdline == b"quiet"
    assert memory.read(*page.initrd) == INITRD.data
    assert page.data[0x1FE:0x200] + page.data[0x202:0x206] == b"\x55\xaaHdrS"


def test_a_kernel_is_known_by_its_banner(memory: GuestMemory) -> None:
    banner = b"Linux version 6.1.0"
    assert load(memory, vmlinux(notes=b"", code=banner), BootOptions()).format == "linux-vmlinux"
    program = elf(64, [Segment(banner)])
    assert load(memory, program, BootOptions()).format == "elf64"
    forced = BootOptions(kernel_entry=KernelEntry.VMLINUX, cmdline="x")
    assert load(memory, program, forced).format == "linux-vmlinux"


# Errors.

ERRORS = {
    "cut in the header": (bzimage()[:0x22F], "truncated Linux kernel: 559 bytes"),
    "only setup": (bzimage()[:0x600], "the kernel begins at 0x600, end of file at 0x600"),
    "cut": (bzimage()[:0x700], "the kernel ends at"),
    "old": (bzimage(version=0x201), "boot protocol 2.01; 2.02 is the oldest"),
    "zImage": (bzimage(loadflags=0), "a Linux zImage"),
    "payload past the end": (bzimage(payload_length=1 << 20), "its payload ends 0x100400 bytes"),
    "damaged gzip": (bzimage(COMPRESS["gzip"](vmlinux())[:-9] + b"damage!!!"), "payload"),
    "damaged xz": (bzimage(b"\xfd7zXZ\0" + bytes(99)), "its xz payload: "),
    "damaged bzip2": (bzimage(b"BZh9" + bytes(99)), "its bzip2 payload: "),
    "damaged lzma": (bzimage(b"\x5d\0\0" + b"\xff" * 90 + bytes(4)), "its LZMA payload"),
    "damaged lz4": (bzimage(b"\x02\x21\x4c\x18\x08\0\0\0" + b"\xff" * 8 + bytes(4)), "its LZ4 "),
    "lz4 past the end": (
        bzimage(b"\x02\x21\x4c\x18\xff\0\0\0" + bytes(9)),
        "a block of 0xff bytes at 0x8 leads past its end",
    ),
    "damaged zstd": (bzimage(b"\x28\xb5\x2f\xfd" + bytes(99)), "its zstd payload"),
    "a bomb": (
        bzimage(COMPRESS["gzip"](bytes(9 << 20))[:-4] + struct.pack("<I", 1000)),
        "payload holds more 0x3e9 bytes of the 0x3e8 it claims",
    ),
    "too little": (
        bzimage(COMPRESS["xz"](vmlinux())[:-4] + struct.pack("<I", 1 << 20)),
        f"only {len(vmlinux()):#x} bytes of the 0x100000 it claims",
    ),
    "too large": (bzimage(b"\x1f\x8b\x08" + b"\xff" * 9), "claims 0xffffffff bytes"),
    "no ELF": (bzimage(COMPRESS["xz"](b"no kernel")), "its xz payload is no ELF file"),
    "bad ELF": (
        bzimage(COMPRESS["xz"](vmlinux()[:70])),
        "the vmlinux in this bzImage: a truncated ELF file",
    ),
    "little memory": (
        bzimage(b"", init_size=0x400_0000),
        "Linux 6.1.0-test needs RAM up to 0x5000000 (80 MiB), the guest has 64 MiB there",
    ),
    "little memory for vmlinux": (
        bzimage(COMPRESS["xz"](vmlinux(code=bytes(48 * MIB)))),
        "Linux 6.1.0-test needs RAM up to 0x4003000 (65 MiB), the guest has 64 MiB there",
    ),
    "low kernel": (
        bzimage(b"", pref_address=0x1000),
        "the kernel at 0x1000-0x400fff overlaps the boot GDT",
    ),
    "nowhere": (bzimage(b"", pref_address=(1 << 64) - 1), "needs RAM up to 0x100000000003fffff"),
}


def message(image: bytes, options: BootOptions, size: int = 64 * MIB) -> str:
    memory = GuestMemory(size)
    try:
        with pytest.raises(UserError) as caught:
            load(memory, image, options)
    finally:
        memory.close()
    return str(caught.value)


@pytest.mark.parametrize("name", ERRORS)
def test_bad_kernels(name: str) -> None:
    image, text = ERRORS[name]
    line = message(image, BootOptions(name="vmlinuz"))
    assert line.startswith("vmlinuz: ")
    assert text in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (bzimage(), BootOptions(modules=(INITRD,)), "a Linux kernel takes no modules"),
        (vmlinux(), BootOptions(modules=(INITRD,)), "a Linux kernel takes no modules"),
        (bzimage(), BootOptions(cmdline="x" * 256), "256 bytes, this kernel takes at most 255"),
        (vmlinux(), BootOptions(cmdline="x" * 2048), "this kernel takes at most 2047"),
        (bzimage(cmdline_size=1 << 31), BootOptions(cmdline="x" * 65536), "at most 65535"),
        (bzimage(), BootOptions(cmdline="a\0b"), "the command line holds a NUL"),
        (bzimage(), BootOptions(initrd=Module(bytes(48 * MIB))), "no room for the initrd"),
        (bzimage(initrd_addr_max=99), BootOptions(initrd=INITRD), "no room for the initrd"),
        (vmlinux(), AS_BZIMAGE, "an ELF file, which has no entry of a bzImage"),
        (bzimage(), BootOptions(kernel_entry=KernelEntry.PVH), "it has no PVH entry"),
        (b"flat", AS_BZIMAGE, "a flat binary has one entry"),
        (b"flat", BootOptions(initrd=INITRD), "a flat binary takes no initrd"),
        (elf(64, [Segment(b"x")]), BootOptions(initrd=INITRD), "Multiboot kernel takes no initrd"),
        (bzimage(), BootOptions(rsdp=1 << 64), "root pointer cannot be at 0x10000000000000000"),
    ],
)
def test_bad_options(image: bytes, options: BootOptions, text: str) -> None:
    assert text in message(image, options)


def test_who_insists_gets_a_flat_binary(memory: GuestMemory) -> None:
    assert load(memory, bzimage(), BootOptions(load_addr=MIB)).format == "flat"
    assert load(memory, bzimage(), BootOptions(mode=Mode.REAL)).format == "real"


def test_the_release_is_told() -> None:
    assert bzimage_module.parse(bzimage()).release == "6.1.0-test"
    assert bzimage_module.parse(bzimage(changes=[(0x20E, "<H", 0)])).release == ""


# No bytes whatever raise anything else.

SEEDS = [bzimage(COMPRESS[method](vmlinux())) for method in COMPRESS] + [
    vmlinux(),
    vmlinux(32),
]
CHANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0x1F1, 0x268), st.integers(0, 0x900), st.integers(0xA00, 0xB80)),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(
            st.sampled_from([0, 1, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 64) - 1]),
            st.integers(0, (1 << 64) - 1),
        ),
    ),
    max_size=5,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.sampled_from(SEEDS),
    changes=CHANGES,
    cut=st.integers(0, 8000),
    entry=st.sampled_from(KernelEntry),
    initrd=st.none() | st.integers(0, 64 * MIB).map(lambda size: Module(bytes(size))),
)
def test_changed_kernels(  # noqa: PLR0917 -- one for each thing that varies
    memory: GuestMemory,
    seed: bytes,
    changes: list[tuple[int, int, int]],
    cut: int,
    entry: KernelEntry,
    initrd: Module | None,
) -> None:
    image = bytearray(seed)
    for offset, size, value in changes:
        if offset + size <= len(image):
            image[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    if cut < len(image) // 4:
        del image[len(image) - cut :]
    try:
        result = load(memory, bytes(image), BootOptions(kernel_entry=entry, initrd=initrd))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert any(ram.start <= result.state.rip < ram.end for ram in memory.ram)


def test_the_seeds_are_good(memory: GuestMemory) -> None:
    formats = {load(memory, seed, BootOptions()).format for seed in SEEDS}
    assert formats == {"linux-vmlinux"}
