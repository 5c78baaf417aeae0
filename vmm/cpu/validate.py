"""Checks a `CpuState` that may come from a damaged or hostile snapshot.

What is refused is what the engine could not represent, or could not have got into by itself. A
state that is merely useless to a guest is the guest's affair.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from devices.errors import UserError
from vmm.cpu.context import CR0_PG, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE
from vmm.cpu.state import GPR_NAMES, CpuState, DescriptorTable, Segment

SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
"""In the engine's order."""

ATTRIBUTES = 0xFF_FF00
_FLAGS = 0x3F_7FD7
_EFER = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


def validate(state: CpuState, msrs: Collection[int]) -> None:
    """Refuse what cannot be loaded.

    Args:
        state: as it came from outside; nothing about it is trusted, not even its types.
        msrs: the numbers of the model-specific registers that the engine keeps.

    Raises:
        UserError: it names the field.
    """
    _numbers("gpr", state.gpr, 16, GPR_NAMES)
    _numbers("dr", state.dr, 8, tuple(f"dr{i}" for i in range(8)))
    for name, most in (
        ("rip", U64),
        ("rflags", _FLAGS),
        ("cr0", U32),
        ("cr2", U64),
        ("cr3", U64),
        ("cr4", U32),
        ("cr8", 15),
        ("efer", _EFER),
        ("fpu_control", U16),
        ("fpu_status", U16),
        ("fpu_tags", U16),
        ("mxcsr", U16),
    ):
        _number(name, getattr(state, name), most)
    for name, allowed in (("rflags", _FLAGS), ("efer", _EFER)):
        _require(not getattr(state, name) & ~allowed, name, "reserved bits are set")
    _require(
        not state.efer & EFER_LMA or bool(state.cr0 & CR0_PG and state.efer & EFER_LME),
        "efer",
        "long mode is active without CR0.PG and EFER.LME",
    )
    _require(
        bool(state.efer & EFER_LMA) or state.rip <= U32, "rip", "above 4 GiB outside long mode"
    )
    for name in SEGMENT_NAMES:
        segment = getattr(state, name)
        _require(isinstance(segment, Segment), name, "not a segment")
        _number(f"{name}.selector", segment.selector, U16)
        _number(f"{name}.base", segment.base, U64)
        _number(f"{name}.limit", segment.limit, U32)
        _number(f"{name}.attributes", segment.attributes, U32)
        _require(not segment.attributes & ~ATTRIBUTES, f"{name}.attributes", "bits outside 8..23")
    for name in ("gdtr", "idtr"):
        table = getattr(state, name)
        _require(isinstance(table, DescriptorTable), name, "not a descriptor table")
        _number(f"{name}.base", table.base, U64)
        _number(f"{name}.limit", table.limit, U32)
    _wide("x87", state.x87, 8, 10)
    _wide("vectors", state.vectors, 16, 16)
    _require(isinstance(state.msrs, dict), "msrs", "not a table")
    for number, value in state.msrs.items():
        _require(number in msrs, "msrs", f"{number!r} is no register that this CPU keeps")
        _number(f"msrs[{number:#x}]", value, U64)
    _number("tsc_offset", state.tsc_offset, U64, least=-U64)
    for name in ("halted", "interrupt_shadow", "nmi_blocked"):
        _require(isinstance(getattr(state, name), bool), name, "neither true nor false")


def _require(truth: bool, name: str, why: str) -> None:
    if not truth:
        raise UserError(f"CPU state: {name}: {why}")


def _number(name: str, value: Any, most: int, least: int = 0) -> None:
    _require(type(value) is int, name, "not a number")
    _require(least <= value <= most, name, f"{value:#x} is out of range")


def _numbers(name: str, values: Any, count: int, names: tuple[str, ...]) -> None:
    _require(isinstance(values, list) and len(values) == count, name, f"not {count} numbers")
    for each, value in zip(names, values, strict=True):
        _number(each, value, U64)


def _wide(name: str, values: Any, count: int, size: int) -> None:
    _require(isinstance(values, list) and len(values) in (0, count), name, f"not {count} values")
    for index, value in enumerate(values):
        at = f"{name}[{index}]"
        _require(isinstance(value, str) and len(value) == 2 * size, at, f"not {size} bytes in hex")
        try:
            good = len(bytes.fromhex(value)) == size
        except ValueError:
            good = False
        _require(good, at, f"not {size} bytes in hexadecimal")
