"""A store with seeded bugs, for the checker of histories to find."""

from resilience.decisions.idempotency import Claim, Claimed, Takeover
from resilience.stores.redis import RedisStore
from resilience.verdict import Reply


class LyingStore(RedisStore):
    """Redis, with ``lies``: of ``claims`` it grants all; of ``completes`` it keeps nothing, and says that it does."""

    lies = ""

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        """Ask, or grant without asking."""
        if self.lies == "claims":
            return Claimed(1)
        return await super().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        """Keep the answer, or say so."""
        if self.lies == "completes":
            return True
        return await super().complete(key, token, fingerprint, reply, ttl=ttl, tombstone=tombstone)
