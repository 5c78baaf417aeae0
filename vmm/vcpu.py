"""The vCPU loop: the one place where guest execution, interrupts, events and stops meet.

Each turn: handle what is due, deliver an interrupt if the guest can take one, run the engine until
something wants attention, look at why it stopped. Every request to stop is only noted
(`VcpuLoop.stop`) and acted on here, between two instructions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import msgspec

from devices.irqchip.pc import IrqChip
from vmm.clock import MachineClock
from vmm.cpu.engine import Cpu, Stop, StopReason
from vmm.events import EventLoop
from vmm.outcome import Ending, Outcome

UNLIMITED = 1 << 62
"""A budget that ends only when somebody kicks the CPU."""
SWITCH_INTERVAL = 5e-4
"""Seconds for which the vCPU thread may keep the interpreter from the watcher, which brings the
guest's timers; a guest that reads its clock in a loop is back in Python at once each time."""
WINDOW_FIRST = 256
WINDOW_MAX = 16 << 10
"""Budgets, in bytes of code, while an interrupt waits for the guest to enable interrupts."""
WINDOW_SECONDS = 30e-6
"""The same for a CPU that does not count its code."""


@dataclass
class InterruptWindow:
    """When an interrupt that the guest does not take yet is offered again; part of a snapshot.

    Attributes:
        size: bytes of code until the next look.
        look_at: the count of executed bytes at which that is.
    """

    size: Annotated[int, msgspec.Meta(ge=WINDOW_FIRST, le=WINDOW_MAX)] = WINDOW_FIRST
    look_at: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0


@dataclass
class VcpuStats:
    """Where the time of the runs went, in seconds, and how often.

    Attributes:
        total: in `VcpuLoop.run`.
        executing: of that, in the CPU, with all that it calls (devices, exceptions).
        idle: of that, waiting while the guest was halted or suspended.
    """

    slices: int = 0
    interrupts: int = 0
    idle_waits: int = 0
    total: float = 0.0
    executing: float = 0.0
    idle: float = 0.0


class VcpuLoop:
    """Runs one vCPU on the calling thread.

    Args:
        between: called between slices when anything was handled; does what must not be done
            inside an engine callback (offering input to a device, for example).
        crash_report: makes the several lines for a crash, of which it is told the cause.
    """

    def __init__(
        self,
        cpu: Cpu,
        events: EventLoop,
        irqchip: IrqChip,
        clock: MachineClock,
        *,
        between: Callable[[], None],
        crash_report: Callable[[str], str],
    ) -> None:
        self.stats = VcpuStats()
        self.suspended = False
        self.attention = False
        """Set, with a kick, by whoever wants `between` to be called soon."""
        self._cpu = cpu
        self._events = events
        self._irqchip = irqchip
        self._clock = clock
        self._slice = UNLIMITED
        self._between = between
        self._crash_report = crash_report
        self._outcome: Outcome | None = None
        self.window = InterruptWindow()
        self._waits = False
        self._inside = False
        """The guest runs: whatever comes up now comes from an access of its own."""
        self._waited = False
        """Nothing was looked at since a wait, which may have ended by a resume."""
        self._charged = 0.0
        cpu.deliver_by(self._taken)
        cpu.traps.msrs.apic = irqchip.lapic
        irqchip.on_pending, irqchip.on_withdrawn = self._interrupt_waits, cpu.interrupt_withdrawn

    def stop(self, outcome: Outcome) -> None:
        """End the run with `outcome` as soon as the guest is between two instructions.

        The first to ask wins, except that a device failure is never hidden by an ordinary end.
        """
        if self._outcome is None or (
            outcome.ending is Ending.DEVICE_FAILED
            and self._outcome.ending is not Ending.DEVICE_FAILED
        ):
            self._outcome = outcome
        self._cpu.stop_now()
        self._events.interrupt()

    @property
    def stopping(self) -> bool:
        return self._outcome is not None

    def take_outcome(self) -> Outcome:
        """The outcome that was asked for, once; the next `run` starts without one."""
        outcome, self._outcome = self._outcome, None
        assert outcome is not None
        return outcome

    def run(self, budget: int = UNLIMITED, steps: int | None = None) -> None:
        """Run until `stop` was called.

        Args:
            budget: bytes of code after which the run pauses at the next block.
            steps: exactly this many instructions (slow); overrides `budget`.
        """
        cpu, events, clock = self._cpu, self._events, self._clock
        if budget < UNLIMITED:
            cpu.count()
        last = cpu.executed + budget
        stats = self.stats
        self._charged = perf_counter()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            while not self._turn_ends(last, steps):
                if self._waited or cpu.halted:
                    continue
                events.watch()
                stats.slices += 1
                began = perf_counter()
                self._inside = True
                if steps is None:
                    stop = cpu.run(self._budget(last), interrupt=self._waits)
                else:
                    stop = cpu.step(1)
                    steps -= 1
                self._inside = False
                stats.executing += perf_counter() - began
                if stop.reason in (StopReason.SHUTDOWN, StopReason.ERROR):
                    self._crashed(stop)
        finally:
            self._inside = False
            clock.pause()
            sys.setswitchinterval(interval)
            self._charge()

    def _charge(self) -> None:
        """Bring `VcpuStats.total` up to now: whoever looks between two slices finds it whole."""
        now = perf_counter()
        self.stats.total += now - self._charged
        self._charged = now

    def _budget(self, last: int) -> int | None:
        """Bytes of code until the next look; None: until somebody kicks the CPU."""
        if not self._cpu.counts:
            return None
        return min(self._slice, last - self._cpu.executed, self._clock.budget_until_next())

    def _turn_ends(self, last: int, steps: int | None) -> bool:
        """All that happens between two slices; True when the run is over."""
        cpu, irqchip = self._cpu, self._irqchip
        self._waited = False
        if self._events.poll(0.0) or self.attention:
            self.attention = False
            self._charge()
            self._between()
        self._clock.run_due()
        if self._outcome is not None:
            return True
        if self.suspended:
            self._wait()
            return False
        self._clock.resume()  # a suspend, also that of a snapshot, has stopped it
        self._slice, self._waits = UNLIMITED, False
        takes_nmi = cpu.takes_nmi() if irqchip.nmi_pending() else False
        if takes_nmi and irqchip.take_nmi():
            self._delivered(cpu.inject_nmi())
        if takes_nmi is None:
            self._slice = 1  # to behind the next instruction
            self._events.look_within(WINDOW_SECONDS)
        elif irqchip.pending() and self._outcome is None:
            self._offer_interrupt()
        if self._outcome is None:
            if cpu.executed >= last or steps == 0:
                self.stop(Outcome(Ending.PAUSED))
            elif cpu.halted:  # a waiting interrupt that can be taken has woken it
                self._halted()
        return self._outcome is not None

    def _halted(self) -> None:
        """Nothing to run: skip or sleep until something happens; or the guest is finished."""
        if not self._cpu.interruptible():
            self.stop(Outcome(Ending.HALTED))
        elif not self._clock.skip_to_next():
            self._wait()

    def _offer_interrupt(self) -> None:
        """Deliver the pending interrupt if the guest takes it now, or look again later.

        When to look again is a count of executed bytes and not "when the loop comes by": with a
        virtual clock the guest must be interrupted at the same instruction however often the
        machine is stopped in between. A CPU that does not count delivers it by itself, or is looked
        at by the clock.
        """
        cpu, window = self._cpu, self.window
        if not cpu.counts:
            if cpu.interruptible():
                self._deliver_interrupt()
            self._waits = self._irqchip.pending()
            if self._waits and not cpu.delivers:
                self._events.look_within(WINDOW_SECONDS)
        elif not cpu.halted and cpu.executed < window.look_at:
            self._slice = window.look_at - cpu.executed
        elif cpu.interruptible():
            window.size, window.look_at = WINDOW_FIRST, 0
            self._deliver_interrupt()
            if self._irqchip.pending():
                window.look_at = cpu.executed + WINDOW_FIRST
                self._slice = WINDOW_FIRST
        else:
            self._slice = window.size
            window.look_at = cpu.executed + window.size
            window.size = min(window.size * 2, WINDOW_MAX)

    def _interrupt_waits(self) -> None:
        """An interrupt or NMI begins to wait; outside of a run it is offered before the next."""
        if self._inside and (self._irqchip.nmi_pending() or not self._cpu.interrupt_waits()):
            self._cpu.kick()

    def _deliver_interrupt(self) -> None:
        self._delivered(self._cpu.inject(self._acknowledge()))

    def _acknowledge(self) -> int:
        self.stats.interrupts += 1
        return self._irqchip.acknowledge()

    def _taken(self) -> int:
        """The guest takes an interrupt in the middle of a run."""
        vector = self._acknowledge()
        if self._irqchip.pending():
            self._cpu.kick()  # there is another one, which nothing announces
        return vector

    def _delivered(self, stop: Stop | None) -> None:
        if stop is not None:
            self._crashed(stop)

    def _crashed(self, stop: Stop) -> None:
        self.stop(Outcome(Ending.CRASHED, stop.detail, report=self._crash_report(stop.detail)))

    def _wait(self) -> None:
        begin = perf_counter()
        self._events.poll(None)
        self.attention = self._waited = True
        self.stats.idle += perf_counter() - begin
        self.stats.idle_waits += 1
