"""What decorators at servicer methods declare holds on every kind of method, whatever stands between door and method.

And it is the same thing that they declare at an endpoint: one count, one key space, whichever door a caller takes.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fastapi import FastAPI

from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc
from grpc_interceptors import ResilienceInterceptor
from http_middleware import install
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    RateLimitPolicy,
    RequestContextPolicy,
)
from resilience.decorators import idempotent, rate_limit
from resilience.testing import ManualClock
from tests.integration.grpc_world import KINDS, SERVICE, Pair, Told, ask, connected, generic, start, told
from tests.integration.http_driver import connect

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
ME: Pair = ("x-api-key", "me")
HEADERS = {"idempotency-key": "key-1", "x-api-key": "me"}
REPLAYED = "x-idempotent-replayed"
PUSHBACK = "grpc-retry-pushback-ms"
PAY = f"/{SERVICE}/pay"
MAKERS: Mapping[str, Any] = {kind: getattr(grpc, f"{kind}_rpc_method_handler") for kind in KINDS}


class Things:
    """A servicer with a method of each kind, all of them limited, and one that is keyed."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    @rate_limit(1, 20)
    async def unary_unary(self, request: bytes, _context: Any) -> bytes:
        self.runs.append("unary_unary")
        return request

    @rate_limit(1, 20)
    async def unary_stream(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        self.runs.append("unary_stream")
        yield request
        yield b"more"

    @rate_limit(1, 20)
    async def stream_unary(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        self.runs.append("stream_unary")
        return b" ".join([request async for request in requests])

    @rate_limit(1, 20)
    async def stream_stream(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        self.runs.append("stream_stream")
        async for request in requests:
            yield request

    @idempotent(ttl=3600, require_key=True)
    async def pay(self, request: bytes, context: Any) -> bytes:
        self.runs.append("pay")
        if request == b"crash":
            raise RuntimeError("postgres://admin:hunter2@db")
        if request == b"refuse":
            await context.abort(StatusCode.FAILED_PRECONDITION, "No money", (("x-why", "poor"),))
        context.set_trailing_metadata((("x-receipt", f"run {len(self.runs)}"),))
        return b"\x00\xff%d" % len(self.runs)

    def handlers(self) -> dict[str, Any]:
        by_kind = {f"/{SERVICE}/{kind}": make(getattr(self, kind)) for kind, make in MAKERS.items()}
        return {**by_kind, PAY: grpc.unary_unary_rpc_method_handler(self.pay)}


@asynccontextmanager
async def serving(
    handlers: Things | Mapping[str, Any], *inside: grpc.aio.ServerInterceptor, pipeline: Pipeline | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve behind our interceptor and, further in, those of others."""
    clocked = pipeline or Pipeline(store=MemoryStore(clock=ManualClock()))
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(clocked), *inside])
    server.add_generic_rpc_handlers(generic(handlers.handlers() if isinstance(handlers, Things) else handlers))
    async with connected(server) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, kind: str, *metadata: Pair) -> Told:
    return await ask(channel, f"/{SERVICE}/{kind}", kind, *metadata)


async def over(channel: grpc.aio.Channel, kind: str) -> Told:
    # A refusal needs no request; one that is on its way while the refusal arrives may hide it from this client.
    return await told(start(channel, f"/{SERVICE}/{kind}", kind))


async def pay(channel: grpc.aio.Channel, *metadata: Pair, send: bytes = b"one") -> Told:
    return await ask(channel, PAY, "unary_unary", *metadata, send=[send])


# -- limits


@pytest.mark.parametrize("kind", KINDS)
async def test_a_limited_method_is_refused_before_it_runs_and_the_client_is_told_when_to_come_back(kind: str) -> None:
    things = Things()
    async with serving(things) as channel:
        first, second = await call(channel, kind), await over(channel, kind)
    assert (first.code, first.replies[0]) == (StatusCode.OK, b"one")
    assert (first.get("x-ratelimit-limit"), first.get("x-ratelimit-remaining")) == ("1", "0")
    assert (second.code, second.details) == (StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    assert (second.get(PUSHBACK), second.get("retry-after")) == ("20001", "20")
    assert (second.initial, second.replies) == ([], [])
    assert second.get("x-request-id")
    assert second.get("x-correlation-id")
    assert things.runs == [kind]


async def test_each_method_has_a_count_of_its_own() -> None:
    things = Things()
    async with serving(things) as channel:
        codes = [(await call(channel, kind)).code for kind in KINDS]
    assert codes == [StatusCode.OK] * 4
    assert things.runs == list(KINDS)


async def test_each_caller_has_a_count_of_its_own() -> None:
    async with serving(Things()) as channel:
        codes = [(await call(channel, "unary_unary", ("x-api-key", who))).code for who in ("a", "b", "a")]
    assert codes == [StatusCode.OK, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]


async def test_who_waits_as_long_as_the_pushback_says_gets_in() -> None:
    clock = ManualClock()
    async with serving(Things(), pipeline=Pipeline(store=MemoryStore(clock=clock))) as channel:
        await call(channel, "unary_unary")
        for _ in range(19):
            clock.advance(1)
            refused = await over(channel, "unary_unary")
        clock.advance(int(refused.get(PUSHBACK) or 0) / 1000)
        assert (await call(channel, "unary_unary")).code is StatusCode.OK


async def test_stacked_limits_are_one_step_so_that_one_denies_at_no_cost_to_the_other() -> None:
    clock = ManualClock()

    @rate_limit("1/second")
    @rate_limit("3/hour")
    async def handle(_request: bytes, _context: Any) -> bytes:
        return b"done"

    handlers: dict[str, Any] = {PAY: grpc.unary_unary_rpc_method_handler(handle)}
    async with serving(handlers, pipeline=Pipeline(store=MemoryStore(clock=clock))) as channel:
        for _ in range(3):
            codes = [(await pay(channel)).code for _ in range(5)]
            assert codes == [StatusCode.OK] + [StatusCode.RESOURCE_EXHAUSTED] * 4
            clock.advance(1.5)
        assert (await pay(channel)).code is StatusCode.RESOURCE_EXHAUSTED


async def test_a_method_of_a_generated_servicer_is_limited() -> None:
    class Payments(payments_pb2_grpc.PaymentServiceServicer):  # type: ignore[misc] # generated without types
        @rate_limit(1, 60)
        async def CreatePayment(self, request: pb.CreatePaymentRequest, _context: Any) -> pb.Payment:  # noqa: N802
            return pb.Payment(amount=request.amount)

    server = grpc.aio.server(interceptors=[ResilienceInterceptor(Pipeline())])
    payments_pb2_grpc.add_PaymentServiceServicer_to_server(Payments(), server)
    async with connected(server) as channel:
        stub: Any = payments_pb2_grpc.PaymentServiceStub(channel)
        assert (await stub.CreatePayment(pb.CreatePaymentRequest(amount=7))).amount == 7
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.CreatePayment(pb.CreatePaymentRequest(amount=7))
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED


# -- keys


async def test_a_replay_is_the_first_reply_byte_for_byte_and_says_that_it_is_one() -> None:
    things = Things()
    async with serving(things) as channel:
        first, second = await pay(channel, KEY), await pay(channel, KEY)
    assert first.replies == second.replies == [b"\x00\xff1"]
    assert first.get("x-receipt") == second.get("x-receipt") == "run 1"
    assert (first.get(REPLAYED), second.get(REPLAYED)) == (None, "true")
    assert second.get("x-request-id") not in (None, first.get("x-request-id"))
    assert things.runs == ["pay"]


async def test_a_final_error_is_replayed_and_an_accident_is_run_again() -> None:
    things = Things()
    async with serving(things) as channel:
        refused = [await pay(channel, KEY, send=b"refuse") for _ in range(2)]
        crashed = [await pay(channel, ("idempotency-key", "key-2"), send=b"crash") for _ in range(2)]
    assert [(end.code, end.details, end.get("x-why")) for end in refused] == [
        (StatusCode.FAILED_PRECONDITION, "No money", "poor")
    ] * 2
    assert refused[1].get(REPLAYED) == "true"
    assert [(end.code, end.details) for end in crashed] == [(StatusCode.INTERNAL, "Internal error")] * 2
    assert things.runs == ["pay"] * 3


@pytest.mark.parametrize(
    ("keys", "detail"),
    [
        ([], "This operation needs an Idempotency-Key"),
        ([KEY, KEY], "Send one Idempotency-Key"),
        ([("idempotency-key", "a b")], "Send one Idempotency-Key"),
        ([("idempotency-key", "x" * 256)], "Send one Idempotency-Key"),
    ],
    ids=["missing", "twice", "a space", "too long"],
)
async def test_a_call_without_a_proper_key_is_an_invalid_argument_where_one_is_required(
    keys: list[Pair], detail: str
) -> None:
    things = Things()
    async with serving(things) as channel:
        end = await pay(channel, *keys)
    assert end.code is StatusCode.INVALID_ARGUMENT
    assert end.details.startswith(detail)
    assert end.get(PUSHBACK) is None
    assert things.runs == []


async def test_one_key_with_another_payload_is_refused() -> None:
    things = Things()
    async with serving(things) as channel:
        ends = [await pay(channel, KEY, send=send) for send in (b"one", b"two")]
    assert [end.code for end in ends] == [StatusCode.OK, StatusCode.FAILED_PRECONDITION]
    assert things.runs == ["pay"]


async def test_a_key_on_a_stream_is_refused_and_never_silently_unprotected() -> None:
    runs: list[int] = []

    @idempotent()
    async def upload(requests: AsyncIterator[bytes], _context: Any) -> bytes:
        runs.append(len([request async for request in requests]))
        return b"done"

    path = f"/{SERVICE}/upload"
    async with serving({path: grpc.stream_unary_rpc_method_handler(upload)}) as channel:
        keyed = await told(start(channel, path, "stream_unary", KEY))
        plain = await ask(channel, path, "stream_unary")
    assert (keyed.code, plain.code) == (StatusCode.INVALID_ARGUMENT, StatusCode.OK)
    assert runs == [1]


def test_a_method_that_streams_its_replies_can_not_be_keyed() -> None:
    with pytest.raises(ConfigurationError, match="watch streams its replies"):

        @idempotent()
        async def watch(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
            yield b"never"


async def test_an_operation_whose_client_leaves_is_finished_and_its_retry_is_a_replay() -> None:
    entered, gate, runs = asyncio.Event(), asyncio.Event(), []

    @idempotent()
    async def slow(_request: bytes, _context: Any) -> bytes:
        runs.append(1)
        entered.set()
        await gate.wait()
        return b"done"

    pipeline = Pipeline()
    async with serving({PAY: grpc.unary_unary_rpc_method_handler(slow)}, pipeline=pipeline) as channel:
        left = start(channel, PAY, "unary_unary", KEY)
        await entered.wait()
        left.cancel()
        gate.set()
        assert await pipeline.drained(5)
        retry = await pay(channel, KEY)
    assert (retry.replies, retry.get(REPLAYED), runs) == ([b"done"], "true", [1])


# -- other people's interceptors between the door and the method


class Between(grpc.aio.ServerInterceptor):
    """An interceptor of somebody else's, inside of ours: it puts a handler of its own before the servicer's.

    Args:
        around: makes that handler's function.
    """

    def __init__(self, around: Callable[[Any, bool], Any]) -> None:
        self._around = around

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        kind = next(kind for kind in KINDS if getattr(handler, kind) is not None)
        return MAKERS[kind](self._around(getattr(handler, kind), kind.endswith("stream")))


class Wrapper:
    """Stands for a handler, and shows nothing of it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def once(self, request: Any, context: Any) -> Any:
        return await self._inner(request, context)

    async def many(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in self._inner(request, context):
            yield reply


def opaque(inner: Any, streams: bool) -> Any:
    return Wrapper(inner).many if streams else Wrapper(inner).once


def transparent(inner: Any, streams: bool) -> Any:
    async def once(request: Any, context: Any) -> Any:
        return await inner(request, context)

    async def many(request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in inner(request, context):
            yield reply

    return functools.wraps(inner)(many if streams else once)


def mapping(inner: Any, streams: bool) -> Any:
    """Turn every exception into a status, as interceptors for errors do."""

    async def once(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except Exception:
            await context.abort(StatusCode.UNKNOWN, "Mapped")

    async def many(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for reply in inner(request, context):
                yield reply
        except Exception:
            await context.abort(StatusCode.UNKNOWN, "Mapped")

    return many if streams else once


each_between = pytest.mark.parametrize(
    "around",
    [
        pytest.param(opaque, id="opaque"),
        pytest.param(transparent, id="transparent"),
        pytest.param(mapping, id="mapping"),
    ],
)


@each_between
@pytest.mark.parametrize("kind", KINDS)
async def test_a_limit_holds_behind_somebody_elses_interceptor(kind: str, around: Any) -> None:
    things = Things()
    async with serving(things, Between(around)) as channel:
        first, second = await call(channel, kind), await over(channel, kind)
    assert first.code is StatusCode.OK
    assert (second.code, second.details) == (StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    assert second.get(PUSHBACK) == "20001"
    assert things.runs == [kind]


@each_between
async def test_a_key_never_runs_twice_behind_somebody_elses_interceptor(around: Any) -> None:
    things = Things()
    async with serving(things, Between(around)) as channel:
        first, second, third = [await pay(channel, KEY) for _ in range(3)]
        missing = await pay(channel)
    assert first.replies == [b"\x00\xff1"]
    assert things.runs == ["pay"]
    # Where the key was only known inside of that interceptor, the reply could not be kept.
    assert {second.code, third.code} <= {StatusCode.OK, StatusCode.ALREADY_EXISTS}
    assert all(end.replies == first.replies for end in (second, third) if end.code is StatusCode.OK)
    assert missing.code is StatusCode.INVALID_ARGUMENT


@each_between
async def test_twins_run_once_behind_somebody_elses_interceptor(around: Any) -> None:
    things = Things()
    async with serving(things, Between(around)) as channel:
        ends = await asyncio.gather(*(pay(channel, KEY) for _ in range(20)))
    assert things.runs == ["pay"]
    assert {end.code for end in ends} <= {StatusCode.OK, StatusCode.ABORTED, StatusCode.ALREADY_EXISTS}


@each_between
async def test_a_limit_behind_somebody_elses_interceptor_leaves_the_key_free(around: Any) -> None:
    clock, runs = ManualClock(), []

    @rate_limit(1, 20)
    async def handle(_request: bytes, _context: Any) -> bytes:
        runs.append(1)
        return b"run %d" % len(runs)

    pipeline = Pipeline([IdempotencyPolicy(MemoryStore(clock=clock))])
    handlers: dict[str, Any] = {PAY: grpc.unary_unary_rpc_method_handler(handle)}
    async with serving(handlers, Between(around), pipeline=pipeline) as channel:
        await pay(channel)
        refused = await pay(channel, KEY)
        clock.advance(21)
        again, replay = await pay(channel, KEY), await pay(channel, KEY)
    assert refused.code is StatusCode.RESOURCE_EXHAUSTED
    assert (again.replies, again.get(REPLAYED)) == ([b"run 2"], None)
    assert (replay.replies, replay.get(REPLAYED)) == ([b"run 2"], "true")


# -- decorators beside the policies of the pipeline


async def test_a_core_policy_and_a_decorator_claim_a_key_once() -> None:
    things, store = Things(), MemoryStore()
    async with serving(things, pipeline=Pipeline([IdempotencyPolicy(store)])) as channel:
        first, second = await pay(channel, KEY), await pay(channel, KEY)
        other = await pay(channel, KEY, send=b"two")
        missing = await pay(channel)
    assert (first.code, second.code) == (StatusCode.OK, StatusCode.OK)
    assert (first.replies, second.get(REPLAYED)) == (second.replies, "true")
    assert (other.code, missing.code) == (StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT)
    assert things.runs == ["pay"]
    assert len(store._records) == 1


async def test_a_limit_of_the_pipeline_and_one_of_a_method_both_hold_and_both_are_told() -> None:
    store = MemoryStore(clock=ManualClock())
    pipeline = Pipeline([RateLimitPolicy(store, "3/minute")])
    async with serving(Things(), pipeline=pipeline) as channel:
        first = await call(channel, "unary_unary")
        rest = [await call(channel, kind) for kind in ("unary_unary", "stream_unary", "unary_stream")]
    assert first.get("ratelimit") == f'"3/minute";r=2;t=60, "1/20s /{SERVICE}/unary_unary";r=0;t=20'
    assert [end.code for end in rest] == [
        StatusCode.RESOURCE_EXHAUSTED, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED,
    ]  # fmt: skip


async def test_what_the_edge_refuses_costs_a_decorator_nothing() -> None:
    things, clock = Things(), ManualClock()
    store = MemoryStore(clock=clock)
    edge: list[Policy] = [RequestContextPolicy(), RateLimitPolicy(store, "1/second")]
    async with serving(things, pipeline=Pipeline(edge=edge, store=store)) as channel:
        await pay(channel, KEY)
        refused = await over(channel, "unary_unary")
        clock.advance(2)
        after = await call(channel, "unary_unary")
    assert (refused.code, after.code) == (StatusCode.RESOURCE_EXHAUSTED, StatusCode.OK)


# -- without a door


async def test_a_direct_call_of_a_decorated_method_is_the_method_itself() -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    class Context:
        def set_trailing_metadata(self, _pairs: object) -> None:
            pass

    things = Things()
    for _ in range(3):
        assert await things.unary_unary(b"a", None) == b"a"
        assert [reply async for reply in things.unary_stream(b"a", None)] == [b"a", b"more"]
        assert await things.stream_unary(requests(), None) == b"a b"
        assert [reply async for reply in things.stream_stream(requests(), None)] == [b"a", b"b"]
    assert await things.pay(b"one", Context()) == b"\x00\xff13"


async def test_behind_a_server_without_our_interceptor_a_decorated_method_is_the_method_itself() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(generic(Things().handlers()))
    async with connected(server) as channel:
        ends = [await call(channel, kind) for kind in (*KINDS, *KINDS)]
    assert [end.code for end in ends] == [StatusCode.OK] * 8


# -- one declaration, both doors


class BothDoors:
    """A service whose payment and whose quota are declared alike at an endpoint and at a servicer method."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.pipeline = Pipeline(store=MemoryStore(clock=ManualClock()))
        self.app = FastAPI()

        @self.app.post("/payments")
        @idempotent(operation="pay")
        async def create_payment() -> str:
            self.runs.append("http")
            return "paid"

        @self.app.get("/quota")
        @rate_limit(3, 60, name="shared")
        async def quota() -> str:
            return "let in"

        install(self.app, self.pipeline)

    @idempotent(operation="pay")
    async def pay(self, _request: bytes, _context: Any) -> bytes:
        self.runs.append("grpc")
        return b"paid"

    @rate_limit(3, 60, name="shared")
    async def quota(self, _request: bytes, _context: Any) -> bytes:
        return b"let in"

    def handlers(self) -> dict[str, Any]:
        make = grpc.unary_unary_rpc_method_handler
        return {PAY: make(self.pay), f"/{SERVICE}/quota": make(self.quota)}


async def test_a_payment_over_http_is_never_run_again_over_grpc() -> None:
    both = BothDoors()
    async with serving(both.handlers(), pipeline=both.pipeline) as channel, connect(both.app) as http:
        first = await http.post("/payments", headers=HEADERS)
        second = await pay(channel, KEY, ME)
        third = await http.post("/payments", headers=HEADERS)
    assert (first.status_code, second.code) == (200, StatusCode.ALREADY_EXISTS)
    assert (third.content, third.headers[REPLAYED]) == (first.content, "true")
    assert both.runs == ["http"]


async def test_a_payment_over_grpc_is_never_run_again_over_http() -> None:
    both = BothDoors()
    headers = {**HEADERS, "accept": "application/problem+json"}
    async with serving(both.handlers(), pipeline=both.pipeline) as channel, connect(both.app) as http:
        first = await pay(channel, KEY, ME)
        second = await http.post("/payments", headers=headers)
        third = await pay(channel, KEY, ME)
    assert (first.code, second.status_code) == (StatusCode.OK, 409)
    assert second.json()["code"] == "idempotency_not_replayable"
    assert (third.replies, third.get(REPLAYED)) == ([b"paid"], "true")
    assert both.runs == ["grpc"]


async def test_another_callers_key_of_the_same_text_is_another_payment_at_either_door() -> None:
    both = BothDoors()
    async with serving(both.handlers(), pipeline=both.pipeline) as channel, connect(both.app) as http:
        await http.post("/payments", headers=HEADERS)
        end = await pay(channel, KEY, ("x-api-key", "you"))
    assert (end.code, both.runs) == (StatusCode.OK, ["http", "grpc"])


async def test_a_shared_quota_is_spent_over_both_doors() -> None:
    both = BothDoors()
    path = f"/{SERVICE}/quota"
    async with serving(both.handlers(), pipeline=both.pipeline) as channel, connect(both.app) as http:
        over_http = await http.get("/quota", headers=HEADERS)
        over_grpc = [await ask(channel, path, "unary_unary", ME) for _ in range(3)]
        refused = await http.get("/quota", headers=HEADERS)
        other = await ask(channel, path, "unary_unary", ("x-api-key", "you"))
    assert over_http.headers["ratelimit"] == '"shared";r=2;t=60'
    assert [end.code for end in over_grpc] == [StatusCode.OK, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]
    assert over_grpc[1].get("ratelimit") == '"shared";r=0;t=60'
    assert (refused.status_code, other.code) == (429, StatusCode.OK)
