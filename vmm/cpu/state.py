"""The architectural state of one x86 vCPU, independent of the engine that runs it.

This is what boot loaders produce, what a snapshot's ``cpu.json`` holds and what reports print.
Source of names and reset values: Intel SDM volume 3A, sections 2.3, 2.5, 3.4.3 and 10.1.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""General-purpose registers in their encoding order."""


@dataclass
class Segment:
    """A segment register with its hidden part.

    Attributes:
        selector: the visible 16 bits.
        base: linear base address.
        limit: in bytes, granularity already applied.
        attributes: bits 8..23 of the descriptor's second dword, kept in place (type and S at 8,
            DPL at 13, P at 15, L at 21, D/B at 22, G at 23).
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    attributes: int = 0x9300


@dataclass
class DescriptorTable:
    """GDTR or IDTR: linear base and limit in bytes."""

    base: int = 0
    limit: int = 0xFFFF


def flat_segment(selector: int, attributes: int) -> Segment:
    """A segment over the whole 4 GiB, as boot protocols want it."""
    return Segment(selector, 0, 0xFFFF_FFFF, attributes)


CODE32 = 0xCF9B00
CODE64 = 0xAF9B00
DATA32 = 0xCF9300
TSS32_BUSY = 0x008B00
LDT = 0x008200
"""Descriptor attributes (see `Segment.attributes`) of present, accessed ring-0 segments."""


@dataclass
class CpuState:
    """Everything architectural. The defaults are the state after reset (SDM table 10-1)."""

    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    """In the order of `GPR_NAMES`."""
    rip: int = 0xFFF0
    rflags: int = 2
    cs: Segment = field(default_factory=lambda: Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x9B00))
    ss: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ldtr: Segment = field(default_factory=lambda: Segment(attributes=LDT))
    tr: Segment = field(default_factory=lambda: Segment(attributes=TSS32_BUSY))
    gdtr: DescriptorTable = field(default_factory=DescriptorTable)
    idtr: DescriptorTable = field(default_factory=DescriptorTable)
    cr0: int = 0x6000_0010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    dr: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400])
    """DR0..DR7; 4 and 5 are unused."""
    msrs: dict[int, int] = field(default_factory=dict)
    """Model-specific registers by number, those that the engine keeps."""
    x87: list[str] = field(default_factory=list)
    """ST(0)..ST(7), each ten bytes in hexadecimal, least significant first; empty: reset."""
    fpu_control: int = 0x37F
    fpu_status: int = 0
    fpu_tags: int = 0xFFFF
    """The tag word with two bits for each physical register."""
    mxcsr: int = 0x1F80
    vectors: list[str] = field(default_factory=list)
    """XMM0..XMM15, each 16 bytes in hexadecimal, least significant first; empty: zero."""
    halted: bool = False
    """The vCPU executed HLT and waits for an interrupt."""
    interrupt_shadow: bool = False
    """One more instruction runs before an interrupt is taken (after STI or MOV SS)."""
    nmi_blocked: bool = False
    """No NMI is taken before the next IRET."""
    tsc_offset: int = 0
    """What the time-stamp counter counts less what its clock says; see `vmm.cpu.tsc`."""

    def named(self) -> dict[str, int]:
        """The general-purpose registers, RIP and RFLAGS by name, for reports."""
        return {
            **dict(zip(GPR_NAMES, self.gpr, strict=True)),
            "rip": self.rip,
            "rflags": self.rflags,
        }
