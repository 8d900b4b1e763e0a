"""The life of a process: real signals to this one, and servers that are no more than a start, a stop and an end."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from resilience import HealthChecker, MemoryStore, Pipeline
from resilience.lifecycle import Server, drain_on_signals, run

BOUND = 10.0
FOREVER = 600.0
TERM, INT = signal.SIGTERM, signal.SIGINT


class Scene:
    """What happened, in order, to a checker and what it is shared with."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.checker = HealthChecker()
        self.checker.subscribe(lambda: self.seen.append(self.checker.phase))
        self.store = ClosingStore(self.seen)

    def server(self, name: str) -> "Door":
        return Door(name, self.seen)

    def run(self, *servers: Server, **options: Any) -> "asyncio.Task[None]":
        options = {"delay": FOREVER, "grace": FOREVER, "store": self.store, **options}
        return asyncio.create_task(run(*servers, checker=self.checker, **options))

    async def until(self, what: str) -> None:
        async with asyncio.timeout(BOUND):
            while what not in self.seen:  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0)


class ClosingStore(MemoryStore):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    async def aclose(self) -> None:
        self._seen.append("store closed")


class Door:
    """A server; what it does is decided by the test."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen
        self.may_start, self.may_stop, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.may_stop.set()
        self.fault: Exception | None = None

    async def start(self) -> None:
        await self.may_start.wait()
        if self.fault is not None:
            raise self.fault
        self.seen.append(f"{self.name} started")

    async def stop(self, grace: float | None) -> None:
        await asyncio.wait_for(self.may_stop.wait(), grace)
        self.seen.append(f"{self.name} stopped")
        self.ended.set()
        if self.fault is not None:
            raise self.fault

    async def wait_for_termination(self) -> None:
        await self.ended.wait()
        if self.fault is not None:
            raise self.fault


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """What of SIGTERM and SIGINT reached whoever handled them before; and all is put back by whoever took them."""
    reached: list[int] = []

    def handle(number: int, _frame: object) -> None:
        reached.append(number)

    before = {number: signal.signal(number, handle) for number in (TERM, INT)}
    yield reached
    left = [number for number in before if signal.getsignal(number) is not handle]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == []


async def ended(task: "asyncio.Task[None]") -> None:
    await asyncio.wait_for(task, BOUND)


async def test_a_service_is_ready_once_all_its_servers_have_started() -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    grpc.may_start.clear()
    task = scene.run(http, grpc, on_ready=lambda: scene.seen.append("on_ready"))
    await scene.until("http started")
    assert (await scene.checker.run()).status == "unhealthy"
    grpc.may_start.set()
    await scene.until("ready")
    assert scene.seen == ["http started", "grpc started", "on_ready", "ready"]
    signal.raise_signal(INT)
    await ended(task)


async def test_sigterm_drains_then_stops_then_finishes_keyed_work_then_closes_the_store() -> None:
    scene = Scene()
    pipeline = Pipeline(store=scene.store)
    gate = asyncio.Event()

    async def keyed() -> None:
        await gate.wait()
        scene.seen.append("keyed work ended")

    task = scene.run(scene.server("http"), scene.server("grpc"), pipeline=pipeline, store=None, delay=0.05)
    await scene.until("ready")
    pipeline.outlive(keyed())
    began = asyncio.get_running_loop().time()
    signal.raise_signal(TERM)
    await scene.until("grpc stopped")
    assert asyncio.get_running_loop().time() - began >= 0.05
    gate.set()
    await ended(task)
    life = ["draining", "http stopped", "grpc stopped", "keyed work ended", "store closed", "stopped"]
    assert scene.seen[3:] == life


@pytest.mark.parametrize("signals", [(TERM, TERM), (TERM, INT), (INT,)])
async def test_another_signal_and_ctrl_c_skip_the_delay(signals: tuple[signal.Signals, ...]) -> None:
    scene = Scene()
    task = scene.run(scene.server("http"), delay=FOREVER)
    await scene.until("ready")
    for number in signals:
        signal.raise_signal(number)
        await scene.until("draining")
    await ended(task)
    assert scene.seen[-4:] == ["draining", "http stopped", "store closed", "stopped"]


async def test_one_sigterm_leaves_everything_served_for_the_delay() -> None:
    scene = Scene()
    task = scene.run(scene.server("http"))
    await scene.until("ready")
    signal.raise_signal(TERM)
    await scene.until("draining")
    assert await asyncio.wait([task], timeout=0.05) == (set(), {task})
    assert "http stopped" not in scene.seen
    signal.raise_signal(TERM)
    await ended(task)


async def test_more_sigterms_never_cut_the_grace_and_a_second_ctrl_c_is_what_it_is_without_us(
    handlers: list[int],
) -> None:
    scene = Scene()
    http = scene.server("http")
    http.may_stop.clear()
    task = scene.run(http)
    await scene.until("ready")
    signal.raise_signal(INT)
    await scene.until("draining")
    for number in (TERM, INT, TERM):
        signal.raise_signal(number)
    assert handlers == [INT]
    assert await asyncio.wait([task], timeout=0.05) == (set(), {task})
    http.may_stop.set()
    await ended(task)


async def test_a_start_that_fails_stops_what_was_started_and_closes_the_store() -> None:
    scene = Scene()
    http, grpc, probes = scene.server("http"), scene.server("grpc"), scene.server("probes")
    grpc.fault = OSError("the port is taken")
    with pytest.raises(OSError, match="the port is taken"):
        await ended(scene.run(http, grpc, probes))
    assert scene.seen == ["http started", "draining", "http stopped", "store closed", "stopped"]


@pytest.mark.parametrize("number", [TERM, INT])
async def test_a_signal_while_a_server_starts_ends_the_start(number: signal.Signals) -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    grpc.may_start.clear()
    task = scene.run(http, grpc)
    await scene.until("http started")
    signal.raise_signal(number)
    await ended(task)
    assert scene.seen == ["http started", "draining", "http stopped", "store closed", "stopped"]


@pytest.mark.parametrize(("fault", "raised"), [(OSError("gone"), OSError), (None, RuntimeError)])
async def test_a_server_that_ends_by_itself_ends_the_others_and_is_an_error(
    fault: Exception | None, raised: type[Exception]
) -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    task = scene.run(http, grpc, delay=0)
    await scene.until("ready")
    http.fault = fault
    http.ended.set()
    with pytest.raises(raised):
        await ended(task)
    assert scene.seen[-5:] == ["draining", "http stopped", "grpc stopped", "store closed", "stopped"]


async def test_when_a_server_ends_the_others_drain_and_one_signal_cuts_that_short() -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    task = scene.run(http, grpc)
    await scene.until("ready")
    http.ended.set()
    await scene.until("draining")
    assert await asyncio.wait([task], timeout=0.05) == (set(), {task})
    signal.raise_signal(TERM)
    with pytest.raises(RuntimeError):
        await ended(task)


async def test_a_cancelled_run_stops_without_a_delay() -> None:
    scene = Scene()
    task = scene.run(scene.server("http"))
    await scene.until("ready")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(task)
    assert scene.seen[-4:] == ["draining", "http stopped", "store closed", "stopped"]


async def test_a_run_that_is_cancelled_while_it_starts_stops_what_was_started() -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    grpc.may_start.clear()
    task = scene.run(http, grpc)
    await scene.until("http started")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(task)
    assert scene.seen == ["http started", "draining", "http stopped", "store closed", "stopped"]


async def test_what_on_ready_raises_ends_the_servers_at_once_and_comes_out() -> None:
    scene = Scene()

    def broken() -> None:
        raise LookupError("no greeting")

    with pytest.raises(LookupError, match="no greeting"):
        await ended(scene.run(scene.server("http"), on_ready=broken))
    assert scene.seen == ["http started", "draining", "http stopped", "store closed", "stopped"]


async def test_a_stop_that_fails_keeps_nothing_else_from_ending() -> None:
    scene = Scene()
    http, grpc = scene.server("http"), scene.server("grpc")
    task = scene.run(http, grpc)
    await scene.until("ready")
    http.fault = OSError("it broke while it stopped")
    signal.raise_signal(INT)
    with pytest.raises(OSError, match="while it stopped"):
        await ended(task)
    assert scene.seen[-4:] == ["http stopped", "grpc stopped", "store closed", "stopped"]


async def test_keyed_work_that_outlasts_the_grace_is_left_and_told(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    pipeline = Pipeline(store=scene.store)
    task = scene.run(scene.server("http"), pipeline=pipeline, grace=0.01)
    await scene.until("ready")
    work = pipeline.outlive(asyncio.Event().wait())
    signal.raise_signal(INT)
    await ended(task)
    assert "Keyed work was still running after 0.01 s of grace" in caplog.text
    assert scene.seen[-2:] == ["store closed", "stopped"]
    work.cancel()


async def test_outside_of_the_main_thread_signals_are_let_be_and_a_cancellation_ends_it(handlers: list[int]) -> None:
    scene = Scene()
    cancels: Future[Callable[[], object]] = Future()

    async def live() -> None:
        task = scene.run(scene.server("http"))
        loop = asyncio.get_running_loop()
        await scene.until("ready")
        cancels.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        with suppress(asyncio.CancelledError):
            await ended(task)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, live()))
    cancel = await asyncio.wait_for(asyncio.wrap_future(cancels), BOUND)
    signal.raise_signal(TERM)
    assert handlers == [TERM]
    assert scene.seen[-1] == "ready"
    cancel()
    await ended(thread)
    assert scene.seen[-4:] == ["draining", "http stopped", "store closed", "stopped"]


async def reached(handlers: list[int]) -> list[int]:
    async with asyncio.timeout(BOUND):
        while not handlers:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
    return handlers


async def test_a_drain_on_signals_comes_before_whoever_handled_them(handlers: list[int]) -> None:
    scene = Scene()
    began = asyncio.get_running_loop().time()
    with drain_on_signals(scene.checker, 0.05):
        signal.raise_signal(TERM)
        await scene.until("draining")
        assert handlers == []
        assert await reached(handlers) == [TERM]
        assert asyncio.get_running_loop().time() - began >= 0.05


@pytest.mark.parametrize("signals", [(TERM, TERM), (TERM, INT), (INT,)])
async def test_another_signal_and_ctrl_c_are_handed_on_at_once(
    signals: tuple[signal.Signals, ...], handlers: list[int]
) -> None:
    scene = Scene()
    with drain_on_signals(scene.checker, FOREVER):
        for number in signals:
            signal.raise_signal(number)
            await scene.until("draining")
        assert await reached(handlers) == [signals[-1]]
        signal.raise_signal(TERM)
        assert handlers == [signals[-1], TERM]


async def test_a_drain_on_signals_that_is_left_early_hands_nothing_on(handlers: list[int]) -> None:
    scene = Scene()
    with drain_on_signals(scene.checker, 0):
        signal.raise_signal(TERM)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert handlers == []


async def test_a_signal_that_nobody_handled_before_is_the_systems_again() -> None:
    mine = signal.signal(TERM, signal.SIG_DFL)
    with drain_on_signals(HealthChecker()):
        assert signal.getsignal(TERM) is not signal.SIG_DFL
    assert signal.signal(TERM, mine) is signal.SIG_DFL


async def test_outside_of_the_main_thread_a_drain_on_signals_does_nothing(handlers: list[int]) -> None:
    async def live() -> None:
        with drain_on_signals(HealthChecker()):
            pass

    await asyncio.to_thread(asyncio.run, live())
    signal.raise_signal(TERM)
    assert handlers == [TERM]
