"""Where each field lies in the engine's context buffer, found by experiment.

The buffer is a private structure of the library, so no offset is written down here. A throw-away
engine gets marker values through the public API, and the markers are looked for in its buffer;
flags are found by changing one bit and comparing; the fields of exceptions, which no API reaches,
by their place beside DR0, and that is proved by three real page faults. Whatever does not come out
exactly as expected raises `CalibrationError`: a wrong offset would corrupt guests silently.

The offsets hold for every engine of this process, so the experiment runs once.

Source of the order of neighbouring fields: struct CPUX86State of QEMU 5.0, on which Unicorn 2
is built.
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass

from vmm.cpu.library import HOOK_INTERRUPT, REG, Engine, InterruptCallback, memory_of

SEGMENT_SIZE = 24
"""struct SegmentCache: selector (32 bits), padding, base (64), limit (32), flags (32)."""

# Bits of the engine's "hidden flags", which decide how instructions are translated.
H_CPL = 3
H_SHADOW = 1 << 3
H_CS32 = 1 << 4
H_SS32 = 1 << 5
H_ADDSEG = 1 << 6
H_PE = 1 << 7
H_FPU_SHIFT = 8  # CR0.MP, EM and TS (bits 1-3) lie at 9-11
H_FPU = 7 << 9
H_LMA = 1 << 14
H_CS64 = 1 << 15
H_GUEST = 1 << 21
H_OSFXSR = 1 << 22
H_SMAP = 1 << 23
H_IO_BREAKPOINT = 1 << 24


class CalibrationError(RuntimeError):
    """This build of the library is not laid out as we expect; nothing would be safe."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the CPU engine's context cannot be used: {reason}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Indices into the context buffer.

    Fields named ``*_w`` count 32-bit words, ``*_b`` bytes, all others 64-bit words. `segments`
    is ES, in the order ES CS SS DS FS GS, each three long words apart; then LDTR, TR, GDTR, IDTR.
    """

    gpr: int
    rip: int
    eflags_w: int
    hflags_w: int
    segments: int
    ldtr: int
    tr: int
    gdtr: int
    idtr: int
    cr: int
    a20_w: int
    efer: int
    star: int
    lstar: int
    fmask: int
    error_code_w: int
    is_software_w: int
    dr: int
    breakpoints_b: int
    old_exception_w: int


def _find(data: bytes, value: int, name: str) -> int:
    pattern = struct.pack("<Q", value)
    at = data.find(pattern)
    if at < 0 or data.find(pattern, at + 1) >= 0 or at % 8:
        raise CalibrationError(f"{name} was not found exactly once")
    return at


def _differences(before: bytes, after: bytes) -> list[int]:
    return [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


class _Probe:
    """A throw-away engine with 64 KiB of RAM."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.memory = mmap.mmap(-1, 0x10000)
        self.engine.map_ram(0, 0x10000, memory_of(self.memory))
        self.clean = self.saved()

    def saved(self) -> bytes:
        self.engine.save()
        return bytes(self.engine.bytes)

    def reset(self) -> None:
        self.engine.bytes[:] = self.clean
        self.engine.restore()

    def changed_by(self, register: int, value: int) -> list[int]:
        before = self.saved()
        self.engine.write(register, value)
        return _differences(before, self.saved())


def _mark(number: int) -> int:
    return 0x5AA5_0000_0013_579B + (number << 32) + number


def _markers(probe: _Probe) -> dict[str, int]:
    """Byte offsets of everything that the API can write."""
    engine = probe.engine
    plain = {
        **{f"gpr{i}": r for i, r in enumerate(GPR_REGISTERS)},
        "rip": REG.UC_X86_REG_RIP,
        "cr2": REG.UC_X86_REG_CR2,
        "dr0": REG.UC_X86_REG_DR0,
        "fs": REG.UC_X86_REG_FS_BASE,
        "gs": REG.UC_X86_REG_GS_BASE,
    }
    tables = {
        "gdtr": REG.UC_X86_REG_GDTR,
        "idtr": REG.UC_X86_REG_IDTR,
        "ldtr": REG.UC_X86_REG_LDTR,
        "tr": REG.UC_X86_REG_TR,
    }
    msrs = {"star": 0xC000_0081, "lstar": 0xC000_0082, "fmask": 0xC000_0084}
    names = [*plain, *tables, *msrs]
    for name, register in plain.items():
        engine.write(register, _mark(names.index(name) + 1))
    for name, register in tables.items():
        table = struct.pack("<HxxxxxxQIIxxxx", 8, _mark(names.index(name) + 1), 0x654321, 0x8200)
        engine.write_wide(register, table)
    for name, number in msrs.items():
        engine.write_msr(number, _mark(names.index(name) + 1))
    data = probe.saved()
    probe.reset()
    return {name: _find(data, _mark(names.index(name) + 1), name) for name in names}


GPR_REGISTERS = tuple(
    getattr(REG, f"UC_X86_REG_{name}")
    for name in (
        *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
        *(f"R{i}" for i in range(8, 16)),
    )
)


def _expect(truth: bool, reason: str) -> None:
    if not truth:
        raise CalibrationError(reason)


def _flags(probe: _Probe) -> tuple[int, int, int]:
    """Byte offsets of eflags, hflags and EFER."""
    engine = probe.engine
    engine.write(REG.UC_X86_REG_EFLAGS, 2)
    at = probe.changed_by(REG.UC_X86_REG_EFLAGS, 0x202)
    _expect(len(at) == 1 and at[0] % 4 == 1, "EFLAGS.IF is not one byte")
    eflags = at[0] - 1
    at = probe.changed_by(REG.UC_X86_REG_CR0, engine.read(REG.UC_X86_REG_CR0) ^ 8)
    near = [x for x in at if eflags < x < eflags + 64]
    _expect(len(near) == 1 and near[0] % 4 == 1, "CR0.TS is not mirrored in one byte")
    hflags = near[0] - 1
    before = probe.saved()
    efer = engine.read_msr(0xC000_0080)
    engine.write_msr(0xC000_0080, efer ^ 1)
    at = _differences(before, probe.saved())
    _expect(len(at) == 1 and at[0] % 8 == 0, "EFER.SCE is not one byte")
    probe.reset()
    engine.save()
    want = H_LMA | H_CS64 | H_CS32 | H_SS32 | H_PE
    _expect(engine.words[hflags // 4] & (want | H_CPL) == want, "the mode flags differ")
    return eflags, hflags, at[0]


def _prove_faults(probe: _Probe, layout: Layout) -> None:
    """Three page faults must show their error codes, and old_exception must follow them."""
    engine, memory = probe.engine, probe.memory
    for table, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
        struct.pack_into("<Q", memory, table, entry)
    for page in range(16):
        struct.pack_into("<Q", memory, 0x4000 + 8 * page, page << 12 | (5 if page == 10 else 7))
    memory[0x8000:0x8003] = b"\x48\x89\x03"  # mov [rbx], rax
    memory[0x8010:0x8013] = b"\x48\x8b\x03"  # mov rax, [rbx]
    seen: list[tuple[int, int, int, int, int]] = []

    def fault(_engine: int, vector: int, _data: int) -> None:
        engine.save()
        words = engine.words
        seen.append(
            (
                vector,
                words[layout.error_code_w],
                words[layout.is_software_w],
                words[layout.old_exception_w],
                engine.longs[layout.cr + 2],
            )
        )
        engine.stop()

    engine.hook(HOOK_INTERRUPT, InterruptCallback(fault))
    engine.write(REG.UC_X86_REG_CR3, 0x1000)
    engine.write(REG.UC_X86_REG_CR4, 0x620)
    engine.write(REG.UC_X86_REG_CR0, 0x8001_0001)
    wanted = []
    for code, rbx, error in ((0x8000, 0x200000, 2), (0x8010, 0x200008, 0), (0x8000, 0xA010, 3)):
        engine.write(REG.UC_X86_REG_RBX, rbx)
        engine.save()
        engine.words[layout.old_exception_w] = 0xFFFF_FFFF
        engine.restore()
        engine.start(code)
        wanted.append((14, error, 0, 14, rbx))
    _expect(seen == wanted, f"page faults are reported as {seen}")


@functools.cache
def calibrate() -> Layout:
    """The layout of this process's library.

    Raises:
        CalibrationError: it is not what we know how to use.
    """
    probe = _Probe()
    try:
        at = _markers(probe)
        eflags, hflags, efer = _flags(probe)
        gpr, segments = at["gpr0"], at["fs"] - 8 - 4 * SEGMENT_SIZE
        _expect(all(at[f"gpr{i}"] == gpr + 8 * i for i in range(16)), "registers lie apart")
        order = [at[name] - 8 for name in ("fs", "gs", "ldtr", "tr", "gdtr", "idtr")]
        _expect(order == [segments + SEGMENT_SIZE * i for i in range(4, 10)], "segments lie apart")
        cr, dr = at["cr2"] - 16, at["dr0"]
        layout = Layout(
            gpr=gpr // 8,
            rip=at["rip"] // 8,
            eflags_w=eflags // 4,
            hflags_w=hflags // 4,
            segments=segments // 8,
            ldtr=segments // 8 + 18,
            tr=segments // 8 + 21,
            gdtr=segments // 8 + 24,
            idtr=segments // 8 + 27,
            cr=cr // 8,
            a20_w=(cr + 72) // 4,
            efer=efer // 8,
            star=at["star"] // 8,
            lstar=at["lstar"] // 8,
            fmask=at["fmask"] // 8,
            error_code_w=(dr - 16) // 4,
            is_software_w=(dr - 12) // 4,
            dr=dr // 8,
            breakpoints_b=dr + 64,
            old_exception_w=(dr + 96) // 4,
        )
        engine = probe.engine
        engine.save()
        _expect(engine.words[layout.a20_w] == 0xFFFF_FFFF, "the A20 mask is not where it was")
        _expect(engine.longs[layout.dr + 7] == 0x400, "DR7 is not where it was")
        _prove_faults(probe, layout)
    finally:
        probe.engine.close()
    return layout
