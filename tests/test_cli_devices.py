"""The command line when devices fail, hang, refuse or talk too much; and what it will not take."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from cli_rig import READ_E00, READ_E00_FOR_EVER, environment, faulty, finish, run, start

from vmm.log_limit import PER_SECOND, LogLimit


@pytest.fixture
def read(tmp_path: Path) -> str:
    """A guest that reads port 0xE00 once and exits with status 1."""
    (tmp_path / "read.bin").write_bytes(READ_E00)
    return str(tmp_path / "read.bin")


def test_a_failed_device_ends_the_run(tmp_path: Path, read: str) -> None:
    status, _, err = run("boot", read, "--device", "faulty:Dies,name=it", env=faulty(tmp_path))
    assert status == 6
    assert b"it" in err


def test_on_failure_isolate_goes_on(tmp_path: Path, read: str) -> None:
    status, _, err = run(
        *("boot", read, "--device", "faulty:Dies,name=it", "--on-failure", "isolate"),
        env=faulty(tmp_path),
    )
    assert status == 1
    assert b"vmm: it: " in err


def test_the_socket_lane_alone() -> None:
    status, out, _ = run("boot", "echo", "--lane", "socket", "--stats", "--json")
    assert status == 1
    process = json.loads(out)["stats"]["devices"]["echo"]["process"]
    assert process["tube_accesses"] > 0
    assert process["lane_accesses"] == 0


def test_a_short_deadline_ends_a_hang(tmp_path: Path, read: str) -> None:
    status, _, err = run(
        *("boot", read, "--device", "faulty:Hangs", "--deadline", "0.5"), env=faulty(tmp_path)
    )
    assert status == 6
    assert b"0.5 s" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_a_device_hangs(tmp_path: Path, read: str, number: signal.Signals) -> None:
    """The device is given up long before its deadline, and is not what the run ends with."""
    process = start(
        *("boot", read, "--device", "faulty:Hangs", "--deadline", "3600"), env=faulty(tmp_path)
    )
    assert process.stderr is not None
    while b"from now on I hang" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    status, _, err = finish(process, 30)
    assert status == 130
    assert b"vmm: hangs: did not answer, and the run is to end (during Read)" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize("lane", ["auto", "socket"])
def test_a_time_out_while_a_device_hangs(tmp_path: Path, read: str, lane: str) -> None:
    status, _, err = run(
        *("boot", read, "--device", "faulty:Hangs", "--deadline", "3600", "--timeout", "1"),
        *("--lane", lane),
        env=faulty(tmp_path),
    )
    assert status == 8
    assert b"vmm: hangs: did not answer, and the run is to end (during Read)" in err
    assert b"Traceback" not in err


def test_a_time_out_while_a_device_hangs_on_its_lane(tmp_path: Path) -> None:
    """A guest that reads all the time has the lane open where there is a CPU for it."""
    image = tmp_path / "reads.bin"
    image.write_bytes(READ_E00_FOR_EVER)
    status, _, _ = run(
        *("boot", str(image), "--device", "faulty:HangsLater", "--deadline", "3600"),
        *("--timeout", "1"),
        env=faulty(tmp_path),
    )
    assert status == 8


def test_a_strict_jail_or_none() -> None:
    status, out, err = run("boot", "hello", "--jail", "strict")
    if status == 10:
        assert b"jail" in err
        assert out == b""
    else:
        assert (status, out) == (0, b"Hello from the guest!\n")


def test_log_lines_of_devices_are_on_standard_error(tmp_path: Path, read: str) -> None:
    status, out, err = run("boot", read, "--device", "faulty:Says,name=it", env=faulty(tmp_path))
    assert (status, out) == (1, b"")
    assert b"vmm: it: somebody reads me\r\n" in err


# Too many lines.


def test_a_device_that_talks_too_much_is_cut(tmp_path: Path) -> None:
    (tmp_path / "again.bin").write_bytes(READ_E00_FOR_EVER)
    status, _, err = run(
        *("boot", f"{tmp_path}/again.bin", "--device", "faulty:Talks,name=it", "--timeout", "2"),
        env=faulty(tmp_path),
    )
    assert status == 8
    lines = err.splitlines()
    assert b"vmm: it: line 0" in lines
    assert 20 < len(lines) < 20 * PER_SECOND
    assert any(b"dropped" in line for line in lines)


def test_a_failure_is_told_however_much_was_said_before(tmp_path: Path, read: str) -> None:
    status, _, err = run(
        *("boot", read, "--device", "faulty:LastWords,name=it", "--on-failure", "isolate"),
        env=faulty(tmp_path),
    )
    assert status == 1
    assert b"vmm: it: line 0\r\n" in err
    assert b"vmm: it: line 299\r\n" not in err
    assert b"status 3" in err


def test_the_log_limit() -> None:
    now = 100.0
    limit = LogLimit(lambda: now)
    for number in range(PER_SECOND):
        assert limit.lines("a", f"{number}") == [f"{number}"]
    assert limit.lines("a", "more") == []
    assert limit.lines("a", "and more") == []
    assert limit.lines("b", "another device") == ["another device"]
    now = 101.5
    assert limit.lines("a", "late") == ["2 lines were dropped", "late"]
    for number in range(PER_SECOND - 1):
        assert limit.lines("a", f"{number}") == [f"{number}"]
    assert limit.lines("a", "more") == []
    assert limit.rest() == [("a", "1 line was dropped")]
    assert limit.rest() == []


# What is refused, in one line.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["boot", ""], "the name of the image is empty"),
        (["boot", "."], "is a directory"),
        (["boot", "no-such-file"], "no built-in guest"),
        (["boot", "/dev/zero"], "more than"),
        (["boot", "hello", "--initrd", "/dev/zero"], "more than"),
        (["boot", "hello", "--snapshot-then", "quit"], "--snapshot-at"),
        (["boot", "hello", "--deadline", "3601"], "3600"),
        (["boot", "hello", "--deadline", "1e10"], "3600"),
        (["boot", "hello", "--timeout", "inf"], "not a number of seconds above zero"),
        (["boot", "hello", "--timeout", "soon"], "not a number of seconds above zero"),
    ],
)
def test_wrong_usage(arguments: list[str], complaint: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, b"")
    assert err.count(b"\n") == 1, err
    assert complaint in err.decode()


def test_a_bad_place_for_a_snapshot_is_told_before_the_guest_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "notes").write_text("precious")
    for place, complaint in (
        ("none/saved", "No such file or directory"),
        ("file", "exists and is not a snapshot"),
        ("file/saved", "Not a directory"),
        ("project", "exists and is not a snapshot"),
        ("/proc/saved", "No such file or directory"),
    ):
        for when in (["--snapshot-at", "end"], []):
            status, out, err = run(
                *("boot", "hello", "--snapshot", place, *when), cwd=tmp_path, env=environment()
            )
            assert (status, out) == (2, b""), place
            assert err.count(b"\n") == 1, err
            assert complaint in err.decode()
            assert err.startswith(b"vmm: snapshot ")
    assert sorted(os.listdir(tmp_path)) == ["file", "project"]
    # The place of the escape menu, which nobody asked for, is no reason to refuse.
    (tmp_path / "vmm-snapshot").write_text("precious")
    status, out, _ = run("boot", "hello", cwd=tmp_path, env=environment())
    assert (status, out) == (0, b"Hello from the guest!\n")


def test_disks_in_snapshots(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"disk" * 1024)
    boot = ["boot", "hello", "--device", "blk,path=disk.img", "--snapshot-at", "end"]
    for keeping, line in (
        ("copy", b"vmm: disk blk.path: 0.0 MiB copied in "),
        ("none", b"vmm: disk blk.path: left out; a restore needs disk.img as it is now\n"),
    ):
        more = ["--snapshot", keeping, "--snapshot-disks", keeping]
        status, _, err = run(*boot, *more, cwd=tmp_path, env=environment())
        assert status == 0
        # A host that clones says "cloned".
        assert line.split(b"0.0")[0] in err.replace(b"\r", b""), err
        for how, note in (("private", True), ("original", False)):
            status, _, err = run("restore", keeping, "--disks", how, cwd=tmp_path)
            assert status == 0, err
            assert (b"ends with this machine" in err) == note
    (tmp_path / "disk.img").touch()
    for arguments in (["none"], ["copy", "--disks", "original"]):
        status, _, err = run("restore", *arguments, cwd=tmp_path)
        assert status == 2
        assert err.count(b"\n") == 1, err
        assert b"path=disk.img: has changed since the snapshot" in err
    assert run("restore", "copy", cwd=tmp_path)[0] == 0


@pytest.mark.parametrize("seconds", ["3e6", "1e10", "1e300"])
def test_long_times(seconds: str) -> None:
    status, out, err = run("boot", "hello", "--timeout", seconds, "--snapshot-at", "1e300")
    assert (status, out) == (0, b"Hello from the guest!\n")
    assert b"Traceback" not in err
    process = start("boot", "serial-echo", "--timeout", seconds)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130


@pytest.mark.parametrize("when", ["never printed", "1000"])
def test_a_snapshot_that_never_came_is_told(tmp_path: Path, when: str) -> None:
    status, _, err = run("boot", "hello", "--snapshot-at", when, cwd=tmp_path, env=environment())
    assert status == 0
    assert b"no snapshot was taken" in err
    assert not (tmp_path / "vmm-snapshot").exists()
    status, out, err = run("boot", "hello", "--snapshot-at", when, "--json", cwd=tmp_path)
    assert err == b""
    assert json.loads(out)["snapshot"] is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_before_the_guest_runs(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\n"
        "from devices.contract import Device\n"
        "print('here', flush=True)\n"
        "time.sleep(30)\n"
        "class Slow(Device):\n"
        "    model = 'slow'\n"
    )
    process = start(
        *("boot", "hello", "--device", "slow:Slow,isolation=none"), env=environment(tmp_path)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 130
    assert b"Traceback" not in err
