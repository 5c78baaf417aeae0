"""Exceptions, system calls and interrupts: round trips through handlers that only return.

64-bit code with flat tables at fixed places of a small memory; the CPU is driven directly.
"""

from __future__ import annotations

import struct
from time import perf_counter
from typing import Self

from devices.bus import Bus, BusType
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, Mode
from vmm.cpu.engine import Cpu, StopReason
from vmm.cpu.state import CpuState, DescriptorTable, Segment
from vmm.memory import GuestMemory

IDT, GDT, TSS = 0x300000, 0x301000, 0x302000
RETURN, SYSRET, USER_STACK, KERNEL_STACK = 0x303000, 0x303010, 0x310000, 0x318000
VECTOR = 0x40
_STAR, _LSTAR = 0xC000_0081, 0xC000_0082
_USER_CODE, _USER_DATA = 0x33, 0x2B
_SELECTORS = (
    0,
    0,
    0x00AF9B000000FFFF,  # 0x10: kernel code
    0x00CF93000000FFFF,  # 0x18: kernel data
    0x00CFFB000000FFFF,  # 0x20: user code, 32 bits (SYSRET counts from here)
    0x00CFF3000000FFFF,  # 0x28: user data
    0x00AFFB000000FFFF,  # 0x30: user code
)


def _gate(handler: int, dpl: int) -> bytes:
    return struct.pack(
        "<HHBBHII", handler & 0xFFFF, 0x10, 0, 0x8E | dpl << 5, handler >> 16 & 0xFFFF, 0, 0
    )


class EventBench:
    """A CPU without devices.

    Args:
        count: events in each measured loop.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory = GuestMemory(16 << 20)
        self._cpu = Cpu(self._memory, Bus(BusType.PIO, 1 << 16), Bus(BusType.MMIO))
        self._state = load(self._memory, b"\xf4", BootOptions(mode=Mode.LONG)).state
        # Every page may be used by ring 3 too: set the U/S bit throughout the loader's tables.
        for place in range(self._state.cr3, self._state.cr3 + 0x6000, 8):
            (entry,) = struct.unpack("<Q", self._memory.read(place, 8))
            if entry & 1:
                self._memory.write(place, struct.pack("<Q", entry | 4))
        for vector in (3, VECTOR):
            self._memory.write(IDT + 16 * vector, _gate(RETURN, 3))
        self._memory.write(GDT, struct.pack("<7Q", *_SELECTORS))
        self._memory.write(TSS + 4, struct.pack("<Q", KERNEL_STACK))
        self._memory.write(RETURN, b"\x48\xcf")  # iretq
        self._memory.write(SYSRET, b"\x48\x0f\x07")  # sysretq

    def round(self) -> dict[str, float]:
        """Microseconds for one event of each kind, there and back."""
        return {
            "exception": self._loop(b"\xcc", ring=0),  # int3
            "exception, ring 3": self._loop(b"\xcc", ring=3),
            "system call": self._loop(b"\x0f\x05", ring=3),
            "interrupt": self._interrupts(),
        }

    def _start(self, code: bytes, ring: int) -> None:
        state = CpuState(**vars(self._state))
        state.idtr, state.gdtr = DescriptorTable(IDT, 0xFFF), DescriptorTable(GDT, 0x37)
        state.tr = Segment(0x40, TSS, 0x67, 0x008B00)
        code_segment = (0x10, 0xAF9B00) if ring == 0 else (_USER_CODE, 0xAFFB00)
        data_segment = (0x18, 0xCF9300) if ring == 0 else (_USER_DATA, 0xCFF300)
        state.cs = Segment(code_segment[0], 0, 0xFFFF_FFFF, code_segment[1])
        state.ss = Segment(data_segment[0], 0, 0xFFFF_FFFF, data_segment[1])
        state.efer |= 1
        state.msrs = {_STAR: 0x0023 << 48 | 0x0010 << 32, _LSTAR: SYSRET}
        state.gpr = [0] * 16
        state.gpr[4] = USER_STACK
        state.gpr[15] = self._count
        self._memory.write(state.rip, code)
        self._cpu.set_state(state)

    def _loop(self, event: bytes, ring: int) -> float:
        """`event` in a loop that counts R15 down and then touches what ends the run."""
        back = b"\x49\xff\xcf\x75" + struct.pack("<b", -(len(event) + 5))  # dec r15; jnz
        # In ring 3 HLT is a privileged instruction: the run ends with the triple fault it leads to.
        self._start(event + back + b"\xf4", ring)
        began = perf_counter()
        while self._cpu.run(1 << 40).reason is StopReason.BUDGET:
            pass
        return (perf_counter() - began) / self._count * 1e6

    def _interrupts(self) -> float:
        """Wake from HLT by an external interrupt, return, halt again."""
        self._start(b"\xfb\xf4\xeb\xfd", 0)  # sti; hlt; jmp to the hlt
        cpu = self._cpu
        cpu.run(1 << 40)
        began = perf_counter()
        for _ in range(self._count):
            cpu.inject(VECTOR)
            cpu.run(1 << 40)
        return (perf_counter() - began) / self._count * 1e6

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cpu.close()
        self._memory.close()
