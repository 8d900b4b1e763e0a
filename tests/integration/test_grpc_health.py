"""Health over gRPC: one answer, a watch that ends with the service, and a list."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grpc_interceptors import add_health
from grpc_interceptors.health import health_server
from resilience import HealthChecker, MemoryStore, Pipeline, RateLimitPolicy
from tests.integration.grpc_world import connected, make_server

StatusCode = grpc.StatusCode
Response = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, UNKNOWN = Response.SERVING, Response.NOT_SERVING, Response.SERVICE_UNKNOWN
SERVICES = ("shop.v1.Orders", "shop.v1.Stock")


def make(checker: HealthChecker) -> grpc.aio.Server:
    server = make_server(Pipeline([RateLimitPolicy(MemoryStore(), "1/hour")]), {})
    add_health(server, checker, SERVICES)
    return server


@asynccontextmanager
async def probing(checker: HealthChecker) -> AsyncIterator[Any]:
    async with connected(make(checker)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def about(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


class Switch:
    """A check that is what it was set to."""

    def __init__(self) -> None:
        self.fine = True

    async def __call__(self) -> bool:
        return self.fine


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_check_tells_that_a_known_service_serves(service: str) -> None:
    async with probing(HealthChecker()) as health:
        assert (await health.Check(about(service))).status == SERVING


async def test_check_of_an_unknown_service_is_not_found() -> None:
    async with probing(HealthChecker()) as health:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(about("shop.v1.Nothing"))
    assert caught.value.code() is StatusCode.NOT_FOUND


async def test_check_follows_the_life_of_the_service() -> None:
    checker = HealthChecker(phase="starting")
    seen = []
    async with probing(checker) as health:
        seen.append((await health.Check(about())).status)
        for step in (checker.mark_ready, checker.drain, checker.stop):
            step()
            seen.append((await health.Check(about())).status)
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING, NOT_SERVING]


@pytest.mark.parametrize(("critical", "status"), [(True, NOT_SERVING), (False, SERVING)])
async def test_only_a_critical_failure_takes_the_service_out(critical: bool, status: int) -> None:
    checker, switch = HealthChecker(), Switch()
    switch.fine = False
    checker.add_check("database", switch, critical=critical)
    async with probing(checker) as health:
        assert (await health.Check(about())).status == status


async def test_list_answers_for_the_server_and_every_service() -> None:
    checker = HealthChecker()
    async with probing(checker) as health:
        listed = await health.List(health_pb2.HealthListRequest())
        assert {name: one.status for name, one in listed.statuses.items()} == dict.fromkeys(("", *SERVICES), SERVING)
        checker.drain()
        listed = await health.List(health_pb2.HealthListRequest())
        assert {one.status for one in listed.statuses.values()} == {NOT_SERVING}


async def test_a_watch_is_told_at_once_and_at_each_change() -> None:
    checker = HealthChecker(phase="starting")
    async with probing(checker) as health:
        watch = health.Watch(about(SERVICES[0]))
        assert (await watch.read()).status == NOT_SERVING
        checker.mark_ready()
        assert (await watch.read()).status == SERVING


async def test_a_watch_is_told_of_a_check_that_turns() -> None:
    checker, switch = HealthChecker(ttl=0), Switch()
    checker.add_check("database", switch)
    async with probing(checker) as health:
        watch = health.Watch(about())
        assert (await watch.read()).status == SERVING
        switch.fine = False
        assert (await watch.read()).status == NOT_SERVING


async def test_a_watch_of_an_unknown_service_says_so_and_stays_until_the_drain() -> None:
    checker = HealthChecker()
    async with probing(checker) as health:
        watch = health.Watch(about("shop.v1.Nothing"))
        assert (await watch.read()).status == UNKNOWN
        following = asyncio.ensure_future(watch.read())
        assert (await health.Check(about())).status == SERVING
        assert not following.done()
        checker.drain()
        assert await following is grpc.aio.EOF
        assert await watch.code() is StatusCode.OK


@pytest.mark.parametrize("watchers", [1, 20])
async def test_a_drain_tells_every_watch_that_the_service_leaves_and_ends_it(watchers: int) -> None:
    checker = HealthChecker()
    async with probing(checker) as health:
        watches = [health.Watch(about()) for _ in range(watchers)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        checker.drain()
        for watch in watches:
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            assert await watch.code() is StatusCode.OK


async def test_a_server_stops_at_once_although_somebody_watched() -> None:
    checker = HealthChecker()
    server = make(checker)
    async with connected(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(about())
        assert (await watch.read()).status == SERVING
        checker.drain()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await server.stop(3)
        assert loop.time() - began < 1
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.code() is StatusCode.OK


async def test_a_watch_that_begins_while_the_service_drains_is_sent_away_untold() -> None:
    checker = HealthChecker()
    checker.drain()
    async with probing(checker) as health:
        watch = health.Watch(about())
        assert await watch.code() is StatusCode.UNAVAILABLE


async def test_one_watcher_that_leaves_does_not_trouble_another() -> None:
    checker = HealthChecker()
    async with probing(checker) as health:
        leaves, stays = health.Watch(about()), health.Watch(about())
        await leaves.read()
        await stays.read()
        leaves.cancel()
        checker.drain()
        assert (await stays.read()).status == NOT_SERVING
        assert await stays.read() is grpc.aio.EOF


async def test_a_check_of_one_service_takes_that_one_out_alone() -> None:
    checker = HealthChecker()
    checker.add_check("ledger", lambda: False, services=["shop.v1.Ledger"])
    async with probing(checker) as health:
        answers = {name: (await health.Check(about(name))).status for name in ("", *SERVICES, "shop.v1.Ledger")}
    assert answers == {**dict.fromkeys(("", *SERVICES), SERVING), "shop.v1.Ledger": NOT_SERVING}


async def test_list_tells_of_services_that_only_a_check_names() -> None:
    checker = HealthChecker()
    checker.add_check("ledger", lambda: False, services=["shop.v1.Ledger"])
    async with probing(checker) as health:
        listed = await health.List(health_pb2.HealthListRequest())
    answers = {**dict.fromkeys(("", *SERVICES), SERVING), "shop.v1.Ledger": NOT_SERVING}
    assert {name: one.status for name, one in listed.statuses.items()} == answers


async def test_a_probe_may_ask_for_a_group_of_checks_by_its_name() -> None:
    checker = HealthChecker(phase="starting")
    checker.add_check("event_loop", lambda: True, groups=["live"])
    seen = []
    async with probing(checker) as health:
        for step in (None, checker.mark_ready, checker.drain):
            if step is not None:
                step()
            names = ("liveness", "startup", "readiness")
            seen.append([(await health.Check(about(name))).status == SERVING for name in names])
    assert seen == [[True, False, False], [True, True, True], [True, True, False]]


@pytest.mark.parametrize(("services", "code"), [(99, StatusCode.OK), (100, StatusCode.RESOURCE_EXHAUSTED)])
async def test_list_of_more_than_a_hundred_is_refused(services: int, code: StatusCode) -> None:
    server = health_server(HealthChecker(), [f"shop.v1.S{n}" for n in range(services)])
    async with connected(server) as channel:
        call = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
        assert await call.code() is code


async def test_the_health_port_answers_while_the_other_server_is_full() -> None:
    checker = HealthChecker()
    busy, entered, release = make_server_of_one(checker)
    async with connected(busy) as channel, connected(health_server(checker)) as probes:
        go: Any = channel.unary_unary("/test.Slow/Go")
        running = go(b"")
        await entered.wait()
        refused = health_pb2_grpc.HealthStub(channel).Check(about())
        assert await refused.code() is StatusCode.RESOURCE_EXHAUSTED
        assert (await health_pb2_grpc.HealthStub(probes).Check(about())).status == SERVING
        release.set()
        assert await running == b""


def make_server_of_one(checker: HealthChecker) -> tuple[grpc.aio.Server, asyncio.Event, asyncio.Event]:
    """Return a server that takes one call at a time, and what tells that its handler runs, and lets it end."""
    entered, release = asyncio.Event(), asyncio.Event()

    async def go(_request: bytes, _context: Any) -> bytes:
        entered.set()
        await release.wait()
        return b""

    server = grpc.aio.server(maximum_concurrent_rpcs=1)
    handler: Any = grpc.unary_unary_rpc_method_handler(go)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Slow", {"Go": handler}),))
    add_health(server, checker)
    return server, entered, release
