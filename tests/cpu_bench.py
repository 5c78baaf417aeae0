"""A bare vCPU for the CPU tests: RAM, two buses with a recording device each, tables by mode.

Physical layout: page tables from 0x1000, GDT 0x8000, IDT 0x9000, TSS 0xA000, code at `CODE`, kernel
stack below `KERNEL_STACK`, user stack below `USER_STACK`. Every interrupt handler is one HLT, at
`HANDLERS` plus the vector, so a delivered event shows as a halt right behind it. Linear addresses
are physical ones, except `WINDOW`, 2 MiB of 4 KiB pages that tests may change.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from devices.bus import Bus, BusType, Range
from vmm.cpu.engine import Cpu, Stop
from vmm.cpu.state import (
    CODE32,
    CODE64,
    DATA32,
    CpuState,
    DescriptorTable,
    Segment,
    flat_segment,
)
from vmm.memory import GuestMemory

GDT, IDT, TSS = 0x8000, 0x9000, 0xA000
HANDLERS, CODE = 0x10000, 0x20000
KERNEL_STACK, USER_STACK, IST_STACK = 0x40000, 0x50000, 0x60000
WINDOW, WINDOW_TABLE = 0x200000, 0x4000
MMIO, PORT = 0xFE00_0000, 0x80

K_CODE64, K_DATA, U_CODE64, U_DATA, U_CODE32, TSS_SELECTOR = 8, 0x10, 0x1B, 0x23, 0x2B, 0x30
K_CODE32, K_CODE16, K_DATA16 = 0x40, 0x48, 0x50

_DESCRIPTORS = {
    K_CODE64: 0x00AF_9B00_0000_FFFF,
    K_DATA: 0x00CF_9300_0000_FFFF,
    U_CODE64 & ~7: 0x00AF_FB00_0000_FFFF,
    U_DATA & ~7: 0x00CF_F300_0000_FFFF,
    U_CODE32 & ~7: 0x00CF_FB00_0000_FFFF,
    TSS_SELECTOR: 0x0000_8B00_A000_0067,
    K_CODE32: 0x00CF_9B00_0000_FFFF,
    K_CODE16: 0x008F_9B00_0000_FFFF,
    K_DATA16: 0x008F_9300_0000_FFFF,
}


class Recorder:
    """A device that remembers accesses and answers with `answer`."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.answer: Callable[[int, int], int] = lambda _offset, _size: 0x42
        self.on_write: Callable[[int, int, int], None] = lambda *_: None

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        self.on_write(offset, size, value)


class Bench:
    """A CPU with everything around it; use as a context manager."""

    native = True
    """What `Cpu` gets if nothing else is asked for; the fixture `both_paths` changes it."""

    def __init__(
        self,
        size: int = 16 << 20,
        native: bool | None = None,
        counts: bool = True,
        tsc: Callable[[], int] | None = None,
    ) -> None:
        self.memory = GuestMemory(size)
        self.ports, self.mmio = Recorder(), Recorder()
        self.port_bus = Bus(BusType.PIO, 0x10000)
        self.port_bus.insert(Range(PORT, 8), self.ports, "ports")
        self.mmio_bus = Bus(BusType.MMIO)
        self.mmio_bus.insert(Range(MMIO, 0x1000), self.mmio, "mmio")
        native = self.native if native is None else native
        self.cpu = Cpu(
            self.memory, self.port_bus, self.mmio_bus, native=native, counts=counts, tsc=tsc
        )
        self.memory.write(HANDLERS, b"\xf4" * 256)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu.close()
        self.memory.close()

    def put(self, address: int, *longs: int) -> None:
        self.memory.write(address, struct.pack(f"<{len(longs)}Q", *longs))

    def words(self, address: int, count: int, size: int = 8) -> list[int]:
        kind = {2: "H", 4: "I", 8: "Q"}[size]
        return list(struct.unpack(f"<{count}{kind}", self.memory.read(address, count * size)))

    def start(self, state: CpuState, code: bytes, address: int = CODE) -> None:
        """Put code where RIP of `state` is, and load the state."""
        self.memory.write(address, code)
        self.cpu.set_state(state)

    def run(self, state: CpuState, code: bytes, budget: int = 100_000) -> Stop:
        self.start(state, code, state.cs.base + state.rip)
        return self.cpu.run(budget)

    # Modes.

    def real(self) -> CpuState:
        """CS:IP = CODE, SS:SP below 0x30000, every vector of the IVT at its handler."""
        for vector in range(256):
            self.memory.write(4 * vector, struct.pack("<HH", vector, HANDLERS >> 4))
        state = CpuState()
        state.cs = Segment(CODE >> 4, CODE, 0xFFFF, 0x9B00)
        state.ss = Segment(0x2000, 0x20000, 0xFFFF, 0x9300)
        state.rip, state.gpr[4] = 0, 0x8000
        return state

    def _tables(self, state: CpuState, user: bool, code: int, wide: int) -> None:
        for selector, descriptor in _DESCRIPTORS.items():
            self.put(GDT + selector, descriptor)
        state.gdtr = DescriptorTable(GDT, 0x5F)
        state.rip = CODE
        data = U_DATA if user else K_DATA
        dpl = 0x6000 if user else 0
        for name in ("ss", "ds", "es", "fs", "gs"):
            setattr(state, name, flat_segment(data, DATA32 | dpl))
        state.cs = flat_segment(code, wide | dpl)
        state.tr = Segment(TSS_SELECTOR, TSS, 0x67, 0x8B00)
        state.gpr[4] = USER_STACK if user else KERNEL_STACK

    def protected(self, user: bool = False, bits: int = 32) -> CpuState:
        """Protected mode without paging; interrupt gates of DPL 0."""
        state = CpuState()
        self._tables(state, user, U_CODE32 if user else K_CODE32, CODE32)
        if bits == 16:
            state.cs = Segment(K_CODE16, 0, 0xFFFF_FFFF, 0x8F9B00)
            state.ss = Segment(K_DATA16, 0, 0xFFFF_FFFF, 0x8F9300)
        state.cr0 = 0x11
        state.idtr = DescriptorTable(IDT, 0x7FF)
        self.memory.write(TSS, struct.pack("<III", 0, KERNEL_STACK, K_DATA))
        for vector in range(256):
            self.gate32(vector)
        return state

    def gate32(self, vector: int, kind: int = 14, dpl: int = 0, selector: int = K_CODE32) -> None:
        offset = HANDLERS + vector
        access = 0x80 | dpl << 5 | kind
        self.put(
            IDT + 8 * vector,
            offset & 0xFFFF | selector << 16 | access << 40 | (offset >> 16) << 48,
        )

    def long(self, user: bool = False, compat: bool = False) -> CpuState:
        """Long mode, identity-mapped up to 16 MiB, and 4 GiB - 32 MiB up (MMIO)."""
        state = CpuState()
        self._tables(state, user, U_CODE64 if user else K_CODE64, CODE64)
        if compat:
            state.cs = flat_segment(U_CODE32 if user else K_CODE32, CODE32 | (0x6000 * user))
        self.put(0x1000, 0x2007)
        self.put(0x2000, 0x3007, 0, 0, 0x5007)
        self.put(0x3000, 0x87, WINDOW_TABLE | 7, *((i << 21 | 0x87) for i in range(2, 8)))
        self.put(WINDOW_TABLE, *((WINDOW + (i << 12) | 7) for i in range(512)))
        self.put(0x5000 + 8 * 0x1F0, MMIO | 0x97)
        state.cr0, state.cr3, state.cr4, state.efer = 0x8001_0011, 0x1000, 0x620, 0xD01
        state.idtr = DescriptorTable(IDT, 0xFFF)
        self.memory.write(TSS, bytes(4) + struct.pack("<Q", KERNEL_STACK))
        self.put(TSS + 36, IST_STACK)
        for vector in range(256):
            self.gate64(vector)
        return state

    def gate64(self, vector: int, kind: int = 14, dpl: int = 0, ist: int = 0) -> None:
        offset = HANDLERS + vector
        access = 0x80 | dpl << 5 | kind
        self.put(
            IDT + 16 * vector,
            offset & 0xFFFF | K_CODE64 << 16 | ist << 32 | access << 40 | (offset >> 16) << 48,
            0,
        )

    def vector(self) -> int:
        """The vector whose handler halted the CPU."""
        state = self.cpu.get_state()
        where = state.cs.base + state.rip - 1 - HANDLERS
        assert 0 <= where < 256, hex(state.cs.base + state.rip)
        return where
