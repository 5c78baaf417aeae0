"""Register accesses: local, proxied with one CPU and with more, and a bare ping-pong.

How a proxied access goes (socket, shared memory) is what the machine chooses by default; the
socket alone is measured beside it.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from time import perf_counter
from typing import Self

from vmm.boot.options import BootOptions
from vmm.config import DeviceConfig, HostOptions
from vmm.cpu.engine import StopReason
from vmm.machine import Machine

REGISTER = 0xC800_0000
"""Where the measured echo register is mapped."""

LOAD = bytes.fromhex("8b03")  # mov eax, [ebx]
STORE = bytes.fromhex("8903")  # mov [ebx], eax
REQUEST_BYTES, REPLY_BYTES = 32, 16


def loop(count: int, body: bytes, address: int) -> bytes:
    """32-bit code that does `body` `count` times with EBX = `address`, then halts."""
    start = b"\xbb" + struct.pack("<I", address) + b"\xb9" + struct.pack("<I", count)
    back = b"\x49\x75" + struct.pack("<b", -(len(body) + 3))  # dec ecx; jnz body
    return start + body + back + b"\xfa\xf4"  # cli; hlt


def timed(machine: Machine, code: bytes, count: int) -> float:
    """Microseconds for each of `count` rounds of guest code that ends in HLT."""
    machine.boot(code, BootOptions())
    cpu = machine.parts.cpu
    began = perf_counter()
    while cpu.run().reason is not StopReason.HALT:
        pass
    return (perf_counter() - began) / count * 1e6


def _machine(isolated: bool, fast_lane: bool) -> Machine:
    echo = DeviceConfig("echo", "echo", {"bus": "mmio"}, isolated=isolated)
    pci = DeviceConfig("config-space", "config-space", isolated=isolated)
    host = HostOptions(fast_lane=fast_lane)
    machine = Machine(memory="16M", devices=(echo, pci), host=host)
    machine.build()
    return machine


class PingPong:
    """Two processes on one CPU that pass messages of the protocol's sizes to and fro."""

    def __init__(self, cpu: int) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if not self._pid:
            self._socket.close()
            os.sched_setaffinity(0, {cpu})
            buffer, reply = bytearray(64), bytes(REPLY_BYTES)
            while other.recv_into(buffer):
                other.send(reply)
            os._exit(0)
        other.close()

    def measure(self, count: int) -> float:
        """Microseconds for one exchange."""
        send, receive, request = self._socket.send, self._socket.recv_into, bytes(REQUEST_BYTES)
        buffer = bytearray(64)
        began = perf_counter()
        for _ in range(count):
            send(request)
            receive(buffer)
        return (perf_counter() - began) / count * 1e6

    def close(self) -> None:
        self._socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class AccessBench:
    """Machines that stay up for all rounds.

    Args:
        count: accesses in each measured loop.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._affinity = os.sched_getaffinity(0)
        cpu = min(self._affinity)
        self._closers: list[Callable[[], None]] = []
        self._ping_pong = PingPong(cpu)
        self._closers.append(self._ping_pong.close)
        self._cpu = cpu
        self._local = self._keep(_machine(isolated=False, fast_lane=False))
        self._socket = self._keep(_machine(isolated=True, fast_lane=False))
        os.sched_setaffinity(0, {cpu})
        try:
            self._one_cpu = self._keep(_machine(isolated=True, fast_lane=True))
        finally:
            os.sched_setaffinity(0, self._affinity)
        self._lane = None
        if len(self._affinity) > 1:
            self._lane = self._keep(_machine(isolated=True, fast_lane=True))

    def _keep(self, machine: Machine) -> Machine:
        self._closers.append(machine.close)
        return machine

    def round(self) -> dict[str, float]:
        """One round of everything, in microseconds."""
        count = self._count
        # Only the lane may use a second CPU: the child follows this thread.
        os.sched_setaffinity(0, {self._cpu})
        try:
            ping_pong = self._ping_pong.measure(count)
            shared_read = timed(self._one_cpu, loop(count, LOAD, REGISTER), count)
            socket_read = timed(self._socket, loop(count, LOAD, REGISTER), count)
            figures = {
                "ping_pong": ping_pong,
                "shared_read": shared_read,
                "shared_ratio": shared_read / ping_pong,
                "shared_write": timed(self._one_cpu, loop(count, STORE, REGISTER), count),
                "socket_read": socket_read,
                "socket_ratio": socket_read / ping_pong,
                "local_read": timed(self._local, loop(count * 10, LOAD, REGISTER), count * 10),
                "socket_write": timed(self._socket, loop(count, STORE, REGISTER), count),
                "config_read": self._config_read(count),
            }
            if self._lane is not None:
                figures["lane_read"] = timed(self._lane, loop(count, LOAD, REGISTER), count)
                figures["lane_write"] = timed(self._lane, loop(count, STORE, REGISTER), count)
        finally:
            os.sched_setaffinity(0, self._affinity)
        return figures

    def _config_read(self, count: int) -> float:
        """A config read as the PCI root does it, without the guest's port accesses."""
        parts = self._socket.parts
        proxy = next(proxy for proxy in parts.proxies if proxy.is_pci)
        read = proxy.read_config
        began = perf_counter()
        for _ in range(count):
            read(0)
        return (perf_counter() - began) / count * 1e6

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for close in reversed(self._closers):
            close()
