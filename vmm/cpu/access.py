"""The guest's port and MMIO accesses, CPUID and RDTSC, from the engine's callbacks.

This is the hottest Python of the machine: each callback is a closure over exactly what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from devices.bus import ALL_ONES, Bus
from vmm.cpu.context import Context
from vmm.cpu.cpuid import cpuid
from vmm.cpu.intercept import available
from vmm.cpu.layout import H_CPL
from vmm.cpu.library import (
    REG,
    CpuidCallback,
    Engine,
    InCallback,
    MmioReadCallback,
    MmioWriteCallback,
    OutCallback,
)
from vmm.cpu.live import Words
from vmm.cpu.paging import PHYSICAL_BITS

Fail = Callable[[BaseException], None]


def install_io(
    engine: Engine,
    ram: Iterable[tuple[int, int]],
    ports: Bus,
    mmio: Bus,
    *,
    hidden: Words,
    forbids: Callable[[int, int], bool],
    fail: Fail,
) -> None:
    """Send IN and OUT to `ports`, and all that is not RAM, up to 2**40, to `mmio`.

    Args:
        ram: (start, end) of the RAM regions, ascending.
        hidden: item 0 is the hidden flags now (see `live`); its CPL decides who asks `forbids`.
        forbids: whether a program at CPL > 0 may not use (port, size).
        fail: takes what a bus raises; the access then reads all-ones.
    """
    read_port, write_port = ports.read, ports.write

    def on_in(_engine: int, port: int, size: int, _data: int) -> int:
        try:
            if hidden[0] & H_CPL and forbids(port, size):
                return ALL_ONES[size]
            return read_port(port, size)
        except BaseException as failure:
            fail(failure)
            return ALL_ONES[size]

    def on_out(_engine: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            if not (hidden[0] & H_CPL and forbids(port, size)):
                write_port(port, size, value)
        except BaseException as failure:
            fail(failure)

    engine.hook_instruction(REG.UC_X86_INS_IN, InCallback(on_in))
    engine.hook_instruction(REG.UC_X86_INS_OUT, OutCallback(on_out))
    start = 0
    for first, last in (*ram, (1 << PHYSICAL_BITS, 0)):
        if start < first:
            engine.map_io(start, first - start, *_window(start, mmio, fail))
        start = last


def install_cpuid(engine: Engine, context: Context, fail: Fail) -> None:
    """Answer CPUID from `vmm.cpu.cpuid`."""
    save, restore, longs, gpr = context.save, context.restore, context.longs, context.at.gpr
    msrs = available()

    def on_cpuid(_engine: int, _data: int) -> int:
        try:
            save()
            # EAX, EBX, ECX, EDX in the order of the encoding: 0, 3, 1, 2.
            longs[gpr], longs[gpr + 3], longs[gpr + 1], longs[gpr + 2] = cpuid(
                longs[gpr] & 0xFFFF_FFFF, msrs
            )
            restore()
        except BaseException as failure:
            fail(failure)
        return 1

    engine.hook_instruction(REG.UC_X86_INS_CPUID, CpuidCallback(on_cpuid))


def install_tsc(
    engine: Engine,
    context: Context,
    tsc: Callable[[], int],
    fail: Fail,
    live: memoryview | None,
) -> None:
    """Answer RDTSC with `tsc` (64 bits, never going back); the library does the privilege check.

    Args:
        live: see `live.registers`.
    """
    context_longs, rax, rdx = context.longs, context.at.gpr, context.at.gpr + 2

    def put(low: int, high: int) -> None:
        if live is not None:
            live[0], live[2] = low, high
        else:
            context.save()
            context_longs[rax], context_longs[rdx] = low, high
            context.restore()

    def on_rdtsc(_engine: int, _data: int) -> int:
        try:
            ticks = tsc()
            put(ticks & 0xFFFF_FFFF, ticks >> 32 & 0xFFFF_FFFF)
        except BaseException as failure:
            fail(failure)
        return 1

    engine.hook_instruction(REG.UC_X86_INS_RDTSC, CpuidCallback(on_rdtsc))


def _window(base: int, mmio: Bus, fail: Fail) -> tuple[Any, Any]:
    """The callbacks of the I/O window that begins at `base`."""
    bus_read, bus_write = mmio.read, mmio.write

    def read(_engine: int, offset: int, size: int, _data: int) -> int:
        try:
            return bus_read(base + offset, size)
        except BaseException as failure:
            fail(failure)
            return ALL_ONES[size]

    def write(_engine: int, offset: int, size: int, value: int, _data: int) -> None:
        try:
            bus_write(base + offset, size, value)
        except BaseException as failure:
            fail(failure)

    return MmioReadCallback(read), MmioWriteCallback(write)
