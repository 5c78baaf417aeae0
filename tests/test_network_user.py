"""The user-mode back end as a process: it starts, is refused, dies, and never stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_rig import environment, run
from network_rig import (
    PATIENCE,
    event_loop,
    free_port,
    needs_passt,
    process_is_there,
    received,
    run_until,
)
from proxy_helpers import open_descriptors

from devices.errors import UserError
from devices.virtio.link import Forward
from devices.virtio.net import USER_MTU
from vmm.events import EventLoop
from vmm.machine import Machine
from vmm.network import user
from vmm.network.user import UserEnd
from vmm.opening import HostFileError


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with event_loop() as made:
        yield made


def program(where: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a script take passt's place, with its descriptor as `fd`."""
    path = where / "passt"
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\nfd = int(sys.argv[2])\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")


@needs_passt
def test_it_answers_and_ends(loop: EventLoop) -> None:
    before = open_descriptors()
    end = UserEnd("here", [])
    end.attach(loop, pytest.fail)
    pid = end._process.pid
    question = user._arp_question()
    os.write(end.fd, len(question).to_bytes(4, "big") + question)
    answer = b""
    while len(answer) < 46:
        answer += received(end.fd)
    answer = answer[4:]
    assert answer[6:12].hex(":") == user.GATEWAY_MAC
    end.close()
    end.close()
    assert not process_is_there(pid)
    assert open_descriptors() == before


@needs_passt
def test_a_port_that_is_taken_is_named(loop: EventLoop) -> None:
    before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        end = UserEnd("here", [Forward("tcp", "127.0.0.1", port, 80)])
        with pytest.raises(HostFileError, match=f"here: passt cannot start: .*{port}") as caught:
            end.attach(loop, pytest.fail)
    assert "\n" not in str(caught.value)
    assert open_descriptors() == before


@needs_passt
def test_its_death_is_told(loop: EventLoop) -> None:
    end = UserEnd("here", [])
    lines: list[str] = []
    end.attach(loop, lines.append)
    end._process.kill()
    run_until(loop, lambda: bool(lines))
    assert lines == ["passt has ended: status -9"]
    loop.poll(0.01)
    assert len(lines) == 1
    assert os.read(end.fd, 1) == b""
    end.close()


@needs_passt
@pytest.mark.parametrize("isolated", [True, False])
def test_it_cannot_outlive_the_machine(isolated: bool) -> None:
    """Killed without a chance to clean up."""
    code = (
        "from vmm.machine import Machine\n"
        "machine = Machine(memory='16M', devices=())\n"
        f"machine.add_device('net', link='user', isolated={isolated})\n"
        "machine.build()\n"
        "print('up', flush=True)\n"
        "machine.run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    stacks = [int(p) for p in tasks if "passt" in Path(f"/proc/{p}/comm").read_text()]
    assert len(stacks) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with event_loop() as loop:
        run_until(loop, lambda: not process_is_there(stacks[0]))


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostFileError, match="passt is not there; install the package passt"):
        UserEnd("here", [])
    before = open_descriptors()
    status, _, err = run("boot", "--net", "user", env=environment() | {"PATH": "/nonexistent"})
    assert status == 2
    assert err.decode().splitlines() == [
        "vmm: device 'net': link=user: the program passt is not there; install the package passt"
    ]
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("script", "about"),
    [
        ("sys.exit('Failed to send 3 bytes to syslog\\nit is broken')", "it is broken"),
        ("sys.exit(3)", "status 3"),
        ("os.write(fd, b'x'); sys.exit(3)", "status 3"),
        ("os.write(2, b'no\\xff\\n' * 9999)", "no"),
    ],
)
def test_one_that_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: EventLoop, script: str, about: str
) -> None:
    program(tmp_path, script, monkeypatch)
    before = open_descriptors()
    with pytest.raises(HostFileError, match=f"here: passt cannot start: .*{about}"):
        UserEnd("here", []).attach(loop, pytest.fail)
    assert open_descriptors() == before


@pytest.mark.parametrize("script", ["", "os.write(fd, b'x'); ", "os.close(fd); "])
def test_one_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: EventLoop, script: str
) -> None:
    program(tmp_path, f"{script}time.sleep(1000)", monkeypatch)
    monkeypatch.setattr(user, "_PATIENCE", 0.3)
    end = UserEnd("here", [])
    with pytest.raises(HostFileError, match="passt cannot start: it does not answer"):
        end.attach(loop, pytest.fail)
    assert not process_is_there(end._process.pid)


def test_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = [Forward("tcp", "127.0.0.1", 8080, 80), Forward("udp", "::1", 53, 5353)]
    for route in (True, False):
        monkeypatch.setattr(user, "_has_route", lambda route=route: route)
        text = " ".join(user._arguments(5, forwards))
        assert "--tcp-ports 127.0.0.1/8080:80 --udp-ports ::1/53:5353" in text
        assert ("--interface lo" in text) is not route


@needs_passt
@pytest.mark.parametrize("isolated", [True, False])
def test_a_restore_starts_it_again_or_says_that_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: bool
) -> None:
    saved, port = tmp_path / "saved", free_port()
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("net", link="user", forward=f"tcp:{port}:80", isolated=isolated)
        machine.boot("counter")
        machine.snapshot(saved)
    with Machine.restore(saved) as machine:
        machine.resume()
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    before = open_descriptors()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="install the package passt") as caught:
        Machine.restore(saved)
    assert re.match(f"snapshot {saved}: device 'net': link=user: ", str(caught.value))
    assert open_descriptors() == before


def test_passt_and_the_driver_agree_on_the_mtu() -> None:
    arguments = user._arguments(5, [])
    assert arguments[arguments.index("--mtu") + 1] == str(USER_MTU)
