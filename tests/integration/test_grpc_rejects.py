"""A refusal is an abort: the handler never runs, nothing is committed, and the client knows when to come back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Quota, RateLimitPolicy, RequestContextPolicy, Rule
from resilience.testing import ManualClock
from tests.integration.grpc_world import (
    GO,
    KINDS,
    STYLES,
    Counts,
    Style,
    Told,
    ask,
    connected,
    make_server,
    retries,
    serving,
    start,
    told,
)

StatusCode = grpc.StatusCode
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
PUSHBACK = "grpc-retry-pushback-ms"


async def refused(channel: grpc.aio.Channel, kind: str) -> Told:
    # A refusal needs no request; one that is on its way while the refusal arrives may hide it from this client.
    return await told(start(channel, GO, kind))


@each_style
async def test_a_call_over_its_limit_is_refused_before_its_handler(style: Style) -> None:
    act = Counts()
    policy = RateLimitPolicy(MemoryStore(clock=ManualClock()), "1/second")
    async with serving(style.make(act), policy) as channel:
        assert (await ask(channel, GO, style.kind)).code is StatusCode.OK
        end = await refused(channel, style.kind)
    assert (end.code, end.details) == (StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    assert act.runs == 1


@each_style
async def test_a_refusal_carries_the_ids_the_limit_and_when_to_retry_and_sends_nothing_first(style: Style) -> None:
    clock = ManualClock()
    policy = RateLimitPolicy(MemoryStore(clock=clock), "1/second")
    async with serving(style.make(Counts()), policy) as channel:
        await ask(channel, GO, style.kind)
        clock.advance(0.5005)
        end = await refused(channel, style.kind)
    assert end.initial == []
    assert end.get("x-request-id")
    assert end.get("x-correlation-id")
    assert (end.get("x-ratelimit-limit"), end.get("x-ratelimit-remaining")) == ("1", "0")
    assert end.get("ratelimit") == '"1/second";r=0;t=1'
    assert end.get("ratelimit-policy") == '"1/second";q=1;w=1'
    assert (end.get("retry-after"), end.get(PUSHBACK)) == ("1", "500")


async def pushback_after(quota: Quota, seconds: float) -> tuple[str | None, str | None]:
    clock = ManualClock()
    policy = RateLimitPolicy(MemoryStore(clock=clock), Rule(quota))
    async with serving(STYLES["unary_unary"].make(Counts()), policy) as channel:
        await ask(channel)
        clock.advance(seconds)
        end = await ask(channel)
    assert end.code is StatusCode.RESOURCE_EXHAUSTED
    return end.get(PUSHBACK), end.get("retry-after")


async def test_the_shortest_wait_is_one_millisecond_and_never_zero() -> None:
    assert await pushback_after(Quota(1, per=1), 0.99999) == ("1", "1")


async def test_a_pushback_counts_in_milliseconds_rounded_up() -> None:
    assert await pushback_after(Quota(1, per=1), 0.6995) == ("301", "1")


async def test_a_wait_of_up_to_thirty_seconds_is_told() -> None:
    assert await pushback_after(Quota(1, per=60), 30.0005) == ("30000", "30")


async def test_a_wait_over_thirty_seconds_says_never_inside_of_this_call() -> None:
    assert await pushback_after(Quota(1, per=60), 29) == ("-1", "31")


async def test_a_limit_at_the_edge_refuses_alike() -> None:
    act = Counts()
    pipeline = Pipeline(edge=[RequestContextPolicy(), RateLimitPolicy(MemoryStore(), "1/hour")])
    async with serving(STYLES["unary_unary"].make(act), pipeline=pipeline) as channel:
        first, second = [await ask(channel) for _ in range(2)]
    assert (first.code, first.get("x-ratelimit-remaining")) == (StatusCode.OK, "0")
    assert (second.code, second.get(PUSHBACK), act.runs) == (StatusCode.RESOURCE_EXHAUSTED, "-1", 1)
    assert second.get("x-request-id")


async def test_a_payload_over_its_bound_is_refused_for_good() -> None:
    act = Counts()
    policy = IdempotencyPolicy(MemoryStore(), max_payload=10)
    async with serving(STYLES["unary_unary"].make(act), policy) as channel:
        over = await ask(channel, GO, "unary_unary", ("idempotency-key", "k1"), send=[b"x" * 11])
        within = await ask(channel, GO, "unary_unary", ("idempotency-key", "k2"), send=[b"x" * 10])
    assert (over.code, over.get(PUSHBACK), over.get("retry-after")) == (StatusCode.RESOURCE_EXHAUSTED, "-1", None)
    assert (within.code, act.runs) == (StatusCode.OK, 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_retries_waits_as_told_and_gets_in_on_its_second_attempt(kind: str) -> None:
    # Real time: who waits is the client's own core. Its backoff is 5 s, so who comes sooner was told to.
    act = Counts()
    style = next(style for style in STYLES.values() if style.kind == kind)
    pipeline = Pipeline([RateLimitPolicy(MemoryStore(), Rule(Quota(1, per=0.3)))])
    async with connected(make_server(pipeline, {GO: style.make(act)}), retries("RESOURCE_EXHAUSTED")) as channel:
        await ask(channel, GO, kind)
        loop = asyncio.get_running_loop()
        began = loop.time()
        end = await ask(channel, GO, kind)
        took = loop.time() - began
    assert (end.code, end.replies, act.runs) == (StatusCode.OK, [b"run 2"], 2)
    assert 0.15 < took < 2


async def test_a_client_that_is_told_never_does_not_retry() -> None:
    act = Counts()
    seen: list[str | None] = []

    class Attempts(RateLimitPolicy):
        async def admit(self, call: Any, admission: Any) -> Any:
            seen.append(call.metadata.get("grpc-previous-rpc-attempts"))
            return await super().admit(call, admission)

    pipeline = Pipeline([Attempts(MemoryStore(), "1/hour")])
    server = make_server(pipeline, {GO: STYLES["unary_unary"].make(act)})
    async with connected(server, retries("RESOURCE_EXHAUSTED")) as channel:
        await ask(channel)
        end = await ask(channel, deadline=5)
    assert (end.code, act.runs, seen) == (StatusCode.RESOURCE_EXHAUSTED, 1, [None, None])


async def test_a_client_that_never_ends_its_stream_is_refused_all_the_same() -> None:
    act = Counts()
    async with serving(STYLES["stream_unary_iterator"].make(act), RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        await ask(channel, GO, "stream_unary")
        stub: Any = channel.stream_unary(GO)

        async def requests() -> AsyncIterator[bytes]:
            while True:
                yield b"x"
                await asyncio.sleep(0)

        # This client may call it INTERNAL, since it still writes; but it is over.
        assert await stub(requests()).code() in (StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL)
    assert act.runs == 1


async def test_a_bidi_client_that_still_writes_hears_why_it_was_refused() -> None:
    policy = RateLimitPolicy(MemoryStore(), "1/hour")
    messages = [b"x"] * 50
    async with serving(STYLES["stream_stream_generator"].make(Counts()), policy) as channel:
        await ask(channel, GO, "stream_stream")
        stub: Any = channel.stream_stream(GO)

        async def requests() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        ends = [await told(stub(requests())) for _ in range(20)]
    assert {end.code for end in ends} == {StatusCode.RESOURCE_EXHAUSTED}
    assert all(end.get("x-request-id") for end in ends)
