"""One 8259A interrupt controller: its registers, its priorities, its request output.

Source: Intel 8259A data sheet (231468), by the headings of its text: "Initialization Command
Words", "Operation Command Words", "Fully Nested Mode", "End of Interrupt", "Rotation", "Special
Mask Mode", "Poll Command", "Edge and Level Triggered Modes". Which lines are level-triggered is
told by the ELCR of the chip set (Intel 82371AB, 4.2.1 and 8.3), which takes the place of ICW1's
LTIM bit.

The terms: *request* (IRR) is a line that asks, *in service* (ISR) one whose interrupt the CPU took
and did not end yet, *mask* (IMR) what is not to interrupt. Everything that follows from those,
the order of priorities and the output pin among it, is computed and never stored.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import msgspec

from devices.contract import U8

U3 = Annotated[int, msgspec.Meta(ge=0, le=7)]

SPURIOUS = 7
"""The level that is reported when a request vanished before it was acknowledged."""


class InitStep(enum.IntEnum):
    """Which initialization command word comes next at the odd address.

    `UNTOUCHED` is a chip that never saw ICW1. Only a `READY` one drives its output.
    """

    UNTOUCHED = 0
    ICW2 = 2
    ICW3 = 3
    ICW4 = 4
    READY = 5


class Command(enum.IntFlag):
    """Bits that tell the words written to the even address apart, and those of ICW1 and OCW3."""

    ICW1 = 0x10
    ICW1_SINGLE = 0x02
    ICW1_NEEDS_ICW4 = 0x01
    OCW3 = 0x08
    OCW3_SET_SPECIAL_MASK_MODE = 0x40
    OCW3_SPECIAL_MASK_MODE = 0x20
    OCW3_POLL = 0x04
    OCW3_SET_READ = 0x02
    OCW3_READ_ISR = 0x01


# An operation on an IntFlag costs a microsecond; an EOI has to pass these two.
_ICW1 = int(Command.ICW1)
_OCW3 = int(Command.OCW3)


class Icw4(enum.IntFlag):
    """ICW4; buffered mode and the choice of processor have no effect in a PC."""

    SPECIAL_FULLY_NESTED = 0x10
    AUTO_EOI = 0x02


class Ocw2(enum.IntEnum):
    """Bits 7..5 of OCW2 (R, SL, EOI)."""

    ROTATE_IN_AUTO_EOI_CLEAR = 0
    EOI = 1
    NO_OPERATION = 2
    SPECIFIC_EOI = 3
    ROTATE_IN_AUTO_EOI_SET = 4
    ROTATE_ON_EOI = 5
    SET_PRIORITY = 6
    ROTATE_ON_SPECIFIC_EOI = 7


@dataclass
class ChipState:
    """All of one chip.

    Attributes:
        lines: the level of each input.
        latched: inputs in edge mode that rose, are still high and were not acknowledged.
        level: the ELCR: inputs in level mode.
        vector: ICW2, the vector of input 0; the low three bits are clear.
        lowest: the input with the lowest priority; the next one up has the highest.
        init: what the odd address expects.
        single: ICW1 promised that no ICW3 comes.
        needs_icw4: ICW1 promised an ICW4.
        poll: the next read is a poll.
        read_isr: the even address reads the ISR, not the IRR.
    """

    lines: U8 = 0
    latched: U8 = 0
    level: U8 = 0
    mask: U8 = 0
    in_service: U8 = 0
    vector: U8 = 0
    lowest: U3 = 7
    init: InitStep = InitStep.UNTOUCHED
    single: bool = False
    needs_icw4: bool = False
    auto_eoi: bool = False
    rotate_in_auto_eoi: bool = False
    special_mask: bool = False
    special_fully_nested: bool = False
    poll: bool = False
    read_isr: bool = False

    def __post_init__(self) -> None:
        if self.latched & ~self.lines or self.latched & self.level:
            raise ValueError("only a high line in edge mode can be latched")
        if self.vector & 7:
            raise ValueError("the low three bits of ICW2 are clear")


def _highest_rank(inputs: int, lowest: int) -> int:
    """The rank of the highest in a set of inputs that is not empty: 0 is the top, 7 `lowest`."""
    ranked = (inputs | inputs << 8) >> lowest + 1 & 0xFF
    return (ranked & -ranked).bit_length() - 1


class Chip:
    """One 8259A.

    Args:
        cascade: the bit of the input that a slave is wired to; 0 in a slave.
        level_mask: the inputs that may be put into level mode.
    """

    def __init__(self, state: ChipState, cascade: int, level_mask: int) -> None:
        self.state = state
        self._cascade = cascade
        self._level_mask = level_mask

    # What follows from the state.

    def requests(self) -> int:
        """The IRR."""
        state = self.state
        return state.latched | state.lines & state.level

    def candidate(self) -> int | None:
        """The input that the output pin stands for; None while the pin is low.

        "Fully Nested Mode": it must be of higher priority than all in service. "Special Mask
        Mode": those in service and masked hold nobody back. "Special Fully Nested Mode": a slave
        in service may ask again, for a request of higher priority of its own.
        """
        state = self.state
        wanted = (state.latched | state.lines & state.level) & ~state.mask
        if not wanted or state.init is not InitStep.READY:
            return None
        lowest = state.lowest
        rank = _highest_rank(wanted, lowest)
        level = rank + lowest + 1 & 7
        blocking = state.in_service
        if state.special_mask:
            blocking &= ~state.mask
        if not blocking:
            return level
        barrier = _highest_rank(blocking, lowest)
        if rank < barrier:
            return level
        again = rank == barrier and state.special_fully_nested and 1 << level == self._cascade
        return level if again else None

    # Inputs.

    def set_line(self, bit: int, level: bool) -> None:
        """Drive one input.

        A line must stay high until it is acknowledged ("Edge and Level Triggered Modes"): one
        that falls earlier takes its request back, in edge mode too.
        """
        state = self.state
        if not level:
            state.lines &= ~bit
            state.latched &= ~bit
        elif not state.lines & bit:
            state.lines |= bit
            state.latched |= bit & ~state.level

    def acknowledge(self) -> int:
        """Take the candidate into service; its input number, or `SPURIOUS` if there is none."""
        level = self.candidate()
        if level is None:
            return SPURIOUS
        state = self.state
        state.latched &= ~(1 << level)
        if not state.auto_eoi:
            state.in_service |= 1 << level
        elif state.rotate_in_auto_eoi:
            state.lowest = level
        return level

    # Registers.

    def read(self, odd: int) -> int:
        """The register at the even (0) or odd (1) address; a poll outranks both."""
        state = self.state
        if state.poll:
            state.poll = False
            polled = self.candidate() is not None
            return 0x80 | self.acknowledge() if polled else 0
        if odd:
            return state.mask
        return state.in_service if state.read_isr else self.requests()

    def write(self, odd: int, value: int) -> None:
        """Write 0..255 to the even (0) or odd (1) address."""
        if odd:
            self._write_odd(value)
        elif value & _ICW1:
            self._write_icw1(value)
        elif value & _OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)

    def set_level_mode(self, value: int) -> None:
        """Write this chip's half of the ELCR; the timer, keyboard, RTC, FPU stay in edge mode."""
        state = self.state
        state.level = value & self._level_mask
        state.latched &= ~state.level

    def _write_icw1(self, value: int) -> None:
        """Start over; only the lines and the ELCR stay ("Initialization Command Words").

        The edge sense circuit is reset too: a line that is high must fall and rise again.
        """
        state = self.state
        fresh = ChipState(
            lines=state.lines,
            level=state.level,
            init=InitStep.ICW2,
            single=bool(value & Command.ICW1_SINGLE),
            needs_icw4=bool(value & Command.ICW1_NEEDS_ICW4),
        )
        # In place, because the pair's state holds this object.
        vars(state).update(vars(fresh))

    def _write_odd(self, value: int) -> None:
        state = self.state
        after_icw3 = InitStep.ICW4 if state.needs_icw4 else InitStep.READY
        match state.init:
            case InitStep.ICW2:
                state.vector = value & 0xF8
                state.init = after_icw3 if state.single else InitStep.ICW3
            case InitStep.ICW3:
                # Which input has the slave is fixed in a PC's chip set.
                state.init = after_icw3
            case InitStep.ICW4:
                state.auto_eoi = bool(value & Icw4.AUTO_EOI)
                state.special_fully_nested = bool(value & Icw4.SPECIAL_FULLY_NESTED)
                state.init = InitStep.READY
            case _:
                state.mask = value

    def _write_ocw3(self, value: int) -> None:
        state = self.state
        if value & Command.OCW3_SET_SPECIAL_MASK_MODE:
            state.special_mask = bool(value & Command.OCW3_SPECIAL_MASK_MODE)
        if value & Command.OCW3_POLL:
            state.poll = True
        elif value & Command.OCW3_SET_READ:
            state.read_isr = bool(value & Command.OCW3_READ_ISR)

    def _write_ocw2(self, value: int) -> None:
        state = self.state
        level = value & 7
        match Ocw2(value >> 5):
            case Ocw2.EOI:
                self._end_of_interrupt()
            case Ocw2.ROTATE_ON_EOI:
                ended = self._end_of_interrupt()
                if ended is not None:
                    state.lowest = ended
            case Ocw2.SPECIFIC_EOI:
                state.in_service &= ~(1 << level)
            case Ocw2.ROTATE_ON_SPECIFIC_EOI:
                state.in_service &= ~(1 << level)
                state.lowest = level
            case Ocw2.SET_PRIORITY:
                state.lowest = level
            case Ocw2.ROTATE_IN_AUTO_EOI_SET:
                state.rotate_in_auto_eoi = True
            case Ocw2.ROTATE_IN_AUTO_EOI_CLEAR:
                state.rotate_in_auto_eoi = False

    def _end_of_interrupt(self) -> int | None:
        """Non-specific: the highest in service; "Special Mask Mode": none that is masked."""
        state = self.state
        ending = state.in_service
        if state.special_mask:
            ending &= ~state.mask
        if not ending:
            return None
        level = _highest_rank(ending, state.lowest) + state.lowest + 1 & 7
        state.in_service &= ~(1 << level)
        return level
