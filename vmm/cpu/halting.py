"""Whether the engine's last run ended by HLT: what tells a halted CPU from one that was stopped.

A run that ends by HLT and one that another thread stops come back alike, and a stop can coincide
with an HLT. The library knows (`halted`, a field of its CPU's structure) but has no call for it. So
the field is looked for by experiment, as all private fields are: among the structures that the
engine points to, the one that holds the CPU's registers, and in it the one word that is 1 after
each of several runs that ended by HLT and 0 after each that did not. If there is not exactly one,
there is none, and the CPU counts its blocks instead (see `budget`).

Source of what is looked for: struct uc_struct and CPUState of Unicorn 2.1.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct

from vmm.cpu.library import REG, Engine, OutCallback, memory_of

_SEARCHED = 4096
"""Bytes of the engine's structure that are looked at for pointers."""
_CPU_BYTES = 48 << 10
"""Bytes of the CPU's structure; it begins with a cache of 4096 pointers."""
_MARK = 0x5A17_ED5A_17ED_0CB5
_HALTS = (True, False, True, True, False, False, True, False)


class Halting:
    """Looks into one engine.

    Raises:
        LookupError: this build of the library does not show it.
    """

    def __init__(self, engine: Engine) -> None:
        found = _find()
        if found is None or engine.handle is None:
            raise LookupError("the engine does not show whether it has halted")
        pointer, field = found
        cpu = ctypes.c_uint64.from_address(engine.handle + pointer).value
        self._halted = ctypes.c_uint32.from_address(cpu + field)

    def __call__(self) -> bool:
        """Whether the last run ended by HLT."""
        return self._halted.value != 0


@functools.cache
def _find() -> tuple[int, int] | None:
    """(where in the engine the CPU's address is, where in the CPU the field is)."""
    engine = Engine()
    memory = mmap.mmap(-1, 0x10000)
    process = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        engine.map_ram(0, 0x10000, memory_of(memory))
        engine.hook_instruction(REG.UC_X86_INS_OUT, OutCallback(lambda *_: engine.stop()))
        # At 0x1000 HLT; at 0x2000 a port access that stops the run before the next block.
        memory[0x1000:0x1001] = b"\xf4"
        memory[0x2000:0x2005] = b"\xe6\x80\xeb\x00\xf4"
        return _search(engine, process)
    except OSError:
        return None
    finally:
        engine.close()
        os.close(process)


def _search(engine: Engine, process: int) -> tuple[int, int] | None:
    engine.write(REG.UC_X86_REG_RBX, _MARK)
    mark = struct.pack("<Q", _MARK)
    start = engine.handle or 0
    for offset, (address,) in enumerate(
        struct.iter_unpack("<Q", ctypes.string_at(start, _SEARCHED))
    ):
        if mark not in _read(process, address):
            continue
        candidates: set[int] | None = None
        for halts in _HALTS:
            if engine.start(0x1000 if halts else 0x2000):
                return None
            rip = engine.read(REG.UC_X86_REG_RIP)
            if rip != (0x1001 if halts else 0x2004):
                return None  # it does not stop where it should
            words = memoryview(_read(process, address)).cast("I")
            matching = {at for at, word in enumerate(words) if word == halts}
            candidates = matching if candidates is None else candidates & matching
        if candidates is not None and len(candidates) == 1:
            return 8 * offset, 4 * candidates.pop()
        return None
    return None


def _read(process: int, address: int) -> bytes:
    """Memory of ours that may not be there: read through the kernel, it cannot crash us."""
    if address % 8 or not 1 << 12 <= address < 1 << 47:
        return b""
    try:
        data = os.pread(process, _CPU_BYTES, address)
    except OSError:
        return b""
    return data if len(data) == _CPU_BYTES else b""
