"""The floor above health: the life of a process that serves: starting, ready, draining, stopped, for all its servers.

Draining comes before stopping: a load balancer needs some seconds to see that a process is no longer ready, and what it
sends until then is served.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from types import FrameType
from typing import Any, Protocol

from resilience.health import HealthChecker
from resilience.pipeline import Pipeline
from resilience.stores.base import Store

logger = logging.getLogger("resilience")

DRAIN_SECONDS = 5.0
"""Seconds between "not ready" and the end of the servers, by default; see ``HEALTH_DRAIN_SECONDS``."""


class Server(Protocol):
    """What ``run`` asks of a server: ``grpc.aio.Server`` is one, ``http_middleware.server.UvicornServer`` another."""

    async def start(self) -> None:
        """Serve; where that can't be, or is cancelled, raise and leave nothing open."""
        ...

    async def stop(self, grace: float | None) -> object:
        """Take nothing new, and give what runs at most so many seconds."""
        ...

    async def wait_for_termination(self) -> object:
        """Return when the server has ended, or raise what ended it."""
        ...


async def run(
    *servers: Server,
    checker: HealthChecker,
    pipeline: Pipeline | None = None,
    store: Store | None = None,
    delay: float = DRAIN_SECONDS,
    grace: float = 30.0,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, and leave without dropping a request.

    Starts the servers in order, then says that the service is ready. At the signal: not ready, over every protocol, and
    every watcher is told; after ``delay``, in which all is still served, the servers stop, all at the same time; then
    work that outlived its clients ends, and the store closes. Another signal cuts the delay short, and SIGINT (Ctrl-C)
    needs none. A second SIGINT does what it does without us: under ``asyncio.run`` it cancels.

    A cancellation does the same without a delay. Outside of the main thread it is the only way: no signal is heard
    there.

    Give Kubernetes a ``terminationGracePeriodSeconds`` of more than ``delay + 2 * grace``.

    Args:
        servers: each one serves nothing yet, and is stopped if it was started.
        checker: shared with the doors; it is ``starting`` from here on, whatever it was made as.
        pipeline: whose keyed work is waited for.
        store: is closed last, however this ends; by default the pipeline's.
        delay: seconds from "not ready" until the servers stop, at least 0.
        grace: seconds that running calls have to end, and after them keyed work again, at least 0. A gRPC client that
            does not read its replies holds the stop up for all of it.
        on_ready: called once when everything serves; what it raises ends the servers.

    Raises:
        RuntimeError: a server ended though nobody had asked for it; the others were drained and stopped.
        Exception: what the start of a server raised, or what ended one.
    """
    ends: dict[Server, asyncio.Task[object]] = {}
    closing = pipeline.store if store is None and pipeline is not None else store
    async with AsyncExitStack() as ending:  # from the last to the first, and each one though another fails
        signals = _Signals()
        ending.enter_context(_heard(signals.hear))
        ending.callback(checker.stop)
        if closing is not None:
            ending.push_async_callback(closing.aclose)
        if pipeline is not None:
            ending.push_async_callback(_finish, pipeline, grace)
        ending.push_async_callback(_stop, ends, grace)
        ending.callback(checker.drain)
        life = asyncio.create_task(_live(servers, ends, checker, on_ready))
        ending.push_async_callback(_cut, life)
        await signals.come(life)
        if checker.phase == "ready":
            checker.drain()
            await signals.urge(delay)
        if life.done():
            life.result()


async def _live(
    servers: Sequence[Server],
    ends: dict[Server, asyncio.Task[object]],
    checker: HealthChecker,
    on_ready: Callable[[], None] | None,
) -> None:
    """Start the servers and see them serve; returns never."""
    checker.phase = "starting"
    for server in servers:
        await server.start()
        ends[server] = asyncio.create_task(_end_of(server))
    if on_ready is not None:
        on_ready()
    checker.mark_ready()
    done, _ = await asyncio.wait(ends.values(), return_when=asyncio.FIRST_COMPLETED)
    for end in done:
        end.result()
    raise RuntimeError("A server ended though nobody had asked for it.")


async def _end_of(server: Server) -> object:
    return await server.wait_for_termination()


async def _cut(life: asyncio.Task[None]) -> None:
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)


async def _stop(ends: dict[Server, asyncio.Task[object]], grace: float) -> None:
    stops = await asyncio.gather(*(server.stop(grace) for server in ends), return_exceptions=True)
    await asyncio.gather(*ends.values(), return_exceptions=True)
    for stop in stops:
        if isinstance(stop, BaseException):
            raise stop


async def _finish(pipeline: Pipeline, grace: float) -> None:
    if not await pipeline.drained(grace):
        logger.warning("Keyed work was still running after %g s of grace; its keys wait for their leases", grace)


@contextmanager
def drain_on_signals(checker: HealthChecker, delay: float = DRAIN_SECONDS) -> Iterator[None]:
    """Drain before the server that owns the process hears of SIGTERM: for a lifespan under uvicorn or gunicorn.

    Those close their port at the signal, so that nobody ever sees "not ready". Here the signal waits ``delay`` seconds,
    in which the service drains and still serves; then it reaches whoever handled it before. Another signal, and SIGINT
    (Ctrl-C), reach them at once.

    Enter it on the running loop, and say ``checker.mark_ready()`` inside of it. It does nothing outside of the main
    thread, where a test's client may run the lifespan, and comes too late for servers that have the loop hear their
    signals, as Hypercorn does. With ``uvicorn --reload`` let ``delay`` be 0, or each reload takes as long.

    Args:
        checker: shared with the doors.
        delay: seconds, at least 0.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def hand_on(number: int) -> None:
        for known, handler in before.items():
            signal.signal(known, handler)
        signal.raise_signal(number)

    def hear(number: int) -> None:
        nonlocal timer
        at_once = timer is not None or number == signal.SIGINT
        if timer is not None:
            timer.cancel()
        checker.drain()
        timer = loop.call_later(0 if at_once else delay, hand_on, number)

    with _heard(hear) as before:
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()


@contextmanager
def _heard(hear: Callable[[int], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Have the loop call ``hear`` with each SIGTERM and SIGINT; yield what handled them before."""
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])  # who presses Ctrl-C twice won't wait
        loop.call_soon_threadsafe(hear, number)

    # Not loop.add_signal_handler, which Windows lacks and which can't be chained with the handler of a server.
    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGTERM, signal.SIGINT):
            before[known] = signal.signal(known, handle) or signal.SIG_DFL
    try:
        yield before
    finally:
        for known, handler in before.items():
            if signal.getsignal(known) is handle:
                signal.signal(known, handler)


class _Signals:
    """That somebody asked for the end, and how urgently."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._urged = asyncio.Event()

    def hear(self, number: int) -> None:
        if self._asked.is_set() or number == signal.SIGINT:
            self._urged.set()
        self._asked.set()

    async def come(self, life: asyncio.Task[None]) -> None:
        """Return when a signal has come, or ``life`` is over; from then on every signal urges."""
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({asked, life}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        self._asked.set()

    async def urge(self, delay: float) -> None:
        """Return after ``delay`` seconds, or when a signal urges."""
        try:
            await asyncio.wait_for(self._urged.wait(), delay)
        except TimeoutError:
            pass
