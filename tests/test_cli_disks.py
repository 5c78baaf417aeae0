"""``--disk`` and ``[[disk]]``: what they stand for, and what is wrong with them in one line."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from cli_rig import given, run

from devices.errors import Subject, UserError
from vmm.cli.disks import disks
from vmm.cli.given import Places
from vmm.config import DeviceConfig, DmaMode

SECTOR = 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8 * SECTOR))
    return path


def test_a_disk_is_a_virtio_device() -> None:
    assert disks(given("disk", "a.img", "b.img,readonly,serial=x,queues=2,slot=7"), ["disk"]) == [
        DeviceConfig("disk-2", "blk", {"path": "a.img"}),
        DeviceConfig(
            "disk-3",
            "blk",
            {"path": "b.img", "readonly": "true", "serial": "x", "queues": "2"},
            slot="7",
        ),
    ]
    (direct,) = disks(given("disk", "a.img,direct"), [])
    assert direct.options == {"path": "a.img", "direct": "true"}
    (granted,) = disks(given("disk", "a.img,dma=granted"), [])
    assert granted.dma is DmaMode.GRANTED


def test_ide_disks_are_drives_of_one_controller() -> None:
    assert disks(given("disk", "a.img,if=ide,readonly", "b.img", "c.img,serial=x,if=ide"), []) == [
        DeviceConfig("disk", "blk", {"path": "b.img"}),
        DeviceConfig(
            "ide",
            "ata",
            {"disk0": "a.img", "readonly0": "true", "disk1": "c.img", "serial1": "x"},
        ),
    ]
    with pytest.raises(UserError, match=r"--disk e.img,if=ide: if=ide has room for 4 disks"):
        disks(given("disk", *(f"{name}.img,if=ide" for name in "abcdef")), [])


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("", "a disk needs a 'file'"),
        ("a.img,b", "'b' is not option=value"),
        ("a.img,if=floppy", "if=floppy is not one of virtio, ide"),
        ("a.img,file=b.img", "option 'file' is given twice"),
        ("a.img,cache=none", "a disk has no option 'cache'; it has file, if, readonly"),
        ("a.img,if=ide,dma=granted", "option 'dma' is for if=virtio alone"),
        ("a.img,queues=17", "queues is 1 to 16"),
        ("a.img,readonly=perhaps", "readonly=perhaps"),
        ("a.img,serial=a-serial-that-is-too-long", "serial is at most 20"),
        ("a.img,slot=two", "slot=two is not"),
        ("a.img,if=ide,queues=2", "option 'queues' is for if=virtio alone"),
        ("a.img,if=ide,serial=a-serial-that-is-too-long", "serial is at most 20"),
    ],
)
def test_what_is_wrong_with_one(text: str, about: str) -> None:
    with pytest.raises(UserError, match="--disk") as caught:
        disks(given("disk", text), [])
    assert about in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_guest_has_them(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "a disk, with a comma"
    other.write_bytes(bytes(SECTOR))
    config = tmp_path / "machine.toml"
    config.write_text(f'[[disk]]\nfile = "{other}"\nreadonly = true\nname = "second"\n')
    status, out, err = run("boot", "--json", "--config", str(config), "--disk", str(image))
    assert status == 0, err
    said = json.loads(out)["output"]
    assert said.count("1af4:1042 class 018000") == 2
    status, out, err = run("boot", "--json", "--disk", f"{image},if=ide")
    assert "8086:7010 class 010180" in json.loads(out)["output"]


@pytest.mark.parametrize(
    ("table", "line", "about"),
    [
        ('if = "virtio"\n', 1, "a disk needs a 'file'"),
        ('file = "a.img"\nfiel = 3\n', 3, "a disk has no option 'fiel'"),
        ('file = "a.img"\nqueues = 17\n', 3, "queues is 1 to 16"),
        ('file = "a.img"\n\nif = "scsi"\n', 4, "if=scsi is not one of"),
        ("file = 3\n", 2, "a disk needs a 'file'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    tmp_path: Path, table: str, line: int, about: str
) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(f"[[disk]]\n{table}")
    status, _, err = run("boot", "--config", str(config))
    assert status == 2
    assert f"config {config}: line {line}: " in err.decode()
    assert about in err.decode()
    assert len(err.splitlines()) == 1


def refused(*arguments: str) -> str:
    status, _, err = run("boot", *arguments)
    assert status == 2, err
    (line,) = err.decode().splitlines()
    return line


def test_files_that_cannot_be_disks(image: Path, tmp_path: Path) -> None:
    assert "No such file or directory" in refused("--disk", str(tmp_path / "gone"))
    assert "is neither a file nor a block device" in refused("--disk", "/dev/null")
    assert f"file={image}: is given twice: device 'disk' has it, too" in refused(
        *("--disk", str(image), "--disk", str(image))
    )
    assert "/proc/cpuinfo: has no size, so it is no image" in refused(
        "--disk", "/proc/cpuinfo,readonly"
    )
    os.truncate(image, 0)
    assert "is empty" in refused("--disk", str(image))
    os.truncate(image, SECTOR + 1)
    assert "has 513 bytes, which is no multiple of 512" in refused("--disk", str(image))


def test_a_disk_twice_is_told_from_one_of_another_machine(image: Path) -> None:
    ide = f"{image},if=ide"
    assert "is given twice: device 'ide' has it, too" in refused("--disk", ide, "--disk", ide)
    device = f"blk,path={image},readonly=true"
    said = refused("--device", device, "--disk", ide)
    assert "is given twice: device 'blk' has it, too" in said
    assert run("boot", "--device", device, "--disk", f"{image},readonly")[0] == 0


def test_what_is_known_late_is_told_in_the_users_words() -> None:
    """Root may do everything, so the permission itself cannot be missed here."""
    places = Places()
    disks(given("disk", "a.img,if=ide", "b.img,if=ide"), [], places)
    problem = "device 'ide': disk1=b.img: no; give readonly1=true"
    with pytest.raises(UserError) as caught, places.named():
        raise UserError(problem, Subject("disk1", "ide"))
    assert str(caught.value) == "device 'ide': file=b.img: no; give readonly=true"


@pytest.mark.skipif(not os.getuid(), reason="root may do everything")
def test_a_file_without_permission(image: Path) -> None:
    image.chmod(0o400)
    for interface in ("virtio", "ide"):
        said = refused("--disk", f"{image},if={interface}")
        assert f"file={image}: Permission denied; it can be read: give readonly=true" in said
    image.chmod(0)
    assert refused("--disk", str(image)).endswith("Permission denied")


def test_readers_share_a_disk(image: Path) -> None:
    with image.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "is in use by another machine" in refused("--disk", str(image))
        status, _, err = run("boot", "--disk", f"{image},readonly", "--disk", f"{image},readonly")
        assert status == 0, err


# Nothing is lost by a start that is refused.


def test_a_log_is_kept_until_the_guest_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"of a run before")
    console = ["--device", f"console,log={log}"]
    assert run("boot", "hello", *console, "--disk", str(tmp_path / "none"))[0] == 2
    assert run("jail", *console)[0] == 0
    assert log.read_bytes() == b"of a run before"
    assert run("boot", "hello", *console)[0] == 0
    assert log.read_bytes() == b""


@pytest.mark.parametrize("option", ["--serial", "--debug-console"])
def test_output_does_not_go_to_a_disk(image: Path, option: str) -> None:
    image.write_bytes(b"data" * SECTOR)
    status, _, errors = run("boot", "hello", "--disk", str(image), option, f"file:{image}")
    assert status == 2
    assert f"{option} file:{image}: device 'disk' has that file, too".encode() in errors
    assert image.read_bytes() == b"data" * SECTOR


def test_a_log_is_no_disk(image: Path) -> None:
    image.write_bytes(b"data" * SECTOR)
    words = [["--disk", str(image)], ["--device", f"console,log={image}"]]
    for first, second in (words, words[::-1]):
        status, _, errors = run("boot", "hello", *first, *second)
        assert status == 2
        assert b"is given twice" in errors
        assert image.read_bytes() == b"data" * SECTOR
    consoles = ("--device", "console,name=a,log=x", "--device", "console,name=b,log=x")
    status, _, errors = run("boot", "hello", *consoles, cwd=image.parent)
    assert status == 2
    assert b"is given twice: device 'a' has it, too" in errors


def test_a_device_has_words_that_stand_alone() -> None:
    """What is true or false, as of a disk."""
    (device,) = given("device", "9p,path=a,readonly")
    assert device.values == {"model": "9p", "path": "a", "readonly": "true"}
    with pytest.raises(UserError, match="'path' is not option=value"):
        given("device", "9p,path")
    with pytest.raises(UserError, match="'x' is not option=value"):
        given("device", "nonsense,x")
