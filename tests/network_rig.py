"""What the network's tests share: whether there is a back end here, an event loop to run it."""

from __future__ import annotations

import os
import select
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import pytest

from vmm.events import EventLoop

PATIENCE = 30
PASST = shutil.which("passt")
needs_passt = pytest.mark.skipif(PASST is None, reason="NO PASST: install the package passt")


@contextmanager
def event_loop() -> Iterator[EventLoop]:
    loop = EventLoop(lambda: None)
    try:
        yield loop
    finally:
        loop.close()


def run_until(loop: EventLoop, done: Callable[[], bool]) -> None:
    """Let a loop handle what comes until `done`."""
    end = monotonic() + PATIENCE
    while not done():
        assert monotonic() < end, "it does not come"
        loop.poll(0.05)


def received(fd: int) -> bytes:
    """The next packet of a descriptor that does not block."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "nothing comes"
    return os.read(fd, 1 << 17)


def free_port() -> int:
    """A port of this host's loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def process_is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
