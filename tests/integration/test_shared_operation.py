"""One operation behind both doors: what one of them did, the other one tells again in its own words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI, HTTPException

from grpc_interceptors import ResilienceInterceptor
from http_middleware import install
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Store,
    operation,
    running_operation,
)
from resilience.codecs import JsonCodec
from resilience.stores.redis import RedisStore
from tests.integration.grpc_world import Told, ask, connected
from tests.integration.http_driver import connect
from tests.support.redis_servers import RedisServer, binary

PAY = "/test.Payments/Pay"
StatusCode = grpc.StatusCode


@dataclass(frozen=True)
class Payment:
    id: str
    amount: int


class DeclinedError(Exception):
    """A final answer."""


class BrokenError(Exception):
    """An accident."""


class Shop:
    """A service whose one operation has two doors."""

    def __init__(self, store: Store, **options: Any) -> None:
        self.runs = 0
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()
        self.pipeline = Pipeline([IdempotencyPolicy(store, operation="pay", **options)])
        self.app = FastAPI()
        self.app.add_api_route("/pay", self.over_http, methods=["POST"], status_code=201)
        install(self.app, self.pipeline)
        self.server = grpc.aio.server(interceptors=[ResilienceInterceptor(self.pipeline)])
        handler: Any = grpc.unary_unary_rpc_method_handler(self.over_grpc)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Payments", {"Pay": handler}),))

    @operation("pay", JsonCodec(Payment), errors=(DeclinedError,))
    async def pay(self, amount: int, *, currency: str = "EUR") -> Payment:
        self.runs += 1
        self.entered.set()
        await self.release.wait()
        if amount < 0:
            raise DeclinedError(f"{amount} {currency} can't be paid")
        if amount == 0:
            raise BrokenError
        return Payment(f"pay_{self.runs}", amount)

    async def over_http(self, data: dict[str, int]) -> dict[str, Any]:
        try:
            return asdict(await self.pay(data["amount"]))
        except DeclinedError as error:
            raise HTTPException(422, str(error)) from None

    async def over_grpc(self, request: bytes, context: Any) -> bytes:
        try:
            payment = await self.pay(int(request), currency="EUR")
        except DeclinedError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        except BrokenError:
            await context.abort(StatusCode.UNAVAILABLE, "broken")
        return f"{payment.id} {payment.amount}".encode()


class Client:
    def __init__(self, shop: Shop, channel: grpc.aio.Channel) -> None:
        self._http = connect(shop.app)
        self._channel = channel

    async def http(self, amount: int, key: str = "k") -> httpx.Response:
        return await self._http.post("/pay", json={"amount": amount}, headers={"idempotency-key": key})

    async def grpc(self, amount: int, key: str = "k", deadline: float | None = None) -> Told:
        pair = ("idempotency-key", key)
        return await ask(self._channel, PAY, "unary_unary", pair, send=[str(amount).encode()], deadline=deadline)


@asynccontextmanager
async def serving(shop: Shop) -> AsyncIterator[Client]:
    async with connected(shop.server) as channel:
        yield Client(shop, channel)


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    async with RedisServer(binary()) as server:
        redis = RedisStore(server.url, record_timeout=5)
        yield redis
        await redis.aclose()


async def test_a_payment_over_http_is_told_again_over_grpc(store: Store) -> None:
    shop = Shop(store)
    async with serving(shop) as client:
        first = await client.http(7)
        over_grpc = await client.grpc(7)
        again = await client.http(7)
    assert (first.status_code, first.json()) == (201, {"id": "pay_1", "amount": 7})
    assert (over_grpc.code, over_grpc.replies) == (StatusCode.OK, [b"pay_1 7"])
    assert over_grpc.get("x-idempotent-replayed") == "true"
    assert (again.content, again.headers["x-idempotent-replayed"]) == (first.content, "true")
    assert shop.runs == 1


async def test_a_payment_over_grpc_is_told_again_over_http(store: Store) -> None:
    shop = Shop(store)
    async with serving(shop) as client:
        first = await client.grpc(7)
        over_http = await client.http(7)
        again = await client.grpc(7)
    assert first.replies == again.replies == [b"pay_1 7"]
    assert (over_http.status_code, over_http.json()) == (201, {"id": "pay_1", "amount": 7})
    assert over_http.headers["x-idempotent-replayed"] == "true"
    assert shop.runs == 1


async def test_a_final_error_is_told_again_too(store: Store) -> None:
    shop = Shop(store)
    async with serving(shop) as client:
        first = await client.http(-7)
        over_grpc = await client.grpc(-7)
    assert (first.status_code, first.json()) == (422, {"detail": "-7 EUR can't be paid"})
    assert (over_grpc.code, over_grpc.details) == (StatusCode.INVALID_ARGUMENT, "-7 EUR can't be paid")
    assert shop.runs == 1


async def test_an_accident_frees_the_key_for_every_door() -> None:
    shop = Shop(MemoryStore())
    async with serving(shop) as client:
        assert (await client.grpc(0)).code is StatusCode.UNAVAILABLE
        assert (await client.http(0)).status_code == 500
    assert shop.runs == 2


async def test_other_arguments_through_another_door_are_refused(store: Store) -> None:
    shop = Shop(store)
    async with serving(shop) as client:
        await client.http(7)
        over_grpc = await client.grpc(8)
        await client.grpc(9, "l")
        over_http = await client.http(10, "l")
    assert over_grpc.code is StatusCode.FAILED_PRECONDITION
    assert over_http.status_code == 422
    assert "another request" in over_http.json()["detail"]
    assert shop.runs == 2


async def test_a_twin_through_another_door_waits_for_the_first(store: Store) -> None:
    shop = Shop(store)
    shop.release.clear()
    async with serving(shop) as client:
        first = asyncio.create_task(client.http(7))
        await shop.entered.wait()
        refused = await client.http(7)
        twin = asyncio.create_task(client.grpc(7, deadline=10))
        shop.release.set()
        assert (await first).status_code == 201
        told = await twin
    assert refused.status_code == 409
    assert told.replies == [b"pay_1 7"]
    assert shop.runs == 1


async def test_a_result_that_can_not_be_read_any_more_is_never_run_again(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    before, after = Shop(store), Shop(store)
    other: Any = operation("pay", JsonCodec(list[int]))(Shop.pay.__wrapped__)  # type: ignore[attr-defined] # wraps() set it
    after.pay = other.__get__(after)  # type: ignore[method-assign] # a deploy that changed the type
    async with serving(before) as client:
        await client.http(7)
    async with serving(after) as client:
        told = await client.grpc(7)
    assert told.code is StatusCode.ALREADY_EXISTS
    assert after.runs == 0
    assert "The kept result of pay can't be read" in caplog.text


async def test_a_result_over_the_bound_is_not_kept_and_never_run_again() -> None:
    shop = Shop(MemoryStore(), max_reply=40)
    async with serving(shop) as client:
        assert (await client.http(7)).status_code == 201
        assert (await client.grpc(7)).code is StatusCode.ALREADY_EXISTS
        assert (await client.http(7)).status_code == 409
    assert shop.runs == 1


async def test_a_key_that_nobody_holds_for_the_operation_is_an_error_of_the_configuration() -> None:
    shop = Shop(MemoryStore())
    unkeyed = FastAPI()

    @unkeyed.post("/pay")
    async def pay(data: dict[str, int]) -> str:
        try:
            return (await shop.pay(data["amount"])).id
        except ConfigurationError as error:
            return str(error)

    install(unkeyed)
    told = await connect(unkeyed).post("/pay", json={"amount": 7}, headers={"idempotency-key": "k"})
    assert "say operation='pay' in the IdempotencyPolicy" in told.json()
    assert shop.runs == 0
    assert (await connect(unkeyed).post("/pay", json={"amount": 7})).json() == "pay_1"


async def test_outside_of_a_call_an_operation_is_itself() -> None:
    shop = Shop(MemoryStore())
    assert await shop.pay(7) == Payment("pay_1", 7)
    with pytest.raises(DeclinedError):
        await shop.pay(-1)
    assert running_operation() is None


def test_a_plain_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be `async def`"):
        operation("pay", JsonCodec(int))(len)  # type: ignore[arg-type] # that is the point
