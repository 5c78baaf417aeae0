"""The vCPU: runs guest code, stops exactly, delivers exceptions and interrupts.

One engine serves every mode of the CPU. Guest RAM is mapped into it; everything else of the
physical space is I/O, answered by the two buses. All of it happens on the thread that calls `run`;
only `kick` may be called from another.

What the engine leaves to us, and where it is done: exceptions and interrupts (`traps`,
`delivery`), SYSCALL and SYSENTER (`fastcall`), CPUID (`cpuid`), stops (`budget`), the hidden state
(`registers`).

Callbacks are called by machine code and must not raise: each catches everything, the first
failure ends the run, and `run` raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from devices.bus import Bus
from vmm.cpu.accelerator import accelerate, available
from vmm.cpu.access import install_cpuid, install_io, install_tsc
from vmm.cpu.budget import NO_LIMIT, Budget
from vmm.cpu.context import F_IF, Context
from vmm.cpu.layout import H_SHADOW
from vmm.cpu.leaving import LEFT, leaving_of, places
from vmm.cpu.library import REG, Engine
from vmm.cpu.live import hidden_flags, registers
from vmm.cpu.nmi import NmiBlock
from vmm.cpu.paging import Linear, Physical
from vmm.cpu.registers import Registers
from vmm.cpu.state import CpuState
from vmm.cpu.stop import Stop, StopReason
from vmm.cpu.translations import invalidate
from vmm.cpu.traps import EXCEPTION_COST, Traps
from vmm.cpu.tsc import Tsc
from vmm.cpu.virq import Virq, fields
from vmm.memory import GuestMemory

__all__ = ["EXCEPTION_COST", "STEP_COST", "Cpu", "Stop", "StopReason"]

STEP_COST = 4
"""What `Cpu.step` adds to the virtual clock for each instruction."""

_STEP_LIMIT = 64 * EXCEPTION_COST
"""Ends a step of an instruction that can never be fetched; more than any block has bytes."""

_BUDGET = Stop(StopReason.BUDGET)
_HALT = Stop(StopReason.HALT)
_REQUESTED = Stop(StopReason.REQUESTED)
_STEPPED = Stop(StopReason.BUDGET)
_RETURNS = Stop(StopReason.BUDGET)  # before the IRET that ends an NMI


class Cpu:
    """One vCPU over a guest memory and two buses; it begins in the state after reset.

    Args:
        memory: its regions are mapped here; close it after the CPU.
        ports: answers IN and OUT.
        mmio: answers every physical address that is not RAM, up to 2**40.
        native: False does without machine code (`native`) and the accelerator.
        counts: False leaves out the count of executed bytes, which costs a tenth of the speed of
            short blocks, until the first run that has a budget; only where the engine allows it.
        tsc: clock of the time-stamp counter; None leaves RDTSC to the engine: the host's counter.

    Raises:
        CalibrationError: this build of the library cannot be used.
    """

    def __init__(
        self,
        memory: GuestMemory,
        ports: Bus,
        mmio: Bus,
        *,
        native: bool = True,
        counts: bool = True,
        tsc: Callable[[], int] | None = None,
    ) -> None:
        self.halted = False
        self._kicked = False
        self._requested = False
        self._running = self._stepping = False
        self._virq: Virq | None = None
        self._regions = [(region.start, region.end) for region in memory.regions]
        self._engine = engine = Engine()
        for region in memory.regions:
            engine.map_ram(region.start, region.size, region.address)
        self._accelerated = native and available()
        self._leaving = None if counts or not self._accelerated else leaving_of(engine)
        self._budget = Budget(engine, native, self._leaving)
        self._words = self._budget.words
        self._context = context = Context(engine)
        self._physical = Physical(memory, mmio)
        self._linear = Linear(context, self._physical)
        self._nmi = NmiBlock(context)
        self._tsc = Tsc(tsc or (lambda: 0))
        self._registers = Registers(context, self._budget, self._nmi, self._tsc)
        low = memory.regions[0]
        self.traps = traps = Traps(
            engine, context, self._linear, self._budget, low, nmi=self._nmi, tsc=self._tsc
        )
        hidden = hidden_flags(context, direct=native)
        install_io(
            engine,
            self._regions,
            ports,
            mmio,
            hidden=hidden,
            forbids=traps.forbids,
            fail=traps.fail,
        )
        install_cpuid(engine, context, traps.fail)
        if tsc is not None:
            live = registers(context, direct=native)
            install_tsc(engine, context, self._tsc.read, traps.fail, live)
        accelerate(engine, self._accelerated)
        self.set_state(CpuState())

    def close(self) -> None:
        """Free the engine and let go of guest memory; harmless when repeated."""
        if self._engine.handle is not None:
            self._budget.leaving = None  # a late kick finds no engine
            self._engine.close()
            self._physical.close()

    # State.

    def get_state(self) -> CpuState:
        """All architectural registers, as of the last instruction boundary."""
        return self._registers.capture(self.halted)

    def set_state(self, state: CpuState) -> None:
        """Take up `state`, and drop every cached translation of addresses and code.

        Raises:
            UserError: the state is damaged; it names the field, and nothing was changed.
        """
        self._registers.load(state)
        self.halted = state.halted
        self.traps.final = None
        self._requested = False

    @property
    def counts(self) -> bool:
        """Whether `executed` counts."""
        return self._budget.counts

    def count(self) -> None:
        """Count executed bytes from now on; between runs."""
        if not self.counts:
            self._leaving = self._virq = None
            self._budget.count()
            self._engine.flush_translations()

    @property
    def executed(self) -> int:
        """Bytes of guest code executed since this object was made: the virtual clock.

        It grows by the size of each translated block at the block's start, and by
        `EXCEPTION_COST` for each delivered exception or interrupt.
        """
        return self._words[0]

    @executed.setter
    def executed(self, value: int) -> None:
        """Go on counting from here; only between runs (a snapshot is restored)."""
        self._words[0] = value

    # Running.

    def run(self, budget: int | None = None, *, interrupt: bool = False) -> Stop:
        """Run until about `budget` bytes of code were executed or something else stops the CPU.

        A stop by budget or `kick` falls on the start of a block: no instruction is run twice or
        skipped. The last block may overdraw the budget by its own size (less than 4 KiB).

        Args:
            interrupt: an interrupt waits that the guest does not take yet; see `delivers`.
        """
        if budget is not None:
            self.count()
        virq = self._virq
        if virq is None:
            return self._run(NO_LIMIT if budget is None else budget, 0)
        if interrupt:
            virq.arm()
        try:
            return self._run(NO_LIMIT, 0)
        finally:
            virq.disarm()

    def step(self, count: int = 1) -> Stop:
        """Execute exactly `count` instructions; slow, it drops all translated code.

        What counts: each iteration of a repeated string instruction, and an instruction that
        faults (delivering the fault belongs to it). Other stops end a step early. The virtual
        clock advances by `STEP_COST` for each instruction.
        """
        for _ in range(count):
            before = self._words[0]
            # A counted run does not tell whether it ended by its count or by HLT.
            after_halt = self.traps.fast.after(b"\xf4")
            stop = self._step()
            self._words[0] = before + STEP_COST
            if self._engine.read(REG.UC_X86_REG_RIP) == after_halt:
                self.halted = True
                return _HALT
            if stop is not _STEPPED:
                return stop
        return _BUDGET

    def _step(self) -> Stop:
        """One instruction, also if somebody kicks meanwhile, or it is the IRET of an NMI."""
        while True:
            self._kicked = False  # whoever kicked looks again by himself
            before = self._words[0]
            stop = self._run(_STEP_LIMIT, 1)
            if stop is not _RETURNS and (stop is not _BUDGET or self._words[0] != before):
                return stop

    def _run(self, budget: int, count: int) -> Stop:
        traps = self.traps
        if traps.final is not None:
            return traps.final
        if self.halted:
            return _HALT
        engine, words = self._engine, self._words
        if bool(count) is not self._stepping:
            # The library drops translated code only when it stops counting.
            self._stepping = bool(count)
            accelerate(engine, self._accelerated and not count)
            engine.flush_translations()
            self._budget.leaving = None if count else self._leaving
        leaving = self._budget.leaving
        self._budget.arm(min(budget, NO_LIMIT))
        while True:
            self._running = True
            if self._kicked:  # it came before the limit was set, or between two starts
                self._running = self._kicked = False
                return _BUDGET
            code = engine.start(engine.read(REG.UC_X86_REG_RIP), count)
            self._running, kicked, self._kicked = False, self._kicked, False
            if traps.failure is not None:
                failure, traps.failure = traps.failure, None
                raise failure
            if traps.denied:
                stop = self._refused(count, kicked)
                if stop is not None:
                    return stop
                continue
            if leaving is not None and code == LEFT:
                ended = leaving.halted()
            else:
                if code:
                    traps.on_error(code)
                # Nothing asked the engine to stop, and yet it did: HLT, or a counted run's end.
                ended = not code and not words[3]
            if traps.final is not None:
                return traps.final
            if ended and not count:
                self.halted = True
            if self._requested:
                self._requested = False
                return _REQUESTED
            if self._nmi.ended_run():
                return _RETURNS
            if words[3] or (leaving is not None and kicked):
                return _BUDGET
            if ended:
                return _STEPPED if count else _HALT

    def _refused(self, count: int, kicked: bool) -> Stop | None:
        """A forbidden port access ended the run: deliver its fault; None: go on."""
        self.traps.refuse()
        if self.traps.final is not None:
            return self.traps.final
        if self._requested:
            self._requested = False
            return _REQUESTED
        if count:
            return _STEPPED
        return _BUDGET if kicked or self._words[3] else None

    def kick(self) -> None:
        """From any thread: end the current run before its next block, or else the next run.

        From another thread it must be repeated while it is `unheard`.
        """
        self._kicked = True
        self._budget.end()

    def unheard(self) -> bool:
        """Whether a run goes on that was kicked: perhaps it had not really begun then."""
        return self._running and self._kicked

    def stop_now(self) -> None:
        """From a bus callback: end the run before the next block, as REQUESTED.

        The access is complete and the few instructions up to the end of its block still run, HLT
        among them (then `halted` is set). No exact earlier stop exists: the library's own without
        the accelerator repeats the next access to memory, also to device memory.
        """
        self._requested = True
        self._budget.end()

    # Interrupts.

    def interruptible(self) -> bool:
        """Whether an external interrupt can be taken now: IF is set, and no shadow."""
        context = self._context
        context.save()
        return bool(context.system_flags & F_IF and not context.hidden & H_SHADOW)

    def deliver_by(self, acknowledge: Callable[[], int]) -> None:
        """Have interrupts delivered within a run, in the moment that the guest takes them.

        It is that exactly: behind the instruction after STI, at once behind POPF and IRET. Only
        a CPU that does not count can, and not while it steps; see `delivers`.

        Args:
            acknowledge: asked for the vector in that moment; as little as a bus callback may.
        """
        at, found = self._leaving and places(), fields()
        if at and found and not self.counts:
            self._virq = Virq(self._engine, at, found, acknowledge, self.traps.fail)

    @property
    def delivers(self) -> bool:
        """Whether a run delivers interrupts by itself."""
        return self._virq is not None

    def interrupt_waits(self) -> bool:
        """From a bus callback: have this run deliver one. Whether it will."""
        virq = self._virq
        if virq is None or self._stepping or not self._running:
            return False
        virq.arm()
        return True

    def interrupt_withdrawn(self) -> None:
        """From a bus callback: none waits any more."""
        if self._virq is not None:
            self._virq.disarm()

    def inject(self, vector: int) -> Stop | None:
        """Enter the handler of an external interrupt and wake from HLT.

        Only between runs, and only when `interruptible`.

        Returns:
            None, or the SHUTDOWN stop if that ended in a triple fault.
        """
        self.halted = False
        self.traps.inject(vector)
        return self.traps.final

    def takes_nmi(self) -> bool | None:
        """Whether an NMI can be taken now; None: behind the next instruction. Between runs."""
        return self._nmi.window()

    def inject_nmi(self) -> Stop | None:
        """Enter the handler of a non-maskable interrupt and wake from HLT.

        Only between runs, and only when it `takes_nmi`; it does no more until IRET.
        """
        self.halted = False
        self.traps.inject_nmi()
        return self.traps.final

    def set_a20(self, is_open: bool) -> None:
        """Open or close the A20 gate: closed, address bit 20 is always 0. Also in bus callbacks."""
        self._context.set_a20(is_open)

    # Memory.

    def translate(self, linear: int) -> int | None:
        """Where a linear address lies in physical memory; None if it is not mapped.

        Like a real access it sets accessed bits.
        """
        self._context.save()
        return self._linear.place_of(linear)

    def read_linear(self, address: int, length: int) -> bytes:
        """RAM at a linear address, for reports: as many of the bytes as are mapped."""
        self._context.save()
        return self._linear.peek(address, length)

    def invalidate(self, address: int, length: int) -> None:
        """Forget code translated from this guest-physical range, because a device wrote there.

        May be called between runs and in bus callbacks. Parts that are not RAM are ignored.
        """
        invalidate(self._context, self._regions, ((address, address + length),))

    def invalidate_pages(self, runs: Sequence[tuple[int, int]]) -> None:
        """The same for runs of pages of 4 KiB: (number of the first, how many)."""
        ranges = [(first << 12, first + count << 12) for first, count in runs]
        invalidate(self._context, self._regions, ranges)
