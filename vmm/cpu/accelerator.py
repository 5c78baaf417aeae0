"""An optional accelerator: no look for a stop request after every load and store.

The library calls a function after each memory access of the guest to see whether somebody wants it
to stop. We stop at block starts only (see `budget`), so these looks are lost time: 10 to 35% of
it. A private field of the library's engine, `no_exit_request`, leaves them out of the
translated code. It is used only where it is found beyond doubt and a trial shows that it does
what it should; otherwise the CPU runs without it, just slower. A run that counts instructions
(`Cpu.step`) needs the looks, so the field is cleared for those.

Source of the neighbourhood that is searched: struct uc_struct of Unicorn 2.1 (uc_priv.h).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct

from vmm.cpu.library import REG, Engine, MmioReadCallback, MmioWriteCallback, memory_of

_SEARCHED = 9000
"""Bytes of the engine's structure that are looked at; it is larger."""
_UNTIL = 0x7A5A_E1F0_0D5E_C7E1
_NESTED_LEVELS = 64
_CODE, _DEVICE = 0x1000, 0x10000


def accelerate(engine: Engine, on: bool) -> None:
    """Choose how code is translated from now on; flush what is translated already."""
    offset = _offset()
    if offset is not None and engine.handle is not None:
        ctypes.c_uint8.from_address(engine.handle + offset).value = on


def available() -> bool:
    """Whether this build of the library can be accelerated."""
    return _offset() is not None


@functools.cache
def _offset() -> int | None:
    """Where the field lies in the engine's structure; None: nowhere that is certain."""
    engine = Engine(end_addresses=True)
    memory = mmap.mmap(-1, 0x10000)
    try:
        engine.map_ram(0, 0x10000, memory_of(memory))
        offset = _search(engine, memory)
        if offset is None or not _try(engine, memory, offset):
            return None
        return offset
    finally:
        engine.close()


def _search(engine: Engine, memory: mmap.mmap) -> int | None:
    """The end address, once used, marks the place; the context size and four flags follow it."""
    memory[_CODE : _CODE + 1] = b"\xf4"
    engine.start(_CODE, until=_UNTIL)
    data = ctypes.string_at(engine.handle or 0, _SEARCHED)
    mark = struct.pack("<Q", _UNTIL)
    exits = data.find(mark)
    if exits < 0 or data.find(mark, exits + 1) >= 0:
        return None
    size = data.find(struct.pack("<I", engine.context_bytes), exits + 8 * _NESTED_LEVELS)
    if size < 0:
        return None
    flags = (size + 4 + 7) // 8 * 8 + 8  # behind the aligned next_pc
    # hook_insert, first_tb, no_exit_request, init_done
    return flags + 2 if data[flags : flags + 4] in (b"\0\1\0\1", b"\0\0\0\1") else None


def _try(engine: Engine, memory: mmap.mmap, offset: int) -> bool:
    """A stop in the middle of a block must repeat a store without the field, and not with it."""
    stores = [0]

    def read(_engine: int, _offset: int, _size: int, _data: int) -> int:
        return 0

    def write(_engine: int, _offset: int, _size: int, _value: int, _data: int) -> None:
        stores[0] += 1
        engine.stop()

    engine.map_io(_DEVICE, 0x1000, MmioReadCallback(read), MmioWriteCallback(write))
    memory[_CODE : _CODE + 6] = b"\x89\x03\x48\xff\xc1\xf4"  # mov [rbx], eax; inc rcx; hlt
    field = ctypes.c_uint8.from_address((engine.handle or 0) + offset)
    results = []
    for value in (0, 1):
        field.value = value
        engine.flush_translations()
        stores[0] = 0
        engine.write(REG.UC_X86_REG_RBX, _DEVICE)
        engine.write(REG.UC_X86_REG_RCX, 0)
        engine.start(_CODE)
        state = engine.read(REG.UC_X86_REG_RIP) - _CODE, engine.read(REG.UC_X86_REG_RCX), stores[0]
        results.append(state)
    return results == [(0, 0, 1), (6, 1, 1)]
