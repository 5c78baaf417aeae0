"""Firmware ROMs, started at the reset vector like the chip on a PC's board.

The ROM ends at 4 GiB, in the region that `GuestMemory` was given for it; its last 256 KiB, or all
of it if it is smaller, also end at 1 MiB. Both copies can be written, as on a board whose chip set
has opened the shadow RAM: firmware wants that once it runs, and opens it itself only on chip sets
that it knows. `load` writes both anew, and so must a reset of the machine.

Sources: Intel SDM volume 3A, sections 10.1.4 (first instruction executed) and table 10-1;
SeaBIOS, docs/Memory_Model.md and src/fw/shadow.c.
"""

from __future__ import annotations

from devices.errors import Subject, UserError
from vmm.boot.options import BootResult
from vmm.boot.placement import MIB
from vmm.cpu.state import CpuState
from vmm.memory import MAX_ROM, GuestMemory

GRAIN = 64 << 10
LOW_COPY = 256 << 10
"""What a 256 KiB SeaBIOS expects below 1 MiB when no chip set copies it there."""


def check(rom: bytes, name: str) -> None:
    """Whether a file can be a ROM.

    Raises:
        UserError: its size is wrong.
    """
    if not rom:
        raise UserError(f"{name}: the file is empty", Subject("firmware"))
    if len(rom) % GRAIN or len(rom) > MAX_ROM:
        raise UserError(
            f"{name}: a firmware ROM of {len(rom)} bytes: it must have a multiple of 64 KiB, "
            f"at most {MAX_ROM >> 20} MiB",
            Subject("firmware"),
        )


def load(memory: GuestMemory, rom: bytes, name: str = "firmware") -> BootResult:
    """Put a ROM into `memory`, which must have been made with room for it.

    Raises:
        UserError: its size is wrong, or it is not that of the ROM region.
    """
    check(rom, name)
    region = memory.rom
    if region is None or region.size != len(rom):
        size = 0 if region is None else region.size
        raise UserError(
            f"{name}: a firmware ROM of {len(rom):#x} bytes; the machine was made for one of "
            f"{size:#x}"
        )
    region.view[:] = rom
    low = rom[-LOW_COPY:]
    memory.write(MIB - len(low), low)
    return BootResult("firmware", CpuState())
