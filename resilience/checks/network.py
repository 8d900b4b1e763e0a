"""Checks of what is reached over a network: a Redis, an HTTP API, a port."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resilience.checks.checked import Unmet, checked
from resilience.decisions.readiness import ComponentHealth
from resilience.errors import ConfigurationError

if TYPE_CHECKING:
    from httpx import AsyncClient
    from redis.asyncio import Redis, RedisCluster

_MOST_READ = 65_536  # Bytes of a body; a connection whose body was read to its end can be used again.


async def check_redis(target: "str | Redis | RedisCluster", *, timeout: float = 2.0) -> ComponentHealth:  # noqa: ASYNC109 - for clients that have none
    """Ping a Redis. Needs the extra ``redis``.

    Args:
        target: a URL, which is connected to anew for each check; or the application's own ``redis.asyncio`` client.
        timeout: seconds, > 0, until it drops a connection that does not answer.
    """

    async def ping() -> None:
        async with asyncio.timeout(timeout):
            if isinstance(target, str):
                await _ping_url(target, timeout)
            else:
                await target.ping()

    return await checked("redis", ping)


async def _ping_url(url: str, timeout: float) -> None:  # noqa: ASYNC109 - handed on
    from redis.asyncio import Redis  # noqa: PLC0415 - only who has a Redis needs the extra
    from redis.asyncio.retry import Retry  # noqa: PLC0415 - as above
    from redis.backoff import NoBackoff  # noqa: PLC0415 - as above

    # Both timeouts, since redis-py's own are seconds in some versions and endless in others.
    once = Retry(NoBackoff(), 0)
    async with Redis.from_url(url, retry=once, socket_connect_timeout=timeout, socket_timeout=timeout) as client:
        await client.ping()


async def check_http(client: "AsyncClient", url: str, *, timeout: float = 2.0) -> ComponentHealth:  # noqa: ASYNC109 - shorter than the client's
    """GET a page of another service: 2xx is healthy.

    Args:
        client: the application's own ``httpx.AsyncClient``, with its connections, certificates and credentials.
        url: absolute, or relative to the client's ``base_url``. A redirect is followed where the client does so.
        timeout: seconds, > 0, for all of it.

    Raises:
        ConfigurationError: ``client`` is no such client.
    """
    if not hasattr(client, "stream") or not hasattr(client, "__aenter__"):
        raise ConfigurationError("Pass the application's own httpx.AsyncClient, and then the URL.")

    async def get() -> Mapping[str, Any]:
        async with asyncio.timeout(timeout), client.stream("GET", url) as response:
            details = {"http_status": response.status_code}
            if not response.is_success:
                raise Unmet(f"Answered {response.status_code}", details)
            read = 0
            async for part in response.aiter_raw():
                read += len(part)
                if read > _MOST_READ:
                    break
            return details

    return await checked("http", get)


async def check_tcp(host: str, port: int, *, timeout: float = 2.0) -> ComponentHealth:  # noqa: ASYNC109 - a system's own is minutes
    """Connect to a port, and hang up.

    Args:
        host: a name or an address.
        port: 1 to 65535.
        timeout: seconds, > 0, until it gives up.
    """

    async def connect() -> None:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=0.25)
            writer.close()
            await writer.wait_closed()

    return await checked("tcp", connect)
