"""Floor 1: how a connection of redis-py's is opened, and what is said where that fails."""

import os
from typing import Any

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from resilience.errors import StoreUnavailableError


async def opened(connection: Any) -> Any:
    """Open one of redis-py's connections, and return it."""
    connection.retry = Retry(NoBackoff(), 0)  # trying again is ours
    try:
        await connection.connect()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


def reason_of(error: BaseException) -> str:
    """Say what went wrong without what may hold a password: a connection's own text quotes its URL at times."""
    if isinstance(error, TimeoutError):
        return "no answer"
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)  # asyncio's own text tells the address instead
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(error, StoreUnavailableError):
        return str(error).rstrip(".")
    return type(error).__name__
