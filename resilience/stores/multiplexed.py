"""Floor 1: one open connection to one Redis server: a queue of those who wait, a buffer for one turn, a timer.

Facts
- Replies come in the order of commands, so a queue of futures is the whole of multiplexing.
- Commands of one turn of the event loop leave in one write.
- One timer sweeps all deadlines. A command that is past its own fails alone; silence since it was sent means that the
  server is gone, and fails everything.
- Waking from sleep takes longer than the answer of a Redis near by (ADR 14). So the loop is kept turning for a moment
  behind a command that goes out alone; a server that does not answer in that moment is soon not waited for in this way.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from math import ceil, inf
from typing import Any, Protocol

import hiredis

from resilience.errors import StoreUnavailableError
from resilience.stores.connect import reason_of

Answered = Callable[[Any], None]
"""Is told a reply, an error reply included, or the ``StoreUnavailableError`` that came in its stead."""

_MOMENT = 100e-6  # Seconds that the loop is kept turning, at most.
_SLEEPS = 100  # Lone commands for which it is not, after one whose answer took longer.
_SECOND_LOOK = 0.002  # Seconds between the end of a deadline and the end of the connection.
_SHORTEST_SILENCE = 0.05  # Seconds; a command that had less than that left can't tell that the server is gone.


def tell_result(answered: Answered, done: "asyncio.Future[Any]") -> None:
    """Tell what a future ended with."""
    if done.cancelled():
        answered(StoreUnavailableError("The store was closed."))
    else:
        answered(done.exception() or done.result())


class _Waiter(Protocol):
    """What a wire asks of a future."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Any, /) -> None: ...
    def exception(self) -> object: ...


class Told:
    """Stands in the queue where a future would, for a caller who wants to be called."""

    __slots__ = ("_answered",)

    def __init__(self, answered: Answered) -> None:
        self._answered: Answered | None = answered

    def done(self) -> bool:
        """Tell whether the caller was called."""
        return self._answered is None

    def set_result(self, result: Any, /) -> None:
        """Call the caller."""
        answered, self._answered = self._answered, None  # the queue of deadlines holds this longer than it is needed
        if answered is not None:
            answered(result)

    set_exception = set_result

    def exception(self) -> None:
        """Return nothing: the caller was told of it."""
        return


class Wire(asyncio.Protocol):
    """One open connection: a queue of futures, a buffer for one turn, a timer for all deadlines."""

    def __init__(self, connection: Any, lost: Callable[["Wire", str], None]) -> None:
        self.waiting: deque[_Waiter] = deque()
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._buffer: list[bytes] = []
        # By timeout, so that each queue is in the order of its deadlines.
        self._deadlines: dict[float, deque[tuple[float, _Waiter]]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweeps_at = inf
        self._awake_until = 0.0
        self._sleeps = 0
        self._doubted_at = 0.0
        self.opened_at = self._heard_at = self._loop.time()
        # redis-py has opened the connection and said who we are; from here on the bytes come to us. Its stream is
        # kept, since one that is collected closes its transport, and the connection is told that it has none.
        self._stream = connection._writer  # noqa: SLF001 - there is no public way to the transport
        connection._reader = connection._writer = None  # noqa: SLF001 - as above
        self._transport = self._stream.transport
        self._transport.set_protocol(self)

    def send(self, packed: bytes, timeout: float) -> asyncio.Future[Any]:
        """Queue a command; the future ends with its reply, or with StoreUnavailableError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.queue(packed, timeout, future)
        return future

    def queue(self, packed: bytes, timeout: float, waiter: "_Waiter") -> None:
        """Send a command in its turn, on whose reply somebody waits."""
        if not self.waiting:
            self._transport.write(packed)  # nothing is under way, so nothing is won by waiting for company
            self._stay_awake()
        else:
            if not self._buffer:
                self._loop.call_soon(self._flush)
            self._buffer.append(packed)
        self.waiting.append(waiter)
        timeout = max(1, ceil(timeout * 1000)) / 1000  # what is left of a deadline may be any number; queues are few
        queue = self._deadlines.get(timeout)
        if queue is None:
            queue = self._deadlines[timeout] = deque()
        while queue and queue[0][1].done():
            queue.popleft()
        deadline = self._loop.time() + timeout
        queue.append((deadline, waiter))
        if deadline < self._sweeps_at:
            self._sweep_at(deadline)

    def _sweep_at(self, deadline: float) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweeps_at = deadline
        self._sweeper = self._loop.call_at(deadline, self._sweep, context=Context())

    def _stay_awake(self) -> None:
        if self._sleeps:
            self._sleeps -= 1
        elif not self._awake_until:
            self._awake_until = self._loop.time() + _MOMENT
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self.waiting and self._loop.time() < self._awake_until:
            self._loop.call_soon(self._turn)  # each turn looks at all sockets, and sleeps at none
            return
        if self._heard_at < self._awake_until - _MOMENT:
            self._sleeps = _SLEEPS
        self._awake_until = 0.0

    def _flush(self) -> None:
        self._transport.write(b"".join(self._buffer))
        self._buffer.clear()

    def data_received(self, data: bytes) -> None:
        """Give each reply to whom it belongs."""
        self._heard_at = self._loop.time()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                future = self.waiting.popleft()
                if not future.done():
                    future.set_result(reply)
        except (hiredis.ProtocolError, IndexError):
            self.fail("it does not speak the Redis protocol")

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits."""
        self.fail(reason_of(exc) if exc is not None else "it closed the connection")

    def fail(self, why: str) -> None:
        """End the connection and everything that waits for it."""
        self.discard()
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_exception(StoreUnavailableError(f"The store is not available: {why}."))
                future.exception()  # whoever waited may be gone
        self._lost(self, why)

    def discard(self) -> None:
        """Let go of the socket."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._transport.abort()

    def _sweep(self) -> None:
        self._sweeper, self._sweeps_at = None, inf
        now, soonest = self._loop.time(), inf
        for timeout, queue in self._deadlines.items():
            while queue and (queue[0][1].done() or queue[0][0] <= now):
                _, future = queue.popleft()
                if future.done():
                    continue
                if now - self._heard_at >= max(timeout, _SHORTEST_SILENCE):
                    if self._doubted_at > self._heard_at:
                        self.fail(f"no answer within {timeout:g} s")
                    else:
                        # Was it the server that stood still, or this loop? What it sent meanwhile is read by then.
                        queue.appendleft((now, future))
                        self._doubted_at = now
                        self._sweep_at(now + _SECOND_LOOK)
                    return
                future.set_exception(StoreUnavailableError(f"The store did not answer within {timeout:g} s."))
            if queue and queue[0][0] < soonest:
                soonest = queue[0][0]
        if soonest < inf:
            self._sweep_at(soonest)
