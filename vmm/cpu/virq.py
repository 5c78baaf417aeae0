"""Letting the engine deliver an external interrupt, at the instruction where the guest takes it.

An interrupt often comes while the guest has interrupts off: in the middle of the very access
that caused it. Nothing tells us when they are on again, and to look again and again costs more than
to deliver. But the engine can wait for that: it has what a hypervisor in the guest would use, the
virtual interrupt of AMD-V (APM volume 2, 15.21.4). While a bit in the CPU's structure is set the
engine looks whether the guest can take an interrupt whenever it leaves a block that STI, POPF or
IRET ends, reads the vector from the control block (VMCB) in guest-physical memory, and delivers it.
The block of ours (see `intercept`) has its vector where there is I/O of ours, so the read of the
vector is the moment at which the interrupt controller is asked.

The two fields, the bit and the address of the control block, are found by experiment (see
`laboratory`) and then tried.

Source of what is looked for: CPUState, CPUX86State and x86_cpu_exec_interrupt of Unicorn 2.1.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable
from typing import NamedTuple

from vmm.cpu.intercept import BLOCK, VECTOR_PAGE
from vmm.cpu.laboratory import Laboratory, cpu_of
from vmm.cpu.leaving import Places, places
from vmm.cpu.library import (
    HOOK_INTERRUPT,
    REG,
    Engine,
    InterruptCallback,
    MmioReadCallback,
    MmioWriteCallback,
    OutCallback,
    memory_of,
)

_VECTOR = (0, 4)
"""Offset in the page of `intercept.VECTOR_PAGE`, and size."""
_VIRTUAL = 0x100  # CPU_INTERRUPT_VIRQ
_NOTHING = 0xFFFF_FFFF


class Fields(NamedTuple):
    """Where in the CPU's structure the fields are, in bytes."""

    request: int
    block: int


class Virq:
    """The fields of one engine.

    Args:
        engine: an engine that can be left.
        at: see `leaving`.
        fields: of the same library.
        acknowledge: asked for the vector when the guest takes the interrupt.
        fail: takes what `acknowledge` raises.
    """

    def __init__(
        self,
        engine: Engine,
        at: Places,
        fields: Fields,
        acknowledge: Callable[[], int],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._acknowledge, self._fail = acknowledge, fail
        cpu = cpu_of(engine, at.cpu)
        self._request = ctypes.c_uint32.from_address(cpu + fields.request)
        self._block = ctypes.c_uint64.from_address(cpu + fields.block)
        self._count = ctypes.c_int16.from_address(cpu + at.count)
        read, write = MmioReadCallback(self._read), MmioWriteCallback(lambda *_: None)
        engine.map_io(VECTOR_PAGE, mmap.PAGESIZE, read, write)

    def arm(self) -> None:
        """An interrupt waits: deliver one, as soon as the guest takes it."""
        self._block.value = BLOCK  # the guest may have said VMRUN
        self._request.value = _VIRTUAL
        self._count.value = -1  # look before the next block

    def disarm(self) -> None:
        """None waits any more."""
        self._request.value = 0

    def _read(self, _engine: int, offset: int, size: int, _data: int) -> int:
        if (offset, size) != _VECTOR:
            return _NOTHING
        self._request.value = 0
        try:
            return self._acknowledge()
        except BaseException as failure:
            self._fail(failure)
            return 0


@functools.cache
def fields() -> Fields | None:
    """Where the fields are; None: not where it is certain."""
    at = places()
    if at is None:
        return None
    try:
        with Laboratory() as laboratory:
            return _search(laboratory, at)
    except (LookupError, OSError):
        return None


def _search(laboratory: Laboratory, at: Places) -> Fields:
    engine = laboratory.engine
    marks = [0x1357_0000_2468_0000 + n for n in range(4)]
    names = [getattr(REG, f"UC_X86_REG_DR{n}") for n in range(4)]
    for name, mark in zip(names, marks, strict=True):
        engine.write(name, mark)
    pointer, cpu, debug = laboratory.find_cpu(struct.pack("<4Q", *marks))
    for name in names:
        engine.write(name, 0)
    # Behind eight debug registers: four breakpoints, and the exception that is being delivered.
    block = debug + 8 * 8 + 4 * 8 + 8
    # Behind the flag that makes the CPU leave: the flags of the next block, -1 for those of any.
    request = (at.flags[0] + 2 + 3) // 4 * 4 + 4
    before = laboratory.read(cpu + request - 4, 8), laboratory.read(cpu + block - 8, 16)
    if pointer != at.cpu or before != (b"\xff" * 4 + bytes(4), b"\xff" * 4 + bytes(12)):
        raise LookupError("the CPU's structure has another order")
    found = Fields(request, block)
    _try(engine, at, found)
    return found


def _try(engine: Engine, at: Places, fields: Fields) -> None:
    """One instruction after STI the vector is asked for; its gate is none, which is a fault."""
    memory = mmap.mmap(-1, 0x10000)
    engine.map_ram(0, 0x10000, memory_of(memory))
    # out 0x80, al; inc rcx; jmp next; inc rcx; sti; inc rcx; inc rcx; hlt
    code = bytes.fromhex("e680 48ffc1 eb00 48ffc1 fb 48ffc1 48ffc1 f4")
    memory[0x1000 : 0x1000 + len(code)] = code
    seen: list[tuple[str, int, int]] = []

    def note(what: str, number: int) -> int:
        seen.append((what, number, engine.read(REG.UC_X86_REG_RCX)))
        return number

    def fault(_engine: int, vector: int, _data: int) -> None:
        note("fault", vector)
        engine.stop()

    virq = Virq(engine, at, fields, lambda: note("vector", 0x33), lambda _: None)
    engine.hook_instruction(REG.UC_X86_INS_OUT, OutCallback(lambda *_: virq.arm()))
    engine.hook(HOOK_INTERRUPT, InterruptCallback(fault))
    engine.write(REG.UC_X86_REG_RFLAGS, 2)
    engine.start(0x1000)
    if seen != [("vector", 0x33, 3), ("fault", 13, 3)]:
        raise LookupError("the engine does not deliver as it should")
