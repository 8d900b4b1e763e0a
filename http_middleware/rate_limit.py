"""Floor 4: rate limits alone, for ``app.add_middleware``, configured by the environment."""

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware.middleware import ResilienceMiddleware
from resilience.decisions.quota import Quota
from resilience.pipeline import Pipeline
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.rule import Rule
from resilience.settings import Settings
from resilience.stores.base import Store

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


class RateLimitMiddleware:
    """Limits every caller over all routes: ``app.add_middleware(RateLimitMiddleware, redis_client=redis)``.

    Reads ``RATE_LIMIT_ENABLED``, ``RATE_LIMIT_REQUESTS`` and ``RATE_LIMIT_WINDOW``. Needs the extra ``settings``.

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
        settings = settings or Settings.load()
        store: Store
        if redis_client is None:
            store = settings.store()
        else:
            from resilience.stores.redis import RedisStore  # noqa: PLC0415 - only who has a client needs the extra

            store = RedisStore(redis_client)
        rule = Rule(Quota(settings.rate_limit_requests, per=settings.rate_limit_window))
        policies = [RateLimitPolicy(store, rule)] if settings.rate_limit_enabled else []
        self._store = store
        self.app: ASGIApp = ResilienceMiddleware(app, Pipeline(policies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; let go of the store when the application has stopped."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            await self._store.aclose()
