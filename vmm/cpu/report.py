"""A crash report: what the vCPU was doing, as text for people.

capstone is imported only when a report is made, and a report without it just lacks disassembly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from vmm.cpu.context import CR0_PE, CR0_PG, D_BIG, D_LONG, EFER_LMA, F_VM
from vmm.cpu.engine import Cpu
from vmm.cpu.state import GPR_NAMES, CpuState

Symbols = Sequence[tuple[int, int, str]]
"""(address, size, name)."""

_INSTRUCTIONS = 6
_FLAG_NAMES = (
    *((0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF")),
    *((11, "OF"), (14, "NT"), (16, "RF"), (17, "VM"), (18, "AC"), (21, "ID")),
)


_NO_EXTENSIONS = {
    "jump",
    "call",
    "ret",
    "int",
    "iret",
    "privilege",
    "branch_relative",
    "mode64",
    "vm",
}
"""Of capstone's groups of instructions, those that are no extension of the architecture."""

LABEL_REACH = 4096
"""Bytes behind a label without a size that are still called by its name."""


def crash_report(cpu: Cpu, symbols: Symbols = ()) -> str:
    """Registers, the instructions at RIP and the top of the stack.

    Args:
        symbols: of the guest's image, in any order.
    """
    state = cpu.get_state()
    bits = code_bits(state)
    lines = []
    where = linear_rip(state)
    name = symbol_at(where, symbols)
    lines.append(f"{mode_name(state)}, at {where:#x}" + (f" <{name}>" if name else ""))
    lines += _registers(state, bits)
    code = cpu.read_linear(where, 15 * _INSTRUCTIONS)
    lines += _disassembly(code, where, bits, symbols) if code else ["code: not in RAM"]
    lines += _stack(cpu, state, bits)
    return "\n".join(lines) + "\n"


def unknown_instruction(cpu: Cpu) -> str:
    """A line that names the instruction at RIP, which was an invalid opcode to the CPU."""
    try:
        import capstone
    except ImportError:
        return ""
    state = cpu.get_state()
    where = linear_rip(state)
    decoder: Any = capstone.Cs(capstone.CS_ARCH_X86, _decoder_mode(code_bits(state)))  # type: ignore[no-untyped-call]
    decoder.detail = True
    for found in decoder.disasm(cpu.read_linear(where, 15), where, 1):
        text = f"{found.mnemonic} {found.op_str}".rstrip()
        if found.mnemonic.startswith("ud"):
            return f"the guest asked for this exception itself: {text}\n"
        groups = [found.group_name(group) for group in found.groups]
        sets = [
            name.upper()
            for name in groups
            if name not in _NO_EXTENSIONS and not name.startswith("no")
        ]
        needs = f", which needs {' and '.join(sets)}" if sets else ""
        return f"unsupported instruction: {text}{needs}; docs/cpu.md says what the CPU has\n"
    return ""


def linear_rip(state: CpuState) -> int:
    """Where the next instruction lies in the linear address space."""
    if code_bits(state) == 64:
        return state.rip
    return state.cs.base + state.rip & 0xFFFF_FFFF


def code_bits(state: CpuState) -> int:
    """The default size of the code that runs: 16, 32 or 64."""
    if state.efer & EFER_LMA and state.cs.attributes & D_LONG:
        return 64
    return 32 if state.cs.attributes & D_BIG and state.cr0 & CR0_PE else 16


def mode_name(state: CpuState) -> str:
    """The CPU's mode and privilege in words."""
    if not state.cr0 & CR0_PE:
        return "real mode"
    if state.rflags & F_VM:
        return "virtual-8086 mode"
    bits = code_bits(state)
    if bits == 64:
        mode = "long mode"
    elif state.efer & EFER_LMA:
        mode = "compatibility mode"
    else:
        mode = f"{bits}-bit protected mode"
    paging = "" if state.cr0 & CR0_PG else ", paging off"
    return f"{mode}, ring {state.ss.attributes >> 13 & 3}{paging}"


def symbol_at(address: int, symbols: Symbols) -> str:
    """``name+0x12`` for an address inside a symbol, else "".

    A symbol without a size (an assembler's label) reaches up to the next one, `LABEL_REACH` at
    most.
    """
    ordered = sorted(symbols)
    index = bisect_right(ordered, (address, 1 << 64, "\U0010ffff")) - 1
    if index < 0:
        return ""
    start, size, name = ordered[index]
    if address >= start + (size or LABEL_REACH):
        return ""
    return name if address == start else f"{name}+{address - start:#x}"


def _registers(state: CpuState, bits: int) -> list[str]:
    count, width = (16, 16) if bits == 64 else (8, 8)
    named = [f"{n:>3} {v:0{width}x}" for n, v in zip(GPR_NAMES, state.gpr, strict=True)][:count]
    lines = ["  ".join(named[at : at + 4]) for at in range(0, count, 4)]
    flags = " ".join(name for bit, name in _FLAG_NAMES if state.rflags >> bit & 1)
    lines.append(f"rip {state.rip:0{width}x}  rflags {state.rflags:08x} {flags}".rstrip())
    for names in (("cs", "ss", "ds"), ("es", "fs", "gs"), ("tr", "ldtr")):
        parts = []
        for name in names:
            segment = getattr(state, name)
            parts.append(f"{name:>2} {segment.selector:04x} base {segment.base:x}")
        lines.append("  ".join(parts))
    lines.append(
        f"cr0 {state.cr0:x}  cr2 {state.cr2:x}  cr3 {state.cr3:x}  cr4 {state.cr4:x}"
        f"  efer {state.efer:x}"
    )
    gdt, idt = state.gdtr, state.idtr
    lines.append(f"gdt {gdt.base:x}+{gdt.limit:x}  idt {idt.base:x}+{idt.limit:x}")
    return lines


def _disassembly(code: bytes, where: int, bits: int, symbols: Symbols) -> list[str]:
    try:
        import capstone
    except ImportError:
        return [f"code: {code[:16].hex(' ')}"]
    lines = []
    decoder: Any = capstone.Cs(capstone.CS_ARCH_X86, _decoder_mode(bits))  # type: ignore[no-untyped-call]
    for address, size, mnemonic, operands in decoder.disasm_lite(code, where):
        name = symbol_at(address, symbols)
        raw = code[address - where : address - where + size].hex(" ")
        line = f"  {address:x}{f' <{name}>' if name else ''}: {raw:<30} {mnemonic} {operands}"
        lines.append(line.rstrip())
        if len(lines) == _INSTRUCTIONS:
            break
    return lines or [f"code: no instruction: {code[:15].hex(' ')}"]


def _decoder_mode(bits: int) -> int:
    import capstone

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return int(modes[bits])


def _stack(cpu: Cpu, state: CpuState, bits: int) -> list[str]:
    size = bits // 8
    sp = state.gpr[4] if bits == 64 else state.ss.base + state.gpr[4] & 0xFFFF_FFFF
    data = cpu.read_linear(sp, 8 * size)
    if not data:
        return [f"stack at {sp:#x}: not in RAM"]
    words = [
        f"{int.from_bytes(data[at : at + size], 'little'):0{2 * size}x}"
        for at in range(0, len(data), size)
    ]
    return [f"stack at {sp:#x}: {' '.join(words)}"]
