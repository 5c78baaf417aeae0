"""MSI and MSI-X against a simple model, and all the way to the local APIC."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
from fakes import FakeHost
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from devices.bus import BusType
from devices.errors import DeviceError
from devices.pci.capability import CapabilityId
from devices.pci.config import Header, Status
from devices.pci.config_space import MSIX, ConfigSpaceDevice
from devices.pci.contract import BarInfo
from devices.pci.decode import COMMAND, Command
from devices.pci.function import PciFunction
from devices.pci.msi import MsiLayout
from devices.pci.msix import MsixLayout
from vmm.machine import Machine

MASTER = int(Command.BUS_MASTER)
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
BARS = (BarInfo(0, 0, BusType.MMIO, 0x1000), BarInfo(1, 1, BusType.PIO, 16))


class Both(PciFunction):
    """MSI and MSI-X, the table behind eight bytes of its own."""

    model: ClassVar[str] = "both"
    vectors: ClassVar[int] = 40

    def header(self) -> Header:
        return Header(
            0x1234,
            1,
            0,
            interrupt_pin=1,
            bars=BARS,
            msi=MsiLayout(4),
            msix=MsixLayout(0, 8, 0x800, self.vectors),
        )

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return 0x11 * size


def made() -> tuple[Both, FakeHost]:
    host = FakeHost()
    return Both(host), host


def put(function: PciFunction, offset: int, value: int, size: int = 2) -> None:
    function.write_config(offset // 4, offset % 4, value.to_bytes(size, "little"))


def at(function: PciFunction, capability: CapabilityId) -> int:
    found = function.config.capability(capability)
    assert found is not None
    return found


def control(function: PciFunction, value: int) -> None:
    put(function, at(function, CapabilityId.MSI_X) + 2, value)


def sent(host: FakeHost) -> list[tuple[int, int]]:
    return [call[1:] for call in host.calls if call[0] == "send_msi"]


# The structure.


def test_the_capability_says_where_table_and_pba_are() -> None:
    function, _ = made()
    start = at(function, CapabilityId.MSI_X)
    dwords = [function.read_config(start // 4 + i) for i in range(3)]
    assert dwords == [39 << 16 | 0x11, 8, 0x800]
    control(function, 0xFFFF)
    assert function.read_config(start // 4) >> 16 == ENABLE | FUNCTION_MASK | 39


@pytest.mark.parametrize(
    "layout",
    [
        MsixLayout(0, 0, 0x800, 0),
        MsixLayout(0, 0, 0x800, 2049),
        MsixLayout(1, 0, 0x800, 1),
        MsixLayout(2, 0, 0x800, 1),
        MsixLayout(0, 4, 0x800, 1),
        MsixLayout(0, 0, 0x804, 1),
        MsixLayout(0, 0, 0x1000, 1),
        MsixLayout(0, 0xFF8, 0, 1),
        MsixLayout(0, 0, 0x8, 1),
        MsixLayout(0, -8, 0x800, 1),
    ],
)
def test_layouts_that_cannot_be(layout: MsixLayout) -> None:
    with pytest.raises(ValueError, match=r"MSI-X"):
        Header(1, 1, 0, bars=BARS, msix=layout)


@pytest.mark.parametrize("messages", [0, 3, 64])
def test_message_counts_that_cannot_be(messages: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Header(1, 1, 0, msi=MsiLayout(messages))


def test_the_rest_of_the_bar_is_the_models() -> None:
    bar = made()[0].handlers()[0]
    assert bar.read(0, 8) == 0x88
    assert bar.read(8 + 16 * 40, 4) == 0x44
    assert bar.read(4, 8) == 0x88, "half of it lies outside of the table"
    assert bar.read(0x808, 1) == 0x11
    assert bar.read(0x800, 8) == 0
    bar.write(0x800, 8, (1 << 64) - 1)
    assert bar.read(0x800, 8) == 0, "the pending bits are read-only"


def test_vectors_start_masked_and_reserved_bits_stay_zero() -> None:
    bar = made()[0].handlers()[0]
    assert [bar.read(8 + 16 * v + 12, 4) for v in (0, 39)] == [1, 1]
    for dword, kept in enumerate((0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF_FFFF, 1)):
        bar.write(8 + 16 + 4 * dword, 4, 0xFFFF_FFFF)
        assert bar.read(8 + 16 + 4 * dword, 4) == kept
    bar.write(8 + 16 + 3, 1, 0x12)
    bar.write(8 + 16 + 6, 4, 0xAABB_CCDD)
    assert bar.read(8 + 16, 8) == 0xCCDD_FFFF_12FF_FFFC
    assert bar.read(8 + 16 + 8, 8) == 0x1_FFFF_AABB
    assert bar.read(8, 8) == bar.read(8 + 32, 8) == 0, "the neighbours are untouched"


def test_a_vector_that_is_not_there_is_the_models_bug() -> None:
    function, _ = made()
    for trigger, wrong in ((function.msix.trigger, 40), (function.msi.trigger, 4)):
        for number in (-1, wrong):
            with pytest.raises(ValueError, match="there are"):
                trigger(number)
    with pytest.raises(ValueError, match="there are 0"):
        PlainFunction(FakeHost()).msix.trigger(0)


class PlainFunction(PciFunction):
    model: ClassVar[str] = "plain"

    def header(self) -> Header:
        return Header(0x1234, 1, 0)


def test_a_function_without_them_has_neither() -> None:
    function = PlainFunction(FakeHost())
    assert not function.msix.enabled
    assert not function.msi.enabled
    assert function.snapshot()["msix"] == {"table": [], "pending": []}


# The pin.


def test_the_pin_is_silent_while_either_is_enabled() -> None:
    function, host = made()
    function.set_intx(True)
    for start, bit in ((CapabilityId.MSI_X, ENABLE), (CapabilityId.MSI, 1)):
        put(function, at(function, start) + 2, bit)
        assert not host.irq
        assert function.read_config(COMMAND) >> 16 & Status.INTERRUPT_STATUS
        put(function, at(function, start) + 2, 0)
        assert host.irq
    control(function, ENABLE)
    host.forget()
    function.set_intx(False)
    function.set_intx(True)
    assert host.calls == []


def test_nothing_is_triggered_while_disabled() -> None:
    function, host = made()
    put(function, 4, MASTER)
    function.msix.trigger(0)
    function.msi.trigger(0)
    control(function, ENABLE)
    put(function, at(function, CapabilityId.MSI) + 2, 1)
    assert sent(host) == []


# MSI.


def test_msi_messages_fold_onto_those_that_are_enabled() -> None:
    function, host = made()
    start = at(function, CapabilityId.MSI)
    put(function, 4, MASTER)
    put(function, start + 4, 0xFEE0_1003, 4)
    put(function, start + 8, 2, 4)
    put(function, start + 12, 0x4047)
    put(function, start + 2, 1 | 1 << 4)
    for message in range(4):
        function.msi.trigger(message)
    assert sent(host) == [(0x2_FEE0_1000, 0x4046 + n) for n in (0, 1, 0, 1)]
    put(function, start + 2, 1 | 7 << 4)
    host.forget()
    function.msi.trigger(3)
    assert sent(host) == [(0x2_FEE0_1000, 0x4047)]


def test_msi_masked_is_pending_until_unmasked() -> None:
    function, host = made()
    start = at(function, CapabilityId.MSI)
    put(function, 4, MASTER)
    put(function, start + 2, 1 | 2 << 4)
    put(function, start + 16, 0b0101, 4)
    for message in range(4):
        function.msi.trigger(message)
    assert sent(host) == [(0, 1), (0, 3)]
    assert function.read_config((start + 20) // 4) == 0b0101
    put(function, start + 20, 0, 4)
    assert function.read_config((start + 20) // 4) == 0b0101, "read-only"
    put(function, start + 16, 0b0001, 4)
    assert sent(host)[2:] == [(0, 2)]
    put(function, 4, 0)
    put(function, start + 16, 0, 4)
    assert len(sent(host)) == 3, "no bus master, no message"
    put(function, 4, MASTER)
    assert sent(host)[3:] == [(0, 0)]
    assert function.read_config((start + 20) // 4) == 0


# MSI-X against a model.


class MsixMachine(RuleBasedStateMachine):
    """Each vector is a message, a mask and a pending bit; three switches hold them all."""

    vectors = 40

    @initialize()
    def build(self) -> None:
        self.function, self.host = made()
        self.bar = self.function.handlers()[0]
        self.message = [[0, 0, 0] for _ in range(self.vectors)]
        self.masked = [True] * self.vectors
        self.waits = [False] * self.vectors
        self.enabled = self.function_mask = self.master = False
        self.sent: list[tuple[int, int]] = []

    def flush(self) -> None:
        for vector in range(self.vectors):
            held = self.masked[vector] or self.function_mask or not (self.enabled and self.master)
            if self.waits[vector] and not held:
                self.waits[vector] = False
                low, high, data = self.message[vector]
                self.sent.append((high << 32 | low, data))

    @rule(vector=st.integers(0, vectors - 1))
    def trigger(self, vector: int) -> None:
        self.function.msix.trigger(vector)
        self.waits[vector] |= self.enabled
        self.flush()

    @rule(vector=st.integers(0, vectors - 1), masked=st.booleans())
    def mask(self, vector: int, masked: bool) -> None:
        self.bar.write(8 + 16 * vector + 12, 4, masked)
        self.masked[vector] = masked
        self.flush()

    @rule(vector=st.integers(0, vectors - 1), dword=st.integers(0, 2), value=st.integers(0, 2**32))
    def message_of(self, vector: int, dword: int, value: int) -> None:
        value = value & 0xFFFF_FFFC if dword == 0 else value & 0xFFFF_FFFF
        self.message[vector][dword] = value
        self.bar.write(8 + 16 * vector + 4 * dword, 4, value)

    @rule(vector=st.integers(0, vectors - 1), data=st.integers(0, 2**32 - 1), masked=st.booleans())
    def data_and_mask_at_once(self, vector: int, data: int, masked: bool) -> None:
        self.bar.write(8 + 16 * vector + 8, 8, data | masked << 32)
        self.message[vector][2], self.masked[vector] = data, masked
        self.flush()

    @rule(enabled=st.booleans(), function_mask=st.booleans())
    def switch(self, enabled: bool, function_mask: bool) -> None:
        control(self.function, enabled * ENABLE | function_mask * FUNCTION_MASK)
        self.enabled, self.function_mask = enabled, function_mask
        self.flush()

    @rule(master=st.booleans())
    def bus_master(self, master: bool) -> None:
        put(self.function, 4, master * MASTER)
        self.master = master
        self.flush()

    @rule()
    def move_to_another_process(self) -> None:
        saved = msgspec.json.decode(msgspec.json.encode(self.function.snapshot()))
        host = FakeHost()
        self.function = Both(host)
        self.function.restore(saved)
        assert sent(host) == []
        host.calls[:] = self.host.calls
        self.host, self.bar = host, self.function.handlers()[0]

    @invariant()
    def agrees(self) -> None:
        assert sent(self.host) == self.sent
        bits = sum(1 << vector for vector, waits in enumerate(self.waits) if waits)
        assert self.bar.read(0x800, 8) == bits
        for vector in range(self.vectors):
            table = b"".join(
                self.bar.read(8 + 16 * vector + 8 * half, 8).to_bytes(8, "little")
                for half in range(2)
            )
            assert struct.unpack("<4I", table) == (*self.message[vector], self.masked[vector])


MsixMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMsixMachine = MsixMachine.TestCase


# State.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("table", [0, 0, 0, 1] * 39),
        ("table", [1, 0, 0, 1] * 40),
        ("table", [0, 0, 0, 2] * 40),
        ("table", [1 << 32, 0, 0, 1] * 40),
        ("table", [-1, 0, 0, 1] * 40),
        ("pending", [0]),
        ("pending", [0, 1 << 8]),
        ("pending", [-1, 0]),
    ],
)
def test_states_that_cannot_be(key: str, value: list[int]) -> None:
    function, _ = made()
    saved = function.snapshot()
    saved["msix"][key] = value
    with pytest.raises(DeviceError, match="MSI-X"):
        function.restore(saved)


# The way to the local APIC.


@pytest.fixture(params=["jail", "none"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(memory="16M", devices=()) as made:
        made.add_device("config-space", "cs", isolated=request.param == "jail")
        yield made


class Driver:
    """Drives the example function over the buses of a machine that runs nothing."""

    def __init__(self, machine: Machine) -> None:
        self.parts: Any = machine.parts
        self.root = self.parts.pci
        self.chip = self.parts.board.irqchip
        self.mmio = self.parts.buses[BusType.MMIO]
        self.attachment = self.parts.wiring.attached["cs"]
        self.base = 0xE100_0000
        self.number = self.attachment.slot.number
        self.config(4, 0xE100_0000, 4, at=0x10)
        self.mmio.write(0xFEE0_00F0, 4, 0x1FF)

    def config(self, _: int, value: int, size: int, at: int) -> None:
        self.root.write_config(self.number, at // 4, at % 4, value.to_bytes(size, "little"))

    def command(self, bits: int) -> None:
        self.config(0, bits, 2, at=4)

    def msix(self, bits: int) -> None:
        start = next(o for o in range(0x40, 0x80, 4) if self.read(o) & 0xFF == 0x11)
        self.config(0, bits, 2, at=start + 2)

    def read(self, offset: int) -> int:
        value: int = self.root.read_config(self.number, offset // 4)
        return value

    def register(self, offset: int, value: int) -> None:
        self.mmio.write(self.base + offset, 4, value)
        self.mmio.read(self.base, 4)  # flushes what was posted

    def vector(self, index: int, address: int, data: int, masked: int = 0) -> None:
        for dword, value in enumerate((address & 0xFFFF_FFFF, address >> 32, data, masked)):
            self.register(MSIX.table_offset + 16 * index + 4 * dword, value)

    def taken(self) -> int:
        """The vector that the CPU is given, 0 for none."""
        if not self.chip.pending():
            return 0
        vector: int = self.chip.acknowledge()
        self.mmio.write(0xFEE0_00B0, 4, 0)
        return vector


def test_a_message_reaches_the_local_apic(machine: Machine) -> None:
    it = Driver(machine)
    it.command(MASTER | 2)
    it.msix(ENABLE)
    for index in range(4):
        it.vector(index, 0xFEE0_0000, 0x41 + index)
    it.register(0x18, 0xFF)
    it.register(0x14, 1 << 5)
    assert it.taken() == 0x42
    assert it.taken() == 0
    it.register(0x10, 0xFF)
    it.vector(1, 0xFEE0_0000, 0x55, masked=1)
    it.register(0x14, 1 << 5)
    assert it.taken() == 0
    assert it.mmio.read(it.base + MSIX.pba_offset, 4) == 2
    it.vector(1, 0xFEE0_0000, 0x56, masked=0)
    assert it.taken() == 0x56
    assert it.parts.wiring.lost_msis == 0


def test_what_is_pending_comes_when_the_guest_makes_it_a_bus_master(machine: Machine) -> None:
    it = Driver(machine)
    it.command(2)
    it.msix(ENABLE)
    it.vector(0, 0xFEE0_0000, 0x61)
    it.register(0x18, 1)
    it.register(0x14, 1)
    assert it.taken() == 0
    it.command(MASTER | 2)
    assert it.taken() == 0x61
    assert it.parts.wiring.lost_msis == 0


def test_a_message_to_nowhere_is_counted_and_logged(machine: Machine) -> None:
    it = Driver(machine)
    it.command(MASTER | 2)
    it.msix(ENABLE)
    it.register(0x18, 0xFFFF_FFFF)
    for address in (0, 0xFED0_0000, 0x1_FEE0_0000, (1 << 64) - 4):
        it.vector(0, address, 0x41)
        it.register(0x14, 1)
        it.register(0x10, 1)
    assert it.taken() == 0
    assert it.parts.wiring.lost_msis == 4
    assert it.parts.wiring.log_lines[-1] == (
        "cs",
        "MSI 0x41 to 0xfffffffffffffffc is lost: no interrupt controller takes it",
    )
    for _ in range(100):
        it.register(0x14, 1)
        it.register(0x10, 1)
    assert it.parts.wiring.lost_msis == 104
    assert len(it.parts.wiring.log_lines) < 60


class Rogue(ConfigSpaceDevice):
    """Sends messages when its first port is written, whatever the guest allowed."""

    model: ClassVar[str] = "rogue"

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self.host.send_msi(0xFEE0_0000, value)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_function_that_is_no_bus_master_is_not_heard(isolated: bool) -> None:
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device(Rogue, "cs", isolated=isolated)
        it = Driver(machine)
        it.command(2)
        it.register(0, 0x41)
        assert it.taken() == 0
        assert it.parts.wiring.lost_msis == 1
        assert "no bus master" in it.parts.wiring.log_lines[-1][1]
        it.command(MASTER | 2)
        it.register(0, 0x42)
        assert it.taken() == 0x42
        it.register(0, 0x700 | 0x4000)  # a delivery mode that only the I/O APIC has
        assert it.taken() == 0


class LastWord(ConfigSpaceDevice):
    """Sends a message when Command is written, as one whose message crosses the write would."""

    model: ClassVar[str] = "last-word"

    def config_written(self, register: int) -> None:
        if register == COMMAND:
            self.host.send_msi(0xFEE0_0000, 0x43)


def test_a_message_that_crosses_the_end_of_bus_mastering_is_heard() -> None:
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device(LastWord, "cs")
        it = Driver(machine)
        it.command(0)
        assert it.taken() == 0
        for bits in (MASTER, 0):
            it.command(bits)
            assert it.taken() == 0x43
        it.command(0)
        assert it.taken() == 0
