"""``bench``: accesses, CPU speed, disk requests, device start, snapshots; ratios within one run.

Accesses are made by a guest: a loop of one load or store, so a figure is the whole way from the
trapped instruction to the device and back. Each figure is the median of several rounds. What it is
compared with (a bare ping-pong over the same kind of socket; bare Unicorn) is measured in the same
run, round by round, since hosts are noisy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vmm.bench import access, disk, events, lifecycle, linux, linux_disk, linux_idle, network, speed
from vmm.network.user import find_program

ROUNDS = 7


@dataclass(frozen=True)
class Goal:
    """What a figure is to reach: `limit` in the figure's own unit, at most or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    goal: Goal | None = None


def run(args: argparse.Namespace) -> int:
    """``python -m vmm bench``."""
    rounds = 3 if args.quick else ROUNDS
    scale = 10 if args.quick else 1
    figures: list[Figure] = []

    def progress(what: str) -> None:
        if not args.json:
            print(f"measuring {what} ...", file=sys.stderr, flush=True)

    if args.linux is not None:
        linux.commands(Path(args.linux))  # or whoever mistyped it waits for the other figures
    progress("accesses")
    figures += _accesses(rounds, scale)
    progress("CPU speed")
    figures += _speed(rounds, scale)
    progress("exceptions, system calls, interrupts")
    figures += _events(rounds, scale)
    progress("disk requests")
    figures += _disk(rounds, scale)
    progress("device start and memory")
    figures += _lifecycle(rounds)
    if args.linux is not None:
        progress("Linux")
        figures += _linux(Path(args.linux), rounds)
        progress("Linux: disks")
        figures += _linux_disk(Path(args.linux), rounds)
        if find_program() is None:
            progress("no network: the package passt is not installed")
        else:
            progress("Linux: network")
            figures += _network(Path(args.linux), rounds)
        progress("Linux: idle")
        idle = linux_idle.measure(Path(args.linux))
        figures.append(Figure("Linux: idle, all devices", idle, "% CPU", Goal(2)))
    if args.json:
        print(json.dumps([_as_json(figure) for figure in figures], indent=2))
        return 0
    width = max(len(figure.name) for figure in figures)
    print(f"{'figure':{width}}  {'value':>10} {'unit':6} goal")
    for figure in figures:
        goal = "" if figure.goal is None else f"{figure.goal} "
        verdict = "" if figure.goal is None or figure.goal.met(figure.value) else "(missed)"
        print(f"{figure.name:{width}}  {figure.value:10.3f} {figure.unit:6} {goal}{verdict}")
    return 0


def _as_json(figure: Figure) -> dict[str, object]:
    values: dict[str, object] = {
        "name": figure.name,
        "value": round(figure.value, 4),
        "unit": figure.unit,
    }
    if figure.goal is not None:
        values |= {"goal": str(figure.goal), "met": figure.goal.met(figure.value)}
    return values


def _rounds(measure: Callable[[], dict[str, float]], rounds: int) -> dict[str, float]:
    """The median of each of the values that `measure` gives."""
    all_rounds = [measure() for _ in range(rounds)]
    return {key: median(values[key] for values in all_rounds) for key in all_rounds[0]}


def _accesses(rounds: int, scale: int) -> list[Figure]:
    with access.AccessBench(20_000 // scale) as bench:
        got = _rounds(bench.round, rounds)
    return [
        Figure("bare ping-pong, one CPU", got["ping_pong"], "us"),
        Figure("in-process MMIO read", got["local_read"], "us"),
        Figure("proxied read, one CPU", got["shared_read"], "us"),
        Figure("  ... ratio to the ping-pong", got["shared_ratio"], "x", Goal(1.3)),
        Figure("posted write, one CPU", got["shared_write"], "us"),
        Figure("proxied read, one CPU, socket alone", got["socket_read"], "us"),
        Figure("  ... ratio to the ping-pong", got["socket_ratio"], "x"),
        Figure("posted write, one CPU, socket alone", got["socket_write"], "us"),
        *(
            [
                Figure("proxied read, a CPU for the device", got["lane_read"], "us", Goal(2.0)),
                Figure("posted write, a CPU for the device", got["lane_write"], "us", Goal(1.0)),
            ]
            if "lane_read" in got
            else []
        ),
        Figure("mapped config read", got["config_read"], "us", Goal(1.5)),
    ]


def _speed(rounds: int, scale: int) -> list[Figure]:
    figures = []
    with speed.SpeedBench(scale) as bench:
        for name in speed.LOOPS:
            got = _rounds(lambda name=name: bench.round(name), rounds)  # type: ignore[misc]
            figures.append(Figure(f"{name}: bare Unicorn", got["bare"], "MB/s"))
            figures.append(
                Figure("  ... with devices attached", got["ratio"], "x", Goal(0.95, at_least=True))
            )
    return figures


def _events(rounds: int, scale: int) -> list[Figure]:
    with events.EventBench(20_000 // scale) as bench:
        got = _rounds(bench.round, rounds)
    goals = {"exception": 6.0, "exception, ring 3": 6.0, "system call": 4.0, "interrupt": 10.0}
    return [Figure(f"{name}, there and back", got[name], "us", Goal(goals[name])) for name in got]


def _disk(rounds: int, scale: int) -> list[Figure]:
    with disk.DiskBench(2_000 // scale) as bench:
        got = _rounds(bench.round, rounds)
    return [
        Figure("disk, 4 KiB read, dma=shared", got["shared_read"], "us", Goal(150)),
        Figure("  ... dma=granted", got["granted_read"], "us", Goal(150)),
        Figure("  ... ratio", got["ratio_read"], "x"),
        Figure("disk, 128 KiB reads, dma=shared", got["shared_stream"], "MiB/s"),
        Figure("  ... dma=granted", got["granted_stream"], "MiB/s"),
        Figure("  ... ratio", got["ratio_stream"], "x"),
    ]


def _linux(directory: Path, rounds: int) -> list[Figure]:
    got = _rounds(lambda: linux.measure(directory), min(rounds, 3))
    goals = {"ratio prompt": 1.3} | {f"ratio {work}": 2.5 for work in linux.WORK}
    return [
        Figure(
            f"Linux: {name}",
            value,
            "x" if name in goals else "s",
            Goal(goals[name]) if name in goals else None,
        )
        for name, value in got.items()
    ]


def _network(directory: Path, rounds: int) -> list[Figure]:
    got = _rounds(lambda: network.measure(directory), min(rounds, 3))
    return [
        Figure(
            f"Linux: network, {name}",
            value,
            "x" if name.startswith("ratio") else "MiB/s",
            Goal(0.5, at_least=True) if name.startswith("ratio") else None,
        )
        for name, value in got.items()
    ]


def _linux_disk(directory: Path, rounds: int) -> list[Figure]:
    got = _rounds(lambda: linux_disk.measure(directory), min(rounds, 3))
    figures = []
    for name, value in got.items():
        who, _, what = name.partition(" ")
        is_ratio = who == "ratio"
        unit = "x" if is_ratio else linux_disk.WORK[what][1]
        goal = Goal(0.7, at_least=True) if is_ratio else None
        figures.append(Figure(f"Linux: disk, {name}", value, unit, goal))
    return figures


def _lifecycle(rounds: int) -> list[Figure]:
    start = _rounds(lifecycle.device_start, rounds)
    save = _rounds(lifecycle.snapshot_and_restore, rounds)
    idle = lifecycle.idle_cpu()
    return [
        Figure("jailed device start", start["start_ms"], "ms", Goal(10)),
        Figure("  ... private memory", start["private_mib"], "MiB", Goal(6)),
        Figure("snapshot, 128 MiB guest, 8 MiB touched", save["save_ms"], "ms", Goal(100)),
        Figure("restore of it", save["restore_ms"], "ms", Goal(100)),
        Figure("snapshot on disk", save["disk_mib"], "MiB"),
        Figure("idle machine's CPU use", idle, "%", Goal(1)),
    ]
