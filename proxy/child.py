"""The child's loop: takes commands from the tube or the lane and drives one device model.

What runs here is believed in nothing by the machine. In the other direction the machine is
trusted: a message out of turn ends the process, it is not argued with.

System calls of the loop after the jail is up: recvfrom, recvmsg (a mapping's
descriptor), sendto, sendmsg, poll, write (doorbell), mmap (a given descriptor, shared,
read-write; and the allocator), fstat and fcntl(F_DUPFD_CLOEXEC) (inside mmap), munmap, close,
futex, sched_yield, exit_group.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time

from devices.contract import Device, HasWork, WaitsForRoom, Watches
from proxy import lane
from proxy import messages as m
from proxy.commands import Commands
from proxy.errors import ProtocolFault, TubeClosed
from proxy.host import ChildHost
from proxy.session import ChildSession, State
from proxy.tube import MAX_DATAGRAM, Tube, close_all

POLL_SPINS = 600
"""Empty looks at the ring before the child goes to sleep: some tens of microseconds."""
TURN_SPINS = 16_000
"""The same for a device whose writes are turns, about a millisecond: a guest does more between two
requests than between two accesses to registers."""
GLANCE = 512
"""Empty looks after which a device that does more than commands gets at it."""
FLUSH_MS = 2
"""Quiet time on the tube before gathered output is sent: nobody sees it, and a guest that prints
character by character wakes the machine once for many."""
QUIET_NS = 300_000
"""The same on a shared CPU, where looks are no measure of time."""
PATIENCE = 256
"""Commands after which gathered output is sent in any case."""
POLL_YIELDS = 48
"""The same on a CPU that is shared with the machine, which may run guest code between two looks."""
TUBE_SPINS = 8
"""Empty looks at the ring for each look at the door."""
NET_MS = 1
"""The wait under the lane's announcement of sleep."""

_READ = m.Read.opcode
_WRITE = m.Write.opcode
_SYNCED_WRITE = m.SyncedWrite.opcode
_OK = m.Ok().encode()
_READ_BYTES = 24
_WRITE_BYTES = 32
_OFFSET = struct.Struct("<8xQ")
_OFFSET_DATA = struct.Struct("<8xQ8xQ")
_RESULT = struct.Struct("<QQ")
_RESULT_HEADERS = tuple(m.ReadResult.opcode | size << 8 for size in range(9))
_LANE_CLOSED_FIRST = (
    m.Sleep,
    m.DestroyDevice,
    m.Shutdown,
    m.LaneOpen,
    m.Read,
    m.Write,
    m.SyncedWrite,
)
_WITH_DESCRIPTOR = (m.InitPciConfigMapping, m.MapGuestMemory, m.MapGrants)


class ChildLoop:
    """One device model and the commands that come for it.

    Args:
        end: the child's end of the tube.
        host: the device's host.
        device: the model.
        page: the lane's page, or None where there can be no lane.
    """

    def __init__(
        self, end: socket.socket, host: ChildHost, device: Device, page: mmap.mmap | None
    ) -> None:
        self._end = end
        self._tube = Tube(end, m.MAX_MESSAGE)
        self._host = host
        self._session = ChildSession()
        self._commands = Commands(device, host, page is not None)
        self._buffer = bytearray(MAX_DATAGRAM + 1)
        self._page = page
        self._words: memoryview | None = None
        self._tail = 0
        self._door = 0
        self._lane_state = 0
        """Generation of the open lane, shifted left by one; 0 while it is closed."""
        self._lane_shares = False
        turns = any(region.synced for region in device.regions())
        self._spins = TURN_SPINS if turns else POLL_SPINS
        self._fence = lane.make_fence()
        if page is not None:
            self._words = host.page = memoryview(page).cast("Q")
        self._watcher = device if isinstance(device, Watches) else None
        self._does_more = self._watcher is not None or isinstance(device, HasWork)
        self._unheard = 0
        self._filler = device if isinstance(device, WaitsForRoom) else None
        self._watched: dict[int, int] = {}
        self._waiter = select.poll()
        self._waiter.register(end, select.POLLIN)

    def serve(self) -> None:
        """Carry out commands until `Shutdown` is answered or the machine is gone.

        Raises:
            ProtocolFault: the machine's end broke the contract.
            Exception: whatever the device model raised.
        """
        try:
            while self._session.state is not State.CLOSED:
                self._serve_tube()
                if self._lane_state:
                    self._serve_lane()
        except (TubeClosed, ConnectionResetError):
            self._commands.close_device()

    def _serve_tube(self) -> None:
        """Serve the tube until the lane is opened or the session ends."""
        does_more, idle, synced = self._does_more, self._idle, self._host.turns.write
        receive, answer, buffer = self._end.recv_into, self._host.answer, self._buffer
        readers, writers, host, pending = (
            self._commands.readers,
            self._commands.writers,
            self._host,
            self._host.pending,
        )
        result, headers = _RESULT.pack, _RESULT_HEADERS
        active = self._session.state in (State.ACTIVE, State.DESTROYED)
        waiter, waited = self._waiter, 0
        while True:
            if does_more:
                idle()
            elif pending:
                waited += 1
                if waited > PATIENCE or not waiter.poll(FLUSH_MS):
                    host.flush()
                    waited = 0
            count = receive(buffer)
            opcode = buffer[0]
            if opcode == _READ and count == _READ_BYTES and active:
                size = buffer[1]
                host.quiet = True
                value = readers[buffer[2]](_OFFSET.unpack_from(buffer)[0], size)
                answer(result(headers[size], value))
                host.quiet = False
            elif opcode == _WRITE and count == _WRITE_BYTES and active:
                offset, value = _OFFSET_DATA.unpack_from(buffer)
                writers[buffer[2]](offset, buffer[1], value)
            elif opcode == _SYNCED_WRITE and count == _WRITE_BYTES and active:
                offset, value = _OFFSET_DATA.unpack_from(buffer)
                host.quiet = True
                synced(writers[buffer[2]], offset, buffer[1], value)
                answer(_OK)
                host.quiet = False
            else:
                self._rare(count)
                state = self._session.state
                active = state in (State.ACTIVE, State.DESTROYED)
                if self._lane_state or state is State.CLOSED:
                    return

    def _serve_lane(self) -> None:
        """Serve the lane, and the tube beside it, until the lane is closed."""
        words, page = self._words, self._page
        if words is None or page is None:
            raise ProtocolFault("a lane that this child does not have")
        readers, writers, host = self._commands.readers, self._commands.writers, self._host
        does_more, synced, kept = self._does_more, host.turns.write, host.kept
        unpack, tail, spins = lane.TAKEN_SLOT.unpack_from, self._tail, 0
        flushed = glanced = tail
        head_word, tail_word, value_word, door_word = lane.HEAD, lane.TAIL, lane.VALUE, lane.DOOR
        ring, last_slot = lane.RING, lane.RING_SLOTS - 1
        shares, give_way = self._lane_shares, os.sched_yield
        patience, between = (POLL_YIELDS, 1) if shares else (self._spins, TUBE_SPINS)
        now, quiet_at = time.perf_counter_ns, 0
        host.quiet = False
        while True:
            if words[head_word] != tail:
                opcode, size, region, offset, value = unpack(page, ring[tail & last_slot])
                if opcode == _READ:
                    host.quiet = True
                    words[value_word] = readers[region](offset, size)
                    if kept:
                        host.send_kept()
                    host.quiet = False
                elif opcode == _WRITE:
                    writers[region](offset, size, value)
                else:
                    host.quiet = True
                    synced(writers[region], offset, size, value)
                    if kept:
                        host.send_kept()
                    host.quiet = False
                tail += 1
                words[tail_word] = tail
                spins = 0
                continue
            spins += 1
            if shares:
                if spins == 1:
                    quiet_at = now() + QUIET_NS
                give_way()
            if spins % between:
                continue
            self._tail = tail
            if words[door_word] != self._door:
                self._door = words[door_word]
                self._take(socket.MSG_DONTWAIT)
            elif host.pending and (
                tail - flushed > PATIENCE or (now() > quiet_at if shares else spins >= patience)
            ):
                host.flush()
                flushed = tail
            elif does_more and (tail - glanced > PATIENCE or not spins % GLANCE):
                self._look_around(0)
                glanced = tail
            elif spins >= patience and (not shares or now() > quiet_at):
                host.flush()  # the quiet time may have ended just now
                self._doze(words)
                spins = 0
            if not self._lane_state:
                return
            tail = self._tail

    def _doze(self, words: memoryview) -> None:
        """Announce sleep and block until the tube has something, or the ring after all."""
        words[lane.STATE] = self._lane_state | 1
        self._fence()
        wait: int | None = NET_MS
        while words[lane.HEAD] == self._tail:
            if self._look_around(wait):
                self._take(0)
                break
            wait = None
        if self._lane_state:
            words[lane.STATE] = self._lane_state

    def _take(self, flags: int) -> None:
        """Take one message from the tube while the lane is open; what is in the ring goes first."""
        try:
            count = self._end.recv_into(self._buffer, 0, flags)
        except BlockingIOError:
            return
        self._finish_ring()
        self._rare(count)

    def _finish_ring(self) -> None:
        words, page = self._words, self._page
        if words is None or page is None:
            return
        head = words[lane.HEAD]
        while self._tail != head:
            place = lane.RING[self._tail % lane.RING_SLOTS]
            opcode, size, region, offset, value = lane.TAKEN_SLOT.unpack_from(page, place)
            if opcode == _READ:
                words[lane.VALUE] = self._commands.readers[region](offset, size)
            elif opcode == _WRITE:
                self._commands.writers[region](offset, size, value)
            else:
                self._host.turns.write(self._commands.writers[region], offset, size, value)
            self._tail += 1
            words[lane.TAIL] = self._tail

    # Beside commands.

    def _idle(self) -> None:
        """Do what the device has to do beside commands, until one waits on the tube."""
        host = self._host
        while not self._look_around(FLUSH_MS if host.pending else None):
            host.flush()
            self._unheard = 0
        self._unheard += 1
        if self._unheard > PATIENCE:
            host.flush()
            self._unheard = 0

    def _look_around(self, wait: int | None) -> bool:
        """Wait up to `wait` ms for the tube and what the device watches, or do waiting work.

        Returns whether the tube has something.
        """
        turns = self._host.turns
        active = self._session.state is State.ACTIVE
        watcher = self._watcher if active else None
        wanted = {} if watcher is None else dict.fromkeys(watcher.watched(), select.POLLIN)
        if active and self._filler is not None:
            for fd in self._filler.full():
                wanted[fd] = wanted.get(fd, 0) | select.POLLOUT
        if wanted != self._watched:
            for fd in self._watched.keys() - wanted.keys():
                self._waiter.unregister(fd)
            for fd, events in wanted.items():
                self._waiter.register(fd, events)
            self._watched = wanted
        works = active and turns.work_wanted
        ready = self._waiter.poll(0 if works else wait)
        if works and not ready:
            turns.work()
        has_command = False
        for fd, _ in ready:
            if fd == self._end.fileno():
                has_command = True
            elif watcher is not None:
                watcher.ready(fd)
        return has_command

    # Rare commands.

    def _rare(self, count: int) -> None:
        """Carry out the command of which the first datagram is in the buffer."""
        if count == 0:
            raise TubeClosed
        whole, fds = self._tube.finish(bytes(memoryview(self._buffer)[:count]))
        try:
            command = m.decode(whole, m.COMMANDS)
            kind = type(command)
            self._session.command(kind)
            if self._lane_state and kind in _LANE_CLOSED_FIRST:
                raise ProtocolFault(f"{kind.__name__} while the lane is open")
            if (len(fds) == 1) != (kind in _WITH_DESCRIPTOR):
                raise ProtocolFault(f"{kind.__name__} with {len(fds)} descriptors")
            self._host.quiet = kind.reply is not None
            answer: m.Message | None = None
            if isinstance(command, m.LaneOpen):
                self._open_lane(command)
            elif isinstance(command, m.LaneClose):
                self._close_lane()
            else:
                answer = self._commands.carry_out(command, fds[0] if fds else None)
        finally:
            close_all(fds)
        if answer is not None:
            self._answer(answer)
        if not isinstance(answer, m.Refused):
            self._session.done(kind)
        self._host.quiet = False

    def _answer(self, answer: m.Message) -> None:
        try:
            data = answer.encode()
        except ValueError as error:
            if not isinstance(answer, m.SnapshotResult):
                raise
            data = m.Refused(str(error)).encode()
        if len(data) <= m.MAX_BYTES:
            self._host.answer(data)
            return
        self._host.send_kept()
        try:
            self._tube.send(data)
        except TubeClosed:
            self._host.unsent += 1

    def _open_lane(self, command: m.LaneOpen) -> None:
        if self._words is None:
            raise ProtocolFault("a lane that this child does not have")
        self._lane_shares = bool(command.shares)
        self._lane_state = command.generation << 1
        self._words[lane.STATE] = self._lane_state

    def _close_lane(self) -> None:
        if self._words is not None:
            self._words[lane.CLOSED] = self._lane_state >> 1
        self._lane_state = 0
