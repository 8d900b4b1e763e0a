"""Floor 4: rate limits alone, for ``app.add_middleware``, configured by the environment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from http_middleware.configured import ConfiguredMiddleware
from resilience.admission import Policy
from resilience.decisions.quota import Quota
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.rule import Rule
from resilience.settings import Settings
from resilience.stores.base import Store

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


class RateLimitMiddleware(ConfiguredMiddleware):
    """Limits every caller over all routes: ``app.add_middleware(RateLimitMiddleware, redis_client=redis)``.

    Reads ``RATE_LIMIT_ENABLED``, ``RATE_LIMIT_REQUESTS`` and ``RATE_LIMIT_WINDOW``. Needs the extra ``settings``.
    Wherever it is added, it limits the user that the application's authentication found, and each reply carries ids.

    Args:
        app: the application inside.
        redis_client: the application's own ``redis.asyncio`` client: a ``Redis``, one of ``Sentinel.master_for``, or a
            ``RedisCluster``; it stays the application's to close. Without one, ``REDIS_URL`` says where counts are
            kept, or they are kept in memory.
        settings: in place of the environment.

    Raises:
        ConfigurationError: a variable is wrong; the message names it.
    """

    def __init__(
        self,
        app: ASGIApp,
        redis_client: "Redis | RedisCluster | None" = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(app, redis_client, settings, _policies)


def _policies(store: Store, settings: Settings) -> Sequence[Policy]:
    if not settings.rate_limit_enabled:
        return ()
    rule = Rule(Quota(settings.rate_limit_requests, per=settings.rate_limit_window))
    return [RateLimitPolicy(store, rule)]
