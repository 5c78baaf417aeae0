"""Small guest programs: source and built image side by side, rebuilt by ``make -C guests``.

Each is NASM assembly of one file, with what they share in ``inc/``. All of them talk over the
serial port, and end either with HLT while interrupts are off (status 0) or, where they check
something, by the debug-exit port: value 0 (status 1) if all was right, 1 (status 3) if not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Guest:
    """A built guest, and what one must know to boot it.

    Attributes:
        file: the name of its image in this package.
        summary: one line.
        mode: 64 for a flat binary that starts in long mode instead of 32-bit mode.
        load_addr: for a flat binary that does not go to the default address.
        parameters: names of the dwords from image offset 4 on that `patched` can set.
    """

    file: str
    summary: str
    mode: int | None = None
    load_addr: int | None = None
    parameters: tuple[str, ...] = ()


GUESTS = {
    "default": Guest("default.bin", "says hello, tries the echo device, walks the PCI bus"),
    "hello": Guest("hello.bin", "says hello over the serial port: the smallest guest"),
    "echo": Guest("echo.bin", "checks the echo device, every size at every offset"),
    "pci-scan": Guest("pci-scan.bin", "walks the PCI bus, sizes BARs, moves them while running"),
    "pci64": Guest("pci64.bin", "moves a 64-bit BAR above 4 GiB", 64),
    "serial-echo": Guest("serial-echo.bin", "gives back lines typed at it, by interrupt"),
    "serial-poll": Guest("serial-poll.bin", "gives back lines typed at it, by polling"),
    "long-mode": Guest("long-mode.bin", "64-bit mode: exceptions, ring 3, SYSCALL", 64),
    "x2apic": Guest("x2apic.bin", "the local APIC by MSRs, CR8, deadlines of the TSC", 64),
    "crash": Guest("crash.elf", "ends in a deliberate triple fault"),
    "stress": Guest(
        "stress.bin", "random port and memory accesses, every value checked", parameters=("rounds",)
    ),
    "counter": Guest(
        "counter.bin",
        "counts line by line, its count kept in five places",
        parameters=("limit", "delay"),
    ),
    "spin": Guest("spin.bin", "computes and touches no device", parameters=("rounds",)),
    "disk-code": Guest(
        "disk-code.bin",
        "executes code that a disk overwrites, virtio or IDE with DMA",
        parameters=("sectors",),
    ),
    "multiboot": Guest("multiboot.elf", "Multiboot kernel: shows command line, memory, modules"),
    "elf32": Guest("elf32.elf", "ELF32: checks its segments, bss and entry state"),
    "elf64": Guest("elf64.elf", "ELF64: checks its segments, bss and entry state"),
    "elf32-high": Guest("elf32-high.elf", "ELF32 linked at 3 GiB, running there by paging"),
}
"""All guests by name."""


def image(name: str) -> bytes:
    """The built image of a guest.

    Raises:
        KeyError: there is no guest of that name.
    """
    return resources.files(__name__).joinpath(GUESTS[name].file).read_bytes()


def patched(name: str, **values: int) -> bytes:
    """The image with some of its parameters set: ``patched("counter", limit=10, delay=0)``.

    Raises:
        KeyError: there is no guest of that name.
        ValueError: it has no such parameter.
    """
    data = bytearray(image(name))
    names = GUESTS[name].parameters
    for parameter, value in values.items():
        if parameter not in names:
            raise ValueError(f"guest '{name}' has no parameter '{parameter}'")
        struct.pack_into("<I", data, 4 + 4 * names.index(parameter), value)
    return bytes(data)
