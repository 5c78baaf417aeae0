"""Linux as the driver: a stock kernel with its own virtio modules, see `test_linux`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_linux import DIRECTORY, Shell, boot, options

from vmm.config import CONSOLE
from vmm.machine import Machine
from vmm.outcome import Ending

MKFS = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
FSCK = shutil.which("e2fsck", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR",
    ),
    pytest.mark.timeout(400),
]
needs_e2fsprogs = pytest.mark.skipif(not (MKFS and FSCK), reason="NO E2FSPROGS: install it")
How = dict[str, Any]
IN_PROCESS: How = {"isolated": False}
EITHER_WAY = pytest.mark.parametrize("how", [IN_PROCESS, {}], ids=["in-process", "jailed"])
EACH_WAY = pytest.mark.parametrize(
    "how", [IN_PROCESS, {}, {"dma": "granted"}], ids=["in-process", "jailed", "granted"]
)


@contextmanager
def linux(model: str, how: How, append: str = "quiet", **options: Any) -> Iterator[Shell]:
    with Machine(memory="256M") as machine:
        machine.add_device(model, **how, **options)
        yield boot(machine, append)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 64 << 20)
    assert MKFS is not None
    subprocess.run([MKFS, "-q", "-F", path], check=True, timeout=60)
    return path


def check(image: Path) -> None:
    """The host's own opinion of the file system, without mending it."""
    assert FSCK is not None
    done = subprocess.run(
        [FSCK, "-fn", image], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def sha1(text: str) -> str:
    found = re.search(r"\b[0-9a-f]{40}\b", text)
    assert found, text
    return found[0]


@EACH_WAY
def test_hwrng(how: How) -> None:
    with linux("rng", how) as shell:
        assert "virtio_rng.0" in shell.ask("cat /sys/class/misc/hw_random/rng_current")
        first, second = (
            sha1(shell.ask("dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sha1sum"))
            for _ in range(2)
        )
        assert first != second


@pytest.mark.parametrize("append", ["quiet", "quiet pci=nomsi"], ids=["msi-x", "intx"])
def test_interrupts(append: str) -> None:
    with linux("rng", IN_PROCESS, append) as shell:
        shell.ask("dd if=/dev/hwrng of=/dev/null bs=512 count=2")
        lines = shell.ask("cat /proc/interrupts")
        kind = "PCI-MSI" if append == "quiet" else "IO-APIC"
        (line,) = [line for line in lines.splitlines() if re.search(r"virtio0(-input)?\r?$", line)]
        assert kind in line
        assert int(line.split()[1]) > 0


@needs_e2fsprogs
@EACH_WAY
def test_ext4_on_a_disk(how: How, image: Path) -> None:
    with linux("blk", how, path=str(image), serial="a-disk") as shell:
        assert "a-disk" in shell.ask("cat /sys/block/vda/serial")
        shell.ask("mkdir /m; mount -t ext4 /dev/vda /m")
        shell.ask("dd if=/dev/urandom of=/m/kept bs=1M count=4; cp /m/kept /m/gone; sync")
        there = sha1(shell.ask("echo 3 > /proc/sys/vm/drop_caches; sha1sum /m/kept"))
        shell.ask("rm /m/gone; fstrim /m; umount /m")
        whole = sha1(shell.ask("sha1sum /dev/vda"))
        assert "error" not in shell.ask("dmesg | grep -i vda").lower()
    check(image)
    assert hashlib.sha1(image.read_bytes()).hexdigest() == whole
    with linux("blk", how, path=str(image), readonly=True) as shell:
        shell.ask("mkdir /m; mount -t ext4 -o ro /dev/vda /m")
        assert sha1(shell.ask("sha1sum /m/kept")) == there
        assert "1" in shell.ask("cat /sys/block/vda/ro").splitlines()
    check(image)


@needs_e2fsprogs
@EACH_WAY
def test_a_snapshot_amid_writes(how: How, image: Path, tmp_path: Path) -> None:
    """Taken while a file is being written; the restored machine finishes the job."""
    with linux("blk", how, path=str(image)) as shell:
        machine = shell.machine
        shell.ask("mkdir /m; mount -t ext4 /dev/vda /m; dd if=/dev/urandom of=/x bs=1M count=8")
        machine.send(
            "for n in 1 2 3 4 5 6; do echo round $n; cp /x /m/$n; sync; done; sha1sum /x /m/*\r"
        )
        outcome = machine.run(until=b"round 3\r", timeout=100)
        assert outcome.ending is Ending.PAUSED, outcome
        machine.run(timeout=0.05)
        machine.snapshot(tmp_path / "early")
        assert machine.run(until=b"round 5\r", timeout=100).ending is Ending.PAUSED
        machine.snapshot(tmp_path / "late")

    def finish(machine: Machine) -> None:
        shell = Shell(machine)
        shell.wait()
        sums = set(re.findall(r"\b[0-9a-f]{40}\b", shell.ask("sha1sum /x /m/*")))
        assert len(sums) == 1
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
def test_console_ports(how: How, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with linux("console", how, log=str(log), columns=100, rows=30) as shell:
        shell.ask("echo to the port > /dev/vport0p1")
        assert "log" in shell.ask("cat /sys/class/virtio-ports/vport0p1/name")
        assert re.search("30 100|100 30", shell.ask("stty size < /dev/hvc0"))
        shell.machine.adjust("console", columns=132, rows=50)
        assert re.search("50 132", shell.ask("stty size < /dev/hvc0"))
    assert log.read_bytes() == b"to the port\n"


@EACH_WAY
def test_console_hvc0(how: How) -> None:
    """The only console of the machine, in both directions."""
    with Machine(memory="256M", devices=()) as machine:
        machine.add_device("console", CONSOLE, **how)
        machine.boot(Path(DIRECTORY) / "vmlinuz", options(append="console=hvc0"))
        shell = Shell(machine)
        shell.wait()
        assert "hvc0" in shell.ask("cat /sys/class/tty/console/active").split()
        assert "a_b_c" in shell.ask("echo a-b-c | tr - _")


@EITHER_WAY
def test_balloon(how: How) -> None:
    """What the guest gave is missing there, and comes back when it is asked for less."""

    def free() -> int:
        found = re.search(r"MemFree: +(\d+) kB", shell.ask("sleep 2; grep MemFree /proc/meminfo"))
        assert found is not None
        return int(found[1])

    def given() -> Any:
        shell.machine.suspend()
        return shell.machine.parts.wiring.attached["balloon"].snapshot()["actual"]

    with linux("balloon", how, pages=8192) as shell:
        before = free()
        assert given() == 8192
        shell.machine.adjust("balloon", pages=100)
        assert free() - before > 3 * 8192, "most of 32 MiB"
        assert given() == 100


def test_a_panic_ends_the_run() -> None:
    with Machine(memory="256M") as machine:
        machine.add_device("pvpanic")
        shell = boot(machine, "quiet")
        machine.send("echo c > /proc/sysrq-trigger\r")
        outcome = machine.run(timeout=60)
        assert outcome.ending is Ending.PANICKED, shell
        assert "sysrq triggered crash" in outcome.detail
