"""Which keys are taken, what is one operation, and what its twins are told."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct, Value

from resilience import IdempotencyPolicy, MemoryStore, Pipeline
from resilience.testing import FaultyStore
from tests.integration.grpc_world import (
    GO,
    STYLES,
    Counts,
    Pair,
    Waits,
    Witness,
    ask,
    connected,
    make_server,
    retries,
    serving,
    start,
    told,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
REPLAYED = "x-idempotent-replayed"
PUSHBACK = "grpc-retry-pushback-ms"
unary = STYLES["unary_unary"].make


def policy(**options: Any) -> IdempotencyPolicy:
    return IdempotencyPolicy(MemoryStore(), **options)


async def test_equal_messages_are_one_request_whatever_order_a_map_was_sent_in() -> None:
    act = Counts()

    async def handle(_request: Struct, context: Any) -> bytes:
        return await act(context)

    entries = [Struct(fields={f"name-{n}": Value(bool_value=True)}).SerializeToString() for n in range(100)]
    one, other = b"".join(entries), b"".join(reversed(entries))
    assert one != other
    assert Struct.FromString(one) == Struct.FromString(other)
    handler: Any = grpc.unary_unary_rpc_method_handler(handle, Struct.FromString)
    async with serving(handler, policy()) as channel:
        first = await ask(channel, GO, "unary_unary", KEY, send=[one])
        second = await ask(channel, GO, "unary_unary", KEY, send=[other])
    assert (first.replies, second.replies, second.get(REPLAYED)) == ([b"run 1"], [b"run 1"], "true")


async def test_another_payload_under_one_key_is_refused_and_never_runs() -> None:
    act = Counts()
    async with serving(unary(act), policy()) as channel:
        await ask(channel, GO, "unary_unary", KEY, send=[b"one"])
        end = await ask(channel, GO, "unary_unary", KEY, send=[b"other"])
    assert (end.code, end.get(PUSHBACK), act.runs) == (StatusCode.FAILED_PRECONDITION, None, 1)
    assert end.details == "This Idempotency-Key was used with another request"
    assert end.get("x-request-id")


async def test_a_twin_in_flight_is_aborted_with_a_pushback_and_later_gets_the_reply() -> None:
    act = Waits()
    async with serving(unary(act), policy(in_progress="reject")) as channel:
        first = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        twin = await ask(channel, GO, "unary_unary", KEY)
        act.gate.set()
        assert await first == b"done"
        later = await ask(channel, GO, "unary_unary", KEY)
    assert twin.code is StatusCode.ABORTED
    assert 1 <= int(twin.get(PUSHBACK) or 0) <= 5000
    assert (later.replies, later.get(REPLAYED), act.runs) == ([b"done"], "true", 1)


async def test_a_twin_that_retries_as_told_gets_the_reply() -> None:
    act, witness = Waits(), Witness()
    pipeline = Pipeline([witness, policy(lease=1, in_progress="reject")])
    async with connected(make_server(pipeline, {GO: unary(act)}), retries("ABORTED")) as channel:
        first = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        twin = asyncio.create_task(ask(channel, GO, "unary_unary", KEY))
        assert (await witness.outcomes.get()).ended == "refused"
        act.gate.set()
        assert await first == b"done"
        end = await twin
    assert (end.code, end.replies, end.get(REPLAYED), act.runs) == (StatusCode.OK, [b"done"], "true", 1)


@pytest.mark.parametrize(
    "values",
    [[""], ["two words"], ['a"b'], ["back\\slash"], ["x" * 300], ["a", "a"], ["a", "b"]],
    ids=["empty", "space", "quote", "backslash", "long", "twice", "two"],
)
async def test_a_malformed_key_is_refused_and_nothing_runs(values: list[str]) -> None:
    act = Counts()
    async with serving(unary(act), policy()) as channel:
        end = await ask(channel, GO, "unary_unary", *(("idempotency-key", value) for value in values))
    assert (end.code, act.runs) == (StatusCode.INVALID_ARGUMENT, 0)
    assert end.details.startswith("Send one Idempotency-Key of 1 to 255 visible ASCII characters")
    assert end.get("x-request-id")


async def test_the_longest_key_is_taken() -> None:
    act = Counts()
    async with serving(unary(act), policy()) as channel:
        ends = [await ask(channel, GO, "unary_unary", ("idempotency-key", "x" * 255)) for _ in range(2)]
    assert ([end.code for end in ends], act.runs) == ([StatusCode.OK] * 2, 1)


@pytest.mark.parametrize("style", [style for style in STYLES.values() if style.kind != "unary_unary"])
async def test_a_key_on_a_streaming_method_is_refused(style: Any) -> None:
    act = Counts()
    async with serving(style.make(act), policy()) as channel:
        end = await told(start(channel, GO, style.kind, KEY))
    assert (end.code, act.runs) == (StatusCode.INVALID_ARGUMENT, 0)
    assert end.details == "This operation streams and can't take an Idempotency-Key"


async def test_calls_without_a_key_run_each_time() -> None:
    act = Counts()
    async with serving(unary(act), policy()) as channel:
        ends = [await ask(channel) for _ in range(2)]
    assert [end.replies for end in ends] == [[b"run 1"], [b"run 2"]]


async def test_a_required_key_that_is_missing_is_refused() -> None:
    act = Counts()
    async with serving(unary(act), policy(required=True)) as channel:
        end = await ask(channel)
    assert (end.code, act.runs) == (StatusCode.INVALID_ARGUMENT, 0)


@pytest.mark.parametrize(
    ("method", "style"), [("GetPayment", "unary_unary"), ("WatchPayment", "unary_stream_generator")]
)
async def test_a_method_without_side_effects_runs_each_time_key_or_not(method: str, style: str) -> None:
    act, path = Counts(), f"/examples.payments.v1.PaymentService/{method}"
    async with serving({path: STYLES[style].make(act)}, policy(required=True)) as channel:
        keyed = [await ask(channel, path, STYLES[style].kind, KEY) for _ in range(2)]
        plain = await ask(channel, path, STYLES[style].kind)
    assert [end.replies for end in (*keyed, plain)] == [[b"run 1"], [b"run 2"], [b"run 3"]]
    assert [end.get(REPLAYED) for end in keyed] == [None, None]


async def test_one_key_of_two_callers_is_two_operations() -> None:
    act = Counts()
    async with serving(unary(act), policy()) as channel:
        ends = [await ask(channel, GO, "unary_unary", KEY, ("x-api-key", who)) for who in ("ann", "bob", "ann", "bob")]
    assert [end.replies for end in ends] == [[b"run 1"], [b"run 2"], [b"run 1"], [b"run 2"]]


async def test_one_key_on_two_methods_is_two_operations() -> None:
    act = Counts()
    async with serving({GO: unary(act), "/test.Things/Other": unary(act)}, policy()) as channel:
        ends = [await ask(channel, path, "unary_unary", KEY) for path in (GO, "/test.Things/Other")]
    assert [end.replies for end in ends] == [[b"run 1"], [b"run 2"]]


async def test_fifty_twins_at_once_run_once_and_each_gets_the_reply_or_is_told_when_to_come_back() -> None:
    act = Waits()

    async def release() -> None:
        await act.entered.wait()
        act.gate.set()

    async with serving(unary(act), policy(in_progress="reject")) as channel:
        releasing = asyncio.create_task(release())
        ends = await asyncio.gather(*(ask(channel, GO, "unary_unary", KEY) for _ in range(50)))
        await releasing
    assert act.runs == 1
    answered = [end for end in ends if end.code is StatusCode.OK]
    waiting = [end for end in ends if end.code is StatusCode.ABORTED]
    assert len(answered) + len(waiting) == 50
    assert [end.replies for end in answered] == [[b"done"]] * len(answered)
    assert answered
    assert all(int(end.get(PUSHBACK) or 0) >= 1 for end in waiting)


async def test_a_store_that_is_gone_refuses_keyed_calls_and_lets_others_run() -> None:
    store = FaultyStore(MemoryStore())
    store.down = True
    act = Counts()
    async with serving(unary(act), IdempotencyPolicy(store)) as channel:
        keyed, plain = await ask(channel, GO, "unary_unary", KEY), await ask(channel)
    assert (keyed.code, keyed.get(PUSHBACK)) == (StatusCode.UNAVAILABLE, "1000")
    assert (plain.code, act.runs) == (StatusCode.OK, 1)


async def test_a_store_that_goes_while_the_handler_runs_does_not_spoil_its_reply() -> None:
    store, act = FaultyStore(MemoryStore()), Waits()
    async with serving(unary(act), IdempotencyPolicy(store)) as channel:
        call = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        store.down = True
        act.gate.set()
        assert await call == b"done"
