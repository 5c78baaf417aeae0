"""The socket device by the rules of virtio 1.2, 5.10, with a driver and a machine of the tests'."""

from __future__ import annotations

import errno
import os
import random
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import F_EVENT_IDX, F_INDIRECT, F_PACKED, NEEDS_RESET
from vsock_rig import CID, Guest, guest, read_now, read_until

from devices.errors import UserError
from devices.registry import parse_options
from devices.virtio.vsock import device as vsock
from devices.virtio.vsock import link
from devices.virtio.vsock.device import FIRST_PORT, MOST_STREAMS, RX, TX, Vsock
from devices.virtio.vsock.greeting import wanted_port
from devices.virtio.vsock.packet import HEADER_SIZE, Header, Op
from devices.virtio.vsock.stream import ROOM

NO_MORE_RECEIVED, NO_MORE_SENT = 1, 2


def greet(host: Guest, port: int = 77) -> tuple[socket.socket, int]:
    """A program of the host connects to a port; its socket, and the host's port."""
    program = host.visit()
    program.send(b"CONNECT %d\n" % port)
    host.look()
    ((header, _),) = host.received
    host.received.clear()
    assert (header.op, header.dst_port) == (Op.REQUEST, port)
    assert header.buf_alloc == ROOM
    return program, header.src_port


# What it is.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"path": "x", "cid": 2},
        {"path": "x", "cid": 0xFFFF_FFFF},
        {"path": "x" * 97},
        {"path": "a\0b"},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="device 'vsock'"):
        parse_options(Vsock, options)


def test_configuration() -> None:
    with guest() as host:
        assert host.driver.config(0, 8) == CID
        assert host.driver.offered() & 1


@given(st.lists(st.integers(0, (1 << 16) - 1), min_size=10, max_size=10))
def test_headers(values: list[int]) -> None:
    header = Header(*values)
    data = header.pack()
    assert len(data) == HEADER_SIZE == 44
    assert Header.unpack(data) == header
    # struct virtio_vsock_hdr: no padding, little-endian.
    widths = (8, 8, 4, 4, 4, 2, 2, 4, 4, 4)
    wanted = b"".join(v.to_bytes(n, "little") for v, n in zip(values, widths, strict=True))
    assert data == wanted


# Connections that the guest begins.


@pytest.mark.parametrize("features", [0, F_PACKED, F_INDIRECT, F_EVENT_IDX, F_PACKED | F_EVENT_IDX])
def test_the_guest_connects(features: int) -> None:
    with guest(features=features) as host:
        program = host.connected()
        host.send(Op.RW, data=b"from the guest")
        assert read_now(program) == b"from the guest"
        program.send(b"from the host")
        assert host.take() == [("RW", b"from the host")]
        program.close()
        assert host.take() == [("SHUTDOWN", b"")]
        host.send(Op.SHUTDOWN, flags=NO_MORE_RECEIVED | NO_MORE_SENT)
        assert host.take() == [("RST", b"")]
        host.send(Op.RW, data=b"late")
        assert host.take() == [("RST", b"")]


def test_nobody_listens() -> None:
    with guest() as host:
        host.send(Op.REQUEST)
        assert host.asked() == 2000
        socket.send_fds(host.machine, *link.answer(OSError(errno.ENOENT, "")))
        assert host.take() == [("RST", b"")]
        host.connected()  # the same ports again


def test_the_guest_thinks_better_of_it() -> None:
    """An answer that comes too late is not given to the next that asks."""
    with guest() as host:
        host.send(Op.REQUEST, 1, 1)
        host.send(Op.RST, 1, 1)
        host.send(Op.REQUEST, 2, 2)
        assert (host.asked(), host.asked()) == (1, 2)
        first = host.grant()
        assert read_now(first) == b""  # closed
        assert host.take() == []
        second = host.grant()
        assert host.take() == [("RESPONSE", b"")]
        host.send(Op.RW, 2, 2, b"second")
        assert read_now(second) == b"second"


def test_half_closed_either_way() -> None:
    with guest() as host:
        program = host.connected()
        host.send(Op.SHUTDOWN, flags=NO_MORE_SENT)
        assert read_now(program) == b""
        program.send(b"still")
        assert host.take() == [("RW", b"still")]
        host.send(Op.RW, data=b"x")  # after it said that it sends no more
        assert host.take() == [("RST", b"")]
        program = host.connected()
        program.shutdown(socket.SHUT_WR)
        ((header, _),) = (host.look(), host.received)[1]
        assert (header.op, header.flags) == (Op.SHUTDOWN, NO_MORE_SENT)
        host.received.clear()
        host.send(Op.RW, data=b"answer")
        assert read_now(program) == b"answer"
        program = host.connected(host=2001)
        host.send(Op.SHUTDOWN, host=2001, flags=NO_MORE_RECEIVED)
        program.send(b"unheard")
        assert host.take() == []
        host.send(Op.RW, host=2001, data=b"spoken")
        assert read_now(program) == b"spoken"


def test_the_program_is_gone() -> None:
    with guest() as host:
        host.connected().close()
        host.take()
        host.send(Op.RW, data=b"x")
        assert host.take() == [("RST", b"")]


# Connections that the host begins.


def test_the_host_connects() -> None:
    with guest() as host:
        program, port = greet(host)
        assert port == FIRST_PORT
        program.send(b"early")  # not before the answer
        assert host.take() == []
        host.send(Op.RESPONSE, 77, port)
        assert read_now(program) == b"OK %d\n" % port
        assert host.take() == [("RW", b"early")]
        host.send(Op.RW, 77, port, b"hello")
        assert read_now(program) == b"hello"
        _, second = greet(host)
        assert second == FIRST_PORT + 1


def test_the_guest_refuses() -> None:
    with guest() as host:
        program, port = greet(host)
        host.send(Op.RST, 77, port)
        assert read_now(program) == b""


def test_a_greeting_in_pieces_and_no_byte_more() -> None:
    with guest() as host:
        program = host.visit()
        for part in (b"CON", b"NECT 7", b"7"):
            program.send(part)
            assert host.take() == []
        program.send(b"\nthe data")
        assert host.take() == [("REQUEST", b"")]
        host.send(Op.RESPONSE, 77, FIRST_PORT)
        assert host.take() == [("RW", b"the data")]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"HELO 7\n",
        b"CONNECT 7 7\n",
        b"CONNECT x\n",
        b"CONNECT 7" + b"7" * 40,
        "CONNECT \u0667\n".encode(),
    ],
)
def test_greetings_that_lead_nowhere(line: bytes) -> None:
    with guest() as host:
        program = host.visit()
        program.send(line)
        assert host.take() == []
        assert read_now(program) == b""


@given(st.binary(max_size=40))
def test_any_greeting(line: bytes) -> None:
    port = wanted_port(line)
    assert port is None or (0 <= port < 1 << 32 and line.upper().startswith(b"CONNECT "))


def test_greeting_forms() -> None:
    assert wanted_port(b"CONNECT 0\n") == 0
    assert wanted_port(b"connect 4294967295\r\n") == 0xFFFF_FFFF


def test_before_the_driver_is_there_nobody_is_let_in() -> None:
    with guest() as host:
        host.driver.reset()
        program = host.visit()
        assert read_now(program) == b""


# Credit.


def test_the_guest_is_sent_no_more_than_it_has_room_for() -> None:
    with guest() as host:
        program = host.connected(room=5000)
        program.send(b"x" * 20_000)
        sizes = [len(data) for _, data in host.take()]
        assert sum(sizes) == 5000
        assert program.send(b"y") == 1
        host.send(Op.CREDIT_UPDATE, room=5000, taken=3000)
        assert sum(len(data) for _, data in host.take()) == 3000
        host.send(Op.CREDIT_UPDATE, room=100, taken=3000)  # less than is on its way
        assert host.take() == []
        host.send(Op.CREDIT_UPDATE, room=1 << 20, taken=8000)
        assert sum(len(data) for _, data in host.take()) == 12_001
        host.send(Op.CREDIT_REQUEST)
        assert host.take() == [("CREDIT_UPDATE", b"")]


def test_credit_goes_round_at_32_bits() -> None:
    with guest() as host:
        program = host.connected(room=4096)
        (stream,) = host.device._streams.values()
        stream.sent = stream.peer_taken = (1 << 32) - 100
        stream.taken = stream.told = (1 << 32) - 3
        program.send(b"z" * 10_000)
        assert sum(len(data) for _, data in host.take()) == 4096
        host.send(Op.RW, data=b"abcdef", room=4096, taken=3996)
        assert sum(len(data) for _, data in host.take()) == 4096
        assert read_now(program) == b"abcdef"
        host.send(Op.CREDIT_REQUEST, room=4096, taken=3996)
        host.look()
        assert host.received[-1][0].fwd_cnt == 3


def test_what_the_program_does_not_take_waits_and_credit_comes_back() -> None:
    with guest() as host:
        program = host.connected()
        data = random.Random(1).randbytes(4 * ROOM)
        sent = told = 0
        got = b""
        while len(got) < len(data):
            while sent - told < ROOM and sent < len(data):
                part = data[sent : sent + min(30_000, ROOM - (sent - told))]
                host.send(Op.RW, data=part)
                sent += len(part)
                for header, _ in host.received:
                    assert header.op == Op.CREDIT_UPDATE
                    told = header.fwd_cnt
                host.received.clear()
            before = len(got)
            got += read_now(program) or b""
            host.look()
            for header, _ in host.received:
                told = header.fwd_cnt
            host.received.clear()
            assert len(got) > before
        assert got == data


def test_more_than_its_credit_ends_a_connection() -> None:
    with guest() as host:
        program = host.connected()
        part = bytes(60_000)
        for _ in range(20):
            host.send(Op.RW, data=part)
            if any(header.op == Op.RST for header, _ in host.received):
                break
        assert host.received[-1][0].op == Op.RST
        assert len(read_now(program, 4 << 20) or b"") > 0


def test_a_shutdown_waits_for_what_was_sent() -> None:
    with guest() as host:
        program = host.connected()
        data = os.urandom(ROOM)
        for start in range(0, ROOM, 1 << 15):
            host.send(Op.RW, data=data[start : start + (1 << 15)])
        host.received.clear()
        host.send(Op.SHUTDOWN, flags=NO_MORE_RECEIVED | NO_MORE_SENT)
        assert host.received == []
        assert read_until(host, program, ROOM) == data
        assert read_now(program) == b""
        assert ("RST", b"") in host.take()


# The rules for packets (5.10.6.4).


@pytest.mark.parametrize("op", [op for op in range(12) if op not in (Op.REQUEST, Op.RST)])
def test_a_packet_of_no_connection_is_answered_by_rst(op: int) -> None:
    with guest() as host:
        host.send(op)
        assert host.take() == [("RST", b"")]


def test_rst_is_not_answered() -> None:
    with guest() as host:
        host.send(Op.RST)
        assert host.take() == []
        program = host.connected()
        host.send(Op.RST)
        assert host.take() == []
        assert read_now(program) == b""


@pytest.mark.parametrize("op", [0, Op.REQUEST, Op.RESPONSE, 8, 99])
def test_what_cannot_be_said_on_an_open_connection(op: int) -> None:
    with guest() as host:
        program = host.connected()
        host.send(op)
        assert host.take() == [("RST", b"")]
        assert read_now(program) == b""


@pytest.mark.parametrize("op", [Op.RW, Op.RESPONSE, Op.REQUEST, Op.SHUTDOWN])
def test_what_cannot_be_said_before_it_is_open(op: int) -> None:
    with guest() as host:
        host.send(Op.REQUEST)
        host.send(op, data=b"x", flags=3)
        assert host.take() == [("RST", b"")]
        late = host.grant()
        assert read_now(late) == b""
        program, port = greet(host)
        if op is not Op.RESPONSE:
            host.send(op, 77, port, b"x", flags=3)
            assert host.take() == [("RST", b"")]
            assert read_now(program) == b""


@pytest.mark.parametrize("cids", [(CID, 3), (CID, 0), (CID + 1, 2), (2, 2), (1 << 40 | CID, 2)])
def test_packets_of_others_go_nowhere(cids: tuple[int, int]) -> None:
    with guest() as host:
        host.send(Op.REQUEST, cids=cids)
        assert host.asked() is None
        assert host.take() == []


@pytest.mark.parametrize("kind", [0, 2, 0xFFFF])
def test_another_type_is_refused(kind: int) -> None:
    with guest() as host:
        program = host.connected()
        host.send(Op.RW, kind=kind, data=b"x")
        assert host.take() == [("RST", b"")]
        assert read_now(program) is None


# Bad drivers.


@pytest.mark.parametrize("data", [b"", b"x" * 43])
def test_no_packet_at_all(data: bytes) -> None:
    with guest() as host:
        host.driver.queues[TX].send([data] if data else [], [] if data else [8])
        host.look()
        assert host.driver.status & NEEDS_RESET
        assert "without header" in host.rig.logs[0]


def test_a_packet_shorter_than_it_says() -> None:
    with guest() as host:
        host.connected()
        host.send(Op.RW, data=b"abc", length=4)
        assert host.driver.status & NEEDS_RESET


def test_buffers_without_room() -> None:
    with guest(buffers=0) as host:
        host.driver.queues[RX].send([], [HEADER_SIZE])
        host.send(Op.RW)
        assert host.driver.status & NEEDS_RESET
        assert "without room" in host.rig.logs[0]


def test_a_driver_that_only_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that it does not take are not gathered for ever; when it does, all goes on."""
    monkeypatch.setattr(vsock, "MOST_REPLIES", 5)
    with guest(buffers=0) as host:
        for port in range(40):
            host.driver.queues[TX].send(
                [Header(CID, 2, port, 1, 0, 1, Op.RW, 0, 0, 0).pack()], kick=port == 39
            )
        host.look()
        assert len(host.device._replies) == 5
        assert len(host.driver.queues[TX].collect()) == 5
        host.give(4)
        ports = []
        while True:
            host.look()
            if not host.received:
                break
            ports += [header.dst_port for header, _ in host.received]
            host.received.clear()
        assert ports == list(range(40))


def test_connections_without_end() -> None:
    with guest() as host:
        programs = [host.connected(port) for port in range(MOST_STREAMS)]
        host.send(Op.REQUEST, 9999)
        assert host.take() == [("RST", b"")]
        assert read_now(host.visit()) == b""
        host.send(Op.RST, 0)
        programs.append(host.connected(9999))
        for each in programs:
            each.close()
        host.take()


def test_no_buffers_for_a_while() -> None:
    with guest(buffers=1) as host:
        program = host.connected()
        host.driver.queues[RX].collect()
        program.send(b"a" * 30_000)
        total = sum(len(data) for _, data in host.take())
        for _ in range(20):
            total += sum(len(data) for _, data in host.take())
        assert total == 30_000


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_random_packets(seed: int) -> None:
    chance = random.Random(seed)
    with guest() as host:
        programs: list[socket.socket] = []
        for _ in range(120):
            action = chance.random()
            ports = chance.randrange(3), chance.choice([7, 8, FIRST_PORT, FIRST_PORT + 1])
            if action < 0.6:
                host.send(
                    chance.choice([*Op, 0, 9]),
                    *ports,
                    bytes(chance.choice([0, 0, 1, 5000])),
                    flags=chance.randrange(4),
                    room=chance.choice([0, 100, 1 << 16, 0xFFFF_FFFF]),
                    taken=chance.choice([0, 5000, chance.randrange(1 << 32)]),
                    kind=chance.choice([1, 1, 1, 2]),
                )
            elif action < 0.7 and host.asked() is not None:
                programs.append(host.grant())
            elif action < 0.8:
                programs.append(host.visit())
                programs[-1].send(chance.choice([b"CONNECT 1\n", b"CONNECT", b"x\n"]))
            elif programs and action < 0.9:
                each = chance.choice(programs)
                try:
                    each.send(bytes(chance.randrange(20_000)))
                    each.recv(chance.randrange(1, 9000))
                except OSError:
                    pass
                if chance.random() < 0.2:
                    each.close()
                    programs.remove(each)
            elif action < 0.92:
                host.rig.replace(host.rig.snapshot())
            elif action < 0.94:
                host.start()
            host.take()
        assert not host.driver.status & NEEDS_RESET, host.rig.logs
        for each in programs:
            each.close()
        # It still works.
        host.start()
        while host.asked() is not None:
            host.grant().close()
        host.take()
        program = host.connected(55, 66)
        host.send(Op.RW, 55, 66, b"fine")
        assert read_now(program) == b"fine"
        program.close()


# Snapshots.


def test_a_restore_ends_connections_and_says_so() -> None:
    with guest() as host:
        program = host.connected()
        waiting = host.visit()
        saved = host.rig.snapshot()
        host.rig.replace(saved)
        assert read_now(program) == read_now(waiting) == b""
        host.look()
        assert host.events == [bytes(4)]
        assert host.take() == []
        host.send(Op.RW, data=b"x")
        assert host.take() == [("RST", b"")]
        host.connected()
        host.rig.replace(host.rig.snapshot())
        host.look()
        assert host.events == [bytes(4)] * 2


def test_a_snapshot_alone_ends_nothing() -> None:
    with guest() as host:
        program = host.connected()
        host.rig.snapshot()
        host.device.wake()
        host.send(Op.RW, data=b"goes on")
        assert read_now(program) == b"goes on"
        host.look()
        assert host.events == []


def test_before_the_driver_a_restore_has_nothing_to_say() -> None:
    with guest() as host:
        host.driver.reset()
        host.rig.replace(host.rig.snapshot())
        host.start()
        host.look()
        assert host.events == []


def test_a_reset_ends_connections() -> None:
    with guest() as host:
        program = host.connected()
        host.driver.reset()
        assert read_now(program) == b""


def test_the_machine_is_gone() -> None:
    with guest() as host:
        program = host.connected()
        host.machine.close()
        host.look()
        host.send(Op.REQUEST, 5, 5)
        assert host.take() == [("RST", b"")]
        host.send(Op.RW, data=b"on")
        assert read_now(program) == b"on"
