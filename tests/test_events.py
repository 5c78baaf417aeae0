"""The event loop: waits of any length, and who is called."""

from __future__ import annotations

import os
import resource
import select
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from vmm.events import FAR, EventLoop
from vmm.timerfd import TimerFd


@pytest.fixture
def kicked() -> threading.Event:
    return threading.Event()


@pytest.fixture
def loop(kicked: threading.Event) -> Iterator[EventLoop]:
    made = EventLoop(kicked.set)
    yield made
    made.close()


@pytest.mark.parametrize("seconds", [3e6, 1e10, 1e300])
def test_far_timers_do_not_break_a_wait(loop: EventLoop, seconds: float) -> None:
    loop.call_at(monotonic() + seconds, lambda: pytest.fail("too early"))
    loop.interrupt()
    assert loop.poll(None)
    assert not loop.poll(0.01)
    loop.interrupt()
    assert loop.poll(seconds)


@pytest.mark.parametrize("seconds", [3e6, 1e10, 1e300])
def test_far_timers_do_not_break_the_watcher(
    loop: EventLoop, kicked: threading.Event, seconds: float
) -> None:
    loop.call_at(monotonic() + seconds, lambda: None)
    loop.guest_due = lambda: monotonic() + seconds
    loop.watch()
    assert not kicked.wait(0.2)
    loop.interrupt()
    assert kicked.wait(30)


def test_a_timer_planned_later_is_not_missed(loop: EventLoop, kicked: threading.Event) -> None:
    loop.call_at(monotonic() + 1e10, lambda: None)
    loop.watch()
    ran: list[None] = []
    loop.call_at(monotonic() + 0.05, lambda: ran.append(None))
    assert kicked.wait(30)
    while not ran:
        loop.poll(None)


def test_a_wait_that_leaves_the_guest_out(loop: EventLoop) -> None:
    """The guest's overdue timer is no reason to come back when the guest may not run."""
    loop.guest_due = lambda: 0.0
    assert not loop.poll(None)
    timer = monotonic() + 0.2
    ran: list[None] = []
    loop.call_at(timer, lambda: ran.append(None))
    while not ran:
        loop.poll(None, guest=False)
        assert monotonic() >= timer
    loop.guest_due = lambda: FAR


def test_descriptors(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    seen: list[bytes] = []
    loop.add(reader, lambda: seen.append(os.read(reader, 10)))
    assert not loop.poll(0.0)
    os.write(writer, b"x")
    assert loop.poll(None)
    assert seen == [b"x"]
    loop.remove(reader)
    loop.remove(reader)
    os.write(writer, b"y")
    assert not loop.poll(0.0)
    os.close(reader)
    os.close(writer)


def test_cancelled_timers_do_not_run(loop: EventLoop) -> None:
    timer = loop.call_at(monotonic(), lambda: pytest.fail("cancelled"))
    timer.cancel()
    assert not loop.poll(0.0)


def test_a_kick_that_was_not_heard_is_repeated() -> None:
    kicks, heard = [], threading.Event()

    def kick() -> None:
        kicks.append(1)
        if len(kicks) == 3:
            heard.set()

    loop = EventLoop(kick, lambda: not heard.is_set())
    try:
        loop.watch()
        loop.interrupt()
        assert heard.wait(20)
    finally:
        heard.set()
        loop.close()
    assert len(kicks) == 3


def test_each_watch_brings_a_kick(loop: EventLoop, kicked: threading.Event) -> None:
    for _ in range(3):
        loop.watch()
        loop.interrupt()
        assert kicked.wait(20)
        loop.poll(0.0)
        kicked.clear()


def test_who_waits_himself_needs_no_kick(loop: EventLoop, kicked: threading.Event) -> None:
    ran: list[None] = []
    loop.call_at(monotonic() + 60, lambda: None)
    loop.watch()
    loop.poll(0.001)
    loop.interrupt()
    assert not kicked.wait(0.1)
    loop.call_at(monotonic() + 0.05, lambda: ran.append(None))
    while not ran:
        loop.poll(None)
    assert not kicked.wait(0.1)


def test_a_look_is_one_look(loop: EventLoop, kicked: threading.Event) -> None:
    loop.look_within(0)
    loop.watch()
    assert kicked.wait(20)
    kicked.clear()
    loop.poll(0.0)
    loop.watch()
    assert not kicked.wait(0.1)


def test_a_moment_that_was_put_off_brings_no_kick(loop: EventLoop, kicked: threading.Event) -> None:
    while True:
        due = monotonic() + 0.1
        loop.guest_due = lambda due=due: due  # type: ignore[misc]
        loop.watch()
        loop.guest_due = lambda: FAR
        loop.watch()
        if monotonic() < due:
            break
        kicked.wait(20)  # the host is too busy: once more
        kicked.clear()
        loop.poll(0.0)
    assert not kicked.wait(0.2)


def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    loop = EventLoop(lambda: None)
    loop.watch()
    inherited = [fd for fd in set(os.listdir("/proc/self/fd")) - before if is_inherited(int(fd))]
    loop.close()
    loop.close()
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not inherited


def is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # that of the directory
        return False


@pytest.fixture
def past_1024() -> Iterator[None]:
    """Whatever is opened now has a number that select(2) cannot take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the host allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while taken[-1] < 1024:
            taken.append(os.dup(taken[0]))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_beyond_those_of_select(past_1024: None) -> None:
    kicked = threading.Event()
    loop = EventLoop(kicked.set)
    try:
        loop.watch()
        loop.interrupt()
        assert kicked.wait(20)
    finally:
        loop.close()


def test_what_is_planned_after_the_end_reaches_nobody() -> None:
    """Another machine may have the numbers of its descriptors by then."""
    loop = EventLoop(lambda: None)
    loop.watch()
    number = loop._alarm.fd
    loop.close()
    other = TimerFd()
    try:
        os.dup2(other.fd, number)
        other.set(monotonic() + 0.05)
        loop.call_at(monotonic(), lambda: None)
        loop.replanned()
        other.set(FAR)
        loop.call_at(0.0, lambda: None)
        assert select.select([other.fd], [], [], 0.1)[0] == []
    finally:
        for fd in {number, other.fd}:
            os.close(fd)


def test_a_timer_is_due_when_it_says_and_not_before() -> None:
    timer = TimerFd()
    try:
        assert not is_due(timer, 0)
        for when in (-1.0, -FAR, 0.0, monotonic()):
            timer.set(when)
            assert is_due(timer, 20)
            timer.set(FAR)
            assert not is_due(timer, 0)
        for later in (0.01, 0.05):
            when = monotonic() + later
            timer.set(when)
            assert is_due(timer, 20)
            assert monotonic() >= when
    finally:
        timer.close()


def is_due(timer: TimerFd, within: float) -> bool:
    return select.select([timer.fd], [], [], within)[0] == [timer.fd]
