"""Having the engine call us at instructions: RDMSR, WRMSR, MOV CR8, and IRET when that matters.

The engine has what a hypervisor in the guest would use, the intercepts of AMD-V (APM volume 2,
15.9 to 15.11). They work while a hidden flag says that the CPU runs a nested guest, which the flags
of ours always say. An intercepted instruction has done nothing yet: the run comes to the interrupt
hook with a number above 255. RDMSR and WRMSR look into a permission map in guest-physical memory;
where its bit is 0 they go on as ever, without a call of ours.

The map and the control block (VMCB) that points to it are pages of ours where no page table leads.

Source of what is set: CPUX86State and cpu_svm_check_intercept_param of Unicorn 2.1.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Iterable

from vmm.cpu.context import Context
from vmm.cpu.layout import H_GUEST
from vmm.cpu.library import HOOK_INTERRUPT, REG, Engine, InterruptCallback, memory_of

READ_CR8, WRITE_CR8, IRET, MSR = 0x108, 0x118, 0x174, 0x17C
"""What the interrupt hook is called with: 256 and the code of the exit (APM appendix C)."""

VECTOR_PAGE = 1 << 56
"""Guest-physical page whose first word is the block's vector of a virtual interrupt (`virq`)."""
_VECTOR_AT, _MAP_AT = 0x64, 0x48
"""Fields of a control block (APM volume 2, table B-1)."""
BLOCK = VECTOR_PAGE - _VECTOR_AT
"""Guest-physical address of the control block, across two pages: the first one is memory."""
_MEMORY_SIZE = 3 * mmap.PAGESIZE
_MEMORY = VECTOR_PAGE - _MEMORY_SIZE
"""The permission map, 6 KiB, and the control block's first page."""

_RANGES = ((0, 0), (0xC000_0000, 0x800), (0xC001_0000, 0x1000))
"""Of 8192 MSRs each: the first one, and where its two bits are in the map (15.11)."""
_MSR_INTERCEPT = 1 << 28
IRET_INTERCEPT = 1 << 20
"""Bits of the word that begins with that of physical interrupts (`instructions`)."""
_CR8_INTERCEPT = 1 << 8


class Intercepts:
    """What one engine intercepts; keep it as long as the engine runs.

    Args:
        passed: the MSRs that the engine reads and writes by itself.
        readable: those that it reads by itself.
    """

    def __init__(self, context: Context, passed: Iterable[int], readable: Iterable[int]) -> None:
        self._memory = memory = mmap.mmap(-1, _MEMORY_SIZE)
        memory[:0x1800] = b"\xff" * 0x1800
        for number in passed:
            _allow(memory, number, 3)
        for number in readable:
            _allow(memory, number, 1)
        struct.pack_into("<Q", memory, BLOCK - _MEMORY + _MAP_AT, _MEMORY)
        context.engine.map_ram(_MEMORY, _MEMORY_SIZE, memory_of(memory))
        _set(context)


def instructions(context: Context) -> int:
    """Which word of the context has a bit for each kind of instruction that is intercepted."""
    return context.at.old_exception_w + 6


def _allow(memory: mmap.mmap, number: int, bits: int) -> None:
    for first, place in _RANGES:
        if first <= number < first + 0x2000:
            memory[place + (number - first) // 4] &= ~(bits << number % 4 * 2)


def _set(context: Context) -> None:
    context.save()
    at, words = context.at, context.words
    block = at.old_exception_w * 4 + 8
    # Behind the address: the TSC's offset, then instructions, control registers read, and written.
    fields = BLOCK, 0, _MSR_INTERCEPT, _CR8_INTERCEPT, _CR8_INTERCEPT
    struct.pack_into("<QQQHH", context.bytes, block, *fields)
    words[at.hflags_w] |= H_GUEST
    context.restore()


@functools.cache
def available() -> bool:
    """Whether this build of the library does it, found out with a throw-away engine."""
    engine = Engine()
    try:
        return _try(engine)
    finally:
        engine.close()


def _try(engine: Engine) -> bool:
    """One MSR in each range and beside them, allowed and not, and CR8, there and back."""
    context = Context(engine)
    memory = mmap.mmap(-1, 0x10000)
    engine.map_ram(0, 0x10000, memory_of(memory))
    kept = Intercepts(context, (0x277, 0xC000_0081), (0xFE,))
    seen: list[tuple[int, int, int]] = []

    def stop(_engine: int, event: int, _data: int) -> None:
        context.save()
        seen.append((event, context.rip, context.words[context.at.error_code_w]))
        engine.stop()

    engine.hook(HOOK_INTERRUPT, InterruptCallback(stop))
    read, write = bytes.fromhex("48ffc6 0f32 f4"), bytes.fromhex("48ffc6 0f30 f4")
    trials = [
        (read, 0x277, 0),
        (write, 0x277, 0),
        (read, 0xC000_0081, 0),
        (write, 0xC000_0081, 0),
        (read, 0xFE, 0),
        (write, 0xFE, MSR),
        (read, 0x276, MSR),
        (write, 0x278, MSR),
        (read, 0xC000_0080, MSR),
        (write, 0xC001_0010, MSR),
        (read, 0x4000_0000, MSR),
        (bytes.fromhex("48ffc6 440f20c0 f4"), 0, READ_CR8),
        (bytes.fromhex("48ffc6 440f22c0 f4"), 0, WRITE_CR8),
        (bytes.fromhex("48ffc6 0f20c0 f4"), 0, 0),
    ]
    for n, (code, number, event) in enumerate(trials):
        at = 0x1000 + 0x20 * n
        memory[at : at + len(code)] = code
        engine.write(REG.UC_X86_REG_RSI, n)
        engine.write(REG.UC_X86_REG_RCX, number)
        seen.clear()
        engine.start(at)
        context.save()
        wanted = [(event, at + 3, int(code[4] == 0x30))] if event else []
        if seen != wanted or engine.read(REG.UC_X86_REG_RSI) != n + 1:
            return False
    return kept is not None and bool(context.hidden & H_GUEST)
