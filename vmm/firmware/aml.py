"""ACPI machine language, as much of it as a description of a board needs.

Each function gives the bytes of one construct; nesting the calls nests the constructs.

Source: ACPI 5.0, chapter 20 "AML specification", section 6.4 "Resource data types".
"""

from __future__ import annotations

import re
import struct

_ZERO, _ONE, _ONES = 0x00, 0x01, 0xFF
_BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")

# Terms and data (20.2).


def path(text: str) -> bytes:
    r"""A NameString such as ``_SB`` or ``\_SB.PCI0`` (20.2.2).

    Raises:
        ValueError: it is none.
    """
    root = text.startswith("\\")
    segments = text.removeprefix("\\").split(".")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(f"{text!r} is no AML name")
    names = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    match len(segments):
        case 1:
            prefix = b""
        case 2:
            prefix = b"\x2e"
        case count:
            prefix = bytes((0x2F, count))
    return (b"\\" if root else b"") + prefix + names


def integer(value: int) -> bytes:
    """The shortest form of a number of up to 64 bits (20.2.3).

    Raises:
        ValueError: it is negative or longer.
    """
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is no AML integer")
    if value in (_ZERO, _ONE):
        return bytes((value,))
    if value == (1 << 64) - 1:
        return bytes((_ONES,))
    for opcode, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4)):
        if value < 1 << 8 * size:
            return bytes((opcode,)) + value.to_bytes(size, "little")
    return bytes((_QWORD,)) + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    return bytes((_STRING,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A ``PNP0A03`` in its compressed form, a number (19.5.36 "EISAID").

    Raises:
        ValueError: it is no such id.
    """
    if not _EISA_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no EISA id")
    number = 0
    for letter in text[:3]:
        number = number << 5 | ord(letter) - 0x40
    big = number << 16 | int(text[3:], 16)
    return integer(int.from_bytes(big.to_bytes(4, "big"), "little"))


def _sized(opcode: bytes, content: bytes) -> bytes:
    """`opcode`, a PkgLength that counts itself, `content` (20.2.4)."""
    if len(content) + 1 < 1 << 6:
        return opcode + bytes((len(content) + 1,)) + content
    for more in (1, 2, 3):
        length = len(content) + 1 + more
        if length < 1 << 4 + 8 * more:
            head = bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little")
            return opcode + head + content
    raise ValueError(f"{len(content)} bytes are too many for one AML package")


def name(of: str, value: bytes) -> bytes:
    return _NAME + path(of) + value


def scope(of: str, *terms: bytes) -> bytes:
    return _sized(_SCOPE, path(of) + b"".join(terms))


def device(of: str, *terms: bytes) -> bytes:
    return _sized(_DEVICE, path(of) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    if len(elements) > 0xFF:
        raise ValueError(f"{len(elements)} elements are too many for one package")
    return _sized(_PACKAGE, bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return _sized(_BUFFER, integer(len(data)) + data)


# Resource descriptors (6.4).


def resources(*descriptors: bytes) -> bytes:
    """A resource template: a buffer of descriptors and an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def irq(line: int) -> bytes:
    """An ISA interrupt: edge-triggered, active high, not shared (6.4.2.1, the form without flags).

    Raises:
        ValueError: there are only the lines 0 to 15.
    """
    if not 0 <= line < 16:
        raise ValueError(f"no ISA interrupt {line}")
    return b"\x22" + (1 << line).to_bytes(2, "little")


def ports(first: int, length: int) -> bytes:
    """Fixed I/O ports, 16 address bits decoded (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, length)


def memory(first: int, length: int, *, writable: bool = True) -> bytes:
    """A fixed range below 4 GiB (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, writable, first, length)


_FIXED = 0b1100
"""Minimum and maximum address are fixed; positive decode, resource producer."""
_ENTIRE_RANGE = 3
_READ_WRITE = 1


def bus_numbers(first: int, last: int) -> bytes:
    """The buses behind a bridge (6.4.3.5.3)."""
    return _word_space(2, 0, first, last)


def port_window(first: int, last: int) -> bytes:
    """The I/O ports that a bridge passes on."""
    return _word_space(1, _ENTIRE_RANGE, first, last)


def _word_space(kind: int, flags: int, first: int, last: int) -> bytes:
    span = last - first + 1
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, _FIXED, flags, 0, first, last, 0, span)


def memory_window(first: int, last: int) -> bytes:
    """The addresses below 4 GiB that a bridge passes on, not cacheable (6.4.3.5.2)."""
    return struct.pack(
        "<BHBBBIIIII", 0x87, 23, 0, _FIXED, _READ_WRITE, 0, first, last, 0, last - first + 1
    )
