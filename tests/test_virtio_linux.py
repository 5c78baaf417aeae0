"""Linux as the driver: a stock kernel with its own virtio modules, see `test_linux`."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from test_linux import DIRECTORY, MAKE_X, Shell, boot, options

from vmm.config import CONSOLE
from vmm.machine import Machine
from vmm.outcome import Ending

MKFS, FSCK, DEBUGFS = (
    shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    for name in ("mkfs.ext4", "e2fsck", "debugfs")
)
KEPT = random.Random(1).randbytes(1 << 18)
"""The file `kept` of a disk that is only read."""
pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR",
    ),
    pytest.mark.timeout(400),
]
needs_e2fsprogs = pytest.mark.skipif(
    not (MKFS and FSCK and DEBUGFS), reason="NO E2FSPROGS: install it"
)
How = dict[str, Any]
IN_PROCESS: How = {"isolated": False}
WAYS: dict[str, How] = {"in-process": IN_PROCESS, "jailed": {}, "granted": {"dma": "granted"}}
EACH_WAY = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


@contextmanager
def linux(model: str, how: How, append: str = "quiet", **options: Any) -> Iterator[Shell]:
    with Machine(memory="256M") as machine:
        machine.add_device(model, **how, **options)
        yield boot(machine, append)


@pytest.fixture(scope="module", params=WAYS)
def guest(request: pytest.FixtureRequest) -> Iterator[Shell]:
    """One for all tests that leave its devices as they were."""
    how = WAYS[request.param]
    with Machine(memory="256M") as machine:
        machine.add_device("rng", **how)
        if "dma" not in how:
            machine.add_device("balloon", **how, pages=8192)
        yield boot(machine, "quiet")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 32 << 20)
    assert MKFS is not None
    subprocess.run([MKFS, "-q", "-F", "-L", "image", path], check=True, timeout=60)
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    tree, path = tmp_path / "tree", tmp_path / "kept.img"
    tree.mkdir()
    (tree / "kept").write_bytes(KEPT)
    assert MKFS is not None
    subprocess.run([MKFS, "-q", "-L", "kept", "-d", tree, path, "8M"], check=True, timeout=60)
    return path


def read(image: Path, name: str) -> bytes:
    """A file in a file system, as the host finds it."""
    assert DEBUGFS is not None
    done = subprocess.run([DEBUGFS, "-R", f"cat {name}", image], capture_output=True, check=True)
    return done.stdout


def check(image: Path) -> None:
    """The host's own opinion of the file system, without mending it."""
    assert FSCK is not None
    done = subprocess.run(
        [FSCK, "-fn", image], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def assert_seven_alike(machine: Machine) -> None:
    """A restored machine has finished the job: it has told the sums of /x and of its copies."""
    sums = re.findall(r"\b[0-9a-f]{40}\b", machine.output.decode())
    assert len(sums) == 7
    assert len(set(sums)) == 1


def sha1(text: str) -> str:
    found = re.search(r"\b[0-9a-f]{40}\b", text)
    assert found, text
    return found[0]


def test_hwrng(guest: Shell) -> None:
    assert "virtio_rng.0" in guest.ask("cat /sys/class/misc/hw_random/rng_current")
    first, second = (
        sha1(guest.ask("dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha1sum")) for _ in range(2)
    )
    assert first != second


def assert_interrupts(shell: Shell, kind: str) -> None:
    """The entropy source, which is the first device, comes by this kind of interrupt."""
    shell.ask("dd if=/dev/hwrng of=/dev/null bs=512 count=2")
    lines = shell.ask("cat /proc/interrupts")
    (line,) = [line for line in lines.splitlines() if re.search(r"virtio0(-input)?\r?$", line)]
    assert kind in line
    assert int(line.split()[1]) > 0


def test_msi_x(guest: Shell) -> None:
    assert_interrupts(guest, "PCI-MSI")


def test_intx() -> None:
    with linux("rng", IN_PROCESS, "quiet pci=nomsi") as shell:
        assert_interrupts(shell, "IO-APIC")


@needs_e2fsprogs
@EACH_WAY
def test_ext4_on_a_disk(how: How, image: Path, kept: Path) -> None:
    before = kept.read_bytes()
    with Machine(memory="256M") as machine:
        machine.add_device("blk", **how, path=str(image), serial="a-disk")
        machine.add_device("blk", "kept", **how, path=str(kept), readonly=True)
        shell = boot(machine, "quiet")
        assert "a-disk" in shell.ask("cat /sys/block/vda/serial")
        shell.ask("mkdir /m; mount -t ext4 /dev/vda /m")
        shell.ask("cp /bin/busybox /m/made; cp /m/made /m/gone; sync")
        there = sha1(shell.ask("echo 3 > /proc/sys/vm/drop_caches; sha1sum /m/made"))
        shell.ask("rm /m/gone; fstrim /m; umount /m")
        whole = sha1(shell.ask("sha1sum /dev/vda"))
        shell.ask("mount -t ext4 -o ro /dev/vdb /m")
        assert sha1(shell.ask("sha1sum /m/kept")) == hashlib.sha1(KEPT).hexdigest()
        assert "1" in shell.ask("cat /sys/block/vdb/ro").splitlines()
        assert "error" not in shell.ask("dmesg | grep -i vd[ab]").lower()
    check(image)
    assert kept.read_bytes() == before
    assert hashlib.sha1(image.read_bytes()).hexdigest() == whole
    assert hashlib.sha1(read(image, "/made")).hexdigest() == there


@needs_e2fsprogs
@EACH_WAY
def test_a_snapshot_amid_writes(how: How, image: Path, tmp_path: Path) -> None:
    """Taken while a file is being written; the restored machine finishes the job."""
    with linux("blk", how, path=str(image)) as shell:
        machine = shell.machine
        shell.ask(f"mkdir /m; mount -t ext4 /dev/vda /m; {MAKE_X}")
        machine.send(
            "for n in 1 2 3 4 5 6; do echo round $n; cp /x /m/$n; sync; done; sha1sum /x /m/*\r"
        )
        outcome = machine.run(until=b"round 3\r", timeout=100)
        assert outcome.ending is Ending.PAUSED, outcome
        machine.run(timeout=0.02)
        machine.snapshot(tmp_path / "early")
        assert machine.run(until=b"round 5\r", timeout=100).ending is Ending.PAUSED
        machine.snapshot(tmp_path / "late")

    def finish(machine: Machine) -> None:
        shell = Shell(machine)
        shell.wait()
        assert_seven_alike(machine)
        shell.ask("umount /m")

    for n in range(2):  # from an old disk, whatever became of the file since
        with Machine.restore(tmp_path / "early") as machine:
            finish(machine)
            machine.snapshot(tmp_path / f"end-{n}")
        check(tmp_path / f"end-{n}" / "disks" / "blk.path")
    with Machine.restore(tmp_path / "late", disks="original") as machine:
        finish(machine)
    check(image)


@EACH_WAY
def test_console(how: How, tmp_path: Path) -> None:
    """The only console of the machine, in both directions, and its second port."""
    log = tmp_path / "log"
    log.touch()
    with Machine(memory="256M", devices=()) as machine:
        machine.add_device("console", CONSOLE, **how, log=str(log), columns=100, rows=30)
        machine.boot(Path(DIRECTORY) / "vmlinuz", options(append="console=hvc0"))
        shell = Shell(machine)
        shell.wait()
        assert "hvc0" in shell.ask("cat /sys/class/tty/console/active").split()
        assert "a_b_c" in shell.ask("echo a-b-c | tr - _")
        shell.ask("echo to the port > /dev/vport0p1")
        assert "log" in shell.ask("cat /sys/class/virtio-ports/vport0p1/name")
        assert re.search("30 100|100 30", shell.ask("stty size < /dev/hvc0"))
        machine.adjust(CONSOLE, columns=132, rows=50)
        # The shell shows its prompt once more when its terminal changes.
        machine.send("until stty size < /dev/hvc0 | grep '50 13[2]'; do sleep 0.1; done\r")
        assert machine.run(until="50 132", timeout=60).ending is Ending.PAUSED
    assert log.read_bytes() == b"to the port\n"


@pytest.mark.parametrize("guest", ["in-process", "jailed"], indirect=True)
def test_balloon(guest: Shell) -> None:
    """What the guest gave is missing there, and comes back when it is asked for less."""
    machine = guest.machine

    def free_once_it_gave(pages: int) -> int:
        """KiB that are free in the guest."""
        end = monotonic() + 60
        while True:
            machine.suspend()
            given = machine.parts.wiring.attached["balloon"].snapshot()["actual"]
            if given == pages:
                break
            assert monotonic() < end, given
            guest.ask("sleep 0.1")
        found = re.search(r"MemFree: +(\d+) kB", guest.ask("grep MemFree /proc/meminfo"))
        assert found is not None
        return int(found[1])

    before = free_once_it_gave(8192)
    machine.adjust("balloon", pages=100)
    assert free_once_it_gave(100) - before > 3 * 8192, "most of 32 MiB"
    machine.adjust("balloon", pages=8192)
    free_once_it_gave(8192)


def test_a_panic_ends_the_run() -> None:
    with Machine(memory="256M") as machine:
        machine.add_device("pvpanic")
        shell = boot(machine, "quiet")
        machine.send("echo c > /proc/sysrq-trigger\r")
        outcome = machine.run(timeout=60)
        assert outcome.ending is Ending.PANICKED, shell
        assert "sysrq triggered crash" in outcome.detail
