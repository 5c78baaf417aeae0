"""``demo isolation``: what a device process can do that its guest has taken over.

For each way out a fresh process of the hostile device is started, once in its jail and once without
one, and told to try it. A jailed one is killed at the first forbidden system call, and named.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from devices.errors import DeviceError, DeviceFailure
from proxy.device import ProxyDevice
from proxy.jail import JailMode
from proxy.jail.escape import ATTEMPTS, Attempt, Targets
from proxy.warden import Warden
from vmm.demo.hostile import GOT, Hostile
from vmm.demo.lesson import Lesson

SECRET = b"a secret of the machine"


class _Ear:
    """Hears what a device says; implements `proxy.events.ProxyEvents`."""

    def __init__(self) -> None:
        self.said = b""
        self.failure = ""

    def output(self, _name: str, data: bytes) -> None:
        self.said += data

    def failed(self, failure: DeviceFailure) -> None:
        self.failure = failure.reason

    def irq(self, name: str, pin: int, level: bool) -> None: ...
    def msi(self, name: str, address: int, data: int) -> None: ...
    def wrote_pages(self, name: str, runs: Sequence[tuple[int, int]]) -> None: ...
    def want_turn(self, name: str) -> None: ...
    def input_wanted(self, name: str) -> None: ...
    def exit_request(self, name: str, value: int) -> None: ...
    def log(self, name: str, text: str) -> None: ...


def teach(lesson: Lesson) -> None:
    """All attempts, in the jail and beside it."""
    with _targets() as targets, Warden(jail=JailMode.AUTO) as jailed:
        lesson.say("A hostile device tries each way out, in a fresh process each time.")
        lesson.say(jailed.plan.one_line() or "jail: every layer holds on this host.")
        with Warden(jail=JailMode.OFF) as bare:
            for number, attempt in enumerate(ATTEMPTS):
                lesson.say(f"\n{attempt.aim}:")
                out, said = _try(bare, number, targets)
                lesson.show("without a jail", said, attempt=attempt.name, jail=False, escaped=out)
                out, said = _try(jailed, number, targets)
                facts = {"attempt": attempt.name, "jail": True, "escaped": out}
                lesson.show("in the jail", said, not out, **facts)
    _sum_up(lesson)


def _sum_up(lesson: Lesson) -> None:
    ways = {
        jail: [s for s in lesson.steps if s["jail"] is jail and s["escaped"]]
        for jail in (False, True)
    }
    lesson.say(
        f"\nOf {len(ATTEMPTS)} ways out, {len(ways[False])} were open without a jail and "
        f"{len(ways[True])} in it."
    )


def _try(warden: Warden, number: int, targets: Targets) -> tuple[bool, str]:
    """One attempt in a fresh device process: whether it got out, and one line on it."""
    ear = _Ear()
    try:
        child = warden.spawn("hostile", Hostile.model, asdict(targets))
        with ProxyDevice(child, ear, deadline=10.0) as proxy:
            proxy.handlers()[0].write(0, 1, number)
            with contextlib.suppress(DeviceFailure):
                proxy.sleep()  # waits until the write was carried out
    except DeviceError as error:
        return False, f"could not start: {error.reason}"
    if ear.said:
        text = ear.said[1:].decode(errors="replace")
        return (True, text) if ear.said.startswith(GOT) else (False, f"stopped: {text}")
    return _ran_another(number, ear.failure)


def _ran_another(number: int, failure: str) -> tuple[bool, str]:
    """A device that is gone without a word was killed, or became another program."""
    attempt: Attempt = ATTEMPTS[number]
    if attempt.name == "exec" and "status 42" in failure:
        return True, "ran a program in its place"
    return False, f"the device {failure}"


@contextlib.contextmanager
def _targets() -> Iterator[Targets]:
    """Something worth stealing: memory, a descriptor, a server on the loopback interface."""
    secret = ctypes.create_string_buffer(SECRET)
    with tempfile.TemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as server:
        file.write(SECRET)
        file.flush()
        yield Targets(
            os.getpid(),
            ctypes.addressof(secret),
            len(SECRET),
            file.fileno(),
            server.getsockname()[1],
        )
