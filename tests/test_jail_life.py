"""Life in the jail: what is allowed, what is named, how it ends, and that nothing is left."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jail_tools import (
    NAMESPACE_LAYERS,
    USERS,
    as_user,
    floor,
    kill_and_wait,
    only,
    run_in_jail,
    send_listener,
)

from proxy.jail import (
    JailMode,
    JailPlan,
    JailUnavailable,
    Policy,
    enter_jail,
    fork_into_jail,
    layers,
    plan_jail,
    prepare_warden,
    receive_violation,
    try_jail,
)


def _everyday_work() -> str:
    """What CPython and the child loop do all day."""
    lists = [[n] * 100 for n in range(5_000)]
    for one in lists:
        one.append(one)
    del lists
    gc.collect()
    big = bytearray(40 << 20)
    big += b"grow" * (1 << 20)
    del big
    time.sleep(0.001)
    time.monotonic_ns()
    time.time()
    lock = threading.Lock()
    with lock:
        pass
    lock.acquire()
    assert not lock.acquire(timeout=0.001)
    page = mmap.mmap(-1, 1 << 16)
    page[:4] = b"page"
    page.close()
    os.urandom(8)
    os.getpid()
    json.loads(msgspec.json.encode({"a": [1, 2.5, "x", struct.pack("Q", 1)]}))
    try:
        raise ValueError("an error is formatted")
    except ValueError as error:
        return f"fine: {error!r}"


@pytest.mark.parametrize("make_plan", [lambda: plan_jail(JailMode.AUTO), floor])
@pytest.mark.parametrize("user", USERS)
def test_everyday_work_is_allowed(user: str, make_plan: Callable[[], JailPlan]) -> None:
    result = as_user(user, lambda: run_in_jail(make_plan(), _everyday_work))
    assert result == "fine: ValueError('an error is formatted')"


@pytest.mark.parametrize("make_plan", [lambda: plan_jail(JailMode.AUTO), floor])
def test_shared_memory_can_be_mapped(make_plan: Callable[[], JailPlan]) -> None:
    """A config mapping arrives by message and is mapped in the jail."""
    memory = os.memfd_create("config")
    os.ftruncate(memory, 4096)

    plan = make_plan()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        pid = fork_into_jail(plan)
        if pid == 0:
            try:
                enter_jail(plan, Policy(), [there.fileno()], lambda _: None)
                _, fds, _, _ = socket.recv_fds(there, 16, 1)
                page = mmap.mmap(fds[0], 4096)
                os.close(fds[0])
                page[:6] = b"mapped"
                there.send(b"done")
            except BaseException as error:
                there.send(repr(error).encode())
            finally:
                os._exit(0)
        socket.send_fds(here, [b"x"], [memory])
        there.close()
        assert here.recv(1000) == b"done"
        kill_and_wait(pid)
    assert os.pread(memory, 6, 0) == b"mapped"
    os.close(memory)


def test_a_forbidden_call_is_named() -> None:
    assert run_in_jail(plan_jail(JailMode.AUTO), lambda: os.uname().nodename) == "violation: uname"


def test_a_listener_of_a_dead_process_has_nothing_to_say() -> None:
    plan = plan_jail(JailMode.AUTO)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        pid = fork_into_jail(plan)
        if pid == 0:
            enter_jail(
                plan,
                Policy(),
                [there.fileno()],
                lambda fd: send_listener(there, fd),
            )
            os._exit(0)
        _, fds, _, _ = socket.recv_fds(here, 16, 1)
        os.waitpid(pid, 0)
        poll = select.poll()
        poll.register(fds[0], select.POLLIN)
        assert poll.poll(20_000)
        assert receive_violation(fds[0]) is None
        os.close(fds[0])


def test_many_forks_each_process_one_of_its_own() -> None:
    plan = plan_jail(JailMode.AUTO)
    for _ in range(20):
        pid = fork_into_jail(plan)
        if pid == 0:
            os._exit(7 if os.getpid() == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (7 if plan.has("pidns") else 1)


def test_the_warden_has_one_thread() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="one thread"):
            prepare_warden(plan_jail(JailMode.AUTO))
    finally:
        done.set()
        thread.join()
    as_user("root", lambda: prepare_warden(plan_jail(JailMode.AUTO)))


@pytest.mark.parametrize("user", USERS)
def test_nothing_is_left_behind(user: str) -> None:
    def run() -> None:
        def traces() -> tuple[Any, ...]:
            fds = set(os.listdir("/proc/self/fd"))
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
            return len(fds), children, Path("/proc/self/mountinfo").read_text(), os.getuid()

        plan_jail(JailMode.AUTO)
        before = traces()
        plan = plan_jail(JailMode.AUTO)
        try_jail(plan, Policy())
        plan_jail(JailMode.AUTO, without=NAMESPACE_LAYERS)
        for layer in layers():
            with pytest.raises(JailUnavailable):
                plan_jail(JailMode.STRICT, without={layer.name})
        assert traces() == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    as_user(user, run)


def test_a_dead_parent_is_noticed_before_the_signal_is_set() -> None:
    """The parent may die between the fork and the request for its death signal."""
    plan = plan_jail(JailMode.AUTO)
    ready, done = os.pipe(), os.pipe()
    parent = os.fork()
    if parent == 0:
        pid = fork_into_jail(plan)
        if pid == 0:
            os.read(ready[0], 1)  # the parent is gone now
            enter_jail(plan, Policy(), (done[1],), lambda _: None)
            os.write(done[1], b"it lives")
            os._exit(0)
        os.write(done[1], f"{pid} ".encode())
        os.close(done[1])
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(done[1])
    os.write(ready[1], b"x")
    with open(done[0]) as file:
        said = file.read()
    assert re.fullmatch(r"\d+ ", said)
    for fd in ready:
        os.close(fd)
    assert _ends(int(said))


def _ends(pid: int) -> bool:
    """Is a process that is not our child gone soon?"""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("names", "hits"), [((), 1), (("session",), 0)])
def test_signals_of_the_keyboard_do_not_reach_a_device(names: tuple[str, ...], hits: int) -> None:
    """A terminal sends SIGINT to all of the foreground process group."""

    def run() -> Any:
        os.setpgid(0, 0)
        group = os.getpgrp()
        seen: list[int] = []
        signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
        (entered, say_entered), (go_on, say_go_on) = os.pipe(), os.pipe()
        keyboard = os.fork()
        if keyboard == 0:
            os.read(entered, 1)
            os.killpg(group, signal.SIGINT)
            os.write(say_go_on, b"1")
            os._exit(0)

        def work() -> int:
            os.write(say_entered, b"1")
            os.read(go_on, 1)
            time.sleep(0.01)
            return len(seen)

        try:
            return run_in_jail(only(plan_jail(JailMode.AUTO), *names), work, (say_entered, go_on))
        finally:
            os.waitpid(keyboard, 0)

    assert as_user("ordinary", run) == hits
