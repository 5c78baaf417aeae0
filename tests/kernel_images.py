"""Linux kernels for the boot tests, built field by field from the boot protocol."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

from boot_images import Segment, elf

CODE = b"kernel code"
KERNEL_BASE = 0xFFFF_FFFF_8000_0000
LOAD = 0x100_0000
MIB = 1 << 20


def note(owner: bytes, kind: int, data: bytes) -> bytes:
    name = owner + b"\0"
    pad = bytes(-len(name) % 4)
    return (
        struct.pack("<III", len(name), len(data), kind) + name + pad + data + bytes(-len(data) % 4)
    )


def pvh_note(entry: int, size: int = 8) -> bytes:
    return note(b"Xen", 18, entry.to_bytes(size, "little"))


def vmlinux(
    bits: int = 64, notes: bytes = note(b"Linux", 0x101, bytes(4)), code: bytes = CODE
) -> bytes:
    """A kernel at 16 MiB with a bss; its notes are in a PT_NOTE segment."""
    base = KERNEL_BASE if bits == 64 else 0xC000_0000
    segments = [
        Segment(code, base + LOAD, LOAD, len(code) + 0x3000),
        Segment(notes, base + LOAD + 0x10000, LOAD + 0x10000, kind=4),
    ]
    return elf(bits, segments, LOAD)


def lz4_legacy(data: bytes) -> bytes:
    """The legacy frame, its blocks of 8 MiB stored by the library's compressor."""
    import lz4.block

    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 * MIB):
        block = lz4.block.compress(data[at : at + 8 * MIB], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


def zstd(data: bytes) -> bytes:
    from backports import zstd as library

    packed: bytes = library.compress(data)
    return packed


def sized(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: compress(data) + struct.pack("<I", len(data))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    # gzip's own trailer is the size.
    "gzip": gzip.compress,
    "bzip2": sized(bz2.compress),
    "lzma": sized(lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    "xz": sized(lzma.compress),
    "lz4": sized(lz4_legacy),
    "zstd": sized(zstd),
    "none": lambda data: data,
}


def bzimage(
    payload: bytes | None = None,
    *,
    version: int = 0x20F,
    setup_sectors: int = 2,
    loadflags: int = 1,
    xloadflags: int = 1,
    init_size: int = 0x40_0000,
    pref_address: int = LOAD,
    initrd_addr_max: int = 0x7FFF_FFFF,
    cmdline_size: int = 255,
    payload_length: int | None = None,
    syssize: int | None = None,
    release: bytes = b"6.1.0-test (builder@host) #1",
    changes: Sequence[tuple[int, str, int]] = (),
) -> bytes:
    """A bzImage around `payload`; `changes`: (offset, layout, value) on top."""
    if payload is None:
        payload = COMPRESS["gzip"](vmlinux())
    stub = b"32-bit".ljust(0x200, b"\x90") + b"64-bit".ljust(0x200, b"\x90")
    kernel = stub + payload
    kernel += bytes(-len(kernel) % 16)
    start = (setup_sectors + 1) * 512
    image = bytearray(start)
    fields = [
        (0x1F1, "B", setup_sectors),
        (0x1F4, "<I", len(kernel) // 16 if syssize is None else syssize),
        (0x1FE, "<H", 0xAA55),
        (0x200, "<H", 0x6AEB),
        (0x206, "<H", version),
        (0x20E, "<H", 0x280),
        (0x211, "B", loadflags),
        (0x214, "<I", 0x100000),
        (0x22C, "<I", initrd_addr_max),
        (0x230, "<I", 0x200000),
        (0x234, "B", 1),
        (0x236, "<H", xloadflags),
        (0x238, "<I", cmdline_size),
        (0x248, "<I", len(stub)),
        (0x24C, "<I", len(payload) if payload_length is None else payload_length),
        (0x258, "<Q", pref_address),
        (0x260, "<I", init_size),
    ]
    for offset, layout, value in (*fields, *changes):
        struct.pack_into(layout, image, offset, value)
    image[0x202:0x206] = b"HdrS"
    image[0x480 : 0x480 + len(release)] = release
    return bytes(image) + kernel
