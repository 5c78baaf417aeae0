"""A Linux guest at a tap of a network namespace that was made for it; see `test_network_linux`.

In there it may make a tap whoever it is, and disturbs nobody.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

from test_linux import boot

from vmm.machine import Machine
from vmm.network.tap import TapEnd

SIZE = 4 << 20
DATA = bytes(range(256)) * (SIZE // 256)


def serve(listener: socket.socket) -> None:
    """Give `DATA` to the first who asks, and take as much from the next."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(DATA)
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as file:
        print("came", file.read() == DATA, flush=True)


def main(isolated: bool) -> None:
    with Machine(memory="256M") as machine:
        machine.add_device("net", link="tap:tap0", isolated=isolated)
        shell = boot(machine, "quiet")
        address = ["ip", "addr", "add", "192.0.2.1/24", "dev", "tap0"]
        subprocess.run(address, check=True, timeout=30)
        listener = socket.create_server(("192.0.2.1", 80))
        threading.Thread(target=serve, args=(listener,)).start()
        shell.ask("ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up")
        print(shell.ask("ping -c 2 192.0.2.1"))
        print(shell.ask("nc 192.0.2.1 80 < /dev/null > /got; sha256sum /got"))
        print("packets", shell.ask("cat /sys/class/net/eth0/statistics/rx_packets"))
        shell.ask("nc 192.0.2.1 80 < /got")
        try:
            TapEnd("here", "tap0")
        except Exception as error:
            print(error)
        subprocess.run(["ip", "link", "del", "tap0"], check=True, timeout=30)
        print("carrier", shell.ask("sleep 1; cat /sys/class/net/eth0/carrier"))
        print(machine.parts.wiring.log_lines)


if __name__ == "__main__":
    main(sys.argv[1] == "jailed")
