"""Events and SYSCALL in machine code: really taken, the same as in Python, and safe."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpu_bench import (
    CODE,
    GDT,
    HANDLERS,
    IDT,
    IST_STACK,
    K_CODE64,
    KERNEL_STACK,
    MMIO,
    TSS,
    USER_STACK,
    WINDOW,
    WINDOW_TABLE,
    Bench,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.cpu import native
from vmm.cpu.engine import EXCEPTION_COST
from vmm.cpu.state import CpuState, DescriptorTable

SOURCE = Path(native.__file__).parent
NASM, MAKE = shutil.which("nasm"), shutil.which("make")
CODE_PAGE = native.load()
needs_native = pytest.mark.skipif(
    CODE_PAGE is None, reason="NOT CHECKED: this host takes no machine code"
)

SIZE = 4 << 20
FREE = 0x30_0000
"""Where nothing else lies."""
SYSCALL_ENTRY = 0x24000
WAYS = ("native", "quick", "complete")

PROGRAMS = {
    "int3": "cc",
    "int 0x80": "cd80",
    "int3 in the shadow of mov ss": "8cd08ed0cc",
    "divide": "31c9f7f1",  # xor ecx, ecx; div ecx
    "page fault": "88042500000007",  # mov [0x7000000], al
    "not canonical": "48b800000000008000008800",  # mov rax, 0x800000000000; mov [rax], al
    "bad selector": "b8330000008ed0",  # mov eax, 0x33; mov ss, eax
    "syscall": "0f05",
    "prefixed syscall": "660f05",
    "interrupt": "90",
}


@dataclasses.dataclass
class Scene:
    """A bench with a state that is not loaded yet."""

    bench: Bench
    state: CpuState

    def entry(self, address: int) -> int:
        return self.bench.words(address, 1)[0]


def scene(bench: Bench, user: bool, compat: bool = False) -> Scene:
    """Long mode with all pages accessed and dirty, as a running system has them."""
    state = bench.long(user, compat)
    for table in (0x1000, 0x2000, 0x3000, WINDOW_TABLE):
        entries = bench.words(table, 512)
        bench.put(table, *(entry | 0x60 if entry & 1 else 0 for entry in entries))
    for vector in (3, 0x80):
        bench.gate64(vector, dpl=3)
    state.msrs = {0xC000_0081: 0x0010_0008 << 32, 0xC000_0082: SYSCALL_ENTRY, 0xC000_0084: 0x4700}
    bench.memory.write(SYSCALL_ENTRY, b"\xf4")
    state.rflags = 0x202
    state.gpr[4] -= 0x100
    return Scene(bench, state)


def run(way: str, name: str, user: bool, change: Callable[[Scene], Any]) -> tuple[Any, int]:
    """(all that can be seen afterwards, events and calls done in machine code)."""
    with Bench(SIZE, native=True) as bench:
        what = scene(bench, user)
        bench.memory.write(CODE, bytes.fromhex(PROGRAMS[name]) + b"\xf4")
        change(what)
        cpu = bench.cpu
        events = cpu.traps._events
        assert events is not None
        if way != "native":
            events._block.ram_size = 0  # no address is in RAM: always to Python
        if way == "complete":
            cpu.traps._delivery._quick.deliver = lambda *_: False  # type: ignore[method-assign]
            cpu.traps.fast._quick.find = lambda *_: -1  # type: ignore[method-assign]
        cpu.set_state(what.state)
        injected = cpu.inject(0x21) if name == "interrupt" else None
        stop = cpu.run(3000)
        memory = hashlib.sha256(bench.memory.read(0, SIZE)).hexdigest()
        seen = (
            stop,
            injected,
            cpu.get_state(),
            memory,
            cpu.executed,
            bench.mmio.reads,
            bench.mmio.writes,
        )
        return seen, events.events + events.calls


def same(name: str, user: bool, change: Callable[[Scene], Any]) -> int:
    """All ways must agree; how often machine code did it."""
    results = [run(way, name, user, change) for way in WAYS]
    assert results[0][0] == results[1][0]
    assert results[1][0] == results[2][0]
    return results[0][1]


def nothing(_: Scene) -> None:
    pass


@pytest.mark.skipif(
    NASM is None or MAKE is None,
    reason="NOT CHECKED: that events.bin matches its source; nasm and make are needed",
)
def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    assert MAKE is not None
    copy, out = tmp_path / "elsewhere", tmp_path / "out"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("*.bin", "*.py*"))
    out.mkdir()
    subprocess.run([MAKE, "-s", "-C", copy, f"OUT={out}"], check=True, timeout=100)
    assert (out / "events.bin").read_bytes() == (SOURCE / "events.bin").read_bytes()


@needs_native
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_common_case_is_done_in_machine_code(name: str, user: bool) -> None:
    assert same(name, user, nothing) == (name != "prefixed syscall")


@needs_native
def test_events_cost_the_same_virtual_time() -> None:
    """Also when that ends the run."""
    executed = []
    for native_ in (True, False):
        with Bench(SIZE, native=native_) as bench:
            what = scene(bench, user=False)
            bench.memory.write(HANDLERS + 3, b"\x48\xcf")  # iretq
            bench.start(what.state, b"\xcc\xeb\xfd")  # int3; jmp to it
            stops = [bench.cpu.run(100 + 7 * i) for i in range(50)]
            executed.append((bench.cpu.executed, stops, bench.cpu.get_state()))
    assert executed[0] == executed[1]
    assert executed[0][0] > 50 * EXCEPTION_COST


@needs_native
def test_a_second_page_fault_is_no_double_fault() -> None:
    """The engine would make it one, from what it remembers of the first."""

    def skip_it(s: Scene) -> None:
        fault = bytes.fromhex(PROGRAMS["page fault"])
        s.bench.memory.write(CODE, fault * 3 + b"\xf4")
        # add rsp, 8; add qword [rsp], 7; iretq
        s.bench.memory.write(HANDLERS + 14, bytes.fromhex("4883c4084883042407") + b"\x48\xcf")

    assert same("page fault", False, skip_it) == 3
    assert run("native", "page fault", False, skip_it)[0][2].rip == CODE + 22


END = SIZE


def _put(address: int, *longs: int) -> Callable[[Scene], None]:
    return lambda s: s.bench.put(address, *longs)


def _idt(base: int, limit: int = 0xFFF) -> Callable[[Scene], None]:
    return lambda s: setattr(s.state, "idtr", DescriptorTable(base, limit))


def _gdt(base: int, limit: int = 0x5F) -> Callable[[Scene], None]:
    return lambda s: setattr(s.state, "gdtr", DescriptorTable(base, limit))


def _tr(**fields: int) -> Callable[[Scene], None]:
    return lambda s: setattr(s.state, "tr", dataclasses.replace(s.state.tr, **fields))


def _rsp(value: int) -> Callable[[Scene], None]:
    def change(s: Scene) -> None:
        s.state.gpr[4] = value

    return change


def _window_tables(moved: int, at: int) -> Callable[[Scene], None]:
    """The stack's page walk goes through a table at `at`, which need not be RAM."""

    def change(s: Scene) -> None:
        s.state.gpr[4] = WINDOW + 0x1000 * moved + 0x800
        s.bench.put(WINDOW_TABLE + 8 * moved, at | 0x67)

    return change


HOSTILE: dict[str, tuple[bool, Callable[[Scene], None]]] = {
    "IDT outside RAM": (False, _idt(0x80_0000)),
    "IDT in device memory": (False, _idt(MMIO)),
    "IDT not canonical": (False, _idt(1 << 47)),
    "IDT at the end of the address space": (False, _idt((1 << 64) - 16)),
    "IDT not aligned": (False, lambda s: (_copy(s, IDT, FREE + 4, 0x1000), _idt(FREE + 4)(s))),
    "gate across two pages": (
        False,
        lambda s: (_copy(s, IDT, FREE + 0xFC8, 0x1000), _idt(FREE + 0xFC8)(s)),
    ),
    "gate at the end of RAM": (
        False,
        lambda s: (_copy(s, IDT, END - 56, 56), _idt(END - 56)(s)),
    ),
    "IDT limit": (False, _idt(IDT, 3 * 16 + 14)),
    "gate not present": (False, _put(IDT + 3 * 16, 0x0E << 40 | K_CODE64 << 16)),
    "call gate": (False, _put(IDT + 3 * 16, 0xEC << 40 | K_CODE64 << 16 | HANDLERS)),
    "target not canonical": (False, _put(IDT + 3 * 16 + 8, 0x8000)),
    "null selector": (False, _put(IDT + 3 * 16, 0xEE00 << 32 | 3)),
    "selector in the LDT": (False, _put(IDT + 3 * 16, 0xEE00 << 32 | 0x0C << 16)),
    "data selector": (False, _put(IDT + 3 * 16, 0xEE00 << 32 | 0x10 << 16)),
    "GDT limit": (False, _gdt(GDT, 14)),
    "GDT outside RAM": (False, _gdt(0x80_0000)),
    "GDT not canonical": (False, _gdt(1 << 60)),
    "code of ring 3": (False, _put(GDT + 8, 0x00AF_FB00_0000_FFFF)),
    "conforming code": (False, _put(GDT + 8, 0x00AF_9F00_0000_FFFF)),
    "32-bit code": (False, _put(GDT + 8, 0x00CF_9B00_0000_FFFF)),
    "code not present": (False, _put(GDT + 8, 0x00AF_1B00_0000_FFFF)),
    "gate for ring 0 only": (True, lambda s: s.bench.gate64(3)),
    "TSS limit": (True, _tr(limit=10)),
    "TSS outside RAM": (True, _tr(base=0x80_0000)),
    "TSS not canonical": (True, _tr(base=1 << 63)),
    "TSS across two pages": (True, lambda s: (_copy(s, TSS, FREE - 8, 104), _tr(base=FREE - 8)(s))),
    "TSS at the end of RAM": (True, _tr(base=END - 8)),
    "stack of the TSS outside RAM": (True, _put(TSS + 4, 0x80_0000)),
    "stack of the TSS not canonical": (True, _put(TSS + 4, 1 << 47)),
    "IST beyond the TSS": (
        False,
        lambda s: (s.bench.gate64(3, dpl=3, ist=7), _tr(limit=0x50)(s)),
    ),
    "stack across two pages": (False, _rsp(KERNEL_STACK + 16)),
    "stack outside RAM": (False, _rsp(0x80_0000)),
    "stack at the end of RAM": (False, _rsp(END + 16)),
    "stack in device memory": (False, _rsp(MMIO + 0x800)),
    "stack not canonical": (False, _rsp((1 << 47) + 0x100)),
    "stack at 0": (False, _rsp(0)),
    "stack page read-only": (False, _window_tables(5, FREE | 0)),
    "stack page outside RAM": (False, _window_tables(5, 0x80_0000)),
    "stack page above the address space": (False, _window_tables(5, 1 << 45)),
}
HOSTILE["stack page read-only"] = (
    False,
    lambda s: (_rsp(WINDOW + 0x800)(s), s.bench.put(WINDOW_TABLE, WINDOW | 0x65)),
)
HOSTILE["stack page clean"] = (
    False,
    lambda s: (_rsp(WINDOW + 0x800)(s), s.bench.put(WINDOW_TABLE, WINDOW | 0x27)),
)
HOSTILE["table never accessed"] = (
    False,
    lambda s: (_rsp(WINDOW + 0x800)(s), s.bench.put(0x3008, WINDOW_TABLE | 0x07)),
)
for _place in (0x80_0000, MMIO & ~0xFFF, 1 << 39, 1 << 51):
    HOSTILE[f"page table at {_place:#x}"] = (
        False,
        lambda s, place=_place: (_rsp(WINDOW + 0x800)(s), s.bench.put(0x3008, place | 0x67)),
    )
    HOSTILE[f"large page at {_place:#x}"] = (
        False,
        lambda s, place=_place: (
            _rsp(WINDOW + 0x800)(s),
            s.bench.put(0x3008, place & ~0x1F_FFFF | 0xE7),
        ),
    )
HOSTILE["large page with reserved bits"] = (
    False,
    lambda s: (_rsp(WINDOW + 0x800)(s), s.bench.put(0x3008, 0x20_0000 | 0x1_E000 | 0xE7)),
)
HOSTILE["page directory pointer with a large page"] = (
    False,
    lambda s: (_rsp((1 << 30) + 0x800)(s), s.bench.put(0x2008, 0xE7)),
)


def _copy(s: Scene, source: int, target: int, size: int) -> None:
    s.bench.memory.write(target, s.bench.memory.read(source, size))


@needs_native
@pytest.mark.parametrize("name", HOSTILE)
def test_odd_tables_go_to_python(name: str) -> None:
    """Machine code does not do the first event; what it leads to is the same either way."""
    user, change = HOSTILE[name]
    taken = same("int3", user, change)
    # What the odd thing raises may be a common case again: then at most that one was done.
    seen, _ = run("native", "int3", user, change)
    frames = seen[2].rip - 1 - HANDLERS
    assert taken == 0 or frames != 3, "done in machine code"


@needs_native
@pytest.mark.parametrize("rip", [SIZE - 2, SIZE - 1, WINDOW + 0xFFF])
def test_syscall_at_the_end_of_a_page(rip: int) -> None:
    def change(s: Scene) -> None:
        s.state.rip = rip
        s.bench.memory.write(rip, b"\x0f\x05"[: SIZE - rip])

    assert same("syscall", True, change) == (rip == SIZE - 2)


def _flip(address: int, bits: int) -> Callable[[Scene], None]:
    def change(s: Scene) -> None:
        s.bench.put(address, s.entry(address) ^ bits)

    return change


_bit = st.builds(lambda n: 1 << n, st.integers(0, 63))
_bits = st.one_of(_bit, st.builds(lambda a, b: a | b, _bit, _bit))
_addresses = st.one_of(
    st.sampled_from(
        (
            *(0, 8, CODE, IDT, GDT, TSS, KERNEL_STACK, USER_STACK, IST_STACK, WINDOW, FREE),
            *(END, END - 0x1000, MMIO, 1 << 30, 1 << 47, (1 << 64) - 0x1000, 0xFFFF_8000 << 32),
        )
    ).flatmap(lambda base: st.integers(-64, 64).map(lambda n: base + n & (1 << 64) - 1)),
    st.integers(0, (1 << 64) - 1),
)
_vectors = st.sampled_from((0, 3, 8, 10, 11, 12, 13, 14, 0x21, 0x80))
_tables = st.sampled_from(
    (0x1000, 0x2000, 0x3000, 0x3008, WINDOW_TABLE, WINDOW_TABLE + 8, WINDOW_TABLE + 0xFF8)
)
_changes = st.one_of(
    st.builds(
        lambda v, half, b: _flip(IDT + 16 * v + half, b), _vectors, st.sampled_from((0, 8)), _bits
    ),
    st.builds(_flip, st.integers(1, 11).map(lambda n: GDT + 8 * n), _bits),
    st.builds(_flip, st.integers(0, 12).map(lambda n: TSS + 4 + 8 * n), _bits),
    st.builds(_flip, _tables, _bits),
    st.builds(
        _put, _tables, st.builds(lambda a, low: a & ~0xFFF | low, _addresses, st.integers(0, 0xFFF))
    ),
    st.builds(_put, st.sampled_from((TSS + 4, TSS + 36, TSS + 44)), _addresses),
    st.builds(_rsp, _addresses),
    st.builds(_idt, _addresses, st.integers(0, 0xFFFF)),
    st.builds(_gdt, _addresses, st.integers(0, 0xFFFF)),
    st.builds(lambda n: _idt(IDT, n), st.integers(0, 0xFFF)),
    st.builds(lambda n: _gdt(GDT, n), st.integers(0, 0x60)),
    st.builds(lambda a: _tr(base=a), _addresses),
    st.builds(lambda n: _tr(limit=n), st.integers(0, 0x70)),
    st.builds(
        lambda v, k, d, i: lambda s: s.bench.gate64(v, k, d, i),
        _vectors,
        st.integers(0, 15),
        st.integers(0, 3),
        st.integers(0, 7),
    ),
    st.builds(
        lambda f: lambda s: setattr(s.state, "rflags", f & 0x25_4ED5 | 2), st.integers(0, 1 << 22)
    ),
    st.builds(
        lambda m, v: lambda s: s.state.msrs.update({m: v}),
        st.sampled_from((0xC000_0081, 0xC000_0082, 0xC000_0084)),
        st.integers(0, (1 << 64) - 1),
    ),
    st.builds(
        lambda b: lambda s: setattr(s.state, "efer", s.state.efer ^ b), st.sampled_from((1, 0x800))
    ),
)


@needs_native
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.sampled_from(tuple(PROGRAMS)), st.booleans(), st.lists(_changes, min_size=1, max_size=4))
def test_whatever_the_tables_say_all_ways_agree(
    name: str, user: bool, changes: list[Callable[[Scene], None]]
) -> None:
    def change(s: Scene) -> None:
        for each in changes:
            each(s)

    same(name, user, change)


def test_without_machine_code() -> None:
    """A host that refuses executable memory gets the portable callbacks."""
    program = (
        "import ctypes, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from vmm.cpu import native\n"
        "native.ctypes = type('Refusing', (), {**vars(ctypes), 'CDLL': staticmethod(lambda _: "
        "type('Lib', (), {'mprotect': type('F', (), {'__call__': lambda *a: -1})()})())})\n"
        "assert native.load() is None\n"
        "from cpu_bench import Bench\n"
        "with Bench() as bench:\n"
        "    assert bench.cpu.traps._events is None\n"
        "    bench.run(bench.long(), b'\\xcc')\n"
        "    assert bench.vector() == 3\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    subprocess.run(command, check=True, timeout=60, cwd=SOURCE.parents[2])


@needs_native
def test_the_code_page_is_never_writable() -> None:
    assert CODE_PAGE is not None
    address = ctypes.c_void_p(CODE_PAGE.address).value or 0
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = ((line.split()[0].split("-"), line.split()[1]) for line in lines)
    rights = [r for (low, high), r in spans if int(low, 16) <= address < int(high, 16)]
    assert rights == ["r-xp"]
