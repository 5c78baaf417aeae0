"""The local APIC of the only CPU: its registers in memory, its priorities, its timer.

Rules:
- The registers are 32 bits wide, one in each 16 bytes. Narrower reads inside these four bytes get
  their part; all other accesses read 0 or are dropped: SDM 10.4.1 leaves both to the model.
- What is *requested* (IRR) goes *in service* (ISR) when the CPU takes it. The CPU is asked only if
  the class of the highest request (vector / 16) is above the processor priority (10.8.3.1).
- Software-disabled (SVR bit 8 clear, as after power-up) the APIC keeps what it has, takes and
  gives no vectors (10.4.7.2) and lets LINT0 and LINT1 through to the CPU as INTR and NMI, which the
  manual has only for the APIC that is disabled in IA32_APIC_BASE (10.4.3). So a guest that knows
  only the 8259 needs no firmware that opens the way for it.
- There is no other CPU: what is sent to others reaches nobody, and of the messages only fixed,
  lowest priority, NMI and INIT do anything. A start-up IPI is for a CPU that waits for one, and
  this one does not, also after INIT (SDM volume 3A, 8.4.1: the bootstrap processor).

Source: Intel SDM volume 3A, chapter 10; the numbers in parentheses are its sections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from devices.bus import BusDevice, BusType
from devices.clock import Clock
from devices.contract import Device, DeviceHost, Region
from devices.irqchip import x2apic
from devices.irqchip.apic_registers import (
    APIC_BASE,
    BROADCAST,
    ICR_ASSERT,
    ICR_WRITABLE,
    LOWEST_VECTOR,
    LVT_WRITABLE,
    ApicMode,
    DeliveryMode,
    Entry,
    Esr,
    Lvt,
    Shorthand,
    Svr,
)
from devices.irqchip.lapic_registers import RegisterFile, Window
from devices.irqchip.lapic_state import LapicState, from_words, to_words
from devices.irqchip.lapic_timer import ApicTimer

NONE = -1

# An operation on an IntFlag or IntEnum costs a microsecond; these are the bits of the access path.
_ENABLE = int(Svr.ENABLE)
_MASKED = int(Entry.MASKED)
_LEVEL = int(Entry.LEVEL)
_REMOTE_IRR = int(Entry.REMOTE_IRR)
_LOGICAL = int(Entry.LOGICAL)
_LINT0, _TIMER, _ERROR = int(Lvt.LINT0), int(Lvt.TIMER), int(Lvt.ERROR)
_FIXED, _NMI, _INIT = int(DeliveryMode.FIXED), int(DeliveryMode.NMI), int(DeliveryMode.INIT)
_LOWEST, _EXTINT = int(DeliveryMode.LOWEST_PRIORITY), int(DeliveryMode.EXTINT)
_OTHERS, _TO_ADDRESS = int(Shorthand.OTHERS), int(Shorthand.NONE)
_VECTOR_BIT = tuple(1 << vector for vector in range(256))


def _nobody(*_: object) -> None:
    """A wire that leads nowhere."""


class LocalApic(Device):
    """One local APIC.

    Args:
        clock: the machine's.
        changed: called when `request`, `extint` or a waiting NMI may have changed.
        broadcast_eoi: called with the vector of a level-triggered interrupt that has ended.
        reachable: called when a message that was refused before might now be accepted.
        on_init: called when an INIT arrived; the registers are reset already (10.4.7.3).

    Attributes:
        request: the vector that the CPU is asked to take, or `NONE`.
        ppr: the processor priority register.
        irr, isr, tmr: requested, in service, level-triggered: the bits of all 256 vectors.
    """

    model: ClassVar[str] = "lapic"
    summary: ClassVar[str] = "local APIC with timer"
    State = LapicState
    state: LapicState

    def __init__(
        self,
        host: DeviceHost,
        clock: Clock,
        *,
        changed: Callable[[], None] = _nobody,
        broadcast_eoi: Callable[[int], None] = _nobody,
        reachable: Callable[[], None] = _nobody,
        on_init: Callable[[], None] = _nobody,
    ) -> None:
        super().__init__(host)
        self.request = NONE
        self.ppr = 0
        self._changed = changed
        self._broadcast_eoi = broadcast_eoi
        self._reachable = reachable
        self._on_init = on_init
        self.irr = self.isr = self.tmr = 0
        self.timer = ApicTimer(clock, self.state.timer, lambda: self.fire(_TIMER))
        self.registers = RegisterFile(self)
        self._window = Window(self.registers)
        self._enabled = False

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.MMIO, 0x1000, start=APIC_BASE),)

    def handlers(self) -> Sequence[BusDevice]:
        return (self._window,)

    # The CPU's side.

    @property
    def extint(self) -> bool:
        """Whether LINT0 asks the CPU to take a vector from the 8259 (ExtINT)."""
        state = self.state
        if not state.lines & 1:
            return False
        return not self._enabled or state.lvt[_LINT0] & (_MASKED | 0x700) == _EXTINT << 8

    def acknowledge(self) -> int:
        """Take the request into service; its vector, the spurious one if there is none (10.9)."""
        vector = self.request
        if vector < 0:
            return self.state.svr & 0xFF
        bit = _VECTOR_BIT[vector]
        self.irr ^= bit
        self.isr |= bit
        self._update()
        return vector

    def take_nmi(self) -> bool:
        """Whether an NMI waited; it does not any more."""
        waited, self.state.nmi = self.state.nmi, False
        return waited

    # Interrupts that arrive.

    def set_lint(self, pin: int, level: bool) -> None:
        """Drive LINT0 or LINT1 (`pin` 0 or 1)."""
        state = self.state
        if state.lines >> pin & 1 == level:
            return
        state.lines ^= 1 << pin
        if level:
            if self._enabled:
                self._fire_lint(pin)
            elif pin == 1:
                state.nmi = True
        self._changed()

    def message(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """A message of the system bus: from the IOAPIC, a device (MSI) or an ICR.

        Args:
            destination: 8 bits, or 32 of a message in x2APIC format.
            level: level-triggered; ending it is broadcast.

        Returns: whether it was accepted.
        """
        if not self.state.matches(destination, logical):
            return False
        if mode in (_FIXED, _LOWEST):
            return self.accept(vector, level)
        return self._accept_unvectored(mode)

    def accept(self, vector: int, level: bool) -> bool:
        """Set the IRR bit of a vector (10.8.4); False if it is refused."""
        if not self._enabled:
            return False
        if vector < LOWEST_VECTOR:
            self._error(Esr.RECEIVE_ILLEGAL_VECTOR)
            return False
        bit = _VECTOR_BIT[vector]
        self.irr |= bit
        if level:
            self.tmr |= bit
        else:
            self.tmr &= ~bit
        self._update()
        return True

    def fire(self, source: int) -> None:
        """A local interrupt of the LVT (10.5.1)."""
        entry = self.state.lvt[source]
        if entry & _MASKED:
            return
        mode = entry >> 8 & 7
        if mode == _FIXED:
            self.accept(entry & 0xFF, False)
        else:
            self._accept_unvectored(mode)

    def _fire_lint(self, pin: int) -> None:
        """A LINT pin that is high; LINT1 is always edge-triggered (10.5.1)."""
        source = _LINT0 + pin
        lvt = self.state.lvt
        if pin or not self._is_level(lvt[source]):
            self.fire(source)
        elif not lvt[source] & (_MASKED | _REMOTE_IRR) and self.accept(lvt[source] & 0xFF, True):
            lvt[source] |= _REMOTE_IRR

    def _accept_unvectored(self, mode: int) -> bool:
        if mode == _NMI:
            self.state.nmi = True
            self._changed()
        elif mode == _INIT:
            self._reset(self.state.mode)
            self._on_init()
        else:
            return False
        return True

    def _error(self, error: Esr) -> None:
        """Log it; only the first since the ESR was written interrupts (10.5.3)."""
        first = not self.state.errors
        self.state.errors |= int(error)
        if first:
            self.fire(_ERROR)

    @staticmethod
    def _is_level(entry: int) -> bool:
        return entry & (_LEVEL | 0x700) == _LEVEL

    # Priorities.

    def _update(self) -> None:
        """Derive the processor priority and the request (10.8.3.1)."""
        priority = self.state.tpr
        vector = NONE
        if self.isr:
            serving = self.isr.bit_length() - 1
            if serving >> 4 > priority >> 4:
                priority = serving & 0xF0
        if self.irr and self._enabled:
            asking = self.irr.bit_length() - 1
            if asking >> 4 > priority >> 4:
                vector = asking
        self.ppr = priority
        if vector != self.request:
            self.request = vector
            self._changed()

    def arbitration_priority(self) -> int:
        """The APR of earlier processors, from what follows it here too (10.6.2.4)."""
        tpr, asking = self.state.tpr, max(self.irr.bit_length() - 1, 0)
        serving = max(self.isr.bit_length() - 1, 0)
        if tpr >> 4 >= asking >> 4 and tpr >> 4 > serving >> 4:
            return tpr
        return max(tpr & 0xF0, asking & 0xF0, serving & 0xF0)

    # What software does.

    @property
    def software_enabled(self) -> bool:
        return self._enabled

    def write_tpr(self, value: int) -> None:
        self.state.tpr = value & 0xFF
        self._update()

    def end_of_interrupt(self) -> None:
        """EOI (10.8.5): the highest in service ends; a level-triggered one is broadcast."""
        isr = self.isr
        if not isr:
            return
        vector = isr.bit_length() - 1
        bit = _VECTOR_BIT[vector]
        self.isr = isr ^ bit
        self._update()
        if self.tmr & bit:
            self._end_of_level(vector)

    def _end_of_level(self, vector: int) -> None:
        lvt = self.state.lvt
        if lvt[_LINT0] & _REMOTE_IRR and lvt[_LINT0] & 0xFF == vector:
            lvt[_LINT0] &= ~_REMOTE_IRR
            if self.state.lines & 1:
                self._fire_lint(0)
        self._broadcast_eoi(vector)

    def write_svr(self, value: int) -> None:
        """Software enable and spurious vector; disabling masks all of the LVT (10.4.7.2)."""
        state = self.state
        state.svr = value & 0x3FF
        self._enabled = bool(value & _ENABLE) and bool(state.mode)
        if not value & _ENABLE:
            state.lvt[:] = [entry | _MASKED for entry in state.lvt]
        self._update()
        self._changed()
        self._reachable()

    def write_lvt(self, source: int, value: int) -> None:
        """One entry of the LVT; its mask cannot be cleared while software-disabled."""
        lvt = self.state.lvt
        entry = value & LVT_WRITABLE[source]
        if not self.state.svr & _ENABLE:
            entry |= _MASKED
        if source == _LINT0 and self._is_level(entry):
            entry |= lvt[source] & _REMOTE_IRR
        lvt[source] = entry
        if source == _TIMER:
            self.timer.set_mode(entry >> 17 & 3)
        elif source == _LINT0:
            if self.state.lines & 1 and self._is_level(entry):
                self._fire_lint(0)
            self._changed()

    def write_esr(self) -> None:
        """Show the errors that were found since the last write, and look for new ones."""
        self.state.esr, self.state.errors = self.state.errors, 0

    def illegal_register(self) -> None:
        """Software named a register that does not exist."""
        self._error(Esr.ILLEGAL_REGISTER)

    def address(self, **fields: int) -> None:
        """Change what `LapicState.matches` goes by: `id`, `ldr` or `dfr`."""
        vars(self.state).update(fields)
        self._reachable()

    def send(self, command: int, destination: int) -> None:
        """The low half of the ICR was written (10.6.1).

        Fixed and lowest-priority messages are always edge-triggered, whatever the trigger bit says.
        """
        self.state.icr = command & ICR_WRITABLE
        mode = command >> 8 & 7
        if command & 0xFF < LOWEST_VECTOR and mode in (_FIXED, _LOWEST):
            self._error(Esr.SEND_ILLEGAL_VECTOR)
        if mode == _INIT and command & _LEVEL and not command & ICR_ASSERT:
            return  # INIT level de-assert is for the arbitration of APICs that had a bus
        shorthand = command >> 18 & 3
        if shorthand == _TO_ADDRESS:
            self.message(destination, bool(command & _LOGICAL), mode, command & 0xFF, False)
        elif shorthand != _OTHERS:
            self.message(BROADCAST, False, mode, command & 0xFF, False)

    def set_apic_mode(self, mode: ApicMode) -> None:
        """IA32_APIC_BASE EN and EXTD; disabling resets the registers (10.4.3, 10.12.5)."""
        if mode is ApicMode.DISABLED:
            self._reset(mode)
            return
        self.state.mode = mode
        self._settle()
        self._reachable()

    def start_virtual_wire(self) -> None:
        """Leave it as PC firmware does (MultiProcessor Specification 1.4, 3.6.2.2).

        Enabled, the 8259 at LINT0 as ExtINT, NMI at LINT1.
        """
        self.write_svr(_ENABLE | 0x0F)
        self.write_lvt(Lvt.LINT0, _EXTINT << 8)
        self.write_lvt(Lvt.LINT1, _NMI << 8)

    # RDMSR, WRMSR and MOV CR8; see `x2apic`.

    def read_msr(self, index: int) -> int:
        return x2apic.read_msr(self, index)

    def write_msr(self, index: int, value: int) -> None:
        x2apic.write_msr(self, index, value)

    def read_cr8(self) -> int:
        return self.state.tpr >> 4  # its class (10.8.6.1)

    def write_cr8(self, value: int) -> None:
        self.write_tpr(value << 4)

    # State.

    def snapshot(self) -> Any:
        state = self.state
        state.irr, state.isr, state.tmr = map(to_words, (self.irr, self.isr, self.tmr))
        return super().snapshot()

    def restored(self) -> None:
        state = self.state
        self.irr, self.isr, self.tmr = map(from_words, (state.irr, state.isr, state.tmr))
        self.timer.take_up(state.timer, state.lvt[_TIMER] >> 17 & 3)
        self._settle()

    def _reset(self, mode: ApicMode) -> None:
        """As after power-up, but for the ID and the pins (10.4.7.3)."""
        old = self.state
        self.state = LapicState(mode=mode, id=old.id, lines=old.lines)
        self.restored()

    def _settle(self) -> None:
        state = self.state
        self._enabled = bool(state.svr & _ENABLE) and bool(state.mode)
        self._window.open = state.mode is ApicMode.XAPIC
        self._update()
        self._changed()
