"""Flat binaries: bytes that go to one address and start at their first byte.

Those in 16-bit mode are `real`'s.
"""

from __future__ import annotations

from devices.errors import UserError
from vmm.boot import entry, real
from vmm.boot.options import BootOptions, BootResult, Mode
from vmm.boot.placement import Placement
from vmm.memory import GuestMemory

DEFAULT_LOAD_ADDRESS = 0x100000


def load(memory: GuestMemory, image: bytes, options: BootOptions) -> BootResult:
    """Copy `image` to its load address and start it there; see `entry` for the CPU's state.

    Raises:
        UserError: it does not fit there, or there is no such mode.
    """
    try:
        mode = Mode.PROTECTED if options.mode is None else Mode(options.mode)
    except ValueError:
        raise UserError(f"there is no CPU mode {options.mode}; 16, 32 and 64 are known") from None
    if mode is Mode.REAL:
        return real.load(memory, image, options)
    address = DEFAULT_LOAD_ADDRESS if options.load_addr is None else options.load_addr
    placement = Placement(memory)
    entry.prepare(placement, mode)
    placement.fill(f"the flat binary ({len(image):#x} bytes)", address, image)
    return BootResult("flat", entry.state(mode, address))
