"""Hosts that permit less, and layers that only pretend to hold."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import sys
import termios
from typing import Any

import pytest
from jail_tools import NAMESPACE_LAYERS, USERS, as_user, forbid, only, refusal

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
    linux,
    plan_jail,
    try_jail,
)
from proxy.jail.policy import Arg

_NO_NAMESPACES = (
    Rule("unshare", "", refuse=errno.EPERM),
    *(
        Rule("clone", "", (filter_arg,), refuse=errno.EPERM)
        for filter_arg in (
            Arg(0, flag, flag)
            for flag in (linux.CLONE_NEWUSER, linux.CLONE_NEWPID, linux.CLONE_NEWNS)
        )
    ),
)


# Hosts that are less than this one.


@pytest.mark.parametrize("user", USERS)
def test_a_container_without_namespaces_gets_the_floor(user: str) -> None:
    def run() -> tuple[JailPlan, JailReport]:
        forbid(*_NO_NAMESPACES)
        plan = plan_jail(JailMode.AUTO)
        return plan, try_jail(plan, Policy())

    plan, report = as_user(user, run)
    assert set(plan.missing) == {*NAMESPACE_LAYERS, "root"}
    assert "Operation not permitted" in plan.one_line()
    assert report.state("landlock") is LayerState.ENFORCED
    assert report.state("root") is LayerState.MISSING


def test_a_container_without_namespaces_and_landlock_is_refused() -> None:
    def run() -> None:
        forbid(*_NO_NAMESPACES, Rule("landlock_create_ruleset", "", refuse=errno.ENOSYS))
        refusal(JailMode.AUTO)

    with pytest.raises(JailUnavailable, match="landlock"):
        as_user("root", run)


def test_a_container_that_forbids_listeners_loses_only_the_names() -> None:
    new_listener = Arg(1, 8, 8)

    def run() -> JailPlan:
        forbid(Rule("seccomp", "", (new_listener,), refuse=errno.EBUSY))
        return plan_jail(JailMode.AUTO)

    plan = as_user("root", run)
    assert set(plan.missing) == {"notify"}
    assert "busy" in plan.one_line()


def test_a_container_without_seccomp_is_refused() -> None:
    def run() -> None:
        set_mode_filter = Arg(0, 1)
        forbid(Rule("seccomp", "", (set_mode_filter,), refuse=errno.EINVAL))
        refusal(JailMode.AUTO)

    with pytest.raises(JailUnavailable, match="seccomp"):
        as_user("root", run)


def test_one_namespace_that_is_missing_is_named_alone() -> None:
    new_net = Arg(0, linux.CLONE_NEWNET, linux.CLONE_NEWNET)

    def run() -> JailPlan:
        forbid(Rule("unshare", "", (new_net,), refuse=errno.EINVAL))
        return plan_jail(JailMode.AUTO)

    assert set(as_user("root", run).missing) == {"netns"}


def test_a_mount_that_is_refused_costs_the_empty_root_only() -> None:
    def run() -> JailPlan:
        forbid(Rule("pivot_root", "", refuse=errno.EPERM))
        return plan_jail(JailMode.AUTO)

    assert set(as_user("root", run).missing) == {"root"}


@pytest.mark.parametrize("user", USERS)
def test_a_plan_that_the_host_breaks_later_starts_no_device(user: str) -> None:
    def run() -> str:
        plan = plan_jail(JailMode.AUTO)
        forbid(Rule("unshare", "", refuse=errno.EPERM), Rule("setpgid", "", refuse=errno.EPERM))
        try:
            try_jail(plan, Policy())
        except JailError as error:
            return error.layer
        return "it started"

    assert as_user(user, run) == "session"


def test_a_missing_library_is_one_line_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    filter.binding.cache_clear()
    try:
        monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
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
    "session": (linux, "leave_terminal"),
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
        found = os.pipe()
        pid = fork_into_jail(alone)
        if pid == 0:
            try:
                enter_jail(alone, Policy(), (found[1],), lambda _: None)
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
    os.setsid()
    _, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)
