"""What each device may ask of the kernel: the common table, and each device's own few lines.

A policy is an allow-list. A system call that is not in it is a violation, and so is one that is
in it when an argument does not fit the conditions given. Add a line to `_OWN` for a model that
needs more; say why.
"""

from __future__ import annotations

import errno
import signal
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

_ALL_BITS: Final = (1 << 64) - 1
_PROT_EXEC: Final = 4  # asm-generic/mman-common.h
_F_DUPFD_CLOEXEC: Final = 1030  # linux/fcntl.h
_F_GETFD: Final = 1
_F_GETFL: Final = 3
_AT_EMPTY_PATH: Final = 0x1000
_PUNCH_HOLE: Final = 0x2 | 0x1  # with KEEP_SIZE, linux/falloc.h
_ZERO_RANGE: Final = 0x10  # without KEEP_SIZE: with it, RLIMIT_FSIZE would not hold
_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h
_S_IFMT: Final = 0o170000
_ANY_SIZE: Final = 1 << 62


@dataclass(frozen=True)
class Arg:
    """A condition on an argument: `argument[index] & mask == value`."""

    index: int
    value: int
    mask: int = _ALL_BITS


class Scope(StrEnum):
    """Where a rule holds. Some calls are harmless only if another layer holds."""

    ALWAYS = "always"
    OWN_PIDS = "own pids"
    EMPTY_ROOT = "empty root"
    HOST_ROOT = "host root"


@dataclass(frozen=True)
class Rule:
    """One line of a policy.

    Attributes:
        syscall: its name; a name that this processor does not have is skipped.
        reason: who needs it.
        args: all of these must hold; several rules for one call are alternatives.
        scope: where this line holds; elsewhere it is left out.
        refuse: not 0: the call fails with this error instead, and that is no violation.
        changes: it changes files; left out for a device whose directory is read-only.
    """

    syscall: str
    reason: str
    args: tuple[Arg, ...] = ()
    scope: Scope = Scope.ALWAYS
    refuse: int = 0
    changes: bool = False


class OnViolation(StrEnum):
    """What a forbidden system call leads to.

    KILL: the call never returns; the supervisor names it and kills the device.
    DENY: it fails with EPERM and the device goes on. Only for demonstrations that try one
    escape after another; a device that is broken into should not get a second try.
    """

    KILL = "kill"
    DENY = "deny"


@dataclass(frozen=True)
class Policy:
    """What a device may do; sizes in bytes.

    Attributes:
        extra: system calls on top of the common table.
        open_files: RLIMIT_NOFILE; raised as needed to admit the kept descriptors.
        processes: RLIMIT_NPROC.
        file_size: RLIMIT_FSIZE; also bounds writes (not mapped stores) to shared memory.
        keeps_size: `file_size` is the size of the largest file that it was given.
        more_memory: RLIMIT_AS, on top of what is mapped on entry; a device that maps guest
            memory afterwards needs its size.
        locked_memory: RLIMIT_MEMLOCK.
        on_violation: kill, or deny for demonstrations.
    """

    extra: tuple[Rule, ...] = ()
    open_files: int = 64
    processes: int = 0
    file_size: int = 0
    keeps_size: bool = False
    more_memory: int = 256 << 20
    locked_memory: int = 0
    on_violation: OnViolation = OnViolation.KILL

    def reading(self) -> Policy:
        """The same without what changes files."""
        return replace(self, extra=tuple(rule for rule in self.extra if not rule.changes))


def _each(reason: str, names: str, scope: Scope = Scope.ALWAYS) -> tuple[Rule, ...]:
    return tuple(Rule(name, reason, scope=scope) for name in names.split())


def _changing(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(replace(rule, changes=True) for rule in rules)


COMMON: Final[tuple[Rule, ...]] = (
    *_each("the tube and the descriptors it was given", "recvfrom recvmsg sendto sendmsg"),
    *_each("doorbells, files it was given", "read write readv writev pread64 pwrite64 lseek"),
    *_each("waiting for a command", "poll ppoll"),
    *_each("letting go of a descriptor", "close"),
    *_each("what kind of descriptor this is", "fstat"),
    Rule(
        "newfstatat",
        "the C library's fstat; given a path it would tell of files, but here there are none",
        (Arg(3, _AT_EMPTY_PATH),),
        Scope.EMPTY_ROOT,
    ),
    Rule(
        "newfstatat",
        "the same where there are files: mmap objects ask, and do without an answer",
        (Arg(3, _AT_EMPTY_PATH),),
        Scope.HOST_ROOT,
        refuse=errno.EACCES,
    ),
    *(
        Rule("fcntl", "mmap objects duplicate their descriptor", (Arg(1, command),))
        for command in (_F_DUPFD_CLOEXEC, _F_GETFD, _F_GETFL)
    ),
    Rule("mmap", "memory, never executable", (Arg(2, 0, _PROT_EXEC),)),
    Rule("mprotect", "heap growth, never executable", (Arg(2, 0, _PROT_EXEC),)),
    *_each("memory of the allocator", "brk munmap mremap madvise"),
    *_each("locks of the interpreter", "futex"),
    *_each("the clock where the vDSO has none", "clock_gettime gettimeofday clock_getres time"),
    *_each("sleeping, polling shared memory", "clock_nanosleep nanosleep sched_yield"),
    *_each("signal return and masks", "rt_sigreturn rt_sigprocmask rt_sigaction"),
    *_each("a call that a stop and continue cut short", "restart_syscall"),
    *_each("hash seeds", "getrandom"),
    *_each("it tells only what it was told", "getpid gettid"),
    Rule(
        "tgkill",
        "abort(): only itself is in its process namespace",
        (Arg(0, 1), Arg(2, signal.SIGABRT)),
        Scope.OWN_PIDS,
    ),
    *_each("the end", "exit exit_group"),
)
"""What the child loop of every device needs: CPython, the C library, the tube."""

_VECTORS: Final = (
    *_each("several pieces of guest memory at one place of a file", "preadv pwritev"),
    *(
        Rule(name, "what the interpreter calls for the same, without flags", (Arg(5, 0),))
        for name in ("preadv2", "pwritev2")
    ),
)

DISK: Final = Policy(
    extra=(
        *_VECTORS,
        *_each("a flush that the guest asked for", "fdatasync"),
        Rule("fallocate", "discard: a hole, its file stays as long", (Arg(1, _PUNCH_HOLE),)),
        Rule("fallocate", "write zeroes, within a file's limit", (Arg(1, _ZERO_RANGE),)),
    ),
    keeps_size=True,
)
"""Of a model whose requests are reads and writes of files that the machine opened, which it cannot
make longer."""

DIRECTORY: Final = Policy(
    extra=(
        *_VECTORS,
        *_each("opening what lies beneath its directory", "openat2"),
        Rule("statx", "what a descriptor is of", (Arg(2, _AT_EMPTY_PATH),), Scope.HOST_ROOT),
        *_each("the same, and what its root is", "statx", Scope.EMPTY_ROOT),
        *_each("listing a directory, asking for free space", "getdents64 fstatfs"),
        *_each("reading a link", "readlinkat"),
        *_each("which of the files are its own", "geteuid getegid"),
        *_each("what was written is to be on the disk", "fsync fdatasync dup"),
        *_changing(
            (
                *_each("making files, and their names", "mkdirat symlinkat linkat"),
                *(
                    Rule("mknodat", "a file, FIFO or socket", (Arg(2, kind, _S_IFMT),))
                    for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
                ),
                *_each("removing and moving them", "unlinkat renameat"),
                Rule("renameat2", "the same where it is the only one", (Arg(4, 0),)),
                *_each("size, mode and times of an open file", "ftruncate fchmod"),
                Rule("utimensat", "times of an open file", (Arg(1, 0),), Scope.HOST_ROOT),
                *_each("of what cannot be opened", "utimensat fchmodat", Scope.EMPTY_ROOT),
            )
        ),
    ),
    open_files=4096 + 64,
    file_size=_ANY_SIZE,
)
"""Of a model that shares a directory; what is named by a path is held in it by other layers."""

_OWN: Final[dict[str, Policy]] = {
    "9p": DIRECTORY,
    "ata": DISK,
    "blk": DISK,
    "console": Policy(
        extra=(
            *_each("its log, a file that the machine opened", "pwritev"),
            Rule("pwritev2", "what the interpreter calls for the same", (Arg(5, 0),)),
        ),
        file_size=_ANY_SIZE,
    ),
    "net": Policy(
        extra=(Rule("ioctl", "tells its tap what the driver takes", (Arg(1, _TUNSETOFFLOAD),)),),
    ),
    "vsock": Policy(
        extra=_each("the end of a connection, or of one direction", "shutdown"),
        open_files=1024,
    ),
    "serial": Policy(),
    "echo": Policy(),
    "config-space": Policy(),
    "debug-exit": Policy(),
}
"""Each model's own lines; an empty policy needs nothing that the common table does not have."""


def policy_for(model: str) -> Policy:
    """The policy of a device model; one that the table does not know gets the common rules."""
    return _OWN.get(model, Policy())
