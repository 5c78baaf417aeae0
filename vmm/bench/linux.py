"""Linux: to the shell prompt and at work, ours beside QEMU's TCG in the same rounds.

Both are processes of their own that are driven through pipes, so a figure is wall time as a user
has it, from the command to the prompt.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from devices.errors import UserError

QEMU = "qemu-system-x86_64"
PROMPT = b"/ # "
WORK = {
    "100 fork+exec": "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done",
    "shell loop of 20,000": "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done",
    "sha256 of 32 MiB": "dd if=/dev/zero bs=1M count=32 2>/dev/null | sha256sum >/dev/null",
    "gzip of 4 MiB": "dd if=/bin/busybox bs=1M count=4 2>/dev/null | gzip >/dev/null",
}
_LIMIT = 300.0


def commands(directory: Path) -> dict[str, list[str]]:
    """How each is started; QEMU only where it is installed.

    Raises:
        UserError: there is no Linux guest in `directory`.
    """
    kernel, initrd = directory / "vmlinuz", directory / "initramfs.cpio.gz"
    for file in (kernel, initrd):
        if not file.is_file():
            raise UserError(f"{file} is not there; run: python -m guests.linux {directory}")
    ours = [sys.executable, "-m", "vmm", "boot", str(kernel), "--initrd", str(initrd)]
    ours += ["--append", "console=ttyS0", "--mem", "256M"]
    found = {"vmm": ours}
    if shutil.which(QEMU):
        qemu = [QEMU, "-accel", "tcg", "-m", "256", "-nographic", "-no-reboot"]
        found["qemu"] = [
            *qemu, "-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0"
        ]  # fmt: skip
    return found


class Shell:
    """A guest's shell behind two pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self.began = monotonic()
        self._seen = b""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, text: bytes) -> None:
        """Read until `text` was printed; what comes behind it stays for the next time.

        Raises:
            UserError: it does not come, or the process ends before.
        """
        assert self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), monotonic() + _LIMIT
        while text not in self._seen:
            if not select.select([descriptor], [], [], max(end - monotonic(), 0))[0]:
                raise UserError(f"no {text!r} within {_LIMIT:g} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise UserError(f"the guest ended before {text!r}: {self._seen[-200:]!r}")
            self._seen += data
        self._seen = self._seen.partition(text)[2]

    def seconds_for(self, command: str) -> float:
        """Wall time of a command in the guest, without the typing of it.

        A shell that prints its prompt while somebody types already may sleep (busybox: 20 ms).
        """
        assert self._process.stdin is not None
        # Neither the echo of what is typed nor a line of the kernel must look like the answer.
        line = f"echo bench: be''gin; {command}; echo bench: do''ne\r"
        os.write(self._process.stdin.fileno(), line.encode())
        self.wait_for(b"bench: begin\r\n")
        began = monotonic()
        self.wait_for(b"bench: done\r\n")
        return monotonic() - began

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def round_of(name: str, command: Sequence[str]) -> dict[str, float]:
    """Seconds to the prompt, and for each piece of work."""
    shell = Shell(command)
    try:
        shell.wait_for(PROMPT)
        figures = {f"{name} prompt": monotonic() - shell.began}
        for what, work in WORK.items():
            figures[f"{name} {what}"] = shell.seconds_for(work)
        return figures
    finally:
        shell.close()


def measure(directory: Path) -> dict[str, float]:
    """One round of everything there is; with QEMU also the ratios."""
    figures: dict[str, float] = {}
    for name, command in commands(directory).items():
        figures |= round_of(name, command)
    if "qemu prompt" in figures:
        for what in ("prompt", *WORK):
            figures[f"ratio {what}"] = figures[f"vmm {what}"] / figures[f"qemu {what}"]
    return figures
