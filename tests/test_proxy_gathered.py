"""Several messages in one datagram: what a child says on the way comes with the answer."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy_helpers import Recorder, activate, child_of

from proxy import messages as m
from proxy.device import ProxyDevice
from proxy.errors import ProtocolFault
from proxy.host import ChildHost
from proxy.tube import GATHERED, MOST_GATHERED, gathered, pair, scattered

IRQ, MSI = m.IrqLevel(True, 1).encode(), m.Msi(5, 0xFEE0_0000).encode()
OK = m.Ok().encode()


@given(
    st.lists(
        st.binary(min_size=1, max_size=50).filter(lambda data: data[0] < 0xF0),
        min_size=1,
        max_size=MOST_GATHERED,
    )
)
def test_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    assert scattered(gathered(messages)) == messages


@given(st.binary(max_size=60))
def test_any_bytes_are_messages_or_a_fault(body: bytes) -> None:
    datagram = bytes((GATHERED,)) + body
    try:
        messages = scattered(datagram)
    except ProtocolFault:
        return
    assert gathered(messages) == datagram


BROKEN = [
    b"\xf2",
    b"\xf2\1",
    b"\xf2\0\0",
    b"\xf2\2\0\x40",
    gathered([OK]) + b"\0",
    gathered([OK] * (MOST_GATHERED + 1)),
    gathered([gathered([OK])]),
    gathered([b"\xf0\0\0\0" + bytes(40)]),
]
"""Framing that is none."""


@pytest.mark.parametrize("datagram", BROKEN, ids=range(len(BROKEN)))
def test_broken_framing_is_a_fault(datagram: bytes) -> None:
    with pytest.raises(ProtocolFault):
        scattered(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        *BROKEN,
        gathered([IRQ, IRQ[:-1], OK]),
        gathered([IRQ, m.InputResult(3).encode()]),
        gathered([OK, IRQ]),
        gathered([OK, OK]),
        gathered([IRQ, b"\xef", OK]),
    ],
)
def test_what_cannot_be_in_one_is_the_devices_failure(datagram: bytes) -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        tube.send(datagram)
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        device.sync()
        assert device.failed is not None
        assert "broke the protocol" in str(device.failed)


def test_upcalls_of_a_sleeping_child_are_refused_in_company_too() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        tube.recv(100)
        tube.send(OK)
        tube.send(gathered([IRQ]))
        os.write(bell, b"!")
        time.sleep(60)

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events)
        device.sleep()
        while device.failed is None:
            device.drain()
        assert not events.seen


def test_a_drain_counts_each_of_them() -> None:
    def script(tube: socket.socket, bell: int, words: object) -> None:
        activate(tube)
        while True:
            tube.send(gathered([IRQ] * MOST_GATHERED))

    events = Recorder()
    with child_of(script) as child:
        device = ProxyDevice(child, events, deadline=0.2)
        while not device.drain():
            events.seen.clear()
        assert 256 <= len(events.seen) < 256 + MOST_GATHERED


# The child's side.


@pytest.fixture
def ends() -> Iterator[tuple[ChildHost, socket.socket]]:
    """A host and the machine's end of its tube."""
    here, there = pair()
    here.setblocking(False)
    bell = os.open("/dev/null", os.O_WRONLY)
    with here, there:
        yield ChildHost(there, bell, {}), here
    os.close(bell)


def heard(end: socket.socket) -> list[bytes]:
    """The datagrams that wait."""
    found = []
    while True:
        try:
            found.append(end.recv(1 << 16))
        except BlockingIOError:
            return found


def test_interrupts_and_pages_go_with_the_answer(ends: tuple[ChildHost, socket.socket]) -> None:
    host, end = ends
    host.wrote_pages(7, 2)
    host.send_msi(0xFEE0_0000, 5)
    host.set_irq(True, 1)
    assert heard(end) == []
    host.answer(OK)
    assert heard(end) == [gathered([m.WrotePages(((7, 2),)).encode(), MSI, IRQ, OK])]
    assert host.sent == 3
    host.answer(OK)
    assert heard(end) == [OK]


def test_nothing_overtakes_what_was_kept(ends: tuple[ChildHost, socket.socket]) -> None:
    host, end = ends
    host.set_irq(True, 1)
    host.log("hello")
    host.send_msi(0xFEE0_0000, 5)
    host.answer(OK)
    assert heard(end) == [gathered([IRQ]), m.Log("hello").encode(), gathered([MSI, OK])]


def test_nothing_is_kept_when_no_answer_is_due(ends: tuple[ChildHost, socket.socket]) -> None:
    host, end = ends
    host.quiet = False
    host.set_irq(True, 1)
    assert heard(end) == [IRQ]


def test_many_are_cut_into_datagrams_that_are_taken(ends: tuple[ChildHost, socket.socket]) -> None:
    host, end = ends
    runs = [(2 * n, 1) for n in range(20 * m.MAX_RUNS)]
    host.turns.memory.map([(0, memoryview(bytearray(1)))])
    for first, count in runs:
        host.turns.memory.mark(first << 12, count << 12)
    host.turns.memory.flush()
    host.answer(OK)
    told: list[tuple[int, int]] = []
    for datagram in heard(end):
        assert len(datagram) <= 32 << 10
        for message in scattered(datagram):
            said = m.decode(message, m.FROM_CHILD)
            told += said.runs if isinstance(said, m.WrotePages) else []
    assert told == runs
