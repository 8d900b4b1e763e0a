"""Floor 1: one multiplexed connection to one Redis node, and nothing else that a client library does.

redis-py opens the connection (addresses, TLS, unix sockets, authentication, sentinels) and hands its transport over:
what it costs per command, its layers between a call and the socket, is what this module leaves out.

Facts
- What outlives the call that began it (the task that knocks, the timer) has a context of its own, so that its log
  lines do not carry that call's ids.
- While the server is gone every command fails at once. One task goes on knocking, ever more slowly.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial
from typing import Any

import hiredis

from resilience.errors import StoreUnavailableError
from resilience.stores.connect import opened, reason_of
from resilience.stores.multiplexed import Answered, Told, Wire, tell_result

logger = logging.getLogger("resilience")

Arguments = tuple[bytes | str | int | float, ...]
Send = Callable[[Arguments], "asyncio.Future[Any]"]
Setup = Callable[[Send], Awaitable[None]]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # Seconds between two knocks.
_KNOCK_TIMEOUT = 1.0  # Seconds that opening a connection may take.


class Link:
    """A connection that opens when first used, and opens again when it is lost.

    Args:
        make: returns an unconnected ``redis.asyncio`` connection.
        setup: asked once for each connection that opens, before any other command; what it raises keeps it shut.
        name: what the node is called in logs and errors; holds no secret.
        max_in_flight: commands that may wait for their replies at one time.
    """

    def __init__(self, make: Callable[[], Any], setup: Setup, name: str, *, max_in_flight: int = 20_000) -> None:
        self.name = name
        self._make = make
        self._setup = setup
        self._max_in_flight = max_in_flight
        self._wire: Wire | None = None
        self._knocking: asyncio.Task[None] | None = None
        self._answered: asyncio.Future[None] | None = None
        self._late: set[asyncio.Task[Any]] = set()
        self._why = ""
        self._pause = 0.0
        self._closed = False

    def send(self, arguments: Arguments, timeout: float) -> "asyncio.Future[Any]":
        """Send one command; the future ends with its reply, an error reply included (``hiredis.ReplyError``).

        On an open connection the command is on its way when this returns, so that a caller who is cancelled while it
        waits does not recall it.

        Args:
            timeout: seconds, > 0. Past them, or where the server is known to be gone, the future ends with
                ``StoreUnavailableError``.
        """
        packed: bytes = hiredis.pack_command(arguments)  # type: ignore[arg-type] # its stub allows one argument only
        wire = self._wire
        if wire is None:
            return self._send_late(packed, timeout)
        if len(wire.waiting) >= self._max_in_flight:
            return self._over_the_bound()
        return wire.send(packed, timeout)

    def tell(self, arguments: Arguments, timeout: float, answered: Answered) -> None:
        """Send one command and have the reply, or the ``StoreUnavailableError``, told as soon as it is read.

        It spares a busy caller a future and a turn of the loop; ``answered`` must not raise.
        """
        wire = self._wire
        if wire is not None and len(wire.waiting) < self._max_in_flight:
            packed: bytes = hiredis.pack_command(arguments)  # type: ignore[arg-type] # as in send
            wire.queue(packed, timeout, Told(answered))
        else:
            self.send(arguments, timeout).add_done_callback(partial(tell_result, answered))

    def reset(self, why: str) -> None:
        """Drop the connection, because ``why``, and open another."""
        if self._wire is not None:
            self._wire.fail(why)

    @property
    def busy(self) -> bool:
        """Whether a command waits for its reply."""
        return bool(self._late or (self._wire is not None and self._wire.waiting))

    async def aclose(self) -> None:
        """Close for good."""
        self._closed = True
        self._why = "it was closed"
        if self._wire is not None:
            self._wire.fail(self._why)
        if self._knocking is not None:
            self._knocking.cancel()
            await asyncio.wait({self._knocking})
        self._answer()
        if self._late:
            await asyncio.wait(self._late)
        await asyncio.sleep(0)  # the transport closes its socket in the next turn

    def _over_the_bound(self) -> "asyncio.Future[Any]":
        return _failed(f"{self.name} has {self._max_in_flight} commands in flight, which is the bound")

    def _send_late(self, packed: bytes, timeout: float) -> "asyncio.Future[Any]":
        if self._why:
            return _failed(f"{self.name} is not available: {self._why}")
        if len(self._late) >= self._max_in_flight:
            return self._over_the_bound()
        # Only those who come before the first knock is answered wait for it.
        loop = asyncio.get_running_loop()
        if self._answered is None:
            self._answered = loop.create_future()
            self._knocking = loop.create_task(self._knock(), context=Context())
        task = loop.create_task(self._send_once_open(packed, loop.time() + timeout, self._answered))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return task

    async def _send_once_open(self, packed: bytes, until: float, answered: "asyncio.Future[None]") -> Any:
        loop = asyncio.get_running_loop()
        await asyncio.wait({answered}, timeout=until - loop.time())
        if self._wire is None:
            raise StoreUnavailableError(f"{self.name} is not available: {self._why or 'it has not answered yet'}.")
        return await self._wire.send(packed, until - loop.time())

    async def _knock(self) -> None:
        while not self._closed:
            if self._pause:
                await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
            try:
                async with asyncio.timeout(_KNOCK_TIMEOUT):
                    self._wire = await self._connect()
            except Exception as error:  # what redis-py raises has no common base
                self._note(reason_of(error))
            self._answer()
            if self._wire is not None:
                if self._why:
                    logger.warning("%s is available again", self.name)
                self._why = ""
                return

    async def _connect(self) -> "Wire":
        wire = Wire(await opened(self._make()), self._lost)
        try:
            await self._setup(lambda arguments: wire.send(hiredis.pack_command(arguments), _KNOCK_TIMEOUT))  # type: ignore[arg-type] # as in send
        except BaseException:
            wire.discard()
            raise
        return wire

    def _answer(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _lost(self, wire: "Wire", why: str) -> None:
        if wire is not self._wire:
            return
        self._wire = None
        if asyncio.get_running_loop().time() - wire.opened_at > _LONGEST_PAUSE:
            self._pause = 0.0  # else each connection is lost as soon as it opens: that is no better than a closed door
        if not self._closed:
            self._note(why)
            self._knocking = asyncio.get_running_loop().create_task(self._knock(), context=Context())

    def _note(self, why: str) -> None:
        if not self._why:
            logger.warning("%s is not available: %s", self.name, why)
        self._why = why


def _failed(why: str) -> "asyncio.Future[Any]":
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(StoreUnavailableError(f"{why}."))
    return future
