"""Two processes of the broken service, their Redis, and what a test can do to them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import httpx
from redis.asyncio import Redis

from tests.faults.idempotency_doors import Answer
from tests.faults.idempotency_ledger import Ledger
from tests.support.redis_servers import RedisServer, binary

IN_PROGRESS, GONE = "idempotency_in_progress", "store_unavailable"
ROOT = Path(__file__).parents[2]
_START, _STOP = 30.0, 20.0
_PATIENCE = 15.0
_PAUSE = 0.02  # Seconds between two looks at what another process does.


class Worker:
    """One process of the service, and a client of each of its doors."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, http: int, grpc_port: int) -> None:
        self.name = name
        self.process = process
        self.ports = http, grpc_port
        # No connection twice: uvicorn closes one after an unhandled error, and who uses it then hears of no reply.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}", limits=limits, trust_env=False)
        options = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=options)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    async def kill(self) -> None:
        """End the process as a crash does."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def close(self) -> None:
        """End the process, if it has not ended, and both clients."""
        if self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), _STOP)
            except TimeoutError:
                await self.kill()
        await self.http.aclose()
        await self.channel.close()


class World:
    """All of it.

    Args:
        folder: where the processes log.
        lease: seconds.
        options: of the program.
    """

    def __init__(self, folder: Path, redis: RedisServer, ledger: Ledger, lease: float, **options: Any) -> None:
        self.redis = redis
        self.ledger = ledger
        self.lease = lease
        self._folder = folder
        self._options = options
        self._started = 0
        self.workers: list[Worker] = []
        self._ended: list[Worker] = []

    async def start_worker(self) -> Worker:
        """Start one more process."""
        self._started += 1
        name = f"worker-{self._started}"
        told = {"name": name, "ledger": self.ledger.port, "redis": self.redis.url, "lease": self.lease, **self._options}
        path = self._folder / name
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.faults.idempotency_server", json.dumps(told)),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert process.stdout is not None
        try:
            ports = (await asyncio.wait_for(process.stdout.readline(), _START)).split()
            assert len(ports) == 2, path.read_text()
            worker = Worker(name, process, int(ports[0]), int(ports[1]))
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        self.workers.append(worker)
        return worker

    async def replace(self, worker: Worker) -> Worker:
        """Start a process in place of one that has ended."""
        self.workers.remove(worker)
        self._ended.append(worker)  # somebody may have chosen its clients just now
        return await self.start_worker()

    async def close(self) -> None:
        """End all processes."""
        await asyncio.gather(*(worker.close() for worker in (*self.workers, *self._ended)))

    async def records(self) -> int:
        """Count what Redis holds."""
        async with Redis(port=self.redis.port, socket_timeout=5) as client:
            count: int = await client.dbsize()
            return count


@asynccontextmanager
async def world(folder: Path, *, lease: float = 1.0, **options: Any) -> AsyncIterator[World]:
    """Start Redis, the ledger and two processes."""
    async with RedisServer(binary()) as redis, Ledger() as ledger:
        scene = World(folder, redis, ledger, lease, **options)
        try:
            await asyncio.gather(scene.start_worker(), scene.start_worker())
            yield scene
        finally:
            await scene.close()


async def until(seen: Callable[[], Awaitable[bool]], within: float = _PATIENCE) -> None:
    """Wait for what another process does."""
    async with asyncio.timeout(within):
        while not await seen():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(_PAUSE)


async def retried(ask: Callable[[], Awaitable[Answer]], *wait_out: str) -> tuple[Answer, float]:
    """Retry as a client does while it is told to come back; return the last answer, and how long that took.

    Args:
        wait_out: what is no last answer.
    """
    start = monotonic()
    async with asyncio.timeout(_PATIENCE):
        while True:
            answer = await ask()
            if answer.told not in wait_out:
                break
            await asyncio.sleep(_PAUSE)
    return answer, monotonic() - start


async def refuses_connections(port: int) -> bool:
    """Tell whether nobody listens there any more."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return False
