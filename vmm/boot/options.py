"""What a boot loader is asked for and what it answers."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmm.cpu.state import CpuState


class Mode(enum.IntEnum):
    """The CPU mode in which a flat binary starts."""

    PROTECTED = 32
    LONG = 64


@dataclass(frozen=True)
class Module:
    """A Multiboot module: its bytes and the text that names it."""

    data: bytes
    text: str = ""


@dataclass(frozen=True)
class BootOptions:
    """What the user may choose about booting.

    Attributes:
        load_addr: where a flat binary goes and starts; None: 0x100000.
        mode: the mode of a flat binary; None: 32-bit protected mode.
        cmdline: the command line for formats that have one.
        modules: for Multiboot.
        name: the image's name for messages.
    """

    load_addr: int | None = None
    mode: Mode | None = None
    cmdline: str = ""
    modules: tuple[Module, ...] = ()
    name: str = "image"


@dataclass
class BootResult:
    """A loaded image.

    Attributes:
        format: "flat", "elf32", "elf64" or "multiboot".
        state: the CPU's state at its first instruction.
        symbols: (address, size, name) of an ELF symbol table, by ascending address, for reports.
        notes: what a user should be told although it is no error, a line each.
    """

    format: str
    state: CpuState
    symbols: list[tuple[int, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
