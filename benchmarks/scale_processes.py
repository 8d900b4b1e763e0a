"""Several processes on one Redis, and on a cluster of three nodes: how the throughput and Redis' CPU grow.

``python -m benchmarks.scale_processes URL`` is one of those processes; ``measure`` starts them.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from time import perf_counter, process_time
from typing import Any, NamedTuple

from redis.asyncio import Redis

from benchmarks.report import Row, Table
from benchmarks.store import HOT, MANY, PING, Operation, of_ours
from benchmarks.store import measure as work
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import binary, redis_cluster

TASKS = 64
COLUMNS = ("a second", "x one", "client µs", "Redis µs", "busiest %", "commands for each")


class Load(NamedTuple):
    """What servers have done so far: CPU seconds of each, and commands that were sent to all.

    Args:
        cpu: for each server.
        commands: decisions' scripts and pings; not what a script calls.
    """

    cpu: list[float]
    commands: int


async def load_of(clients: Sequence[Redis]) -> Load:
    """Ask servers what they have done."""
    cpu, commands = [], 0
    for client in clients:
        used: dict[str, Any] = await client.info("cpu")
        stats: dict[str, Any] = await client.info("commandstats")
        cpu.append(float(used["used_cpu_sys"]) + float(used["used_cpu_user"]))
        commands += sum(stats[f"cmdstat_{name}"]["calls"] for name in ("evalsha", "ping") if f"cmdstat_{name}" in stats)
    return Load(cpu, commands)


class Crowd:
    """Processes that work on request."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def work(self, many: int, name: str, seconds: float) -> tuple[int, float]:
        """Have the first ``many`` do one operation for a while; return how often they did, and their CPU seconds."""
        answers = await asyncio.gather(*(_ask(process, [name, seconds]) for process in self._processes[:many]))
        return sum(done for done, _ in answers), sum(cpu for _, cpu in answers)


async def _ask(process: asyncio.subprocess.Process, order: list[Any]) -> tuple[int, float]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    process.stdin.write(json.dumps(order).encode() + b"\n")
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a process of the crowd has ended")
    done, cpu = json.loads(line)
    return done, cpu


@asynccontextmanager
async def crowd(url: str, many: int) -> AsyncIterator[Crowd]:
    """Start ``many`` processes on one store."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", __name__, url]
    processes = [await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(many)]
    try:
        yield Crowd(processes)
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()


async def grow(
    title: str, url: str, clients: Sequence[Redis], names: Sequence[str], many: Sequence[int], seconds: float
) -> Table:
    """Measure each operation with more and more processes."""
    rows = []
    async with crowd(url, max(many)) as processes:
        await processes.work(max(many), names[-1], 0.05)  # opens every connection
        for name in names:
            one = 0.0
            for number in many:
                print(f"\r  {title}: {name}, {number} processes ", end="", file=sys.stderr, flush=True)
                before, started = await load_of(clients), perf_counter()
                done, cpu = await processes.work(number, name, seconds)
                after, took = await load_of(clients), perf_counter() - started
                used = [late - early for early, late in zip(before.cpu, after.cpu, strict=True)]
                one = one or done
                costs = (cpu / done * 1e6, sum(used) / done * 1e6)
                share, sent = max(used) / took * 100, (after.commands - before.commands) / done
                title_of_row = f"{name}, {number} process{'es' if number > 1 else ''}"
                rows.append(Row(title_of_row, (done / seconds, done / one, *costs, share, sent)))
    return Table(title, COLUMNS, tuple(rows), f"{TASKS} at once in each process, all on this machine's cores.")


async def on_one(url: str, *, quick: bool) -> Table:
    """Measure on one server."""
    many, seconds = ((1, 2, 4), 0.3) if quick else ((1, 2, 4, 8), 1.0)
    async with Redis.from_url(url) as client:
        names = (MANY, HOT) if quick else (PING, MANY, HOT)
        return await grow("Processes on one Redis", url, [client], names, many, seconds)


async def on_cluster(*, quick: bool) -> Table:
    """Measure on a cluster of three."""
    many, seconds = ((1, 4), 0.3) if quick else ((1, 2, 4, 8), 1.0)
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(redis_cluster(binary()))
        clients = [await stack.enter_async_context(Redis.from_url(server.url)) for server in servers]
        url = f"redis+cluster://127.0.0.1:{servers[0].port}"
        return await grow("Processes on a cluster of three nodes", url, clients, (MANY, HOT), many, seconds)


async def _be_one(url: str) -> None:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(aclosing(RedisStore(url, limit_timeout=5.0)))
        operations: dict[str, Operation] = of_ours(store)
        if "+cluster" not in url:
            client = await stack.enter_async_context(Redis.from_url(url, max_connections=256))
            operations[PING] = lambda _: client.ping()
        while line := await asyncio.to_thread(sys.stdin.readline):
            name, seconds = json.loads(line)
            cpu, started = process_time(), perf_counter()
            figure = await work(operations[name], TASKS, seconds)
            done = round(figure.rate * (perf_counter() - started))
            print(json.dumps([done, process_time() - cpu]), flush=True)


if __name__ == "__main__":
    asyncio.run(_be_one(sys.argv[1]))
