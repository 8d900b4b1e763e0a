"""Drive the running demo with real clients, and say of each promise what was seen. Run it with ``./dev tour``."""

import asyncio
import contextlib
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.payments.launch import launch
from examples.payments.settings import PaymentsSettings
from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc

PAYMENT = {"amount": 100, "currency": "EUR"}
OK = grpc.StatusCode.OK


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gRPC call came to."""

    status: grpc.StatusCode
    trailers: dict[str, str]
    message: Any = None


Metadata = list[tuple[str, str]]


class Visitor:
    """A caller of its own, known by a fresh API key, with a client for each door."""

    def __init__(self, http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
        self._http = http
        self._payments = payments_pb2_grpc.PaymentServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self.api_key = f"tour-{secrets.token_hex(8)}"

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """Send a GET."""
        return await self._http.get(path, headers={"x-api-key": self.api_key, **headers})

    async def pay_http(self, amount: int = 100, **headers: str) -> httpx.Response:
        """Take a payment over HTTP."""
        headers = {"x-api-key": self.api_key, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return await self._http.post("/api/payments", json={**PAYMENT, "amount": amount}, headers=headers)

    async def pay_grpc(self, amount: int = 100, **metadata: str) -> Answer:
        """Take a payment over gRPC."""
        pairs = [("x-api-key", self.api_key), *((name.replace("_", "-"), value) for name, value in metadata.items())]
        request = pb.CreatePaymentRequest(amount=amount, currency="EUR")
        call = self._payments.CreatePayment(request, metadata=pairs)
        message = None
        with contextlib.suppress(grpc.aio.AioRpcError):
            message = await call
        trailers = {name: str(value) for name, value in await call.trailing_metadata() or ()}
        return Answer(await call.code(), trailers, message)

    async def events_http(self, payment: str) -> list[str]:
        """Follow a payment over HTTP; return the names of the events."""
        async with self._http.stream("GET", f"/api/payments/{payment}/events") as reply:
            return [line[7:] async for line in reply.aiter_lines() if line.startswith("event: ")]

    async def events_grpc(self, payment: str) -> list[str]:
        """Follow a payment over gRPC; return its states."""
        return [event.status async for event in self._payments.WatchPayment(pb.WatchPaymentRequest(id=payment))]

    async def import_grpc(self, count: int) -> int:
        """Send many payments in one stream; return how many arrived."""

        async def requests() -> AsyncIterator[pb.CreatePaymentRequest]:
            for _ in range(count):
                yield pb.CreatePaymentRequest(amount=1, currency="EUR")

        reply: pb.ImportPaymentsResponse = await self._payments.ImportPayments(requests())
        return reply.imported


Seen = tuple[bool, str]


async def ids_over_http(me: Visitor) -> Seen:
    """HTTP: a correlation id comes back, a request id is minted."""
    reply = await me.get("/api/payments/none", **{"x-correlation-id": "tour-http-1"})
    ids = reply.headers["x-correlation-id"], reply.headers["x-request-id"]
    return ids[0] == "tour-http-1" and ids[1].startswith("req_"), f"{reply.status_code}, {ids[0]}, {ids[1]}"


async def ids_over_grpc(me: Visitor) -> Seen:
    """gRPC: the same, in the trailers."""
    answer = await me.pay_grpc(x_correlation_id="tour-grpc-1")
    ids = answer.trailers["x-correlation-id"], answer.trailers["x-request-id"]
    return ids[0] == "tour-grpc-1" and ids[1].startswith("req_"), f"{answer.status.name}, {ids[0]}, {ids[1]}"


async def bad_ids(me: Visitor) -> Seen:
    """An id that could forge a log line is replaced, and never echoed."""
    reply = await me.get("/api/payments/none", **{"x-correlation-id": "a\tb"})
    answer = await me.pay_grpc(x_correlation_id="two words")
    new = reply.headers["x-correlation-id"], answer.trailers["x-correlation-id"]
    return all(len(one) == 32 for one in new), f"{new[0]}, {new[1]}"


async def retry_over_http(me: Visitor) -> Seen:
    """HTTP: a keyed payment that is retried runs once."""
    first, second = [await me.pay_http(idempotency_key="k") for _ in range(2)]
    same = first.content == second.content and first.status_code == second.status_code == 201
    replayed = second.headers.get("x-idempotent-replayed")
    return same and replayed == "true", f"{first.json()['id']} = {second.json()['id']}, replayed: {replayed}"


async def retry_over_grpc(me: Visitor) -> Seen:
    """gRPC: a keyed payment that is retried runs once."""
    first, second = [await me.pay_grpc(idempotency_key="k") for _ in range(2)]
    replayed = second.trailers.get("x-idempotent-replayed")
    same = first.status is OK and first.message == second.message
    return same and replayed == "true", f"{first.message.id} = {second.message.id}, replayed: {replayed}"


async def retry_over_the_other_door(me: Visitor) -> Seen:
    """A payment over one protocol, retried over the other, runs once and is told again."""
    first, answer = await me.pay_http(idempotency_key="k"), await me.pay_grpc(idempotency_key="k")
    replayed = answer.trailers.get("x-idempotent-replayed")
    told = answer.message.id if answer.message is not None else answer.status.name
    return told == first.json()["id"] and replayed == "true", f"{first.json()['id']} = {told}, replayed: {replayed}"


async def other_payload(me: Visitor) -> Seen:
    """A key with another payload is refused."""
    await me.pay_http(100, idempotency_key="k")
    http = await me.pay_http(101, idempotency_key="k")
    await me.pay_grpc(100, idempotency_key="g")
    rpc = await me.pay_grpc(101, idempotency_key="g")
    return (
        http.status_code == 422 and rpc.status is grpc.StatusCode.FAILED_PRECONDITION,
        f"{http.status_code}, {rpc.status.name}",
    )


async def twins_over_http(me: Visitor) -> Seen:
    """HTTP: of two twins in flight one runs, the other is told when to come back."""
    replies = sorted(await asyncio.gather(*(me.pay_http(idempotency_key="k") for _ in range(2))), key=_status)
    wait = replies[1].headers.get("retry-after")
    return [_status(one) for one in replies] == [201, 409] and wait is not None, f"201, 409 with Retry-After: {wait}"


async def twins_over_grpc(me: Visitor) -> Seen:
    """gRPC: of two twins in flight one runs, the other waits for its reply."""
    answers = await asyncio.gather(*(me.pay_grpc(idempotency_key="k") for _ in range(2)))
    replayed = [answer.trailers.get("x-idempotent-replayed") for answer in answers]
    same = answers[0].status is OK and answers[0].message == answers[1].message
    names = ", ".join(answer.status.name for answer in answers)
    return same and sorted(map(str, replayed)) == ["None", "true"], f"{names} with one payment"


async def bad_keys(me: Visitor) -> Seen:
    """A key of 300 bytes is refused."""
    http, rpc = await me.pay_http(idempotency_key="k" * 300), await me.pay_grpc(idempotency_key="k" * 300)
    return (
        http.status_code == 400 and rpc.status is grpc.StatusCode.INVALID_ARGUMENT,
        f"{http.status_code}, {rpc.status.name}",
    )


async def one_quota(me: Visitor) -> Seen:
    """One quota: spent over both doors, then refused by both, while health still answers."""
    first = await me.get("/api/payments/none")
    limit = int(first.headers.get("x-ratelimit-limit", "0"))
    if not limit:
        return False, "limits are switched off: set RATE_LIMIT_ENABLED=true"
    over_http, over_grpc = limit - limit * 2 // 5, limit * 2 // 5
    for _ in range(over_http - 1):
        await me.get("/api/payments/none")
    spent = [(await me.pay_grpc()).status for _ in range(over_grpc)]
    http, rpc = await me.get("/api/payments/none"), await me.pay_grpc()
    health = await me.get("/health/ready")
    refused, seen = _both(http, 429, rpc, grpc.StatusCode.RESOURCE_EXHAUSTED)
    wait = http.headers.get("retry-after")
    ok = set(spent) <= {OK} and refused and health.status_code == 200
    return ok, f"{over_http} over HTTP + {over_grpc} over gRPC, then {seen}; retry in {wait} s"


async def streams(me: Visitor) -> Seen:
    """Streams pass: server-sent events, a server stream, a client stream."""
    payment = (await me.pay_http()).json()["id"]
    http, rpc = await asyncio.gather(me.events_http(payment), me.events_grpc(payment))
    imported = await me.import_grpc(3)
    ok = http[-1] == rpc[-1] == "settled" and imported == 3
    return ok, f"{' > '.join(http)}, {' > '.join(rpc)}, {imported} imported"


async def health(me: Visitor) -> Seen:
    """One health: ready over HTTP, SERVING over gRPC."""
    live, ready = await me.get("/health"), await me.get("/health/ready")
    reply = await me.health.Check(health_pb2.HealthCheckRequest())
    serving = reply.status == health_pb2.HealthCheckResponse.SERVING
    ok = live.status_code == ready.status_code == 200 and serving
    return ok, f"{live.json()['status']}, {ready.json()['status']}, {'SERVING' if serving else 'NOT_SERVING'}"


STOPS: tuple[Callable[[Visitor], Awaitable[Seen]], ...] = (
    ids_over_http,
    ids_over_grpc,
    bad_ids,
    retry_over_http,
    retry_over_grpc,
    retry_over_the_other_door,
    other_payload,
    twins_over_http,
    twins_over_grpc,
    bad_keys,
    one_quota,
    streams,
    health,
)


def _both(http: httpx.Response, status: int, rpc: Answer, code: grpc.StatusCode) -> Seen:
    return http.status_code == status and rpc.status is code, f"{http.status_code}, {rpc.status.name}"


def _status(reply: httpx.Response) -> int:
    return reply.status_code


@contextlib.asynccontextmanager
async def running_service() -> AsyncIterator[tuple[str, str]]:
    """Find the demo on its ports, or start one that nobody else uses."""
    settings = PaymentsSettings.load()
    http = f"http://127.0.0.1:{settings.http_port}"
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.get(f"{http}/health")).raise_for_status()
    except httpx.HTTPError:
        print("None runs, so this starts one, with a quota of 5 requests a minute.\n")
        with tempfile.TemporaryDirectory() as folder:
            async with launch(Path(folder) / "log", RATE_LIMIT_REQUESTS="5", RATE_LIMIT_ENABLED="true") as launched:
                yield launched.http, launched.grpc
    else:
        print(f"Found one on {http}.\n")
        yield http, f"127.0.0.1:{settings.grpc_port}"


async def main() -> int:
    """Walk all stops; return the exit code."""
    failed = 0
    async with (
        running_service() as (http, target),
        httpx.AsyncClient(base_url=http, timeout=30, trust_env=False) as client,
        grpc.aio.insecure_channel(target) as channel,
    ):
        for stop in STOPS:
            try:
                kept, seen = await stop(Visitor(client, channel))
            except Exception as error:  # one broken promise must not hide the others
                kept, seen = False, f"{type(error).__name__}: {error}"
            failed += not kept
            print(f"{'kept  ' if kept else 'BROKEN'}  {stop.__doc__}\n          saw {seen}")
    print(f"\n{len(STOPS) - failed} of {len(STOPS)} promises kept.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
