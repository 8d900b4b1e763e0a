"""Floor 4: what the ready-made middleware share: settings from the environment, and a store that they let go of."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware.edge import EdgeMiddleware
from http_middleware.middleware import ResilienceMiddleware
from resilience.admission import Policy
from resilience.pipeline import Pipeline
from resilience.settings import Settings
from resilience.stores.base import Store

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


class ConfiguredMiddleware(ResilienceMiddleware):
    """Guards with the policies that the environment describes, on a store that goes when the application does.

    Args:
        app: the application inside.
        redis_client: the application's own; None takes the store that the settings name.
        settings: None reads the environment.
        make: makes the policies.

    Raises:
        ConfigurationError: a variable is wrong; the message names it.
    """

    def __init__(
        self,
        app: ASGIApp,
        redis_client: "Redis | RedisCluster | None",
        settings: Settings | None,
        make: Callable[[Store, Settings], Sequence[Policy]],
    ) -> None:
        settings = settings or Settings.load()
        if redis_client is None:
            self._store = settings.store()
        else:
            from resilience.stores.redis import RedisStore  # noqa: PLC0415 - only who has a client needs the extra

            self._store = RedisStore(redis_client)
        super().__init__(app, Pipeline(make(self._store, settings), store=self._store))
        self._leads = False

    async def _live(self, edge: EdgeMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super()._live(edge, scope, receive, send)
        finally:
            await self._store.aclose()
