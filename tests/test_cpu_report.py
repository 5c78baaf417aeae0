"""Crash reports."""

from __future__ import annotations

from cpu_bench import CODE, Bench

from vmm.cpu.engine import StopReason
from vmm.cpu.report import LABEL_REACH, code_bits, crash_report, mode_name, symbol_at

SYMBOLS = [(CODE + 0x10, 4, "later"), (CODE, 8, "start")]


def test_a_triple_fault() -> None:
    with Bench() as bench:
        state = bench.long()
        state.idtr.limit = 0
        state.gpr[11] = 0xABCD
        stop = bench.run(
            state,
            bytes.fromhex(
                # nop; push r11; ud2; hlt
                "9041530f0bf4"
            ),
        )
        assert stop.reason is StopReason.SHUTDOWN
        text = crash_report(bench.cpu, SYMBOLS)
        first, *rest = text.splitlines()
        assert first == f"long mode, ring 0, at {CODE + 3:#x} <start+0x3>"
        assert any("r11 000000000000abcd" in line for line in rest)
        assert any("ud2" in line for line in rest)
        assert rest[-1].startswith("stack at 0x3fff8: 000000000000abcd")


def test_a_label_without_a_size_reaches_to_the_next() -> None:
    labels = [(0x100, 0, "first"), (0x120, 0, "second")]
    assert symbol_at(0x11F, labels) == "first+0x1f"
    assert symbol_at(0x120, labels) == "second"
    assert symbol_at(0x99, labels) == ""
    assert symbol_at(0x120 + LABEL_REACH, labels) == ""


def test_where_there_is_no_memory() -> None:
    with Bench() as bench:
        state = bench.long()
        state.rip, state.gpr[4] = 0x700_0000, 0x800_0000
        bench.cpu.set_state(state)
        text = crash_report(bench.cpu)
        assert "code: not in RAM" in text
        assert "stack at 0x8000000: not in RAM" in text


def test_modes() -> None:
    with Bench() as bench:
        names = [
            (mode_name(state), code_bits(state))
            for state in (
                bench.real(),
                bench.protected(),
                bench.protected(bits=16),
                bench.long(user=True),
                bench.long(compat=True),
            )
        ]
        assert names == [
            ("real mode", 16),
            ("32-bit protected mode, ring 0, paging off", 32),
            ("16-bit protected mode, ring 0, paging off", 16),
            ("long mode, ring 3", 64),
            ("compatibility mode, ring 0", 32),
        ]
        for state in (bench.real(), bench.protected()):
            bench.start(state, b"\xf4", CODE)
            assert "hlt" in crash_report(bench.cpu)


def test_symbols() -> None:
    assert symbol_at(CODE, SYMBOLS) == "start"
    assert symbol_at(CODE + 7, SYMBOLS) == "start+0x7"
    assert symbol_at(CODE + 8, SYMBOLS) == ""
    assert symbol_at(CODE + 0x10, SYMBOLS) == "later"
    assert symbol_at(0, SYMBOLS) == ""
    assert symbol_at(5, []) == ""
