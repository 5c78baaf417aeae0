"""Linux kernels by the x86 boot protocol: a bzImage, or its vmlinux, with the boot parameters.

The entry state, on top of what `entry` says for the mode:

64-bit (vmlinux; bzImage with XLF_KERNEL_64)
    CS = 0x10, 64-bit code; DS, ES, SS = 0x18; RSI = the boot parameters; every address mapped to
    itself.
32-bit (ELF32 vmlinux; the other bzImages)
    CS = 0x10, flat code; DS, ES, SS = 0x18; ESI = the boot parameters; EBX, EBP, EDI = 0.

Of the two ways to start a bzImage, the host's extraction is far faster, but the kernel then runs at
the address it was linked for: address space randomisation (KASLR) is the decompressor's work. The
word ``kaslr`` in the command line asks for it (the kernel itself has only ``nokaslr``).

Sources: Linux, Documentation/arch/x86/boot.rst ("32-bit Boot Protocol", "64-bit Boot Protocol");
arch/x86/kernel/head_64.S and head_32.S for the entry of vmlinux, which takes the same registers.
"""

from __future__ import annotations

from devices.errors import Subject, UserError
from vmm.boot import boot_params, bzimage, elf, entry, extract, pvh
from vmm.boot.boot_params import Setup
from vmm.boot.bzimage import BzImage
from vmm.boot.options import BootOptions, BootResult, KernelEntry, Mode
from vmm.boot.placement import Placement
from vmm.cpu.state import CODE32, CODE64, DATA32
from vmm.memory import GuestMemory

GDTS = {
    Mode.PROTECTED: entry.Gdt((0, 0, CODE32, DATA32), 0x10, 0x18),
    Mode.LONG: entry.Gdt((0, 0, CODE64, DATA32), 0x10, 0x18),
}
"""__BOOT_CS and __BOOT_DS at the places where the protocol wants them."""

KASLR = "kaslr"
_RSI = 6


def load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    """Load a bzImage.

    Raises:
        UserError: what is wrong with it, or does not fit.
    """
    kernel = bzimage.parse(image)
    wanted = options.kernel_entry
    notes: list[str] = []
    if wanted is KernelEntry.AUTO:
        wanted = KernelEntry.VMLINUX
        if KASLR in options.cmdline.split():
            wanted = KernelEntry.BZIMAGE
    if wanted in (KernelEntry.VMLINUX, KernelEntry.PVH):
        try:
            vmlinux = extract.vmlinux(kernel.payload)
        except extract.CannotExtract as error:
            if options.kernel_entry is not KernelEntry.AUTO:
                problem = f"the kernel cannot be extracted: {error}"
                raise UserError(problem, Subject("kernel-entry")) from error
            notes.append(f"the kernel decompresses itself, which takes seconds: {error}")
        else:
            return _load_extracted(memory, vmlinux, kernel, wanted, options)
    result = _load_bzimage(memory, kernel, wanted is not KernelEntry.BZIMAGE32, options)
    result.notes += notes
    return result


def is_linux(image: bytes, executable: elf.Executable) -> bool:
    """Whether an ELF file is a Linux kernel: by its notes, or by its place and its banner."""
    for note in executable.notes:
        if note.owner == "Linux" or note == (pvh.OWNER, pvh.GUEST_OS, b"linux\0"):
            return True
    half = 1 << executable.bits - 1
    return (
        any(segment.vaddr >= half for segment in executable.segments) and b"Linux version " in image
    )


def load_vmlinux(
    memory: GuestMemory, image: bytes, executable: elf.Executable, options: BootOptions
) -> BootResult:
    """Load an ELF vmlinux at the entry of its header.

    Raises:
        UserError: what does not fit.
    """
    return _load_vmlinux(memory, image, executable, boot_params.synthetic_setup(), options)


def _load_extracted(
    memory: GuestMemory, vmlinux: bytes, kernel: BzImage, wanted: KernelEntry, options: BootOptions
) -> BootResult:
    try:
        executable = elf.parse(vmlinux)
        _check_room(memory, kernel, max(s.paddr + s.memory_size for s in executable.segments))
        if wanted is KernelEntry.PVH:
            return pvh.load(memory, vmlinux, executable, options)
        return _load_vmlinux(memory, vmlinux, executable, kernel.setup, options)
    except UserError as error:
        raise UserError(f"the vmlinux in this bzImage: {error}", *error.about) from error


def _check_room(memory: GuestMemory, kernel: BzImage, end: int) -> None:
    """The usual case of a segment outside RAM, in words that say what to do."""
    low = memory.ram[0]
    if end > low.end:
        raise UserError(
            f"Linux {kernel.release or 'of unknown version'} needs RAM up to {end:#x} "
            f"({-(-end >> 20)} MiB), the guest has {low.size >> 20} MiB there; "
            "give it more memory",
            Subject("mem"),
        )


def _load_vmlinux(
    memory: GuestMemory,
    image: bytes,
    executable: elf.Executable,
    setup: Setup,
    options: BootOptions,
) -> BootResult:
    mode = Mode(executable.bits)
    placement = Placement(memory)
    entry.prepare(placement, mode, GDTS[mode])
    executable.place(image, placement)
    state = entry.state(mode, executable.entry, GDTS[mode])
    start = min(segment.paddr for segment in executable.segments)
    state.gpr[_RSI] = boot_params.place(placement, setup, options, start)
    return BootResult("linux-vmlinux", state, elf.symbols(image))


def _load_bzimage(
    memory: GuestMemory, kernel: BzImage, prefer_long: bool, options: BootOptions
) -> BootResult:
    long_mode = kernel.long_mode and prefer_long
    mode = Mode.LONG if long_mode else Mode.PROTECTED
    placement = Placement(memory)
    entry.prepare(placement, mode, GDTS[mode])
    where = kernel.load_address
    _check_room(memory, kernel, where + kernel.room)
    placement.fill("the kernel", where, kernel.kernel, kernel.room)
    state = entry.state(mode, where + (bzimage.ENTRY_64 if long_mode else 0), GDTS[mode])
    state.gpr[_RSI] = boot_params.place(placement, kernel.setup, options, where)
    return BootResult("linux-bzimage", state)
