"""Networks with Linux as the driver: a user-mode stack, two machines on a cable, a tap."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import random
import re
import select
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from cli_rig import VMM, environment
from network_rig import PATIENCE, free_port, needs_passt
from test_linux import DIRECTORY, MAKE_X, PROMPT, Shell, boot

from vmm.bench import linux, network
from vmm.machine import Machine

pytestmark = [
    pytest.mark.skipif(
        not DIRECTORY,
        reason="NO LINUX: run 'python -m guests.linux DIR' and set VMM_TEST_LINUX=DIR",
    ),
    pytest.mark.timeout(400),
]
EITHER_WAY = pytest.mark.parametrize("isolated", [False, True], ids=["in-process", "jailed"])
SIZE = 4 << 20


def pingable() -> str | None:
    """An address of this host that passt can ping; it does not translate pings of its gateway.

    None if this host is on no network, or does not let passt's user ping, see icmp(7): it is
    nobody if we are root.
    """
    group = os.getegid() or 65534
    first, last = Path("/proc/sys/net/ipv4/ping_group_range").read_text().split()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return address if int(first) <= group <= int(last) else None


def sha256(text: str) -> str:
    found = re.search(r"\b[0-9a-f]{64}\b", text)
    assert found, text
    return found[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A web server on this host's loopback: its port, and what its file `data` sums up to."""
    data = random.Random(1).randbytes(SIZE)
    (tmp_path / "data").write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made.server_port, hashlib.sha256(data).hexdigest()
        made.shutdown()


@needs_passt
@pytest.mark.parametrize(
    "how",
    [{"isolated": False}, {}, {"dma": "granted"}],
    ids=["in-process", "jailed", "granted"],
)
def test_a_user_mode_network(how: dict[str, Any], server: tuple[int, str], tmp_path: Path) -> None:
    """An address by DHCP, a file each way, and the same again after a restore."""
    port, expected = server
    forwarded = free_port()
    fetch = f"wget -q -O /got http://10.0.2.2:{port}/data; sha256sum /got"
    with Machine(memory="256M") as machine:
        machine.add_device("net", link="user", forward=f"tcp:{forwarded}:80", **how)
        shell = boot(machine, "quiet")
        assert "10.0.2.15" in shell.ask("udhcpc -i eth0 -n -q")
        assert "default via 10.0.2.2" in shell.ask("ip route")
        if there := pingable():
            assert " 0% packet loss" in shell.ask(f"ping -c 2 {there}")
        assert sha256(shell.ask(fetch)) == expected
        shell.ask("httpd -p 80 -h /")
        assert fetched(machine, forwarded) == expected
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        shell = Shell(machine)
        assert sha256(shell.ask(f"rm /got; {fetch}")) == expected
        assert fetched(machine, forwarded) == expected
        assert "1" in shell.ask("cat /sys/class/net/eth0/carrier").splitlines()


def fetched(machine: Machine, port: int) -> str:
    """What this host gets from the guest's web server sums up to."""
    summed: list[str] = []

    def read() -> None:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.sendall(b"GET /got HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as file:
                data = file.read()
        summed.append(hashlib.sha256(data.partition(b"\r\n\r\n")[2]).hexdigest())
        machine.send("\r")  # shows a prompt, which ends the run below

    thread = threading.Thread(target=read)
    thread.start()
    Shell(machine).wait()
    thread.join()
    return summed[0]


@needs_passt
@pytest.mark.skipif(pingable() is not None, reason="tested above")
def test_nothing_was_pinged() -> None:
    pytest.skip("NO PING: no network, or net.ipv4.ping_group_range leaves passt out")


@needs_passt
def test_the_link_goes_down_with_the_stack() -> None:
    with Machine(memory="256M") as machine:
        machine.add_device("net", link="user")
        shell = boot(machine, "quiet")
        shell.ask("ip link set eth0 up")
        assert "1" in shell.ask("cat /sys/class/net/eth0/carrier").splitlines()
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (stack,) = (p for p in children if "passt" in Path(f"/proc/{p}/comm").read_text())
        os.kill(int(stack), 9)
        assert "0" in shell.ask("sleep 1; cat /sys/class/net/eth0/carrier").splitlines()
        assert ("net", "passt has ended: status -9") in machine.parts.wiring.log_lines
        assert ("net", "the link is down: the other end is gone") in machine.parts.wiring.log_lines


@needs_passt
def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "QEMU", "not-there")
    monkeypatch.setattr(network, "SIZE", 1 << 20)
    figures = network.measure(Path(DIRECTORY))
    assert figures.keys() == {"vmm down", "vmm up"}
    assert min(figures.values()) > 0


class Vm:
    """A guest that runs beside the test."""

    def __init__(self, *arguments: str) -> None:
        images = [f"{DIRECTORY}/vmlinuz", "--initrd", f"{DIRECTORY}/initramfs.cpio.gz"]
        kernel = ["--append", "console=ttyS0 quiet", "--mem", "256M"]
        self._process = subprocess.Popen(
            [*VMM, "boot", *images, *kernel, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        self._asked = 0

    def wait_for(self, text: bytes) -> str:
        assert self._process.stdout is not None
        seen, end = b"", monotonic() + 10 * PATIENCE
        while text not in seen:
            ready, _, _ = select.select([self._process.stdout], [], [], end - monotonic())
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, seen[-2000:]
            seen += data
        return seen.decode(errors="replace")

    def ask(self, command: str) -> str:
        assert self._process.stdin is not None
        self._asked += 1
        # The echo of what is typed must not look like the answer.
        typed = f"{command}; echo do''ne {self._asked}\r".encode()
        os.write(self._process.stdin.fileno(), typed)
        return self.wait_for(b"done %d\r\n" % self._asked)

    def card(self, number: int) -> None:
        """Give its card an address."""
        self.wait_for(PROMPT)
        self.ask(f"ip addr add 192.0.2.{number}/24 dev eth0; ip link set eth0 up")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_two_machines_on_a_cable() -> None:
    """They ping and transfer a file; one goes without a word and another comes."""
    net = f"pair:{uuid.uuid4().hex}"
    with closing(Vm("--net", net)) as one:
        with closing(Vm("--net", f"{net},isolation=none")) as other:
            one.card(1)
            other.card(2)
            assert " 0% packet loss" in one.ask("ping -c 2 192.0.2.2")
            made = f"{MAKE_X}; mkdir /w; mv /x /w/data"
            expected = sha256(one.ask(f"{made}; httpd -p 80 -h /w; sha256sum /w/data"))
            got = other.ask("wget -q -O /got http://192.0.2.1/data; sha256sum /got")
            assert sha256(got) == expected
            third = subprocess.run(
                [*VMM, "boot", "--net", net],
                capture_output=True,
                text=True,
                env=environment(),
                timeout=60,
                check=False,
            )
            assert third.returncode == 2
            assert "two machines are connected by" in third.stderr
            assert len(third.stderr.splitlines()) == 1
            assert "LOWER_UP" in one.ask("ip link show eth0")
        down = "while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 1; done"
        assert "NO-CARRIER" in one.ask(f"{down}; sleep 1; ip link show eth0")
        with closing(Vm("--net", net)) as other:
            other.card(3)
            assert " 0% packet loss" in one.ask("ping -c 2 192.0.2.3")
            got = other.ask("wget -q -O /got http://192.0.2.1/data; sha256sum /got")
            assert sha256(got) == expected


def taps_are_possible() -> bool:
    script = "from vmm.network.tap import TapEnd; TapEnd('here', 'tap0')"
    command = [*UNSHARE, sys.executable, "-c", script]
    return not subprocess.run(
        command, capture_output=True, env=environment(), timeout=60, check=False
    ).returncode


UNSHARE = ["unshare", "--map-root-user", "--net"]


@EITHER_WAY
def test_a_tap(isolated: bool) -> None:
    """In a network namespace of its own; the host's kernel is the other end."""
    if not taps_are_possible():
        pytest.skip("NO TAP: /dev/net/tun is not there, not permitted, or namespaces are not")
    guest = Path(__file__).with_name("tap_guest.py")
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(guest), "jailed" if isolated else "in-process"],
        capture_output=True,
        text=True,
        env=environment(guest.parent),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    data = bytes(range(256)) * (SIZE // 256)
    assert " 0% packet loss" in done.stdout
    assert hashlib.sha256(data).hexdigest() in done.stdout
    assert "came True" in done.stdout
    # A line of the kernel's may come between.
    packets = re.search(r"packets cat.*\n(?:\[.*\n)*(\d+)", done.stdout.replace("\r", ""))
    assert packets is not None, done.stdout[-1000:]
    assert int(packets[1]) < SIZE // 1500 // 2  # not cut by the host
    assert "here: is in use by another program" in done.stdout
    assert "carrier sleep" in done.stdout
    assert "\n0\n" in done.stdout.replace("\r", "")
    assert "the link is down" in done.stdout
