"""Ways out of the jail, each tried for real: for tests, and for demonstrations to newcomers.

An attempt does what a device would do that was taken over by its guest. It says what it got, or
raises the OSError it met; a forbidden system call ends its process instead. Without a jail most
succeed, and none does lasting harm. `try_to_escape` runs one in a process of its own; a hostile
device model may call `Attempt.run` itself.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from proxy.jail import linux
from proxy.jail.enter import enter_jail, fork_into_jail
from proxy.jail.filter import receive_violation
from proxy.jail.plan import JailError, JailPlan
from proxy.jail.policy import Policy

_SECONDS: Final = 10.0
_EXECUTED: Final = 42
_PTRACE_SEIZE: Final = 0x4206
_BPF: Final = 321 if linux.IS_X86_64 else 280
_PERF_EVENT_OPEN: Final = 298 if linux.IS_X86_64 else 241
_USERFAULTFD: Final = 323 if linux.IS_X86_64 else 282
_PROCESS_VM_READV: Final = 310 if linux.IS_X86_64 else 270
_PTRACE: Final = 101 if linux.IS_X86_64 else 117
_KEYCTL: Final = 250 if linux.IS_X86_64 else 219
_IO_URING_SETUP: Final = 425
_PIDFD_GETFD: Final = 438
_MAP_NORESERVE: Final = 0x4000  # asm-generic/mman-common.h
_BIG: Final = 8 << 30


@dataclass(frozen=True)
class Targets:
    """What there is to be had: made by the machine's side, known to the attacker.

    Attributes:
        pid: the machine's process.
        address, length: where a secret lies in its memory.
        fd: a descriptor that the machine has open and did not give to the device.
        port: a TCP port on this host's loopback interface that listens.
    """

    pid: int
    address: int
    length: int
    fd: int
    port: int


@contextlib.contextmanager
def bait() -> Iterator[Targets]:
    """Have all that there is to be had in this process, for as long as the context lasts."""
    secret = ctypes.create_string_buffer(b"a secret")
    with socket.create_server(("127.0.0.1", 0)) as server, open("/etc/passwd", "rb") as file:
        port = server.getsockname()[1]
        yield Targets(os.getpid(), ctypes.addressof(secret), 8, file.fileno(), port)


@dataclass(frozen=True)
class Attempt:
    """One way out.

    Attributes:
        name: a short word.
        aim: what it tries, one line.
        run: does it; what it got as one line, or OSError.
        calls: the system calls that a policy stops it at, in any of which it may be caught;
            empty if it needs none that is forbidden and other layers must hold.
    """

    name: str
    aim: str
    run: Callable[[Targets], str]
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How an attempt went.

    Attributes:
        name: the attempt's.
        escaped: it got what it wanted.
        detail: what it got, or what stopped it.
        violation: the name of the forbidden system call that it was caught in, or "".
    """

    name: str
    escaped: bool
    detail: str
    violation: str = ""


def _read_file(_: Targets) -> str:
    fd = os.open("/etc/passwd", os.O_RDONLY)
    return f"read {os.read(fd, 16)!r}"


def _stat_file(_: Targets) -> str:
    return f"/etc/passwd has {os.stat('/etc/passwd').st_size} bytes"


def _list_root(_: Targets) -> str:
    names = os.listdir("/")
    if not names:
        raise FileNotFoundError(2, "the root directory is empty")
    return f"saw {', '.join(sorted(names)[:3])}, ..."


def _open_device(_: Targets) -> str:
    os.close(os.open("/dev/zero", os.O_RDWR))
    return "opened /dev/zero"


def _connect(targets: Targets) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.settimeout(2)
        tcp.connect(("127.0.0.1", targets.port))
    return "connected to a server on this host"


def _signal_machine(targets: Targets) -> str:
    os.kill(targets.pid, 0)
    return "may kill the machine"


def _ptrace_machine(targets: Targets) -> str:
    linux.syscall("ptrace", _PTRACE, _PTRACE_SEIZE, targets.pid, 0, 0)
    return "attached to the machine as a debugger"


def _read_memory(targets: Targets) -> str:
    stolen = ctypes.create_string_buffer(targets.length)
    local = struct.pack("=QQ", ctypes.addressof(stolen), targets.length)
    remote = struct.pack("=QQ", targets.address, targets.length)
    linux.syscall("process_vm_readv", _PROCESS_VM_READV, targets.pid, local, 1, remote, 1, 0)
    return f"read {stolen.raw!r} in the machine's memory"


def _steal_descriptor(targets: Targets) -> str:
    pidfd = os.pidfd_open(targets.pid)
    fd = linux.syscall("pidfd_getfd", _PIDFD_GETFD, pidfd, targets.fd, 0)
    return f"took descriptor {targets.fd} of the machine as {fd}"


def _use_descriptor(targets: Targets) -> str:
    return f"read {os.read(targets.fd, 16)!r} from a descriptor that was left open"


def _fork(_: Targets) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "made another process"


def _execute(_: Targets) -> str:
    os.execv("/bin/sh", ["sh", "-c", f"exit {_EXECUTED}"])


def _mount(_: Targets) -> str:
    linux.mount("escape", "/mnt", "tmpfs", linux.MS_NODEV, None)
    linux.umount2("/mnt", linux.MNT_DETACH)
    return "mounted a filesystem"


def _new_userns(_: Targets) -> str:
    linux.unshare(linux.CLONE_NEWUSER)
    return "has all capabilities in a new user namespace"


def _become_root(_: Targets) -> str:
    os.setresuid(0, 0, 0)
    return "is root"


def _gain_capability(_: Targets) -> str:
    linux.capset(1 << linux.CAP_SYS_ADMIN, 1 << linux.CAP_SYS_ADMIN, 0)
    return "has CAP_SYS_ADMIN"


def _raise_limit(_: Targets) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
    return "raised its own limits"


def _take_memory(_: Targets) -> str:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    mmap.mmap(-1, _BIG, flags=flags).close()
    return f"took {_BIG >> 30} GiB"


def _map_code(_: Targets) -> str:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    return "may run machine code of its own"


def _unprotect_code(_: Targets) -> str:
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    linux.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_EXEC)
    return "may run machine code of its own"


def _bpf(_: Targets) -> str:
    # BPF_MAP_CREATE: an array of one 4-byte value
    attributes = struct.pack("=IIII", 2, 4, 4, 1).ljust(72, b"\0")
    os.close(linux.syscall("bpf", _BPF, 0, attributes, len(attributes)))
    return "made a BPF map in the kernel"


def _perf(_: Targets) -> str:
    # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, user mode only (exclude_kernel, exclude_hv)
    attributes = struct.pack("=IIQQQQQ", 1, 112, 0, 0, 0, 0, 0b110_0000).ljust(112, b"\0")
    os.close(linux.syscall("perf_event_open", _PERF_EVENT_OPEN, attributes, 0, -1, -1, 0))
    return "may measure this processor"


def _userfaultfd(_: Targets) -> str:
    os.close(linux.syscall("userfaultfd", _USERFAULTFD, 1))  # UFFD_USER_MODE_ONLY
    return "may hold up page faults"


def _io_uring(_: Targets) -> str:
    os.close(linux.syscall("io_uring_setup", _IO_URING_SETUP, 1, bytes(120)))
    return "has a queue into the kernel that seccomp does not see"


def _keyring(_: Targets) -> str:
    # KEYCTL_GET_KEYRING_ID of the user's keyring
    serial = linux.syscall("keyctl", _KEYCTL, 0, -4, 1)
    return f"found keyring {serial}"


ATTEMPTS: Final[tuple[Attempt, ...]] = (
    Attempt("read-file", "read /etc/passwd", _read_file, ("openat",)),
    Attempt("stat-file", "look whether /etc/passwd is there", _stat_file, ("stat", "newfstatat")),
    Attempt("list-root", "list the root directory", _list_root, ("openat",)),
    Attempt("open-device", "open a device node", _open_device, ("openat",)),
    Attempt("use-fd", "use a descriptor that it was not given", _use_descriptor),
    Attempt("steal-fd", "take a descriptor of the machine", _steal_descriptor, ("pidfd_open",)),
    Attempt("connect", "connect to a server of this host", _connect, ("socket",)),
    Attempt("signal", "signal the machine", _signal_machine, ("kill",)),
    Attempt("ptrace", "debug the machine", _ptrace_machine, ("ptrace",)),
    Attempt("read-memory", "read the machine's memory", _read_memory, ("process_vm_readv",)),
    Attempt("fork", "make another process", _fork, ("clone", "clone3", "fork")),
    Attempt("exec", "run a program", _execute, ("execve",)),
    Attempt("map-code", "map memory that can be executed", _map_code, ("mmap",)),
    Attempt("unprotect-code", "make memory executable", _unprotect_code, ("mprotect",)),
    Attempt("take-memory", f"take {_BIG >> 30} GiB of memory", _take_memory),
    Attempt("raise-limit", "raise its own limits", _raise_limit, ("prlimit64", "setrlimit")),
    Attempt("become-root", "become root", _become_root, ("setresuid",)),
    Attempt("capability", "get a capability", _gain_capability, ("capset",)),
    Attempt("userns", "become root in a user namespace", _new_userns, ("unshare",)),
    Attempt("mount", "mount a filesystem", _mount, ("mount",)),
    Attempt("bpf", "load something into the kernel", _bpf, ("bpf",)),
    Attempt("perf", "spy with performance counters", _perf, ("perf_event_open",)),
    Attempt("userfaultfd", "hold up page faults", _userfaultfd, ("userfaultfd",)),
    Attempt("io_uring", "get round seccomp by io_uring", _io_uring, ("io_uring_setup",)),
    Attempt("keyring", "find the user's keys", _keyring, ("keyctl",)),
)
"""All attempts, in an order that makes a story."""

BY_NAME: Final = {attempt.name: attempt for attempt in ATTEMPTS}
"""The attempts by name."""


def try_to_escape(
    attempt: Attempt,
    targets: Targets,
    plan: JailPlan,
    policy: Policy | None = None,
) -> Outcome:
    """Run one attempt in a process of its own, in the jail of `plan` (which may be off).

    With a policy that kills, a forbidden call is named by `Outcome.violation`; with one that
    denies, the attempt goes on and meets EPERM.

    Raises:
        JailError: the process could not enter the jail.
    """
    policy = Policy() if policy is None else policy
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        pid = fork_into_jail(plan)
        if pid == 0:
            _run_attempt(attempt, targets, plan, policy, there)
        there.close()
        try:
            return _supervise(attempt, here, pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run_attempt(
    attempt: Attempt,
    targets: Targets,
    plan: JailPlan,
    policy: Policy,
    tube: socket.socket,
) -> None:
    """In the child; never returns."""

    def send_listener(fd: int) -> None:
        tube.sendmsg([b"L"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    try:
        try:
            enter_jail(plan, policy, [tube.fileno()], send_listener)
        except JailError as error:
            tube.send(b"J" + f"{error.layer}\t{error.reason}".encode())
            os._exit(1)
        tube.send(b"+" + attempt.run(targets).encode())
    except (OSError, ValueError, MemoryError) as error:
        tube.send(b"-" + f"{type(error).__name__}: {error}".encode())
    except BaseException as error:
        tube.send(b"J" + f"?\t{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


def _supervise(attempt: Attempt, tube: socket.socket, pid: int) -> Outcome:
    """What a warden does: wait for words, for a violation, for the end."""
    listener = -1
    try:
        while True:
            poll = select.poll()
            poll.register(tube, select.POLLIN)
            if listener >= 0:
                poll.register(listener, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(_SECONDS * 1000)]
            if not ready:
                return Outcome(attempt.name, False, "hangs")
            if tube.fileno() not in ready:
                name = receive_violation(listener)
                if name:
                    why = f"caught in the forbidden system call {name}"
                    return Outcome(attempt.name, False, why, name)
                os.close(listener)  # hung up: it is dead, and the tube will say so
                listener = -1
                continue
            message, fds, _, _ = socket.recv_fds(tube, 4096, 1)
            text = message[1:].decode(errors="replace")
            if message[:1] == b"L":
                listener = fds[0]
            elif message[:1] == b"J":
                layer, _, reason = text.partition("\t")
                raise JailError(layer, reason)
            elif message:
                return Outcome(attempt.name, message[:1] == b"+", text)
            else:
                return _end_of(attempt, pid)
    finally:
        if listener >= 0:
            os.close(listener)


def _end_of(attempt: Attempt, pid: int) -> Outcome:
    """It ended without a word: another program took its place, or it was killed."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    status = info.si_status if info else 0
    if info and info.si_code == os.CLD_EXITED:
        executed = status == _EXECUTED
        return Outcome(attempt.name, executed, "ran a program" if executed else f"exit {status}")
    return Outcome(attempt.name, False, f"killed by {signal.Signals(status).name}")
