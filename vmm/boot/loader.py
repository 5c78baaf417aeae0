"""Find out what an image is, and load it.

In this order: Multiboot 1 (its header wins over ELF, as with other loaders), ELF, flat binary.
Anything can be a flat binary, so an image that plainly is something else (a Linux bzImage, a
compressed file, a damaged or newer Multiboot kernel) is taken for one only if the user gave it a
load address.
"""

from __future__ import annotations

import struct

from devices.errors import UserError
from vmm.boot import elf, flat, multiboot
from vmm.boot.options import BootOptions, BootResult
from vmm.memory import GuestMemory

_COMPRESSED = {
    b"\x1f\x8b\x08": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
}
_MULTIBOOT2_MAGIC = struct.pack("<I", 0xE85250D6)
_MULTIBOOT2_SEARCH_LIMIT = 32768


def load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    """Put `image` into `memory` and say how the CPU starts.

    Raises:
        UserError: one line that names the image and says what is wrong with it, and where. No
            bytes whatever, and no options, lead to another exception. Guest memory may be partly
            filled then.
    """
    try:
        return _load(memory, image, options)
    except UserError as error:
        raise UserError(f"{options.name}: {error}") from error


def _load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    if not image:
        raise UserError("the file is empty")
    header = multiboot.find_header(image)
    if header is not None:
        _refuse_flat_options(options, "a Multiboot kernel")
        return multiboot.load(memory, image, options, header)
    if image.startswith(elf.MAGIC):
        _refuse_flat_options(options, "an ELF file")
        _refuse_multiboot_options(options, "an ELF file")
        if _is_multiboot2(image):
            raise UserError("a Multiboot 2 kernel; only Multiboot 1 is supported")
        return elf.load(memory, image, options)
    if options.load_addr is None:
        _refuse_what_is_not_flat(image)
    _refuse_multiboot_options(options, "a flat binary")
    return flat.load(memory, image, options)


def _refuse_flat_options(options: BootOptions, kind: str) -> None:
    if options.load_addr is not None:
        raise UserError(f"{kind} names its own load address; --load-addr is for flat binaries")
    if options.mode is not None:
        raise UserError(f"{kind} names its own CPU mode; --mode is for flat binaries")


def _refuse_multiboot_options(options: BootOptions, kind: str) -> None:
    if options.modules:
        raise UserError(f"{kind} takes no modules; only a Multiboot kernel does")
    if options.cmdline:
        raise UserError(f"{kind} takes no command line; only a Multiboot kernel does")


def _refuse_what_is_not_flat(image: bytes) -> None:
    """Refuse what would only crash as a flat binary, unless the user insists."""
    insist = "give --load-addr to load it as a flat binary all the same"
    if image[0x1FE:0x200] == b"\x55\xaa" and image[0x202:0x206] == b"HdrS":
        raise UserError(
            "a Linux bzImage (HdrS at offset 0x202), which is not supported yet; " + insist
        )
    for magic, (name, tool) in _COMPRESSED.items():
        if image.startswith(magic):
            raise UserError(f"compressed with {name}; run {tool} on it first, or {insist}")
    broken = multiboot.find_broken_header(image)
    if broken is not None:
        raise UserError(
            f"the Multiboot magic at offset {broken:#x} is followed by flags and a checksum that "
            f"do not add up to 0; {insist}"
        )
    if _is_multiboot2(image):
        raise UserError(f"a Multiboot 2 kernel; only Multiboot 1 is supported; {insist}")


def _is_multiboot2(image: bytes) -> bool:
    """Whether a valid Multiboot 2 header is there (its specification, section 3.1.1)."""
    offset = -1
    while True:
        offset = image.find(_MULTIBOOT2_MAGIC, offset + 1, _MULTIBOOT2_SEARCH_LIMIT)
        if offset < 0 or offset + 16 > len(image):
            return False
        if offset % 8 == 0 and sum(struct.unpack_from("<4I", image, offset)) & 0xFFFF_FFFF == 0:
            return True
