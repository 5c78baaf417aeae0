"""What a boot loader is asked for and what it answers."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmm.cpu.state import CpuState


class Mode(enum.IntEnum):
    """The CPU mode in which a flat binary starts."""

    REAL = 16
    PROTECTED = 32
    LONG = 64


class KernelEntry(enum.Enum):
    """How a kernel is entered that can be entered in several ways.

    AUTO takes for a bzImage VMLINUX unless the command line has the word ``kaslr`` or the kernel
    cannot be extracted, and BZIMAGE then; for an ELF file PVH if it has such a note, else VMLINUX.
    """

    AUTO = "auto"
    VMLINUX = "vmlinux"
    """The kernel proper, extracted from a bzImage by the host, at the entry of its ELF header."""
    BZIMAGE = "bzimage"
    """The bzImage's own decompressor, at its 64-bit entry if it has one."""
    BZIMAGE32 = "bzimage32"
    """The same at its 32-bit entry."""
    PVH = "pvh"
    """The kernel proper at the 32-bit entry of its PVH note."""


@dataclass(frozen=True)
class Module:
    """A file loaded beside the kernel: its bytes and the text that names it."""

    data: bytes
    text: str = ""


@dataclass(frozen=True)
class BootOptions:
    """What the user may choose about booting.

    Attributes:
        load_addr: where a flat binary goes and starts; None: 0x100000, in 16-bit mode 0x7C00.
        mode: the mode of a flat binary; None: 32-bit protected mode.
        cmdline: the command line for formats that have one.
        modules: for Multiboot and PVH.
        name: the image's name for messages.
        initrd: the initial RAM disk of Linux; module 0 for Multiboot and PVH.
        kernel_entry: for kernels that have more than one entry.
        rsdp: guest-physical address of the ACPI tables' root pointer, for protocols that pass it.
    """

    load_addr: int | None = None
    mode: Mode | None = None
    cmdline: str = ""
    modules: tuple[Module, ...] = ()
    name: str = "image"
    initrd: Module | None = None
    kernel_entry: KernelEntry = KernelEntry.AUTO
    rsdp: int | None = None


@dataclass
class BootResult:
    """A loaded image.

    Attributes:
        format: "flat", "elf32", "elf64", "multiboot", "linux-bzimage", "linux-vmlinux", "pvh",
            "real" (a flat binary in 16-bit mode), "boot-sector" or "firmware".
        state: the CPU's state at its first instruction.
        symbols: (address, size, name) of an ELF symbol table, by ascending address, for reports.
        notes: what a user should be told although it is no error, a line each.
    """

    format: str
    state: CpuState
    symbols: list[tuple[int, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
