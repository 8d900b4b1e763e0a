"""What a Redis that hangs costs requests, and what requests leave behind in it: the HTTP door on a real server."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from redis.asyncio import Redis

from http_middleware import idempotent, install, rate_limit
from resilience import IdempotencyPolicy, Pipeline, Quota, RateLimitPolicy, Rule
from resilience.stores.redis import RedisStore
from tests.integration.http_driver import connect, within
from tests.support.redis_servers import RedisServer, binary

DEADLINE = 0.4  # Seconds: long beside what a request takes here, so that a busy machine proves nothing.
LIMITED, FREE = "/v1/items/1", "/free"


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with RedisServer(binary()) as server:
        yield server


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[RedisStore]:
    """A store whose connection is open."""
    store = RedisStore(server.url, limit_timeout=DEADLINE, record_timeout=DEADLINE)
    await within(store.release("nothing", "nobody"))
    try:
        yield store
    finally:
        await store.aclose()


def build(store: RedisStore, *quotas: Quota | str, **options: Any) -> FastAPI:
    """Return an application whose one route is limited by a policy and by decorators, and keyed; another is free."""
    router = APIRouter()

    @router.post("/items/{item}")
    @rate_limit("100000/hour")
    @rate_limit(10_000, 60)
    @idempotent()
    async def change(item: int) -> int:
        return item

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.add_api_route(FREE, lambda: "free")
    rules = [Rule(quota, operations=["POST /v1/items/{item}"]) for quota in quotas or ["100000/minute"]]
    install(app, Pipeline([RateLimitPolicy(store, rules, **options)]))
    return app


async def hang(server: RedisServer, client: httpx.AsyncClient) -> None:
    assert (await client.post(LIMITED)).status_code == 200
    server.signal(signal.SIGSTOP)


async def seconds(work: Any) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await work
    return loop.time() - start


async def test_a_stalled_redis_holds_up_no_request_that_needs_none(server: RedisServer) -> None:
    async with opened(server) as store, connect(build(store)) as client:
        await hang(server, client)
        held = [asyncio.create_task(client.post(LIMITED)) for _ in range(10)]
        free = [(await client.get(FREE)).status_code for _ in range(20)]
        waiting = [task for task in held if not task.done()]
        replies = await asyncio.gather(*held)

    assert free == [200] * 20
    assert waiting == held
    assert [reply.status_code for reply in replies] == [200] * 10


async def test_a_stalled_redis_costs_a_request_its_deadline_once_however_many_limits_it_has(
    server: RedisServer,
) -> None:
    async with opened(server) as store, connect(build(store, "1000/second", "50000/hour")) as client:
        await hang(server, client)
        first = await seconds(client.post(LIMITED))
        keyed = await seconds(client.post(LIMITED, headers={"idempotency-key": "k"}))
        later = await seconds(asyncio.gather(*(client.post(LIMITED) for _ in range(50))))

    assert DEADLINE * 0.9 < first < DEADLINE * 1.5
    # From then on it is known to be gone: nobody pays again.
    assert keyed < DEADLINE / 2
    assert later < DEADLINE


@pytest.mark.parametrize(("way", "expected"), [("closed", [503, 503, 503]), ("local", [200, 429, 429])])
async def test_while_redis_is_stalled_callers_see_what_the_limit_declares(
    server: RedisServer, way: Any, expected: list[int]
) -> None:
    async with opened(server) as store, connect(build(store, "1/minute", on_outage=way)) as client:
        await hang(server, client)
        replies = [await client.post(LIMITED) for _ in range(3)]

    assert [reply.status_code for reply in replies] == expected
    assert all(reply.headers["x-request-id"].startswith("req_") for reply in replies)
    if way == "closed":
        assert {reply.headers["retry-after"] for reply in replies} == {"1"}


async def test_a_keyed_request_never_runs_unprotected_while_redis_is_stalled(server: RedisServer) -> None:
    async with opened(server) as store, connect(build(store)) as client:
        await hang(server, client)
        refused = await client.post(LIMITED, headers={"idempotency-key": "k"})

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


RULES = [
    Rule("1000/minute"),
    Rule(Quota(100, per=3600, algorithm="sliding_log")),
    Rule(Quota(100, per=0.5, algorithm="token_bucket", burst=2)),
    Rule(Quota(1000, per=60, algorithm="fixed_window"), name="fixed"),
    Rule(Quota(1000, calendar="month")),
    Rule(Quota(10, per=30, algorithm="concurrency")),
]


async def test_nothing_that_requests_leave_in_redis_is_kept_for_ever(server: RedisServer) -> None:
    seen: dict[bytes, int] = {}

    async with opened(server) as store, Redis.from_url(server.url) as redis:

        async def look() -> None:
            async for key in redis.scan_iter(count=1000):
                seen[key] = min(seen.get(key, 2**62), await redis.pttl(key))

        router = APIRouter()

        @router.post("/items/{item}")
        @rate_limit("5/minute")
        @idempotent()
        async def change(item: int) -> int:
            await look()  # the key is claimed, and a permit is held
            return item

        app = FastAPI()
        app.include_router(router, prefix="/v1")
        install(app, Pipeline([RateLimitPolicy(store, RULES), IdempotencyPolicy(store)]))
        async with connect(app) as client:
            for key in ("a", "a", "b"):
                assert (await client.post(LIMITED, headers={"idempotency-key": key})).status_code == 200
                await look()

    assert len(seen) == len(RULES) + 1 + 2
    assert -1 not in seen.values()  # what Redis says of a key without an end


async def test_a_bucket_that_refills_within_milliseconds_limits_all_the_same(server: RedisServer) -> None:
    rate, burst, sent = 100, 3, 300
    quota = Quota(rate, per=1, algorithm="token_bucket", burst=burst)
    async with opened(server) as store, connect(build(store, quota)) as client:
        replies: list[httpx.Response] = []

        async def send() -> None:
            replies.extend(await asyncio.gather(*(client.post(LIMITED) for _ in range(sent))))

        took = await seconds(send())

    admitted = sum(reply.status_code == 200 for reply in replies)
    assert burst <= admitted <= burst + rate * took + 1
    assert {reply.status_code for reply in replies} == {200, 429}
