"""How cost grows: with callers in memory, with processes on one Redis and on a cluster, and in a simulated fleet.

Run it with ``python -m benchmarks.scale``, ``--quick``, or ``--keys 10000000`` for ten million callers, which takes
some 4 GB of memory and some minutes.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import count
from time import perf_counter

from redis.asyncio import Redis

from benchmarks import scale_memory, scale_processes
from benchmarks.fleet import simulate
from benchmarks.fleet_scene import Costs, Scene
from benchmarks.report import Row, Section, Table, as_text
from benchmarks.scale_processes import load_of
from resilience import Quota
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binaries

STORES = 32
ENDLESS = Quota(2**31 - 1, per=60)
WAYS = {
    "neither": (False, False),
    "merge alone": (True, False),
    "deny cache alone": (False, True),
    "both": (True, True),
}
PROCESSES = 1000
_CALLERS = 100_000
_SKEW = 1.1


async def calibrate(url: str, seconds: float) -> Costs:
    """Measure what a command, a group and a call cost the server, with as many connections as there is time for."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(url))
        stores = [await stack.enter_async_context(aclosing(RedisStore(url, limit_timeout=5.0))) for _ in range(STORES)]
        numbers = count()

        async def alone(store: RedisStore) -> int:
            await store.acquire([Want("r", f"c{next(numbers) % 1000}", ENDLESS, 1)])
            return 1

        async def crowd(store: RedisStore, subjects: Sequence[str]) -> int:
            await asyncio.gather(*(store.acquire([Want("r", subject, ENDLESS, 1)]) for subject in subjects))
            return len(subjects)

        # One call may go alone before the others of its turn, so that what counts is what a command held on average.
        single, _ = await _cost(client, stores, alone, seconds)
        grouped, groups = await _cost(client, stores, lambda one: crowd(one, [f"c{n}" for n in range(17)]), seconds)
        hot, calls = await _cost(client, stores, lambda one: crowd(one, ["hot"] * 33), seconds)
    group = max(0.0, (grouped - single) / (groups - 1))
    return Costs(command=max(0.0, single - group), group=group, call=max(0.0, (hot - single) / (calls - 1)))


async def _cost(
    client: Redis, stores: Sequence[RedisStore], act: Callable[[RedisStore], Awaitable[int]], seconds: float
) -> tuple[float, float]:
    """Return the server's CPU seconds for a command, and how many calls one held."""
    await asyncio.gather(*map(act, stores))
    before, ends, done = await load_of([client]), perf_counter() + seconds, 0
    while perf_counter() < ends:
        done += sum(await asyncio.gather(*map(act, stores)))
    after = await load_of([client])
    commands = after.commands - before.commands
    return (after.cpu[0] - before.cpu[0]) / commands, done / commands


def _scene(
    rate: float, quota: Quota, way: str, *, seconds: float, callers: int = _CALLERS, processes: int = PROCESSES
) -> Scene:
    merge, deny = WAYS[way]
    # A denial is remembered for a second at most: after one, the fleet is in its stride.
    warm = seconds / 2
    return Scene(processes, rate, callers, _SKEW, quota, seconds, warm, merge=merge, deny=deny)


def skewed(costs: Costs, *, quick: bool) -> Table:
    """Simulate a fleet whose callers differ: what the two save."""
    minute = Quota(100, per=60)
    many, few = PROCESSES, 10
    scenes = [(many, 20_000.0, minute), (few, 40_000.0, minute)]
    if not quick:
        scenes += [(many, 100_000.0, minute), (few, 40_000.0, ENDLESS)]
    rows = []
    for processes, rate, quota in scenes:
        for way in WAYS:
            print(f"\r  fleet: {rate:,.0f} requests/s, {way} ", end="", file=sys.stderr, flush=True)
            seconds = 1.2 if quick else 2.0
            told = simulate(_scene(rate, quota, way, seconds=seconds, processes=processes), costs)
            limit = "no limit in reach" if quota is ENDLESS else quota.name
            figures = (told.denied / told.requests * 100, told.commands, told.commands / rate)
            title = f"{rate:,.0f}/s on {processes:,} processes, {limit}: {way}"
            rows.append(Row(title, (*figures, told.busiest * 100, told.wait * 1000)))
    columns = ("denied %", "commands/s", "for each", "node busy %", "p99 wait ms")
    note = (
        f"{_CALLERS:,} callers by Zipf's law (exponent {_SKEW}). As measured, a node takes "
        f"{costs.command * 1e6:.1f} µs for a command, {costs.group * 1e6:.1f} µs for each group of equal calls in it, "
        f"{costs.call * 1e6:.2f} µs for each further call of a group. Merging, the deny cache and counting are real "
        "code; the network, a request's own 100 µs in its process, and chance are a model. Above 100 % the queue grows "
        "without end; the real store gives up after 50 ms."
    )
    return Table("A simulated fleet, skewed callers", columns, tuple(rows), note)


def one_hot_key(costs: Costs, *, quick: bool) -> Table:
    """Simulate a fleet of which all count on one key: where that saturates a node."""
    over = Quota(1000, per=60)
    loads = (40_000.0, 160_000.0) if quick else (20_000.0, 40_000.0, 80_000.0, 160_000.0, 320_000.0)
    plan = [(processes, ENDLESS, rate) for processes in (PROCESSES, 50) for rate in loads]
    plan += [(PROCESSES, over, rate) for rate in (loads[:1] if quick else loads[1:4])]
    rows = []
    for processes, quota, rate in plan:
        print(f"\r  one hot key: {processes} processes, {rate:,.0f}/s ", end="", file=sys.stderr, flush=True)
        seconds = (10_000 if quick else 30_000) / rate if quota is ENDLESS else 1.5
        told = [
            simulate(_scene(rate, quota, way, seconds=seconds, callers=1, processes=processes), costs)
            for way in ("neither", "both")
        ]
        figures = [figure for one in told for figure in (one.commands, one.busiest * 100, one.wait * 1000)]
        kind = "admitted" if quota is ENDLESS else f"over {quota.name}"
        rows.append(Row(f"{rate:,.0f}/s from {processes:,} processes, {kind}", tuple(figures)))
    columns = ("commands/s, neither", "busy %", "p99 ms", "commands/s, both", "busy %", "p99 ms")
    single = 1 / (costs.command + costs.group)
    note = (
        f"One node answers {single:,.0f} commands of one call a second at most, and one key is on one node. "
        "Calls merge within one turn of one process's loop."
    )
    return Table("A simulated fleet on one hot key", columns, tuple(rows), note)


async def run(*, quick: bool, keys: int = 1_000_000) -> Section:
    """Measure."""
    tables = [await scale_memory.measure(quick=quick, keys=min(keys, 10_000) if quick else keys)]
    costs = Costs(10e-6, 6e-6, 0.1e-6)  # of a server of 2024, where there is none to measure
    path = next(iter(binaries().values()), None)
    if path is not None:
        async with RedisServer(path) as server:
            tables.append(await scale_processes.on_one(server.url, quick=quick))
            costs = await calibrate(server.url, 0.3 if quick else 1.0)
        tables.append(await scale_processes.on_cluster(quick=quick))
    # In a thread of their own, since a simulated loop can't run inside a real one.
    tables.append(await asyncio.to_thread(skewed, costs, quick=quick))
    tables.append(await asyncio.to_thread(one_hot_key, costs, quick=quick))
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return Section("Scale", tuple(tables), {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer of everything: under twenty seconds")
    parser.add_argument("--keys", type=int, default=1_000_000, help="the most callers in memory")
    arguments = parser.parse_args()
    for _table in asyncio.run(run(quick=arguments.quick, keys=arguments.keys)).tables:
        print(as_text(_table))
