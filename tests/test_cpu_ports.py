"""Who may use a port: IOPL and the I/O permission bitmap; and the instructions that heed IOPL."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from cpu_bench import (
    CODE,
    HANDLERS,
    KERNEL_STACK,
    PORT,
    TSS,
    USER_STACK,
    Bench,
)

from vmm.cpu.engine import StopReason
from vmm.cpu.live import hidden_flags
from vmm.cpu.state import CpuState, Segment

MODES = ("long", "compatibility", "protected", "paged 32-bit", "virtual-8086")
DATA = 0x28000
BITMAP = 0x68

# Bytes, size in bits, whether it reads; DX is PORT, and PORT is the immediate. Each means the
# same in 16-, 32- and 64-bit code but for the prefixed ones.
ACCESSES = {
    "in al, imm": (b"\xe4\x80", 8, True),
    "in al, dx": (b"\xec", 8, True),
    "out imm, al": (b"\xe6\x80", 8, False),
    "out dx, al": (b"\xee", 8, False),
    "outsb": (b"\x6e", 8, False),
    "rep outsb": (b"\xf3\x6e", 8, False),
}
ENGINES: dict[str, dict[str, Any]] = {
    "native": {},
    "uncounted": {"counts": False},
    "portable": {"native": False},
}
AFTER = b"\x90\x90\x90\x50\x0f\x0b"  # a push, whose store must not be seen; and an end


def user(bench: Bench, mode: str, iopl: int = 0, limit: int = 0xFFFF) -> CpuState:
    if mode in ("long", "compatibility"):
        state = bench.long(user=True, compat=mode == "compatibility")
    else:
        state = bench.protected(user=True)
    if mode == "paged 32-bit":
        bench.memory.write(0x3000, struct.pack("<4I", *(i << 22 | 0x87 for i in range(4))))
        state.cr0, state.cr3, state.cr4 = 0x8001_0011, 0x3000, 0x10
    state.rflags = iopl << 12 | 0x202
    if mode == "virtual-8086":
        state.rflags |= 0x20000
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            selector = CODE >> 4 if name == "cs" else 0x2000
            setattr(state, name, Segment(selector, selector << 4, 0xFFFF, 0xF300))
        state.rip, state.gpr[4] = 0, 0xF000
    state.tr.limit = limit
    bench.memory.write(TSS + 0x66, struct.pack("<H", BITMAP))
    bench.memory.write(TSS + BITMAP, b"\xff" * 0x60)
    state.gpr[0], state.gpr[1], state.gpr[2] = 0x1234_5678, 2, PORT
    state.gpr[6] = state.gpr[7] = 0x8000 if mode == "virtual-8086" else DATA
    return state


def allow(bench: Bench, *ports: int) -> None:
    for port in ports:
        at = TSS + BITMAP + port // 8
        bench.memory.write(at, bytes((bench.memory.read(at, 1)[0] & ~(1 << port % 8),)))


def frame(bench: Bench, mode: str) -> list[int]:
    size = 8 if mode in ("long", "compatibility") else 4
    return bench.words(bench.cpu.get_state().gpr[4], 4, size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACCESSES)
def test_a_forbidden_access_faults_and_nothing_happens(name: str, mode: str, engine: str) -> None:
    code, _, _ = ACCESSES[name]
    with Bench(**ENGINES[engine]) as bench:
        state = user(bench, mode)
        bench.memory.write(USER_STACK - 64, bytes(64))
        # Register work behind the access is part of its block, and must be undone as well.
        bench.start(state, code + b"\xff\xc1" + AFTER, state.cs.base + state.rip)
        assert bench.cpu.run().reason is StopReason.HALT
        assert bench.vector() == 13
        assert not bench.ports.reads
        assert not bench.ports.writes
        after = bench.cpu.get_state()
        assert after.gpr[:4] + after.gpr[5:] == state.gpr[:4] + state.gpr[5:]
        assert (after.cr0, after.cr3) == (state.cr0, state.cr3)
        error, rip, selector, flags = frame(bench, mode)
        assert (error, rip, selector) == (0, state.rip, state.cs.selector)
        assert flags & 0x23200 == state.rflags & 0x23200
        assert bench.memory.read(USER_STACK - 64, 64) == bytes(64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACCESSES)
def test_the_bitmap_permits(name: str, mode: str) -> None:
    code, _, reads = ACCESSES[name]
    with Bench() as bench:
        state = user(bench, mode)
        allow(bench, PORT)
        bench.run(state, code + b"\x0f\x0b")
        assert bench.vector() == 6
        assert len(bench.ports.reads if reads else bench.ports.writes) == (
            2 if name.startswith("rep") else 1
        )


@pytest.mark.parametrize("mode", MODES)
def test_iopl_permits_except_in_virtual_8086_mode(mode: str) -> None:
    with Bench() as bench:
        bench.run(user(bench, mode, iopl=3), b"\xec\x0f\x0b")
        virtual = mode == "virtual-8086"  # there the bitmap alone decides
        assert bench.vector() == (13 if virtual else 6)
        assert bool(bench.ports.reads) is not virtual


@pytest.mark.parametrize(("size", "code"), [(1, b"\xec"), (2, b"\x66\xed"), (4, b"\xed")])
@pytest.mark.parametrize("missing", range(-1, 4))
def test_each_port_of_an_access_needs_its_bit(size: int, code: bytes, missing: int) -> None:
    """Also where the bits lie in two bytes of the bitmap."""
    port = PORT + 6
    with Bench() as bench:
        state = user(bench, "long")
        allow(bench, *(port + i for i in range(4) if i != missing))
        state.gpr[2] = port
        bench.run(state, code + b"\x0f\x0b")
        assert bench.vector() == (13 if 0 <= missing < size else 6)


@pytest.mark.parametrize(
    ("limit", "vector"),
    [
        (BITMAP + PORT // 8 + 1, 6),
        (BITMAP + PORT // 8, 13),  # the second byte is always read
        (0x67, 13),
        (0x65, 13),
    ],
)
def test_the_bitmap_ends_with_the_tss(limit: int, vector: int) -> None:
    with Bench() as bench:
        state = user(bench, "long", limit=limit)
        allow(bench, PORT)
        bench.run(state, b"\xec\x0f\x0b")
        assert bench.vector() == vector


def test_a_16_bit_tss_has_no_bitmap() -> None:
    with Bench() as bench:
        state = user(bench, "protected")
        state.tr.attributes = 0x8300
        bench.memory.write(TSS + 2, struct.pack("<HH", 0xF000, 0x10))
        allow(bench, PORT)
        bench.run(state, b"\xec\x0f\x0b")
        assert bench.vector() == 13


def test_a_bitmap_that_is_not_mapped_is_a_page_fault() -> None:
    with Bench() as bench:
        state = user(bench, "long")
        bench.memory.write(TSS + 0x66, struct.pack("<H", 0xF000))
        state.tr.base = 0x7F_F000
        bench.memory.write(0x7F_F000, bench.memory.read(TSS, 0x68))
        bench.put(0x3000 + 8 * 4, 0)
        bench.run(state, b"\xec\x0f\x0b")
        assert bench.vector() == 14
        after = bench.cpu.get_state()
        assert after.cr2 == 0x7F_F000 + 0xF000 + PORT // 8
        assert bench.words(after.gpr[4], 2) == [0, CODE]


def test_a_forbidden_access_is_one_step() -> None:
    with Bench() as bench:
        bench.start(user(bench, "long"), b"\x90\xec\x50")
        assert bench.cpu.step(2).reason is StopReason.BUDGET
        assert bench.cpu.get_state().rip == HANDLERS + 13


@pytest.mark.parametrize("native", [True, False])
def test_endless_forbidden_accesses_return_within_the_budget(native: bool) -> None:
    """The handler returns to the same IN; kicks, budgets and stops still end the run."""
    with Bench(native=native) as bench:
        # add rsp, 8; iretq
        bench.memory.write(HANDLERS + 13, b"\x48\x83\xc4\x08\x48\xcf")
        bench.start(user(bench, "long"), b"\xec\x0f\x05\xeb\xfe")
        for budget in (1, 50, 500, 5000):
            before = bench.cpu.executed
            assert bench.cpu.run(budget).reason is StopReason.BUDGET
            assert budget <= bench.cpu.executed - before < budget + 4096
        assert not bench.ports.reads


def test_forbidden_outs_among_permitted_ones() -> None:
    """Of many accesses in one block, those before the fault happen, once."""
    with Bench() as bench:
        state = user(bench, "long")
        allow(bench, PORT, PORT + 1)
        code = b"\xe6\x80\xe6\x81\xe6\x82\xe6\x80"
        bench.run(state, code)
        assert bench.vector() == 13
        assert [offset for offset, _, _ in bench.ports.writes] == [0, 1]
        assert bench.words(KERNEL_STACK - 40, 1) == [CODE + 4]


@pytest.mark.xfail(reason="the library stores a zero before INS reads the port", strict=True)
def test_a_forbidden_ins_leaves_memory_alone() -> None:
    with Bench() as bench:
        bench.memory.write(DATA, b"\x77")
        bench.run(user(bench, "long"), b"\x6c\x0f\x0b")
        assert bench.vector() == 13
        assert bench.memory.read(DATA, 1) == b"\x77"


def test_a_forbidden_ins_faults_at_itself() -> None:
    with Bench() as bench:
        state = user(bench, "long")
        bench.run(state, b"\xf3\x6c\x0f\x0b")
        assert bench.vector() == 13
        after = bench.cpu.get_state()
        assert (after.gpr[1], after.gpr[7]) == (2, DATA)
        assert not bench.ports.reads
        assert frame(bench, "long")[:2] == [0, CODE]


# IOPL beside the ports.

CLI, STI, PUSHF_POPF = b"\xfa", b"\xfb", b"\x9d"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [CLI, STI])
@pytest.mark.parametrize("iopl", range(4))
def test_cli_and_sti_need_iopl(code: bytes, iopl: int, mode: str) -> None:
    """SDM volume 2, "CLI" and "STI", without VME."""
    with Bench() as bench:
        state = user(bench, mode, iopl)
        bench.run(state, code + b"\x90\x0f\x0b")
        if iopl < 3:
            assert bench.vector() == 13
            assert frame(bench, mode)[:2] == [0, state.rip]
        else:
            assert bench.vector() == 6
            flags = bench.words(bench.cpu.get_state().gpr[4] + (16 if "o" in mode[:2] else 8), 1, 4)
            assert bool(flags[0] & 0x200) is (code == STI)


@pytest.mark.parametrize("iopl", [0, 3])
def test_popf_changes_if_by_iopl_and_never_iopl(iopl: int) -> None:
    with Bench() as bench:
        state = user(bench, "long", iopl)
        # push 0x3002; popfq; pushfq; pop rbx; ud2
        bench.run(state, b"\x68\x02\x30\0\0\x9d\x9c\x5b\x0f\x0b")
        assert bench.vector() == 6
        wanted = iopl << 12 | (0 if iopl == 3 else 0x200) | 2
        assert bench.cpu.get_state().gpr[3] & 0x3202 == wanted


@pytest.mark.parametrize("code", [b"\xcd\x21", b"\x9c", b"\x9d", b"\xcf"])
@pytest.mark.parametrize("iopl", [2, 3])
def test_virtual_8086_mode_is_sensitive_to_iopl(code: bytes, iopl: int) -> None:
    """INT n, PUSHF, POPF and IRET fault with #GP(0) where IOPL is below 3 (SDM vol. 3, 22.2.7)."""
    with Bench() as bench:
        state = user(bench, "virtual-8086", iopl)
        bench.gate32(0x21, dpl=3)
        # Behind IRET and POPF: IP 2, this CS, flags with IF.
        bench.memory.write(0x20000 + 0xF000, struct.pack("<3H", 2, CODE >> 4, 0x202))
        if code == b"\x9d":
            bench.memory.write(0x20000 + 0xF000, struct.pack("<H", 0x202))
        bench.run(state, code.ljust(2, b"\x90") + b"\x0f\x0b")
        assert bench.vector() == (13 if iopl < 3 else 0x21 if code == b"\xcd\x21" else 6)
        if iopl < 3:
            assert frame(bench, "virtual-8086")[:2] == [0, 0]


def test_the_hidden_flags_are_seen_without_a_copy() -> None:
    """Where the library's structure is known; the tests above do without it, too."""
    with Bench() as bench:
        context = bench.cpu._context
        direct = hidden_flags(context)
        assert isinstance(direct, memoryview), "this build hides it: port accesses are slower"
        for state in (bench.real(), bench.protected(), bench.long(), bench.long(user=True)):
            bench.cpu.set_state(state)
            context.save()
            assert direct[0] == context.hidden
            assert hidden_flags(context, direct=False)[0] == context.hidden
