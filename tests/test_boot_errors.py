"""What cannot be booted is told in one line that says what is wrong, and where."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest
from boot_images import (
    Segment,
    elf,
    multiboot_addresses,
    multiboot_elf,
    multiboot_header,
)

from devices.errors import UserError
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, Mode, Module
from vmm.memory import GuestMemory

MIB = 1 << 20

INSIST = "--load-addr to load it as a flat binary"


def put(image: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(image)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def multiboot2(architecture: int = 0) -> bytes:
    fields = (0xE85250D6, architecture, 16)
    return struct.pack("<4I", *fields, -sum(fields) & 0xFFFF_FFFF)


GOOD32, GOOD64 = elf(32, [Segment(b"code")]), elf(64, [Segment(b"code")])

ELF_ERRORS = {
    "magic only": (b"\x7fELF", "truncated ELF file: 4 bytes"),
    "half a header": (GOOD64[:40], "truncated ELF file: 40 bytes, its header has 64"),
    "half a header, 32": (GOOD32[:51], "truncated ELF file: 51 bytes, its header has 52"),
    "class": (put(GOOD32, 4, "B", 3), "unknown class 3 (offset 0x4)"),
    "endianness": (put(GOOD32, 5, "B", 2), "data encoding 2 (offset 0x5)"),
    "machine": (elf(64, [Segment(b"x")], machine=183), "for machine EM_AARCH64"),
    "machine of the other class": (elf(32, [Segment(b"x")], machine=62), "ELF32 file for machine"),
    "unknown machine": (elf(64, [Segment(b"x")], machine=0xBEEF), "for machine 48879"),
    "object file": (elf(64, [Segment(b"x")], kind=1), "of type ET_REL, which is not an executable"),
    "core file": (elf(64, [Segment(b"x")], kind=4), "of type ET_CORE"),
    "no program headers": (elf(64, []), "nothing to load: it has no program headers"),
    "no PT_LOAD": (elf(64, [Segment(b"x", kind=4)]), "it has no PT_LOAD segment"),
    "only empty PT_LOAD": (elf(64, [Segment()]), "it has no PT_LOAD segment"),
    "interpreter": (
        elf(64, [Segment(b"x"), Segment(b"/lib/ld.so", kind=3)]),
        "program header 1 asks for a dynamic linker (PT_INTERP)",
    ),
    "program headers past the end": (
        elf(32, [Segment(b"x")], phoff=0x1000),
        "program headers at 0x1000-0x101f, end of file at",
    ),
    "many program headers": (elf(32, [Segment(b"x")], phnum=900), "truncated ELF file: program"),
    "too many program headers": (elf(32, [Segment(b"x")], phnum=0xFFFF), "65535 program headers"),
    "size of program headers": (elf(64, [Segment(b"x")], phentsize=32), "headers of 32 bytes"),
    "segment past the end": (
        elf(32, [Segment(b"code", file_size=0x1000)]),
        "truncated ELF file: segment 0 is at file offset 0x60-0x105f, end of file at 0x64",
    ),
    "cut off": (GOOD32[:-1], "truncated ELF file: segment 0 is at file offset 0x60-0x63"),
    "file size above memory size": (
        elf(32, [Segment(b"code", memory_size=2)]),
        "segment 0 has 0x4 bytes in the file but only 0x2 in memory",
    ),
    "outside RAM": (
        elf(32, [Segment(b"code", vaddr=0x1000000)], entry=0x1000000),
        "segment 0 at 0x1000000-0x1000003 lies outside RAM (0x0-0xffffff)",
    ),
    "bss outside RAM": (
        elf(32, [Segment(b"code", memory_size=16 * MIB)]),
        "segment 0 at 0x100000-0x10fffff lies outside RAM",
    ),
    "end of the address space": (
        elf(64, [Segment(b"code", vaddr=(1 << 64) - 2)], entry=(1 << 64) - 2),
        "segment 0 at 0xfffffffffffffffe-0x10000000000000001 lies outside RAM",
    ),
    "overlap": (
        elf(32, [Segment(b"code" * 9), Segment(b"data", vaddr=0x100020)]),
        "segment 1 at 0x100020-0x100023 overlaps segment 0 at 0x100000-0x100023",
    ),
    "on the GDT": (
        elf(32, [Segment(b"code", vaddr=0xFFE)], entry=0xFFE),
        "segment 0 at 0xffe-0x1001 overlaps the boot GDT at 0x1000-0x101f",
    ),
    "on the page tables": (
        elf(64, [Segment(b"code", vaddr=0x2000)], entry=0x2000),
        "overlaps the boot page tables at 0x2000-0x7fff",
    ),
    "on the stack": (
        elf(32, [Segment(b"code", vaddr=0x8FFFC)], entry=0x8FFFC),
        "overlaps the boot stack at 0x80000-0x8ffff",
    ),
    "entry nowhere": (
        elf(32, [Segment(b"code")], entry=0x100004),
        "the entry point 0x100004 lies in no loaded segment",
    ),
    "no entry": (elf(64, [Segment(b"code")], entry=0), "the entry point 0x0 lies in no"),
    "Multiboot 2": (
        elf(32, [Segment(b"code")], front=bytes(4) + multiboot2()),
        "a Multiboot 2 kernel",
    ),
}

MULTIBOOT_ERRORS = {
    "unknown requirements": (
        multiboot_elf(flags=0x8009),
        "header at offset 0x54 demands features that are not known here: flag bits 3, 15",
    ),
    "neither ELF nor addresses": (multiboot_header() + bytes(99), "nothing says where to load it"),
    "broken ELF": (multiboot_elf()[:-1], "truncated ELF file: segment 0"),
    "fields cut off": (
        multiboot_header(0x10003, (1, 2)),
        "is truncated: its address fields end at 0x20, the file at 0x14",
    ),
    "fields past the search": (
        bytes(8180) + multiboot_header(0x10003, (0, 0, 0, 0, 0)),
        "is truncated: its address fields end at 0x2014",
    ),
    "header below load address": (
        multiboot_addresses(load=0x200000, header=0x1FFFF0),
        "header_addr 0x1ffff0 and load_addr 0x200000 ask for bytes outside the file",
    ),
    "begin before the file": (
        multiboot_addresses(load=0x200000, header=0x200051),
        "ask for bytes outside the file",
    ),
    "load end below load": (multiboot_addresses(load_end=0x1000), "load_end_addr 0x1000 is not"),
    "load end past the file": (
        multiboot_addresses(load_end=0x200000 + 149),
        "the kernel is truncated: it ends at file offset 0xd5, the file at 0xd4",
    ),
    "bss end below load end": (multiboot_addresses(bss_end=0x200010), "bss_end_addr 0x200010 is"),
    "entry outside": (
        multiboot_addresses(entry=0x200094),
        "entry_addr 0x200094 is outside the kernel (0x200000-0x200093)",
    ),
    "outside RAM": (
        multiboot_addresses(load=0x1000000),
        "the kernel at 0x1000000-0x1000093 lies outside RAM",
    ),
    "on the loader's GDT": (multiboot_addresses(load=0x1000), "overlaps the boot GDT"),
    "on the information": (multiboot_addresses(load=0x50000), "overlaps the kernel at 0x50000"),
    "high entry": (multiboot_elf(bits=64, entry=0x1_0000_0000), "0x100000000 lies in no loaded"),
}

FLAT_ERRORS = {
    "empty": (b"", "the file is empty"),
    "gzip": (gzip.compress(b"code"), "compressed with gzip; run gunzip on it first"),
    "xz": (lzma.compress(b"code"), "compressed with xz; run unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(9), "compressed with zstd"),
    "bzip2": (b"BZh91AY" + bytes(9), "compressed with bzip2"),
    "Multiboot checksum": (
        bytes(32) + multiboot_header(checksum=4) + bytes(64),
        "the Multiboot magic at offset 0x20 is followed by flags and a checksum that do not add",
    ),
    "Multiboot 2": (bytes(64) + multiboot2() + bytes(8), "a Multiboot 2 kernel"),
    "too large": (bytes(15 * MIB + 1), "the flat binary (0xf00001 bytes) at 0x100000-0x1000000 li"),
}


@pytest.mark.parametrize(
    ("image", "text"),
    [
        pytest.param(*case, id=f"{kind}: {name}")
        for kind, table in (
            ("ELF", ELF_ERRORS),
            ("Multiboot", MULTIBOOT_ERRORS),
            ("flat", FLAT_ERRORS),
        )
        for name, case in table.items()
    ],
)
def test_bad_images(image: bytes, text: str) -> None:
    assert text in message(image, BootOptions())


def message(image: bytes, options: BootOptions, size: int = 16 * MIB) -> str:
    memory = GuestMemory(size)
    try:
        with pytest.raises(UserError) as caught:
            load(memory, image, options)
    finally:
        memory.close()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{options.name}: ")
    return line


@pytest.mark.parametrize("offset", [4, 32768])
def test_elsewhere_there_is_no_multiboot_2_header(offset: int) -> None:
    memory = GuestMemory(16 * MIB)
    try:
        image = bytes(offset) + multiboot2() + bytes(8)
        assert load(memory, image, BootOptions()).format == "flat"
    finally:
        memory.close()


@pytest.mark.parametrize("name", ["gzip", "Multiboot checksum", "Multiboot 2"])
def test_who_insists_gets_a_flat_binary(name: str) -> None:
    image, _ = FLAT_ERRORS[name]
    assert INSIST in message(image, BootOptions())
    memory = GuestMemory(16 * MIB)
    try:
        assert load(memory, image, BootOptions(load_addr=0x100000)).format == "flat"
    finally:
        memory.close()


MODULE = (Module(b"m"),)

OPTION_ERRORS = [
    (b"flat", BootOptions(modules=MODULE), "a flat binary takes no modules"),
    (b"flat", BootOptions(cmdline="x"), "a flat binary takes no command line"),
    (GOOD32, BootOptions(modules=MODULE), "no Linux, PVH or Multiboot kernel takes no modules"),
    (GOOD32, BootOptions(cmdline="x"), "no Linux, PVH or Multiboot kernel takes no command line"),
    (GOOD32, BootOptions(load_addr=0x100000), "--load-addr is for flat binaries"),
    (GOOD64, BootOptions(mode=Mode.LONG), "--mode is for flat binaries"),
    (multiboot_elf(), BootOptions(mode=Mode.LONG), "a Multiboot kernel names its own CPU mode"),
    (multiboot_elf(), BootOptions(load_addr=0), "a Multiboot kernel names its own load address"),
    (multiboot_elf(), BootOptions(cmdline="a\0b"), "the command line holds a NUL character"),
    (multiboot_elf(), BootOptions(cmdline="\ud800"), "the command line is not text"),
    (
        multiboot_elf(),
        BootOptions(modules=(Module(b"", "\0"),)),
        "the text of module 0 holds a NUL character",
    ),
    (multiboot_elf(), BootOptions(cmdline="x" * 200000), "there is room for 0x30000"),
    (
        multiboot_elf(),
        BootOptions(modules=(Module(b"m"), Module(bytes(15 * MIB)))),
        "no room for module 1 (0xf00000 bytes) in RAM below 0x1000000",
    ),
    (b"flat", BootOptions(load_addr=16 * MIB), "at 0x1000000-0x1000003 lies outside RAM"),
    (b"flat", BootOptions(load_addr=16 * MIB - 3), "lies outside RAM"),
    (b"flat", BootOptions(load_addr=-1), "at -0x1-0x2 lies outside RAM"),
    (b"flat", BootOptions(load_addr=1 << 70), "lies outside RAM"),
    (b"flat", BootOptions(mode=48), "there is no CPU mode 48"),  # type: ignore[arg-type]
    (b"flat", BootOptions(load_addr=0x1000), "overlaps the boot GDT"),
    (b"flat", BootOptions(load_addr=0x2000, mode=Mode.LONG), "overlaps the boot page tables"),
]


@pytest.mark.parametrize(("image", "options", "text"), OPTION_ERRORS)
def test_bad_options(image: bytes, options: BootOptions, text: str) -> None:
    assert text in message(image, options)


def test_the_image_is_named() -> None:
    assert message(b"", BootOptions(name="my.bin")) == "my.bin: the file is empty"


def test_one_mebibyte_of_ram_has_no_room_at_the_default_address() -> None:
    assert "lies outside RAM (0x0-0xfffff)" in message(b"x", BootOptions(), MIB)
