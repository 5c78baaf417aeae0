"""Commands in processes of their own, with what stands around them: pipes, faulty devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vmm.cli.given import Given, read_words

VMM = [sys.executable, "-m", "vmm"]
ROOT = str(Path(__file__).resolve().parent.parent)

FLOOD = bytes.fromhex("66ba f803 b041 ee ebfd")
"""mov dx,0x3f8; mov al,'A'; l: out dx,al; jmp l"""
READ_E00 = bytes.fromhex("66ba 000e ed 90 66ba f400 b000 ee f4")
"""mov dx,0xe00; in eax,dx; nop; mov dx,0xf4; mov al,0; out dx,al; hlt"""
READ_E00_FOR_EVER = bytes.fromhex("66ba 000e ed ebfd")
"""mov dx,0xe00; l: in eax,dx; jmp l"""

FAULTY = """
import os, time
from devices.bus import BusType
from devices.contract import Device, Region

class Base(Device):
    model = "faulty"
    def regions(self):
        return (Region("r", BusType.PIO, 8, start=0xE00),)

class Hangs(Base):
    def read(self, offset, size):
        self.host.log("from now on I hang")
        while True:
            pass

class HangsLater(Base):
    reads = 0
    def read(self, offset, size):
        self.reads += 1
        while self.reads > 5000:
            pass
        return 0

class Dies(Base):
    def read(self, offset, size):
        os._exit(3)

class WillNotSleep(Base):
    def sleep(self):
        raise RuntimeError("no sleep tonight")

class WillNotWake(Base):
    naps = 0
    def wake(self):
        raise RuntimeError("too early")

class Escapes(Base):
    def read(self, offset, size):
        self.host.log("one\\x1b[2J two\\nvmm: three" + "z" * 20000)
        raise RuntimeError("\\x1b]0;title\\x07 boo")

class Talks(Base):
    def read(self, offset, size):
        for number in range(300):
            self.host.log(f"line {number}")
        return 5

class LastWords(Talks):
    def read(self, offset, size):
        super().read(offset, size)
        os._exit(3)

class Says(Base):
    def read(self, offset, size):
        self.host.log("somebody reads me")
        return 5
"""


def given(option: str, *texts: str) -> list[Given]:
    """What a user gave on the command line, as the command has it."""
    return [read_words(option, text) for text in texts]


def environment(*places: Path) -> dict[str, str]:
    """The environment of a command that finds this code, and modules in `places`."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *map(str, places)])}


def faulty(where: Path) -> dict[str, str]:
    """Put the module ``faulty`` into `where`; the environment in which it is found."""
    (where / "faulty.py").write_text(FAULTY)
    return environment(where)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A command that runs while the test goes on; without input unless told."""
    settings: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": environment(),
    }
    return subprocess.Popen([*VMM, *arguments], **settings | options)


def finish(process: subprocess.Popen[bytes], timeout: float = 60) -> tuple[int, bytes, bytes]:
    """Wait for the end: status, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out or b"", err or b""


def run(*arguments: str, **options: Any) -> tuple[int, bytes, bytes]:
    """One command from start to end."""
    return finish(start(*arguments, **options))
