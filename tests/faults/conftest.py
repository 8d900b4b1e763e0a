import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from resilience.stores.redis import RedisStore
from tests.faults.redis_scene import MakeStore, StartServer, open_sockets
from tests.support.redis_servers import RedisServer, binary


@pytest_asyncio.fixture
async def make_store() -> AsyncIterator[MakeStore]:
    """Make stores; close them after the test, and hold them to leaving nothing behind."""
    stores: list[RedisStore] = []
    tasks, sockets = asyncio.all_tasks(), open_sockets()

    def make(source: Any, **options: Any) -> RedisStore:
        store = RedisStore(source, **options)
        stores.append(store)
        return store

    yield make
    for store in stores:
        await store.aclose()
    assert asyncio.all_tasks() <= tasks | {asyncio.current_task()}
    assert open_sockets() <= sockets
    stores.clear()
    gc.collect()  # what was left pending says so when it goes, and a warning is an error


@pytest_asyncio.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Start servers, and end them after the test."""
    servers: list[RedisServer] = []

    async def start(*options: str, version: str | None = None, port: int | None = None) -> RedisServer:
        server = RedisServer(binary(version), *options, port=port)
        servers.append(server)
        server.start()
        await server.ready()
        return server

    yield start
    for server in servers:
        await server.__aexit__()


@pytest_asyncio.fixture
async def server(start_server: StartServer) -> RedisServer:
    return await start_server()
