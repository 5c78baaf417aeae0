"""Our page walk against the engine's: same address, same fault, same accessed and dirty bits."""

from __future__ import annotations

import random
import struct

import pytest
from cpu_bench import HANDLERS, KERNEL_STACK, Bench

from vmm.cpu.context import Context
from vmm.cpu.engine import StopReason
from vmm.cpu.paging import Fault, Linear
from vmm.cpu.state import CODE32, CpuState, flat_segment

TABLES = {"4-level": (0x70000, 4), "pae": (0x70000, 3), "32-bit": (0x70000, 2)}


def random_tables(bench: Bench, rng: random.Random, kind: str) -> int:
    """Page tables for one random address, mostly mapped, with odd bits; gives the address."""
    linear = rng.choice((0x40_0000, 0x60_0000, 0x123_4000, 0x1FF_F000)) | rng.getrandbits(12) & ~7
    target = 0x80_0000 | rng.getrandbits(20) & ~0xFFF
    chance = rng.random()

    def entry(address: int, large: bool = False) -> int:
        value = address | 7
        for bit, odds in ((0, 30), (1, 6), (2, 6), (5, 2), (6, 2), (8, 4)):
            if rng.randrange(odds) == 0:
                value ^= 1 << bit
        if large:
            value |= 0x80
        if kind != "32-bit" and rng.randrange(12) == 0:
            value |= 1 << rng.choice((63, 51, 40, 13))
        return value

    tables = 0x70_0000
    size = 4 if kind == "32-bit" else 8
    bench.memory.write(tables, bytes(0x5000))
    # Where nothing else is said, memory is mapped one to one by the ordinary tables.
    if kind == "32-bit":
        place = 0x3000 + (linear >> 22) * 4
        large = chance < 0.3
        value = entry(target & ~0x3F_FFFF if large else tables, large)
        bench.memory.write(place, struct.pack("<I", value & 0xFFFF_FFFF))
        if not large:
            index = (linear >> 12 & 0x3FF) * size
            bench.memory.write(tables + index, struct.pack("<I", entry(target)))
    else:
        large = chance < 0.3
        value = entry(target & ~0x1F_FFFF if large else tables, large)
        bench.put(0x3000 + (linear >> 21) * 8, value)
        if not large:
            bench.put(tables + (linear >> 12 & 0x1FF) * 8, entry(target))
    return linear


def paged(bench: Bench, kind: str, user: bool) -> CpuState:
    if kind == "4-level":
        state = bench.long(user)
        state.efer |= 0x800
        return state
    state = bench.protected(user)
    state.cr0, state.cr3 = 0x8001_0011, 0x3000 if kind == "32-bit" else 0x2000
    state.cr4 = 0x10 if kind == "32-bit" else 0x20
    if kind == "32-bit":
        for i in range(8):
            bench.memory.write(0x3000 + 4 * i, struct.pack("<I", i << 22 | 0x87))
    else:
        bench.put(0x2000, 0x3001, 0, 0, 0)
        bench.put(0x3000, *((i << 21 | 0x87) for i in range(16)))
        state.efer = 0x800
    state.cs = flat_segment(state.cs.selector, state.cs.attributes | CODE32)
    return state


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("kind", TABLES)
def test_walk_agrees_with_the_engine(kind: str, user: bool, write: bool) -> None:
    rng = random.Random(f"{kind} {user} {write}")
    faults = 0
    with Bench() as bench:
        for _ in range(120):
            state = paged(bench, kind, user)
            state.cr0 = state.cr0 & ~0x10000 | (0x10000 if rng.random() < 0.5 else 0)
            if rng.random() < 0.3:
                state.efer &= ~0x800
            linear = random_tables(bench, rng, kind)
            before = bench.memory.read(0x1000, 0x4000), bench.memory.read(0x70_0000, 0x5000)
            state.gpr[3] = linear
            code = (
                bytes.fromhex(
                    # mov [ebx], al
                    "8803"
                )
                if write
                else bytes.fromhex(
                    # mov al, [ebx]
                    "8a03"
                )
            )
            stop = bench.run(state, code + (b"\x0f\x0b" if user else b"\xf4"))
            assert stop.reason is StopReason.HALT
            after = bench.memory.read(0x1000, 0x4000), bench.memory.read(0x70_0000, 0x5000)
            where = bench.cpu.get_state()
            native = None
            if where.rip - 1 == HANDLERS + 14:
                size = 8 if kind == "4-level" else 4
                native = (bench.words(where.gpr[4], 1, size)[0], where.cr2)
                faults += 1
            # Again by our walk, from the same tables.
            bench.memory.write(0x1000, before[0])
            bench.memory.write(0x70_0000, before[1])
            bench.cpu.set_state(state)
            context: Context = bench.cpu._context
            context.save()
            walk: Linear = bench.cpu._linear
            ours = None
            try:
                walk.translate(linear, write, user)
            except Fault as fault:
                ours = (fault.code, fault.address)
            assert ours == native
            if native is None:
                marked = bench.memory.read(0x1000, 0x4000), bench.memory.read(0x70_0000, 0x5000)
                # The engine also touched code and stack pages: compare this address's entries.
                assert marked[1] == after[1]
    assert 0 < faults < 120


def test_reads_and_writes_cross_pages() -> None:
    with Bench() as bench:
        state = bench.long()
        bench.put(0x4000, 0x30_0007, 0x50_0007, 0)
        bench.cpu.set_state(state)
        context: Context = bench.cpu._context
        context.save()
        walk: Linear = bench.cpu._linear
        walk.write(0x20_0FFE, b"abcd")
        assert bench.memory.read(0x30_0FFE, 2) + bench.memory.read(0x50_0000, 2) == b"abcd"
        assert walk.read(0x20_0FFE, 4) == b"abcd"
        bench.memory.write(0x50_0FF0, b"keep" * 4)
        with pytest.raises(Fault):
            walk.write(0x20_1FFC, b"12345678")
        assert bench.memory.read(0x50_0FFC, 4) == b"keep"  # all or nothing
        assert walk.translate(KERNEL_STACK) == KERNEL_STACK
