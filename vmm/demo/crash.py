"""``demo crash``: a device process dies or hangs under a running guest.

The guest is `stress`: it writes and reads the echo device all the time and checks every value.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from time import monotonic

from vmm.config import FailurePolicy, HostOptions
from vmm.demo.lesson import Lesson, run
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome

DEADLINE = 0.5


def teach(lesson: Lesson) -> None:
    """Three runs of the same guest; each time something happens to its echo device."""
    lesson.say("Act 1: the echo device's process is killed; the policy is to stop (the default).")
    outcome, pid, _ = _run(signal.SIGKILL, FailurePolicy.STOP)
    _show_end(lesson, outcome)
    lesson.show(
        "device process is left behind", "no" if not _alive(pid) else "YES", not _alive(pid)
    )

    lesson.say("\nAct 2: killed again; now the policy is to isolate it and go on.")
    outcome, _, machine_output = _run(signal.SIGKILL, FailurePolicy.ISOLATE)
    lesson.show(
        "machine",
        f"goes on; the guest ended by itself: {outcome.ending}",
        outcome.ending is Ending.GUEST_EXIT and outcome.guest_value == 1,
    )
    lesson.show("guest sees", machine_output.splitlines()[-1], "mismatch" in machine_output.lower())

    lesson.say(
        f"\nAct 3: the device hangs (SIGSTOP); the machine waits {DEADLINE} s, not for ever."
    )
    began = monotonic()
    outcome, pid, _ = _run(signal.SIGSTOP, FailurePolicy.STOP)
    _show_end(lesson, outcome)
    lesson.show(
        "from hang to verdict", f"{monotonic() - began:.1f} s with start and end of the machine"
    )
    lesson.show(
        "device process is left behind", "no" if not _alive(pid) else "YES", not _alive(pid)
    )


def _run(number: signal.Signals, policy: FailurePolicy) -> tuple[Outcome, int, str]:
    """Boot `stress`, signal its echo device once it is at work, and see how the run ends."""
    with Machine(memory="16M", host=HostOptions(deadline=DEADLINE, on_failure=policy)) as machine:
        machine.boot("stress")
        pid = next(proxy.pid for proxy in machine.parts.proxies if proxy.name == "echo")
        run(machine, budget=100_000)
        os.kill(pid, number)
        outcome = run(machine, timeout=30)
        output = machine.output.decode(errors="replace")
    return outcome, pid, output


def _show_end(lesson: Lesson, outcome: Outcome) -> None:
    named = outcome.ending is Ending.DEVICE_FAILED and outcome.device == "echo"
    lesson.show("machine ends", f"{outcome.ending}, exit status {outcome.status}", named)
    lesson.show("and says", outcome.detail, "echo" in outcome.detail)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
