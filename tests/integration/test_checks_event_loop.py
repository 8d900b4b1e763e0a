"""Who blocks the event loop is named: by the line, and without where it lies on the disk."""

import asyncio
import logging
import sysconfig
import threading
import time
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary

import pytest

from resilience.checks import EventLoopLag
from resilience.checks.event_loop import _place
from resilience.decisions.readiness import HealthStatus
from resilience.errors import ConfigurationError
from resilience.health import HealthChecker
from resilience.testing import ManualClock

SOON = 0.02


class Told(logging.Handler):
    """Lets a block end when the watcher has told of it: nothing here waits for a time."""

    def __init__(self) -> None:
        super().__init__()
        self.told = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.told.set()

    def blocking_handler(self) -> None:
        assert self.told.wait(10)  # this line is at fault
        self.told.clear()


@pytest.fixture
def told() -> Iterator[Told]:
    handler = Told()
    logging.getLogger("resilience").addHandler(handler)
    yield handler
    logging.getLogger("resilience").removeHandler(handler)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def lag(clock: ManualClock) -> EventLoopLag:
    return EventLoopLag(SOON, interval=SOON, remember=60, clock=clock)


FAULT = Told.blocking_handler.__code__.co_firstlineno + 1
WHERE = f"test_checks_event_loop.py:{FAULT} blocking_handler"


async def test_a_blocked_loop_is_told_by_its_line_and_forgotten_in_time(
    lag: EventLoopLag, clock: ManualClock, told: Told
) -> None:
    with lag:
        assert (await lag()).message == "On time"
        told.blocking_handler()
        await asyncio.sleep(0)  # what was asked for while the loop stood still is answered now

        found = await lag()
        assert (found.name, found.status) == ("event_loop", HealthStatus.DEGRADED)
        assert found.message == f"Blocked for 0.0 s in {WHERE}"

        clock.advance(60)
        assert (await lag()).status is HealthStatus.HEALTHY


async def test_how_long_it_stood_still_is_told(clock: ManualClock, told: Told) -> None:
    asked = threading.Event()

    def read() -> float:
        now = clock()
        if threading.current_thread() is not threading.main_thread():
            asked.set()  # the watcher reads the clock when it asks for a sign of life
        return now

    with EventLoopLag(SOON, interval=SOON, clock=read) as lag:
        assert asked.wait(10)
        clock.advance(1.4)
        told.blocking_handler()
        await asyncio.sleep(0)
        found = await lag()
    assert found.message == f"Blocked for 1.4 s in {WHERE}"
    assert found.latency_ms == pytest.approx(1400)


async def test_each_block_is_logged_once_with_its_traceback(lag: EventLoopLag, told: Told) -> None:
    with lag:
        for _ in range(2):
            told.blocking_handler()
            await asyncio.sleep(0)
    assert len(told.lines) == 2
    for line in told.lines:
        assert WHERE in line
        assert "# this line is at fault" in line
        assert "in test_each_block_is_logged_once_with_its_traceback" in line


STDLIB = sysconfig.get_path("stdlib")
RUN = [("/srv/app/main.py", "<module>"), (f"{STDLIB}/asyncio/runners.py", "run")]
ONCE = [*RUN, (f"{STDLIB}/asyncio/base_events.py", "_run_once")]
HANDLER, LIBRARY = ("/srv/app/handlers.py", "pay"), (f"{STDLIB}/site-packages/requests/api.py", "get")
SOCKET = (f"{STDLIB}/socket.py", "recv_into")


@pytest.mark.parametrize(
    ("stack", "place"),
    [
        ([*ONCE, HANDLER, LIBRARY, SOCKET], "handlers.py:7 pay"),
        ([*ONCE, LIBRARY, SOCKET], "api.py:7 get"),
        ([*ONCE, SOCKET], "socket.py:7 recv_into"),
        ([*RUN, HANDLER], "handlers.py:7 pay"),  # uvloop has no lines of its own
        ([*ONCE, (f"{STDLIB}/selectors.py", "select")], "no code: the process got no time to run"),
        (RUN, "no code: the process got no time to run"),
        ([HANDLER, ("<string>", "made")], "handlers.py:7 pay"),
    ],
)
def test_the_innermost_line_of_the_application_is_at_fault(stack: list[tuple[str, str]], place: str) -> None:
    frames = [FrameSummary(file, 7, name, lookup_line=False) for file, name in stack]
    assert _place(StackSummary.from_list(frames)) == place


async def test_a_blocked_loop_degrades_the_live_group_alone(lag: EventLoopLag, told: Told) -> None:
    checker = HealthChecker()
    checker.add_check("event_loop", lag, groups=("live",), critical=False)
    with lag:
        told.blocking_handler()
        await asyncio.sleep(0)
        live, ready = await checker.run("live"), await checker.run()
    assert (live.status, ready.status) == (HealthStatus.DEGRADED, HealthStatus.HEALTHY)
    assert live.components["event_loop"].message == f"Blocked for 0.0 s in {WHERE}"


async def test_nothing_watches_before_the_start_or_after_the_stop(lag: EventLoopLag) -> None:
    def watchers() -> int:
        return sum(thread.name == "resilience-loop-lag" for thread in threading.enumerate())

    assert watchers() == 0
    assert (await lag()).message == "Not watched"
    lag.start()
    lag.start()
    assert watchers() == 1
    assert (await lag()).status is HealthStatus.HEALTHY
    lag.stop()
    lag.stop()
    assert watchers() == 0
    found = await lag()
    assert (found.status, found.message) == (HealthStatus.DEGRADED, "Not watched")


def test_the_watch_ends_with_a_loop_that_nobody_stopped_to_watch(lag: EventLoopLag) -> None:
    async def begin() -> None:
        lag.start()

    asyncio.run(begin())
    until = time.monotonic() + 10
    while any(thread.name == "resilience-loop-lag" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(SOON)


async def test_a_start_outside_of_a_loop_is_refused_at_once(lag: EventLoopLag) -> None:
    raised: list[BaseException] = []

    def begin() -> None:
        try:
            lag.start()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert len(raised) == 1


@pytest.mark.parametrize(
    ("threshold", "interval", "remember"), [(0, 1, 1), (1, 0, 1), (1, 1, -1), (float("nan"), 1, 1)]
)
def test_numbers_that_can_t_be_are_refused(threshold: float, interval: float, remember: float) -> None:
    with pytest.raises(ConfigurationError):
        EventLoopLag(threshold, interval=interval, remember=remember)
