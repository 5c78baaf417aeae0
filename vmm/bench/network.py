"""Bulk transfer between host and Linux guest, ours beside QEMU's TCG with virtio-net and slirp.

Both guests have the same addresses in a user-mode network (10.0.2.15, the host is 10.0.2.2) and the
same driver. Down is `wget` in the guest from a server here; up is a reader here of the guest's
`httpd`, through a forwarded port.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import monotonic

from vmm.bench import linux

SIZE = 32 << 20
HOST = "10.0.2.2"
_SET_UP = (
    "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; "
    f"ip route add default via {HOST}; mkdir /w; cd /w; "
    "dd if=/dev/urandom of=big bs=1M count={count} 2>/dev/null; httpd -p 80 -h /w; cd /"
)
_ASK = b"GET /big HTTP/1.0\r\n\r\n"
_PATIENCE = 120.0


def commands(directory: Path, port: int) -> dict[str, list[str]]:
    """How each is started, with `port` of this host leading to the guest's httpd."""
    found = linux.commands(directory)
    found["vmm"] += ["--net", f"user,forward=tcp:{port}:80"]
    if "qemu" in found:
        netdev = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:80"
        found["qemu"] += ["-netdev", netdev, "-device", "virtio-net-pci,netdev=net"]
    return found


def measure(directory: Path) -> dict[str, float]:
    """One round: MiB/s each way, and with QEMU the ratios.

    Raises:
        UserError: there is no Linux guest in `directory`, or it does not come up.
    """
    figures: dict[str, float] = {}
    with _server() as port:
        free = _free_port()
        for name, command in commands(directory, free).items():
            with closing(linux.Shell(command)) as shell:
                shell.wait_for(linux.PROMPT)
                shell.seconds_for(_SET_UP.format(count=SIZE >> 20))
                wget = f"wget -q -O /dev/null http://{HOST}:{port}/big"
                figures[f"{name} down"] = _rate(shell.seconds_for(wget))
                figures[f"{name} up"] = _rate(_seconds_to_read(shell, free))
    if "qemu down" in figures:
        for way in ("down", "up"):
            figures[f"ratio {way}"] = figures[f"vmm {way}"] / figures[f"qemu {way}"]
    return figures


def _rate(seconds: float) -> float:
    return (SIZE >> 20) / seconds


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _seconds_to_read(shell: linux.Shell, port: int) -> float:
    began = monotonic()
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
        connection.sendall(_ASK)
        left = SIZE
        buffer = bytearray(1 << 20)
        while left > 0 and (count := connection.recv_into(buffer)):
            left -= count
    return monotonic() - began


@contextmanager
def _server() -> Iterator[int]:
    """Gives `SIZE` bytes to everybody who asks; the port."""
    data = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE + bytes(SIZE)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):  # a guest may go in the middle
                    connection.recv(4096)
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
