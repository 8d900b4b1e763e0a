"""Floor 2: keeps the leases of running operations alive. One timer for all of them, none when nothing runs."""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

from resilience.errors import ConfigurationError, StoreUnavailableError

logger = logging.getLogger("resilience")


class Renews(Protocol):
    """What leases are renewed with: a store, or what stands for several of its counts."""

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
        """Extend one lease; False where it is no longer the token's."""
        ...


class Heartbeat:
    """Renews every held lease each third of its length.

    A lease that can't be renewed is not cut short: the owner goes on, and the fence in ``complete`` decides.

    Args:
        store: whose leases they are.
        lease: seconds.
        ttl: seconds that a renewed record is kept.
    """

    def __init__(self, store: Renews, lease: float, ttl: float) -> None:
        self._store = store
        self._lease = lease
        self._ttl = ttl
        self._held: dict[str, tuple[str, Callable[[], None] | None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    def hold(self, key: str, token: str, lost: Callable[[], None] | None = None) -> None:
        """Start renewing ``key`` for the owner of ``token``.

        Args:
            lost: called once, if the lease is found to be the token's no longer.

        Raises:
            ConfigurationError: no event loop of asyncio is running.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "Idempotency keys and concurrency limits renew their leases with asyncio, and nothing else here needs "
                "it. Serve the application on an event loop of asyncio, or leave these two out."
            ) from None
        self._held[token] = key, lost
        if self._timer is None or self._loop is not loop:
            self._loop = loop
            self._schedule(loop)

    def drop(self, token: str) -> None:
        """Stop renewing."""
        self._held.pop(token, None)
        if not self._held and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def beat(self) -> None:
        """Renew every held lease once. A store that is gone is tried again at the next beat."""
        for token, (key, lost) in list(self._held.items()):
            try:
                renewed = await self._store.renew(key, token, lease=self._lease, ttl=self._ttl)
            except StoreUnavailableError as error:
                logger.warning("Leases of running operations could not be renewed: %s", error)
                return
            if not renewed and token in self._held:
                del self._held[token]
                if lost is not None:
                    lost()
                logger.warning("A running operation lost its idempotency lease; its reply will not be stored")

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        # A context of its own: it outlives the call that began it, and must not log under that call's ids.
        self._timer = loop.call_later(self._lease / 3, self._on_timer, loop, context=Context())

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._held:
            self._beating = loop.create_task(self.beat())
            self._schedule(loop)
