"""Other rate limiters without a framework around them, behind one shape, each counting one hit for one caller.

Importing this needs none of them; they come with the peers that ``requirements-peers.in`` pins.
"""

from collections.abc import Awaitable, Callable
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

Hit = Callable[[str], Awaitable[object]]
_LIMIT = 1_000_000_000


class DecisionPeer(NamedTuple):
    """One algorithm of one library.

    Args:
        distribution: what it is called where it is installed from.
        way: the algorithm.
        open: returns what asks for one unit for a caller, counted at a Redis URL, or in memory without one; raises
            ImportError where the library is not installed.
    """

    distribution: str
    way: str
    open: Callable[[str | None], Hit]

    @property
    def name(self) -> str:
        """The library, the installed version and the algorithm."""
        return f"{self.distribution} {version(self.distribution)} {self.way}"


def _limits(strategy: str) -> Callable[[str | None], Hit]:
    def open_one(redis: str | None) -> Hit:
        storages, strategies = import_module("limits.aio.storage"), import_module("limits.aio.strategies")
        item = import_module("limits").RateLimitItemPerMinute(_LIMIT)
        storage = (
            storages.RedisStorage(f"async+{redis}", implementation="redispy", max_connections=256)
            if redis
            else storages.MemoryStorage()
        )
        limiter = getattr(strategies, strategy)(storage)

        def hit(caller: str) -> Awaitable[object]:
            asked: Awaitable[object] = limiter.hit(item, caller)
            return asked

        return hit

    return open_one


def _throttled(algorithm: str) -> Callable[[str | None], Hit]:
    def open_one(redis: str | None) -> Hit:
        throttled = import_module("throttled.asyncio")
        # As many connections as everybody has; a hundred is its own default, and the next caller fails.
        room = {"CONNECTION_POOL_KWARGS": {"max_connections": 256}}
        store = throttled.RedisStore(server=redis, options=room) if redis else throttled.MemoryStore()
        limiter = throttled.Throttled(using=algorithm, quota=f"{_LIMIT}/m", store=store)

        def hit(caller: str) -> Awaitable[object]:
            asked: Awaitable[object] = limiter.limit(caller)
            return asked

        return hit

    return open_one


DECISION_PEERS = (
    DecisionPeer("limits", "sliding window counter", _limits("SlidingWindowCounterRateLimiter")),
    DecisionPeer("limits", "fixed window", _limits("FixedWindowRateLimiter")),
    DecisionPeer("throttled-py", "token bucket", _throttled("token_bucket")),
    DecisionPeer("throttled-py", "gcra", _throttled("gcra")),
)
"""In memory: slowapi and others count with ``limits``."""
REDIS_PEERS = (DECISION_PEERS[0], DECISION_PEERS[2])
"""In Redis: of each library the algorithm that is nearest to ours, or its default."""
