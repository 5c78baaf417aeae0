"""How a demo tells what it shows: to a reader line by line, to a script as steps."""

from __future__ import annotations

import sys
from typing import Any

from vmm.cli.output import clean
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome


class Lesson:
    """Collects what a demo shows.

    Attributes:
        ok: False as soon as something was not as the lesson teaches.
        steps: for ``--json``: one dictionary for each thing that was shown.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.ok = True
        self.steps: list[dict[str, Any]] = []
        self._quiet = quiet

    def say(self, text: str = "") -> None:
        """A line of explanation."""
        if not self._quiet:
            print(text)
            sys.stdout.flush()

    def show(self, what: str, seen: str, expected: bool = True, **facts: Any) -> None:
        """One observation: what was tried and what was seen.

        Args:
            expected: whether it came out as the lesson teaches; if not, the demo fails.
            facts: for scripts.
        """
        self.ok = self.ok and expected
        self.steps.append({"what": what, "seen": seen, "expected": expected, **facts})
        self.say(
            f"  {clean(what):34}  {clean(seen)}" + ("" if expected else "   <- NOT AS IT SHOULD BE")
        )


def run(machine: Machine, **how: Any) -> Outcome:
    """`Machine.run`; a request to terminate ends the lesson, as Ctrl-C does."""
    outcome = machine.run(**how)
    if outcome.ending is Ending.INTERRUPTED:
        raise KeyboardInterrupt
    return outcome
