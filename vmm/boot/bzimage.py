"""The bzImage container: the setup header and what it says about the kernel behind it.

Source: Linux, Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot
Protocol"); offsets and field names are those of that document.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.errors import UserError
from vmm.boot.boot_params import HDRS, HEADER, HEADER_END, LOADED_HIGH, Setup

SECTOR = 512
ENTRY_64 = 0x200
"""Offset of the 64-bit entry in the protected-mode kernel; the 32-bit one is at 0."""

_XLF_KERNEL_64 = 1 << 0
_OLDEST = 0x202
_OLD_COMMAND_LINE = 255
_OLD_INITRD_END = 0x3800_0000
_LOAD_ADDRESS = 0x10_0000
_HEADER_SIZE = 0x230
"""No kernel of a version that is taken has a smaller file than this."""


@dataclass(frozen=True, slots=True)
class BzImage:
    """A bzImage's header, checked.

    Attributes:
        version: of the boot protocol, as 0x020F for 2.15.
        release: the kernel's version text, or "".
        setup: what it says about its parameters.
        kernel: the protected-mode kernel, which is its decompressor.
        payload: the compressed vmlinux in it, with the size that may follow; empty: not told.
        load_address: where `kernel` wants to lie.
        room: bytes that it wants free from there on, itself included.
        long_mode: it has a 64-bit entry.
    """

    version: int
    release: str
    setup: Setup
    kernel: memoryview
    payload: memoryview
    load_address: int
    room: int
    long_mode: bool


def is_bzimage(image: bytes) -> bool:
    """Whether a setup header is there."""
    return image[0x1FE:0x200] == b"\x55\xaa" and image[0x202:0x206] == HDRS


def parse(image: bytes) -> BzImage:
    """Read and check the header.

    Raises:
        UserError: it cannot be booted, and why.
    """
    if not is_bzimage(image):
        raise UserError("no Linux bzImage: there is no HdrS at offset 0x202")
    if len(image) < _HEADER_SIZE:
        raise UserError(f"a truncated Linux kernel: {len(image)} bytes, less than its header")
    # What an old or truncated header lacks reads as zero.
    page = image[:HEADER_END].ljust(HEADER_END, b"\0")

    def field(layout: str, offset: int, since: int, default: int = 0) -> int:
        value: int = struct.unpack_from(layout, page, offset)[0]
        return value if version >= since else default

    version = int.from_bytes(page[0x206:0x208], "little")
    text = f"{version >> 8}.{version & 0xFF:02}"
    if version < _OLDEST:
        raise UserError(f"a Linux kernel of boot protocol {text}; 2.02 is the oldest that is known")
    if not page[0x211] & LOADED_HIGH:
        raise UserError("a Linux zImage, which runs below 1 MiB; only bzImages are supported")
    end = min(0x202 + page[0x201], HEADER_END)
    start = ((page[0x1F1] or 4) + 1) * SECTOR
    size = field("<I", 0x1F4, 0x204) * 16
    if start >= len(image):
        raise UserError(
            f"a truncated Linux kernel: the kernel begins at {start:#x}, "
            f"end of file at {len(image):#x}"
        )
    # syssize counts paragraphs: the last one may be cut short.
    if start + size - 15 > len(image):
        raise UserError(
            f"a truncated Linux kernel: the kernel ends at {start + size:#x} (syssize), "
            f"end of file at {len(image):#x}"
        )
    kernel = memoryview(image)[start:]
    setup = Setup(
        page[HEADER:end],
        field("<I", 0x238, 0x206, _OLD_COMMAND_LINE) or _OLD_COMMAND_LINE,
        field("<I", 0x22C, 0x203, _OLD_INITRD_END - 1) + 1,
    )
    return BzImage(
        version,
        _release(image, int.from_bytes(page[0x20E:0x210], "little")),
        setup,
        kernel,
        _payload(kernel, field("<I", 0x248, 0x208), field("<I", 0x24C, 0x208)),
        field("<Q", 0x258, 0x20A, _LOAD_ADDRESS),
        max(field("<I", 0x260, 0x20A), len(kernel)),
        bool(field("<H", 0x236, 0x20C) & _XLF_KERNEL_64),
    )


def _payload(kernel: memoryview, offset: int, length: int) -> memoryview:
    if length == 0:
        return kernel[:0]
    if offset + length > len(kernel):
        raise UserError(
            f"a truncated Linux kernel: its payload ends {offset + length:#x} bytes into the "
            f"kernel, which has {len(kernel):#x}"
        )
    return kernel[offset : offset + length]


def _release(image: bytes, pointer: int) -> str:
    """The text at kernel_version, which counts from the header's sector on."""
    if pointer == 0:
        return ""
    text = image[pointer + SECTOR : pointer + SECTOR + 256].partition(b"\0")[0]
    return text.decode("ascii", "replace").partition(" ")[0]
