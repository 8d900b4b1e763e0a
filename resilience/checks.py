"""The floor above health: checks of what services depend on. Their messages hold no text of a driver's.

They never raise: whatever goes wrong makes the component unhealthy, by the name of the exception's class. How long one
may take is for the ``HealthChecker`` that asks it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from inspect import isawaitable, iscoroutinefunction
from time import perf_counter
from typing import TYPE_CHECKING, Any

from resilience.decisions.readiness import HealthStatus
from resilience.health import ComponentHealth

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

logger = logging.getLogger("resilience")


async def check_redis(target: "str | Redis | RedisCluster") -> ComponentHealth:
    """Ping a Redis. Needs the extra ``redis``.

    Args:
        target: a URL, which is connected to anew for each check; or the application's own ``redis.asyncio`` client.
    """
    return await _checked("redis", lambda: _ping_url(target) if isinstance(target, str) else target.ping())


async def check_database(db: Any) -> ComponentHealth:
    """Ping a database.

    Args:
        db: anything with ``ping()``, or with ``execute(...)`` that takes ``"SELECT 1"``: a connection or pool of
            asyncpg or psycopg, for example. Plain methods run in a thread: sqlite3 needs ``check_same_thread=False``.
    """
    return await _checked("database", lambda: _ask(db))


async def _checked(name: str, check: Callable[[], Awaitable[Any]]) -> ComponentHealth:
    started = perf_counter()
    status, message = HealthStatus.HEALTHY, "Connected"
    try:
        await check()
    except Exception as error:
        # Its text may quote a URL and the password in it.
        status, message = HealthStatus.UNHEALTHY, type(error).__name__
        logger.warning("The health check of the %s failed: %s", name, message)
    return ComponentHealth(name, status, (perf_counter() - started) * 1000, message)


async def _ping_url(url: str) -> None:
    from redis.asyncio import Redis  # noqa: PLC0415 - only who has a Redis needs the extra
    from redis.asyncio.retry import Retry  # noqa: PLC0415 - as above
    from redis.backoff import NoBackoff  # noqa: PLC0415 - as above

    async with Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
        await client.ping()


async def _ask(db: Any) -> None:
    ping = getattr(db, "ping", None)
    method, arguments = (db.execute, ("SELECT 1",)) if ping is None else (ping, ())
    if iscoroutinefunction(method):
        await method(*arguments)
        return
    answer = await asyncio.to_thread(method, *arguments)
    if isawaitable(answer):
        await answer
