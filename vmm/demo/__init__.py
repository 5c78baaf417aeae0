"""Device isolation, crash and suspend as lessons: ``python -m vmm demo NAME``."""

from __future__ import annotations

import argparse
import importlib
import json

from vmm.demo.lesson import Lesson

DEMOS = {
    "isolation": "a hostile device, once in its jail and once beside it without: what each can do",
    "crash": "a device process is killed, then one hangs, under a running guest: who sees what",
    "suspend": "a guest is suspended, saved, its process ended, and it counts on in another one",
}


def run(args: argparse.Namespace) -> int:
    """``python -m vmm demo``."""
    from devices.errors import UserError

    if args.name is None:
        if args.json:
            print(json.dumps(DEMOS))
            return 0
        width = max(map(len, DEMOS))
        for name, summary in DEMOS.items():
            print(f"{name:{width}}  {summary}")
        print("\nrun one with: python -m vmm demo NAME")
        return 0
    if args.name not in DEMOS:
        raise UserError(f"there is no demo '{args.name}'; there are {', '.join(DEMOS)}")
    lesson = Lesson(quiet=args.json)
    importlib.import_module(f"vmm.demo.{args.name}").teach(lesson)
    if args.json:
        print(json.dumps({"demo": args.name, "ok": lesson.ok, "steps": lesson.steps}))
    return 0 if lesson.ok else 1
