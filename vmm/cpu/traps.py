"""Events that the engine calls us out for: exceptions, `INT n`, SYSCALL and SYSENTER, odd accesses.

Where the host can have it, machine code (`native`) takes the common ones first.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from vmm.cpu.budget import Budget
from vmm.cpu.context import F_TF, Context
from vmm.cpu.delivery import (
    DEBUG,
    HAS_ERROR_CODE,
    INVALID_OPCODE,
    PROTECTION,
    Delivery,
    Source,
    TripleFault,
)
from vmm.cpu.fastcall import FastCalls
from vmm.cpu.intercept import IRET, MSR, READ_CR8, WRITE_CR8
from vmm.cpu.library import (
    DATA_ERRORS,
    FETCH_ERRORS,
    HOOK_INTERRUPT,
    HOOK_INVALID,
    REG,
    Engine,
    InterruptCallback,
    InvalidCallback,
    SyscallCallback,
    error_name,
)
from vmm.cpu.msrs import Msrs
from vmm.cpu.native import NativeEvents
from vmm.cpu.nmi import NMI, NmiBlock
from vmm.cpu.paging import Fault, Linear
from vmm.cpu.permission import IoPermission
from vmm.cpu.stop import Stop, StopReason
from vmm.cpu.tsc import Tsc
from vmm.memory import RamRegion

DR6_BS = 1 << 14
EXCEPTION_COST = 64
"""Budget spent for each delivered exception, so that endless exceptions end a run too."""


class Traps:
    """Takes the engine's events and delivers them to the guest.

    Args:
        low: the RAM that begins at guest-physical 0.
        nmi: told when one is delivered, and of the IRET behind it.
        tsc: the time-stamp counter.

    Attributes:
        final: the stop that no run goes on from (triple fault), if there was one.
        failure: the first exception that a callback of ours raised, to be raised by the run.
        msrs: what RDMSR, WRMSR and MOV CR8 do where the engine does not.
        count, ns: the events that Python delivered, and the nanoseconds that took.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        linear: Linear,
        budget: Budget,
        low: RamRegion,
        *,
        nmi: NmiBlock,
        tsc: Tsc,
    ) -> None:
        self.final: Stop | None = None
        self.failure: BaseException | None = None
        self.count = self.ns = 0
        self._engine = engine
        self._context = context
        self._budget = budget
        self._words = budget.words
        self._delivery = Delivery(context, linear)
        self.fast = FastCalls(context, linear)
        self._permission = IoPermission(context, linear)
        self.msrs = Msrs(context, linear, tsc)
        self._nmi = nmi
        self._limit = 0
        self._events: NativeEvents | None = None
        self._install(low)

    def fail(self, failure: BaseException) -> None:
        """Keep the first exception of a callback and end the run."""
        if self.failure is None:
            self.failure = failure
        self._budget.end()

    def inject(self, vector: int) -> None:
        """Deliver an external interrupt, between two runs."""
        if self._events is None or not self._events.inject(vector):
            self._context.save()
            self.deliver(vector, None, Source.EXTERNAL)

    def inject_nmi(self) -> None:
        """Deliver an NMI, between two runs, and block further ones."""
        self.inject(NMI)
        self._context.save()
        self._nmi.begin()
        self._context.restore()

    def deliver(self, vector: int, code: int | None, source: Source, note: str = "") -> bool:
        """Deliver into the saved context and load it; True when the run must end."""
        words = self._words
        try:
            self._delivery.deliver(vector, code, source, note)
        except TripleFault as fault:
            self.final = Stop(StopReason.SHUTDOWN, f"triple fault: {fault}")
            return True
        self._context.restore()
        words[0] += EXCEPTION_COST
        if words[0] < words[1]:
            return False
        words[3] = 1
        return True

    # Port accesses at CPL > 0.

    @property
    def denied(self) -> bool:
        """Whether the run ended because of a forbidden port access; `refuse` it then."""
        return self._permission.denied is not None

    def forbids(self, port: int, size: int) -> bool:
        """Whether a program may not use this port; if so the run is on its way out."""
        permission = self._permission
        if permission.denied is None:
            self._limit = self._words[1]
        if not permission.forbids(port, size):
            return False
        self._budget.end()
        return True

    def refuse(self) -> None:
        """Deliver the fault of a forbidden port access; the run may go on afterwards."""
        words = self._words
        fault = self._permission.undo()
        words[1], words[3] = self._limit, 0
        self.deliver(fault.vector, fault.code, Source.EXCEPTION)

    def _install(self, low: RamRegion) -> None:
        engine, budget = self._engine, self._budget
        on_interrupt = InterruptCallback(self._guarded(self._on_interrupt))
        on_syscall = SyscallCallback(self._guarded(self._on_syscall))
        if budget.code is not None:
            self._events = NativeEvents(
                budget.code,
                self._context,
                low,
                words=budget.address,
                cost=EXCEPTION_COST,
                with_code=HAS_ERROR_CODE,
                on_interrupt=on_interrupt,
                on_syscall=on_syscall,
            )
        else:
            engine.hook(HOOK_INTERRUPT, on_interrupt)
            engine.hook_instruction(REG.UC_X86_INS_SYSCALL, on_syscall)
        engine.hook(HOOK_INVALID, InvalidCallback(self._guarded(self._on_invalid)))
        on_sysenter = SyscallCallback(self._guarded(self._on_sysenter))
        engine.hook_instruction(REG.UC_X86_INS_SYSENTER, on_sysenter)

    def _guarded(self, action: Callable[..., Any]) -> Callable[..., Any]:
        fail, stop = self.fail, self._engine.stop

        def guarded(*arguments: Any) -> Any:
            began = perf_counter_ns()
            try:
                return action(*arguments)
            except BaseException as failure:
                fail(failure)
                stop()
                return 1
            finally:
                self.count += 1
                self.ns += perf_counter_ns() - began

        return guarded

    def _on_interrupt(self, _engine: int, vector: int, _data: int) -> None:
        if self.denied:
            self._engine.stop()
            return
        context = self._context
        context.save()
        words, at = context.words, context.at
        if vector > 0xFF:
            ends = self._intercepted(vector)
        elif words[at.is_software_w]:
            words[at.is_software_w] = 0  # the engine forgets to, and believes it at an intercept
            ends = self.deliver(vector, None, Source.SOFTWARE)
        else:
            code = words[at.error_code_w] if vector in HAS_ERROR_CODE else None
            ends = self.deliver(vector, code, Source.EXCEPTION)
        if ends:
            self._engine.stop()

    def _intercepted(self, event: int) -> bool:
        context = self._context
        if event == IRET:
            self._nmi.returns()
            context.restore()
            self._budget.end()  # an NMI may wait for it
            return False
        if event not in (MSR, READ_CR8, WRITE_CR8):
            self.final = Stop(StopReason.ERROR, f"the engine raised event {event:#x}")
            return True
        try:
            self.msrs.instruction(event)
        except Fault as fault:
            return self.deliver(fault.vector, fault.code, Source.EXCEPTION)
        if context.system_flags & F_TF:
            context.longs[context.at.dr + 6] |= DR6_BS
            return self.deliver(DEBUG, None, Source.EXCEPTION)
        context.restore()
        return False

    def _on_invalid(self, _engine: int, _data: int) -> bool:
        if self.denied:
            self._engine.stop()
            return True
        vector = INVALID_OPCODE
        behind = self.fast.after(b"\xf1")  # saves the context
        if behind is not None:
            # The library knows no INT1: a trap, and no software interrupt for the gate's DPL.
            vector, self._context.rip = DEBUG, behind
        if self.deliver(vector, None, Source.EXCEPTION):
            self._engine.stop()
        return True

    def _on_syscall(self, _engine: int, _data: int) -> None:
        self._fast_call(self.fast.syscall, 0x05)

    def _on_sysenter(self, _engine: int, _data: int) -> None:
        self._fast_call(self.fast.sysenter, 0x34)

    def _fast_call(self, action: Callable[[int], int | None], opcode: int) -> None:
        """Do SYSCALL or SYSENTER. The engine adds the instruction's length to RIP afterwards."""
        if self.denied:
            return
        context = self._context
        context.save()
        length = self.fast.length(opcode)
        flags = None
        try:
            flags = action(length)
        except Fault as fault:
            if self.deliver(fault.vector, fault.code, Source.EXCEPTION):
                self._budget.end()
        context.rip -= length
        context.restore()
        if flags is not None:
            self._engine.write(REG.UC_X86_REG_EFLAGS, flags)

    def on_error(self, code: int) -> None:
        """The engine gave up at an access: make it the fault that comes nearest."""
        context = self._context
        context.save()
        if code in FETCH_ERRORS:
            # Device memory holds no code: what it reads as is no instruction.
            self.deliver(INVALID_OPCODE, None, Source.EXCEPTION, "fetch from device memory")
        elif code in DATA_ERRORS:
            # Beyond the physical address space the chipset aborts the access.
            self.deliver(PROTECTION, 0, Source.EXCEPTION, "access beyond physical memory")
        else:
            self.final = Stop(
                StopReason.ERROR, f"the CPU engine stopped at {context.rip:#x}: {error_name(code)}"
            )
