"""Other libraries for FastAPI behind one shape, each set up as its own page says, with its reply headers on.

Importing this needs none of them; ``requirements-peers.in`` pins what ``benchmarks.http`` was last held against.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel
from redis.asyncio import Redis
from starlette.types import ASGIApp

Build = Callable[[int, str | None], AbstractAsyncContextManager[ASGIApp]]
"""Opens a guarded FastAPI application: so many requests a minute for each client, counted at a Redis URL or here."""


class Thing(BaseModel):
    """What the measured route takes and gives back."""

    name: str
    price: float
    tags: list[str] = []


async def make(thing: Thing) -> Thing:
    """Do nothing, as the smallest endpoint with a model does."""
    return thing


def fastapi_app(endpoint: Callable[..., Any] = make, **options: Any) -> FastAPI:
    """Return an application of one route, ``POST /things``."""
    app = FastAPI()
    app.post("/things", **options)(endpoint)
    return app


class Peer(NamedTuple):
    """One way to use one other library.

    Args:
        distribution: what it is called where it is installed from.
        way: which of its ways this is, or ``""``.
        build: opens it; raises ImportError where it is not installed.
        stores: where it can count: ``"m"`` in memory, ``"r"`` in Redis; ``""`` where it counts nothing.
        layer: the same around any ASGI application, where it can stand there.
    """

    distribution: str
    way: str
    build: Build
    stores: str = "mr"
    layer: Callable[[ASGIApp], ASGIApp] | None = None

    @property
    def name(self) -> str:
        """The library, the installed version and the way."""
        return f"{self.distribution} {version(self.distribution)} {self.way}".strip()


def _asgi_correlation_id(app: ASGIApp) -> ASGIApp:
    guarded: ASGIApp = import_module("asgi_correlation_id").CorrelationIdMiddleware(app)
    return guarded


def _starlette_context(app: ASGIApp) -> ASGIApp:
    plugins = import_module("starlette_context.plugins")
    ids = (plugins.RequestIdPlugin(), plugins.CorrelationIdPlugin())
    guarded: ASGIApp = import_module("starlette_context.middleware").RawContextMiddleware(app, plugins=ids)
    return guarded


def _with_layer(layer: Callable[[ASGIApp], ASGIApp]) -> Build:
    @asynccontextmanager
    async def build(_limit: int, _redis: str | None) -> AsyncIterator[ASGIApp]:
        app = fastapi_app()
        app.add_middleware(layer)
        app.middleware_stack = app.build_middleware_stack()  # now, so that a missing library shows now
        yield app

    return build


def _slowapi(app: FastAPI, limiter: Any) -> FastAPI:
    app.state.limiter = limiter
    handler = import_module("slowapi")._rate_limit_exceeded_handler  # noqa: SLF001 - its page says so
    app.add_exception_handler(import_module("slowapi.errors").RateLimitExceeded, handler)
    return app


def _slowapi_limiter(redis: str | None, **options: Any) -> Any:
    by_address = import_module("slowapi.util").get_remote_address
    uri = redis or "memory://"
    return import_module("slowapi").Limiter(key_func=by_address, storage_uri=uri, headers_enabled=True, **options)


@asynccontextmanager
async def _slowapi_decorator(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
    async def make_limited(request: Request, response: Response, thing: Thing) -> Thing:  # noqa: ARG001 - it looks there
        return thing

    limiter = _slowapi_limiter(redis)
    yield _slowapi(fastapi_app(limiter.limit(f"{limit}/minute")(make_limited)), limiter)


@asynccontextmanager
async def _slowapi_middleware(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
    app = _slowapi(fastapi_app(), _slowapi_limiter(redis, default_limits=[f"{limit}/minute"]))
    app.add_middleware(import_module("slowapi.middleware").SlowAPIASGIMiddleware)
    yield app


@asynccontextmanager
async def _throttled(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
    throttled, door = import_module("throttled.asyncio"), import_module("throttled.asyncio.contrib.fastapi")
    store = throttled.RedisStore(server=redis) if redis else throttled.MemoryStore()
    limiter = door.Limiter(f"{limit}/m", store=store, key_func=door.get_remote_address)

    async def make_limited(request: Request, thing: Thing) -> Thing:  # noqa: ARG001 - it looks there
        return thing

    app = fastapi_app(limiter.limit()(make_limited))
    app.add_middleware(door.RateLimitMiddleware)
    app.add_exception_handler(door.RateLimitExceededError, door.rate_limit_exceeded_handler)
    yield app


@asynccontextmanager
async def _fastapi_limiter(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
    limiter = import_module("fastapi_limiter").FastAPILimiter
    rate = import_module("fastapi_limiter.depends").RateLimiter(times=limit, seconds=60)
    async with Redis.from_url(redis or "") as client:
        await limiter.init(client)
        yield fastapi_app(dependencies=[Depends(rate)])


@asynccontextmanager
async def _redis_sdk(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
    sdk = import_module("redis_fastapi")
    before = os.environ.get("REDIS_URL")
    os.environ["REDIS_URL"] = redis or ""
    sdk.get_settings.cache_clear()
    sdk.get_settings()  # kept from now on: it reads the environment once
    if before is None:
        del os.environ["REDIS_URL"]
    else:
        os.environ["REDIS_URL"] = before
    app = fastapi_app(dependencies=[Depends(sdk.rate_limit(f"{limit}/minute"))])
    sdk.FastAPIRedis(app).lifespan().rate_limiting()
    async with app.router.lifespan_context(app):
        yield app


PEERS = (
    Peer("asgi-correlation-id", "", _with_layer(_asgi_correlation_id), "", _asgi_correlation_id),
    Peer("starlette-context", "", _with_layer(_starlette_context), "", _starlette_context),
    Peer("slowapi", "decorator", _slowapi_decorator),
    Peer("slowapi", "middleware", _slowapi_middleware),
    Peer("throttled-py", "", _throttled),
    Peer("fastapi-redis-sdk", "", _redis_sdk, "r"),
    Peer("fastapi-limiter", "", _fastapi_limiter, "r"),
)
