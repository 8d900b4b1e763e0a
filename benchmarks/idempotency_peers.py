"""Other idempotency libraries for FastAPI behind one shape, each set up as its own page says.

Importing this needs none of them; ``requirements-peers.in`` pins what ``benchmarks.idempotency`` was last held against.
Both store the reply under the key alone, whoever sends it; neither has a heartbeat, and one has no fence.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from redis.asyncio import Redis
from starlette.types import ASGIApp

from benchmarks.peers import fastapi_app

Endpoint = Callable[..., Any]
Build = Callable[[Endpoint, str | None], AbstractAsyncContextManager[ASGIApp]]
"""Opens a FastAPI application of one keyed route, whose records are at a Redis URL or here."""


class KeyedPeer(NamedTuple):
    """One other library.

    Args:
        distribution: what it is called where it is installed from.
        build: opens it; raises ImportError where it is not installed.
        stores: where it can keep records: ``"m"`` in memory, ``"r"`` in Redis.
    """

    distribution: str
    build: Build
    stores: str

    @property
    def name(self) -> str:
        """The library and the installed version."""
        return f"{self.distribution} {version(self.distribution)}"


@asynccontextmanager
async def _ichido(endpoint: Endpoint, redis: str | None) -> AsyncIterator[ASGIApp]:
    ichido = import_module("ichido")
    async with Redis.from_url(redis or "") as client:
        app = fastapi_app(endpoint)
        app.add_middleware(ichido.IchidoMiddleware, store=ichido.RedisIdempotencyStore(client))
        yield app


@asynccontextmanager
async def _mobius(endpoint: Endpoint, redis: str | None) -> AsyncIterator[ASGIApp]:
    mobius = import_module("mobius_idempotence")
    if redis:
        backend = import_module("mobius_idempotence.backends.redis").RedisBackend(redis, max_connections=256)
    else:
        backend = import_module("mobius_idempotence.backends.memory").MemoryBackend()
    manager = mobius.IdempotencyManager(backend, mobius.IdempotencyConfig(fail_open=False))
    yield fastapi_app(mobius.idempotent(manager, status_code=200)(endpoint))
    await manager.aclose()


KEYED_PEERS = (
    KeyedPeer("ichido", _ichido, "r"),
    KeyedPeer("mobius-idempotence-library", _mobius, "mr"),
)
