"""Every state and every command, at both ends: the exact response rule of the contract."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from devices.bus import BusType
from devices.contract import Device, Region
from devices.pci.contract import BarInfo, ConfigWriteResult
from proxy import lane
from proxy import messages as m
from proxy.child import ChildLoop
from proxy.errors import Misuse, ProtocolFault
from proxy.host import ChildHost
from proxy.session import ChildSession, MachineSession, State
from proxy.tube import Tube, pair

COMMANDS: list[m.Message] = [
    m.Activate(),
    m.Read(4, 0, 0, 0, 0),
    m.Write(4, 0, 0, 0, 0, 5),
    m.SyncedWrite(4, 0, 0, 0, 0, 5),
    m.TakeAhead(True, 0, 0),
    m.ReadConfig(0),
    m.WriteConfig(0, 4, 1, bytes(4)),
    m.InitPciConfigMapping(0, 256),
    m.MapGuestMemory((m.MemoryRegion(0, 4096, 0),)),
    m.MapGrants(4096),
    m.ReadVirtualConfig(0),
    m.WriteVirtualConfig(0, 1),
    m.DestroyDevice(),
    m.Shutdown(),
    m.GetRanges(),
    m.Snapshot(),
    m.Restore({}),
    m.Sleep(),
    m.Wake(),
    m.Input(b"x"),
    m.Adjust({"columns": 80}),
    m.Sync(),
    m.LaneOpen(0, 1),
    m.LaneClose(),
]

# What must answer each command, by the contract's table; None: posted.
ANSWERS: dict[type[m.Message], type[m.Message] | None] = {
    m.Activate: m.Activated,
    m.Read: m.ReadResult,
    m.Write: None,
    m.SyncedWrite: m.Ok,
    m.TakeAhead: m.Ahead,
    m.ReadConfig: m.ReadConfigResult,
    m.WriteConfig: m.WriteConfigResult,
    m.InitPciConfigMapping: m.MappingResult,
    m.MapGuestMemory: m.Ok,
    m.MapGrants: m.Ok,
    m.ReadVirtualConfig: m.ReadVirtualConfigResult,
    m.WriteVirtualConfig: m.Ok,
    m.DestroyDevice: None,
    m.Shutdown: m.Ok,
    m.GetRanges: m.Ranges,
    m.Snapshot: m.SnapshotResult,
    m.Restore: m.Ok,
    m.Sleep: m.Ok,
    m.Wake: m.Ok,
    m.Input: m.InputResult,
    m.Adjust: m.Ok,
    m.Sync: m.Ok,
    m.LaneOpen: None,
    m.LaneClose: None,
}

NOT_AWAKE = {m.Activate, m.Read, m.Write, m.SyncedWrite, m.WriteConfig, m.ReadVirtualConfig}
NOT_AWAKE |= {m.WriteVirtualConfig, m.MapGuestMemory, m.MapGrants, m.Input, m.Adjust, m.Sync}
NOT_AWAKE |= {m.LaneOpen, m.TakeAhead}
NOT_THERE = {m.Activate, m.InitPciConfigMapping, m.Snapshot, m.Restore, m.Sleep, m.Wake}
NOT_THERE |= {m.MapGuestMemory, m.MapGrants, m.Input, m.Adjust, m.LaneOpen}
FORBIDDEN: dict[State, set[type[m.Message]]] = {
    State.NEW: set(ANSWERS) - {m.Activate},
    State.ACTIVE: {m.Activate},
    State.ASLEEP: NOT_AWAKE,
    State.DESTROYED: NOT_THERE,
    State.CLOSED: set(ANSWERS),
}

WAY: dict[State, list[m.Message]] = {
    State.NEW: [],
    State.ACTIVE: [m.Activate()],
    State.ASLEEP: [m.Activate(), m.Sleep()],
    State.DESTROYED: [m.Activate(), m.DestroyDevice()],
    State.CLOSED: [m.Activate(), m.Shutdown()],
}


class Plain(Device):
    """A PCI-like device without a life of its own."""

    model = "plain"

    def regions(self) -> tuple[Region, ...]:
        return (Region("bar0", BusType.MMIO, 16),)

    def bars(self) -> tuple[BarInfo, ...]:
        return (BarInfo(0, 0, BusType.MMIO, 16),)

    def read_config(self, register: int) -> int:
        return 7

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        return ConfigWriteResult()

    def read_virtual_config(self, register: int) -> int:
        return 8

    def write_virtual_config(self, register: int, value: int) -> None:
        pass

    def map_config(self, view: memoryview, base: int, length: int) -> bool:
        return True


class Rig:
    """A child's loop in a thread, and the machine's raw end."""

    def __init__(self) -> None:
        here, there = pair()
        here.settimeout(10)
        self.tube = Tube(here, m.MAX_MESSAGE)
        self.heard, doorbell = os.pipe2(os.O_NONBLOCK)
        self.fds = (self.heard, doorbell)
        page_fd = lane.create_page("test")
        self.page = lane.map_page(page_fd)
        os.close(page_fd)
        host = ChildHost(there, doorbell, {})
        self.loop = ChildLoop(there, host, Plain(host), self.page)
        self.fault: ProtocolFault | None = None
        self.thread = threading.Thread(target=self._serve, args=(there,))
        self.thread.start()

    def _serve(self, end: socket.socket) -> None:
        try:
            self.loop.serve()
        except ProtocolFault as fault:
            self.fault = fault
        finally:
            end.close()

    def say(self, command: m.Message) -> None:
        if not isinstance(command, (m.InitPciConfigMapping, m.MapGuestMemory, m.MapGrants)):
            self.tube.send(command.encode())
            return
        fd = lane.create_sealed("memory", 4096)
        self.tube.send(command.encode(), [fd])
        os.close(fd)

    def hear(self) -> bytes:
        """One message; nothing if the child has closed its end."""
        return self.tube.end.recv(1 << 16)


@contextmanager
def rig(state: State) -> Iterator[Rig]:
    made = Rig()
    try:
        for command in WAY[state]:
            made.say(command)
            if ANSWERS[type(command)] is not None:
                made.hear()
        yield made
    finally:
        made.tube.close()
        made.thread.join()
        for fd in made.fds:
            os.close(fd)


def test_the_tables_of_this_test_are_complete() -> None:
    assert {type(each) for each in COMMANDS} == set(ANSWERS) == set(m.COMMANDS.values())


@pytest.mark.parametrize("state", [s for s in State if s is not State.CLOSED])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: type(each).__name__)
def test_child_answers_by_the_table(state: State, command: m.Message) -> None:
    kind = type(command)
    expected = ANSWERS[kind]
    with rig(state) as child:
        child.say(command)
        if kind in FORBIDDEN[state]:
            assert child.hear() == b""
            child.thread.join()
            assert child.fault is not None
            assert kind.__name__ in str(child.fault)
            return
        if expected is not None:
            assert type(m.decode(child.hear(), m.FROM_CHILD)) is expected
        # Nothing else follows: the next thing heard is the answer to the next command.
        if kind is m.Shutdown:
            assert child.hear() == b""
        elif state is not State.NEW and kind is not m.LaneOpen:
            child.say(m.GetRanges())
            assert type(m.decode(child.hear(), m.FROM_CHILD)) is m.Ranges
        assert child.fault is None


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: type(each).__name__)
def test_machine_refuses_what_the_state_forbids(state: State, command: m.Message) -> None:
    session = MachineSession()
    for step in WAY[state]:
        session.command(type(step))
        answer = ANSWERS[type(step)]
        if answer is not None:
            assert session.received(answer)
    assert session.state is state
    kind = type(command)
    if kind in FORBIDDEN[state]:
        with pytest.raises(Misuse):
            session.command(kind)
        assert session.state is state
    else:
        session.command(kind)
        assert session.awaiting is (None if ANSWERS[kind] is None else kind)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: type(each).__name__)
def test_machine_takes_only_the_answer_it_asked_for(command: m.Message) -> None:
    kind = type(command)
    for answer in m.REPLIES.values():
        session = MachineSession()
        session.state = State.NEW if kind is m.Activate else State.ACTIVE
        if kind in FORBIDDEN[session.state]:
            continue
        session.command(kind)
        refusable = (m.Snapshot, m.Restore, m.Sleep, m.Wake, m.Adjust)
        refusal = answer is m.Refused and kind in refusable
        if answer is ANSWERS[kind] or refusal:
            assert session.received(answer)
            assert session.awaiting is None
        else:
            with pytest.raises(ProtocolFault):
                session.received(answer)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("upcall", list(m.UPCALLS.values()), ids=lambda each: each.__name__)
def test_spontaneous_upcalls_by_state(state: State, upcall: type[m.Message]) -> None:
    session = MachineSession()
    session.state = state
    if state in (State.ACTIVE, State.DESTROYED) or upcall is m.LastWords:
        assert not session.received(upcall)
    else:
        with pytest.raises(ProtocolFault):
            session.received(upcall)
    if state is State.ASLEEP:
        session.awaiting = m.Restore
        assert not session.received(upcall)


def test_one_command_at_a_time() -> None:
    session = MachineSession()
    session.command(m.Activate)
    with pytest.raises(Misuse, match="unanswered"):
        session.command(m.Activate)


def test_refusal_changes_no_state() -> None:
    session = MachineSession()
    session.state = State.ACTIVE
    session.command(m.Sleep)
    assert session.received(m.Refused)
    assert session.state is State.ACTIVE


def test_second_activation_is_a_fault_of_the_machine() -> None:
    session = ChildSession()
    session.command(m.Activate)
    session.done(m.Activate)
    with pytest.raises(ProtocolFault):
        session.command(m.Activate)


def test_descriptors_only_with_the_command_that_has_one() -> None:
    with rig(State.ACTIVE) as child:
        child.tube.send(m.GetRanges().encode(), [0])
        assert child.hear() == b""
        child.thread.join()
        assert child.fault is not None
