"""`ChildHost`: what a device model in a child asks of the machine, as messages on the tube."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

from devices.dma import GuestMemory, Turns
from proxy import lane
from proxy import messages as m
from proxy.tube import MOST_GATHERED, gathered

FLUSH_BYTES = m.MAX_BYTES
_MOST_KEPT = MOST_GATHERED - 1


class ChildHost:
    """The `DeviceHost` of a child.

    Output is gathered and sent when no command waits, before it fills a message, before an exit
    request and before the answers that promise that nothing is in flight.

    While the machine waits for an answer it needs to hear of interrupts and written pages only with
    that: each message would wake it for nothing. They are kept for `answer`, and sent before
    anything else is, so the order of all that this says is that in which it was said.

    System calls it makes: sendto (tube), write (doorbell).

    Args:
        end: the child's end of the tube.
        doorbell: the writing end of a pipe, non-blocking; one byte says "look at the tube".
        fds: descriptors given to the device.
        finish_work: see `devices.dma.Turns`.
    """

    def __init__(
        self,
        end: socket.socket,
        doorbell: int,
        fds: Mapping[str, int],
        finish_work: bool = False,
    ) -> None:
        self._end = end
        self._doorbell = doorbell
        self._fds = dict(fds)
        self.pending = bytearray()
        self.quiet = True
        """The machine waits for an answer: it will meet upcalls on the way, without a doorbell."""
        self.kept: list[bytes] = []
        """Upcalls that go with the answer."""
        self.sent = 0
        self.unsent = 0
        """Messages that could not be sent; the machine is gone then."""
        self.page: memoryview | None = None
        """The lane's page in words of 8 bytes, once it is mapped."""
        self.turns = Turns(self._wrote_runs, lambda: self._keep(m.WantTurn()), finish_work)

    @property
    def fds(self) -> Mapping[str, int]:
        return self._fds

    @property
    def memory(self) -> GuestMemory:
        return self.turns.memory

    def want_turn(self) -> None:
        self.turns.want_turn()

    def want_work(self) -> None:
        self.turns.want_work()

    def set_irq(self, level: bool, pin: int = 0) -> None:
        self._keep(m.IrqLevel(bool(level), pin))

    def send_msi(self, address: int, data: int) -> None:
        self._keep(m.Msi(data, address))

    def wrote_pages(self, first: int, count: int) -> None:
        self._wrote_runs([(first, count)])

    def output(self, data: bytes) -> None:
        pending = self.pending
        pending += data
        while len(pending) >= FLUSH_BYTES:
            self._send(m.Output(bytes(pending[:FLUSH_BYTES])))
            del pending[:FLUSH_BYTES]

    def input_wanted(self) -> None:
        self._send(m.InputWanted())

    def request_exit(self, value: int) -> None:
        self.flush()
        self._send(m.ExitRequest(value))

    def log(self, message: str) -> None:
        self._send(m.Log(message))

    def last_words(self, text: str) -> None:
        """Say why this process is about to end."""
        self.flush()
        self._send(m.LastWords(text))

    def flush(self) -> None:
        """Send the output that was gathered."""
        if self.pending:
            data = bytes(self.pending)
            self.pending.clear()
            self._send(m.Output(data))

    def _wrote_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        for start in range(0, len(runs), m.MAX_RUNS):
            self._keep(m.WrotePages(tuple(runs[start : start + m.MAX_RUNS])))

    def answer(self, data: bytes) -> None:
        """Send a short answer, and what was kept for it, as one datagram."""
        kept = self.kept
        if kept:
            kept.append(data)
            data, upcalls = gathered(kept), len(kept) - 1
            kept.clear()
            self._post(data, upcalls)
            return
        try:
            self._end.send(data)
        except OSError:
            self.unsent += 1

    def send_kept(self) -> None:
        """Send what was kept now: the machine gets its answer elsewhere than by `answer`."""
        kept = self.kept
        if kept:
            data, upcalls = gathered(kept), len(kept)
            kept.clear()
            self._post(data, upcalls)

    def _keep(self, upcall: m.Message) -> None:
        if not self.quiet:
            self._send(upcall)
            return
        self.kept.append(upcall.encode())
        if len(self.kept) == _MOST_KEPT:
            self.send_kept()

    def _send(self, upcall: m.Message) -> None:
        if self.kept:
            self.send_kept()
        self._post(upcall.encode(), 1)
        if not self.quiet:
            self.ring()

    def _post(self, datagram: bytes, upcalls: int) -> None:
        try:
            self._end.send(datagram)
        except OSError:
            # The machine is gone. There is nobody to tell; the next receive ends the loop.
            self.unsent += 1
            return
        self.sent += upcalls
        if self.page is not None:
            # After the send: whoever sees the count finds the messages in the tube.
            self.page[lane.UPCALLS] = self.sent

    def ring(self) -> None:
        """Wake the machine's loop."""
        try:
            os.write(self._doorbell, b"!")
        except BlockingIOError:
            pass  # it rings already
        except OSError:
            self.unsent += 1
