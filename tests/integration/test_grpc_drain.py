"""A drain with many watchers over real connections, some of which take nothing that they are sent."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.settings import SettingCodes
from starlette.applications import Starlette

from grpc_interceptors import HealthService
from http_middleware import install
from http_middleware.server import UvicornServer
from resilience import HealthChecker
from tests.integration.h2_client import message, raw

Response = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING = Response.SERVING, Response.NOT_SERVING
WATCHERS, FROZEN = 50, 3
SOON = 2.0  # Seconds that nobody needs who is not held up; what is held up takes the whole grace.
GRACE = 30.0
ALL = health_pb2.HealthCheckRequest()


@dataclass
class Scene:
    """A server of health, with its checker and one client."""

    checker: HealthChecker
    service: HealthService
    server: grpc.aio.Server
    port: int
    health: Any

    async def watched(self, watchers: int) -> None:
        """Wait until so many watches run."""
        async with asyncio.timeout(10):
            while len(self.service._watchers) < watchers:  # noqa: ASYNC110 - a set has no event
                await asyncio.sleep(0)


@asynccontextmanager
async def scene(checker: HealthChecker, service: HealthService | None = None) -> AsyncIterator[Scene]:
    server, service = grpc.aio.server(), service or HealthService(checker)
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Scene(checker, service, server, port, health_pb2_grpc.HealthStub(channel))
    finally:
        await server.stop(0)


async def freeze(stack: AsyncExitStack, port: int) -> None:
    """Watch, and grant no window for anything that comes: neither a reply nor the end gets through."""
    client = await stack.enter_async_context(raw(port))
    client._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    client.open("/grpc.health.v1.Health/Watch", body=message(b""), end=True)


async def last_words(watch: Any) -> list[int]:
    """Return what a watch tells from here on, until it ends."""
    told = []
    while (answer := await watch.read()) is not grpc.aio.EOF:
        told.append(answer.status)
    return told


@pytest.mark.parametrize("frozen", [0, FROZEN])
async def test_a_drain_reaches_every_watcher_that_reads_whoever_else_does_not(frozen: int) -> None:
    async with scene(HealthChecker()) as world, AsyncExitStack() as stack:
        for _ in range(frozen):
            await freeze(stack, world.port)
        watches = [world.health.Watch(ALL) for _ in range(WATCHERS - frozen)]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * len(watches)
        await world.watched(WATCHERS)

        world.checker.drain()

        told = await asyncio.wait_for(asyncio.gather(*map(last_words, watches)), SOON)
        assert told == [[NOT_SERVING]] * len(watches)
        assert (await asyncio.wait_for(world.health.Check(ALL), SOON)).status == NOT_SERVING


async def test_watchers_that_read_use_up_none_of_the_grace() -> None:
    async with scene(HealthChecker()) as world:
        watches = [world.health.Watch(ALL) for _ in range(WATCHERS)]
        for watch in watches:
            await watch.read()
        world.checker.drain()
        await asyncio.wait_for(world.server.stop(GRACE), SOON)
        assert await asyncio.gather(*map(last_words, watches)) == [[NOT_SERVING]] * WATCHERS


class Counting(HealthService):
    """Counts those who ask for a watch."""

    asked = 0

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the method's name
        self.asked += 1
        async for answer in super().Watch(request, context):
            yield answer


async def test_a_client_that_checks_health_itself_leaves_a_draining_server_in_peace() -> None:
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    checker = HealthChecker()
    service = Counting(checker)
    async with scene(checker, service) as world:
        options = [("grpc.service_config", json.dumps(config))]
        async with grpc.aio.insecure_channel(f"ipv4:127.0.0.1:{world.port}", options=options) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            checker.drain()
            await asyncio.sleep(0.3)  # in which one that does not back off asks hundreds of times
    assert 1 <= service.asked < 10


async def test_a_watcher_that_takes_nothing_holds_the_stop_up_for_the_grace_and_no_longer() -> None:
    async with scene(HealthChecker()) as world, AsyncExitStack() as stack:
        await freeze(stack, world.port)
        await world.watched(1)
        world.checker.drain()
        began = asyncio.get_running_loop().time()
        await asyncio.wait_for(world.server.stop(0.3), SOON)
        assert asyncio.get_running_loop().time() - began >= 0.29


async def test_check_and_new_watches_answer_while_a_watcher_takes_nothing() -> None:
    checker = HealthChecker(ttl=0)
    fine = True
    checker.add_check("database", lambda: fine)
    async with scene(checker) as world, AsyncExitStack() as stack:
        for _ in range(FROZEN):
            await freeze(stack, world.port)
        reader = world.health.Watch(ALL)
        assert (await reader.read()).status == SERVING
        await world.watched(FROZEN + 1)
        for fine in (False, True, False):
            status = SERVING if fine else NOT_SERVING
            assert (await asyncio.wait_for(world.health.Check(ALL), SOON)).status == status
            assert (await asyncio.wait_for(world.health.Watch(ALL).read(), SOON)).status == status
            assert (await asyncio.wait_for(reader.read(), SOON)).status == status


async def test_a_thousand_probes_in_bursts_over_both_doors_are_one_run_of_a_check() -> None:
    checker = HealthChecker(ttl=600, timeout=600)
    asked, gate = 0, asyncio.Event()

    async def database() -> None:
        nonlocal asked
        asked += 1
        await gate.wait()

    checker.add_check("database", database)
    app = Starlette()
    install(app, health=checker)
    http = UvicornServer(app, port=0, log_config=None)
    await http.start()
    url = f"http://127.0.0.1:{http.port}/health/ready"
    try:
        async with scene(checker) as world, httpx.AsyncClient(trust_env=False, timeout=30) as client:
            for burst in range(5):
                over_http = [asyncio.create_task(client.get(url)) for _ in range(100)]
                over_grpc = [asyncio.ensure_future(world.health.Check(ALL)) for _ in range(100)]
                if not burst:
                    await asyncio.wait(over_grpc, timeout=0.2)  # all of them come while the check runs
                    gate.set()
                assert {(await reply).status_code for reply in over_http} == {200}
                assert {(await answer).status for answer in over_grpc} == {SERVING}
    finally:
        await http.stop(0)
    assert asked == 1
