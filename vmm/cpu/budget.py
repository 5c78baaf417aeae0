"""The budget of a run: how much code may execute, and how another thread ends it early.

Unicorn can be stopped exactly (no instruction run twice or skipped) at the start of a translated
block only. So a block hook keeps two counters: the bytes of code executed so far, and a limit; when
the first has reached the second it stops the engine before the block. Another thread ends a run by
lowering the limit: each counter has a single writer at a time, so no kick can be lost.

The hook runs for every block of guest code, millions of times a second. On x86-64 it is 28 bytes
of machine code that the engine calls directly; elsewhere, or where the host forbids executable
memory, a Python function does the same about ten times slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from typing import Any

from vmm.cpu.library import HOOK_BLOCK, STOP_FUNCTION, BlockCallback, Engine, memory_of

_EXECUTED, _LIMIT, _STOP, _STOPPED = range(4)

_X86_64 = bytes.fromhex(
    "488b01"  # mov rax, [rcx]         executed; rcx is the hook's user data
    "483b4108"  # cmp rax, [rcx + 8]   limit
    "7d09"  # jge stop
    "89d2"  # mov edx, edx             the block's size, zero-extended
    "4801d0"  # add rax, rdx
    "488901"  # mov [rcx], rax
    "c3"  # ret
    "c6411801"  # stop: mov byte [rcx + 24], 1
    "ff6110"  # jmp [rcx + 16]         uc_emu_stop; rdi is still the engine
)
"""System V calling convention: rdi engine, rsi address, edx size, rcx user data."""

NO_LIMIT = 1 << 62


class Budget:
    """The counters of one engine, with their hook installed.

    Args:
        engine: the engine to hook.
        native: False forces the portable hook.

    Attributes:
        words: [executed, limit, -, stopped], for the hot path of `Cpu`.
        native: whether the hook is machine code.
    """

    def __init__(self, engine: Engine, native: bool = True) -> None:
        self._storage = (ctypes.c_int64 * 4)()
        self.words = memoryview(self._storage).cast("B").cast("q")
        self.words[_LIMIT] = NO_LIMIT
        self.words[_STOP] = STOP_FUNCTION
        code = _native_code() if native else None
        self.native = code is not None
        if code is not None:
            self._code = code
            hook = ctypes.c_void_p(memory_of(code))
            engine.hook(HOOK_BLOCK, hook, data=ctypes.addressof(self._storage))
        else:
            engine.hook(HOOK_BLOCK, BlockCallback(self._portable(engine)))

    def _portable(self, engine: Engine) -> Any:
        words, stop = self.words, engine.stop

        def on_block(_engine: int, _address: int, size: int, _data: int) -> None:
            if words[_EXECUTED] >= words[_LIMIT]:
                words[_STOPPED] = 1
                stop()
            else:
                words[_EXECUTED] += size

        return on_block

    @property
    def executed(self) -> int:
        """Bytes of guest code executed so far; grows only."""
        return self.words[_EXECUTED]

    def arm(self, amount: int) -> None:
        """Allow `amount` more bytes."""
        words = self.words
        words[_STOPPED] = 0
        words[_LIMIT] = words[_EXECUTED] + amount

    def end(self) -> None:
        """From any thread: stop before the next block."""
        self.words[_LIMIT] = -1

    def charge(self, amount: int) -> bool:
        """Spend `amount` on something that is no code; True when the limit is reached."""
        words = self.words
        words[_EXECUTED] += amount
        return words[_EXECUTED] >= words[_LIMIT]

    @property
    def stopped(self) -> bool:
        """Whether the hook has stopped the engine since `arm`."""
        return self.words[_STOPPED] != 0


def _native_code() -> mmap.mmap | None:
    """A page with the machine code, or None where this host cannot have it."""
    if os.name != "posix" or platform.machine() not in ("x86_64", "amd64"):
        return None
    rights = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=rights)
    except OSError:
        return None
    page[: len(_X86_64)] = _X86_64
    return page
