"""The bytes of messages: round trips, strictness, and what hostile bytes can do (nothing)."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.bus import BusType, Range
from devices.contract import Region
from devices.pci.contract import BarInfo, ConfigWriteResult, RegionRange
from proxy import messages as m
from proxy.errors import ProtocolFault
from proxy.tube import MAX_DATAGRAM, Assembler, frames

RESULT = ConfigWriteResult(
    mmio_remove=[RegionRange(0, Range(0x1000, 0x1000))], io_add=[RegionRange(1, Range(0x20, 4))]
)
REGIONS = (Region("a", BusType.PIO, 8, 0x510), Region("b", BusType.MMIO, 0x1000))
SHAPE = m.Shape(REGIONS, True, (BarInfo(0, 1, BusType.MMIO, 0x1000, True, False),), True)

SAMPLES: list[m.Message] = [
    m.Activate(),
    m.Read(8, 1, 2, 3, 1 << 63),
    m.Write(1, 255, 0xFFFF_FFFF, 0, 5, (1 << 64) - 1),
    m.SyncedWrite(8, 0, 1, 2, 3, 4),
    m.TakeAhead(True, 1, 508),
    m.MapGuestMemory((m.MemoryRegion(0, 4096, 0), m.MemoryRegion(1 << 32, 8192, 4096))),
    m.MapGrants(1 << 24),
    m.ReadConfig(63),
    m.WriteConfig(1, 3, 4, b"abc\0"),
    m.InitPciConfigMapping(0, 256),
    m.ReadVirtualConfig(1),
    m.WriteVirtualConfig(1, 2),
    m.DestroyDevice(),
    m.Shutdown(),
    m.GetRanges(),
    m.Snapshot(),
    m.Restore({"a": [1, None, "x", True, -5]}),
    m.Sleep(),
    m.Wake(),
    m.Input(b"\0\xff"),
    m.Adjust({"columns": 80, "name": "x", "on": True}),
    m.Sync(),
    m.LaneOpen(0, 1),
    m.LaneClose(),
    m.Ok(),
    m.Refused("no"),
    m.Activated(SHAPE, True),
    m.ReadResult(4, 77),
    m.ReadConfigResult(0xFFFF_FFFF),
    m.WriteConfigResult(RESULT),
    m.MappingResult(True),
    m.ReadVirtualConfigResult(9),
    m.Ranges((m.ClaimedRange(0, BusType.PIO, Range(0x510, 8)),)),
    m.SnapshotResult({"deep": {"er": []}}),
    m.InputResult(2),
    m.Ahead(b"\0\1"),
    m.IrqLevel(True, 3),
    m.Msi(1, 0xFEE0_0000),
    m.WrotePages(((1, 2), (7, 1))),
    m.Log("a line"),
    m.Output(b"bytes"),
    m.InputWanted(),
    m.ExitRequest(1 << 40),
    m.LastWords("farewell"),
    m.WantTurn(),
]


def table(data: bytes) -> dict[int, type[m.Message]]:
    return dict(m.COMMANDS if data[:1] < b"\x40" else m.FROM_CHILD)


def test_no_two_messages_share_an_opcode() -> None:
    kinds = {each.opcode: each for each in m._ALL}
    assert [each for each in m._ALL if kinds[each.opcode] is not each and each.opcode] == []


def test_every_message_has_a_sample() -> None:
    assert {type(each) for each in SAMPLES} == {*m.COMMANDS.values(), *m.FROM_CHILD.values()}


@pytest.mark.parametrize("message", SAMPLES, ids=lambda each: type(each).__name__)
def test_round_trip(message: m.Message) -> None:
    data = message.encode()
    assert data[0] == message.opcode
    assert m.decode(data, table(data)) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda each: type(each).__name__)
def test_fixed_and_json_messages_refuse_any_other_length(message: m.Message) -> None:
    data = message.encode()
    free_form = isinstance(message, (m.Input, m.Ahead, m.Output, m.Log, m.Refused, m.LastWords))
    for short in range(len(data)):
        if free_form and short >= 1:
            continue
        with pytest.raises(ProtocolFault):
            m.decode(data[:short], table(data))
    if not free_form:
        with pytest.raises(ProtocolFault):
            m.decode(data + b"\0", table(data))
        with pytest.raises(ProtocolFault):
            m.decode(data + data, table(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x3f",
        b"\xff" * 40,
        b"\x43\x04\0\0\0\0\0\1" + bytes(8),  # a padding byte that is not zero
        b"\x43\x09" + bytes(14),  # nine bytes read
        b"\x43\x00" + bytes(14),
        b"\x46\x02",  # a boolean that is neither
        b"\x80\x02\x00",
        b"\x42{}",
        b'\x42{"shape":{},"lane":true,"more":1}',
        b'\x42{"shape":{"regions":[{"name":"x","bus":"isa","length":1}]},"lane":false}',
        b'\x48{"ranges":[{"region":0,"bus":"pio","range":{"start":-1,"length":8}}]}',
        b'\x48{"ranges":[{"region":0,"bus":"pio","range":{"start":0,"length":0}}]}',
        b'\x48{"ranges":[{"region":"0","bus":"pio","range":{"start":0,"length":1}}]}',
        b'\x49{"state":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'\x49{"state":1}x',
        b"\x45" + b" " * (16 << 10),
        b"\x83" + b"x" * (m.MAX_TEXT + 1),
        b"\x84" + b"x" * (m.MAX_BYTES + 1),
        b"\x82\x01\0\0\0" + b"\xff" * 16,
        b"\x82\x02\0\0\0" + bytes(16),
        m.WrotePages(((1, 2),)).encode()[:-1],
    ],
    ids=lambda data: data[:8].hex() or "empty",
)
def test_malformed_messages_of_a_child_are_faults(data: bytes) -> None:
    with pytest.raises(ProtocolFault):
        m.decode(data, m.FROM_CHILD)


def test_a_child_cannot_send_commands_nor_the_machine_replies() -> None:
    with pytest.raises(ProtocolFault):
        m.decode(m.Activate().encode(), m.FROM_CHILD)
    with pytest.raises(ProtocolFault):
        m.decode(m.Ok().encode(), m.COMMANDS)


@pytest.mark.parametrize(
    "message",
    [m.Output(bytes(m.MAX_BYTES + 1)), m.Restore("x" * m.MAX_MESSAGE), m.Restore({1, object()})],
    ids=["long output", "long state", "no plain value"],
)
def test_what_cannot_be_expressed_is_refused_by_the_sender(message: m.Message) -> None:
    with pytest.raises(ValueError, match=type(message).__name__):
        message.encode()


def test_text_from_a_child_cannot_steer_the_terminal() -> None:
    message = m.decode(b"\x83a\x1b[2Jb\r\n\xff", m.FROM_CHILD)
    assert isinstance(message, m.Log)
    assert message.text.isprintable()


def test_long_text_is_cut_not_refused() -> None:
    assert len(m.Log("é" * 5000).encode()) <= m.Log.limit


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_fault(data: bytes) -> None:
    for known in (m.COMMANDS, m.FROM_CHILD):
        try:
            message = m.decode(data, known)
        except ProtocolFault:
            continue
        assert message.opcode == data[0]


@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_messages_are_a_message_or_a_fault(message: m.Message, draw: st.DataObject) -> None:
    data = bytearray(message.encode())
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolFault):
        m.decode(bytes(data), m.FROM_CHILD)


@settings(deadline=None)
@given(st.integers(0, 4 * MAX_DATAGRAM))
def test_frames_assemble_to_the_same_message(size: int) -> None:
    data = bytes(index * 7 & 0xFF for index in range(size)).replace(b"\xf0", b"\x0f")
    assembler = Assembler(m.MAX_MESSAGE)
    whole = None
    for part in frames(data):
        assert whole is None
        assert len(part) <= MAX_DATAGRAM
        whole = assembler.feed(part)
    assert whole == data


def chunks(size: int = 3 * MAX_DATAGRAM) -> list[bytes]:
    return list(frames(bytes(size)))


@pytest.mark.parametrize(
    "sent",
    [
        [bytes(MAX_DATAGRAM + 1)],
        [b"\xf0"],
        [b"\xf0" + bytes(11)],
        [chunks()[0][:12]],
        [chunks()[1]],
        [chunks()[0], chunks()[0]],
        [chunks()[0], chunks()[2]],
        [chunks()[0], b"\x40"],
        [chunks()[0], chunks(5 * MAX_DATAGRAM)[1]],
        [chunks(17 << 20)[0]],
        [b"\xf0\1" + chunks()[0][2:]],
        [*chunks()[:-1], chunks()[-1] + b"x"],
        [b"\xf0\0\0\0" + (40).to_bytes(4, "little") + bytes(4) + bytes(40)],
    ],
    ids=range(13),
)
def test_broken_framing_is_a_fault(sent: list[bytes]) -> None:
    assembler = Assembler(16 << 20)

    def feed() -> None:
        for part in sent:
            assembler.feed(part)

    with pytest.raises(ProtocolFault):
        feed()
