"""The keyboard controller, ports 0x60 and 0x64.

Sources: IBM PC AT Technical Reference, "Keyboard controller"; Intel 8042 firmware as PC BIOSes and
Linux (drivers/input/serio/i8042.c) use it.

- There is a keyboard port and no mouse port: commands for the latter are unknown, except its
  connection test, which fails, so that a driver need not wait for an answer. IRQ 12 is never used.
- Nobody waits: a byte that is written has been dealt with, so "input buffer full" is never seen.
- A byte sent to a keyboard that is absent is answered by 0xFE with the time-out bit, at once.
- The interrupt line follows "output buffer full" while the configuration byte enables it, and
  falls between two bytes.
- At the start it is as firmware leaves it: translating, interrupts on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, ClassVar

from devices.bus import BusDevice, BusType
from devices.bytewise import ByteRegisters
from devices.contract import U8, Device, DeviceHost, Region
from devices.platform.a20 import A20Gate
from devices.platform.keyboard import BREAK, RESEND, Keyboard, KeyboardState, translate

RAM_SIZE = 32
SELF_TEST_OK = 0x55
NO_MOUSE_PORT = 0x02
"""Answer to the mouse port's test: "clock line stuck high"."""
INPUT_PORT = 0x80
"""The keyboard is not locked."""

READ_RAM, WRITE_RAM = 0x20, 0x60
PULSE_OUTPUT_PORT = 0xF0
"""0xF0 to 0xFF: the bits 0..3 that are 0 go low for a moment; 0xFE resets the CPU."""


class Command(IntEnum):
    """Port 0x64, written; those that are one value each."""

    TEST_MOUSE = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    DISABLE_KEYBOARD = 0xAD
    ENABLE_KEYBOARD = 0xAE
    READ_INPUT_PORT = 0xC0
    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1
    WRITE_KEYBOARD_BUFFER = 0xD2
    DISABLE_A20 = 0xDD
    ENABLE_A20 = 0xDF
    READ_TEST_INPUTS = 0xE0


class Status(IntFlag):
    """Port 0x64, read."""

    OUTPUT_FULL = 1 << 0
    SYSTEM = 1 << 2
    COMMAND = 1 << 3
    UNLOCKED = 1 << 4
    TIMEOUT = 1 << 6


class Config(IntFlag):
    """Byte 0 of the controller's RAM."""

    KEYBOARD_INTERRUPT = 1 << 0
    SYSTEM = 1 << 2
    KEYBOARD_DISABLED = 1 << 4
    TRANSLATE = 1 << 6


class OutputPort(IntFlag):
    """The output port; bit 0 low holds the CPU in reset."""

    NO_RESET = 1 << 0
    A20 = 1 << 1
    OUTPUT_FULL = 1 << 4


_AS_FIRMWARE_LEAVES_IT = Config.KEYBOARD_INTERRUPT | Config.SYSTEM | Config.TRANSLATE
_DISABLED = int(Config.KEYBOARD_DISABLED)
_KEYBOARD_LINES = 0xC0
"""Clock and data of the keyboard, both high."""


@dataclass
class I8042Options:
    """`keyboard`: one is plugged in."""

    keyboard: bool = False


@dataclass
class I8042State:
    """The controller and its keyboard.

    Attributes:
        ram: byte 0 is the configuration.
        output, full: the output buffer.
        timed_out: the status bit that goes with it.
        last_was_command: the status bit of that name.
        argument_of: the command whose data byte is awaited, or 0.
        released: a break prefix was swallowed by the translation.
        kept_port: bits 2, 3 and 5 of the output port, which have no effect.
    """

    ram: bytearray = field(
        default_factory=lambda: bytearray([_AS_FIRMWARE_LEAVES_IT, *bytes(RAM_SIZE - 1)])
    )
    output: U8 = 0
    full: bool = False
    timed_out: bool = False
    last_was_command: bool = False
    argument_of: U8 = 0
    released: bool = False
    kept_port: U8 = 0
    keyboard: KeyboardState = field(default_factory=KeyboardState)

    def __post_init__(self) -> None:
        if len(self.ram) != RAM_SIZE:
            raise ValueError(f"the controller's RAM has {RAM_SIZE} bytes, not {len(self.ram)}")
        if self.argument_of and not _takes_argument(self.argument_of):
            raise ValueError(f"command {self.argument_of:#x} takes no data")
        if self.kept_port & ~_KEPT_PORT:
            raise ValueError(f"output port bits {self.kept_port:#x} are not kept")


_KEPT_PORT = 0b10_1100


def _takes_argument(command: int) -> bool:
    is_ram = WRITE_RAM <= command < WRITE_RAM + RAM_SIZE
    return is_ram or command in (Command.WRITE_OUTPUT_PORT, Command.WRITE_KEYBOARD_BUFFER)


class I8042(Device):
    """Pin 0 is IRQ 1.

    Args:
        gate: the A20 gate, shared with port 0x92.
        reset: called when the guest resets the CPU.
    """

    model: ClassVar[str] = "i8042"
    summary: ClassVar[str] = "keyboard controller, with or without a keyboard"
    Options = I8042Options
    State = I8042State
    options: I8042Options
    state: I8042State

    def __init__(
        self,
        host: DeviceHost,
        options: Any = None,
        *,
        gate: A20Gate | None = None,
        reset: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(host, options)
        self.gate = gate or A20Gate()
        self._reset = reset
        self._keyboard = Keyboard(self.state.keyboard)
        self._line = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("data", BusType.PIO, 1, start=0x60, irq=1),
            Region("command", BusType.PIO, 1, start=0x64),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return (_DataPort(self), _CommandPort(self))

    def press(self, codes: bytes) -> int:
        """Keys are pressed or released: whole set 2 sequences; the number of bytes taken.

        None is taken when the keyboard is absent or its queue has no room for all.
        """
        if not self.options.keyboard:
            return 0
        taken = self._keyboard.press(codes)
        self.refill()
        return taken

    # Ports.

    def read_data(self) -> int:
        """Port 0x60: the output buffer, which is empty afterwards and keeps its value."""
        state = self.state
        value = state.output
        state.full = state.timed_out = False
        self._drive()
        self.refill()
        return value

    def write_data(self, value: int) -> None:
        """Port 0x60: data of a command, else a byte for the keyboard."""
        state = self.state
        state.last_was_command = False
        command, state.argument_of = state.argument_of, 0
        if not command:
            self._send(value)
        elif command == Command.WRITE_OUTPUT_PORT:
            self._write_output_port(value)
        elif command == Command.WRITE_KEYBOARD_BUFFER:
            self._answer(value)
        else:
            state.ram[command - WRITE_RAM] = value
            self._drive()
        self.refill()

    def read_status(self) -> int:
        state = self.state
        value = Status.UNLOCKED | state.ram[0] & int(Config.SYSTEM)
        if state.full:
            value |= Status.OUTPUT_FULL
        if state.last_was_command:
            value |= Status.COMMAND
        if state.timed_out:
            value |= Status.TIMEOUT
        return int(value)

    def write_command(self, value: int) -> None:
        """Port 0x64; a command that is not known does nothing."""
        state = self.state
        state.last_was_command = True
        state.argument_of = 0
        if READ_RAM <= value < READ_RAM + RAM_SIZE:
            self._answer(state.ram[value - READ_RAM])
        elif _takes_argument(value):
            state.argument_of = value
        elif value >= PULSE_OUTPUT_PORT:
            if not value & OutputPort.NO_RESET:
                self._reset_cpu()
        else:
            self._command(value)
        self.refill()

    def _command(self, value: int) -> None:
        state = self.state
        match value:
            case Command.TEST_MOUSE:
                self._answer(NO_MOUSE_PORT)
            case Command.SELF_TEST:
                state.ram[0] |= Config.SYSTEM
                self._answer(SELF_TEST_OK)
            case Command.TEST_KEYBOARD:
                self._answer(0)
            case Command.DISABLE_KEYBOARD:
                state.ram[0] |= _DISABLED
            case Command.ENABLE_KEYBOARD:
                state.ram[0] &= ~_DISABLED
            case Command.READ_INPUT_PORT:
                self._answer(INPUT_PORT)
            case Command.READ_OUTPUT_PORT:
                self._answer(self._output_port())
            case Command.DISABLE_A20 | Command.ENABLE_A20:
                self.gate.set(value == Command.ENABLE_A20)
            case Command.READ_TEST_INPUTS:
                # Test input 0 is the keyboard's clock, 1 its data: both idle, so high.
                self._answer(0b11)

    # Output port.

    def _output_port(self) -> int:
        value = _KEYBOARD_LINES | self.state.kept_port | OutputPort.NO_RESET
        if self.gate.open:
            value |= OutputPort.A20
        if self.state.full:
            value |= OutputPort.OUTPUT_FULL
        return int(value)

    def _write_output_port(self, value: int) -> None:
        self.state.kept_port = value & _KEPT_PORT
        self.gate.set(bool(value & OutputPort.A20))
        if not value & OutputPort.NO_RESET:
            self._reset_cpu()

    def _reset_cpu(self) -> None:
        if self._reset is not None:
            self._reset()

    # The keyboard and the output buffer.

    def _send(self, value: int) -> None:
        """A byte to the keyboard also ends "keyboard disabled", as the controller's firmware."""
        self.state.ram[0] &= ~_DISABLED
        if self.options.keyboard:
            self.state.released = False
            self._keyboard.command(value)
        else:
            self._answer(RESEND, timed_out=True)

    def _answer(self, value: int, *, timed_out: bool = False) -> None:
        """The output buffer has one place: what was in it is lost."""
        state = self.state
        state.output = value
        state.timed_out = timed_out
        if state.full:
            state.full = False
            self._drive()
        state.full = True
        self._drive()

    def refill(self) -> None:
        """Let the keyboard speak, if it may and there is room."""
        state = self.state
        queue = state.keyboard.queue
        while queue and not state.full and not state.ram[0] & _DISABLED:
            code = self._keyboard.next_byte()
            if not state.ram[0] & Config.TRANSLATE:
                self._answer(code)
            elif code == BREAK:
                state.released = True
            else:
                released, state.released = state.released, False
                self._answer(translate(code) | (0x80 if released else 0))

    def _wanted(self) -> bool:
        return self.state.full and bool(self.state.ram[0] & Config.KEYBOARD_INTERRUPT)

    def _drive(self) -> None:
        level = self._wanted()
        if level != self._line:
            self._line = level
            self.host.set_irq(level)

    def restored(self) -> None:
        self._keyboard.state = self.state.keyboard
        # The line is driven in any case: the machine does not know its level.
        self._line = not self._wanted()
        self._drive()


class _DataPort(ByteRegisters):
    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read_byte(self, offset: int, /) -> int:
        return self._controller.read_data()

    def write_byte(self, offset: int, value: int, /) -> None:
        self._controller.write_data(value)


class _CommandPort(ByteRegisters):
    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read_byte(self, offset: int, /) -> int:
        return self._controller.read_status()

    def write_byte(self, offset: int, value: int, /) -> None:
        self._controller.write_command(value)
