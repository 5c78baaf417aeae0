"""The model-specific registers that the engine does not do, and CR8, which is the APIC's TPR.

The engine keeps some MSRs (see `registers`), reads 0 from every other one and ignores what is
written to it. Where it lets us have those (`intercept`) they get what a CPU does: the local APIC's
and the time-stamp counter work, a few are there and do nothing, because programs use them without
asking (the table is what KVM answers for such a CPU), and the rest is #GP(0).

Source: Intel SDM volume 4, chapter 2; volume 3A, sections 10.8.6 and 10.12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from devices.irqchip.x2apic import FIRST, IA32_APIC_BASE, IA32_TSC_DEADLINE, LAST, MsrFault
from vmm.cpu.context import RCX, Context
from vmm.cpu.delivery import INVALID_OPCODE, PROTECTION
from vmm.cpu.fastcall import PREFIXES64
from vmm.cpu.intercept import MSR, READ_CR8
from vmm.cpu.paging import Fault, Linear
from vmm.cpu.tsc import Tsc

IA32_TIME_STAMP_COUNTER = 0x10
READABLE = (0xFE, 0x179, 0xC000_0080, 0xC000_0100, 0xC000_0101)
"""IA32_MTRRCAP, IA32_MCG_CAP, IA32_EFER, IA32_FS_BASE and IA32_GS_BASE: the engine reads them."""
PASSED = READABLE[2:]
"""Of these, those that it writes, too."""
_INERT = frozenset(
    (
        *(0x00, 0x01),  # P5_MC_ADDR and _TYPE
        *(0x17, 0x2A),  # IA32_PLATFORM_ID, EBL_CR_POWERON
        *(0x79, 0x8B),  # IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID: no microcode to load
        *(0x198, 0x199),  # IA32_PERF_STATUS and _CTL
        0x1D9,  # IA32_DEBUGCTL
    )
)
"""They read 0 and take any value."""
_APIC = frozenset((IA32_APIC_BASE, IA32_TSC_DEADLINE, *range(FIRST, LAST + 1)))
_LONGEST = 15
_OPCODES = {
    (True, False): b"\x0f\x32",
    (True, True): b"\x0f\x30",
    (False, False): b"\x0f\x20",
    (False, True): b"\x0f\x22",
}
"""By (is it of an MSR, does it write)."""


class Apic(Protocol):
    """What of a local APIC is reached by instructions and not by memory."""

    def read_msr(self, index: int) -> int: ...
    def write_msr(self, index: int, value: int) -> None: ...
    def read_cr8(self) -> int: ...
    def write_cr8(self, value: int) -> None: ...


class Msrs:
    """Does an intercepted instruction in the saved context.

    Args:
        tsc: the time-stamp counter; the APIC's deadlines are in the time of its clock.

    Attributes:
        apic: None: there is none, nor its MSRs.
        unclaimed_reads, unclaimed_writes: how often one was used that is not there.
        on_unclaimed: called for each with ("read" or "write", number, 8, value).
    """

    def __init__(self, context: Context, linear: Linear, tsc: Tsc) -> None:
        self.apic: Apic | None = None
        self.unclaimed_reads = self.unclaimed_writes = 0
        self.on_unclaimed: Callable[[str, int, int, int], None] | None = None
        self._context, self._linear = context, linear
        self._tsc = tsc

    def instruction(self, event: int) -> None:
        """Do the instruction at RIP and go behind it.

        Args:
            event: see `intercept`.

        Raises:
            Fault: with nothing changed.
        """
        context = self._context
        code = self._linear.peek(context.linear_rip(), _LONGEST)
        writes = bool(context.words[context.at.error_code_w]) if event == MSR else event != READ_CR8
        opcode = code.find(_OPCODES[event == MSR, writes])
        length = 2 if event == MSR else 3
        if not 0 <= opcode <= len(code) - length or code[:opcode].strip(PREFIXES64 + b"\xf0"):
            raise Fault(INVALID_OPCODE)  # somebody changes the code meanwhile
        if event != MSR:
            register = code[opcode + 2] & 7
            if opcode and code[opcode - 1] & 0xF0 == 0x40:
                register |= (code[opcode - 1] & 1) << 3
            self._move_cr8(context.at.gpr + register, writes)
        elif writes:
            self._write()
        else:
            self._read()
        context.rip += opcode + length
        context.clear_shadow()

    def _read(self) -> None:
        longs, gpr = self._context.longs, self._context.at.gpr
        number = longs[gpr + RCX] & 0xFFFF_FFFF
        value = 0
        if number == IA32_TIME_STAMP_COUNTER:
            value = self._tsc.read()
        elif number in _APIC and self.apic is not None:
            value = self._read_apic(self.apic, number)
        elif number not in _INERT:
            self.unclaimed_reads += 1
            if self.on_unclaimed is not None:
                self.on_unclaimed("read", number, 8, 0)
            raise Fault(PROTECTION, 0)
        longs[gpr], longs[gpr + 2] = value & 0xFFFF_FFFF, value >> 32 & 0xFFFF_FFFF

    def _write(self) -> None:
        longs, gpr = self._context.longs, self._context.at.gpr
        number = longs[gpr + RCX] & 0xFFFF_FFFF
        value = longs[gpr] & 0xFFFF_FFFF | (longs[gpr + 2] & 0xFFFF_FFFF) << 32
        if number in _APIC and self.apic is not None:
            self._write_apic(self.apic, number, value)
        elif number == IA32_TIME_STAMP_COUNTER:
            deadline = 0 if self.apic is None else self._read_apic(self.apic, IA32_TSC_DEADLINE)
            self._tsc.write(value)
            if self.apic is not None and deadline:
                self._write_apic(self.apic, IA32_TSC_DEADLINE, deadline)
        elif number not in _INERT:
            self.unclaimed_writes += 1
            if self.on_unclaimed is not None:
                self.on_unclaimed("write", number, 8, value)
            raise Fault(PROTECTION, 0)

    def _read_apic(self, apic: Apic, number: int) -> int:
        try:
            value = apic.read_msr(number)
        except MsrFault:
            raise Fault(PROTECTION, 0) from None
        return self._tsc.from_clock(value) if number == IA32_TSC_DEADLINE and value else value

    def _write_apic(self, apic: Apic, number: int, value: int) -> None:
        if number == IA32_TSC_DEADLINE and value:
            value = self._tsc.to_clock(value)
        try:
            apic.write_msr(number, value)
        except MsrFault:
            raise Fault(PROTECTION, 0) from None

    def _move_cr8(self, register: int, writes: bool) -> None:
        longs, apic = self._context.longs, self.apic
        if not writes:
            longs[register] = apic.read_cr8() if apic is not None else 0
        elif longs[register] > 15:
            raise Fault(PROTECTION, 0)
        elif apic is not None:
            apic.write_cr8(longs[register])
