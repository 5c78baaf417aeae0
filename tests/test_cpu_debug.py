"""Single steps by TF, breakpoints by DR7, and the shadows of STI and MOV SS.

Source: Intel SDM volume 3B, sections 17.2 and 17.3; volume 3A, 6.8.3 (MOV SS).
"""

from __future__ import annotations

import pytest
from cpu_bench import CODE, HANDLERS, K_DATA, PORT, Bench

from vmm.cpu.engine import StopReason
from vmm.cpu.state import CpuState

LOG_AT, LOG, DATA, CALLEE = 0x31000, 0x32000, 0x28000, 0x24000
TF = 0x100
RECORD = bytes.fromhex(
    # push rax; push rbx; mov rbx, [0x31000]; mov rax, [rsp+16]; mov [rbx], rax;
    # mov rax, [rsp+32]; mov [rbx+8], rax; mov rax, dr6; mov [rbx+16], rax; xor eax, eax;
    # mov dr6, rax; add rbx, 24; mov [0x31000], rbx; pop rbx; pop rax; iretq
    "5053488b1c2500100300488b442410488903488b442420488943080f21f04889"
    "431031c00f23f04883c31848891c25001003005b5848cf"
)
SET_TF = bytes.fromhex("9c810c24000100009d")  # pushfq; or dword [rsp], TF; popfq
CLEAR_TF = bytes.fromhex("9c812424fffeffff9d")  # pushfq; and dword [rsp], ~TF; popfq


def debugged(bench: Bench, handler: bytes = RECORD) -> CpuState:
    """Ring 0 of long mode; #DB goes to `handler`."""
    state = bench.long()
    bench.memory.write(CALLEE + 0x800, handler)
    at = CALLEE + 0x800
    bench.put(0x9000 + 16, at & 0xFFFF | 8 << 16 | 0x8E << 40 | (at >> 16) << 48, 0)
    bench.put(LOG_AT, LOG)
    bench.memory.write(LOG, bytes(24 * 64))
    state.cr4 |= 0x200
    return state


def trapped(bench: Bench) -> list[tuple[int, int, int]]:
    """(RIP relative to CODE, RFLAGS, DR6) of each #DB."""
    count = (bench.words(LOG_AT, 1)[0] - LOG) // 24
    words = bench.words(LOG, 3 * count)
    return [(words[i] - CODE, words[i + 1], words[i + 2]) for i in range(0, 3 * count, 3)]


def steps(code: bytes, setup: tuple[tuple[int, int], ...] = (), native: bool = True) -> list[int]:
    """Where a program under TF is trapped, relative to the first instruction behind POPF."""
    with Bench(native=native) as bench:
        state = debugged(bench)
        for register, value in setup:
            state.gpr[register] = value
        bench.memory.write(HANDLERS + 0x80, b"\x48\xcf")
        assert bench.run(state, SET_TF + code + CLEAR_TF + b"\xf4").reason is StopReason.HALT
        log = trapped(bench)
        end = len(SET_TF) + len(code)
        for rip, flags, dr6 in log:
            assert bool(flags & TF) is (rip != end + 9)
            assert dr6 & 0x4000
        # PUSHF, AND and POPF of the end are trapped as well: TF was set when POPF began.
        rips = [rip for rip, _, _ in log]
        assert rips[-3:] == [end + 1, end + 8, end + 9], rips
        return [rip - len(SET_TF) for rip in rips[:-3]]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("9090", [1, 2]),  # nop; nop: behind each, and none behind the POPF that sets TF
        ("eb0090", [2, 3]),  # jmp +0; nop
        ("31c0740090", [2, 4, 5]),  # xor eax, eax; jz taken; nop
        ("31c0750090", [2, 4, 5]),  # jnz not taken
        ("0fa290", [2, 3]),  # cpuid; nop
        ("0f3190", [2, 3]),  # rdtsc; nop
        ("e68090", [2, 3]),  # out 0x80, al; nop
        ("e48090", [2, 3]),  # in al, 0x80; nop
        ("8d0490488b0490", None),  # lea; mov: nothing special
        ("0f20c00f22c090", [3, 6, 7]),  # mov rax, cr0; mov cr0, rax; nop
        ("fb90", [1, 2]),  # sti; nop
        ("f30f1efa90", [4, 5]),  # a long NOP
    ],
)
def test_single_steps(code: str, where: list[int] | None, native: bool) -> None:
    raw = bytes.fromhex(code)
    if where is None:
        raw, where = bytes.fromhex("8d0490ffc090"), [3, 5, 6]
    assert steps(raw, native=native) == where


def test_a_step_over_int_goes_to_behind_the_return() -> None:
    """INT clears TF; IRET brings it back, and the trap comes behind the next instruction."""
    assert steps(b"\xcd\x80\x90\x90") == [3, 4]


def test_mov_ss_and_pop_ss_delay_the_trap() -> None:
    # mov ss, eax; nop; nop
    assert steps(b"\x8e\xd0\x90\x90", ((0, K_DATA),)) == [3, 4]


def test_each_iteration_of_a_string_instruction_traps() -> None:
    # cld; rep stosb; nop
    setup = ((1, 3), (7, DATA))
    where = steps(b"\xfc\xf3\xaa\x90", setup)
    assert where in ([1, 1, 1, 3, 4], [1, 1, 1, 1, 3, 4])


def test_a_faulting_instruction_under_tf_does_not_trap() -> None:
    """The fault saves TF; the handler runs without it."""
    with Bench() as bench:
        state = debugged(bench)
        bench.run(state, SET_TF + b"\x0f\x0b")
        assert bench.vector() == 6
        assert not trapped(bench)
        after = bench.cpu.get_state()
        assert not after.rflags & TF
        assert bench.words(after.gpr[4] + 16, 1)[0] & TF


def test_syscall_takes_tf_away_by_its_mask() -> None:
    with Bench() as bench:
        state = debugged(bench)
        state.msrs = {0xC000_0081: 0x10_0008 << 32, 0xC000_0082: CALLEE, 0xC000_0084: TF}
        bench.memory.write(CALLEE, b"\x90\x90\xf4")
        bench.run(state, SET_TF + b"\x0f\x05")
        assert bench.cpu.get_state().rip == CALLEE + 3
        assert [rip for rip, _, _ in trapped(bench)] in ([], [CALLEE - CODE])


def test_an_external_interrupt_under_tf_runs_without_it() -> None:
    with Bench() as bench:
        state = debugged(bench)
        state.rflags = 0x302
        bench.start(state, b"\x90\xeb\xfe")
        assert bench.cpu.inject(0x40) is None
        assert bench.cpu.run(1000).reason is StopReason.HALT
        assert bench.vector() == 0x40
        assert bench.words(bench.cpu.get_state().gpr[4], 3)[2] & TF
        assert not trapped(bench)


def test_single_steps_through_the_machine_interface_count_with_tf_set() -> None:
    """`Cpu.step` and TF together: an instruction and its #DB are one step."""
    with Bench() as bench:
        state = debugged(bench, b"\xf4")
        state.rflags = 0x102
        bench.start(state, b"\x90\x90")
        bench.cpu.step()
        assert bench.cpu.get_state().rip == CALLEE + 0x800


# Breakpoints. The library does those on instructions and ports, not those on data.

ENDLESS = b"\xeb\xfe"
PROGRAM = bytes.fromhex("90909089042500800200909090f4")
"""nop x3; mov [DATA], eax; nop x3; hlt"""
RESUME = RECORD[:2] + bytes.fromhex("814c242000000100") + RECORD[2:]
"""RECORD, and RF set in the frame: or dword [rsp+32], RF. Else the same breakpoint hits again."""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("offset", [0, 2, 10])
def test_execution_breakpoints(offset: int, native: bool) -> None:
    """A fault: RIP is that of the instruction, which has not run; RF lets it run then."""
    with Bench(native=native) as bench:
        state = debugged(bench, RESUME)
        state.dr[2], state.dr[7] = CODE + offset, 0x420
        assert bench.run(state, PROGRAM).reason is StopReason.HALT
        assert [(at, dr6 & 15) for at, _, dr6 in trapped(bench)] == [(offset, 4)]
        assert bench.cpu.get_state().rip == CODE + len(PROGRAM)


@pytest.mark.parametrize("user", [False, True])
def test_an_execution_breakpoint_hits_each_time(user: bool) -> None:
    with Bench() as bench:
        debugged(bench, RESUME)
        state = bench.long(user)
        at = CALLEE + 0x800
        bench.put(0x9000 + 16, at & 0xFFFF | 8 << 16 | 0x8E << 40 | (at >> 16) << 48, 0)
        state.gpr[0], state.gpr[1] = CALLEE, 3
        bench.memory.write(CALLEE, b"\x90\xc3")
        state.dr[0], state.dr[7] = CALLEE, 0x402
        # l: call rax; dec ecx; jnz l; ud2
        bench.run(state, b"\xff\xd0\xff\xc9\x75\xfa\x0f\x0b")
        assert bench.vector() == 6
        assert [at + CODE for at, _, _ in trapped(bench)] == [CALLEE] * 3


@pytest.mark.xfail(reason="direct jumps do not end RF in the library", strict=True)
def test_an_execution_breakpoint_in_a_loop_of_direct_jumps() -> None:
    with Bench() as bench:
        state = debugged(bench, RESUME)
        state.gpr[1] = 3
        state.dr[0], state.dr[7] = CODE + 1, 0x402
        # nop; l: dec ecx; nop; jnz l; hlt
        assert bench.run(state, b"\x90\xff\xc9\x90\x75\xfb\xf4").reason is StopReason.HALT
        assert [at for at, _, _ in trapped(bench)] == [1, 1, 1]


def test_a_guest_arms_and_disarms_a_breakpoint_itself() -> None:
    with Bench() as bench:
        state = debugged(bench, RESUME)
        state.gpr[0], state.gpr[1], state.gpr[2] = CALLEE, 0x402, 0x400
        bench.memory.write(CALLEE, b"\x90\xc3")
        call = b"\xff\xd0"
        # call rax; mov dr0, rax; mov dr7, rcx; call rax; mov dr7, rdx; call rax; hlt
        code = call + b"\x0f\x23\xc0\x0f\x23\xf9" + call + b"\x0f\x23\xfa" + call + b"\xf4"
        assert bench.run(state, code).reason is StopReason.HALT
        assert [at + CODE for at, _, _ in trapped(bench)] == [CALLEE]


@pytest.mark.parametrize("kind", [1, 3])
@pytest.mark.xfail(reason="the library never looks for data breakpoints", strict=True)
def test_data_breakpoints(kind: int) -> None:
    with Bench() as bench:
        state = debugged(bench, RESUME)
        state.dr[0], state.dr[7] = DATA, 0x402 | kind << 16 | 3 << 18
        assert bench.run(state, PROGRAM).reason is StopReason.HALT
        assert [(at, dr6 & 15) for at, _, dr6 in trapped(bench)] == [(10, 1)]


@pytest.mark.xfail(reason="the library shows RF to PUSHF until the block ends", strict=True)
def test_pushf_does_not_show_rf() -> None:
    with Bench() as bench:
        state = debugged(bench, RESUME)
        state.dr[0], state.dr[7] = CODE + 1, 0x402
        bench.run(state, b"\x90\x90\x9c\x58\xf4")  # nop; nop; pushfq; pop rax; hlt
        assert trapped(bench)
        assert not bench.cpu.get_state().gpr[0] & 0x10000


@pytest.mark.parametrize("kind", [1, 3])
def test_armed_breakpoints_disturb_nothing(kind: int) -> None:
    """What the xfail above leaves: a program with data breakpoints runs as one without."""
    ends = []
    for dr7 in (0x400, 0x402 | kind << 16):
        with Bench() as bench:
            state = debugged(bench)
            state.dr[0], state.dr[7] = DATA, dr7
            assert bench.run(state, PROGRAM).reason is StopReason.HALT
            after = bench.cpu.get_state()
            ends.append((after.rip, after.gpr, bench.memory.read(DATA, 8)))
    assert ends[0] == ends[1]


def test_io_breakpoints_trap_behind_the_access() -> None:
    with Bench() as bench:
        state = debugged(bench)
        state.cr4 |= 8  # DE
        state.dr[1], state.dr[7] = PORT, 0x408 | 2 << 20
        bench.run(state, b"\xe6\x80\xe6\x82\xf4")
        assert [(at, dr6 & 15) for at, _, dr6 in trapped(bench)] == [(2, 2)]
        assert [offset for offset, _, _ in bench.ports.writes] == [0, 2]


@pytest.mark.xfail(reason="the library does not implement DR7.GD", strict=True)
def test_general_detect() -> None:
    with Bench() as bench:
        state = debugged(bench)
        state.dr[7] = 0x2400
        bench.run(state, b"\x0f\x21\xc0\xf4")  # mov rax, dr0
        assert trapped(bench)


@pytest.mark.parametrize("de", [False, True])
def test_dr4_and_dr5_are_aliases_unless_cr4_de(de: bool) -> None:
    with Bench() as bench:
        state = debugged(bench)
        if de:
            state.cr4 |= 8
        bench.run(state, b"\x0f\x21\xe0\xf4")  # mov rax, dr4
        if de:
            assert bench.vector() == 6
        else:
            assert bench.cpu.get_state().gpr[0] == state.dr[6]
