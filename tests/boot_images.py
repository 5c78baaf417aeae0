"""Images for the boot tests, built field by field from the specifications."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MULTIBOOT_MAGIC = 0x1BADB002


@dataclass
class Segment:
    """A program header; `kind` 1 is PT_LOAD. None: derived from the data."""

    data: bytes = b""
    vaddr: int = 0x100000
    paddr: int | None = None
    memory_size: int | None = None
    kind: int = 1
    file_size: int | None = None
    offset: int | None = None


def elf(
    bits: int,
    segments: list[Segment],
    entry: int = 0x100000,
    *,
    machine: int | None = None,
    kind: int = 2,
    data: int = 1,
    symbols: list[tuple[str, int, int]] | None = None,
    front: bytes = b"",
    phnum: int | None = None,
    phentsize: int | None = None,
    phoff: int | None = None,
) -> bytes:
    """An ELF file: header, program headers, `front`, the segments' data, symbol table.

    `symbols` are (name, value, size).
    """
    header_size, row_size = (52, 32) if bits == 32 else (64, 56)
    body = bytearray(front)
    start = header_size + row_size * len(segments)
    rows = b""
    for segment in segments:
        body += bytes(-(start + len(body)) % 16)
        offset = start + len(body) if segment.offset is None else segment.offset
        body += segment.data
        size = len(segment.data) if segment.file_size is None else segment.file_size
        memory = size if segment.memory_size is None else segment.memory_size
        paddr = segment.vaddr if segment.paddr is None else segment.paddr
        if bits == 32:
            rows += struct.pack(
                "<8I", segment.kind, offset, segment.vaddr, paddr, size, memory, 7, 4
            )
        else:
            rows += struct.pack(
                "<2I6Q", segment.kind, 7, offset, segment.vaddr, paddr, size, memory, 4
            )
    table, count = 0, 0
    if symbols is not None:
        names = b"\0" + b"".join(name.encode() + b"\0" for name, _, _ in symbols)
        at, entries = 1, bytes(16 if bits == 32 else 24)
        for name, value, size in symbols:
            if bits == 32:
                entries += struct.pack("<IIIBBH", at, value, size, 0x12, 0, 1)
            else:
                entries += struct.pack("<IBBHQQ", at, 0x12, 0, 1, value, size)
            at += len(name) + 1
        symbols_at = start + len(body)
        body += entries + names
        table, count = start + len(body), 3
        layout = "<10I" if bits == 32 else "<2I4Q2I2Q"
        row = len(entries) // (len(symbols) + 1)
        body += bytes(struct.calcsize(layout))
        body += struct.pack(layout, 0, 2, 0, 0, symbols_at, len(entries), 2, 1, 4, row)
        body += struct.pack(layout, 0, 3, 0, 0, symbols_at + len(entries), len(names), 0, 0, 1, 0)
    ident = b"\x7fELF" + bytes([1 if bits == 32 else 2, data, 1]) + bytes(9)
    machine = {32: 3, 64: 62}[bits] if machine is None else machine
    header = ident + struct.pack(
        "<HHI3IIHHHHHH" if bits == 32 else "<HHI3QIHHHHHH",
        *(kind, machine, 1, entry, header_size if phoff is None else phoff, table, 0),
        *(header_size, row_size if phentsize is None else phentsize),
        *(len(segments) if phnum is None else phnum, 40 if bits == 32 else 64, count, 0),
    )
    return bytes(header + rows + body)


def multiboot_header(flags: int = 3, addresses: tuple[int, ...] = (), checksum: int = 0) -> bytes:
    """A Multiboot header; `checksum` is added to the right one."""
    right = -(MULTIBOOT_MAGIC + flags) + checksum & 0xFFFF_FFFF
    return struct.pack(f"<{3 + len(addresses)}I", MULTIBOOT_MAGIC, flags, right, *addresses)


def multiboot_elf(flags: int = 3, bits: int = 32, entry: int = 0x100000, **more: object) -> bytes:
    """A Multiboot kernel in an ELF file with one segment."""
    segments = [Segment(b"kernel bytes".ljust(64, b"."), memory_size=0x2345)]
    return elf(bits, segments, entry, front=multiboot_header(flags), **more)  # type: ignore[arg-type]


def multiboot_addresses(
    *,
    prefix: int = 64,
    body: bytes = b"\x90" * 100,
    load: int = 0x200000,
    load_end: int = 0,
    bss_end: int = 0,
    entry: int | None = None,
    flags: int = 0x10003,
    header: int | None = None,
    lead: int = 16,
) -> bytes:
    """A kernel that is no ELF file: `prefix` bytes that are not loaded, `lead` bytes, header, body.

    What is loaded begins `lead` bytes in front of the header.
    """
    header_address = load + lead if header is None else header
    entry = load + lead + 32 if entry is None else entry
    addresses = (header_address, load, load_end, bss_end, entry)
    return b"P" * prefix + b"L" * lead + multiboot_header(flags, addresses) + body
