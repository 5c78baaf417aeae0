"""What the jail's tests share: plans of a few layers, another user to be."""

from __future__ import annotations

import array
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pyseccomp  # noqa: F401  # before a test gives up the right to read its file

from proxy.jail import (
    JailMode,
    JailPlan,
    JailUnavailable,
    Policy,
    Rule,
    enter_jail,
    filter,
    fork_into_jail,
    layers,
    linux,
    plan_jail,
    receive_violation,
)

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


def send_listener(tube: socket.socket, fd: int) -> None:
    """What a child does with its seccomp listener."""
    tube.sendmsg([b"L"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def run_in_jail(plan: JailPlan, work: Callable[[], Any], keep: Iterable[int] = ()) -> Any:
    """Do something after entering; its JSON-able result, or the forbidden call's name."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        pid = fork_into_jail(plan)
        if pid == 0:
            try:
                enter_jail(
                    plan,
                    Policy(),
                    [there.fileno(), *keep],
                    lambda fd: send_listener(there, fd),
                )
                there.send(json.dumps(work()).encode())
            except BaseException as error:
                there.send(json.dumps(f"{type(error).__name__}: {error}").encode())
            finally:
                os._exit(0)
        there.close()
        listener = -1
        try:
            while True:
                poll = select.poll()
                poll.register(here, select.POLLIN)
                if listener >= 0:
                    poll.register(listener, select.POLLIN)
                ready = [fd for fd, _ in poll.poll(20_000)]
                assert ready
                if here.fileno() not in ready:
                    return f"violation: {receive_violation(listener)}"
                message, fds, _, _ = socket.recv_fds(here, 1 << 16, 1)
                if not fds:
                    return json.loads(message) if message else "no word"
                listener = fds[0]
        finally:
            if listener >= 0:
                os.close(listener)
            kill_and_wait(pid)


def forbid(*rules: Rule) -> None:
    """Make this process and its children like those of a container that refuses these calls."""
    seccomp = filter.binding()
    program = seccomp.SyscallFilter(seccomp.ALLOW)
    for rule in rules:
        conditions = (seccomp.Arg(a.index, seccomp.MASKED_EQ, a.mask, a.value) for a in rule.args)
        program.add_rule(seccomp.ERRNO(rule.refuse), rule.syscall, *conditions)
    program.load()


class Refused(JailUnavailable):
    """A refusal that can be sent from one process to another."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ())


def refusal(mode: JailMode, without: Iterable[str] = ()) -> None:
    """Plan a jail that cannot be had. Raises Refused."""
    try:
        plan_jail(mode, without=without)
    except JailUnavailable as error:
        raise Refused(str(error)) from None
