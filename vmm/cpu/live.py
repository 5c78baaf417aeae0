"""The engine's hidden flags and registers where the CPU itself keeps them, to cost nothing.

Filling the context buffer takes as long as a whole port access, and before each of those one word
is looked at: the hidden flags, which hold the privilege level. RDTSC, of which kernels do tens of
thousands, changes two registers. They lie in a private structure of the library (see `laboratory`):
the one that holds sixteen marked registers, the flags at the distance that the context has them
apart. Both must then follow the CPU in a trial; otherwise the buffer is filled after all.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Protocol

from vmm.cpu.context import Context
from vmm.cpu.laboratory import Laboratory, cpu_of


class Words(Protocol):
    """32-bit words; a memoryview is one."""

    def __getitem__(self, index: int, /) -> int: ...


def hidden_flags(context: Context, *, direct: bool = True) -> Words:
    """Item 0 is the engine's hidden flags now, without `Context.save`.

    Args:
        direct: False does without the private structure.
    """
    places = _places() if direct else None
    if places is None or context.engine.handle is None:
        return _Saved(context)
    pointer, field = places
    cpu = cpu_of(context.engine, pointer)
    return memoryview((ctypes.c_uint32 * 1).from_address(cpu + field)).cast("B").cast("I")


def registers(context: Context, *, direct: bool = True) -> memoryview | None:
    """RAX, RCX, RDX, RBX and so on as the guest has them now; None where they are not found.

    In a callback of an instruction they may be changed.
    """
    places = _places() if direct else None
    if places is None or context.engine.handle is None:
        return None
    pointer, flags = places
    at = context.at
    first = cpu_of(context.engine, pointer) + flags - 4 * at.hflags_w + 8 * at.gpr
    return memoryview((ctypes.c_uint64 * 16).from_address(first)).cast("B").cast("Q")


class _Saved:
    """The slow way: ask the library each time."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getitem__(self, index: int, /) -> int:
        self._context.save()
        return self._context.hidden


@functools.cache
def _places() -> tuple[int, int] | None:
    """(where in the engine the CPU's address is, where in the CPU the hidden flags are)."""
    try:
        with Laboratory() as laboratory:
            return _search(laboratory)
    except (LookupError, OSError):
        return None


def _search(laboratory: Laboratory) -> tuple[int, int]:
    context = Context(laboratory.engine)
    at = context.at
    context.save()
    marks = [0x5AA5_1357_0000_2468 + (index << 16) for index in range(16)]
    for index, mark in enumerate(marks):
        context.longs[at.gpr + index] = mark
    context.restore()
    own = ctypes.addressof(ctypes.c_ubyte.from_buffer(context.bytes)) + 8 * at.gpr
    pointer, cpu, where = laboratory.find_cpu(struct.pack("<16Q", *marks), elsewhere=own)
    field = where + 4 * at.hflags_w - 8 * at.gpr
    for bit in (1, 2, 1 << 3, 1 << 4):
        context.hidden ^= bit
        context.longs[at.gpr] ^= bit
        context.restore()
        if laboratory.read(cpu + field, 4) != struct.pack("<I", context.hidden):
            raise LookupError("the hidden flags do not follow the CPU")
        if laboratory.read(cpu + where, 8) != struct.pack("<Q", context.longs[at.gpr]):
            raise LookupError("the registers do not follow the CPU")
    return pointer, field
