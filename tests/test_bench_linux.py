"""The benchmarks with a Linux guest; what they measure is not asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from test_linux import DIRECTORY

from devices.errors import UserError
from vmm.bench import linux, linux_disk, linux_idle

needs_linux = pytest.mark.skipif(
    not DIRECTORY, reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR"
)

GUEST = """
import sys
for line in iter(sys.stdin.buffer.readline, b""):
    line = line.strip().decode()
    print(line, end="\\r\\n", flush=True)  # the echo
    for command in line.split("; "):
        word, _, rest = command.partition(" ")
        if word == "echo":
            print(rest.replace("''", ""), end="\\r\\n", flush=True)
        elif word == "end":
            sys.exit("it is over")
"""


def shell() -> linux.Shell:
    return linux.Shell([sys.executable, "-c", GUEST])


def test_text_behind_what_was_waited_for_is_kept() -> None:
    with closing(shell()) as guest:
        assert guest._process.stdin is not None
        os.write(guest._process.stdin.fileno(), b"echo one; echo two; echo three\n")
        guest.wait_for(b"\none\r\n")
        guest.wait_for(b"three\r\n")
        os.write(guest._process.stdin.fileno(), b"end\n")
        with pytest.raises(UserError, match="it is over"):
            guest.wait_for(b"two\r\n")


def test_a_family() -> None:
    """Children and theirs, and what they use."""
    code = "import subprocess as s, sys; s.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        while len(family := linux_idle._family(os.getpid())) < 3 or child.pid not in family:
            assert child.poll() is None
        assert family[0] == os.getpid()
        assert len(linux_idle._family(child.pid)) == 2
        assert linux_idle._cpu_seconds([os.getpid()]) > 0
        child.communicate(b"\n")
    assert linux_idle._cpu_seconds([child.pid]) == 0


@needs_linux
def test_an_idle_machine_has_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_idle, "SETTLE", 0.0)
    monkeypatch.setattr(linux_idle, "SECONDS", 0.5)
    assert linux_idle.measure(Path(DIRECTORY)) >= 0
    words = " ".join(linux_idle.command(Path(DIRECTORY), tmp_path))
    for device in ("if=ide", "--net", "rng", "console", "balloon", "pvpanic", "9p", "vsock"):
        assert device in words


@needs_linux
def test_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "QEMU", "not-there")
    monkeypatch.setattr(linux_disk, "WORK", {"sequential read": linux_disk.WORK["sequential read"]})
    figures = linux_disk.measure(Path(DIRECTORY))
    assert figures.keys() == {"vmm sequential read"}
    assert figures["vmm sequential read"] > 0
