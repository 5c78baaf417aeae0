"""Going into the jail: the fork, and each layer put up and tried from inside.

Order matters. What needs the host's /proc or a capability comes before these are given up; the
death signal comes after the last change of credentials, which would clear it; seccomp is last.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from proxy.jail import filter as seccomp
from proxy.jail import linux, verify
from proxy.jail.layers import LAYERS, JailReport, LayerReport, LayerState
from proxy.jail.plan import NAMESPACES, JailError, JailMode, JailPlan
from proxy.jail.policy import OnViolation, Policy
from proxy.jail.shared import SharedDirectory

_DEVICE_UIDS = 0x6A00_0000
"""As root, device user ids are this plus the process id: no account, and no two alike."""
_NOBODY = 65534
"""Where a container maps no such user ids."""

_UNSHARED = {
    "userns": linux.CLONE_NEWUSER,
    "mountns": linux.CLONE_NEWNS,
    "netns": linux.CLONE_NEWNET,
    "ipcns": linux.CLONE_NEWIPC,
    "utsns": linux.CLONE_NEWUTS,
}
_MOUNT_POINTS = ("/proc", "/tmp", "/dev", "/usr")
_SEALED = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC

_parent_pidfd = -1  # in a child of fork_into_jail: its parent, to see it die early
_unmapped_ids: tuple[int, int] | None = None
# In such a child: it got a user namespace by the fork, and these were its user and group before.


def prepare_warden(plan: JailPlan) -> None:
    """Called once in the warden, right after its fork and before it forks devices.

    Compiles the common filter, so that each device inherits it. Nothing of the process itself is
    changed: root keeps what it needs to import device models from anywhere, and each device
    gives it up in `enter_jail`.

    Raises:
        RuntimeError: the process has more than one thread; `fork_into_jail` would not be sound.
        UserError: libseccomp is gone.
    """
    if threading.active_count() > 1:
        raise RuntimeError("the warden must have one thread only")
    compile_filters(plan)


def compile_filters(plan: JailPlan) -> None:
    """Compile the common filter here, so that processes forked from this one inherit it."""
    if plan.has("seccomp"):
        seccomp.filter_for(Policy(), plan.scopes(), plan.has("notify"))


def fork_into_jail(plan: JailPlan) -> int:
    """Like os.fork(), but the child is process 1 of a new PID namespace if the plan has one.

    May be called any number of times. The pid returned is the one that the caller sees. A user
    namespace is had at the same time where it is what makes the PID namespace possible; the
    child can still read what its user can read.

    As process 1 the child ignores every signal that it has no handler for, except SIGKILL from
    outside. It dies with the thread that called this (prctl(2), PR_SET_PDEATHSIG).

    Raises OSError.
    """
    global _parent_pidfd, _unmapped_ids
    parent = os.pidfd_open(os.getpid()) if hasattr(os, "pidfd_open") else -1
    try:
        if not plan.has("pidns"):
            pid = os.fork()
            if pid == 0:
                _parent_pidfd = parent
            return pid
        flags = linux.CLONE_NEWPID
        if plan.has("userns") and not linux.has_capability(linux.CAP_SYS_ADMIN):
            flags |= linux.CLONE_NEWUSER
        ids = os.geteuid(), os.getegid()
        pid = linux.fork_with(flags)
        if pid == 0:
            _parent_pidfd = parent
            _unmapped_ids = ids if flags & linux.CLONE_NEWUSER else None
        return pid
    finally:
        if parent >= 0 and _parent_pidfd != parent:
            os.close(parent)


def enter_jail(
    plan: JailPlan,
    policy: Policy,
    keep_fds: Iterable[int],
    notify: Callable[[int], None],
    shared: SharedDirectory | None = None,
) -> JailReport:
    """Put up every layer of the plan around this process, a child of `fork_into_jail`.

    Args:
        plan: what to put up; a layer that fails ends the attempt, nothing is skipped.
        policy: the device's system calls and limits.
        keep_fds: the only descriptors that stay open. 0, 1 and 2 become /dev/null unless they
            are in it, so that no later descriptor takes their numbers and stray prints go
            nowhere. With the jail off they are left as they are.
        notify: called with the seccomp listener right after the filter is in force, to send it
            to the supervisor (sendmsg is allowed); it is closed here afterwards. Not called if
            the plan lacks "notify", the policy denies, or the jail is off.
        shared: the directory that it may use; None: no file at all.

    All modules that the device will import must be imported before. Python objects that own
    descriptors outside `keep_fds` must not be used or finalised afterwards.

    Raises:
        JailError: a layer could not be put up or did not hold; end the process.
    """
    started = time.perf_counter_ns()
    entry = _Entry(plan, policy, frozenset(keep_fds), shared)
    if plan.mode is JailMode.OFF:
        entry.close_descriptors({0, 1, 2})
        entry.die_with_parent()
    else:
        entry.run(notify)
    details = entry.details
    report = JailReport(plan.mode.value)
    for layer in LAYERS:
        if plan.mode is JailMode.OFF:
            found = LayerReport(layer.name, LayerState.OFF, details.get(layer.name, ""))
        elif layer.name in plan.missing:
            found = LayerReport(layer.name, LayerState.MISSING, plan.missing[layer.name])
        else:
            # A layer that left no evidence is a bug here, and must not be called enforced.
            found = LayerReport(layer.name, LayerState.ENFORCED, details[layer.name])
        report.layers.append(found)
    report.microseconds = (time.perf_counter_ns() - started) // 1000
    return report


@contextmanager
def _layer(name: str) -> Iterator[None]:
    """Name the layer that an error belongs to."""
    try:
        yield
    except OSError as error:
        raise JailError(name, error.strerror or str(error)) from error


class _Entry:
    """One process on its way in: what it found of each layer is kept in `details`."""

    def __init__(
        self,
        plan: JailPlan,
        policy: Policy,
        keep_fds: frozenset[int],
        shared: SharedDirectory | None,
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.keep_fds = keep_fds
        self.shared = shared
        self.details: dict[str, str] = {}
        self.mapped = 0  # bytes of address space

    def run(self, notify: Callable[[int], None]) -> None:
        has = self.plan.has
        # Compiling writes a file, which the limits forbid.
        program = self.compile() if has("seccomp") else b""
        if _unmapped_ids:
            self.map_ids(*_unmapped_ids)
        if has("fds"):
            self.replace_standard_descriptors()
            self.close_descriptors({0, 1, 2})
        if has("rlimits"):
            self.measure()  # while there is a /proc
        if has("session"):
            self.leave_session()
        if self.shared is not None and has("root"):
            self.stand_in(self.shared)
        if has("uid"):
            self.leave_root_user()
        self.unshare()
        if has("root"):
            self.empty_root()
        if has("nnp"):
            self.forbid_new_privileges()
        if has("landlock"):
            self.restrict_access()
        if has("caps"):
            self.drop_capabilities()
        if has("rlimits"):
            self.set_limits()
        if has("pdeath"):
            self.die_with_parent()
        if program:
            self.filter_system_calls(program, notify)

    # Descriptors and session.

    def replace_standard_descriptors(self) -> None:
        with _layer("fds"):
            null = os.open(os.devnull, os.O_RDWR)
            for fd in {0, 1, 2} - self.keep_fds - {null}:
                os.dup2(null, fd)
            if null > 2:
                os.close(null)

    def close_descriptors(self, standard: set[int]) -> None:
        wanted = self.keep_fds | standard
        kept = wanted | ({_parent_pidfd} if self.watches_parent() else set())
        with _layer("fds"):
            first = 0
            for fd in sorted(kept):
                if fd > first:
                    _close_from_to(first, fd - 1)
                first = fd + 1
            _close_from_to(first, 0x7FFF_FFFF)
            self.details["fds"] = verify.descriptors(kept, len(self.keep_fds))

    def watches_parent(self) -> bool:
        return _parent_pidfd >= 0 and (self.plan.mode is JailMode.OFF or self.plan.has("pdeath"))

    def leave_session(self) -> None:
        with _layer("session"):
            linux.leave_terminal()
            self.details["session"] = verify.session()

    # Who it is.

    def leave_root_user(self) -> None:
        """As root: become a user who owns nothing, or the owner of the directory that it shares.

        Capabilities stay for the steps to come.
        """
        with _layer("uid"):
            if os.geteuid() == 0:
                if linux.has_capability(linux.CAP_SETPCAP):
                    linux.prctl(linux.PR_SET_SECUREBITS, linux.SECBIT_NO_SETUID_FIXUP)
                os.setgroups([])
                unowned = _DEVICE_UIDS + _host_pid()
                owner = self.shared.owner() if self.shared is not None else None
                _become(owner or (unowned, unowned), (_NOBODY, _NOBODY))
                # The change made /proc/self unwritable; the id maps are written there.
                linux.prctl(linux.PR_SET_DUMPABLE, 1)
            self.details["uid"] = verify.user()

    def drop_capabilities(self) -> None:
        with _layer("caps"):
            if linux.has_capability(linux.CAP_SETPCAP):
                for capability in list(linux.bounding_set()):
                    linux.prctl(linux.PR_CAPBSET_DROP, capability)
                linux.prctl(linux.PR_SET_SECUREBITS, linux.SECBITS_NO_WAY_UP)
            linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
            linux.capset(0, 0, 0)
            self.details["caps"] = verify.capabilities()

    def forbid_new_privileges(self) -> None:
        with _layer("nnp"):
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            self.details["nnp"] = verify.no_new_privs()

    # What it sees.

    def unshare(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        flags = {n: f for n, f in _UNSHARED.items() if self.plan.has(n)}
        if _unmapped_ids:
            flags.pop("userns", None)
        try:
            linux.unshare(sum(flags.values()))
        except OSError:
            for name, flag in flags.items():  # find the one that is to blame
                with _layer(name):
                    linux.unshare(flag)
        if "userns" in flags:
            self.map_ids(uid, gid)
        for name, proc_name in NAMESPACES.items():
            if self.plan.has(name):
                with _layer(name):
                    host = self.plan.host_namespaces[name]
                    self.details[name] = verify.namespace(name, proc_name, host)

    def map_ids(self, uid: int, gid: int) -> None:
        """Write the maps of a new user namespace: two ids stand for themselves, no others."""
        with _layer("userns"):
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{uid} {uid} 1"),
                ("gid_map", f"{gid} {gid} 1"),
            ):
                fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
                try:
                    os.write(fd, text.encode())
                finally:
                    os.close(fd)

    def stand_in(self, shared: SharedDirectory) -> None:
        """Be in the directory that is to be the root, and make files in it with their own modes."""
        with _layer("root"):
            os.fchdir(shared.fd)
            os.umask(0)

    def empty_root(self) -> None:
        with _layer("root"):
            # Where mounts are shared, nothing of what follows may reach the host.
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE, None)
            place = next(p for p in _MOUNT_POINTS if os.path.isdir(p))
            if self.shared is not None:
                self.details["root"] = self.shared.make_root(place)
                return
            linux.mount("jail", place, "tmpfs", _SEALED, "size=4k,nr_inodes=1,mode=555")
            os.chdir(place)
            linux.pivot_root(".", ".")
            linux.umount2(".", linux.MNT_DETACH)
            os.chdir("/")
            self.details["root"] = verify.empty_root()

    # What it may use.

    def measure(self) -> None:
        with _layer("rlimits"), open("/proc/self/statm", "rb", buffering=0) as file:
            self.mapped = int(file.read(32).split()[0]) * resource.getpagesize()

    def set_limits(self) -> None:
        with _layer("rlimits"):
            lowest_room = max((*self.keep_fds, 2)) + 9
            self.details["rlimits"] = verify.set_limits(self.policy, lowest_room, self.mapped)

    def restrict_access(self) -> None:
        with _layer("landlock"):
            abi, shared = self.plan.landlock_abi, self.shared
            but = (shared.fd, shared.landlock_rights()) if shared is not None else None
            linux.landlock_deny_all(abi, but)
            files = shared.verify_landlock() if shared is not None else verify.landlock_files()
            self.details["landlock"] = verify.landlock(abi, files)

    def die_with_parent(self) -> None:
        global _parent_pidfd
        with _layer("pdeath"):
            self.details["pdeath"] = verify.set_death_signal(_parent_pidfd)
            if self.plan.has("pdeath"):
                linux.prctl(linux.PR_SET_DUMPABLE, 0)
                verify.not_dumpable()
            if _parent_pidfd >= 0:
                os.close(_parent_pidfd)
                _parent_pidfd = -1

    def compile(self) -> bytes:
        plan = self.plan
        return seccomp.filter_for(self.policy, plan.scopes(), plan.has("notify"))

    def filter_system_calls(self, program: bytes, notify: Callable[[int], None]) -> None:
        listen = self.plan.has("notify") and self.policy.on_violation is OnViolation.KILL
        # With a listener it may fail where without one it does not: kernels, containers.
        with _layer("notify" if listen else "seccomp"):
            listener = linux.seccomp_load(program, listen)
        if listener >= 0:
            notify(listener)
            os.close(listener)
        with _layer("seccomp"):
            self.details["seccomp"] = verify.seccomp_canary(len(program) // 8)
        if self.plan.has("notify"):
            self.details["notify"] = "listener handed over" if listen else "policy: deny, go on"


def _close_from_to(first: int, last: int) -> None:
    try:
        linux.close_range(first, last)
    except OSError:  # kernel before 5.9
        for name in os.listdir("/proc/self/fd"):
            if first <= int(name) <= last:
                os.closerange(int(name), int(name) + 1)


def _host_pid() -> int:
    """This process's id where /proc was mounted; in a new PID namespace os.getpid() is 1."""
    return int(os.readlink("/proc/self"))


def _become(*candidates: tuple[int, int]) -> None:
    """Take the first of these (user, group) that this host maps."""
    for user, group in candidates:
        try:
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
        except OSError:
            if (user, group) == candidates[-1]:
                raise
        else:
            return
