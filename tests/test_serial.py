"""The 16550A against its data sheet (PC16550D); section numbers are those of the data sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import FakeHost
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.contract import TakesInput
from devices.errors import DeviceError, UserError
from devices.registry import parse_options
from devices.serial import BACKLOG_SIZE, ComPort, Serial, SerialOptions
from devices.uart16550 import Fcr, Ier, Iir, Lcr, Lsr, Mcr, Msr, Register

TRIGGERS = {0x00: 1, 0x40: 4, 0x80: 8, 0xC0: 14}
IDLE = Lsr.THR_EMPTY | Lsr.TRANSMITTER_EMPTY


class Guest:
    """A driver's view of one UART."""

    def __init__(self, **options: Any) -> None:
        self.host = FakeHost()
        self.uart = Serial(self.host, SerialOptions(**options) if options else None)

    def read(self, register: int) -> int:
        return self.uart.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    def iir(self) -> Iir:
        return Iir(self.read(Register.IIR_FCR) & 0x0F)

    def lsr(self) -> Lsr:
        return Lsr(self.read(Register.LSR))

    def msr(self) -> Msr:
        return Msr(self.read(Register.MSR))

    def data(self) -> int:
        return self.read(Register.DATA)

    def drain(self) -> bytes:
        """What a polling driver gets."""
        got = bytearray()
        while self.lsr() & Lsr.DATA_READY:
            got.append(self.data())
        return bytes(got)

    def enable(self, ier: int, mcr: int = Mcr.OUT2) -> None:
        self.write(Register.MCR, mcr)
        self.write(Register.IER, ier)

    def loop(self, data: bytes) -> None:
        for byte in data:
            self.write(Register.DATA, byte)

    def reborn(self) -> Guest:
        """Another UART that goes on from this one's snapshot."""
        other = Guest()
        other.uart.restore(self.uart.snapshot())
        return other


@pytest.fixture
def guest() -> Guest:
    return Guest()


# Registers.


def test_reset_values(guest: Guest) -> None:
    """Table III, "UART reset configuration"."""
    assert guest.read(Register.IER) == 0
    assert guest.read(Register.IIR_FCR) == 0x01
    assert guest.read(Register.LCR) == 0
    assert guest.read(Register.MCR) == 0
    assert guest.read(Register.LSR) == 0x60
    assert guest.read(Register.MSR) == Msr.CTS | Msr.DSR | Msr.DCD
    assert guest.host.calls == []


@pytest.mark.parametrize(
    ("register", "kept"),
    [(Register.IER, 0x0F), (Register.LCR, 0xFF), (Register.MCR, 0x1F), (Register.SCR, 0xFF)],
)
def test_writable_bits(guest: Guest, register: int, kept: int) -> None:
    for value in (0xFF, 0x00, 0x55, 0xAA):
        guest.write(Register.LCR, 0)
        guest.write(register, value)
        assert guest.read(register) == value & kept


@pytest.mark.parametrize("register", [Register.LSR, Register.MSR])
def test_status_registers_are_read_only(guest: Guest, register: int) -> None:
    before = guest.uart.snapshot()
    value = guest.read(register)
    guest.write(register, 0xFF ^ value)
    assert guest.read(register) == value
    assert guest.uart.snapshot() == before


def test_divisor_latch_hides_data_and_ier(guest: Guest) -> None:
    guest.write(Register.IER, 0x05)
    guest.write(Register.LCR, Lcr.DLAB | 3)
    guest.write(Register.DATA, 0x34)
    guest.write(Register.IER, 0x12)
    assert (guest.read(0), guest.read(1)) == (0x34, 0x12)
    guest.write(Register.LCR, 3)
    assert guest.read(Register.IER) == 0x05
    assert guest.host.printed == b""
    guest.write(Register.LCR, Lcr.DLAB)
    assert (guest.read(0), guest.read(1)) == (0x34, 0x12)


def test_iir_is_reachable_with_dlab_set(guest: Guest) -> None:
    guest.write(Register.LCR, Lcr.DLAB)
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    assert guest.read(Register.IIR_FCR) == 0xC1


def test_wide_access_is_one_access_for_each_byte(guest: Guest) -> None:
    guest.uart.write(Register.LCR, 2, 0x11_03)
    assert (guest.read(Register.LCR), guest.read(Register.MCR)) == (0x03, 0x11)
    guest.uart.write(Register.MCR, 4, 0x99_FF_FF_00)
    assert guest.read(Register.SCR) == 0x99
    # MCR, LSR, MSR, SCR; leaving loopback above changed modem lines, and reading clears that.
    first = guest.uart.read(Register.MCR, 4)
    assert first >> 24 == 0x99
    assert first >> 8 & 0xFF == IDLE
    assert first >> 16 & 0x0F
    assert guest.uart.read(Register.MCR, 4) >> 16 & 0x0F == 0


def test_wide_write_to_the_thr_sends_one_character(guest: Guest) -> None:
    guest.uart.write(Register.DATA, 2, 0x05_41)
    assert guest.host.printed == b"A"
    assert guest.read(Register.IER) == 0x05


def test_transmit_is_complete_at_once_and_in_order(guest: Guest) -> None:
    for byte in b"hello\xff\x00":
        guest.write(Register.DATA, byte)
        assert guest.lsr() == IDLE
    assert guest.host.printed == b"hello\xff\x00"


@pytest.mark.parametrize(
    ("port", "start", "irq"),
    [("com1", 0x3F8, 4), ("com2", 0x2F8, 3), ("com3", 0x3E8, 4), ("com4", 0x2E8, 3)],
)
def test_port_option_moves_the_default_place(port: str, start: int, irq: int) -> None:
    options = parse_options(Serial, {"port": port})
    (region,) = Serial(FakeHost(), options).regions()
    assert (region.start, region.length, region.irq) == (start, 8, irq)


def test_an_unknown_port_is_a_usage_error() -> None:
    with pytest.raises(UserError, match="port"):
        parse_options(Serial, {"port": "com9"})
    assert SerialOptions().port is ComPort.COM1


# Receiving.


def test_takes_input(guest: Guest) -> None:
    assert isinstance(guest.uart, TakesInput)


@pytest.mark.parametrize("fcr", [0, Fcr.ENABLE])
def test_input_is_read_in_order_and_none_is_lost(guest: Guest, fcr: int) -> None:
    guest.write(Register.IIR_FCR, fcr)
    sent = bytes(range(256)) * 2
    assert guest.uart.receive(sent) == len(sent)
    assert guest.drain() == sent
    assert guest.lsr() == IDLE


def test_empty_receiver_reads_zero(guest: Guest) -> None:
    assert guest.data() == 0


def test_receiver_can_be_read_without_looking_at_lsr(guest: Guest) -> None:
    guest.uart.receive(b"xy")
    assert (guest.data(), guest.data(), guest.data()) == (ord("x"), ord("y"), 0)


def test_backlog_is_bounded_and_asks_for_more_once(guest: Guest) -> None:
    assert guest.uart.receive(bytes(BACKLOG_SIZE + 100)) == BACKLOG_SIZE
    assert guest.uart.receive(b"x") == 0
    for waiting in range(BACKLOG_SIZE - 1, BACKLOG_SIZE // 4, -1):
        assert guest.lsr() & Lsr.DATA_READY
        guest.data()
        assert guest.host.count("input_wanted") == (waiting <= BACKLOG_SIZE // 2)
    guest.drain()
    assert guest.host.count("input_wanted") == 1


def test_no_request_for_input_without_a_refusal(guest: Guest) -> None:
    guest.uart.receive(bytes(BACKLOG_SIZE))
    guest.drain()
    assert guest.host.count("input_wanted") == 0


def test_fifo_reset_clears_what_has_arrived(guest: Guest) -> None:
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    guest.uart.receive(b"abc")
    assert guest.lsr() & Lsr.DATA_READY
    guest.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.RESET_RECEIVER)
    assert guest.lsr() == IDLE


def test_fcr_write_without_reset_keeps_what_has_arrived(guest: Guest) -> None:
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"abc")
    assert guest.iir() is Iir.RECEIVED_DATA
    guest.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.RESET_TRANSMITTER | 0x40)
    assert guest.iir() is Iir.CHARACTER_TIMEOUT
    assert guest.drain() == b"abc"


def test_fifo_reset_ends_the_interrupt_and_lets_the_rest_arrive(guest: Guest) -> None:
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"abc")
    assert guest.host.irq
    guest.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.RESET_RECEIVER)
    assert not guest.host.irq
    guest.uart.receive(b"0123456789abcdefghij")
    guest.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.RESET_RECEIVER)
    assert guest.host.irq
    assert guest.drain() == b"ghij"


@pytest.mark.parametrize(
    "setup",
    [
        lambda g: g.write(Register.IIR_FCR, 0xC7),
        lambda g: (g.write(Register.IIR_FCR, 0x01), g.write(Register.IIR_FCR, 0x07)),
        lambda g: (g.iir(), g.msr(), g.write(Register.IIR_FCR, 0xC7)),
        lambda g: (g.write(Register.IIR_FCR, 0xE7), g.iir(), g.write(Register.IIR_FCR, 0xC7)),
    ],
)
def test_input_that_no_one_could_notice_survives_a_drivers_start(
    guest: Guest, setup: Callable[[Guest], object]
) -> None:
    guest.uart.receive(b"piped input")
    setup(guest)
    assert guest.drain() == b"piped input"


@pytest.mark.parametrize(("before", "after"), [(0, Fcr.ENABLE), (Fcr.ENABLE, 0)])
def test_mode_change_clears_the_receiver(guest: Guest, before: int, after: int) -> None:
    guest.write(Register.IIR_FCR, before)
    guest.uart.receive(b"a")
    assert guest.lsr() & Lsr.DATA_READY
    guest.write(Register.IIR_FCR, after)
    assert not guest.lsr() & Lsr.DATA_READY


def test_fcr_bits_need_the_enable_bit(guest: Guest) -> None:
    """8.5: other bits are not programmed without bit 0."""
    guest.write(Register.IIR_FCR, 0xC6)
    assert guest.read(Register.IIR_FCR) == 0x01
    guest.uart.receive(b"a")
    assert guest.lsr() & Lsr.DATA_READY
    guest.write(Register.IIR_FCR, Fcr.RESET_RECEIVER)
    assert guest.lsr() & Lsr.DATA_READY


@pytest.mark.parametrize("fcr", [0, Fcr.ENABLE])
def test_iir_tells_the_fifo_mode(guest: Guest, fcr: int) -> None:
    guest.write(Register.IIR_FCR, fcr)
    assert guest.read(Register.IIR_FCR) == (0xC1 if fcr else 0x01)


# Interrupts: each source.


@pytest.mark.parametrize(("bits", "level"), list(TRIGGERS.items()))
def test_trigger_levels_and_character_timeout(guest: Guest, bits: int, level: int) -> None:
    guest.write(Register.IIR_FCR, Fcr.ENABLE | bits)
    guest.enable(Ier.RECEIVED_DATA)
    for count in range(1, 17):
        guest.uart.receive(b"x")
        expected = Iir.RECEIVED_DATA if count >= level else Iir.CHARACTER_TIMEOUT
        assert guest.iir() is expected
        assert guest.host.irq
    for left in range(15, -1, -1):
        guest.data()
        if left >= level:
            assert guest.iir() is Iir.RECEIVED_DATA
        else:
            assert guest.iir() is (Iir.CHARACTER_TIMEOUT if left else Iir.NONE)
    assert not guest.host.irq


def test_no_timeout_in_16450_mode(guest: Guest) -> None:
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"ab")
    assert guest.iir() is Iir.RECEIVED_DATA
    assert guest.read(Register.IIR_FCR) & 0xC0 == 0


def test_received_data_interrupts_only_when_enabled(guest: Guest) -> None:
    guest.enable(0)
    guest.uart.receive(b"a")
    assert guest.iir() is Iir.NONE
    assert not guest.host.irq
    guest.write(Register.IER, Ier.RECEIVED_DATA)
    assert guest.iir() is Iir.RECEIVED_DATA
    assert guest.host.irq


def test_each_character_is_an_edge_in_16450_mode(guest: Guest) -> None:
    """A handler that reads one byte and returns must be called again for the next."""
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"abc")
    assert guest.host.edges() == [True]
    guest.data()
    assert guest.host.edges() == [True, False, True]
    guest.data()
    guest.data()
    assert guest.host.edges() == [True, False, True, False, True, False]


def test_reading_below_the_trigger_level_is_an_edge(guest: Guest) -> None:
    """8.11: the FIFO interrupt ends below its level, then the timeout raises another one."""
    guest.write(Register.IIR_FCR, Fcr.ENABLE | 0x40)
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"abcdef")
    for _ in range(2):
        guest.data()
    assert guest.host.edges() == [True]
    guest.data()
    assert guest.host.edges() == [True, False, True]


@pytest.mark.parametrize("ier", [Ier.RECEIVED_DATA, Ier.RECEIVED_DATA | Ier.LINE_STATUS])
def test_another_source_holds_the_line_while_the_receiver_lets_go(guest: Guest, ier: int) -> None:
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.write(Register.IIR_FCR, Fcr.ENABLE | 0x40)
    guest.loop(bytes(17))
    guest.enable(ier, Mcr.OUT2)
    for _ in range(12):
        guest.data()
    assert guest.host.edges() == [True]
    guest.data()
    held = bool(ier & Ier.LINE_STATUS)
    assert guest.host.edges() == ([True] if held else [True, False, True])


def test_thre_holds_the_line_while_the_receiver_lets_go(guest: Guest) -> None:
    guest.enable(Ier.RECEIVED_DATA | Ier.THR_EMPTY)
    guest.uart.receive(b"ab")
    guest.data()
    guest.data()
    assert guest.host.edges() == [True]


def test_thre_is_raised_by_enabling_it(guest: Guest) -> None:
    guest.enable(Ier.THR_EMPTY)
    assert guest.host.irq
    assert guest.iir() is Iir.THR_EMPTY
    assert not guest.host.irq
    assert guest.iir() is Iir.NONE
    guest.write(Register.IER, Ier.THR_EMPTY)
    assert guest.iir() is Iir.NONE
    guest.write(Register.IER, 0)
    guest.write(Register.IER, Ier.THR_EMPTY)
    assert guest.iir() is Iir.THR_EMPTY


def test_thre_is_raised_by_sending(guest: Guest) -> None:
    guest.enable(Ier.THR_EMPTY)
    guest.iir()
    for byte in b"abc":
        guest.write(Register.DATA, byte)
        assert guest.host.irq
        assert guest.iir() is Iir.THR_EMPTY
        assert not guest.host.irq


def test_a_thr_write_without_iir_read_is_an_edge(guest: Guest) -> None:
    guest.enable(Ier.THR_EMPTY)
    guest.write(Register.DATA, 0x41)
    assert guest.host.edges() == [True, False, True]


def test_iir_read_ends_thre_only_when_it_shows_it(guest: Guest) -> None:
    guest.enable(Ier.THR_EMPTY | Ier.RECEIVED_DATA)
    guest.uart.receive(b"a")
    assert guest.iir() is Iir.RECEIVED_DATA
    guest.data()
    assert guest.iir() is Iir.THR_EMPTY
    assert guest.iir() is Iir.NONE


def test_thre_while_disabled_is_silent(guest: Guest) -> None:
    guest.enable(0)
    guest.write(Register.DATA, 0x41)
    assert guest.iir() is Iir.NONE
    assert guest.host.edges() == []


def test_line_status_interrupt_ends_with_lsr_read(guest: Guest) -> None:
    guest.enable(Ier.LINE_STATUS, Mcr.OUT2 | Mcr.LOOPBACK)
    guest.loop(b"ab")
    assert guest.iir() is Iir.LINE_STATUS
    assert guest.host.irq
    assert guest.lsr() & Lsr.OVERRUN
    assert not guest.host.irq
    assert not guest.lsr() & Lsr.OVERRUN
    assert guest.iir() is Iir.NONE


def test_modem_status_interrupt_ends_with_msr_read(guest: Guest) -> None:
    guest.enable(Ier.MODEM_STATUS)
    guest.write(Register.MCR, Mcr.OUT2 | Mcr.LOOPBACK)
    assert guest.iir() is Iir.MODEM_STATUS
    assert guest.host.irq
    assert guest.msr() & 0x0F
    assert not guest.host.irq
    assert guest.iir() is Iir.NONE


def test_priorities(guest: Guest) -> None:
    """Table IV, all four at once; each is served and uncovers the next."""
    guest.enable(0x0F, Mcr.OUT2 | Mcr.LOOPBACK)
    guest.loop(b"ab")
    order = []
    for serve in (guest.lsr, guest.data, lambda: None, guest.msr):
        order.append(guest.iir())
        assert guest.host.irq
        serve()
    assert order == [Iir.LINE_STATUS, Iir.RECEIVED_DATA, Iir.THR_EMPTY, Iir.MODEM_STATUS]
    assert guest.iir() is Iir.NONE
    assert not guest.host.irq


@pytest.mark.parametrize("ier", range(16))
def test_only_enabled_sources_show(ier: int) -> None:
    guest = Guest()
    guest.write(Register.MCR, Mcr.OUT2 | Mcr.LOOPBACK)
    guest.loop(b"ab")
    guest.write(Register.IER, ier)
    by_priority = [
        (Ier.LINE_STATUS, Iir.LINE_STATUS),
        (Ier.RECEIVED_DATA, Iir.RECEIVED_DATA),
        (Ier.THR_EMPTY, Iir.THR_EMPTY),
        (Ier.MODEM_STATUS, Iir.MODEM_STATUS),
    ]
    expected = next((code for bit, code in by_priority if ier & bit), Iir.NONE)
    assert guest.host.irq == (ier != 0)
    assert guest.iir() is expected


def test_out2_gates_the_line_but_not_the_iir(guest: Guest) -> None:
    guest.enable(Ier.RECEIVED_DATA, mcr=0)
    guest.uart.receive(b"a")
    assert guest.iir() is Iir.RECEIVED_DATA
    assert not guest.host.irq
    guest.write(Register.MCR, Mcr.OUT2)
    assert guest.host.irq
    guest.write(Register.MCR, 0)
    assert not guest.host.irq


# Loopback.


def test_loopback_returns_characters_and_sends_none(guest: Guest) -> None:
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    guest.write(Register.LCR, 3)
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.loop(b"0123456789abcdef")
    assert guest.drain() == b"0123456789abcdef"
    assert guest.host.printed == b""


@pytest.mark.parametrize(("lcr", "mask"), list(enumerate([0x1F, 0x3F, 0x7F, 0xFF])))
def test_word_length_cuts_looped_characters(guest: Guest, lcr: int, mask: int) -> None:
    guest.write(Register.LCR, lcr)
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.write(Register.DATA, 0xF5)
    assert guest.data() == 0xF5 & mask


@pytest.mark.parametrize(
    ("output", "line", "delta"),
    [
        (Mcr.RTS, Msr.CTS, Msr.DELTA_CTS),
        (Mcr.DTR, Msr.DSR, Msr.DELTA_DSR),
        (Mcr.OUT2, Msr.DCD, Msr.DELTA_DCD),
    ],
)
def test_loopback_modem_lines_and_deltas(guest: Guest, output: Mcr, line: Msr, delta: Msr) -> None:
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.msr()
    guest.write(Register.MCR, Mcr.LOOPBACK | output)
    assert guest.msr() == line | delta
    assert guest.msr() == line
    guest.write(Register.MCR, Mcr.LOOPBACK)
    assert guest.msr() == delta
    assert guest.msr() == 0


@pytest.mark.parametrize("outputs", range(16))
def test_loopback_wires_each_output_to_its_input(guest: Guest, outputs: int) -> None:
    guest.write(Register.MCR, Mcr.LOOPBACK | outputs)
    wires = [(Mcr.DTR, Msr.DSR), (Mcr.RTS, Msr.CTS), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD)]
    assert guest.msr() & 0xF0 == sum(line for output, line in wires if outputs & output)


def test_ring_indicator_counts_only_its_trailing_edge(guest: Guest) -> None:
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.msr()
    guest.write(Register.MCR, Mcr.LOOPBACK | Mcr.OUT1)
    assert guest.msr() == Msr.RI
    guest.write(Register.MCR, Mcr.LOOPBACK)
    assert guest.msr() == Msr.TRAILING_EDGE_RI


def test_deltas_gather_until_they_are_read(guest: Guest) -> None:
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.msr()
    guest.write(Register.MCR, Mcr.LOOPBACK | Mcr.RTS)
    guest.write(Register.MCR, Mcr.LOOPBACK | Mcr.RTS | Mcr.DTR)
    assert guest.msr() & 0x0F == Msr.DELTA_CTS | Msr.DELTA_DSR


def test_overrun_without_fifos_destroys_the_old_character(guest: Guest) -> None:
    guest.write(Register.LCR, 3)
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.loop(b"AB")
    assert guest.lsr() == IDLE | Lsr.DATA_READY | Lsr.OVERRUN
    assert guest.data() == ord("B")


def test_overrun_with_fifos_keeps_the_fifo(guest: Guest) -> None:
    guest.write(Register.LCR, 3)
    guest.write(Register.IIR_FCR, Fcr.ENABLE)
    guest.write(Register.MCR, Mcr.LOOPBACK)
    guest.loop(b"0123456789abcdefX")
    assert guest.lsr() & Lsr.OVERRUN
    assert guest.drain() == b"0123456789abcdef"


def test_outside_input_waits_while_in_loopback(guest: Guest) -> None:
    guest.enable(Ier.RECEIVED_DATA, Mcr.OUT2 | Mcr.LOOPBACK)
    assert guest.uart.receive(b"typed") == 5
    assert not guest.lsr() & Lsr.DATA_READY
    assert guest.iir() is Iir.NONE
    guest.write(Register.MCR, Mcr.OUT2)
    assert guest.host.irq
    assert guest.drain() == b"typed"


# Sleep and snapshot.


def test_input_while_asleep_waits_and_interrupts_on_wake(guest: Guest) -> None:
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.sleep()
    assert guest.uart.receive(b"zzz") == 3
    assert guest.host.edges() == []
    saved = guest.uart.snapshot()
    guest.uart.wake()
    assert guest.host.edges() == [True]
    assert guest.drain() == b"zzz"

    other = Guest()
    other.uart.sleep()
    other.uart.restore(saved)
    assert not other.host.irq
    other.uart.wake()
    assert other.host.irq
    assert other.drain() == b"zzz"


def test_restore_drives_the_interrupt_line(guest: Guest) -> None:
    idle = guest.uart.snapshot()
    guest.enable(Ier.RECEIVED_DATA)
    guest.uart.receive(b"a")
    assert guest.reborn().host.irq
    guest.uart.restore(idle)
    assert not guest.host.irq


def test_restore_offers_room_for_input_again(guest: Guest) -> None:
    """The machine may have held input back for the state that is gone now."""
    empty = guest.uart.snapshot()
    guest.uart.receive(bytes(BACKLOG_SIZE + 1))
    guest.uart.restore(empty)
    assert guest.host.count("input_wanted") == 1


def test_refusal_survives_a_snapshot(guest: Guest) -> None:
    guest.uart.receive(bytes(BACKLOG_SIZE + 1))
    other = guest.reborn()
    assert other.host.count("input_wanted") == 0
    other.drain()
    assert other.host.count("input_wanted") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"fcr": 0xC0},
        {"fcr": 0x07},
        {"mcr": 0x20},
        {"ier": 0x10},
        {"lcr": 256},
        {"received": "YWI="},
        {"backlog": "A" * 4 * (BACKLOG_SIZE // 3 + 1)},
        {"msr_deltas": -1},
    ],
)
def test_impossible_states_are_refused(guest: Guest, change: dict[str, Any]) -> None:
    before = guest.uart.snapshot()
    with pytest.raises(DeviceError):
        guest.uart.restore({**before, **change})
    assert guest.uart.snapshot() == before


def interrupt_driven_transaction() -> list[Callable[[Guest], object]]:
    """A driver's life, step by step: probe in loopback, send and receive by interrupts."""

    def put(register: int, value: int) -> Callable[[Guest], object]:
        return lambda guest: guest.write(register, value)

    def get(register: int) -> Callable[[Guest], object]:
        return lambda guest: guest.read(register)

    def typed(data: bytes) -> Callable[[Guest], object]:
        return lambda guest: guest.uart.receive(data)

    return [
        put(Register.LCR, 0x83),
        put(Register.DATA, 0x0C),
        put(Register.IER, 0x00),
        put(Register.LCR, 0x03),
        typed(b"early"),
        put(Register.IIR_FCR, 0xC7),
        put(Register.MCR, 0x1E),
        put(Register.DATA, 0xAE),
        get(Register.LSR),
        get(Register.DATA),
        get(Register.MSR),
        put(Register.MCR, 0x0B),
        put(Register.IER, 0x0F),
        get(Register.IIR_FCR),
        put(Register.DATA, 0x41),
        get(Register.IIR_FCR),
        get(Register.DATA),
        typed(b"0123456789abcdefghij"),
        put(Register.DATA, 0x42),
        *[get(Register.IIR_FCR), get(Register.DATA), get(Register.LSR)] * 12,
        get(Register.MSR),
        put(Register.IIR_FCR, 0x00),
        typed(b"xy"),
        get(Register.DATA),
        get(Register.IIR_FCR),
        get(Register.DATA),
    ]


STEPS = interrupt_driven_transaction()


@pytest.mark.parametrize("cut", range(len(STEPS) + 1))
def test_snapshot_at_each_point_of_a_transaction(cut: int) -> None:
    plain = Guest()
    expected = [step(plain) for step in STEPS]
    first = Guest()
    results = [step(first) for step in STEPS[:cut]]
    second = first.reborn()
    assert second.host.irq == first.host.irq
    results += [step(second) for step in STEPS[cut:]]
    assert results == expected
    assert second.uart.snapshot() == plain.uart.snapshot()
    assert first.host.printed + second.host.printed == plain.host.printed
    assert second.host.irq == plain.host.irq


ACCESSES = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("receive"), st.binary(max_size=40), st.just(0)),
    st.tuples(st.just("flood"), st.integers(1, 5000), st.just(0)),
)


def perform(guest: Guest, access: tuple[Any, Any, Any]) -> object:
    kind, first, second = access
    if kind == "read":
        size = min(second, 8 - first)
        value = guest.uart.read(first, size)
        assert 0 <= value < 1 << 8 * size
        return value
    if kind == "write":
        return guest.uart.write(first, 1, second)
    return guest.uart.receive(first if kind == "receive" else bytes(first))


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=40), st.lists(ACCESSES, max_size=40))
def test_restored_twin_goes_on_as_if_nothing_was(
    before: list[tuple[Any, Any, Any]], after: list[tuple[Any, Any, Any]]
) -> None:
    guest = Guest()
    for access in before:
        perform(guest, access)
    twin = guest.reborn()
    assert twin.uart.snapshot() == guest.uart.snapshot()
    assert twin.host.irq == guest.host.irq
    guest.host.calls.clear()
    twin.host.calls.clear()
    for access in after:
        assert perform(guest, access) == perform(twin, access)
        assert guest.host.calls == twin.host.calls
    assert guest.uart.snapshot() == twin.uart.snapshot()


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=60))
def test_what_follows_from_the_state_always_agrees(
    accesses: list[tuple[Any, Any, Any]],
) -> None:
    guest = Guest()
    for access in accesses:
        perform(guest, access)
        state = guest.uart.state
        pending = guest.uart.interrupt() is not Iir.NONE
        assert guest.host.irq == (pending and bool(state.mcr & Mcr.OUT2))
        assert guest.host.edges() == [i % 2 == 0 for i in range(len(guest.host.edges()))]
        if state.ier & Ier.RECEIVED_DATA and not state.mcr & Mcr.LOOPBACK:
            assert state.received or not state.backlog
