"""``app.add_middleware(RateLimitMiddleware, redis_client=redis)`` and its like, as users write it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis

from http_middleware import IdempotencyMiddleware, RateLimitMiddleware
from resilience import ConfigurationError
from tests.support.redis_servers import RedisServer, binary


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with asyncio.Runner() as runner:
        server = runner.run(RedisServer(binary()).__aenter__())
        yield server
        runner.run(server.__aexit__())


@pytest.fixture
async def redis(server: RedisServer) -> "AsyncIterator[Redis]":
    client = Redis.from_url(server.url)
    await client.flushall()
    yield client
    await client.aclose()


def application(redis: "Redis | None" = None) -> FastAPI:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    if redis is None:
        app.add_middleware(RateLimitMiddleware)
    else:
        app.add_middleware(RateLimitMiddleware, redis_client=redis)
    return app


Get = Callable[[], Awaitable[httpx.Response]]


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application's lifespan around a client, as a server does."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[object] = asyncio.Queue()
    inbox.put_nowait({"type": "lifespan.startup"})
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    await outbox.get()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    inbox.put_nowait({"type": "lifespan.shutdown"})
    await life


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[Get]:
    async with running(app) as client:
        yield lambda: client.get("/")


async def test_the_environment_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT_REQUESTS", "2")
    monkeypatch.setenv("RATE_LIMIT_WINDOW", "60")
    async with served(application()) as get:
        replies = [await get() for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].headers["x-ratelimit-limit"] == "2"
    assert replies[2].json() == {"detail": "Too many requests", "retry_after": 60}


async def test_two_processes_worth_of_applications_share_one_redis(
    redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATE_LIMIT_REQUESTS", "3")
    async with served(application(redis)) as one, served(application(redis)) as two:
        assert [(await get()).status_code for get in (one, two, one, two)] == [200, 200, 200, 429]
    assert await redis.ping()


async def test_two_processes_worth_of_applications_share_one_redis_for_their_keys(redis: "Redis") -> None:
    runs: list[str] = []
    replies = []
    for _ in range(2):
        app = application(redis)
        app.add_api_route("/pay", lambda: runs.append("paid"), methods=["POST"])
        app.add_middleware(IdempotencyMiddleware, redis_client=redis)
        async with running(app) as client:
            replies.append(await client.post("/pay", headers={"Idempotency-Key": "key_1"}))
    assert [reply.headers.get("x-idempotent-replayed") for reply in replies] == [None, "true"]
    assert [reply.headers["x-ratelimit-remaining"] for reply in replies] == ["99", "98"]
    assert runs == ["paid"]


async def test_a_redis_url_in_the_environment_is_used(
    server: RedisServer, redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", server.url)
    async with served(application()) as get:
        assert (await get()).status_code == 200
    assert await redis.keys("resilience:v1:*")


async def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT_ENABLED", "false")
    monkeypatch.setenv("RATE_LIMIT_REQUESTS", "1")
    async with served(application()) as get:
        replies = [await get() for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert "x-ratelimit-limit" not in replies[0].headers


async def test_a_malformed_url_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2/x@host:port")
    with pytest.raises(ConfigurationError, match="malformed") as refused:
        application().build_middleware_stack()
    assert "hunter2" not in str(refused.value)
