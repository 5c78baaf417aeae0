"""Find out what an image is, and load it.

In this order: Linux bzImage, Multiboot 1 (its header wins over ELF, as with other loaders), ELF (by
its PVH note, as a Linux kernel, or as it is), boot sector, flat binary. Anything can be a flat
binary, so an image that plainly is something else (a compressed file, a damaged or newer Multiboot
kernel) is taken for one only if the user gave it a load address. Firmware is not told from its
bytes: see `firmware.load`.
"""

from __future__ import annotations

import struct

from devices.errors import Subject, UserError
from vmm.boot import bzimage, elf, flat, linux, multiboot, pvh, real
from vmm.boot.options import BootOptions, BootResult, KernelEntry
from vmm.memory import GuestMemory

_COMPRESSED = {
    b"\x1f\x8b\x08": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
}
_MULTIBOOT2_MAGIC = struct.pack("<I", 0xE85250D6)
_MULTIBOOT2_SEARCH_LIMIT = 32768
_ENTRY = Subject("kernel-entry")


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
        about = [Subject("image")]
        if options.load_addr is not None:  # the image is what it is because of that
            about.append(Subject("load-addr"))
        raise UserError(f"{options.name}: {error}", *error.about, *about) from error


def _load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    if not image:
        raise UserError("the file is empty")
    if options.rsdp is not None and not 0 <= options.rsdp < 1 << 64:
        raise UserError(f"the ACPI root pointer cannot be at {options.rsdp:#x}")
    flat_wanted = options.load_addr is not None or options.mode is not None
    if bzimage.is_bzimage(image) and not flat_wanted:
        if options.kernel_entry is not KernelEntry.PVH:
            _refuse_modules(options, "a Linux kernel")
        return linux.load(memory, image, options)
    header = multiboot.find_header(image)
    if header is not None:
        _refuse_flat_options(options, "a Multiboot kernel")
        _refuse_kernel_entry(options, "a Multiboot kernel")
        return multiboot.load(memory, image, options, header)
    if image.startswith(elf.MAGIC):
        _refuse_flat_options(options, "an ELF file")
        if _is_multiboot2(image):
            raise UserError("a Multiboot 2 kernel; only Multiboot 1 is supported")
        return _load_elf(memory, image, options)
    if options.load_addr is None:
        _refuse_what_is_not_flat(image)
    boot_sector = not flat_wanted and real.is_boot_sector(image)
    kind = "a boot sector" if boot_sector else "a flat binary"
    _refuse_kernel_options(options, kind)
    _refuse_kernel_entry(options, kind)
    if boot_sector:
        return real.load_boot_sector(memory, image)
    return flat.load(memory, image, options)


def _load_elf(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    executable = elf.parse(image)
    wanted = options.kernel_entry
    if wanted is KernelEntry.AUTO and pvh.entry_point(executable) is not None:
        wanted = KernelEntry.PVH
    if wanted is KernelEntry.PVH:
        return pvh.load(memory, image, executable, options)
    if wanted is KernelEntry.VMLINUX or linux.is_linux(image, executable):
        if wanted in (KernelEntry.BZIMAGE, KernelEntry.BZIMAGE32):
            raise UserError("an ELF file, which has no entry of a bzImage", _ENTRY)
        _refuse_modules(options, "a Linux kernel")
        return linux.load_vmlinux(memory, image, executable, options)
    _refuse_kernel_entry(options, "an ELF file that is no Linux kernel")
    _refuse_kernel_options(options, "an ELF file that is no Linux, PVH or Multiboot kernel")
    return elf.load(memory, image, executable)


def _refuse_flat_options(options: BootOptions, kind: str) -> None:
    if options.load_addr is not None:
        raise UserError(f"{kind} names its own load address; --load-addr is for flat binaries")
    if options.mode is not None:
        problem = "names its own CPU mode; --mode is for flat binaries"
        raise UserError(f"{kind} {problem}", Subject("mode"))


def _refuse_kernel_options(options: BootOptions, kind: str) -> None:
    _refuse_modules(options, kind)
    if options.initrd is not None:
        problem = "takes no initrd; only Linux, PVH and Multiboot kernels do"
        raise UserError(f"{kind} {problem}", Subject("initrd"))
    if options.cmdline:
        problem = "takes no command line; only Linux, PVH and Multiboot kernels do"
        raise UserError(f"{kind} {problem}", Subject("append"))


def _refuse_modules(options: BootOptions, kind: str) -> None:
    if options.modules:
        problem = "takes no modules; only Multiboot and PVH kernels do"
        raise UserError(f"{kind} {problem}", Subject("module"))


def _refuse_kernel_entry(options: BootOptions, kind: str) -> None:
    if options.kernel_entry is not KernelEntry.AUTO:
        raise UserError(
            f"{kind} has one entry; --kernel-entry is for Linux and PVH kernels", _ENTRY
        )


def _refuse_what_is_not_flat(image: bytes) -> None:
    """Refuse what would only crash as a flat binary, unless the user insists."""
    insist = "give --load-addr to load it as a flat binary all the same"
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
