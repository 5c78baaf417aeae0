"""Console (5.3): port 0 is the terminal; with ``log=FILE`` there is a second port, into that file.

Without a second port MULTIPORT is not offered, and a driver finds a plain console (hvc0 in Linux).
What is typed before the driver is ready waits, up to `MOST_INPUT` bytes; more is refused.

The size of the terminal is in the configuration, and a change of it is told by a configuration
interrupt or, to a multiport driver, by a RESIZE message (5.3.6.2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from devices import host_io
from devices.contract import U16, DeviceHost
from devices.files import HostFile
from devices.virtio.chain import Chain
from devices.virtio.common import VirtioState
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2
DEVICE_READY, DEVICE_ADD, PORT_READY, CONSOLE_PORT = 0, 1, 3, 4
RESIZE, PORT_OPEN, PORT_NAME = 5, 6, 7
RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
"""5.3.2: the queues."""
LOG_PORT, LOG_NAME = 1, b"log"

MOST_INPUT = 4096
MOST_OUTPUT = 1 << 20
"""Bytes of one request; what a driver sends beyond that at once is dropped."""
_MOST_MESSAGES = 64
_CONTROL = struct.Struct("<IHH")  # port, event, value
_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_EMERGENCY = 8


@dataclass
class ConsoleOptions:
    """A console.

    Attributes:
        log: a file that a second port is written to.
        columns: of the terminal; can be changed while it runs.
        rows: the same.
    """

    log: Annotated[str, HostFile(output=True)] = ""
    columns: U16 = 80
    rows: U16 = 25


@dataclass
class ConsoleState(VirtioState):
    """What waits for the driver.

    Attributes:
        typed: input of port 0.
        messages: for the control queue, the oldest first.
        columns, rows: the size of the terminal now.
        logged: bytes that were written to the log.
    """

    typed: bytes = b""
    messages: list[bytes] = field(default_factory=list)
    columns: U16 = 0
    rows: U16 = 0
    logged: int = 0


class Console(VirtioDevice):
    model: ClassVar[str] = "console"
    summary: ClassVar[str] = "virtio console: the terminal if no serial port is, port 1 log=FILE"
    device_type: ClassVar[int] = 3
    class_code: ClassVar[int] = 0x078000  # communication controller, other
    config_size: ClassVar[int] = _CONFIG.size
    in_order: ClassVar[bool] = True
    Options = ConsoleOptions
    State = ConsoleState
    options: ConsoleOptions
    state: ConsoleState

    def __init__(self, host: DeviceHost, options: ConsoleOptions | None = None) -> None:
        self._log = host.fds.get("log")
        names = ["receive 0", "transmit 0"]
        if self._log is not None:
            names += ["control receive", "control transmit", "receive 1", "transmit 1"]
        self.queues = [Queue(name, 128) for name in names]
        super().__init__(host, options)
        self.state.columns, self.state.rows = self.options.columns, self.options.rows

    def features(self) -> int:
        return F_SIZE | F_EMERG_WRITE | (0 if self._log is None else F_MULTIPORT)

    def read_device_config(self) -> bytes:
        ports = 1 if self._log is None else 2
        return _CONFIG.pack(self.state.columns, self.state.rows, ports, 0)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        if offset == _EMERGENCY:
            self.host.output(bytes((value & 0xFF,)))

    # The terminal.

    def receive(self, data: bytes) -> int:
        taken = data[: MOST_INPUT - len(self.state.typed)]
        self.state.typed += taken
        self._look_at(RX0)
        return len(taken)

    adjustable: ClassVar[frozenset[str]] = frozenset({"columns", "rows"})

    def adjust(self, **wanted: int) -> None:
        columns = wanted.get("columns", self.state.columns)
        self.resize(columns, wanted.get("rows", self.state.rows))

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now."""
        if (columns, rows) == (self.state.columns, self.state.rows):
            return
        self.state.columns, self.state.rows = columns, rows
        if self.negotiated(F_MULTIPORT):
            self._tell(0, RESIZE, 0, struct.pack("<HH", columns, rows))
        self.config_changed()

    def _look_at(self, index: int) -> None:
        if self.live:
            self.ring(self.virtqueues[index])

    # Queues.

    def serve(self, queue: VirtQueue) -> None:
        if queue.index == RX0:
            self._deliver_input(queue)
        elif queue.index == CONTROL_RX:
            self._deliver_messages(queue)
        elif queue.index != RX1:  # nobody writes to the log's port
            super().serve(queue)

    def _deliver_input(self, queue: VirtQueue) -> None:
        full = len(self.state.typed) >= MOST_INPUT
        while self.state.typed and (chain := queue.pop()) is not None:
            self.state.typed = self.state.typed[chain.write(self.state.typed) :]
            queue.complete(chain)
        if full and len(self.state.typed) < MOST_INPUT:
            self.host.input_wanted()

    def _deliver_messages(self, queue: VirtQueue) -> None:
        while self.state.messages and (chain := queue.pop()) is not None:
            chain.write(self.state.messages.pop(0))
            queue.complete(chain)

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if queue.index == CONTROL_TX:
            self._control(chain.read(_CONTROL.size))
            return
        data = chain.read(MOST_OUTPUT)
        self.spend(len(data) >> 12)
        if queue.index == TX0:
            self.host.output(data)
        elif self._log is not None:
            try:
                host_io.write_all(self._log, [memoryview(data)], self.state.logged)
                self.state.logged += len(data)
            except OSError as error:
                self.host.log(f"the log: {error.strerror}")

    # Ports (5.3.6.2).

    def _control(self, message: bytes) -> None:
        if len(message) < _CONTROL.size:
            return
        port, event, value = _CONTROL.unpack(message)
        if event == DEVICE_READY and value == 1:
            for number in (0, LOG_PORT):
                self._tell(number, DEVICE_ADD)
        elif event == PORT_READY and value == 1:
            if port == 0:
                self._tell(0, CONSOLE_PORT, 1)
                size = struct.pack("<HH", self.state.columns, self.state.rows)
                self._tell(0, RESIZE, 0, size)
            elif port == LOG_PORT:
                self._tell(LOG_PORT, PORT_NAME, 1, LOG_NAME)
            else:
                return
            self._tell(port, PORT_OPEN, 1)

    def _tell(self, port: int, event: int, value: int = 0, more: bytes = b"") -> None:
        if len(self.state.messages) < _MOST_MESSAGES:  # else the driver does not listen at all
            self.state.messages.append(_CONTROL.pack(port, event, value) + more)
            self._look_at(CONTROL_RX)

    def device_reset(self) -> None:
        self.state.messages.clear()

    def validate(self, state: Any) -> None:
        super().validate(state)
        if len(state.typed) > MOST_INPUT or len(state.messages) > _MOST_MESSAGES:
            raise ValueError("more waits for the driver than there is room for")
        if not 0 <= state.logged < 1 << 62:
            raise ValueError("an impossible length of the log")
