"""Leaving the engine from any thread, exactly: before the next block, with nothing else changed.

The library's own call for that, `uc_emu_stop`, is noticed at the start of a block, too (see
`accelerator`), but has an effect at once: the engine then skips all but the first of its
instruction hooks, so a SYSCALL between the call and the end of its block does nothing. What the
call does is to set a flag, `stop_request`, and fields of the CPU's structure that make it leave
translated code. We set those, and instead of the flag the engine's error code, to one that the
library does not have. Until the block ends it looks at that only where physical memory is not
mapped (where a read is then tried again by the next run); then it ends the run, and returns it.

A run that is left may have executed HLT in that moment, which a further field tells.

These fields are found by experiment (see `laboratory`). Where they are not, or on a build that
cannot be accelerated, there is no leaving and blocks are counted (see `budget`).

Source of what is looked for: cpu_exit and tcg_cpu_exec of Unicorn 2.1.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmm.cpu.accelerator import accelerate, available
from vmm.cpu.laboratory import Laboratory, cpu_of, only
from vmm.cpu.library import REG, CpuidCallback, Engine, OutCallback, memory_of

LEFT = 0x1EF7
"""What a run returns that was left; the library's own error codes are small numbers."""

_MARK = 0x5A17_ED5A_17ED_0CB5
_HALTS = (True, False, True, True, False, False, True, False)
_WRITE_UNMAPPED, _WRITE_PROTECTED = 7, 12  # UC_ERR_WRITE_UNMAPPED, UC_ERR_WRITE_PROT
_READ_ONLY, _UNMAPPED = 0x10000, 0x50000
_HLT, _ACCESS, _STORE, _LEAVE, _LEAVE_AND_HALT = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
_PROGRAMS = {
    _HLT: "f4",
    _ACCESS: "e680 eb00 f4",  # out 0x80, al; jmp next; hlt
    _STORE: "8907 e680 eb00 f4",  # mov [rdi], eax; out; jmp next; hlt
    _LEAVE: "e681 0fa2 48ffc6 eb00 f4",  # out 0x81, al; cpuid; inc rsi; jmp next; hlt
    _LEAVE_AND_HALT: "e681 0fa2 48ffc6 f4",
}


@dataclass(frozen=True)
class Places:
    """Where the fields are, in bytes.

    Attributes:
        cpu: of the CPU's address in the engine's structure.
        error: of the error code in the engine's structure.
        halted: of the word in the CPU's structure that is 1 after an HLT.
        flags: of the bytes in the CPU's structure that are 1 when it shall leave.
        count: of the half-word in it that is negative then; the start of a block looks at it.
    """

    cpu: int
    error: int
    halted: int
    flags: tuple[int, ...]
    count: int


class Leaving:
    """The fields of one engine, at these places."""

    def __init__(self, engine: Engine, at: Places) -> None:
        cpu = cpu_of(engine, at.cpu)
        self._error = ctypes.c_uint32.from_address((engine.handle or 0) + at.error)
        self._halted = ctypes.c_uint32.from_address(cpu + at.halted)
        self._flags = [ctypes.c_uint8.from_address(cpu + place) for place in at.flags]
        self._count = ctypes.c_int16.from_address(cpu + at.count)

    def leave(self) -> None:
        """From any thread: let the run that goes on return LEFT before its next block.

        A run that has not really begun yet does not hear it. The order matters: whoever notices
        the last field finds the others set.
        """
        self._error.value = LEFT
        for flag in self._flags:
            flag.value = 1
        self._count.value = -1

    def halted(self) -> bool:
        """Whether the last run ended by HLT."""
        return self._halted.value != 0


@functools.cache
def places() -> Places | None:
    """Where the fields are; None: not where it is certain."""
    if not available():
        return None
    try:
        laboratory = _Laboratory()
        with laboratory:
            return laboratory.search()
    except (LookupError, OSError):
        return None


def leaving_of(engine: Engine) -> Leaving | None:
    """The fields of this engine; None: not where it is certain."""
    found = places()
    return None if found is None else Leaving(engine, found)


class _Laboratory(Laboratory):
    """Runs the programs above."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = mmap.mmap(-1, 0x20000)
        self._on_access: Callable[[], object] = lambda: None
        self._cpuids = 0
        engine, address = self.engine, memory_of(self._memory)
        engine.map_ram(0, _READ_ONLY, address)
        engine.map_ram(_READ_ONLY, 0x1000, address, writable=False)
        accelerate(engine, True)
        engine.hook_instruction(REG.UC_X86_INS_OUT, OutCallback(self._out))
        engine.hook_instruction(REG.UC_X86_INS_CPUID, CpuidCallback(self._cpuid))
        for start, code in _PROGRAMS.items():
            data = bytes.fromhex(code)
            self._memory[start : start + len(data)] = data

    def _out(self, *_access: int) -> None:
        self._on_access()

    def _cpuid(self, *_call: int) -> int:
        self._cpuids += 1
        return 1

    def _run(self, program: int, on_access: Callable[[], object], ends: int) -> int:
        """Run a program; LookupError if it does not end `ends` bytes behind its start."""
        self._on_access = on_access
        code = self.engine.start(program)
        if self.engine.read(REG.UC_X86_REG_RIP) != program + ends:
            raise LookupError("the engine does not stop where it should")
        return code

    def search(self) -> Places:
        self.engine.write(REG.UC_X86_REG_RBX, _MARK)
        pointer, cpu, _ = self.find_cpu(struct.pack("<Q", _MARK))
        halted = self._find_halted(cpu)
        flags, count = self._find_flags(cpu)
        found = Places(pointer, self._find_error(), halted, flags, count)
        self._try(Leaving(self.engine, found))
        return found

    def _find_halted(self, cpu: int) -> int:
        """The word that is 1 after each run that ended by HLT and 0 after each that did not."""
        candidates: set[int] | None = None
        for halts in _HALTS:
            if halts:
                self._run(_HLT, lambda: None, 1)
            else:
                self._run(_ACCESS, self.engine.stop, 4)
            candidates = _matching(self.read(cpu), int(halts), candidates)
        return 4 * only(candidates or set())

    def _find_flags(self, cpu: int) -> tuple[tuple[int, ...], int]:
        """What a stop changes in the CPU's structure: one or two flags and half of a counter."""
        seen: list[bytes] = []

        def stop() -> None:
            seen.append(self.read(cpu))
            self.engine.stop()
            seen.append(self.read(cpu))

        self._run(_ACCESS, stop, 4)
        before, after = seen
        changed = {
            at: (old, new)
            for at, (old, new) in enumerate(zip(before, after, strict=True))
            if old != new
        }
        flags = [at for at, change in changed.items() if change == (0, 1)]
        count = [at for at, change in changed.items() if change == (0, 0xFF)]
        if len(flags) not in (1, 2) or len(count) != 2 or len(changed) != len(flags) + 2:
            raise LookupError("a stop changes something else than it should")
        return tuple(flags), count[0]

    def _find_error(self) -> int:
        """The one word of the engine that is the error of a store that has just failed."""
        candidates: set[int] | None = None
        for target, error in (
            (_UNMAPPED, _WRITE_UNMAPPED),
            (0x8000, 0),
            (_READ_ONLY, _WRITE_PROTECTED),
            (_UNMAPPED + 0x1000, _WRITE_UNMAPPED),
        ):
            seen: list[bytes] = []
            self.engine.write(REG.UC_X86_REG_RDI, target)
            self._on_access = lambda seen=seen: seen.append(self.own())  # type: ignore[misc]
            self.engine.start(_STORE)
            if len(seen) != 1:
                raise LookupError("a failed store does not let its block go on")
            candidates = _matching(seen[0], error, candidates)
        return 4 * only(candidates or set())

    def _try(self, leaving: Leaving) -> None:
        """The rest of the block runs, with its hooks; the run ends behind it, and HLT is told."""
        for program, ends, halts in (
            (_LEAVE, 9, False),
            (_LEAVE_AND_HALT, 8, True),
            (_LEAVE, 9, False),
        ):
            self._cpuids = 0
            self.engine.write(REG.UC_X86_REG_RSI, 0)
            code = self._run(program, leaving.leave, ends)
            result = code, self._cpuids, self.engine.read(REG.UC_X86_REG_RSI), leaving.halted()
            if result != (LEFT, 1, 1, halts):
                raise LookupError("leaving does not do what it should")
        if self._run(_HLT, lambda: None, 1) or not leaving.halted():
            raise LookupError("a run does not forget that the one before was left")


def _matching(data: bytes, value: int, candidates: set[int] | None) -> set[int]:
    """The words that have this value, of the candidates if there were any before."""
    matching = {at for at, word in enumerate(memoryview(data).cast("I")) if word == value}
    return matching if candidates is None else candidates & matching
