"""Linux on a host that stands still again and again: no tick is lost, no clock jumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

from test_linux import DIRECTORY, pytestmark

__all__ = ["pytestmark"]

STILL, MOVING = 0.17, 0.014
"""Seconds. Linux wants five ticks of 4 ms in 160 ms, or it panics."""
BEFORE_THE_TIMER = b"Switch to symmetric I/O mode"
STANDS = 30


def test_a_host_that_stands_still_costs_no_ticks(tmp_path: Path) -> None:
    kernel, initrd = Path(DIRECTORY) / "vmlinuz", Path(DIRECTORY) / "initramfs.cpio.gz"
    command = [
        *(sys.executable, "-m", "vmm", "boot", str(kernel), "--initrd", str(initrd)),
        *("--append", "console=ttyS0 panic=-1", "--timeout", "100"),
        *("--snapshot-at", "text:Run /init", "--snapshot", str(tmp_path / "end")),
        *("--snapshot-then", "quit"),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as vmm:
        assert vmm.stdout is not None
        try:
            said = b""
            while BEFORE_THE_TIMER not in said:
                said += (line := vmm.stdout.readline())
                assert line, said
            for _ in range(STANDS):
                os.kill(vmm.pid, signal.SIGSTOP)
                sleep(STILL)
                os.kill(vmm.pid, signal.SIGCONT)
                sleep(MOVING)
            said += vmm.communicate()[0]
        finally:
            vmm.kill()
    assert b"Kernel panic" not in said
    assert b"unstable" not in said
    assert vmm.returncode == 0, said
