"""Every way out is tried: with no jail it works, in each jail it fails and is named."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable

import pytest
from jail_tools import USERS, as_user, floor, only

from proxy.jail import JailMode, JailPlan, OnViolation, Policy, plan_jail
from proxy.jail.escape import ATTEMPTS, BY_NAME, Attempt, Outcome, Targets, bait, try_to_escape

# What an ordinary user, or this host, may well refuse without any jail.
_MAY_FAIL_ANYWAY = {
    "become-root",
    "capability",
    "mount",
    "bpf",
    "perf",
    "userfaultfd",
    "io_uring",
    "keyring",
    "userns",
    "steal-fd",
    "ptrace",
    "read-memory",
}


def _full() -> JailPlan:
    return plan_jail(JailMode.AUTO)


def _attempt(
    user: str, attempt: Attempt, make_plan: Callable[[], JailPlan], policy: Policy | None = None
) -> Outcome:
    def run() -> Outcome:
        with bait() as targets:
            return try_to_escape(attempt, targets, make_plan(), policy)

    return as_user(user, run)


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("user", USERS)
def test_without_a_jail_it_gets_out(user: str, name: str) -> None:
    outcome = _attempt(user, BY_NAME[name], lambda: only(_full()))
    if not outcome.escaped and name in _MAY_FAIL_ANYWAY:
        pytest.skip(f"this host refuses it anyway: {outcome.detail}")
    assert outcome.escaped, outcome


@pytest.mark.parametrize("make_plan", [_full, floor])
@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("user", USERS)
def test_in_the_jail_it_is_caught_and_named(
    user: str, name: str, make_plan: Callable[[], JailPlan]
) -> None:
    attempt = BY_NAME[name]
    outcome = _attempt(user, attempt, make_plan)
    assert not outcome.escaped, outcome
    if attempt.calls:
        assert outcome.violation in attempt.calls, outcome
    else:
        assert not outcome.violation


@pytest.mark.parametrize("make_plan", [_full, floor])
@pytest.mark.parametrize("user", USERS)
def test_a_policy_that_denies_lets_it_try_on_and_fail(
    user: str, make_plan: Callable[[], JailPlan]
) -> None:
    def run() -> list[Outcome]:
        policy = Policy(on_violation=OnViolation.DENY)
        plan = make_plan()
        with bait() as targets:
            return [try_to_escape(each, targets, plan, policy) for each in ATTEMPTS]

    for outcome in as_user(user, run):
        assert not outcome.escaped, outcome
        assert not outcome.violation
        assert "killed" not in outcome.detail


def test_without_a_listener_the_kernel_kills() -> None:
    plan = plan_jail(JailMode.AUTO, without={"notify"})
    with bait() as targets:
        outcome = try_to_escape(BY_NAME["read-file"], targets, plan)
    assert outcome == Outcome("read-file", False, "killed by SIGSYS")


def _machine_code(code: bytes) -> Attempt:
    """Code that is mapped before the jail, as if the attacker could make its own."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def run(_: Targets) -> str:
        result = call()
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return f"{page and result}"

    return Attempt("machine-code", "another mode's system call", run)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 machine code")
@pytest.mark.parametrize("make_plan", [_full, floor])
def test_i386_calls_do_not_pass(make_plan: Callable[[], JailPlan]) -> None:
    getpid = _machine_code(bytes.fromhex("b814000000 cd80 4898 c3"))  # 20 is getpid in i386
    with bait() as targets:
        before = try_to_escape(getpid, targets, only(_full()))
        if not before.escaped:
            pytest.skip(f"this kernel has no i386 calls: {before.detail}")
        outcome = try_to_escape(getpid, targets, make_plan())
    assert (outcome.escaped, outcome.detail) == (False, "killed by SIGSYS")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 machine code")
@pytest.mark.parametrize("make_plan", [_full, floor])
def test_x32_calls_do_not_pass(make_plan: Callable[[], JailPlan]) -> None:
    getpid = _machine_code(bytes.fromhex("b827000040 0f05 c3"))
    with bait() as targets:
        before = try_to_escape(getpid, targets, only(_full()))
        assert "SIGSYS" not in before.detail
        outcome = try_to_escape(getpid, targets, make_plan())
    assert (outcome.escaped, outcome.detail) == (False, "killed by SIGSYS")
