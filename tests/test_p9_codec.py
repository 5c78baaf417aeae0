"""The messages of 9P2000.L, byte by byte and by chance."""

from __future__ import annotations

import struct
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.virtio.p9 import messages as m
from devices.virtio.p9.codec import HEADER, CodecError, Message, Qid, decode, encode

EXAMPLES: list[tuple[Message, str]] = [
    (m.Version(8192, b"9P2000.L"), "15000000 64 0700 00200000 0800 39503230 30302e4c"),
    (m.Rversion(8192, b"unknown"), "14000000 65 0700 00200000 0700 756e6b6e6f776e"),
    (m.Rlerror(2), "0b000000 07 0700 02000000"),
    (
        m.Attach(1, 0xFFFFFFFF, b"root", b"", 0),
        "1b000000 68 0700 01000000 ffffffff 0400 726f6f74 0000 00000000",
    ),
    (m.Rattach(Qid(0x80, 3, 2)), "14000000 69 0700 80 03000000 0200000000000000"),
    (m.Walk(0, 1, ()), "11000000 6e 0700 00000000 01000000 0000"),
    (
        m.Walk(0, 1, (b"a", b"bc")),
        "18000000 6e 0700 00000000 01000000 0200 0100 61 0200 6263",
    ),
    (m.Rwalk((Qid(0, 1, 2),)), "16000000 6f 0700 0100 00 01000000 0200000000000000"),
    (m.Read(1, 1 << 33, 4), "17000000 74 0700 01000000 0000000002000000 04000000"),
    (m.Rread(b"data"), "0f000000 75 0700 04000000 64617461"),
    (m.Write(1, 0, b"x"), "18000000 76 0700 01000000 0000000000000000 01000000 78"),
    (m.Flush(0xFFFE), "09000000 6c 0700 feff"),
    (m.Rclunk(), "07000000 79 0700"),
    (
        m.Renameat(1, b"a", 2, b"b"),
        "15000000 4a 0700 01000000 0100 61 02000000 0100 62",
    ),
    (
        m.Lock(1, 1, 1, 0, 8, 9, b"me"),
        "28000000 34 0700 01000000 01 010000000000000000000000 0800000000000000 09000000 0200 6d65",
    ),
]


@pytest.mark.parametrize(("message", "text"), EXAMPLES, ids=lambda each: str(each)[:24])
def test_bytes_as_on_the_wire(message: Message, text: str) -> None:
    data = bytes.fromhex(text)
    assert encode(message, 7) == data
    size, number, tag = HEADER.unpack_from(data)
    assert (size, number, tag) == (len(data), message.number, 7)
    assert decode(m.MESSAGES[number], data[HEADER.size :]) == message


_LEAVES: dict[str, Any] = {
    "B": st.integers(0, 0xFF),
    "H": st.integers(0, 0xFFFF),
    "I": st.integers(0, 0xFFFF_FFFF),
    "Q": st.integers(0, (1 << 64) - 1),
    "text": st.binary(max_size=20),
    "data": st.binary(max_size=40),
    "names": st.lists(st.binary(max_size=5), max_size=4).map(tuple),
}
_LEAVES["qid"] = st.builds(Qid, _LEAVES["B"], _LEAVES["I"], _LEAVES["Q"])
_LEAVES["qids"] = st.lists(_LEAVES["qid"], max_size=4).map(tuple)


def any_of(kind: type[Message]) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(
        kind, *[_LEAVES[hints[name].__metadata__[0]] for name in kind.__struct_fields__]
    )


messages = st.sampled_from(list(m.MESSAGES.values())).flatmap(any_of)


@given(messages, st.integers(0, 0xFFFF))
def test_what_is_written_is_read(message: Message, tag: int) -> None:
    data = encode(message, tag)
    assert HEADER.unpack_from(data) == (len(data), message.number, tag)
    assert decode(type(message), data[HEADER.size :]) == message


@given(messages)
def test_cut_anywhere_or_followed_by_anything_it_is_refused(message: Message) -> None:
    body = encode(message, 0)[HEADER.size :]
    for length in range(len(body)):
        with pytest.raises(CodecError, match="cut short"):
            decode(type(message), body[:length])
    with pytest.raises(CodecError, match="follows"):
        decode(type(message), body + b"\0")


@given(st.sampled_from(list(m.MESSAGES.values())), st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(kind: type[Message], body: bytes) -> None:
    try:
        message = decode(kind, body)
    except CodecError:
        return
    assert encode(message, 1)[HEADER.size :] == body


def test_counts_that_promise_too_much() -> None:
    for body in (struct.pack("<IIH", 0, 1, 0xFFFF), struct.pack("<IIHH", 0, 1, 1, 0xFFFF)):
        with pytest.raises(CodecError):
            decode(m.Walk, body)
    with pytest.raises(CodecError):
        decode(m.Rread, struct.pack("<I", 0xFFFF_FFFF))


@pytest.mark.parametrize(
    "message",
    [m.Clunk(1 << 32), m.Clunk(-1), m.Rlock(256), m.Rreadlink(bytes(1 << 16))],
    ids=["large", "negative", "byte", "long"],
)
def test_what_does_not_fit_cannot_be_written(message: Message) -> None:
    with pytest.raises(CodecError):
        encode(message, 0)


def test_numbers_are_those_of_the_protocol() -> None:
    """Requests are even, and each reply that there is has the next number."""
    for number, kind in m.MESSAGES.items():
        if number % 2:
            assert kind.__name__ == "Rlerror" or kind.__name__[0] == "R"
        elif number + 1 in m.MESSAGES:
            assert m.MESSAGES[number + 1].__name__ == "R" + kind.__name__.lower()
    assert len(m.MESSAGES) == len({kind.__name__ for kind in m.MESSAGES.values()})
    assert msgspec.structs.fields(m.Rgetattr)[0].name == "valid"
