"""The plan, the refusals, the report; and that a layer which does not hold is never reported."""

from __future__ import annotations

import array
import errno
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jail_tools import NAMESPACE_LAYERS, USERS, as_user, floor, kill_and_wait, only

import proxy.jail
from devices.errors import UserError
from proxy.jail import (
    JailError,
    JailMode,
    JailPlan,
    JailReport,
    JailUnavailable,
    LayerState,
    Policy,
    Rule,
    enter,
    enter_jail,
    filter,
    fork_into_jail,
    layers,
    linux,
    plan_jail,
    policy_for,
    prepare_warden,
    receive_violation,
    report_data,
    report_table,
    try_jail,
)

MODELS = ("serial", "echo", "config-space", "debug-exit")
FLOOR = ("fds", "session", "rlimits", "nnp", "caps", "seccomp", "pdeath")


def _run_in_jail(plan: JailPlan, work: Callable[[], Any]) -> Any:
    """Do something after entering; its JSON-able result, or the forbidden call's name."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        pid = fork_into_jail(plan)
        if pid == 0:
            try:
                enter_jail(
                    plan,
                    Policy(),
                    [there.fileno()],
                    lambda fd: there.sendmsg(
                        [b"L"],
                        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))],
                    ),
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


def _forbid(*rules: Rule) -> None:
    """Make this process and its children like those of a container that refuses these calls."""
    seccomp = filter.binding()
    program = seccomp.SyscallFilter(seccomp.ALLOW)
    for rule in rules:
        conditions = (seccomp.Arg(a.index, seccomp.MASKED_EQ, a.mask, a.value) for a in rule.args)
        program.add_rule(seccomp.ERRNO(rule.refuse), rule.syscall, *conditions)
    program.load()


_NO_NAMESPACES = (
    Rule("unshare", "", refuse=errno.EPERM),
    *(
        Rule("clone", "", (filter_arg,), refuse=errno.EPERM)
        for filter_arg in (
            proxy.jail.policy.Arg(0, flag, flag)
            for flag in (linux.CLONE_NEWUSER, linux.CLONE_NEWPID, linux.CLONE_NEWNS)
        )
    ),
)


# Plans.


@pytest.mark.parametrize("user", USERS)
def test_every_layer_of_the_plan_holds(user: str) -> None:
    def run() -> tuple[JailPlan, JailReport]:
        plan = plan_jail(JailMode.AUTO)
        return plan, try_jail(plan, policy_for("echo"))

    plan, report = as_user(user, run)
    for layer in report.layers:
        wanted = LayerState.MISSING if layer.name in plan.missing else LayerState.ENFORCED
        assert layer.state is wanted, layer
        assert layer.detail
    assert [layer.name for layer in report.layers] == [layer.name for layer in layers()]


@pytest.mark.parametrize("user", USERS)
def test_this_host_has_it_all_or_says_so(user: str) -> None:
    plan = as_user(user, lambda: plan_jail(JailMode.AUTO))
    line = plan.one_line()
    assert "\n" not in line
    for name in plan.missing:
        assert name in line
    assert bool(line) == bool(plan.missing)


@pytest.mark.parametrize("name", [layer.name for layer in layers()])
@pytest.mark.parametrize("user", USERS)
def test_strict_refuses_and_auto_tells(user: str, name: str) -> None:
    with pytest.raises(JailUnavailable) as refused:
        as_user(user, lambda: _refusal(JailMode.STRICT, {name}))
    message = str(refused.value)
    assert name in message
    assert "\n" not in message
    assert "To mend: " in message
    if name in FLOOR:
        with pytest.raises(JailUnavailable, match=name):
            as_user(user, lambda: _refusal(JailMode.AUTO, {name}))
    else:
        plan = as_user(user, lambda: plan_jail(JailMode.AUTO, without={name}))
        assert name in plan.missing
        assert name in plan.one_line()
        assert not plan.has(name)


def _refusal(mode: JailMode, without: set[str]) -> None:
    try:
        plan_jail(mode, without=without)
    except JailUnavailable as error:
        # Pickling an exception of two arguments needs help.
        raise _Refused(str(error)) from None


class _Refused(JailUnavailable):
    def __init__(self, message: str) -> None:
        super().__init__(message, ())


def test_landlock_is_of_the_floor_only_without_an_empty_root() -> None:
    assert plan_jail(JailMode.AUTO, without={"landlock"}).has("root")
    with pytest.raises(JailUnavailable, match="landlock") as refused:
        plan_jail(JailMode.AUTO, without={"landlock", "root"})
    assert "landlock" in refused.value.missing
    assert "max_user_namespaces" in str(refused.value)
    assert "lsm=" in str(refused.value)


def test_off_is_said_and_does_nothing() -> None:
    plan = plan_jail(JailMode.OFF)
    assert "OFF" in plan.one_line()

    def work() -> Any:
        os.uname()
        return os.getpid() != 1 and "bin" in os.listdir("/")

    assert _run_in_jail(plan, work) is True


def test_off_reports_every_layer_as_off() -> None:
    plan = JailPlan(JailMode.OFF)
    report = as_user("root", lambda: enter_jail(plan, Policy(), (1, *range(3, 64)), print))
    assert {layer.state for layer in report.layers} == {LayerState.OFF}


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="no layer 'moat'"):
        plan_jail(JailMode.AUTO, without={"moat"})


# Hosts that are less than this one.


@pytest.mark.parametrize("user", USERS)
def test_a_container_without_namespaces_gets_the_floor(user: str) -> None:
    def run() -> tuple[JailPlan, JailReport]:
        _forbid(*_NO_NAMESPACES)
        plan = plan_jail(JailMode.AUTO)
        return plan, try_jail(plan, Policy())

    plan, report = as_user(user, run)
    assert set(plan.missing) == {*NAMESPACE_LAYERS, "root"}
    assert "Operation not permitted" in plan.one_line()
    assert report.state("landlock") is LayerState.ENFORCED
    assert report.state("root") is LayerState.MISSING


def test_a_container_without_namespaces_and_landlock_is_refused() -> None:
    def run() -> None:
        _forbid(*_NO_NAMESPACES, Rule("landlock_create_ruleset", "", refuse=errno.ENOSYS))
        _refusal(JailMode.AUTO, set())

    with pytest.raises(JailUnavailable, match="landlock"):
        as_user("root", run)


def test_a_container_that_forbids_listeners_loses_only_the_names() -> None:
    new_listener = proxy.jail.policy.Arg(1, 8, 8)

    def run() -> JailPlan:
        _forbid(Rule("seccomp", "", (new_listener,), refuse=errno.EBUSY))
        return plan_jail(JailMode.AUTO)

    plan = as_user("root", run)
    assert set(plan.missing) == {"notify"}
    assert "busy" in plan.one_line()


def test_a_container_without_seccomp_is_refused() -> None:
    def run() -> None:
        set_mode_filter = proxy.jail.policy.Arg(0, 1)
        _forbid(Rule("seccomp", "", (set_mode_filter,), refuse=errno.EINVAL))
        _refusal(JailMode.AUTO, set())

    with pytest.raises(JailUnavailable, match="seccomp"):
        as_user("root", run)


def test_one_namespace_that_is_missing_is_named_alone() -> None:
    new_net = proxy.jail.policy.Arg(0, linux.CLONE_NEWNET, linux.CLONE_NEWNET)

    def run() -> JailPlan:
        _forbid(Rule("unshare", "", (new_net,), refuse=errno.EINVAL))
        return plan_jail(JailMode.AUTO)

    assert set(as_user("root", run).missing) == {"netns"}


def test_a_mount_that_is_refused_costs_the_empty_root_only() -> None:
    def run() -> JailPlan:
        _forbid(Rule("pivot_root", "", refuse=errno.EPERM))
        return plan_jail(JailMode.AUTO)

    assert set(as_user("root", run).missing) == {"root"}


@pytest.mark.parametrize("user", USERS)
def test_a_plan_that_the_host_breaks_later_starts_no_device(user: str) -> None:
    def run() -> str:
        plan = plan_jail(JailMode.AUTO)
        _forbid(Rule("unshare", "", refuse=errno.EPERM), Rule("setsid", "", refuse=errno.EPERM))
        try:
            try_jail(plan, Policy())
        except JailError as error:
            return error.layer
        return "it started"

    assert as_user(user, run) == "session"


def test_a_missing_library_is_one_line_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    filter.binding.cache_clear()
    try:
        monkeypatch.delitem(__import__("sys").modules, "pyseccomp", raising=False)
        monkeypatch.setitem(filter._SONAMES, "seccomp", "libseccomp.so.none")
        with pytest.raises(UserError, match="apt-get install libseccomp2") as refused:
            plan_jail(JailMode.AUTO)
        assert "\n" not in str(refused.value)
        assert plan_jail(JailMode.OFF).mode is JailMode.OFF
    finally:
        filter.binding.cache_clear()


# Layers that only pretend.

_SABOTAGE: dict[str, tuple[Any, str]] = {
    "fds": (linux, "close_range"),
    "session": (os, "getsid"),
    "landlock": (linux, "landlock_deny_all"),
    "caps": (linux, "capset"),
    "pdeath": (linux, "prctl"),
    "nnp": (linux, "prctl"),
    "rlimits": (enter.verify.resource, "setrlimit"),
    "root": (linux, "pivot_root"),
    "userns": (linux, "unshare"),
    "mountns": (linux, "unshare"),
    "netns": (linux, "unshare"),
    "ipcns": (linux, "unshare"),
    "utsns": (linux, "unshare"),
    "uid": (os, "setresuid"),
    "seccomp": (linux, "seccomp_load"),
    "pidns": (linux, "fork_with"),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="as an ordinary user some steps are not taken")
@pytest.mark.parametrize("layer", list(_SABOTAGE))
def test_a_step_that_does_nothing_is_noticed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step in turn is replaced by nothing; the checks from inside must see it."""
    plan = plan_jail(JailMode.AUTO)
    if layer in plan.missing:
        pytest.skip(plan.missing[layer])
    needs = {"landlock": ("nnp",), "root": ("mountns",), "seccomp": ("nnp",), "uid": ("userns",)}
    alone = only(plan, layer, *needs.get(layer, ()))
    module, name = _SABOTAGE[layer]
    nothing = (lambda *_: os.fork()) if layer == "pidns" else (lambda *_: None)
    if layer == "session":
        nothing = lambda _: os.getpid()  # noqa: E731 - "it leads a session already"
    if layer == "seccomp":
        nothing = lambda *_: -1  # noqa: E731 - "in force, no listener"
    real = getattr(module, name)
    if name == "prctl":

        def nothing(option: int, *arguments: int) -> int:
            setting = option in (linux.PR_SET_NO_NEW_PRIVS, linux.PR_SET_PDEATHSIG)
            return 0 if setting else real(option, *arguments)

    def run() -> str:
        if layer == "session":
            _own_terminal()
        monkeypatch.setattr(module, name, nothing)
        pid = fork_into_jail(alone)
        found = os.pipe()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        pid = fork_into_jail(alone)
        if pid == 0:
            try:
                keep = (*range(64),) if layer == "" else (found[1],)
                enter_jail(alone, Policy(), keep, lambda _: None)
                os.write(found[1], b"held")
            except JailError as error:
                os.write(found[1], error.layer.encode())
            except BaseException as error:
                os.write(found[1], repr(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return os.read(found[0], 1000).decode()

    assert as_user("root", run) == layer


def _own_terminal() -> None:
    import fcntl
    import pty
    import termios

    os.setsid()
    _, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)


# Life in the jail.


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
    assert not lock.acquire(timeout=0) or lock.release() is None
    a = mmap.mmap(-1, 1 << 16)
    a[:4] = b"page"
    a.close()
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
    result = as_user(user, lambda: _run_in_jail(make_plan(), _everyday_work))
    assert result == "fine: ValueError('an error is formatted')"


@pytest.mark.parametrize("make_plan", [lambda: plan_jail(JailMode.AUTO), floor])
def test_shared_memory_can_be_mapped(make_plan: Callable[[], JailPlan]) -> None:
    """A config mapping arrives by message and is mapped in the jail."""
    memory = os.memfd_create("config")
    os.ftruncate(memory, 4096)

    def work() -> str:
        null_before = os.dup  # the descriptor is kept under a number that is free
        del null_before
        with mmap.mmap(3 if memory == 3 else memory, 4096) as page:
            page[:6] = b"mapped"
        return "done"

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
    assert _run_in_jail(plan_jail(JailMode.AUTO), lambda: os.uname().nodename) == "violation: uname"


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
                lambda fd: there.sendmsg(
                    [b"L"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                ),
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


# Policies and reports.


@pytest.mark.parametrize("model", MODELS)
def test_the_policies_compile(model: str) -> None:
    for plan in (plan_jail(JailMode.AUTO), floor()):
        assert filter.filter_for(policy_for(model), plan.scopes(), notify=True)


def test_a_policy_with_a_wrong_name_is_refused() -> None:
    policy = Policy(extra=(Rule("opennat", "a slip of the pen"),))
    with pytest.raises(UserError, match="opennat"):
        filter.filter_for(policy, frozenset(), notify=True)


def test_an_extra_rule_is_for_that_policy_only() -> None:
    extra = Policy(extra=(Rule("uname", "for this test"),))
    plan = plan_jail(JailMode.AUTO)
    with pytest.raises(JailError, match="got through"):
        try_jail(plan, extra)
    assert try_jail(plan, Policy()).state("seccomp") is LayerState.ENFORCED


def test_every_rule_has_its_reason() -> None:
    for rule in (*proxy.jail.policy.COMMON, *(r for m in MODELS for r in policy_for(m).extra)):
        assert rule.reason


def test_the_report_as_table_and_as_data() -> None:
    full, less = plan_jail(JailMode.AUTO), floor()
    reports = {"echo": try_jail(full, Policy()), "serial": try_jail(less, Policy())}
    data = report_data(reports)
    assert json.loads(json.dumps(data)) == data
    assert data["serial"]["layers"]["root"]["state"] == "missing"
    lines = report_table(reports)
    for layer in layers():
        assert any(re.match(rf"{layer.name}\s+(yes|NO)\s+(yes|NO)\s+\S", line) for line in lines)
    assert "missing root: left out by request (serial)" in lines
    wire = msgspec.json.encode(reports["echo"])
    assert msgspec.json.decode(wire, type=JailReport) == reports["echo"]


def test_one_module_alone_knows_libseccomp() -> None:
    root = Path(proxy.jail.__file__).parents[2]
    users = [
        path.name
        for room in ("devices", "proxy", "vmm")
        for path in root.joinpath(room).rglob("*.py")
        if re.search(r"^\s*(import|from) pyseccomp", path.read_text(), re.MULTILINE)
    ]
    assert users == ["filter.py"]


def test_a_plan_lists_reasons_once() -> None:
    plan = replace(JailPlan(JailMode.AUTO), missing={"netns": "no", "ipcns": "no", "uid": "why"})
    assert "netns, ipcns (no); uid (why)" in plan.one_line()


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
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):
            os.kill(int(said), 0)
            time.sleep(0.02)


def test_signals_of_the_keyboard_do_not_reach_a_device() -> None:
    plan = plan_jail(JailMode.AUTO)

    def run() -> Any:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def work() -> str:
            time.sleep(0.3)
            return "undisturbed"

        signal.signal(signal.SIGINT, signal.default_int_handler)
        group = os.getpgrp()
        threading.Timer(0.15, lambda: None).cancel()
        killer = os.fork()
        if killer == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(0.15)
            os.killpg(group, signal.SIGINT)
            os._exit(0)
        try:
            while True:
                try:
                    return _run_in_jail(plan, work)
                except KeyboardInterrupt:
                    continue
        finally:
            os.waitpid(killer, 0)

    assert as_user("root", run) == "undisturbed"
