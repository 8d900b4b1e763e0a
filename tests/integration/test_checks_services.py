"""Another service, and the shared store, asked for real: over gRPC, and in a Redis that hangs and comes back."""

import asyncio
import signal
from typing import Any

import grpc
import pytest

from grpc_interceptors import health_server
from grpc_interceptors.checks import check_grpc
from resilience import ComponentHealth, HealthChecker, HealthStatus
from resilience.checks import check_redis, check_store
from resilience.stores.redis import RedisStore
from tests.integration.grpc_world import connected
from tests.support.redis_servers import RedisServer, binary, free_port

HEALTHY, UNHEALTHY = HealthStatus.HEALTHY, HealthStatus.UNHEALTHY


def told(found: ComponentHealth) -> tuple[str, HealthStatus, str | None]:
    return found.name, found.status, found.message


async def test_a_service_is_healthy_while_it_serves() -> None:
    checker = HealthChecker()
    async with connected(health_server(checker, ["shop.v1.Orders"])) as channel:
        assert told(await check_grpc(channel)) == ("grpc", HEALTHY, "Connected")
        assert told(await check_grpc(channel, "shop.v1.Orders")) == ("grpc", HEALTHY, "Connected")
        assert told(await check_grpc(channel, "shop.v1.Nothing")) == ("grpc", UNHEALTHY, "NOT_FOUND")
        checker.drain()
        assert told(await check_grpc(channel)) == ("grpc", UNHEALTHY, "NOT_SERVING")


async def test_a_server_without_health_or_one_that_is_gone_is_unhealthy_by_the_code() -> None:
    async with connected(grpc.aio.server()) as channel:
        assert told(await check_grpc(channel)) == ("grpc", UNHEALTHY, "UNIMPLEMENTED")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{free_port()}") as channel:
        assert told(await check_grpc(channel)) == ("grpc", UNHEALTHY, "UNAVAILABLE")


async def never(_request: bytes, _context: Any) -> bytes:
    await asyncio.Event().wait()
    return b""


@pytest.mark.parametrize(("answer", "message"), [(b"\x08\x63", "Unknown status"), (b"", "UNKNOWN")])
async def test_a_status_that_is_none_is_unhealthy(answer: bytes, message: str) -> None:
    async def check(_request: bytes, _context: Any) -> bytes:
        return answer

    async with connected(speaking(check)) as channel:
        assert told(await check_grpc(channel)) == ("grpc", UNHEALTHY, message)


async def test_a_service_that_never_answers_is_given_up_in_time() -> None:
    async with connected(speaking(never)) as channel, asyncio.timeout(5):
        assert told(await check_grpc(channel, timeout=0.05)) == ("grpc", UNHEALTHY, "DEADLINE_EXCEEDED")


def speaking(check: Any) -> grpc.aio.Server:
    server = grpc.aio.server()
    methods: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)])
    return server


async def test_a_redis_and_the_store_in_it_are_unhealthy_while_it_hangs_and_healthy_again() -> None:
    async with RedisServer(binary()) as server:
        store = RedisStore(server.url)
        checker = HealthChecker(ttl=0, timeout=2)
        checker.add_check("redis", lambda: check_redis(server.url, timeout=0.1), critical=False)
        checker.add_check("store", lambda: check_store(store), scope="shared", critical=False)

        assert (await checker.run()).status is HEALTHY
        server.signal(signal.SIGSTOP)
        report = await checker.run()
        server.signal(signal.SIGCONT)

        assert report.status is HealthStatus.DEGRADED
        assert report.components["redis"].message == "Timed out"
        assert report.components["store"].message == "StoreUnavailableError"
        async with asyncio.timeout(10):
            while (await checker.run()).status is not HEALTHY:  # noqa: ASYNC110 - no server tells that it is back
                await asyncio.sleep(0.01)
        await store.aclose()
