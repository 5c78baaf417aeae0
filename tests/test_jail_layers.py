"""Each layer alone: what it stops it stops without the help of the others, and only it does."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pty
import resource
import select
import shutil
import signal
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from jail_tools import USERS, as_user, kill_and_wait, only

from proxy.jail import (
    JailMode,
    JailPlan,
    Policy,
    enter,
    enter_jail,
    fork_into_jail,
    linux,
    plan_jail,
)
from proxy.jail.escape import BY_NAME, Attempt, Outcome, Targets, bait, try_to_escape

# Layer -> (the layers that it cannot be had without, what it stops alone)
_ALONE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fds": ((), ("use-fd",)),
    "userns": ((), ("ptrace", "read-memory", "steal-fd")),
    "pidns": (("userns",), ("signal",)),
    "netns": (("userns",), ("connect",)),
    "root": (
        ("userns", "mountns"),
        ("read-file", "stat-file", "list-root", "open-device", "exec"),
    ),
    "landlock": (
        ("nnp",),
        ("read-file", "list-root", "open-device", "exec", "connect", "signal", "ptrace"),
    ),
    "rlimits": ((), ("take-memory", "fork", "raise-limit")),
    "caps": ((), ("mount", "bpf", "capability")),
    "uid": (("caps",), ("signal", "become-root")),
    "seccomp": (("nnp",), ("map-code", "unprotect-code", "stat-file", "userns", "fork")),
}
_CASES = [(layer, name) for layer, (_, names) in _ALONE.items() for name in names]
_ROOT_ONLY = {"caps", "uid"}
_NOT_FOR_ROOT = {("rlimits", "fork"), ("rlimits", "raise-limit")}  # CAP_SYS_RESOURCE overrides


@pytest.mark.parametrize(("layer", "name"), _CASES)
@pytest.mark.parametrize("user", USERS)
def test_a_layer_alone_stops(user: str, layer: str, name: str) -> None:
    if user != "root" and layer in _ROOT_ONLY:
        pytest.skip("an ordinary user has nothing to lose here")
    if user == "root" and (layer, name) in _NOT_FOR_ROOT:
        pytest.skip("limits do not bind root; see layer uid")
    needs = _ALONE[layer][0]

    def run() -> tuple[JailPlan, Outcome, Outcome]:
        plan = plan_jail(JailMode.AUTO)
        with bait() as targets:
            attempt = BY_NAME[name]
            bare = try_to_escape(attempt, targets, only(plan, *needs))
            return plan, bare, try_to_escape(attempt, targets, only(plan, layer, *needs))

    plan, bare, outcome = as_user(user, run)
    if layer in plan.missing or not bare.escaped:
        pytest.skip(f"this host: {plan.missing.get(layer, bare.detail)}")
    if layer == "landlock" and plan.landlock_abi < {"connect": 4, "signal": 6}.get(name, 1):
        pytest.skip(f"Landlock ABI {plan.landlock_abi}")
    assert not outcome.escaped, outcome


def _alone(user: str, attempt: Attempt, *names: str) -> Outcome:
    def run() -> Outcome:
        plan = plan_jail(JailMode.AUTO)
        missing = [name for name in names if name in plan.missing]
        if missing:
            return Outcome(attempt.name, False, f"host: {plan.missing[missing[0]]}")
        with bait() as targets:
            return try_to_escape(attempt, targets, only(plan, *names))

    return as_user(user, run)


@pytest.mark.parametrize("user", USERS)
def test_ipc_namespace(user: str) -> None:
    libc = ctypes.CDLL(None)

    def run() -> tuple[Outcome, Outcome]:
        key = os.getpid() | 0x1000_0000
        segment = libc.shmget(key, 4096, 0o1600)  # IPC_CREAT
        assert segment >= 0

        def find(_: Targets) -> str:
            if libc.shmget(key, 0, 0) < 0:
                raise FileNotFoundError(key)
            return "found the segment"

        attempt = Attempt("ipc", "find a shared memory segment", find)
        plan = plan_jail(JailMode.AUTO)
        try:
            with bait() as targets:
                return (
                    try_to_escape(attempt, targets, only(plan, "userns")),
                    try_to_escape(attempt, targets, only(plan, "userns", "ipcns")),
                )
        finally:
            libc.shmctl(segment, 0, None)  # IPC_RMID

    before, after = as_user(user, run)
    assert before.escaped
    assert not after.escaped


@pytest.mark.parametrize("user", USERS)
def test_uts_namespace(user: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    name = os.uname().nodename

    def rename(_: Targets) -> str:
        if libc.sethostname(b"jail", 4) < 0:
            raise OSError(ctypes.get_errno(), "sethostname")
        return os.uname().nodename

    try:
        outcome = _alone(user, Attempt("rename", "rename the host", rename), "userns", "utsns")
        assert outcome.detail == "jail"
        assert os.uname().nodename == name
    finally:
        if os.uname().nodename != name:
            libc.sethostname(name.encode(), len(name))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount on the host")
def test_mount_namespace() -> None:
    before = Path("/proc/self/mountinfo").read_text()

    def mount(_: Targets) -> str:
        linux.mount("escape", "/mnt", "tmpfs", 0, None)
        return Path("/proc/self/mountinfo").read_text()

    # The layer "root" makes mounts private first; it is done here by hand.
    def mount_privately(targets: Targets) -> str:
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE, None)
        return mount(targets)

    outcome = _alone("root", Attempt("mount", "mount", mount_privately), "mountns")
    assert outcome.escaped, outcome
    assert "escape" in outcome.detail
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_user_namespace_takes_power_over_the_host() -> None:
    attempt = BY_NAME["mount"]
    assert _alone("root", attempt).escaped
    assert not _alone("root", attempt, "userns").escaped


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a set-user-id program")
@pytest.mark.skipif(not shutil.which("id"), reason="needs the id program")
@pytest.mark.parametrize("names", [(), ("nnp",)])
def test_no_new_privs(names: tuple[str, ...]) -> None:
    source = shutil.which("id")
    assert source
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "id")
        shutil.copy(source, program)
        Path(folder).chmod(0o755)
        program.chmod(0o4755)

        def effective_user() -> str:
            plan = only(plan_jail(JailMode.AUTO), *names)
            reader, writer = os.pipe()
            pid = fork_into_jail(plan)
            if pid == 0:
                try:
                    enter_jail(plan, Policy(), (), lambda _: None)
                    os.dup2(writer, 1)
                    os.execv(program, ["id", "-u"])
                finally:
                    os._exit(1)
            os.close(writer)
            with open(reader) as file:
                text = file.read()
            os.waitpid(pid, 0)
            return text.strip()

        user = as_user("ordinary", effective_user)
    assert (user != "0") == bool(names)


@pytest.mark.parametrize("names", [(), ("session",)])
def test_session(names: tuple[str, ...]) -> None:
    def run() -> Outcome:
        os.setsid()
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def find_terminal(_: Targets) -> str:
            os.close(os.open("/dev/tty", os.O_RDWR))
            return "has the terminal"

        attempt = Attempt("tty", "reach the terminal", find_terminal)
        try:
            with bait() as targets:
                return try_to_escape(attempt, targets, only(plan_jail(JailMode.AUTO), *names))
        finally:
            os.close(main)

    assert as_user("root", run).escaped == (not names)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("jail", ["bare", "floor-like", "full"])
def test_it_dies_with_its_parent(user: str, jail: str) -> None:
    """The parent is killed while the child sleeps; without the layer the child lives on."""
    reader, writer = os.pipe()

    def parent() -> None:
        plan = plan_jail(JailMode.AUTO)
        plan = {
            "bare": only(plan),
            "floor-like": only(plan, "uid", "nnp", "caps", "pdeath"),
            "full": plan,
        }[jail]
        entered, child_end = os.pipe()
        pid = fork_into_jail(plan)
        if pid == 0:
            try:
                enter_jail(plan, Policy(), (child_end,), lambda _: None)
                os.write(child_end, b"1")
                time.sleep(60)
            finally:
                os._exit(0)
        os.close(child_end)
        os.read(entered, 1)
        os.write(writer, b"%d" % pid)
        time.sleep(60)

    middle = os.fork()
    if middle == 0:
        os.setsid()
        try:
            as_user(user, parent)
        finally:
            os._exit(1)
    pid = 0
    try:
        pid = int(os.read(reader, 20))
        pidfd = os.pidfd_open(pid)
        # The direct parent of the child is the process that as_user made.
        stat_text = Path(f"/proc/{pid}/stat").read_text()
        direct = int(stat_text.rpartition(")")[2].split()[1])
        os.kill(direct, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        died = bool(poll.poll(500 if jail == "bare" else 20_000))
        os.close(pidfd)
        assert died == (jail != "bare")
    finally:
        if pid:
            kill_and_wait(pid)
        kill_and_wait(middle)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("names", [(), ("pdeath",)])
def test_no_one_of_the_same_user_can_inspect_it(names: tuple[str, ...]) -> None:
    def run() -> bool:
        plan = only(plan_jail(JailMode.AUTO), *names)
        entered, child_end = os.pipe()
        pid = fork_into_jail(plan)
        if pid == 0:
            enter_jail(plan, Policy(), (child_end,), lambda _: None)
            os.write(child_end, b"1")
            time.sleep(60)
            os._exit(0)
        try:
            os.read(entered, 1)
            with open(f"/proc/{pid}/mem", "rb"):
                return True
        except PermissionError:
            return False
        finally:
            kill_and_wait(pid)

    assert as_user("ordinary", run) == (not names)


def _said_in_a_jail(plan: JailPlan, prepare: Callable[[], object], tell: Callable[[], str]) -> str:
    """What `tell` says after a process has entered its jail, or why it could not."""
    reader, writer = os.pipe()
    pid = fork_into_jail(plan)
    if pid == 0:
        text = "?"
        try:
            prepare()
            enter_jail(plan, Policy(), (writer,), lambda _: None)
            text = tell()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as file:
        return file.read()


@pytest.mark.parametrize(
    ("limit", "value"), [("CORE", 0), ("FSIZE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0), ("NPROC", 0)]
)
def test_limits_are_set(limit: str, value: int) -> None:
    """Soft and hard; what has no way out of its own to try is read."""
    which = getattr(resource, f"RLIMIT_{limit}")
    plan = only(plan_jail(JailMode.AUTO), "rlimits")
    said = _said_in_a_jail(plan, lambda: None, lambda: repr(resource.getrlimit(which)))
    assert said == repr((value, value))
    assert resource.getrlimit(which) != (value, value) or limit == "CORE"


def test_a_process_that_stays_dumpable_is_no_jail() -> None:
    """On a kernel that ignores it, the jail must not say that it holds."""

    def ignore_it() -> None:
        real = linux.prctl

        def prctl(option: int, *arguments: int) -> int:
            return 0 if option == linux.PR_SET_DUMPABLE else real(option, *arguments)

        real(linux.PR_SET_DUMPABLE, 1)
        enter.linux = SimpleNamespace(**{**vars(linux), "prctl": prctl})  # type: ignore[assignment]

    plan = only(plan_jail(JailMode.AUTO), "pdeath")
    dumpable = _said_in_a_jail(plan, ignore_it, lambda: "in")
    assert "JailError" in dumpable, dumpable
    assert "still dumpable" in dumpable
    assert _said_in_a_jail(plan, lambda: None, lambda: "in") == "in"


def test_descriptors() -> None:
    """What is kept stays and works; 0, 1 and 2 are /dev/null; all else is gone."""
    plan = only(plan_jail(JailMode.AUTO), "fds")
    reader, writer = os.pipe()
    with open("/etc/passwd", "rb") as kept, open("/etc/passwd", "rb") as lost:
        pid = fork_into_jail(plan)
        if pid == 0:
            found = "?"
            try:
                enter_jail(plan, Policy(), (writer, kept.fileno()), lambda _: None)
                null = os.stat("/dev/null").st_rdev
                nulls = [os.fstat(fd).st_rdev == null for fd in (0, 1, 2)]
                listed = [int(name) for name in os.listdir("/proc/self/fd")]
                found = json.dumps(
                    {
                        "nulls": nulls,
                        "open": sorted(fd for fd in listed if _is_open(fd)),
                        "first byte": os.read(kept.fileno(), 1).decode(),
                    }
                )
            except BaseException as error:
                found = repr(error)
            finally:
                os.write(writer, found.encode())
                os._exit(0)
        os.waitpid(pid, 0)
        wanted = sorted({0, 1, 2, writer, kept.fileno()})
        assert lost.fileno() not in wanted
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    said = json.loads(text)
    assert said["nulls"] == [True] * 3
    assert said["first byte"]
    assert said["open"] == wanted


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
