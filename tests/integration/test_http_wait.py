"""Requests whose twin runs, where they wait; and what a handler may know of its keyed operation."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from redis.asyncio import Redis

from http_middleware import (
    IdempotencyGuard,
    IdempotencyMiddleware,
    get_idempotency_guard,
    idempotent,
    install,
)
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Store, running_operation
from resilience.decisions.idempotency import Claim, InProgress, Takeover
from resilience.settings import Settings
from resilience.stores.redis import RedisStore
from tests.integration.http_driver import connect, dial, serving, within
from tests.support.redis_servers import RedisServer, binary

Guard = Annotated[IdempotencyGuard, Depends(get_idempotency_guard)]
KEY = {"Idempotency-Key": "key_1", "Accept": "application/problem+json"}


class Counting(MemoryStore):
    """Counts the commands, and tells a test of each claim."""

    def __init__(self) -> None:
        super().__init__()
        self.commands = 0
        self.claimed = asyncio.Queue[str]()

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        self.commands += 1
        self.claimed.put_nowait(key)
        return await super().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)


class Work:
    """A handler that waits until it is let go on, and fails as often as it is told to."""

    def __init__(self, *, failures: int = 0) -> None:
        self.runs = 0
        self.failures = failures
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self) -> dict[str, int]:
        self.runs += 1
        run = self.runs
        self.started.set()
        await within(self.go_on.wait())
        if run <= self.failures:
            raise HTTPException(503)
        return {"run": run}


async def guarded(work: Work, guard: IdempotencyGuard) -> Any:
    result = await guard.check(in_progress="wait")
    if result.is_duplicate:
        return result.cached_response
    reply = await work()
    await guard.complete(reply)
    return reply


def behind_policy(work: Work, store: Store) -> FastAPI:
    app = FastAPI()
    app.add_api_route("/work", work.__call__, methods=["POST"])
    install(app, Pipeline([IdempotencyPolicy(store, in_progress="wait")]))
    return app


def behind_decorator(work: Work, store: Store) -> FastAPI:
    app = FastAPI()

    @app.post("/work")
    @idempotent(in_progress="wait")
    async def handle() -> dict[str, int]:
        return await work()

    install(app, Pipeline(store=store))
    return app


def behind_guard(work: Work, store: Store) -> FastAPI:
    app = FastAPI()

    @app.post("/work")
    async def handle(guard: Guard) -> Any:
        return await guarded(work, guard)

    install(app, Pipeline(store=store))
    return app


Build = Callable[[Work, Store], FastAPI]
each_way = pytest.mark.parametrize("build", [behind_policy, behind_decorator, behind_guard])


async def twins(build: Build, work: Work, store: Counting, count: int) -> list[httpx.Response]:
    """Send a request, and its twins while it runs; let it go on once all of them are in."""
    client = connect(build(work, store), headers=KEY)
    first = asyncio.create_task(client.post("/work"))
    await within(work.started.wait())
    rest = [asyncio.create_task(client.post("/work")) for _ in range(count - 1)]
    await within(store.claimed.get())
    await within(store.claimed.get())  # the first's, and that of one who waits for it
    work.go_on.set()
    return [await within(task) for task in (first, *rest)]


@each_way
async def test_a_hundred_twins_run_once_and_all_get_the_reply_for_a_few_commands(build: Build) -> None:
    work, store = Work(), Counting()
    replies = await twins(build, work, store, 100)
    assert work.runs == 1
    assert {(reply.status_code, reply.content) for reply in replies} == {(200, b'{"run":1}')}
    if build is not behind_guard:  # whose duplicates are the handler's own answers
        assert sum(reply.headers.get("x-idempotent-replayed") == "true" for reply in replies) == 99
    assert store.commands <= 20


@each_way
async def test_where_the_first_fails_one_who_waits_runs_and_the_others_get_its_reply(build: Build) -> None:
    work = Work(failures=1)
    replies = await twins(build, work, Counting(), 10)
    assert [reply.status_code for reply in replies].count(503) == 1
    assert {reply.content for reply in replies[1:]} == {b'{"run":2}'}
    assert work.runs == 2


async def test_twins_wait_behind_the_ready_made_middleware() -> None:
    work, app = Work(), FastAPI()
    app.add_api_route("/work", work.__call__, methods=["POST"])
    app.add_middleware(IdempotencyMiddleware, settings=Settings(), in_progress="wait")
    client = connect(app, headers=KEY)
    first = asyncio.create_task(client.post("/work"))
    await within(work.started.wait())
    twin = asyncio.create_task(client.post("/work"))
    work.go_on.set()
    assert (await first).content == (await twin).content
    assert work.runs == 1


@pytest.mark.parametrize(("options", "waits_ms"), [({"max_wait": 0.02}, None), ({}, "40")], ids=["bound", "deadline"])
async def test_a_wait_that_is_over_ends_in_409_and_tells_when_to_come_back(
    options: dict[str, Any], waits_ms: str | None
) -> None:
    work, app = Work(), FastAPI()
    app.add_api_route("/work", work.__call__, methods=["POST"])
    install(app, Pipeline([IdempotencyPolicy(MemoryStore(), in_progress="wait", **options)]))
    client = connect(app, headers=KEY)
    first = asyncio.create_task(client.post("/work"))
    await within(work.started.wait())
    twin = await client.post("/work", headers={"x-request-timeout-ms": waits_ms} if waits_ms else {})
    assert (twin.status_code, twin.json()["code"]) == (409, "idempotency_in_progress")
    assert 1 <= int(twin.headers["retry-after"]) <= 5
    work.go_on.set()
    assert (await first).status_code == 200


async def test_a_hundred_twins_over_real_connections_run_once() -> None:
    work, store = Work(), Counting()
    async with serving(behind_policy(work, store)) as port, dial(port, headers=KEY) as client:
        tasks = [asyncio.create_task(client.post("/work")) for _ in range(100)]
        for _ in range(2):
            await within(store.claimed.get())
        work.go_on.set()
        replies = await asyncio.gather(*tasks)
    assert {(reply.status_code, reply.content) for reply in replies} == {(200, b'{"run":1}')}
    assert work.runs == 1


async def test_a_plain_function_that_is_asked_in_its_thread_does_not_wait_there() -> None:
    app, started, go_on = FastAPI(), threading.Event(), threading.Event()

    @app.post("/work")
    @idempotent(in_progress="wait")
    def handle() -> str:
        started.set()
        assert go_on.wait(5)
        return "done"

    install(app, Pipeline())
    client = connect(app, headers=KEY)
    first = asyncio.create_task(client.post("/work"))
    assert await asyncio.to_thread(started.wait, 5)
    assert (await client.post("/work")).status_code == 409
    go_on.set()
    assert (await first).status_code == 200
    assert (await client.post("/work")).headers["x-idempotent-replayed"] == "true"


class TellingRedis(RedisStore):
    """Tells a test when a twin was told that the first runs."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.told = asyncio.Event()

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        claim = await super().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)
        if isinstance(claim, InProgress):
            self.told.set()
        return claim


@asynccontextmanager
async def stores(server: RedisServer, count: int) -> AsyncIterator[list[TellingRedis]]:
    opened = [TellingRedis(server.url) for _ in range(count)]
    try:
        yield opened
    finally:
        for store in opened:
            await store.aclose()


async def test_twins_at_another_process_wait_for_the_first_through_redis() -> None:
    async with RedisServer(binary()) as server, stores(server, 2) as (here, there):
        work, other = Work(), Work()
        client, elsewhere = (connect(behind_policy(*app), headers=KEY) for app in ((work, here), (other, there)))
        first = asyncio.create_task(client.post("/work"))
        await within(work.started.wait())
        twins = [asyncio.create_task(elsewhere.post("/work")) for _ in range(20)]
        await within(there.told.wait())
        work.go_on.set()
        replies = [await first, *[await within(twin) for twin in twins]]
    assert {(reply.status_code, reply.content) for reply in replies} == {(200, b'{"run":1}')}
    assert (work.runs, other.runs) == (1, 0)


async def test_a_reply_that_found_no_redis_is_there_for_retries_once_it_is_back_though_it_lost_everything() -> None:
    async with RedisServer(binary()) as server, stores(server, 1) as (store,):
        work = Work()
        client = connect(behind_policy(work, store), headers=KEY)
        first = asyncio.create_task(client.post("/work"))
        await within(work.started.wait())
        server.kill()
        work.go_on.set()
        reply = await within(first)
        server.start()
        await server.ready()
        async with asyncio.timeout(10), Redis(port=server.port) as redis:
            while not await redis.dbsize():  # noqa: ASYNC110 - what another process knows has no event to wait for
                await asyncio.sleep(0.01)
        retry = await client.post("/work")
    assert (reply.status_code, retry.status_code, retry.content) == (200, 200, reply.content)
    assert retry.headers["x-idempotent-replayed"] == "true"
    assert work.runs == 1


# --- the running operation


def seen() -> dict[str, Any] | None:
    operation = running_operation()
    if operation is None:
        return None
    return {"epoch": operation.epoch, "psp": operation.derive_key("psp"), "lost": operation.lost}


def asking() -> FastAPI:
    app = FastAPI()

    @app.post("/async")
    async def in_task() -> Any:
        return seen()

    @app.post("/sync")
    def in_thread() -> Any:
        return seen()

    @app.post("/decorated")
    @idempotent()
    async def decorated() -> Any:
        return seen()

    @app.post("/decorated-sync")
    @idempotent()
    def decorated_in_thread() -> Any:
        return seen()

    @app.post("/guarded")
    async def in_guard(guard: Guard) -> Any:
        before = seen()
        await guard.check()
        return before or seen()

    return app


@pytest.mark.parametrize("path", ["/async", "/sync", "/decorated", "/decorated-sync", "/guarded"])
async def test_a_handler_knows_its_epoch_and_derives_keys_however_it_is_protected(path: str) -> None:
    app = asking()
    by_pipeline = path in ("/async", "/sync")
    install(app, Pipeline([IdempotencyPolicy(MemoryStore())] if by_pipeline else [], store=MemoryStore()))
    client = connect(app)
    one = (await client.post(path, headers={"Idempotency-Key": "one"})).json()
    two = (await client.post(path, headers={"Idempotency-Key": "two"})).json()
    assert (one["epoch"], one["lost"]) == (1, False)
    assert len({one["psp"], two["psp"]}) == 2
    assert (await client.post(path)).json() is None
