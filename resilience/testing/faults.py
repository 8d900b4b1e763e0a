"""Public: a store that can be taken away."""

from collections.abc import Sequence

from resilience.decisions.idempotency import Claim, Takeover
from resilience.decisions.idempotency_record import Standing
from resilience.decisions.quota import Usage
from resilience.errors import StoreUnavailableError
from resilience.stores.base import Store, Want
from resilience.verdict import Reply


class FaultyStore:
    """Passes every call on to ``store``, or refuses it as an unreachable store does while ``down``."""

    def __init__(self, store: Store) -> None:
        self.down = False
        self._store = store

    def _reach(self) -> Store:
        if self.down:
            raise StoreUnavailableError("The store was taken away by a test.")
        return self._store

    async def acquire(self, wants: Sequence[Want]) -> Sequence[Usage]:
        """See ``RateLimitStore``."""
        return await self._reach().acquire(wants)

    async def free(self, wants: Sequence[Want]) -> None:
        """See ``RateLimitStore``."""
        await self._reach().free(wants)

    async def reset(self, rule: str, subject: str) -> None:
        """See ``RateLimitStore``."""
        await self._reach().reset(rule, subject)

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        """See ``IdempotencyStore``."""
        return await self._reach().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
        """See ``IdempotencyStore``."""
        return await self._reach().renew(key, token, lease=lease, ttl=ttl)

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        """See ``IdempotencyStore``."""
        return await self._reach().complete(key, token, fingerprint, reply, ttl=ttl, tombstone=tombstone)

    async def release(self, key: str, token: str) -> bool:
        """See ``IdempotencyStore``."""
        return await self._reach().release(key, token)

    async def inspect(self, key: str) -> Standing | None:
        """See ``IdempotencyStore``."""
        return await self._reach().inspect(key)

    async def forget(self, key: str) -> bool:
        """See ``IdempotencyStore``."""
        return await self._reach().forget(key)

    async def resolve(self, key: str, reply: Reply | None, *, ttl: float, tombstone: float = 0.0) -> bool:
        """See ``IdempotencyStore``."""
        return await self._reach().resolve(key, reply, ttl=ttl, tombstone=tombstone)

    async def aclose(self) -> None:
        """Close the store behind."""
        await self._store.aclose()
