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
