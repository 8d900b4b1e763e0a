"""A deploy: two processes of the demo behind balancers, each restarted in turn under steady load over both doors."""

import asyncio
import contextlib
import json
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from examples.payments.launch import Launched, launch
from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc
from grpc_interceptors import retry_service_config
from tests.support.redis_servers import RedisServer, binary, free_port

BOUND = 30.0
PROBE = 0.25  # Seconds from one look at readiness to the next.
DRAIN = "1"  # Seconds; a watcher is told at once.
CLIENTS = 4  # Over each door.
PROTOCOLS = ("http", "grpc")
PAYMENT: dict[str, Any] = {"amount": 100, "currency": "EUR"}
METHOD = "/examples.payments.v1.PaymentService/CreatePayment"


@dataclass
class Replica:
    """One of the two addresses, and every process that has served there."""

    folder: Path
    environment: dict[str, str]
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    logs: list[Path] = field(default_factory=list)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Launched]:
        log = self.folder / f"{self.http_port}-{len(self.logs)}.log"
        ports = {"HTTP_PORT": str(self.http_port), "GRPC_PORT": str(self.grpc_port)}
        async with launch(log, **self.environment, **ports) as process:
            self.logs.append(log)
            yield process

    def created(self, log: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["event"] == "payment created"]

    def all_created(self) -> list[dict[str, Any]]:
        return [payment for log in self.logs for payment in self.created(log)]

    async def takes_both(self) -> None:
        """Wait until the newest process has taken payments over both doors."""
        async with asyncio.timeout(BOUND):
            while {line["protocol"] for line in self.created(self.logs[-1])} != set(PROTOCOLS):  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.02)


class Balancer:
    """Takes turns between those that are ready, over kept connections, and tries nothing twice."""

    def __init__(self, urls: list[str]) -> None:
        self._ready: set[str] = set(urls)
        self._turn = 0
        # The probes' connections are their own, as a load balancer's are.
        self._client = httpx.AsyncClient(timeout=BOUND, trust_env=False)
        self._prober = httpx.AsyncClient(timeout=1, trust_env=False)

    async def probe(self, url: str) -> None:
        """Learn for ever whether one of them is ready."""
        while True:
            ready = False
            with contextlib.suppress(httpx.TransportError):
                ready = (await self._prober.get(f"{url}/health/ready")).status_code == 200
            (self._ready.add if ready else self._ready.discard)(url)
            await asyncio.sleep(PROBE)

    async def pay(self, key: str) -> str:
        """Take a payment; return its id."""
        self._turn += 1
        url = sorted(self._ready)[self._turn % len(self._ready)]
        headers = {"idempotency-key": key, "x-api-key": "deploy"}
        reply = await self._client.post(f"{url}/api/payments", json=PAYMENT, headers=headers)
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    async def aclose(self) -> None:
        await self._client.aclose()
        await self._prober.aclose()


def channel(ports: list[int]) -> grpc.aio.Channel:
    """Return a channel that takes turns between those that say SERVING, and retries as our helper configures."""
    options: dict[str, Any] = dict(retry_service_config([METHOD], codes=[grpc.StatusCode.UNAVAILABLE]))
    config = json.loads(options["grpc.service_config"])
    config |= {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    options |= {
        "grpc.service_config": json.dumps(config),
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 200,
    }
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    return grpc.aio.insecure_channel(target, options=list(options.items()))


@dataclass
class Load:
    """What a steady load came to."""

    paid: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    async def run(self, pay: Callable[[str], Awaitable[str]], until: asyncio.Event) -> None:
        """Take one payment after another, each under a key of its own."""
        while not until.is_set():
            key = secrets.token_hex(8)
            try:
                self.paid[key] = await pay(key)
            except Exception as error:
                self.failed.append(repr(error))
            await asyncio.sleep(0.01)  # the pace of the load


@pytest.mark.slow
async def test_a_rolling_restart_under_load_fails_no_request_and_neither_loses_nor_doubles_a_payment(
    tmp_path: Path,
) -> None:
    load, stopping = Load(), asyncio.Event()
    async with RedisServer(binary()) as redis, AsyncExitStack() as stack:
        environment = {
            "REDIS_URL": redis.url,
            "RATE_LIMIT_ENABLED": "false",
            "PROCESSING_SECONDS": "0.05",
            "HEALTH_DRAIN_SECONDS": DRAIN,
        }
        replicas = [Replica(tmp_path, environment) for _ in range(2)]
        running = [await stack.enter_async_context(replica.serving()) for replica in replicas]
        balancer = Balancer([demo.http for demo in running])
        stack.push_async_callback(balancer.aclose)
        grpc_channel = await stack.enter_async_context(channel([replica.grpc_port for replica in replicas]))
        stub = payments_pb2_grpc.PaymentServiceStub(grpc_channel)

        async def pay_grpc(key: str) -> str:
            metadata = [("idempotency-key", key), ("x-api-key", "deploy")]
            payment = await stub.CreatePayment(pb.CreatePaymentRequest(**PAYMENT), metadata=metadata, timeout=BOUND)
            return str(payment.id)

        probes = [asyncio.create_task(balancer.probe(demo.http)) for demo in running]
        doors = (balancer.pay, pay_grpc) * CLIENTS
        clients = [asyncio.create_task(load.run(pay, stopping)) for pay in doors]
        for replica, demo in zip(replicas, running, strict=True):
            await replica.takes_both()
            demo.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(demo.process.wait(), BOUND) == 0
            await stack.enter_async_context(replica.serving())
            await replica.takes_both()
        stopping.set()
        await asyncio.gather(*clients)
        for probe in probes:
            probe.cancel()
    created = [line for replica in replicas for line in replica.all_created()]
    assert load.failed == []
    assert {line["protocol"] for line in created} == set(PROTOCOLS)
    assert sorted(line["payment"] for line in created) == sorted(load.paid.values())
    assert len(load.paid) > 100
