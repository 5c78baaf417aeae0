"""The child's loop: takes commands from the tube or the lane and drives one device model.

What runs here is believed in nothing by the machine. In the other direction the machine is
trusted: a message out of turn ends the process, it is not argued with.

System calls of the loop after the jail is up: recvfrom, recvmsg (a config mapping's
descriptor), sendto, sendmsg, poll, write (doorbell), mmap (a given descriptor, shared,
read-write; and the allocator), fstat and fcntl(F_DUPFD_CLOEXEC) (inside mmap), munmap, close,
futex, exit_group.
"""

from __future__ import annotations

import mmap
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from devices.bus import ALL_ONES, BusDevice
from devices.contract import Device, TakesInput
from devices.errors import DeviceError
from devices.pci.contract import ConfigWriteResult
from proxy import lane
from proxy import messages as m
from proxy.errors import ProtocolFault, TubeClosed
from proxy.host import ChildHost
from proxy.session import ChildSession, State
from proxy.tube import MAX_DATAGRAM, Tube, close_all

POLL_SPINS = 600
"""Empty looks at the ring before the child goes to sleep: some tens of microseconds."""
FLUSH_SPINS = 64
"""Empty looks at the ring before gathered output is sent."""
TUBE_SPINS = 8
"""Empty looks at the ring for each look at the door."""
NET_MS = 1
"""The wait under the lane's announcement of sleep."""

_READ = m.Read.opcode
_WRITE = m.Write.opcode
_READ_BYTES = 24
_WRITE_BYTES = 32
_OFFSET = struct.Struct("<8xQ")
_OFFSET_DATA = struct.Struct("<8xQ8xQ")
_RESULT = struct.Struct("<QQ")
_RESULT_HEADERS = tuple(m.ReadResult.opcode | size << 8 for size in range(9))


_LANE_CLOSED_FIRST = (m.Sleep, m.DestroyDevice, m.Shutdown, m.LaneOpen, m.Read, m.Write)


class _Gone:
    """What answers for a device that was destroyed."""

    def read(self, offset: int, size: int, /) -> int:
        return ALL_ONES[size]

    def write(self, offset: int, size: int, value: int, /) -> None:
        pass


def shape_of(device: Device) -> m.Shape:
    """What a device looks like from outside.

    The machine makes it of a model that it built itself and compares it with what a child says.
    """
    bars = tuple(device.bars()) if hasattr(device, "bars") else ()
    return m.Shape(
        regions=tuple(device.regions()),
        is_pci=hasattr(device, "read_config"),
        bars=bars,
        takes_input=isinstance(device, TakesInput),
    )


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
        self._device: Any = device
        self._session = ChildSession()
        self._closed = False
        self._buffer = bytearray(MAX_DATAGRAM + 1)
        handlers: list[BusDevice] = list(device.handlers())
        self._readers = [each.read for each in handlers]
        self._writers = [each.write for each in handlers]
        self._page = page
        self._words: memoryview | None = None
        self._tail = 0
        self._door = 0
        self._lane_state = 0
        """Generation of the open lane, shifted left by one; 0 while it is closed."""
        self._fence = lane.make_fence()
        if page is not None:
            self._words = host.page = memoryview(page).cast("Q")
        self._commands: dict[type[m.Message], Callable[[Any], m.Message | None]] = {
            m.Activate: self._activate,
            m.Read: self._read,
            m.Write: self._write,
            m.ReadConfig: self._read_config,
            m.WriteConfig: self._write_config,
            m.InitPciConfigMapping: self._map_config,
            m.ReadVirtualConfig: self._read_virtual,
            m.WriteVirtualConfig: self._write_virtual,
            m.DestroyDevice: self._destroy,
            m.Shutdown: self._shutdown,
            m.GetRanges: self._get_ranges,
            m.Snapshot: self._snapshot,
            m.Restore: self._restore,
            m.Sleep: self._sleep,
            m.Wake: self._wake,
            m.Input: self._input,
            m.LaneOpen: self._lane_open,
            m.LaneClose: self._lane_close,
        }
        self._mapping: int | None = None

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
            self._close_device()

    def _serve_tube(self) -> None:
        """Serve the tube until the lane is opened or the session ends."""
        receive, send, buffer = self._end.recv_into, self._end.send, self._buffer
        readers, writers, host, pending = self._readers, self._writers, self._host, self._host.pending
        result, headers = _RESULT.pack, _RESULT_HEADERS
        active = self._session.state in (State.ACTIVE, State.DESTROYED)
        while True:
            if pending:
                try:
                    count = receive(buffer, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    host.flush()
                    continue
            else:
                count = receive(buffer)
            opcode = buffer[0]
            if opcode == _READ and count == _READ_BYTES and active:
                size = buffer[1]
                host.quiet = True
                value = readers[buffer[2]](_OFFSET.unpack_from(buffer)[0], size)
                host.quiet = False
                try:
                    send(result(headers[size], value))
                except OSError:
                    host.unsent += 1
            elif opcode == _WRITE and count == _WRITE_BYTES and active:
                offset, value = _OFFSET_DATA.unpack_from(buffer)
                writers[buffer[2]](offset, buffer[1], value)
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
        readers, writers, host = self._readers, self._writers, self._host
        unpack, tail, spins = lane.SLOT.unpack_from, self._tail, 0
        head_word, tail_word, value_word, door_word = lane.HEAD, lane.TAIL, lane.VALUE, lane.DOOR
        start, slots, step = lane.RING_START, lane.RING_SLOTS, lane.SLOT_BYTES
        host.quiet = False
        while True:
            if words[head_word] != tail:
                header, offset, _, value = unpack(page, start + tail % slots * step)
                if header & 0xFF == _READ:
                    host.quiet = True
                    words[value_word] = readers[header >> 16 & 0xFF](offset, header >> 8 & 0xFF)
                    host.quiet = False
                else:
                    writers[header >> 16 & 0xFF](offset, header >> 8 & 0xFF, value)
                tail += 1
                words[tail_word] = tail
                spins = 0
                continue
            spins += 1
            if spins % TUBE_SPINS:
                continue
            self._tail = tail
            if words[door_word] != self._door:
                self._door = words[door_word]
                self._take(socket.MSG_DONTWAIT)
            elif spins >= FLUSH_SPINS and host.pending:
                host.flush()
            elif spins >= POLL_SPINS:
                self._doze(words)
                spins = 0
            if not self._lane_state:
                return
            tail = self._tail

    def _doze(self, words: memoryview) -> None:
        """Announce sleep and block until the tube has something, or the ring after all."""
        words[lane.STATE] = self._lane_state | 1
        self._fence()
        if words[lane.HEAD] == self._tail:
            waiter = select.poll()
            waiter.register(self._end, select.POLLIN)
            if waiter.poll(NET_MS) or words[lane.HEAD] == self._tail:
                self._take(0)
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
            place = lane.RING_START + self._tail % lane.RING_SLOTS * lane.SLOT_BYTES
            header, offset, _, value = lane.SLOT.unpack_from(page, place)
            region, size = header >> 16 & 0xFF, header >> 8 & 0xFF
            if header & 0xFF == _READ:
                words[lane.VALUE] = self._readers[region](offset, size)
            else:
                self._writers[region](offset, size, value)
            self._tail += 1
            words[lane.TAIL] = self._tail

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
            if (len(fds) == 1) != (kind is m.InitPciConfigMapping):
                raise ProtocolFault(f"{kind.__name__} with {len(fds)} descriptors")
            self._mapping = fds[0] if fds else None
            self._host.quiet = kind.reply is not None
            answer = self._carry_out(command)
        finally:
            close_all(fds)
        if answer is not None:
            self._answer(answer)
        if not isinstance(answer, m.Refused):
            self._session.done(kind)
        self._host.quiet = False

    def _carry_out(self, command: m.Message) -> m.Message | None:
        run = self._commands[type(command)]
        if not command.refusable:
            return run(command)
        try:
            return run(command)
        except DeviceError as error:
            return m.Refused(error.reason)
        except Exception as error:
            return m.Refused(f"{type(error).__name__}: {error}")

    def _answer(self, answer: m.Message) -> None:
        try:
            data = answer.encode()
        except ValueError as error:
            if not isinstance(answer, m.SnapshotResult):
                raise
            data = m.Refused(str(error)).encode()
        try:
            self._tube.send(data)
        except TubeClosed:
            self._host.unsent += 1

    def _activate(self, _: m.Activate) -> m.Message:
        return m.Activated(shape_of(self._device), self._words is not None)

    def _read(self, command: m.Read) -> m.Message:
        value = self._readers[command.region](command.offset, command.length)
        return m.ReadResult(command.length, value)

    def _write(self, command: m.Write) -> None:
        self._writers[command.region](command.offset, command.length, command.data)

    def _read_config(self, command: m.ReadConfig) -> m.Message:
        value = ALL_ONES[4] if self._closed else self._device.read_config(command.register)
        return m.ReadConfigResult(value)

    def _write_config(self, command: m.WriteConfig) -> m.Message:
        if self._closed:
            return m.WriteConfigResult(ConfigWriteResult())
        data = command.data[: command.length]
        return m.WriteConfigResult(
            self._device.write_config(command.register, command.offset, data)
        )

    def _map_config(self, command: m.InitPciConfigMapping) -> m.Message:
        keep = getattr(self._device, "map_config", None)
        if keep is None or self._mapping is None:
            return m.MappingResult(False)
        # mmap keeps its own duplicate of the descriptor; this one is closed by the caller.
        memory = mmap.mmap(self._mapping, command.base + command.length)
        return m.MappingResult(bool(keep(memoryview(memory), command.base, command.length)))

    def _read_virtual(self, command: m.ReadVirtualConfig) -> m.Message:
        value = 0 if self._closed else self._device.read_virtual_config(command.register)
        return m.ReadVirtualConfigResult(value)

    def _write_virtual(self, command: m.WriteVirtualConfig) -> m.Message:
        if not self._closed:
            self._device.write_virtual_config(command.register, command.value)
        return m.Ok()

    def _destroy(self, _: m.DestroyDevice) -> None:
        self._close_device()
        self._host.flush()

    def _shutdown(self, _: m.Shutdown) -> m.Message:
        self._close_device()
        self._host.flush()
        return m.Ok()

    def _close_device(self) -> None:
        """Let the device clean up, once."""
        if self._closed:
            return
        self._closed = True
        gone = _Gone()
        self._readers[:] = [gone.read] * len(self._readers)
        self._writers[:] = [gone.write] * len(self._writers)
        try:
            self._device.close()
        except Exception as error:
            self._host.log(f"clean-up failed: {type(error).__name__}: {error}")
        self._device = None

    def _get_ranges(self, _: m.GetRanges) -> m.Message:
        if self._closed:
            return m.Ranges(())
        current = getattr(self._device, "current_ranges", None)
        if current is not None:
            claimed = [m.ClaimedRange(each.region, bus, each.range) for bus, each in current()]
            return m.Ranges(tuple(claimed))
        found = []
        for index, region in enumerate(self._device.regions()):
            place = region.range()
            if place is not None:
                found.append(m.ClaimedRange(index, region.bus, place))
        return m.Ranges(tuple(found))

    def _snapshot(self, _: m.Snapshot) -> m.Message:
        self._host.flush()
        return m.SnapshotResult(self._device.snapshot())

    def _restore(self, command: m.Restore) -> m.Message:
        self._device.restore(command.state)
        return m.Ok()

    def _sleep(self, _: m.Sleep) -> m.Message:
        self._device.sleep()
        self._host.flush()
        return m.Ok()

    def _wake(self, _: m.Wake) -> m.Message:
        self._device.wake()
        return m.Ok()

    def _input(self, command: m.Input) -> m.Message:
        if self._closed or not isinstance(self._device, TakesInput):
            return m.InputResult(0)
        return m.InputResult(self._device.receive(command.data))

    def _lane_open(self, command: m.LaneOpen) -> None:
        if self._words is None:
            raise ProtocolFault("a lane that this child does not have")
        self._lane_state = command.generation << 1
        self._words[lane.STATE] = self._lane_state

    def _lane_close(self, _: m.LaneClose) -> None:
        if self._words is not None:
            self._words[lane.CLOSED] = self._lane_state >> 1
        self._lane_state = 0
