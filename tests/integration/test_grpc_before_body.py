"""Refusals before the message of a unary request has come: ``ResilienceInterceptor(pipeline, before_body=True)``."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc import StatusCode
from grpc_interceptor.server import AsyncServerInterceptor

from grpc_interceptors import ResilienceInterceptor
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    RequestContextPolicy,
    Rule,
    idempotent,
    rate_limit,
)
from tests.integration.grpc_world import (
    GO,
    STYLES,
    SYNC_STYLES,
    Counts,
    Witness,
    aborts,
    ask,
    complaints,
    connected,
    crashes,
    generic,
    ok,
    sets_code,
)
from tests.integration.h2_client import RawClient, message, raw

UNARY = {name: style for name, style in STYLES.items() if style.kind.startswith("unary_")}
SYNC_UNARY = {name: style for name, style in SYNC_STYLES.items() if style.kind.startswith("unary_")}
KEY = ("idempotency-key", "k")


def early(handler: Any, pipeline: Pipeline, *before: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=[*before, ResilienceInterceptor(pipeline, before_body=True)])
    server.add_generic_rpc_handlers(generic({GO: handler}))
    return server


@asynccontextmanager
async def serving(handler: Any, *policies: Policy) -> AsyncIterator[grpc.aio.Channel]:
    async with connected(early(handler, Pipeline(policies))) as channel:
        yield channel


@asynccontextmanager
async def frames(server: grpc.aio.Server) -> AsyncIterator[RawClient]:
    async with asyncio.timeout(10):
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with raw(port) as client:
                yield client
        finally:
            await server.stop(None)


@pytest.mark.parametrize(
    "style", [*UNARY.values(), *SYNC_UNARY.values()], ids=[*UNARY, *(f"sync_{n}" for n in SYNC_UNARY)]
)
@pytest.mark.parametrize("stage", ["core", "edge"])
async def test_a_client_over_its_limit_is_refused_although_its_message_never_comes(style: Any, stage: str) -> None:
    policy = RateLimitPolicy(MemoryStore(), "1/hour")
    edge: list[Policy] = [RequestContextPolicy(), policy]
    pipeline = Pipeline(edge=edge) if stage == "edge" else Pipeline([policy])
    async with frames(early(style.make(None), pipeline)) as client:
        refused, waits = await refused_first(client.open(GO), client.open(GO))
        assert not waits.over.is_set()
    assert refused.status == StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert refused.headers["grpc-retry-pushback-ms"] == "-1"
    assert refused.headers["x-request-id"].startswith("req_")
    assert "grpc-status-details-bin" in refused.headers


async def refused_first(*streams: Any) -> list[Any]:
    """Return two streams, of which the first is over: a server may take up the later one first."""
    ends = {asyncio.create_task(stream.over.wait()): stream for stream in streams}
    over, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in waiting:
        end.cancel()
    return [ends[end] for end in (*over, *waiting)]


async def test_a_limit_declared_at_the_handler_refuses_before_the_message_comes() -> None:
    @rate_limit("1/hour")
    async def handle(_request: bytes, _context: Any) -> bytes:
        return b"done"

    async with frames(early(grpc.unary_unary_rpc_method_handler(handle), Pipeline())) as client:
        refused, _ = await refused_first(client.open(GO), client.open(GO))
    assert refused.status == StatusCode.RESOURCE_EXHAUSTED.value[0]


async def test_a_bad_key_is_refused_before_the_message_comes() -> None:
    async with frames(early(STYLES["unary_unary"].make(ok), Pipeline([IdempotencyPolicy(MemoryStore())]))) as client:
        streams = [
            client.open(GO, ("idempotency-key", "two words")),
            client.open(GO, KEY, ("idempotency-key", "another")),
        ]
        for stream in streams:
            await stream.over.wait()
    assert [stream.status for stream in streams] == [StatusCode.INVALID_ARGUMENT.value[0]] * 2


async def test_a_call_that_was_let_in_goes_on_when_its_message_comes() -> None:
    act, witness = Counts(), Witness()
    async with frames(early(STYLES["unary_unary"].make(act), Pipeline([witness]))) as client:
        slow = client.open(GO)
        quick = await client.call(GO)
        assert (quick.status, len(witness.calls)) == (0, 2)
        body = message(b"one")
        client.send(slow, body[:3])
        client.send(slow, body[3:], end=True)
        await slow.over.wait()
    assert (slow.status, slow.data, act.runs) == (0, message(b"run 2"), 2)


@pytest.mark.parametrize("style", UNARY.values(), ids=UNARY)
@pytest.mark.parametrize("act", [ok, aborts, crashes, sets_code], ids=lambda act: act.__name__)
async def test_each_end_is_told_as_without_the_option(style: Any, act: Any) -> None:
    ends = []
    for before_body in (False, True):
        server = grpc.aio.server(interceptors=[ResilienceInterceptor(Pipeline(), before_body=before_body)])
        server.add_generic_rpc_handlers(generic({GO: style.make(act)}))
        async with connected(server) as channel:
            end = await ask(channel, GO, style.kind)
        ends.append((end.code, end.details, end.replies, {name for name, _ in end.trailers}))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("style", UNARY.values(), ids=UNARY)
async def test_a_client_that_ends_without_a_message_is_told_how_many_it_owes(
    style: Any, caplog: pytest.LogCaptureFixture
) -> None:
    witness = Witness()
    async with frames(early(style.make(ok), Pipeline([witness]))) as client:
        stream = client.open(GO, end=True)
        await stream.over.wait()
    assert (stream.status, stream.headers["grpc-message"]) == (12, "This method takes exactly one message")
    assert (await witness.outcomes.get()).ended == "failed"
    (record,) = complaints(caplog)
    assert record.__dict__["request_id"] == stream.headers["x-request-id"]


async def test_bytes_that_are_no_message_are_internal_and_counted() -> None:
    async def handle(_request: StringValue, _context: Any) -> bytes:
        raise AssertionError("nothing was decoded")

    handler: Any = grpc.unary_unary_rpc_method_handler(handle, StringValue.FromString)
    async with serving(handler, RateLimitPolicy(MemoryStore(), "2/hour")) as channel:
        ends = [await ask(channel, send=[b"\xff"]) for _ in range(3)]
    assert [(end.code, end.details) for end in ends] == [
        *[(StatusCode.INTERNAL, "The request can't be decoded")] * 2,
        (StatusCode.RESOURCE_EXHAUSTED, "Too many requests"),
    ]


@pytest.mark.parametrize("where", ["policy", "decorator"])
async def test_a_key_needs_the_message_and_its_retry_is_a_replay(where: str) -> None:
    act = Counts()
    handler: Any = STYLES["unary_unary"].make(act)
    policies: list[Policy] = [IdempotencyPolicy(MemoryStore())]
    if where == "decorator":
        policies = []
        handler = grpc.unary_unary_rpc_method_handler(idempotent()(handler.unary_unary))
    async with serving(handler, *policies) as channel:
        first, again = [await ask(channel, GO, "unary_unary", KEY) for _ in range(2)]
        other = await ask(channel, GO, "unary_unary", KEY, send=[b"two"])
    assert (first.replies, again.replies, act.runs) == ([b"run 1"], [b"run 1"], 1)
    assert again.get("x-idempotent-replayed") == "true"
    assert other.code is StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("key", [(), (KEY,)], ids=["plain", "keyed"])
async def test_a_client_that_leaves_before_its_message_frees_its_permit(
    key: Any, caplog: pytest.LogCaptureFixture
) -> None:
    act = Counts()
    rule = Rule(Quota(1, per=60, algorithm="concurrency"))
    witness = Witness()
    pipeline = Pipeline([witness, RateLimitPolicy(MemoryStore(), rule), IdempotencyPolicy(MemoryStore())])
    async with frames(early(STYLES["unary_unary"].make(act), pipeline)) as client:
        for _ in range(20):
            stream = client.open(GO, *key)
            busy = await client.call(GO, *key)
            assert busy.status == StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert (await witness.outcomes.get()).ended == "refused"
            client.cancel(stream)
            assert (await witness.outcomes.get()).ended == "cancelled"
        last = await client.call(GO, *key)
    assert (last.status, act.runs) == (0, 1)
    assert complaints(caplog) == []


@pytest.mark.parametrize("size", [1, 3_000_000])
async def test_a_python_client_hears_why_it_was_refused_however_much_it_sends(size: int) -> None:
    async with serving(STYLES["unary_unary"].make(ok), RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        await ask(channel)
        ends = [await ask(channel, send=[b"x" * size]) for _ in range(10)]
    assert {(end.code, end.details) for end in ends} == {(StatusCode.RESOURCE_EXHAUSTED, "Too many requests")}
    assert all(end.get("x-request-id") for end in ends)


async def test_an_interceptor_of_another_make_may_stand_before_ours() -> None:
    seen: list[bool] = []

    class Looks(AsyncServerInterceptor):
        async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:  # noqa: ARG002
            seen.append(hasattr(request_or_iterator, "__aiter__"))
            return await method(request_or_iterator, context)

    async with connected(early(STYLES["unary_unary"].make(ok), Pipeline(), Looks())) as channel:
        end = await ask(channel)
    assert (end.code, end.replies, seen) == (StatusCode.OK, [b"done"], [True])


async def test_methods_that_take_a_stream_are_served_as_ever() -> None:
    for style in STYLES.values():
        async with serving(style.make(ok)) as channel:
            end = await ask(channel, GO, style.kind)
        assert (end.code, end.replies) == (StatusCode.OK, [b"done"])
