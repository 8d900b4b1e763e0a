"""The Redis store beside redis-py, in one run on one server: decisions a second, and the client's CPU for each.

Run it with ``.venv/bin/python -m benchmarks.store``. It starts a redis-server on a free port, or uses ``REDIS_URL``.
"""

import asyncio
import os
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from time import perf_counter, process_time
from typing import NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis

from resilience import Quota
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binary

ROUNDS = 5
SECONDS = 0.6
QUOTA = Quota(2**31 - 1, per=60)
CALLERS = 1000

Operation = Callable[[int], Awaitable[object]]


class Figure(NamedTuple):
    """One measurement: operations a second, and CPU microseconds of this process for each."""

    rate: float
    cpu: float


async def measure(operation: Operation, concurrency: int) -> Figure:
    """Run ``operation`` from so many tasks for a while."""
    numbers = count()
    done = 0
    ends = perf_counter() + SECONDS

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


async def main() -> None:
    """Measure in turns, keep the best round of each, and print."""
    async with server_url() as url:
        client, store = Redis.from_url(url, max_connections=256), RedisStore(url, limit_timeout=5.0)
        bounded = Redis(connection_pool=BlockingConnectionPool.from_url(url, max_connections=256))
        noop = await client.script_load("return 1")
        operations: dict[str, Operation] = {
            "redis-py PING": lambda _: client.ping(),
            "redis-py PING, blocking pool": lambda _: bounded.ping(),
            "redis-py EVALSHA, an empty script": lambda _: client.evalsha(noop, 0),
            f"store, {CALLERS} callers": lambda n: store.acquire([Want("r", f"c{n % CALLERS}", QUOTA, 1)]),
            "store, 3 rules of one caller": lambda n: store.acquire(
                [Want(rule, f"c{n % CALLERS}", QUOTA, 1) for rule in ("a", "b", "c")]
            ),
            "store, one hot key": lambda _: store.acquire([Want("r", "hot", QUOTA, 1)]),
        }
        info = await client.info("server")
        print(f"Python {platform.python_version()}, Redis {info['redis_version']}, {os.cpu_count()} cores, loopback")
        for concurrency in (1, 64, 256):
            print(f"\nconcurrency {concurrency:<28}{'ops/s':>10}{'cpu us':>9}{'x PING':>9}")
            best: dict[str, Figure] = {}
            for _ in range(ROUNDS):
                for name, operation in operations.items():
                    figure = await measure(operation, concurrency)
                    best[name] = max(best.get(name, figure), figure)
            ping = best["redis-py PING"].rate
            for name, figure in best.items():
                print(f"  {name:38}{figure.rate:10,.0f}{figure.cpu:9.1f}{figure.rate / ping:9.2f}")
        await store.aclose()
        await client.aclose()
        await bounded.aclose()


if __name__ == "__main__":
    asyncio.run(main())
