"""The guest's console as the machine holds it: output seen so far, input not yet accepted.

Where the bytes come from and go to (a terminal, a file, a test) is the business of whoever sets
`ConsoleBuffer.sink` and calls `ConsoleBuffer.feed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KEEP = 16 << 20
"""How many bytes of output are kept for `Machine.output`."""
INPUT_CHUNK = 4096
"""How much input a device is offered at once."""


@dataclass
class Watch:
    """A text that somebody waits for in the output, and what to call when it was seen."""

    text: bytes
    seen: Callable[[], None]


class ConsoleBuffer:
    """Output and input of one console device."""

    def __init__(self) -> None:
        self.output = bytearray()
        """All output so far, or its last `KEEP` bytes."""
        self.sink: Callable[[bytes], None] | None = None
        self.pending = b""
        """Input that the device has not accepted yet."""
        self.blocked = False
        """The device refused input and has not asked for more since."""
        self._watches: list[Watch] = []

    def emit(self, data: bytes) -> None:
        """Take output of the guest."""
        before = len(self.output)
        self.output += data
        if self.sink is not None:
            self.sink(data)
        for watch in self._watches[:]:
            # Only what is new can complete a match.
            start = max(before - len(watch.text) + 1, 0)
            if self.output.find(watch.text, start) >= 0:
                self._watches.remove(watch)
                watch.seen()
        if len(self.output) > 2 * KEEP:
            del self.output[:-KEEP]

    def watch(self, text: bytes, seen: Callable[[], None]) -> Watch:
        """Call `seen` once, when `text` appears in output from now on."""
        watch = Watch(text, seen)
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget a watch; harmless if it was seen already."""
        if watch in self._watches:
            self._watches.remove(watch)

    def feed(self, data: bytes) -> None:
        """Add input for the guest; `push` hands it on."""
        self.pending += data

    def push(self, receive: Callable[[bytes], int]) -> None:
        """Offer pending input to the device until it refuses some."""
        while self.pending and not self.blocked:
            chunk = self.pending[:INPUT_CHUNK]
            accepted = receive(chunk)
            self.pending = self.pending[accepted:]
            self.blocked = accepted < len(chunk)
