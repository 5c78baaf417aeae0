"""Kernels that are entered by their PVH note."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from boot_images import Segment, elf, multiboot_elf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_images import COMPRESS, LOAD, MIB, bzimage, note, pvh_note, vmlinux

from devices.errors import UserError
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, BootResult, KernelEntry, Module
from vmm.memory import GuestMemory

EBX = 3
LINUX = note(b"Linux", 0x101, bytes(4))
INITRD = Module(b"disk" * 3000, "the disk")
BOTH = vmlinux(notes=LINUX + pvh_note(LOAD + 4))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


class Info:
    """The start information that a kernel was given."""

    def __init__(self, memory: GuestMemory, result: BootResult) -> None:
        self.memory = memory
        fields = struct.unpack("<4I4Q2I", memory.read(result.state.gpr[EBX], 56))
        self.magic, self.version, self.flags, self.modules = fields[:4]
        self.modlist, self.cmdline_at, self.rsdp, self.map_at = fields[4:8]
        self.map_entries = fields[8]

    def text(self, address: int) -> bytes:
        return self.memory.read(address, 300).partition(b"\0")[0]

    def module(self, index: int) -> tuple[bytes, bytes]:
        """Its bytes and its text."""
        row = self.memory.read(self.modlist + 32 * index, 32)
        start, size, text, reserved = struct.unpack("<4Q", row)
        assert reserved == 0
        return self.memory.read(start, size), self.text(text)

    @property
    def map(self) -> list[tuple[int, ...]]:
        rows = range(self.map_at, self.map_at + 24 * self.map_entries, 24)
        return [struct.unpack("<QQII", self.memory.read(row, 24)) for row in rows]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("size", [4, 8])
def test_entry_state(memory: GuestMemory, bits: int, size: int) -> None:
    image = vmlinux(bits, notes=LINUX + pvh_note(LOAD + 4, size))
    result = load(memory, image, BootOptions())
    state = result.state
    assert (result.format, state.rip) == ("pvh", LOAD + 4)
    assert (state.cr0, state.cr4, state.efer, state.rflags) == (0x11, 0, 0, 2)
    for segment in (state.cs, state.ds, state.es, state.ss):
        assert (segment.base, segment.limit) == (0, 0xFFFF_FFFF)
    assert (state.cs.attributes, state.ds.attributes) == (0xCF9B00, 0xCF9300)
    assert (state.tr.base, state.tr.limit, state.tr.attributes) == (0, 0x67, 0x8B00)


def test_start_information(memory: GuestMemory) -> None:
    options = BootOptions(
        cmdline="root=/dev/nowhere",
        initrd=INITRD,
        modules=(Module(b"more", "second"), Module(b"", "third")),
        rsdp=0xF_0010,
    )
    info = Info(memory, load(memory, BOTH, options))
    assert (info.magic, info.version, info.flags, info.modules) == (0x336EC578, 1, 0, 3)
    assert info.text(info.cmdline_at) == b"root=/dev/nowhere"
    assert info.rsdp == 0xF_0010
    assert info.module(0) == (INITRD.data, b"the disk")
    assert info.module(1) == (b"more", b"second")
    assert info.module(2) == (b"", b"third")
    assert info.map == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x400, 2, 0),
        (0xE0000, 0x20000, 2, 0),
        (MIB, 63 * MIB, 1, 0),
        (0xD000_0000, 0x1000_0000, 2, 0),
    ]


def test_no_modules(memory: GuestMemory) -> None:
    info = Info(memory, load(memory, BOTH, BootOptions()))
    assert (info.modules, info.modlist, info.rsdp, info.text(info.cmdline_at)) == (0, 0, 0, b"")


def test_the_user_chooses_between_the_entries(memory: GuestMemory) -> None:
    chosen = {
        entry: load(memory, BOTH, BootOptions(kernel_entry=entry))
        for entry in (KernelEntry.AUTO, KernelEntry.PVH, KernelEntry.VMLINUX)
    }
    assert [(r.format, r.state.rip) for r in chosen.values()] == [
        ("pvh", LOAD + 4),
        ("pvh", LOAD + 4),
        ("linux-vmlinux", LOAD),
    ]


def test_a_bzimage_by_the_note_of_its_kernel(memory: GuestMemory) -> None:
    image = bzimage(COMPRESS["lz4"](BOTH))
    by_note = BootOptions(kernel_entry=KernelEntry.PVH, modules=(INITRD,))
    result = load(memory, image, by_note)
    assert (result.format, result.state.rip) == ("pvh", LOAD + 4)
    assert Info(memory, result).modules == 1
    assert load(memory, image, BootOptions()).format == "linux-vmlinux"


def test_multiboot_wins_over_the_note(memory: GuestMemory) -> None:
    """And takes the initial RAM disk as its first module."""
    options = BootOptions(initrd=INITRD, modules=(Module(b"more", "second"),))
    result = load(memory, multiboot_elf(), options)
    assert result.format == "multiboot"
    count, at = struct.unpack("<II", memory.read(result.state.gpr[EBX] + 20, 8))
    assert count == 2
    start, end, text, _ = struct.unpack("<4I", memory.read(at, 16))
    assert memory.read(start, end - start) == INITRD.data
    assert memory.read(text, 9) == b"the disk\0"


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (
            vmlinux(notes=pvh_note(LOAD + 0x4000)),
            BootOptions(),
            "the PVH entry 0x1004000 lies in no loaded segment",
        ),
        (
            vmlinux(),
            BootOptions(kernel_entry=KernelEntry.PVH),
            "it has no PVH entry (ELF note 18 of Xen)",
        ),
        (
            elf(64, [Segment(b"x")]),
            BootOptions(kernel_entry=KernelEntry.PVH),
            "it has no PVH entry",
        ),
        (BOTH, BootOptions(cmdline="x" * (192 << 10)), "of PVH start information, there is room"),
        (BOTH, BootOptions(cmdline="a\0b"), "the command line holds a NUL"),
        (BOTH, BootOptions(initrd=Module(bytes(60 * MIB))), "no room for the initrd"),
        (BOTH, BootOptions(kernel_entry=KernelEntry.BZIMAGE), "has no entry of a bzImage"),
    ],
)
def test_errors(memory: GuestMemory, image: bytes, options: BootOptions, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load(memory, image, options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "notes",
    [
        note(b"Xen", 18, bytes(3)),
        note(b"xen", 18, bytes(4)),
        note(b"Xen", 17, bytes(4)),
        pvh_note(LOAD)[:-1],
        b"\xff" * 40,
        b"",
        bytes(5),
    ],
)
def test_what_is_no_such_note(memory: GuestMemory, notes: bytes) -> None:
    assert load(memory, vmlinux(notes=LINUX + notes), BootOptions()).format == "linux-vmlinux"


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(notes=st.binary(max_size=200), cut=st.integers(0, 60))
def test_any_notes(memory: GuestMemory, notes: bytes, cut: int) -> None:
    image = vmlinux(notes=notes + pvh_note(LOAD) + notes)
    for data in (image, image[: len(image) - cut]):
        try:
            result = load(memory, data, BootOptions())
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert result.format in ("pvh", "linux-vmlinux", "elf64")
