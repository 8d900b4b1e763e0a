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
from benchmarks.idempotency_peers import KEYED_PEERS, Build, Endpoint
from benchmarks.peers import Thing, fastapi_app, make
from benchmarks.rounds import CALLERS, Candidate, Exchange, Figure, measure, scope_of
from http_middleware import ResilienceMiddleware, install
from http_middleware.routes import RouteTable
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Selective
from resilience.stores.link import Link
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binaries

NEW, REPLAY, NO_KEY = "new key", "replay", "no key sent"
EXTRA = {NEW: "new", REPLAY: "old", NO_KEY: ""}
OURS = "ours"
SETS, LINK_SETS = "two raw SETs, redis-py", "two raw SETs, our link"
CLAIM, RECORD = b"c" * 128, b"r" * 300  # About as long as a claim and as a record with a small reply.
KEPT_MS = 86_400_000
COUNTED = 200  # Requests whose round trips are counted.
CONTEXT, KEYED = "context", "context, keyed route, no key sent"

Trips = dict[str, float | str]
"""Round trips to the store for one request, for each row."""


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
    for name, build, kinds in builds(redis):
        try:
            await check(build, redis)
            app = await stack.enter_async_context(build(make, redis))
            label = name()
        except ImportError:
            missing[name.__doc__ or ""] = ABSENT
            continue
        except Exception as error:
            missing[name.__doc__ or ""] = f"does not work here: {error!r}"[:90]
            continue
        for kind in kinds:
            found[f"{label}, {kind}"] = Candidate(app, EXTRA[kind])
        await fill(app)
    return found, missing
