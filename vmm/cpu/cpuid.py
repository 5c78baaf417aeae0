"""What CPUID tells the guest: exactly what this CPU can do.

The engine's own answer hides that this is a virtual machine and advertises what it has not, so
every leaf is answered from this table. Left out although the engine or real CPUs of this model
have them: AVX and XSAVE (state incomplete), MONITOR, VME, HTT, RDTSCP, UMIP, SMEP, SMAP, PCID, and
performance counters; and x2APIC and the TSC deadline where their MSRs cannot be had (`intercept`).

What it says of clocks holds for a `Cpu` whose `tsc` counts nanoseconds, as the machine's does.

Sources: Intel SDM volume 2A, "CPUID"; for the hypervisor leaves, the Linux kernel's
Documentation/virt/kvm/x86/cpuid.rst (the range 0x4000_0000 and the vendor string in EBX, ECX, EDX).
"""

from __future__ import annotations

Leaf = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

HYPERVISOR_NAME = b"JailedVMMpy "
_BRAND = b"Jailed VMM virtual CPU (Unicorn)"

_FEATURES_ECX = sum(
    1 << bit
    for bit in (
        *(0, 1, 9, 13),  # SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B
        *(19, 20, 23, 25),  # SSE4.1, SSE4.2, POPCNT, AES
        31,  # hypervisor
    )
)
_MSR_FEATURES_ECX = 1 << 21 | 1 << 24  # x2APIC, TSC deadline
_FEATURES_EDX = sum(
    1 << bit
    for bit in (
        *(0, 2, 3, 4, 5, 6, 7, 8, 9),  # FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC
        *(11, 12, 13, 14, 15, 16, 17),  # SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36
        *(19, 23, 24, 25, 26),  # CLFLUSH, MMX, FXSR, SSE, SSE2
    )
)
_EXTENDED_ECX = 1  # LAHF in 64-bit mode
_EXTENDED_EDX = sum(1 << bit for bit in (11, 20, 29))  # SYSCALL, NX, LM


def _text(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def _vendor(highest: int, name: bytes) -> Leaf:
    """EBX, EDX, ECX in this order spell the vendor of the basic leaves."""
    ebx, edx, ecx = _text(name)
    return highest, ebx, ecx, edx


def _brand() -> dict[int, Leaf]:
    words = _text(_BRAND.ljust(48, b"\0"))
    return {
        0x8000_0002 + i: (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
        for i in range(3)
    }


HIGHEST_BASIC = 0x16
_TSC_HZ = 1_000_000_000
"""Of the TSC and of the local APIC timer's input alike (`devices.irqchip.lapic_timer`)."""
TABLE: dict[int, Leaf] = {
    0: _vendor(HIGHEST_BASIC, b"GenuineIntel"),
    # Family 6 model 28 stepping 10: an in-order Atom (Bonnell). Like the emulated CPU it does not
    # speculate, and kernels know that (Linux: NO_SPECULATION in cpu/common.c), so they leave out
    # page-table isolation and retpolines, which would only cost time here. Stepping 10 is past its
    # errata. One CPU with APIC id 0, CLFLUSH line of 8 * 8 bytes.
    1: (0x0001_06CA, 1 << 16 | 8 << 8, _FEATURES_ECX, _FEATURES_EDX),
    # The TSC is 1/1 of a clock of 1 GHz, which also feeds the local APIC timer: a kernel that knows
    # this need not measure them against the PIT, which takes it a fifth of a second.
    0x15: (1, 1, _TSC_HZ, 0),
    0x16: (_TSC_HZ // 1_000_000, _TSC_HZ // 1_000_000, 100, 0),  # MHz: base, maximum, bus
    0x4000_0000: (0x4000_0000, *_text(HYPERVISOR_NAME)),  # type: ignore[dict-item]
    0x8000_0000: (0x8000_0008, 0, 0, 0),
    0x8000_0001: (0, 0, _EXTENDED_ECX, _EXTENDED_EDX),
    **_brand(),
    0x8000_0007: (0, 0, 0, 1 << 8),  # the TSC ticks at the same rate always
    0x8000_0008: (48 << 8 | 40, 0, 0, 0),  # linear and physical address bits
}
_NOTHING: Leaf = (0, 0, 0, 0)


def cpuid(leaf: int, msrs: bool = True) -> Leaf:
    """The answer for `leaf`. No leaf of ours has subleaves; unknown ones are zero.

    Args:
        msrs: whether the MSRs of the local APIC can be had.
    """
    eax, ebx, ecx, edx = TABLE.get(leaf, _NOTHING)
    if leaf == 1 and msrs:
        ecx |= _MSR_FEATURES_ECX
    return eax, ebx, ecx, edx
