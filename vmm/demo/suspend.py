"""``demo suspend``: a guest outlives its process.

The guest is `counter`: it keeps its count in registers, memory, the stack, the FPU and an SSE
register at once, and says so if they ever differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vmm.demo.lesson import Lesson, run
from vmm.machine import Machine
from vmm.outcome import Ending


def teach(lesson: Lesson) -> None:
    """Boot, save and end in one process; restore in this one."""
    with tempfile.TemporaryDirectory(prefix="vmm-demo-") as place:
        saved = Path(place) / "snapshot"
        command = [sys.executable, "-m", "vmm", "boot", "counter", "--mem", "16M"]
        command += ["--snapshot", str(saved), "--snapshot-at", "counter 5\n"]
        command += ["--snapshot-then", "quit", "--json"]
        lesson.say("A process of its own boots the guest, saves it at 'counter 5', and ends:")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as first:
            try:
                printed, _ = first.communicate(timeout=60)
            except BaseException:
                first.kill()
                raise
        ended_well = first.returncode == 0
        lesson.show(
            "first machine", f"process {first.pid}, exit status {first.returncode}", ended_well
        )
        if not ended_well:
            return
        for file in sorted(saved.rglob("*")):
            if file.is_file():
                used = file.stat().st_blocks * 512
                lesson.show(str(file.relative_to(saved)), f"{used >> 10} KiB on disk")
        lesson.say("Every process of it is gone. Now a machine in this process goes on:")
        with Machine.restore(saved) as machine:
            outcome = run(machine, until="counter 10\n", timeout=60)
            before, after = json.loads(printed)["output"], machine.output.decode()
        lesson.show("second machine", f"process {os.getpid()}", os.getpid() != first.pid)
        _show_lines(lesson, "printed by the first", before)
        _show_lines(lesson, "printed by the second", after)
        whole = "".join(f"counter {n}\n" for n in range(1, 100))
        lesson.show(
            "together",
            "every number once, in order",
            outcome.ending is Ending.PAUSED and whole.startswith(before + after),
        )


def _show_lines(lesson: Lesson, what: str, output: str) -> None:
    lesson.show(what, ", ".join(output.split("\n")).rstrip(", "), "counter" in output)
