"""Policies compiled to seccomp filters, and forbidden system calls by name.

The only module that knows libseccomp (through its binding pyseccomp). libseccomp compiles; the
kernel is handed the program by `linux.seccomp_load`, so that a device's process, forked from one
that has compiled the filter already, spends nothing on it and gets its own listener.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from types import ModuleType
from typing import Final

from devices.errors import UserError
from proxy.jail import linux
from proxy.jail.policy import COMMON, OnViolation, Policy, Rule, Scope

CANARY_CALL: Final = "getpriority"
CANARY_ARGUMENT: Final = 0x6A61
CANARY_ERRNO: Final = errno.EXFULL
"""`getpriority(CANARY_ARGUMENT, ...)` fails with this under a filter, with EINVAL without one."""

_SONAMES: Final = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}
_LIBRARY_MEND: Final = (
    "install libseccomp 2.5 or later (Debian, Ubuntu: apt-get install libseccomp2; "
    "Fedora: dnf install libseccomp) or use --jail=off for debugging"
)


@functools.cache
def binding() -> ModuleType:
    """The libseccomp binding, imported when it is first needed.

    Raises:
        UserError: the binding or the C library is not installed; the line says how to mend it.
    """
    # The binding asks ctypes.util where two libraries are, which runs a compiler and ldconfig and
    # imports what it needs for that: 60 ms for two names that never change on Linux.
    finder = ModuleType("ctypes.util")
    vars(finder)["find_library"] = _SONAMES.get
    before = sys.modules.get("ctypes.util")
    sys.modules["ctypes.util"] = ctypes.util = finder
    try:
        import pyseccomp
    except ModuleNotFoundError as error:
        raise UserError(f"jail: {error}; pip install pyseccomp") from error
    except (OSError, RuntimeError, AttributeError) as error:
        raise UserError(f"jail: libseccomp cannot be loaded ({error}); {_LIBRARY_MEND}") from error
    finally:
        if before is None:
            del sys.modules["ctypes.util"], ctypes.util
        else:
            sys.modules["ctypes.util"] = ctypes.util = before
    module: ModuleType = pyseccomp
    return module


@functools.cache
def compile_filter(
    extra: tuple[Rule, ...],
    on_violation: OnViolation,
    scopes: frozenset[Scope],
    notify: bool,
) -> bytes:
    """The kernel's program for the common table and these extra rules.

    Args:
        extra: a policy's own rules.
        on_violation: what a call outside the rules leads to.
        scopes: the scopes that hold in this jail.
        notify: violations go to the listener; otherwise the kernel kills the process.

    Calls of another processor mode (i386, x32) always kill: they have no place in any policy.

    Raises:
        UserError: libseccomp is not installed, or refuses a rule.
    """
    seccomp = binding()
    if on_violation is OnViolation.DENY:
        default = seccomp.ERRNO(errno.EPERM)
    else:
        default = seccomp.NOTIFY if notify else seccomp.KILL_PROCESS
    rules = seccomp.SyscallFilter(default)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    for rule in (*COMMON, *extra):
        if rule.scope is not Scope.ALWAYS and rule.scope not in scopes:
            continue
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, rule.syscall)
        if number == -1:
            raise UserError(f"jail: a policy names '{rule.syscall}', which is no system call")
        if number < 0:  # not on this processor
            continue
        conditions = (
            seccomp.Arg(arg.index, seccomp.MASKED_EQ, arg.mask, arg.value) for arg in rule.args
        )
        action = seccomp.ERRNO(rule.refuse) if rule.refuse else seccomp.ALLOW
        rules.add_rule(action, number, *conditions)
    rules.add_rule(
        seccomp.ERRNO(CANARY_ERRNO),
        CANARY_CALL,
        seccomp.Arg(0, seccomp.EQ, CANARY_ARGUMENT),
    )
    with open(os.memfd_create("seccomp"), "w+b", buffering=0) as file:
        rules.export_bpf(file)
        return os.pread(file.fileno(), 1 << 16, 0)


def filter_for(policy: Policy, scopes: frozenset[Scope], notify: bool) -> bytes:
    """`compile_filter` for a policy. Raises UserError."""
    return compile_filter(policy.extra, policy.on_violation, scopes, notify)


def syscall_name(arch: int, number: int) -> str:
    """The name of a system call of an architecture (AUDIT_ARCH_*)."""
    try:
        return str(binding().resolve_syscall(arch, number).decode())
    except ValueError:
        return f"number {number}"


def receive_violation(listener_fd: int) -> str | None:
    """Called by the supervisor when a listener is readable: the forbidden system call's name.

    The caller stays in that call until it is killed, which is what the supervisor does next.
    None: there is none, because the process died; a listener of a dead process polls as hung up,
    perhaps before its tube or pidfd does. Close it then.
    """
    try:
        _, arch, number = linux.seccomp_receive(listener_fd)
    except OSError:
        return None
    return syscall_name(arch, number)
