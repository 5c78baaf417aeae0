"""The MSRs of the local APIC (SDM volume 3A, 10.12 "Extended XAPIC (x2APIC)")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.irqchip.apic_registers import (
    APIC_BASE,
    ICR_WRITABLE,
    LVT_WRITABLE,
    ApicMode,
    Entry,
    Register,
    Shorthand,
)
from devices.irqchip.lapic_state import logical_id

if TYPE_CHECKING:
    from devices.irqchip.lapic import LocalApic

IA32_APIC_BASE = 0x1B
IA32_TSC_DEADLINE = 0x6E0
FIRST, LAST = 0x800, 0x83F
_BOOTSTRAP = 1 << 8
_ICR_BITS = ICR_WRITABLE | 0xFFFF_FFFF << 32

_READ_ONLY = frozenset(
    {
        Register.VERSION,
        Register.PPR,
        Register.CURRENT_COUNT,
        *range(Register.ISR, Register.ESR),
    }
)
_WRITABLE = {
    Register.TPR: 0xFF,
    Register.SVR: 0x3FF,
    Register.ESR: 0,
    Register.INITIAL_COUNT: 0xFFFF_FFFF,
    Register.DIVIDE: 0b1011,
    # Status bits may be written back as they were read.
    **{
        Register.LVT + source: int(bits | Entry.SEND_PENDING | Entry.REMOTE_IRR)
        for source, bits in enumerate(LVT_WRITABLE)
    },
}
"""The registers that MSRs show as memory does, with the bits that WRMSR takes (10.12.1.2)."""


class MsrFault(Exception):
    """The access raises #GP(0)."""


def read_msr(apic: LocalApic, index: int) -> int:
    """IA32_APIC_BASE, IA32_TSC_DEADLINE or one of the MSRs 0x800..0x83F.

    Raises:
        MsrFault: no such register, a write-only one, or not in x2APIC mode.
    """
    state = apic.state
    if index == IA32_APIC_BASE:
        return APIC_BASE | _BOOTSTRAP | state.mode << 10
    if index == IA32_TSC_DEADLINE:
        return apic.timer.deadline()
    number = _number(apic, index)
    match number:
        case Register.ID:
            return state.id
        case Register.LDR:
            return logical_id(state.id)
        case Register.ICR:
            return state.icr_high << 32 | state.icr
    if number in _READ_ONLY or number in _WRITABLE:
        return apic.registers.readers[number]()
    raise MsrFault(f"MSR {index:#x} cannot be read")


def write_msr(apic: LocalApic, index: int, value: int) -> None:
    """See `read_msr`; `value` has 64 bits.

    Raises:
        MsrFault: no such register, a read-only one, reserved bits, or not in x2APIC mode.
    """
    if index == IA32_APIC_BASE:
        _write_base(apic, value)
        return
    if index == IA32_TSC_DEADLINE:
        apic.timer.write_deadline(value)
        return
    number = _number(apic, index)
    match number:
        case Register.EOI if value == 0:
            apic.end_of_interrupt()
        case Register.ICR if not value & ~_ICR_BITS:
            apic.state.icr_high = value >> 32
            apic.send(value & 0xFFFF_FFFF, value >> 32)
        case Register.SELF_IPI if value <= 0xFF:
            # The same as this ICR command (10.12.11), which it leaves in the ICR as well.
            apic.send(Shorthand.SELF << 18 | value, 0)
        case _ if number in _WRITABLE and not value & ~_WRITABLE[number]:
            apic.registers.writers[number](value)
        case _:
            raise MsrFault(f"MSR {index:#x} does not take {value:#x}")


def _number(apic: LocalApic, index: int) -> int:
    if apic.state.mode is not ApicMode.X2APIC or not FIRST <= index <= LAST:
        raise MsrFault(f"there is no MSR {index:#x}")
    return index - FIRST


def _write_base(apic: LocalApic, value: int) -> None:
    """The transitions of figure 10-27; the page of registers cannot be moved here."""
    old, new = apic.state.mode, value >> 10 & 3
    if value & ~0xC00 != APIC_BASE | _BOOTSTRAP or new == 1:
        raise MsrFault(f"IA32_APIC_BASE does not take {value:#x}")
    if (old, new) in ((ApicMode.DISABLED, ApicMode.X2APIC), (ApicMode.X2APIC, ApicMode.XAPIC)):
        raise MsrFault("no way leads from this APIC mode to that one")
    if new != old:
        apic.set_apic_mode(ApicMode(new))
