"""What the jail's tests share: plans of a few layers, things to steal, another user to be."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from proxy.jail import JailMode, JailPlan, layers, plan_jail
from proxy.jail import linux
from proxy.jail.escape import Targets

NAMESPACE_LAYERS = ("userns", "pidns", "mountns", "netns", "ipcns", "utsns")
ORDINARY_UID = 54321
USERS = ("root", "ordinary") if os.geteuid() == 0 else ("ordinary",)


def only(plan: JailPlan, *names: str) -> JailPlan:
    """A plan of these layers alone, which no machine would be given."""
    others = {layer.name: "not in this test" for layer in layers() if layer.name not in names}
    return replace(plan, missing=others)


def floor() -> JailPlan:
    """The plan of a host that permits no namespaces."""
    return plan_jail(JailMode.AUTO, without=NAMESPACE_LAYERS)


@contextlib.contextmanager
def things_to_steal() -> Iterator[Targets]:
    """What the attempts are after, all in this process."""
    secret = ctypes.create_string_buffer(b"a secret")
    with socket.create_server(("127.0.0.1", 0)) as server, open("/etc/hostname", "rb") as file:
        port = server.getsockname()[1]
        yield Targets(os.getpid(), ctypes.addressof(secret), 8, file.fileno(), port)


def as_user(user: str, run: Callable[[], Any]) -> Any:
    """Run something in a child process as root or as an ordinary user; its result or its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            if user == "ordinary" and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(ORDINARY_UID, ORDINARY_UID, ORDINARY_UID)
                os.setresuid(ORDINARY_UID, ORDINARY_UID, ORDINARY_UID)
                linux.prctl(linux.PR_SET_DUMPABLE, 1)
            result: tuple[bool, Any] = (True, run())
        except BaseException as error:
            result = (False, (error, traceback.format_exc()))
        try:
            data = pickle.dumps(result)
        except Exception:
            data = pickle.dumps((False, (RuntimeError(repr(result[1])), "")))
        with open(writer, "wb") as file:
            file.write(data)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    status = os.waitpid(pid, 0)[1]
    assert said, f"the helper process ended with status {status}"
    good, value = pickle.loads(said)
    if good:
        return value
    error, text = value
    raise AssertionError(text) if isinstance(error, AssertionError) else error


def kill_and_wait(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
