"""Linux with a directory of the host, over its own 9P client; see `test_linux`.

Debian's kernel for virtual machines lacks that client: ``--kernel linux-image-amd64`` has it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jail_tools import ORDINARY_UID
from linux_guests import MAKE_IT, find_guest
from test_linux import MAKE_X, Shell, options

from vmm.machine import Machine
from vmm.outcome import Ending

MODULE = b"9pnet_virtio.ko"
MOUNT = "mkdir -p /m; mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000{} shared /m"


GUEST = find_guest(MODULE)
pytestmark = [
    pytest.mark.skipif(
        GUEST is None,
        reason=f"NO LINUX WITH 9P: {MAKE_IT}",
    ),
    pytest.mark.timeout(400),
]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


def give(path: Path) -> None:
    """Make all of it the user's that the device is."""
    if os.geteuid() == 0:
        for above, folders, names in os.walk(path):
            for name in (".", *folders, *names):
                os.chown(Path(above) / name, ORDINARY_UID, ORDINARY_UID, follow_symlinks=False)


@contextmanager
def linux(shared: Path, isolated: bool = True, mount: str = "", **more: Any) -> Iterator[Shell]:
    if isolated:
        give(shared)
    with Machine(memory="256M") as machine:
        machine.add_device("9p", isolated=isolated, path=str(shared), tag="shared", **more)
        assert GUEST is not None
        machine.boot(GUEST / "vmlinuz", options("quiet", directory=GUEST))
        shell = Shell(machine)
        shell.wait()
        asked = shell.ask(MOUNT.format(mount))
        assert "failed" not in asked, asked
        yield shell


def sha256(shell: Shell, path: str) -> str:
    found = re.search(r"\b[0-9a-f]{64}\b", shell.ask(f"sha256sum {path}"))
    assert found
    return found[0]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inventory(top: Path) -> dict[str, tuple[Any, ...]]:
    """What there is beneath a directory: kinds, modes, times, contents."""
    found: dict[str, tuple[Any, ...]] = {}
    for above, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(above) / name
            about = path.lstat()
            inside: Any = os.readlink(path) if path.is_symlink() else None
            if path.is_file() and not path.is_symlink():
                inside = digest(path)
            mode, time = about.st_mode, None if path.is_symlink() else int(about.st_mtime)
            found[str(path.relative_to(top))] = mode, time, inside
    return found


@pytest.mark.parametrize(
    "how",
    [{"isolated": False}, {}, {"dma": "granted"}],
    ids=["in-process", "jailed", "granted"],
)
def test_a_day_of_a_directory(shared: Path, how: dict[str, Any]) -> None:
    data = os.urandom(24 << 20)
    (shared / "big").write_bytes(data)
    (shared / "hello").write_text("from the host\n")
    (shared / "many").mkdir()
    for number in range(1500):
        (shared / "many" / f"file-{number}").touch()
    tree = shared / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "deep" / "link").symlink_to("../file")
    (tree / "file").write_bytes(os.urandom(70_000))
    (tree / "file").chmod(0o640)
    (tree / "deep" / "deeper" / "run").write_text("#!/bin/sh\n")
    (tree / "deep" / "deeper" / "run").chmod(0o755)
    for path in (tree / "file", tree / "deep" / "deeper", tree / "deep", tree):
        os.utime(path, (10**9, 10**9))
    with linux(shared, **how) as shell:
        assert "from the host" in shell.ask("cat /m/hello")
        assert sha256(shell, "/m/big") == hashlib.sha256(data).hexdigest()
        shell.ask("cp /m/big /m/copied; sync")
        assert "1500" in shell.ask("ls /m/many | wc -l")
        shell.ask("cp -a /m/tree /m/again")
        shell.ask("echo one >/m/new; echo two >>/m/new; mv /m/new /m/tree/moved; rm /m/hello")
        shell.ask("mkdir /m/made; mv /m/tree/moved /m/made; rm -r /m/many; truncate -s 5 /m/made/s")
        # A program is mapped: from a page cache that 9P fills.
        shell.ask("cp /bin/busybox /m/printf")
        assert "it-runs" in shell.ask("/m/printf 'it%sruns' -")
        shell.ask("ln -s nowhere /m/sym; ln /m/made/s /m/hard; mkfifo /m/fifo; mknod /m/n c 1 3")
        shell.ask("chmod 4711 /m/made/s; touch -d '2001-02-03 04:05:06' /m/made/s")
        assert "1000" in shell.ask("echo 1000 >/m/fifo & cat /m/fifo")
        assert "Operation not permitted" in shell.ask("chown 5 /m/made/s")
        shell.ask("cat /m/sym /m/none; umount /m")
        complaints = shell.ask("dmesg | grep -iE 'BUG|WARNING|9p.*error'")
        assert "BUG:" not in complaints
        assert "WARNING:" not in complaints
    assert (shared / "copied").read_bytes() == data
    assert inventory(tree) == inventory(shared / "again")
    assert (shared / "made" / "moved").read_text() == "one\ntwo\n"
    about = (shared / "made" / "s").stat()
    assert (about.st_size, about.st_mode, about.st_nlink) == (5, 0o100711, 2)
    assert about.st_mtime == 981173106
    assert os.readlink(shared / "sym") == "nowhere"
    left = {"big", "copied", "tree", "again", "made", "printf", "sym", "hard", "fifo"}
    assert set(os.listdir(shared)) == left


def test_read_only(shared: Path) -> None:
    (shared / "file").write_text("as it was\n")
    (shared / "dir").mkdir()
    with linux(shared, readonly=True) as shell:
        for command in (
            "echo x >/m/new",
            "echo x >/m/file",
            "rm /m/file",
            "mv /m/file /m/dir",
            "mkdir /m/d",
            "rmdir /m/dir",
            "chmod 777 /m/file",
            "touch /m/file",
            "ln -s x /m/l",
        ):
            assert "Read-only file system" in shell.ask(command), command
        assert "as it was" in shell.ask("cat /m/file")
    assert inventory(shared).keys() == {"file", "dir"}
    assert (shared / "file").read_text() == "as it was\n"


@pytest.mark.parametrize("cache", ["", ",cache=loose"], ids=["no cache", "cache=loose"])
def test_a_snapshot_amid_writes(shared: Path, tmp_path: Path, cache: str) -> None:
    """Taken while a file is being written; the restored machine finishes the job."""
    with linux(shared, mount=cache) as shell:
        machine = shell.machine
        shell.ask(f"{MAKE_X}; exec 3>>/m/open; echo before >&3")
        shell.ask("exec 4</m/open; echo gone >/m/gone; exec 5</m/gone; rm /m/gone; sync")
        machine.send(
            "for n in 1 2 3 4 5 6; do echo round $n; cp /x /m/$n; sync; done; sha256sum /x /m/?\r"
        )
        outcome = machine.run(until=b"round 3\r", timeout=100)
        assert outcome.ending is Ending.PAUSED, outcome
        machine.run(timeout=0.05)
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        shell = Shell(machine)
        shell.wait()
        sums = re.findall(r"\b[0-9a-f]{64}\b", machine.output.decode())
        assert len(sums) == 7
        assert set(sums) == {digest(shared / "6")}
        shell.ask("echo after >&3; sync")
        assert (shared / "open").read_text() == "before\nafter\n"
        assert "before" in shell.ask("cat <&4")
        if not cache:
            # What was deleted while it was open is lost, and the guest is told so.
            assert "Stale file handle" in shell.ask("cat <&5")
        shell.ask("exec 3>&- 4>&- 5>&-; umount /m")
    assert [digest(shared / str(n)) for n in range(1, 7)] == [sums[0]] * 6
