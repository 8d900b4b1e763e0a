"""Floor 2: operations whose store was gone when they began or ended. One timer for all, none when there are none."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from time import monotonic
from typing import NamedTuple

from resilience.errors import StoreUnavailableError
from resilience.policies.heartbeat import Heartbeat
from resilience.verdict import Reply

logger = logging.getLogger("resilience")


Complete = Callable[[str, str, bytes, Reply | None, float], Awaitable[bool]]
"""Records an end in the store: key, token, fingerprint, reply, and the seconds that the reply is kept."""


Release = Callable[[str, str], Awaitable[bool]]
"""Frees a key that a token holds."""

_TRIES = 2  # Of a release that the store answers; a claim that is still on its way comes with the first.


class _Done(NamedTuple):
    key: str
    fingerprint: bytes
    reply: Reply | None
    until: float


class _Freed(NamedTuple):
    key: str
    tries: int
    until: float


class LateCompletions:
    """Records what has finished as soon as its store is back, each at most until its reply would have expired.

    Until then its lease is renewed with those of running operations, wherever the store can still do that. What
    another worker took over meanwhile stays that worker's. At the bounds a reply is let go before an operation is:
    one that is done must not run again. Nothing outlives the process.

    A claim or a release that got no answer may yet be carried out, when a server that hung goes on: the key would be
    held by nobody. So it is freed, once the store answers again.

    Args:
        complete: records one in the store.
        release: frees a key.
        heartbeat: renews the leases.
        ttl: seconds that a reply is kept.
        recorded: told the key of what was recorded at last.
        every: seconds between two attempts; one command tells whether the store is back.
        most: how many operations are kept, at least 0.
        most_bytes: how much their replies may take.
        clock: reads seconds; monotonic.
    """

    def __init__(
        self,
        complete: Complete,
        release: Release,
        heartbeat: Heartbeat,
        ttl: float,
        recorded: Callable[[str], None],
        *,
        every: float = 1.0,
        most: int = 10_000,
        most_bytes: int = 64 * 2**20,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._complete = complete
        self._release = release
        self._heartbeat = heartbeat
        self._ttl = ttl
        self._recorded = recorded
        self._every = every
        self._most = most
        self._most_bytes = most_bytes
        self._clock = clock
        self._pending: dict[str, _Done | _Freed] = {}
        self._bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._trying: asyncio.Task[None] | None = None

    def keep(self, key: str, token: str, fingerprint: bytes, reply: Reply | None) -> bool:
        """Keep the end of one operation until it can be recorded; False where there is no room for it."""
        if len(self._pending) >= self._most:
            return False
        if reply is not None and self._bytes + _size(reply) > self._most_bytes:
            reply = None
        self._bytes += _size(reply)
        self._pending[token] = _Done(key, fingerprint, reply, self._clock() + self._ttl)
        self._heartbeat.hold(key, token)
        self._begin()
        return True

    def free(self, key: str, token: str) -> None:
        """Free a key as soon as the store answers; where there is no room, it waits for its lease."""
        if len(self._pending) < self._most:
            self._pending[token] = _Freed(key, _TRIES, self._clock() + self._ttl)
            self._begin()

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop or (self._timer is None and (self._trying is None or self._trying.done())):
            self._loop = loop
            self._schedule(loop)

    async def retry(self) -> None:
        """Try each operation once; the first that finds no store ends the attempt."""
        for token, late in list(self._pending.items()):
            left = late.until - self._clock()
            try:
                if isinstance(late, _Freed):
                    await self._try_release(token, late, left)
                else:
                    await self._try_complete(token, late, left)
            except StoreUnavailableError:
                return
            except Exception:
                self._drop(token)
                logger.exception("The end of an operation could not be recorded")

    async def _try_complete(self, token: str, done: _Done, left: float) -> None:
        if left <= 0:
            self._drop(token)
            logger.warning("A finished operation was never recorded: its store was gone for too long")
            return
        stored = await self._complete(done.key, token, done.fingerprint, done.reply, left)
        self._drop(token)
        if stored:
            self._recorded(done.key)
        else:
            logger.warning("A reply was not stored: another worker took the idempotency key over")

    async def _try_release(self, token: str, freed: _Freed, left: float) -> None:
        released = left > 0 and await self._release(freed.key, token)
        if released or left <= 0 or freed.tries <= 1:
            self._drop(token)
        else:
            self._pending[token] = freed._replace(tries=freed.tries - 1)
        if released:
            self._recorded(freed.key)

    def _drop(self, token: str) -> None:
        late = self._pending.pop(token, None)
        if isinstance(late, _Done):
            self._heartbeat.drop(token)
            self._bytes -= _size(late.reply)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        # A context of its own: it outlives the call that began it, and must not log under that call's ids.
        self._timer = loop.call_later(self._every, self._on_timer, loop, context=Context())

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._trying = loop.create_task(self._try(loop))

    async def _try(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await self.retry()
        finally:
            if self._pending and not loop.is_closed():
                self._schedule(loop)


def _size(reply: Reply | None) -> int:
    return 0 if reply is None else len(reply.body) + sum(len(name) + len(value) for name, value in reply.metadata)
