"""Output that nobody waits for: a bounded queue and a thread for each place that takes it.

The vCPU thread must never block in a write, or a reader that stalls takes the time-out, Ctrl-C and
the escape menu with it. Setting O_NONBLOCK is no way out: the flag belongs to the open file, which
the shell and other programs share. So a thread of its own does the blocking. What is in the queue
beyond `HIGH` bytes is a reason for the machine to stop the guest until there is room again.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from devices.errors import Subject, UserError
from vmm.host_files import HostFiles

HIGH = 64 << 10
"""Bytes that wait beyond which the guest should wait too."""
LOW = 16 << 10
"""Bytes that wait at which it can go on."""
HARD = 16 << 20
"""What does not fit is dropped: only a device that floods its machine gets here."""
CHUNK = 16 << 10
LINE = 1000
"""Characters of one line for people."""


def clean(text: str) -> str:
    """One line for people: nothing that a terminal would act upon, and of bounded length.

    Text of a guest or a device may be in any message.
    """
    if len(text) > LINE:
        text = text[: LINE - 3] + "..."
    text = text.expandtabs()[:LINE]
    return "".join(c if c.isprintable() else "?" for c in text)


def disk_progress(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """For what goes on with disks: a line each second."""
    told = monotonic()

    def progress(name: str, done: int, total: int) -> None:
        nonlocal told
        if monotonic() - told >= 1:
            told = monotonic()
            say(f"disk {name}: {done >> 20} of {total >> 20} MiB")

    return progress


class _Writer:
    """The queue and the thread of one place."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.closed = False
        self.size = 0
        self.dropped = 0
        self.failed: OSError | None = None
        self.condition = threading.Condition()
        self._changed = changed
        self._queue: deque[tuple[int, bytearray]] = deque()
        self._thread: threading.Thread | None = None
        self._idle = False

    def put(self, fd: int, data: bytes, limit: int) -> None:
        with self.condition:
            if self.failed is not None:
                return
            if self.size + len(data) > limit:
                self.dropped += len(data)
                return
            self.size += len(data)
            if self._queue and self._queue[-1][0] == fd and len(self._queue[-1][1]) < CHUNK:
                self._queue[-1][1].extend(data)
            else:
                self._queue.append((fd, bytearray(data)))
            if self._idle:
                self.condition.notify_all()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vmm-output", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self.condition:
                while not self._queue:
                    if self.closed:
                        return
                    self._idle = True
                    self.condition.wait()
                    self._idle = False
                fd, data = self._queue.popleft()
            view = memoryview(data)
            while view:
                written = self._write(fd, view[:CHUNK])
                with self.condition:
                    view = view[written:]
                    self.size -= written
                    if self.failed is not None:
                        self._queue.clear()
                        self.size, view = 0, view[:0]
                    if self.size == 0:
                        self.condition.notify_all()
                if self.size <= LOW:
                    self._changed()

    def _write(self, fd: int, data: memoryview) -> int:
        """Write some of it, however long that takes; 0 if it cannot be."""
        while True:
            try:
                return os.write(fd, data)
            except BlockingIOError:
                waiter = select.poll()
                waiter.register(fd, select.POLLOUT)
                waiter.poll()
            except OSError as error:
                self.failed = error
                return 0


class Outputs:
    """All places that output goes to; descriptors of one place share a queue, so order is kept.

    Args:
        wake: called from a thread when there is room again after `full` was seen, and when a
            place has failed; thread-safe.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._attached = True
        self._waiting = False
        self._by_fd: dict[int, _Writer] = {}
        self._writers: dict[tuple[int, int, int], _Writer] = {}

    def write(self, fd: int, data: bytes, *, limit: int = HARD) -> bool:
        """Have it written; whether the queue is full now. Never blocks, never raises.

        Args:
            limit: it is dropped if more bytes than that would wait.
        """
        writer = self._by_fd.get(fd) or self._add(fd)
        writer.put(fd, data, limit)
        if writer.size > HIGH:
            self._waiting = True
        return self._waiting

    @property
    def full(self) -> bool:
        """There has been too much, and not enough of it has been taken since."""
        if self._waiting:
            self._waiting = any(writer.size > LOW for writer in self._by_fd.values())
        return self._waiting

    def failure(self, fd: int) -> OSError | None:
        """Why this place takes nothing any more, if so."""
        writer = self._by_fd.get(fd)
        return None if writer is None else writer.failed

    def pending(self) -> int:
        """Bytes that wait to be taken."""
        return sum(writer.size for writer in self._writers.values())

    def lost(self) -> int:
        """Bytes that were dropped because there were far too many."""
        return sum(writer.dropped for writer in self._writers.values())

    def drain(self, seconds: float | None, fd: int | None = None) -> bool:
        """Wait until all has been taken (or cannot be); None: however long that takes.

        Args:
            fd: wait for this place alone.

        Returns whether all has been.
        """
        writers = list(self._writers.values()) if fd is None else [self._by_fd[fd]]
        end = None if seconds is None else monotonic() + seconds
        for writer in writers:
            with writer.condition:
                while writer.size:
                    left = None if end is None else min(end - monotonic(), threading.TIMEOUT_MAX)
                    if left is not None and left <= 0:
                        return False
                    writer.condition.wait(left)
        return True

    def close(self) -> None:
        """From now on `wake` is not called, and the threads end when they have nothing to do.

        One whose reader stalls stays until the process ends.
        """
        with self._lock:
            self._attached = False
        for writer in self._writers.values():
            with writer.condition:
                writer.closed = True
                writer.condition.notify_all()

    def _add(self, fd: int) -> _Writer:
        try:
            status = os.fstat(fd)
            place = (status.st_dev, status.st_ino, status.st_rdev)
        except OSError:
            place = (-1, fd, 0)
        writer = self._writers.get(place)
        if writer is None:
            writer = self._writers[place] = _Writer(self._changed)
        self._by_fd[fd] = writer
        return writer

    def _changed(self) -> None:
        """On a writer's thread, after each write that leaves room or fails."""
        if self._waiting or any(writer.failed for writer in list(self._writers.values())):
            with self._lock:
                if self._attached:
                    self._wake()


def open_output(path: str, option: str, host_files: HostFiles) -> int:
    """Begin a file that an option says something of the guest's goes to.

    Args:
        option: its name: it is given as ``--option file:PATH``.
        host_files: of the machine: a file that one of its devices has is refused.

    Raises:
        UserError: it cannot be written, or belongs to a device.
    """
    where = f"--{option} file:{path}"
    if owner := host_files.user_of(path):
        problem = f"device '{owner.device}' has that file, too; give each a file of its own"
        raise UserError(f"{where}: {problem}", Subject(option), owner)
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}", Subject(option)) from error
