"""What this host permits, found by doing it: a process goes into the jail and tries to get out.

The trial is the real path (`fork_into_jail`, `enter_jail`, a forbidden system call) in a process
that is thrown away. If a layer fails, the plan is made without it and tried again, until a trial
succeeds; so the plan that a machine gets is one that has worked once already.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from devices.errors import UserError
from proxy.jail import filter as seccomp
from proxy.jail import linux
from proxy.jail.enter import compile_filters, enter_jail, fork_into_jail
from proxy.jail.layers import BY_NAME, JailReport
from proxy.jail.plan import NAMESPACES, JailError, JailMode, JailPlan
from proxy.jail.policy import OnViolation, Policy

_FORBIDDEN_CALL = "uname"
_TRIAL_SECONDS = 5.0
_MESSAGE_BYTES = 1 << 16


@dataclass
class _Trial:
    """What came of a trial: a report, or the layer that failed ("?" for a bug) and the reason."""

    report: JailReport | None = None
    layer: str = ""
    reason: str = ""


def plan_jail(mode: JailMode, without: Iterable[str] = ()) -> JailPlan:
    """Find out which layers this host permits; starts and ends a few short-lived processes.

    Once for a machine is enough; best before there are threads.

    Args:
        mode: auto, strict or off.
        without: layers to treat as if the host did not have them, for tests and teaching.

    Raises:
        JailUnavailable: strict and a layer is missing, or the floor cannot be had; one line.
        UserError: libseccomp or /proc is not there, or a name in `without` is no layer.
    """
    without = frozenset(without)
    unknown = sorted(without - set(BY_NAME))
    if unknown:
        raise UserError(f"jail: no layer '{unknown[0]}'; there are {', '.join(BY_NAME)}")
    if mode is JailMode.OFF:
        return JailPlan(mode)
    if not os.path.isdir("/proc/self/fd"):
        raise UserError("jail: /proc is not mounted; without it no jail can be checked")
    seccomp.binding()
    missing = {name: "left out by request" for name in BY_NAME if name in without}
    abi = linux.landlock_abi()
    if not abi:
        missing.setdefault("landlock", "not in this kernel, or not switched on")
    if not linux.seccomp_action_available(linux.SECCOMP_RET_USER_NOTIF):
        missing.setdefault("notify", "this kernel has no seccomp user notification")
    host = {}
    for name, kind in NAMESPACES.items():
        try:
            host[name] = os.stat(f"/proc/self/ns/{kind}").st_ino
        except OSError:
            missing.setdefault(name, "not in this kernel")
    plan = JailPlan(mode, _with_dependents(missing), abi, host)
    while True:
        plan.check()
        trial = _try_plan(plan, Policy())
        if trial.report is not None:
            return plan
        if trial.layer in plan.missing or trial.layer not in BY_NAME:
            # It cannot get better: not a property of the host but a bug.
            raise JailError(trial.layer, trial.reason)
        found = {**plan.missing, trial.layer: trial.reason}
        plan = replace(plan, missing=_with_dependents(found))


def try_jail(plan: JailPlan, policy: Policy) -> JailReport:
    """What holds for a device with this policy: a short-lived process enters, reports, ends.

    For `vmm jail`; a device's own report says the same of itself.

    Raises:
        JailError: a layer of the plan failed.
    """
    trial = _try_plan(plan, replace(policy, on_violation=OnViolation.KILL))
    if trial.report is None:
        raise JailError(trial.layer, trial.reason)
    return trial.report


def _with_dependents(missing: dict[str, str]) -> dict[str, str]:
    """Add the layers that cannot be without one that is missing."""
    result = dict(missing)
    if "userns" in result and not linux.has_capability(linux.CAP_SYS_ADMIN):
        for name in NAMESPACES:
            result.setdefault(name, result["userns"])
    if "mountns" in result:
        result.setdefault("root", result["mountns"])
    if "seccomp" in result:
        result.setdefault("notify", result["seccomp"])
    return result


def _try_plan(plan: JailPlan, policy: Policy) -> _Trial:
    """`_try_alone`, from a process with one thread, as `fork_into_jail` wants it."""
    compile_filters(plan)
    if len(os.listdir("/proc/self/task")) == 1:
        return _try_alone(plan, policy)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, msgspec.json.encode(_try_alone(plan, policy)))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return _decode(said)


def _try_alone(plan: JailPlan, policy: Policy) -> _Trial:
    """Enter the jail in a child, and make a forbidden call there."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        try:
            pid = fork_into_jail(plan)
        except OSError as error:
            layer = "userns" if plan.has("userns") else "pidns"
            return _Trial(None, layer, error.strerror or str(error))
        if pid == 0:
            _try_to_leave(plan, policy, there)
        there.close()
        try:
            return _judge(plan, here, pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _try_to_leave(plan: JailPlan, policy: Policy, tube: socket.socket) -> None:
    """In the child; never returns."""

    def send_listener(fd: int) -> None:
        tube.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    try:
        try:
            trial = _Trial(enter_jail(plan, policy, [tube.fileno()], send_listener))
        except JailError as error:
            trial = _Trial(None, error.layer, error.reason)
        tube.send(msgspec.json.encode(trial))
        if plan.has("seccomp"):
            os.uname()
            failure = _Trial(None, "seccomp", f"the call '{_FORBIDDEN_CALL}' got through")
            tube.send(msgspec.json.encode(failure))
    except BaseException as error:
        bug = _Trial(None, "?", f"{type(error).__name__}: {error}")
        tube.send(msgspec.json.encode(bug))
    finally:
        os._exit(0)


def _judge(plan: JailPlan, tube: socket.socket, pid: int) -> _Trial:
    """In the parent: what the child said, and whether the forbidden call was stopped."""
    listener = -1
    trial = _Trial(None, "?", "the trial process ended without a word")
    try:
        while True:
            ready = _wait([tube.fileno()] + ([listener] if listener >= 0 else []))
            if not ready:
                return _Trial(None, "?", "the trial process hangs")
            if tube.fileno() not in ready:
                name = seccomp.receive_violation(listener)
                if name == _FORBIDDEN_CALL:
                    return trial
                if name is None:  # hung up: it is dead, and the tube will say so
                    os.close(listener)
                    listener = -1
                    continue
                return _Trial(None, "notify", f"'{_FORBIDDEN_CALL}' was reported as {name}")
            message, received, _, _ = socket.recv_fds(tube, _MESSAGE_BYTES, 1)
            if received:
                listener = received[0]
            elif message:
                trial = _decode(message)
                if trial.report is None or not plan.has("seccomp"):
                    return trial
            else:
                return _judge_end(plan, pid, trial)
    finally:
        if listener >= 0:
            os.close(listener)


def _judge_end(plan: JailPlan, pid: int, trial: _Trial) -> _Trial:
    """The child is gone: rightly so only if the kernel killed it for the forbidden call."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    status = info.si_status if info else 0
    if trial.report is None:
        return trial
    if plan.has("notify"):
        return _Trial(None, "notify", f"it died (status {status}) and no call was reported")
    if status != signal.SIGSYS:
        return _Trial(None, "seccomp", f"the trial process ended with status {status}")
    return trial


def _decode(message: bytes) -> _Trial:
    try:
        return msgspec.json.decode(message, type=_Trial)
    except msgspec.DecodeError as error:
        return _Trial(None, "?", f"the trial process said nonsense: {error}")


def _wait(fds: list[int]) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(_TRIAL_SECONDS * 1000)}
