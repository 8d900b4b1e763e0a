"""One contract, every store: in memory, on each Redis that is here, on a cluster, with an application's own client."""

import asyncio
import re
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from resilience import MemoryStore
from resilience.stores.base import Store
from resilience.stores.redis import RedisStore
from resilience.testing import ManualClock, StoreContract
from resilience.testing.record_contract import RecordContract
from tests.support.redis_servers import RedisServer, binary, redis_cluster

_names = count()
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "redis.md"


class TestMemoryStore(StoreContract):
    def setup_method(self) -> None:
        self._clock = ManualClock()

    async def make_store(self) -> Store:
        return MemoryStore(clock=self._clock)

    async def advance(self, seconds: float) -> None:
        self._clock.advance(seconds)

    def unique(self, name: str) -> str:
        return f"{name}-{next(_names)}"


class MadeOnRedis:
    """Time is the server's own here, so it really passes; deadlines are long, since machines are slow at times."""

    @pytest.fixture(autouse=True)
    async def _closing(self) -> AsyncIterator[None]:
        self._stores: list[RedisStore] = []
        yield
        for store in self._stores:
            await store.aclose()

    @abstractmethod
    def source(self) -> "str | Redis | RedisCluster":
        """Return what the store is made from."""

    def options(self) -> dict[str, Any]:
        """Return what else the store is made with."""
        return {}

    async def make_store(self) -> Store:
        store = RedisStore(self.source(), limit_timeout=5, record_timeout=5, **self.options())
        self._stores.append(store)
        return store

    async def advance(self, seconds: float) -> None:
        await asyncio.sleep(seconds + 0.002)

    def unique(self, name: str) -> str:
        return f"{name}-{next(_names)}"


def serving(version: str) -> Iterator[str]:
    with asyncio.Runner() as runner:
        server = runner.run(RedisServer(binary(version)).__aenter__())
        yield server.url
        runner.run(server.__aexit__())


@pytest.fixture(scope="module")
def redis_70() -> Iterator[str]:
    yield from serving("7.0")


@pytest.fixture(scope="module")
def redis_62() -> Iterator[str]:
    yield from serving("6.2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with asyncio.Runner() as runner:
        servers = redis_cluster(binary())
        primaries = runner.run(servers.__aenter__())
        yield f"redis+cluster://127.0.0.1:{primaries[0].port}"
        runner.run(servers.__aexit__(None, None, None))


class OnRedis(MadeOnRedis, StoreContract):
    pass


class SealedOnRedis(MadeOnRedis, RecordContract):
    def options(self) -> dict[str, Any]:
        return {"compress": True, "encryption": {"new": bytes(32), "old": b"\1" * 32}, "refuse_unsealed": True}


class TestRedis70(OnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, redis_70: str) -> None:
        self.url = redis_70

    def source(self) -> str:
        return self.url


class TestRedis62(OnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, redis_62: str) -> None:
        self.url = redis_62

    def source(self) -> str:
        return self.url


class TestSealedOnRedis70(SealedOnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, redis_70: str) -> None:
        self.url = redis_70

    def source(self) -> str:
        return self.url


class TestSealedOnRedis62(SealedOnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, redis_62: str) -> None:
        self.url = redis_62

    def source(self) -> str:
        return self.url


class TestCluster(OnRedis):
    @pytest.fixture(autouse=True)
    def _server(self, cluster: str) -> None:
        self.url = cluster

    def source(self) -> str:
        return self.url


class TestClientOfTheApplication(OnRedis):
    @pytest.fixture(autouse=True)
    async def _server(self, redis_70: str) -> AsyncIterator[None]:
        self.client = Redis.from_url(redis_70)
        yield
        assert await self.client.ping()  # closing the store leaves the application's client as it was
        await self.client.aclose()

    def source(self) -> "Redis":
        return self.client


class TestTheRightsThatTheDocumentationNames(OnRedis):
    @pytest.fixture(autouse=True)
    async def _server(self, redis_70: str) -> None:
        rights = re.findall(r"^~resilience.*$", DOCUMENTATION.read_text(), re.MULTILINE)[0].split()
        admin: Any = Redis.from_url(redis_70)
        await admin.execute_command("ACL", "SETUSER", "least", "reset", "on", ">secret", *rights)
        await admin.aclose()
        self.url = redis_70.replace("redis://", "redis://least:secret@")

    def source(self) -> str:
        return self.url
