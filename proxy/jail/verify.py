"""The jail tried from inside: every function tries or reads what a layer promises.

Each returns one line of evidence for the report, and raises `JailError` if the layer does not
hold. They run in the device's process, those that need a system call that the policy forbids
before seccomp, the last one after it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import socket
from collections.abc import Iterable

from proxy.jail import filter as seccomp
from proxy.jail import linux
from proxy.jail.plan import JailError
from proxy.jail.policy import Policy

_NOT_ROUTABLE = ("192.0.2.1", 9)  # RFC 5737, section 3: documentation, never a real host

_libc = ctypes.CDLL(None, use_errno=True)


def descriptors(allowed: Iterable[int], given: int) -> str:
    """Nothing is open but these; `given` is how many of them the device was given."""
    still_open = {fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)}
    extra = still_open - set(allowed)
    if extra:
        raise JailError("fds", f"still open: {sorted(extra)}")
    return f"{given} given, no other open"


def session() -> str:
    """There is no controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError as error:
        return f"/dev/tty: {error.strerror}"
    raise JailError("session", "/dev/tty could be opened")


def user() -> str:
    """No user or group id is root's."""
    ids = {*os.getresuid(), *os.getresgid()}
    if 0 in {*os.getresuid()}:
        raise JailError("uid", f"still root: ids {sorted(ids)}")
    return f"user {os.getuid()}, group {os.getgid()}"


def namespace(layer: str, proc_name: str, host_inode: int) -> str:
    """The namespace is not the machine's, and it is as empty as it should be."""
    inode = os.stat(f"/proc/self/ns/{proc_name}").st_ino
    if inode == host_inode:
        raise JailError(layer, "still the machine's")
    if layer == "pidns" and os.getpid() != 1:
        raise JailError(layer, f"process {os.getpid()} in it, not 1")
    if layer == "netns":
        return f"{proc_name}:[{inode}], {_no_route()}"
    return f"{proc_name}:[{inode}]"


def _no_route() -> str:
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.connect(_NOT_ROUTABLE)
    except OSError as error:
        return f"connect: {error.strerror}"
    finally:
        probe.close()
    raise JailError("netns", "there is a route to the outside")


def empty_root() -> str:
    """The root directory has nothing in it and nothing can be put there."""
    names = os.listdir("/") + os.listdir("/..")
    if names:
        raise JailError("root", f"the root directory has {names[0]!r} in it")
    try:
        os.close(os.open("/x", os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        if error.errno == errno.EROFS:
            return "list: nothing; create: read-only"
        raise
    raise JailError("root", "a file could be created in the root directory")


def no_new_privs() -> str:
    """The bit is set."""
    if linux.prctl(linux.PR_GET_NO_NEW_PRIVS) != 1:
        raise JailError("nnp", "the bit is not set")
    return "bit set"


def landlock_files() -> str:
    """The root directory is refused."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
    else:
        raise JailError("landlock", "the root directory could be opened")
    return "files"


def landlock(abi: int, files: str) -> str:
    """Where the version has it, a TCP port is refused; `files` is what was found of files."""
    covers = [files]
    if abi >= 4:
        covers.append("TCP")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", 0))
            except OSError as error:
                if error.errno != errno.EACCES:
                    raise
            else:
                raise JailError("landlock", "a TCP port could be bound")
    if abi >= 6:
        covers += ["signals", "abstract sockets"]
        _no_signal_to_parent()
    return f"ABI {abi}: {', '.join(covers)}"


def _no_signal_to_parent() -> None:
    parent = os.getppid()
    if not parent:  # not in this PID namespace: nothing to try
        return
    try:
        os.kill(parent, 0)
    except PermissionError:
        return
    raise JailError("landlock", "the parent could be signalled")


def capabilities() -> str:
    """No capability is held, and none can be got back."""
    sets = linux.capget()
    if any(sets):
        raise JailError("caps", f"still held: {sets[0] | sets[1] | sets[2]:#x}")
    bounding = sum(1 for _ in linux.bounding_set())
    if not bounding:
        return "all sets empty, the bounding set too"
    return f"all sets empty; {bounding} in the bounding set, which no_new_privs makes useless"


def set_limits(policy: Policy, lowest_room: int, mapped: int) -> str:
    """Set the limits of a policy, soft and hard, and read them back.

    Args:
        policy: the limits.
        lowest_room: the number of open files may not be less than this.
        mapped: bytes of address space in use.
    """
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: policy.file_size,
        resource.RLIMIT_MEMLOCK: policy.locked_memory,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: max(policy.open_files, lowest_room),
        resource.RLIMIT_NPROC: policy.processes,
        resource.RLIMIT_AS: mapped + policy.more_memory,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (bounded, bounded))
        if resource.getrlimit(which) != (bounded, bounded):
            raise JailError("rlimits", f"limit {which} is {resource.getrlimit(which)}")
    files = f", files up to {policy.file_size} bytes" if policy.keeps_size else ""
    return (
        f"{limits[resource.RLIMIT_NOFILE]} descriptors, {policy.processes} processes, "
        f"{mapped + policy.more_memory >> 20} MiB{files}"
    )


def set_death_signal(parent_pidfd: int) -> str:
    """Ask for SIGKILL at the parent's death, unless it is dead already: then end here."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    got = ctypes.c_int()
    linux.prctl(linux.PR_GET_PDEATHSIG, ctypes.addressof(got))
    if got.value != signal.SIGKILL:
        raise JailError("pdeath", f"the death signal is {got.value}")
    if parent_pidfd >= 0 and _is_readable(parent_pidfd):
        os._exit(1)
    return "SIGKILL, not dumpable"


def not_dumpable() -> None:
    """No other process of this user may attach to it or read its memory."""
    if linux.prctl(linux.PR_GET_DUMPABLE) != 0:
        raise JailError("pdeath", "still dumpable")


def seccomp_canary(instructions: int) -> str:
    """The filter is in force: a call that only it answers like this does."""
    ctypes.set_errno(0)
    result = getattr(_libc, seccomp.CANARY_CALL)(seccomp.CANARY_ARGUMENT, 0)
    if result != -1 or ctypes.get_errno() != seccomp.CANARY_ERRNO:
        raise JailError("seccomp", f"the filter did not answer: errno {ctypes.get_errno()}")
    return f"{instructions} instructions, canary answered"


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
