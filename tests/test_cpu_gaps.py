"""What docs/cpu.md says is wrong, shown: each passes as soon as the library does it right."""

from __future__ import annotations

import pytest
from cpu_bench import Bench

DATA = 0x28000


def gap(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(reason=reason, strict=True)


@gap("the library does not check the alignment of SSE operands")
def test_misaligned_movaps_is_a_fault() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[3] = DATA + 1
        bench.run(state, b"\x0f\x28\x03\xf4")  # movaps xmm0, [rbx]
        assert bench.vector() == 13


@gap("the library gives 0 for CR8, and tells nobody of writes")
def test_cr8_keeps_its_value() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[0] = 5
        bench.run(state, b"\x44\x0f\x22\xc0\x44\x0f\x20\xc3\xf4")  # mov cr8, rax; mov rbx, cr8
        assert bench.cpu.get_state().gpr[3] == 5


@pytest.mark.parametrize("code", [b"\x0f\x32", b"\x0f\x30"])
@gap("RDMSR and WRMSR cannot be trapped")
def test_an_unknown_msr_is_a_fault(code: bytes) -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[1] = 0x4B56_4DFF
        bench.run(state, code + b"\xf4")
        assert bench.vector() == 13


@gap("the library checks no segment limits")
def test_an_access_beyond_the_limit_is_a_fault() -> None:
    with Bench() as bench:
        state = bench.protected()
        state.ds.limit = 0xFFF
        state.ds.attributes &= ~(1 << 23)
        state.gpr[3] = DATA
        bench.run(state, b"\x8b\x03\xf4")
        assert bench.vector() == 13


@gap("the library checks no segment limits")
def test_ip_beyond_64_kib_is_a_fault() -> None:
    with Bench() as bench:
        state = bench.real()
        state.rip = 0xFFFF
        bench.run(state, b"\x90\xf4")
        assert bench.vector() == 13


@gap("the library takes any bit of CR4")
def test_reserved_bits_of_cr4_are_a_fault() -> None:
    with Bench() as bench:
        state = bench.long()
        state.gpr[0] = 0x620 | 1 << 30
        bench.run(state, b"\x0f\x22\xe0\xf4")
        assert bench.vector() == 13
