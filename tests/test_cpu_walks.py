"""Hypothesis: our page walk is the engine's, in 32-bit, PAE, 4-level and 5-level paging.

For tables with anything in them, at every level: the same physical address, or the same page fault
(error code and CR2), and the same accessed and dirty bits afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from cpu_bench import CODE, HANDLERS, Bench
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vmm.cpu.engine import StopReason
from vmm.cpu.paging import Fault
from vmm.cpu.state import CODE32, CpuState, flat_segment

TABLES, TARGET = 0x70_0000, 0x80_0000
PML5 = 0x6000
SHIFTS = {
    "32-bit": (22, 12),
    "pae": (30, 21, 12),
    "4-level": (39, 30, 21, 12),
    "5-level": (48, 39, 30, 21, 12),
}
TOP = {"32-bit": 0x6000_0000, "pae": 1 << 30, "4-level": 5 << 39, "5-level": 3 << 48}
"""Addresses whose entries are theirs alone, also in the highest table."""
ROOT = {"32-bit": 0x3000, "pae": 0x2000, "4-level": 0x1000, "5-level": PML5}


@dataclass
class Walk:
    """One walk: where, and an entry for each level from the highest."""

    linear: int
    entries: list[int]
    write: bool
    user: bool
    write_protect: bool
    no_execute: bool


@st.composite
def walks(draw: st.DrawFn, kind: str) -> Walk:
    shifts = SHIFTS[kind]
    linear = TOP[kind] | draw(st.integers(0, (1 << shifts[0]) - 1))
    entries = []
    for level, shift in enumerate(shifts):
        last = shift == 12
        large = not last and draw(st.integers(0, 4)) == 0
        address = TARGET | (draw(st.integers(0, 255)) << 12) if last or large else 0
        if large and draw(st.booleans()):
            address &= ~((1 << shift) - 1)
        if not last and not large:
            address = TABLES + 0x1000 * level
        value = address | 7 | (0x80 if large else 0)
        for flip in draw(st.lists(st.sampled_from((0, 1, 2, 5, 6, 7, 8)), max_size=2)):
            value ^= 1 << flip
        if kind != "32-bit" and draw(st.integers(0, 9)) == 0:
            value ^= 1 << draw(st.sampled_from((63, 62, 52, 51, 45, 40)))
        entries.append(value)
    flags = draw(st.tuples(*[st.booleans()] * 4))
    return Walk(linear, entries, *flags)


def state_of(bench: Bench, kind: str, walk: Walk) -> CpuState:
    if kind in ("4-level", "5-level"):
        state = bench.long(walk.user)
        if kind == "5-level":
            bench.put(PML5, 0x1007)
            state.cr3 = PML5
            state.cr4 |= 1 << 12
    else:
        state = bench.protected(walk.user)
        state.cr0, state.cr3 = 0x8001_0011, ROOT[kind]
        state.cr4 = 0x10 if kind == "32-bit" else 0x20
        if kind == "32-bit":
            bench.memory.write(0x3000, struct.pack("<4I", *(i << 22 | 0x87 for i in range(4))))
        else:
            bench.put(0x2000, 0x3001, 0, 0, 0)
            bench.put(0x3000, *((i << 21 | 0x87) for i in range(8)))
        state.cs = flat_segment(state.cs.selector, state.cs.attributes | CODE32)
    state.cr0 = state.cr0 & ~0x10000 | walk.write_protect << 16
    state.efer = state.efer & ~0x800 | walk.no_execute << 11
    state.gpr[0], state.gpr[3] = 0xA5, walk.linear
    return state


def tables(bench: Bench, kind: str, walk: Walk) -> bytes:
    """Write them; the bytes of all tables."""
    size = 4 if kind == "32-bit" else 8
    bench.memory.write(TABLES, bytes(0x5000))
    table = ROOT[kind]
    for level, (shift, entry) in enumerate(zip(SHIFTS[kind], walk.entries, strict=True)):
        index = walk.linear >> shift & (
            0x3FF if size == 4 else 3 if shift == 30 and kind == "pae" else 0x1FF
        )
        data = (entry & (1 << 8 * size) - 1).to_bytes(size, "little")
        bench.memory.write(table + index * size, data)
        table = TABLES + 0x1000 * level
    return contents(bench, kind)


def contents(bench: Bench, kind: str) -> bytes:
    """The tables, but for entries that map code, stack and TSS."""
    size = 4 if kind == "32-bit" else 8
    root = bench.memory.read(ROOT[kind], 0x20 if kind == "pae" else 0x1000)
    return root[4 * size if kind == "32-bit" else size :] + bench.memory.read(TABLES, 0x5000)


@pytest.mark.parametrize("kind", SHIFTS)
def test_our_walk_is_the_engines(kind: str) -> None:
    outcomes: set[str] = set()
    with Bench() as bench:

        @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
        @given(walks(kind))
        def agree(walk: Walk) -> None:
            state = state_of(bench, kind, walk)
            before = tables(bench, kind, walk)
            saved = bench.memory.read(ROOT[kind], 0x1000)
            below = bench.memory.read(TABLES, 0x5000)
            bench.cpu.set_state(state)
            bench.cpu._context.save()
            fault, place = None, 0
            try:
                place = bench.cpu._linear.translate(walk.linear, walk.write, walk.user)
            except Fault as caught:
                fault = (caught.code, caught.address)
            assume(fault is not None or place >= TARGET)  # else code and tables change
            ours = contents(bench, kind)
            # The same by the engine, from the same tables.
            bench.memory.write(ROOT[kind], saved)
            bench.memory.write(TABLES, below)
            in_ram = fault is None and place < 16 << 20
            if in_ram:
                bench.memory.write(place, b"\x3c")
            code = b"\x88\x03" if walk.write else b"\x8a\x03"  # mov [rbx], al / mov al, [rbx]
            end = b"\x0f\x0b" if walk.user else b"\xf4"
            assert bench.run(state, code + end).reason is StopReason.HALT
            after = bench.cpu.get_state()
            native = None
            if after.rip - 1 == HANDLERS + 14:
                size = 8 if "level" in kind else 4
                native = (bench.words(after.gpr[4], 1, size)[0], after.cr2)
            assert native == fault
            # The engine marks an entry of 1 GiB accessed before it finds its address misaligned.
            giant = any(
                entry & 0x81 == 0x81 and shift == 30 and "level" in kind
                for shift, entry in zip(SHIFTS[kind], walk.entries, strict=True)
            )
            assert (fault and giant) or contents(bench, kind) == ours
            if in_ram and walk.write:
                assert bench.memory.read(place, 1) == b"\xa5"
            elif in_ram:
                assert after.gpr[0] & 0xFF == 0x3C
            outcomes.add("fault" if fault else "ram" if in_ram else "elsewhere")
            if before != ours:
                outcomes.add("marked")

        agree()
    assert {"fault", "ram", "marked"} <= outcomes


@pytest.mark.parametrize("linear", [3 << 48 | 0x1234, 255 << 48 | 0x1234, (1 << 64) - 0x1000])
def test_five_levels_reach_57_bits(linear: int) -> None:
    """LA57, which CPUID does not show: code, a fault and its frame work under it."""
    with Bench() as bench:
        state = bench.long()
        bench.put(PML5, 0x1007)
        for level, shift in enumerate(SHIFTS["5-level"]):
            table = PML5 if level == 0 else TABLES + 0x1000 * (level - 1)
            below = TARGET if shift == 12 else TABLES + 0x1000 * level
            bench.put(table + 8 * (linear >> shift & 0x1FF), below | 7)
        state.cr3, state.cr4, state.gpr[3] = PML5, state.cr4 | 1 << 12, linear
        state.gpr[4] = (linear & ~0xFFF) + 0x1000 & (1 << 64) - 1
        state.gpr[0] = 0x5A
        bench.run(state, b"\x88\x03\x0f\x0b")
        assert bench.vector() == 6
        assert bench.memory.read(TARGET | linear & 0xFFF, 1) == b"\x5a"
        assert bench.words(TARGET + 0x1000 - 40, 1) == [CODE + 2]
        assert bench.cpu.translate(linear) == TARGET | linear & 0xFFF
        # One bit more is not canonical.
        state.gpr[3], state.gpr[4] = 1 << 56, 0x40000
        bench.run(state, b"\x88\x03")
        assert bench.vector() == 13
