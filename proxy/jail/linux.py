"""The Linux system calls that the jail needs and Python does not have, by their header names.

One thin function for each; every one raises OSError as the calls in `os` do. Numbers of raw
system calls are given for the two processors that are supported; the ones from 424 up are the
same on both (kernel: include/uapi/asm-generic/unistd.h, arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import signal
import struct
import termios
from collections.abc import Iterable
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
# Forking must not let go of the interpreter lock half-way, just as os.fork does not.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)

IS_X86_64: Final = platform.machine() == "x86_64"
_SECCOMP: Final = 317 if IS_X86_64 else 277
_CLONE: Final = 56 if IS_X86_64 else 220
_PIVOT_ROOT: Final = 155 if IS_X86_64 else 41
_CAPGET: Final = 125 if IS_X86_64 else 90
_CAPSET: Final = 126 if IS_X86_64 else 91
_CLOSE_RANGE: Final = 436
_MOUNT_SETATTR: Final = 442
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446

# linux/sched.h
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000
_CLONE_CHILD_CLEARTID: Final = 0x0020_0000
_CLONE_CHILD_SETTID: Final = 0x0100_0000

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_GET_TID_ADDRESS: Final = 40
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# linux/securebits.h: NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock
SECBIT_NO_SETUID_FIXUP: Final = 1 << 2
SECBITS_NO_WAY_UP: Final = 0b1100_1111

# linux/capability.h
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SETPCAP: Final = 8
CAP_SYS_ADMIN: Final = 21
_CAPABILITY_VERSION_3: Final = 0x2008_0522

# linux/mount.h
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
MOUNT_ATTR_NOEXEC: Final = 8
_AT_RECURSIVE: Final = 0x8000  # linux/fcntl.h

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_GET_ACTION_AVAIL: Final = 2
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_RET_KILL_PROCESS: Final = 0x8000_0000
SECCOMP_RET_USER_NOTIF: Final = 0x7FC0_0000
_SECCOMP_IOCTL_NOTIF_RECV: Final = 0xC050_2100
_SIZEOF_SECCOMP_NOTIF: Final = 80

# linux/landlock.h: all rights of each version of the interface
LANDLOCK_ACCESS_FS: Final = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
LANDLOCK_READ: Final = 0b1100
"""Of them: read files, list directories."""
LANDLOCK_WRITE: Final = 0b0111_0111_1011_0010
"""Of them: write and truncate files, make and remove all but device nodes, move between
directories. Not among either: run programs, ioctl on device nodes."""
LANDLOCK_ACCESS_NET: Final = 0b11
LANDLOCK_SCOPES: Final = 0b11
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    """A raw system call; integers go as C longs. Raises OSError that begins with `what`."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def prctl(option: int, *arguments: int) -> int:
    """prctl(2); unused arguments are zero, as newer options insist."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    longs = (ctypes.c_ulong(a) for a in padded)
    return _check(_libc.prctl(ctypes.c_int(option), *longs), f"prctl({option})")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            data.encode() if data else None,
        ),
        f"mount {kind or 'flags'} on {target}",
    )


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target.encode(), ctypes.c_int(flags)), f"umount {target}")


def mount_setattr(target: str, attributes: int) -> None:
    """mount_setattr(2), kernel 5.12 and up: add attributes to a mount and all beneath it."""
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    path, size = target.encode(), len(wanted)
    syscall("mount_setattr", _MOUNT_SETATTR, -100, path, _AT_RECURSIVE, wanted, size)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    syscall("pivot_root", _PIVOT_ROOT, new_root.encode(), put_old.encode())


def mprotect(address: int, length: int, protection: int) -> None:
    """mprotect(2)."""
    _check(
        _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(protection)),
        "mprotect",
    )


def close_range(first: int, last: int) -> None:
    """close_range(2), kernel 5.9 and up; OSError ENOSYS before."""
    syscall("close_range", _CLOSE_RANGE, first, last, 0)


def fork_with(flags: int) -> int:
    """os.fork() with CLONE_NEW* flags: the child is the first process of the new namespaces.

    It does what os.fork does around the system call, and has the kernel write the child's thread
    id where the C library keeps it, so that the child is as sound as one of os.fork. Only for
    processes with one thread. Raises OSError.
    """
    tid_address = ctypes.c_void_p()
    if _libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(tid_address), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    none = ctypes.c_void_p(None)
    # The last two arguments, child_tid and tls, stand in another order on each processor.
    tail = (tid_address, none) if IS_X86_64 else (none, tid_address)
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = int(
        _libc_with_gil.syscall(
            ctypes.c_long(_CLONE), ctypes.c_ulong(flags | signal.SIGCHLD), none, none, *tail
        )
    )
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def capget() -> tuple[int, int, int]:
    """The (effective, permitted, inheritable) capability sets of this process, as bit masks."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    syscall("capget", _CAPGET, header, data)
    low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("=6I", data.raw)
    return low_e | high_e << 32, low_p | high_p << 32, low_i | high_i << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the capability sets of this process."""
    sets = (effective, permitted, inheritable)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    words = [s & 0xFFFF_FFFF for s in sets] + [s >> 32 for s in sets]
    syscall("capset", _CAPSET, header, struct.pack("=6I", *words))


def has_capability(capability: int) -> bool:
    """Is this capability (CAP_*) effective in this process?"""
    return bool(capget()[0] >> capability & 1)


def bounding_set() -> Iterable[int]:
    """The capabilities in the bounding set, lowest first."""
    for capability in range(64):
        held = _libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0)
        if held < 0:  # past the last capability that this kernel knows
            return
        if held:
            yield capability


def seccomp_action_available(action: int) -> bool:
    """Does this kernel know a SECCOMP_RET_* action?"""
    word = struct.pack("=I", action)
    try:
        syscall("seccomp", _SECCOMP, SECCOMP_GET_ACTION_AVAIL, 0, word)
    except OSError:
        return False
    return True


def seccomp_load(program: bytes, listener: bool) -> int:
    """Put a compiled filter in force; the listener's descriptor, or -1 if none was asked for."""
    fprog = _SockFprog(len(program) // 8, program)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else 0
    fd = syscall("seccomp", _SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog))
    return fd if listener else -1


def seccomp_receive(listener: int) -> tuple[int, int, int]:
    """Take the next notification of a listener: (process id, AUDIT_ARCH_*, system call number).

    Raises OSError; ENOENT if the process died before it was taken.
    """
    notif = ctypes.create_string_buffer(_SIZEOF_SECCOMP_NOTIF)
    _check(
        _libc.ioctl(ctypes.c_int(listener), ctypes.c_ulong(_SECCOMP_IOCTL_NOTIF_RECV), notif),
        "seccomp notification",
    )
    _, pid, _, number, arch = struct.unpack_from("=QIIiI", notif.raw)
    return pid, arch, number


def landlock_abi() -> int:
    """The version of Landlock that this kernel offers; 0 if none."""
    try:
        return syscall(
            "landlock", _LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def landlock_deny_all(abi: int, but: tuple[int, int] | None = None) -> None:
    """Forbid this process all that version `abi` of Landlock can forbid; needs no_new_privs.

    Args:
        but: (descriptor of a directory, rights): what stays permitted beneath it.
    """
    fs = LANDLOCK_ACCESS_FS[min(abi, max(LANDLOCK_ACCESS_FS))]
    net = LANDLOCK_ACCESS_NET if abi >= 4 else 0
    scoped = LANDLOCK_SCOPES if abi >= 6 else 0
    attributes = struct.pack("=QQQ", fs, net, scoped)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall("landlock", _LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        if but is not None:
            rule = struct.pack("=Qi", but[1] & fs, but[0])
            syscall("landlock", _LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        syscall("landlock", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def leave_terminal() -> None:
    """Have no controlling terminal and a process group of one's own, in the same session.

    Not by `setsid`: Linux schedules each session as a group of its own (sched(7), autogroup). A
    device in another group than the machine is woken later, and `sched_yield` does not give way
    to it.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        if error.errno != errno.ENXIO:  # there may be one that this process cannot name
            os.setsid()
            return
    else:
        try:
            fcntl.ioctl(terminal, termios.TIOCNOTTY)
        finally:
            os.close(terminal)
    os.setpgid(0, 0)
