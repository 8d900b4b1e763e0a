"""Floor 2: finished operations whose store was gone when they finished. One timer for all, none when there are none."""

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


class _Done(NamedTuple):
    key: str
    fingerprint: bytes
    reply: Reply | None
    until: float


class LateCompletions:
    """Records what has finished as soon as its store is back, each at most until its reply would have expired.

    Until then its lease is renewed with those of running operations, wherever the store can still do that. What
    another worker took over meanwhile stays that worker's. At the bounds a reply is let go before an operation is:
    one that is done must not run again. Nothing outlives the process.

    Args:
        complete: records one in the store.
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
        self._heartbeat = heartbeat
        self._ttl = ttl
        self._recorded = recorded
        self._every = every
        self._most = most
        self._most_bytes = most_bytes
        self._clock = clock
        self._pending: dict[str, _Done] = {}
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
        loop = asyncio.get_running_loop()
        if self._loop is not loop or (self._timer is None and (self._trying is None or self._trying.done())):
            self._loop = loop
            self._schedule(loop)
        return True

    async def retry(self) -> None:
        """Try to record each operation once; the first that finds no store ends the attempt."""
        for token, done in list(self._pending.items()):
            left = done.until - self._clock()
            if left <= 0:
                self._drop(token)
                logger.warning("A finished operation was never recorded: its store was gone for too long")
                continue
            try:
                stored = await self._complete(done.key, token, done.fingerprint, done.reply, left)
            except StoreUnavailableError:
                return
            except Exception:
                self._drop(token)
                logger.exception("A finished operation could not be recorded")
                continue
            self._drop(token)
            if stored:
                self._recorded(done.key)
            else:
                logger.warning("A reply was not stored: another worker took the idempotency key over")

    def _drop(self, token: str) -> None:
        self._heartbeat.drop(token)
        done = self._pending.pop(token, None)
        if done is not None:
            self._bytes -= _size(done.reply)

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
