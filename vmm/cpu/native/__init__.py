"""The engine's hot callbacks in machine code, for x86-64 System V hosts.

The source is `events.asm`, the committed result `events.bin` (``make -C vmm/cpu/native``). It does
the common case of what `delivery` and `fastcall` do completely, and calls them for anything else;
a host that cannot have it loses speed alone. A block tells it where everything is: functions of
the library, fields of the context (from `layout`, never written down), RAM.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmm.cpu.context import CS, SS, Context
from vmm.cpu.library import HOOK_INTERRUPT, REG, address_of, function_at, memory_of
from vmm.memory import RamRegion

_HEADER = struct.Struct("<5I")


class Block(ctypes.Structure):
    """`struc block` of the source, whose comments say what each field is."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("words", "save", "restore", "reg_read", "reg_write", "stop", "context"),
            *("gpr", "rip", "eflags", "hflags", "cs", "ss", "tr", "gdtr", "idtr", "cr"),
            *("efer", "star", "lstar", "fmask", "error_code", "is_software", "old_exception"),
            *("ram", "ram_size", "eflags_id", "cost", "with_code", "on_interrupt", "on_syscall"),
            *("events", "calls", "code", "gate", "target", "selector", "attributes"),
            *("limit", "old_sp", "sp", "frame", "flags"),
        )
    )


class Code:
    """The loaded machine code; one for all engines of the process.

    Attributes:
        on_block: host address of the block hook of `budget`.
        on_interrupt, on_syscall, inject: of the routines that work on a `Block`.
    """

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page
        self.address = address = memory_of(page)
        size, *offsets = _HEADER.unpack_from(page)
        assert size == ctypes.sizeof(Block), "events.bin was not built from this tree"
        self.on_block, self.on_interrupt, self.on_syscall, self.inject = (
            address + offset for offset in offsets
        )


@functools.cache
def load() -> Code | None:
    """The machine code, or None where this host cannot have it."""
    if os.name != "posix" or platform.machine() not in ("x86_64", "amd64"):
        return None
    data = Path(__file__).with_name("events.bin").read_bytes()
    size = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    page = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[: len(data)] = data
    # Never writable and executable at once.
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    code = Code(page)
    if protect(code.address, size, mmap.PROT_READ | mmap.PROT_EXEC):
        return None
    return code


class NativeEvents:
    """Takes an engine's interrupt and SYSCALL hooks.

    Args:
        code: what `load` gave.
        context: of the engine.
        ram: the RAM that begins at guest-physical 0; mapped as long as the engine runs.
        words: host address of the counters of `budget.Budget`.
        cost: what an event adds to the first of them.
        with_code: vectors of exceptions that push an error code.
        on_interrupt, on_syscall: the complete callbacks.
    """

    def __init__(
        self,
        code: Code,
        context: Context,
        ram: RamRegion,
        *,
        words: int,
        cost: int,
        with_code: Iterable[int],
        on_interrupt: Any,
        on_syscall: Any,
    ) -> None:
        assert ram.start == 0
        engine, at = context.engine, context.at
        base = memory_of(context.bytes)
        fields = {
            name: base + 8 * getattr(at, name)
            for name in ("gpr", "rip", "tr", "gdtr", "idtr", "cr", "efer", "star", "lstar", "fmask")
        } | {
            name: base + 4 * getattr(at, f"{name}_w")
            for name in ("eflags", "hflags", "error_code", "is_software", "old_exception")
        }
        self._kept = (code, on_interrupt, on_syscall)
        self._block = Block(
            words=words,
            save=address_of("uc_context_save"),
            restore=address_of("uc_context_restore"),
            reg_read=address_of("uc_reg_read"),
            reg_write=address_of("uc_reg_write"),
            stop=address_of("uc_emu_stop"),
            context=base,
            cs=base + 8 * (at.segments + 3 * CS),
            ss=base + 8 * (at.segments + 3 * SS),
            ram=ram.address,
            ram_size=ram.size,
            eflags_id=REG.UC_X86_REG_EFLAGS,
            cost=cost,
            with_code=sum(1 << vector for vector in with_code),
            on_interrupt=function_at(on_interrupt),
            on_syscall=function_at(on_syscall),
            **fields,
        )
        self._engine = engine
        self._at = at_block = ctypes.addressof(self._block)
        engine.hook(HOOK_INTERRUPT, ctypes.c_void_p(code.on_interrupt), data=at_block)
        syscall = ctypes.c_void_p(code.on_syscall)
        engine.hook_instruction(REG.UC_X86_INS_SYSCALL, syscall, data=at_block)
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
        )
        self._inject = prototype(code.inject)

    def inject(self, vector: int) -> bool:
        """Enter the handler of an external interrupt; False: not a common case, nothing done."""
        return bool(self._inject(self._engine.handle, vector, self._at))

    @property
    def events(self) -> int:
        """Exceptions and interrupts delivered here."""
        return int(self._block.events)

    @property
    def calls(self) -> int:
        """SYSCALLs done here."""
        return int(self._block.calls)
