"""The Redis store beside redis-py and peers, in turns on one server: decisions a second, and the client's CPU for each.

Run it with ``python -m benchmarks.store``. It starts a redis-server on a free port, or uses ``REDIS_URL``.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from itertools import count
from time import perf_counter, process_time
from typing import NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.decision_peers import REDIS_PEERS, Hit
from benchmarks.report import Bar, Panel, Row, Section, Table, as_text
from resilience import Quota
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binary

SECONDS = 0.6
QUOTA = Quota(2**31 - 1, per=60)
CALLERS = 1000
ASKED = 100  # Decisions whose round trips are counted.
PING, EMPTY = "redis-py PING", "redis-py EVALSHA, an empty script"
MANY, RULES, HOT = f"ours, {CALLERS} callers", "ours, 3 rules of one caller", "ours, one hot key"
ABSENT = "not installed: ./dev bench sets it up"

Operation = Callable[[int], Awaitable[object]]


class Figure(NamedTuple):
    """One measurement: operations a second, and CPU microseconds of this process for each."""

    rate: float
    cpu: float


async def measure(operation: Operation, concurrency: int, seconds: float = SECONDS) -> Figure:
    """Run ``operation`` from so many tasks for a while."""
    numbers = count()
    done = 0
    ends = perf_counter() + seconds

    async def worker() -> None:
        nonlocal done
        while perf_counter() < ends:
            for _ in range(20):
                await operation(next(numbers))
            done += 20

    started, cpu = perf_counter(), process_time()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Figure(done / (perf_counter() - started), (process_time() - cpu) / done * 1e6)


@asynccontextmanager
async def server_url() -> AsyncIterator[str]:
    """Give a server: the one of ``REDIS_URL``, or one of our own."""
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
    else:
        async with RedisServer(binary()) as server:
            yield server.url


def of_ours(store: RedisStore) -> dict[str, Operation]:
    """Return our own operations."""
    return {
        MANY: lambda n: store.acquire([Want("r", f"c{n % CALLERS}", QUOTA, 1)]),
        RULES: lambda n: store.acquire([Want(rule, f"c{n % CALLERS}", QUOTA, 1) for rule in ("a", "b", "c")]),
        HOT: lambda _: store.acquire([Want("r", "hot", QUOTA, 1)]),
    }


async def _of_callers(hit: Hit, number: int) -> None:
    await hit(f"c{number % CALLERS}")


async def _of_one(hit: Hit, _number: int) -> None:
    await hit("hot")


@asynccontextmanager
async def operations(url: str) -> AsyncIterator[tuple[dict[str, Operation], list[Row]]]:
    """Open what is measured: redis-py's own commands first, ours, the peers that are installed; and what is not."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(url, max_connections=256))
        pool = BlockingConnectionPool.from_url(url, max_connections=256)
        bounded = await stack.enter_async_context(Redis(connection_pool=pool))
        store = await stack.enter_async_context(aclosing(RedisStore(url, limit_timeout=5.0)))
        noop = await client.script_load("return 1")
        found: dict[str, Operation] = {
            PING: lambda _: client.ping(),
            "redis-py PING, blocking pool": lambda _: bounded.ping(),
            EMPTY: lambda _: client.evalsha(noop, 0),
            **of_ours(store),
        }
        missing = []
        for peer in REDIS_PEERS:
            try:
                hit = peer.open(url)
            except ImportError:
                missing.append(Row(peer.distribution, note=ABSENT))
                continue
            found[f"{peer.name}, {CALLERS} callers"] = partial(_of_callers, hit)
            found[f"{peer.name}, one hot key"] = partial(_of_one, hit)
        yield found, missing


async def compare(url: str, concurrency: int, rounds: int, seconds: float) -> tuple[dict[str, Figure], list[Row]]:
    """Measure in turns; return the best round of each, and what is not installed."""
    best: dict[str, Figure] = {}
    async with operations(url) as (found, missing):
        for turn in range(rounds):
            print(f"\r  {concurrency} at once: round {turn + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
            for name, operation in list(found.items()):
                try:
                    figure = await measure(operation, concurrency, seconds)
                except Exception as error:
                    if name.startswith(("redis-py", "ours")):
                        raise
                    del found[name]
                    best.pop(name, None)
                    missing.append(Row(name, note=f"fails with {concurrency} at once: {error!r}"[:90]))
                    continue
                known = best.get(name, figure)
                best[name] = Figure(max(known.rate, figure.rate), min(known.cpu, figure.cpu))
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return best, missing


async def round_trips(url: str) -> dict[str, float]:
    """Return the commands that one decision sends, for one rule and for several."""
    counted: dict[str, float] = {}
    async with aclosing(RedisStore(url)) as store, Redis.from_url(url) as client:
        for name in (MANY, RULES):
            operation = of_ours(store)[name]
            await operation(0)  # opens the connection, which takes commands of its own
            before = await _sent(client)
            for number in range(ASKED):
                await operation(number)
            counted[name] = (await _sent(client) - before) / ASKED
    return counted


async def _sent(client: Redis) -> int:
    # Those that a script calls are counted by the server, too, but cost no round trip; a decision is always a script.
    stats = await client.info("commandstats")
    return sum(stats[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats)


def _table(concurrency: int, figures: dict[str, Figure], missing: list[Row]) -> Table:
    ping = figures[PING]
    rows = [
        Row(name, (figure.cpu, figure.cpu / ping.cpu, figure.rate, figure.rate / ping.rate))
        for name, figure in figures.items()
    ]
    title = f"One decision over Redis, {concurrency} at once"
    return Table(title, ("CPU µs", "x PING", "a second", "x PING's"), (*rows, *missing))


def _panel(figures: dict[str, Figure]) -> Panel:
    bars = [Bar(PING, figures[PING].cpu, "bare"), Bar(MANY, figures[MANY].cpu, "ours")]
    bars += [Bar(HOT, figures[HOT].cpu, "ours")]
    peers = [name for name in figures if not name.startswith(("redis-py", "ours")) and "hot" not in name]
    bars += [Bar(name.partition(",")[0], figures[name].cpu, "peer") for name in peers]
    return Panel("A rate-limit decision in Redis, 64 at once", "µs of the client's CPU for each", tuple(bars))


async def run(*, quick: bool) -> Section:
    """Measure."""
    rounds, seconds = (2, 0.3) if quick else (4, SECONDS)
    async with server_url() as url:
        trips = await round_trips(url)
        found = {
            at_once: await compare(url, at_once, rounds, seconds) for at_once in ((64,) if quick else (1, 64, 256))
        }
    crowd = found[64][0]
    ping = crowd[PING].rate
    tables = [_table(at_once, figures, missing) for at_once, (figures, missing) in found.items()]
    counted = tuple(Row(name, (times,)) for name, times in trips.items())
    budgets = {"store.callers": crowd[MANY].rate / ping, "store.hot": crowd[HOT].rate / ping}
    budgets |= {"trips.limit": trips[MANY], "trips.rules": trips[RULES]}
    return Section(
        "Store", (*tables, Table("Round trips of one decision", ("commands",), counted)), budgets, (_panel(crowd),)
    )


if __name__ == "__main__":
    for _table_found in asyncio.run(run(quick=False)).tables:
        print(as_text(_table_found))
