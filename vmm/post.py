"""What a PC's firmware does before it starts a kernel, done for the guests that get no firmware.

The name is the firmware's own: power-on self-test.
"""

from __future__ import annotations

from dataclasses import replace

from devices.bus import BusType
from vmm.boot import firmware
from vmm.boot.boot_params import LOW_MEMORY_END
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, BootResult
from vmm.firmware.acpi import place_tables
from vmm.firmware.mptable import ADDRESS as MPTABLE_ADDRESS
from vmm.firmware.mptable import build_mptable
from vmm.memory import GuestMemory
from vmm.parts import Parts
from vmm.pc import platform_of

BDA_EBDA_SEGMENT, BDA_MEMORY_KIB = 0x40E, 0x413
ELCR_HIGH = 0x4D1
"""Edge/level control of IRQ 8 to 15: firmware makes the lines that PCI uses level-triggered."""


KERNELS = frozenset({"linux-bzimage", "linux-vmlinux", "pvh", "multiboot"})
"""Formats that look for the board's tables; others may use that memory as they like."""


def start(parts: Parts, image: bytes, options: BootOptions) -> BootResult:
    """Load a guest, and do for it what firmware would have done.

    Raises:
        UserError: see `vmm.boot.loader.load`.
    """
    result = load(parts.memory, image, replace(options, rsdp=root_pointer(parts.memory)))
    if result.format in KERNELS:
        write_tables(parts.memory)
    set_up_pci(parts)
    parts.cpu.set_state(result.state)
    parts.symbols = result.symbols
    return result


def start_firmware(parts: Parts, rom: bytes, name: str) -> BootResult:
    """Load a firmware ROM: it does all that itself.

    Raises:
        UserError: it is no ROM, or not of the size that the machine has room for.
    """
    result = firmware.load(parts.memory, rom, name)
    parts.cpu.set_state(result.state)
    return result


def root_pointer(memory: GuestMemory) -> int:
    """Where `write_tables` puts the root pointer of the ACPI tables."""
    return place_tables(platform_of(memory)).rsdp


def write_tables(memory: GuestMemory) -> None:
    """Put ACPI tables, MP table and the BIOS data area into memory, for kernels that look there."""
    board = platform_of(memory)
    tables = place_tables(board)
    memory.write(tables.start, tables.data)
    memory.write(MPTABLE_ADDRESS, build_mptable(board))
    # What kernels read of the BIOS data area: where the extended one is, and KiB below it.
    memory.write(BDA_EBDA_SEGMENT, (LOW_MEMORY_END >> 4).to_bytes(2, "little"))
    memory.write(BDA_MEMORY_KIB, (LOW_MEMORY_END >> 10).to_bytes(2, "little"))


def set_up_pci(parts: Parts) -> None:
    """Place the BARs, and make the lines that PCI functions use level-triggered."""
    board = platform_of(parts.memory)
    for problem in parts.pci.assign_resources(board.mmio_window, board.io_window):
        parts.wiring.log("pci", problem)
    level = sum(1 << irq - 8 for irq in board.level_irqs())
    parts.buses[BusType.PIO].write(ELCR_HIGH, 1, level)
    parts.buses[BusType.PIO].recent.clear()  # that was us
