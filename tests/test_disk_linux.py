"""Linux on disks: its ATA driver, and a root file system, see `test_linux`."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from pathlib import Path

import pytest
from test_linux import DIRECTORY, MAKE_X, Shell, boot, options
from test_virtio_linux import (
    KEPT,
    MKFS,
    assert_seven_alike,
    check,
    image,
    kept,
    needs_e2fsprogs,
    read,
    sha1,
)

from vmm.machine import Machine
from vmm.outcome import Ending

__all__ = ["image", "kept"]

EITHER_WAY = pytest.mark.parametrize("isolated", [False, True], ids=["in-process", "jailed"])
pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR",
    ),
    needs_e2fsprogs,
    pytest.mark.timeout(400),
]

WAIT = "for n in 1 2 3 4 5 6 7 8 9; do [ -b /dev/sda ] && break; sleep 0.5; done"
FIND_BOTH = (
    "for n in 1 2 3 4 5 6 7 8 9; do "
    "D=$(findfs LABEL=image) && K=$(findfs LABEL=kept) && break; sleep 0.5; done"
)
"""Which of them Linux finds first is left to chance."""
INIT = """\
#!/bin/sh
mount -t proc proc /proc
echo "this is the init of the disk, $(cat /etc/name)"
mount -o remount,rw /
echo written >/new
sh </dev/console >/dev/console 2>&1
mount -o remount,ro /
poweroff -f
"""


@EITHER_WAY
@pytest.mark.parametrize("append", ["quiet", "quiet libata.dma=0"], ids=["dma", "pio"])
def test_ext4_on_an_ide_disk(isolated: bool, append: str, image: Path, kept: Path) -> None:
    before = kept.read_bytes()
    with Machine(memory="256M") as machine:
        disks = {"disk0": str(image), "disk3": str(kept)}
        machine.add_device("ata", isolated=isolated, serial0="a-disk", readonly3=True, **disks)
        shell = boot(machine, append)
        found = shell.ask(f"{FIND_BOTH}; dmesg | grep ata1.00:")
        assert "ATA-6: JAILED-VMM ATA DISK" in found
        mode = "MW_DMA" if append == "quiet" else "PIO"
        assert f"XFER_{mode}" in shell.ask("cat /sys/class/ata_device/dev1.0/xfer_mode")
        shell.ask("mkdir /m; mount -t ext4 $D /m")
        shell.ask("dd if=/bin/busybox of=/m/made bs=256k count=1; sync")
        there = sha1(shell.ask("echo 3 > /proc/sys/vm/drop_caches; sha1sum /m/made"))
        shell.ask("umount /m")
        first = sha1(shell.ask("dd if=$D bs=64k count=8 2>/dev/null | sha1sum"))
        assert "ata1" not in shell.ask("dmesg | grep -iE 'ata1.*(err|exc|reset|fail)'")[80:]
        shell.ask("mount -t ext4 -o ro $K /m")
        assert sha1(shell.ask("sha1sum /m/kept")) == hashlib.sha1(KEPT).hexdigest()
    check(image)
    assert kept.read_bytes() == before
    assert hashlib.sha1(read(image, "/made")).hexdigest() == there
    with image.open("rb") as file:
        assert hashlib.sha1(file.read(512 << 10)).hexdigest() == first


@EITHER_WAY
def test_a_snapshot_amid_dma(isolated: bool, image: Path, tmp_path: Path) -> None:
    """Taken while a file is being written; the restored machine finishes the job."""
    with Machine(memory="256M") as machine:
        machine.add_device("ata", isolated=isolated, disk0=str(image))
        shell = boot(machine, "quiet")
        shell.ask(f"{WAIT}; mkdir /m; mount -t ext4 /dev/sda /m")
        shell.ask(MAKE_X)
        machine.send(
            "for n in 1 2 3 4 5 6; do echo round $n; cp /x /m/$n; sync; done; sha1sum /x /m/*\r"
        )
        outcome = machine.run(until=b"round 3\r", timeout=100)
        assert outcome.ending is Ending.PAUSED, outcome
        machine.run(timeout=0.02)
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved", disks="original") as machine:
        shell = Shell(machine)
        shell.wait()
        assert_seven_alike(machine)
        shell.ask("umount /m")
    check(image)


def busybox() -> bytes:
    """The program in the initramfs (the newc format, see `guests.cpio`)."""
    archive = gzip.decompress((Path(DIRECTORY) / "initramfs.cpio.gz").read_bytes())
    name = b"bin/busybox\0"
    at = archive.index(name) - 110
    assert archive[at : at + 6] == b"070701"
    size, name_size = (int(archive[at + n : at + n + 8], 16) for n in (54, 94))
    start = at + (110 + name_size + 3) // 4 * 4
    return archive[start : start + size]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system, made without root."""
    tree, path = tmp_path / "tree", tmp_path / "root.img"
    for name in ("bin", "sbin", "dev", "proc", "sys", "etc", "tmp"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(busybox())
    for name in ("sh", "mount", "cat", "poweroff", "df", "grep"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "sbin/init").write_text(INIT)
    (tree / "etc/name").write_text("root.img\n")
    for name in ("bin/busybox", "sbin/init"):
        (tree / name).chmod(0o755)
    assert MKFS is not None
    subprocess.run(
        [MKFS, "-q", "-L", "thedisk", "-d", tree, path, "16M"],
        check=True,
        timeout=60,
    )
    return path


@pytest.mark.parametrize(
    ("model", "option", "name"),
    [("blk", "path", "/dev/vda"), ("ata", "disk0", "LABEL=thedisk")],
)
def test_the_root_file_system_on_a_disk(root: Path, model: str, option: str, name: str) -> None:
    with Machine(memory="256M") as machine:
        machine.add_device(model, **{option: str(root)})
        machine.boot(Path(DIRECTORY) / "vmlinuz", options(f"quiet root={name} rootfstype=ext4"))
        shell = Shell(machine)
        assert "this is the init of the disk, root.img" in shell.wait()
        assert " / ext4 rw" in shell.ask("grep ' / ' /proc/mounts")
        machine.send("exit\r")
        assert machine.run(timeout=60).ending is Ending.POWERED_OFF, machine.output[-2000:]
    check(root)
    assert read(root, "/new") == b"written\n"


def test_a_root_that_is_not_there_leaves_a_shell() -> None:
    # With this clock nobody waits for a disk that does not come: idle time is skipped.
    with Machine(memory="256M", clock="virtual") as machine:
        shell = boot(machine, "quiet root=/dev/vdz")
        assert "no root file system on /dev/vdz" in machine.output.decode()
        assert "linux-guest" in shell.ask("grep READY /init; grep -c 'linux-guest: ready' /init")
