"""The machine's end of one device process: asks, waits with a deadline, believes nothing.

Every fault of the child, its death and its silence end in `fail`, once: the child is killed, the
tube closed, and the failure told. Nothing that a child does raises anything but `DeviceFailure`
(and `DeviceError` for what it politely refused), and only to callers of rare commands.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from time import monotonic

from devices.errors import DeviceError, DeviceFailure
from proxy import messages as m
from proxy.child_interface import ChildInterface
from proxy.errors import ProtocolFault, TubeClosed
from proxy.events import ProxyEvents
from proxy.session import MachineSession
from proxy.tube import (
    DESCRIPTORS,
    GATHERED,
    MAX_DATAGRAM,
    Assembler,
    frames,
    receive_datagram,
    scattered,
    send_with_fds,
    set_receive_deadline,
)

DEATH_GRACE = 0.25
"""Seconds that a failure waits to learn how the process ended."""
LAST_MESSAGES = 4096
"""Messages that are still taken from the tube of a child that is gone."""
LOOK = 0.1
"""Seconds of a wait after which it is looked whether it is still wanted."""
_UPCALL_LIMIT = 1 + m.MAX_BYTES


class _Hung(Exception):
    """The deadline has passed."""


class _GivenUp(Exception):
    """The machine wants no answer any more."""


class Link:
    """Commands to one child and upcalls from it.

    Args:
        child: taken over; closed with `close`.
        events: told of upcalls and of the failure.
        deadline: seconds that any wait on the child may take.
    """

    def __init__(self, child: ChildInterface, events: ProxyEvents, deadline: float) -> None:
        self.child = child
        self.name = child.name
        self.events = events
        self.deadline = deadline
        self.session = MachineSession()
        self.failed: DeviceFailure | None = None
        self.upcalls = 0
        """Upcalls received since the start, which the child counts too."""
        self.dropped_writes = 0
        self.on_failed: Callable[[DeviceFailure], None] | None = None
        """Told of the failure; not set before the child is a device."""
        self.given_up: Callable[[], bool] = lambda: False
        """Asked every `LOOK` seconds of a wait: whether the machine is to end and will not wait."""
        self.before: Callable[[], None] = lambda: None
        """Told before each command, except the accesses and those of the lane."""
        self.on_sent: Callable[[], None] = lambda: None
        """Told after each command, except the accesses and those of the lane."""
        self.on_posted: Callable[[], None] = lambda: None
        """Told of the first posted write after each look at them, see `Accesses.look`."""
        self.on_stopped: Callable[[], None] = lambda: None
        """Told before the tube is closed."""
        self.tube = child.tube
        self._assembler = Assembler(_UPCALL_LIMIT)
        self._last_words = ""
        self._failing = False
        self._poll = select.poll()
        self._poll.register(self.tube, select.POLLIN)
        self.tube.setblocking(True)
        set_receive_deadline(self.tube, min(deadline, LOOK))

    # Asking.

    def ask(self, command: m.Message, fds: tuple[int, ...] = ()) -> m.Message:
        """Send a command and wait for its answer.

        Raises:
            ValueError: the command cannot be expressed; nothing was sent.
            Misuse: the session's state does not allow it.
            DeviceError: the device refused.
            DeviceFailure: the device has failed, now or before.
        """
        self.check()
        self.before()
        kind = type(command)
        data = command.encode()
        self.session.command(kind)
        self._assembler.limit = max(kind.reply.limit if kind.reply else 0, _UPCALL_LIMIT)
        try:
            end = monotonic() + self.deadline
            self._send(data, fds, end)
            self.on_sent()
            answer = self._answer(end)
        except BaseException as error:
            raise self._blame(error, kind.__name__) from None
        if isinstance(answer, m.Refused):
            raise DeviceError(self.name, answer.text)
        return answer

    def post(self, command: m.Message) -> None:
        """Send a command that has no answer; raises as `ask` does."""
        self.check()
        self.before()
        self.session.command(type(command))
        try:
            self._send(command.encode(), (), monotonic() + self.deadline)
            self.on_sent()
        except BaseException as error:
            raise self._blame(error, type(command).__name__) from None

    def check(self) -> None:
        """Raises DeviceFailure if the device has failed."""
        if self.failed is not None:
            raise self.failed.with_traceback(None)

    # Listening.

    def drain(self, most: int) -> bool:
        """Handle up to `most` waiting upcalls; whether more may wait. Never raises."""
        if self.child.doorbell >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self.child.doorbell, 4096)
        if self._failing:
            return False
        last = self.upcalls + most
        try:
            while self.upcalls < last:
                self._take(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (TubeClosed, ProtocolFault, OSError) as error:
            self._blame(error, "")
            return False
        return True

    def catch_up(self, count: int, doing: str) -> bool:
        """Handle upcalls until there were `count`, which are all in the tube; False on failure."""
        try:
            if not self.upcalls < count <= self.upcalls + LAST_MESSAGES:
                raise ProtocolFault("the shared page counts upcalls wrongly")
            while self.upcalls < count:
                # Without room for descriptors, which the kernel then drops: this is hot.
                self._judge(self.tube.recv(MAX_DATAGRAM + 1, socket.MSG_DONTWAIT))
        except BlockingIOError:
            self._blame(ProtocolFault("the shared page counts upcalls that did not come"), doing)
            return False
        except (TubeClosed, ProtocolFault, OSError) as error:
            self._blame(error, doing)
            return False
        return True

    # The slow halves of the hot path: an access that did not go straight through.

    def finish_post(self, datagram: bytes) -> bool:
        """Send a posted write for which there was no room at once; False on failure."""
        if self._failing:
            return False
        try:
            self._send(datagram, (), monotonic() + self.deadline)
        except BaseException as error:
            self._blame(error, "Write")
            if not isinstance(error, Exception):
                raise
            return False
        return True

    def finish_read(self, size: int, request: bytes | None, datagram: bytes | None) -> int | None:
        """Finish a read that met something else than its answer; None on failure.

        Args:
            size: how many bytes are read.
            request: what is still to be sent, if anything.
            datagram: what was received first, if anything.
        """
        answer = self._finish(m.Read, size, request, datagram)
        return answer.data if isinstance(answer, m.ReadResult) else None

    def finish_write(self, request: bytes | None, datagram: bytes | None) -> bool:
        """Finish a synced write in the same way; False on failure."""
        return self._finish(m.SyncedWrite, 0, request, datagram) is not None

    def _finish(
        self, kind: type[m.Message], size: int, request: bytes | None, datagram: bytes | None
    ) -> m.Message | None:
        if self._failing:
            return None
        end = monotonic() + self.deadline
        self.session.awaiting = kind
        self._assembler.limit = _UPCALL_LIMIT
        try:
            if request is not None:
                self._send(request, (), end)
            answer = None if datagram is None else self._judge(datagram)
            if answer is None:
                answer = self._answer(end)
            if isinstance(answer, m.ReadResult) and answer.length != size:
                raise ProtocolFault(f"{answer} as the answer to a Read of {size} bytes")
        except BaseException as error:
            self._blame(error, kind.__name__)
            if not isinstance(error, Exception):
                raise
            return None
        return answer

    # Inside.

    def _send(self, data: bytes, fds: tuple[int, ...], end: float) -> None:
        parts = list(frames(data))
        if fds:
            parts.insert(0, bytes((DESCRIPTORS, len(fds))))
        for index, part in enumerate(parts):
            riding = fds if index == (1 if fds else -1) else ()
            while True:
                try:
                    send_with_fds(self.tube, part, riding, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    self._make_room(end)

    def _make_room(self, end: float) -> None:
        """Wait until the tube takes more. The child may be stuck with upcalls meanwhile."""
        self._look(end)
        self._poll.modify(self.tube, select.POLLIN | select.POLLOUT)
        try:
            ready = self._poll.poll(min(self.deadline, LOOK) * 1000)
        finally:
            self._poll.modify(self.tube, select.POLLIN)
        if ready and ready[0][1] & ~select.POLLOUT:
            try:
                if self._take(socket.MSG_DONTWAIT) is not None:
                    raise ProtocolFault("an answer before the whole command was sent")
            except BlockingIOError:
                pass

    def _answer(self, end: float) -> m.Message:
        """Wait for the answer; upcalls on the way are handled in order."""
        while True:
            try:
                answer = self._take(0)
            except BlockingIOError:
                answer = None
            if answer is not None:
                return answer
            self._look(end)

    def _look(self, end: float) -> None:
        """Whether a wait is still wanted."""
        if self.given_up():
            raise _GivenUp
        if monotonic() >= end:
            raise _Hung

    def _take(self, flags: int) -> m.Message | None:
        return self._judge(receive_datagram(self.tube, 0, flags)[0])

    def _judge(self, datagram: bytes) -> m.Message | None:
        """Handle one datagram; the answer that is waited for, or None."""
        if not datagram:
            raise TubeClosed
        if datagram[0] != GATHERED:
            return self._judge_one(datagram)
        answer = None
        for message in scattered(datagram):
            if answer is not None:
                raise ProtocolFault("a message behind the answer in one datagram")
            answer = self._judge_one(message)
        return answer

    def _judge_one(self, datagram: bytes) -> m.Message | None:
        whole = self._assembler.feed(datagram)
        if whole is None:
            if self.session.awaiting is None:
                raise ProtocolFault("a long message that nobody asked for")
            return None
        kind = m.FROM_CHILD.get(whole[0])
        if kind is None:
            raise ProtocolFault(f"unknown opcode {whole[0]:#04x}")
        # Judged before it is parsed: what nobody asked for costs nothing.
        is_answer = self.session.received(kind)
        message = kind.decode(whole)
        if is_answer:
            self._assembler.limit = _UPCALL_LIMIT
            return message
        self.upcalls += 1
        self._upcall(message)
        return None

    def _upcall(self, message: m.Message) -> None:
        events, name = self.events, self.name
        match message:
            case m.IrqLevel(level, pin):
                events.irq(name, pin, level)
            case m.Msi(data, address):
                events.msi(name, address, data)
            case m.WrotePages(runs):
                events.wrote_pages(name, runs)
            case m.WantTurn():
                events.want_turn(name)
            case m.Output(data):
                events.output(name, data)
            case m.InputWanted():
                events.input_wanted(name)
            case m.ExitRequest(value):
                events.exit_request(name, value)
            case m.Log(text):
                events.log(name, text)
            case m.LastWords(text):
                self._last_words = text

    # Failing.

    def _blame(self, error: BaseException, doing: str) -> BaseException:
        """Turn an error of an exchange into the device's failure; the exception to raise."""
        if isinstance(error, _Hung):
            self.fail(f"did not answer within {self.deadline:g} s", doing)
        elif isinstance(error, _GivenUp):
            self.give_up(doing)
        elif isinstance(error, ProtocolFault):
            self.fail(f"broke the protocol: {error}", doing)
        elif isinstance(error, (TubeClosed, OSError)):
            self.fail("", doing)
        else:
            # Our own bug or an interrupt: nobody knows any more who owes whom an answer.
            self.fail(f"was abandoned in mid-exchange ({type(error).__name__})", doing)
            return error
        return self.failed or error

    def give_up(self, doing: str) -> None:
        """Enter the failed state because the machine is to end; the device may just be slow."""
        self.fail("did not answer, and the run is to end", doing, given_up=True)

    def fail(self, reason: str, doing: str, *, given_up: bool = False) -> None:
        """Enter the failed state; `reason` is "" for a child whose tube is closed."""
        if self._failing:
            return
        self._failing = True
        if not reason:
            self._hear_last_words()
            if not self.child.wait_end(DEATH_GRACE):
                reason = "closed its tube"
        self.child.kill()
        obituary = self.child.obituary(DEATH_GRACE)
        if not reason:
            reason = obituary.text() if obituary else "its process is gone"
        elif obituary and obituary.syscall:
            reason = obituary.text()
        if self._last_words:
            reason += f"; last words: {self._last_words}"
        self.failed = DeviceFailure(self.name, reason, doing, given_up=given_up)
        self.on_stopped()
        self.tube.close()
        if self.on_failed is not None:
            self.on_failed(self.failed)

    def _hear_last_words(self) -> None:
        """Take what a dead child had sent; its output must not be lost."""
        resets = 0
        for _ in range(LAST_MESSAGES):
            try:
                self._take(socket.MSG_DONTWAIT)
            except TubeClosed:
                # A reset comes once, before what was sent; after that the end is the end.
                resets += 1
                if resets > 1:
                    return
            except (ProtocolFault, OSError):
                return

    def close(self) -> None:
        """Give up the child: no failure is told any more."""
        self._failing = True
        self.on_stopped()
        self.child.close()
