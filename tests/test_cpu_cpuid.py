"""CPUID and what it promises."""

from __future__ import annotations

import pytest
from cpu_bench import Bench

from vmm.cpu import cpuid
from vmm.cpu.engine import StopReason


def ask(bench: Bench, leaf: int) -> tuple[int, int, int, int]:
    state = bench.long()
    state.gpr[:4] = [0xFFFF_FFFF_0000_0000 | leaf, 0, 0x1_0000_0000, 0x1_0000_0000]
    bench.run(
        state,
        bytes.fromhex(
            # cpuid; hlt
            "0fa2f4"
        ),
    )
    eax, ecx, edx, ebx = bench.cpu.get_state().gpr[:4]
    return eax, ebx, ecx, edx


@pytest.mark.parametrize(
    "leaf", [0, 1, 2, 7, 0xD, 0x15, 0x16, 0x4000_0000, 0x8000_0000, 0x8000_0008, 0xFFFF_FFFF]
)
def test_the_guest_gets_the_table(leaf: int) -> None:
    with Bench() as bench:
        assert ask(bench, leaf) == cpuid.cpuid(leaf)


def test_names() -> None:
    with Bench() as bench:
        _, ebx, ecx, edx = ask(bench, 0)
        assert b"".join(x.to_bytes(4, "little") for x in (ebx, edx, ecx)) == b"GenuineIntel"
        _, ebx, ecx, edx = ask(bench, 0x4000_0000)
        assert b"".join(x.to_bytes(4, "little") for x in (ebx, ecx, edx)) == b"JailedVMMpy "


def test_no_lies() -> None:
    _, _, ecx, edx = cpuid.cpuid(1)
    assert edx & 1 << 9  # APIC
    assert not edx & (1 << 1 | 1 << 28)  # VME, HTT
    assert not ecx & 1 << 3  # MONITOR
    msrs = 1 << 21 | 1 << 24  # x2APIC, TSC deadline
    assert ecx & msrs == msrs
    assert not cpuid.cpuid(1, msrs=False)[2] & msrs
    assert not ecx & (1 << 26 | 1 << 27 | 1 << 28)  # XSAVE, OSXSAVE, AVX
    assert ecx >> 31  # hypervisor
    assert cpuid.cpuid(7) == (0, 0, 0, 0)


# One instruction of each feature that is advertised.
PROMISES = {
    "SSE3": bytes.fromhex(
        # haddpd xmm0, xmm1
        "660f7cc1"
    ),
    "PCLMULQDQ": bytes.fromhex(
        # pclmulqdq xmm0, xmm1, 0
        "660f3a44c100"
    ),
    "SSSE3": bytes.fromhex(
        # pshufb xmm0, xmm1
        "660f3800c1"
    ),
    "CMPXCHG16B": bytes.fromhex(
        # mov ebx, 0x30000; lock cmpxchg16b [rbx]
        "bb00000300f0480fc70b"
    ),
    "SSE4.1": bytes.fromhex(
        # pmulld xmm0, xmm1
        "660f3840c1"
    ),
    "SSE4.2": bytes.fromhex(
        # crc32 eax, ebx
        "f20f38f1c3"
    ),
    "POPCNT": bytes.fromhex(
        # popcnt eax, ebx
        "f30fb8c3"
    ),
    "AES": bytes.fromhex(
        # aesenc xmm0, xmm1
        "660f38dcc1"
    ),
    "TSC": bytes.fromhex(
        # rdtsc
        "0f31"
    ),
    "CX8": bytes.fromhex(
        # mov ebx, 0x30000; lock cmpxchg8b [rbx]
        "bb00000300f00fc70b"
    ),
    "CMOV": bytes.fromhex(
        # cmovz eax, ebx
        "0f44c3"
    ),
    "CLFLUSH": bytes.fromhex(
        # clflush [0x30000]
        "0fae3c2500000300"
    ),
    "MMX": bytes.fromhex(
        # paddb mm0, mm1
        "0ffcc1"
    ),
    "FXSR": bytes.fromhex(
        # fxsave [0x30000]
        "0fae042500000300"
    ),
    "SSE": bytes.fromhex(
        # addps xmm0, xmm1
        "0f58c1"
    ),
    "SSE2": bytes.fromhex(
        # addpd xmm0, xmm1
        "660f58c1"
    ),
    "LAHF": bytes.fromhex(
        # lahf
        "9f"
    ),
}


@pytest.mark.parametrize("feature", PROMISES)
def test_what_is_promised_exists(feature: str) -> None:
    with Bench() as bench:
        code = PROMISES[feature]
        assert bench.run(bench.long(), code + b"\xf4").reason is StopReason.HALT
        assert bench.cpu.get_state().rip == 0x20000 + len(code) + 1


@pytest.mark.parametrize("native", [True, False])
def test_rdtsc(native: bool) -> None:
    """Both halves, the upper parts of the registers cleared, and nothing else changed."""
    ticks = iter(range(0x1234_5678_FFFF_FFFE, 1 << 62))
    with Bench(native=native, tsc=lambda: next(ticks)) as bench:
        state = bench.long()
        state.gpr[:4] = [0xAAAA_AAAA_AAAA_AAAA, 0xBBBB, 0xCCCC_CCCC_CCCC_CCCC, 0xDDDD]
        state.rflags = 0x8D7 | 0x200
        # rdtsc; mov rsi, rax; mov rdi, rdx; rdtsc; rdtsc; hlt
        assert bench.run(state, bytes.fromhex("0f31 4889c6 4889d7 0f31 0f31 f4")).reason is (
            StopReason.HALT
        )
        after = bench.cpu.get_state()
        assert after.gpr[:4] == [0, 0xBBBB, 0x1234_5679, 0xDDDD]
        assert after.gpr[6:8] == [0xFFFF_FFFE, 0x1234_5678]
        assert after.gpr[8:] == state.gpr[8:]
        assert after.rflags == state.rflags
