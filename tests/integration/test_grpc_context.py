"""Who is calling, and under which ids: inside of every handler, and nowhere else."""

import asyncio
import gc
from typing import Any
from weakref import finalize

import grpc
import pytest

from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    get_correlation_id,
    get_request_context,
    get_request_id,
    set_context_user,
)
from tests.integration.grpc_world import (
    GO,
    STYLES,
    Pair,
    Style,
    ask,
    connected,
    make_server,
    ok,
    serving,
)

StatusCode = grpc.StatusCode
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
unary = STYLES["unary_unary"].make
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


async def tells_ids(_context: Any) -> bytes:
    return f"{get_request_id()} {get_correlation_id()}".encode()


@each_style
async def test_the_ids_inside_of_a_handler_are_those_in_the_trailers(style: Style) -> None:
    async with serving(style.make(tells_ids)) as channel:
        end = await ask(channel, GO, style.kind)
    assert end.replies == [f"{end.get('x-request-id')} {end.get('x-correlation-id')}".encode()]


async def test_the_ids_inside_of_a_keyed_handler_are_those_in_the_trailers() -> None:
    async with serving(unary(tells_ids), IdempotencyPolicy(MemoryStore())) as channel:
        end = await ask(channel, GO, "unary_unary", ("idempotency-key", "k"))
    assert end.replies == [f"{end.get('x-request-id')} {end.get('x-correlation-id')}".encode()]


@each_style
async def test_a_hundred_calls_at_once_each_keep_their_own_ids(style: Style) -> None:
    inside: list[str | None] = []
    all_in = asyncio.Event()

    async def act(context: Any) -> bytes:
        inside.append(get_correlation_id())
        if len(inside) == 100:
            all_in.set()
        await all_in.wait()
        return await tells_ids(context)

    async with serving(style.make(act)) as channel:
        ends = await asyncio.gather(
            *(ask(channel, GO, style.kind, ("x-correlation-id", f"chain-{n}")) for n in range(100))
        )
    for n, end in enumerate(ends):
        assert end.get("x-correlation-id") == f"chain-{n}"
        assert end.replies == [f"{end.get('x-request-id')} chain-{n}".encode()]
    assert len({end.get("x-request-id") for end in ends}) == 100


async def test_a_call_leaves_nothing_behind_for_the_next_one() -> None:
    seen: list[tuple[str | None, str | None]] = []

    async def act(_context: Any) -> bytes:
        context = get_request_context()
        seen.append((context.user_id, context.parent_request_id))
        set_context_user("ann")
        return b""

    async with serving(unary(act)) as channel:
        await ask(channel, GO, "unary_unary", ("x-request-id", "parent"))
        await ask(channel)
    assert seen == [(None, "parent"), (None, None)]
    assert not get_request_context()


async def test_a_correlation_id_is_taken_over_and_a_request_id_is_only_remembered() -> None:
    seen: list[Any] = []

    async def act(_context: Any) -> bytes:
        seen.append(get_request_context())
        return b""

    async with serving(unary(act)) as channel:
        end = await ask(channel, GO, "unary_unary", ("x-request-id", "hop-1"), ("x-correlation-id", "chain-1"))
    assert end.get("x-correlation-id") == "chain-1"
    assert end.get("x-request-id") not in (None, "hop-1")
    (context,) = seen
    assert (context.parent_request_id, context.protocol) == ("hop-1", "grpc")


@pytest.mark.parametrize("illegal", ["x" * 129, "two words", "", 'a"b', "a,b"])
async def test_an_illegal_correlation_id_is_replaced_and_never_echoed(illegal: str) -> None:
    async with serving(unary(tells_ids)) as channel:
        end = await ask(channel, GO, "unary_unary", ("x-correlation-id", illegal))
    correlation_id = end.get("x-correlation-id") or ""
    assert len(correlation_id) == 32
    assert correlation_id.isalnum()
    assert end.replies == [f"{end.get('x-request-id')} {correlation_id}".encode()]


async def test_the_longest_correlation_id_is_taken_over() -> None:
    async with serving(unary(ok)) as channel:
        end = await ask(channel, GO, "unary_unary", ("x-correlation-id", "x" * 128))
    assert end.get("x-correlation-id") == "x" * 128


async def test_a_trace_id_becomes_the_correlation_id() -> None:
    async with serving(unary(ok)) as channel:
        end = await ask(channel, GO, "unary_unary", ("traceparent", TRACEPARENT))
    assert end.get("x-correlation-id") == TRACE


async def test_a_correlation_id_goes_before_a_trace_id() -> None:
    async with serving(unary(ok)) as channel:
        end = await ask(channel, GO, "unary_unary", ("traceparent", TRACEPARENT), ("x-correlation-id", "chain-1"))
    assert end.get("x-correlation-id") == "chain-1"


@pytest.mark.parametrize("illegal", ["nonsense", f"ff{TRACEPARENT[2:]}", TRACEPARENT.replace(TRACE, "0" * 32)])
async def test_an_illegal_trace_is_not_taken_over(illegal: str) -> None:
    async with serving(unary(ok)) as channel:
        end = await ask(channel, GO, "unary_unary", ("traceparent", illegal))
    assert end.get("x-correlation-id") not in (None, TRACE, "0" * 32)


@each_style
async def test_a_handler_knows_its_clients_deadline_metadata_and_address(style: Style) -> None:
    seen: list[Any] = []

    async def act(context: Any) -> bytes:
        seen.append(context.time_remaining())
        seen.append(dict(context.invocation_metadata())["x-sent"])
        seen.append(context.peer().startswith("ipv4:127.0.0.1:"))
        seen.append((context.peer_identities(), context.peer_identity_key()))
        return b"done"

    async with serving(style.make(act)) as channel:
        await ask(channel, GO, style.kind, ("x-sent", "one"), deadline=5)
        await ask(channel, GO, style.kind, ("x-sent", "two"))
    remaining = seen.pop(0)
    assert 4 < remaining < 6  # a client rounds it up
    assert seen == ["one", True, (None, None), None, "two", True, (None, None)]


class Authenticates(grpc.aio.ServerInterceptor):
    """Names the caller that ``x-user`` tells."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        user = dict(handler_call_details.invocation_metadata).get("x-user")
        if user is not None:
            set_context_user(str(user))
        return await continuation(handler_call_details)


class AuthenticatesAround(grpc.aio.ServerInterceptor):
    """The same, around the handler."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler: Any = await continuation(handler_call_details)

        async def around(request: Any, context: Any) -> Any:
            user = dict(context.invocation_metadata()).get("x-user")
            if user is not None:
                set_context_user(user)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(around, handler.request_deserializer, handler.response_serializer)


@pytest.mark.parametrize("interceptor", [Authenticates(), AuthenticatesAround()], ids=lambda one: type(one).__name__)
async def test_a_user_that_an_interceptor_before_ours_named_is_who_a_limit_counts_for(
    interceptor: grpc.aio.ServerInterceptor,
) -> None:
    users: list[str | None] = []

    async def act(_context: Any) -> bytes:
        users.append(get_request_context().user_id)
        return b""

    pipeline = Pipeline([RateLimitPolicy(MemoryStore(), "1/hour")])
    ann, bob = ("x-user", "ann"), ("x-user", "bob")
    async with connected(make_server(pipeline, {GO: unary(act)}, interceptor)) as channel:
        calls: list[tuple[Pair, ...]] = [(ann,), (bob,), (ann,), (bob,), (), ()]
        codes = [(await ask(channel, GO, "unary_unary", *metadata)).code for metadata in calls]
    passed, refused = StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED
    assert codes == [passed, passed, refused, refused, passed, refused]
    assert users == ["ann", "bob", None]


async def test_callers_are_told_apart_by_their_api_keys() -> None:
    async with serving(unary(ok), RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        codes = [
            (await ask(channel, GO, "unary_unary", ("x-api-key", who))).code for who in ("ann", "bob", "ann", "bob")
        ]
    assert codes == [StatusCode.OK] * 2 + [StatusCode.RESOURCE_EXHAUSTED] * 2


@each_style
async def test_a_call_is_freed_when_it_ends_and_waits_for_no_collection(style: Style) -> None:
    gone = asyncio.Event()

    async def act(context: Any) -> bytes:
        finalize(context, gone.set)
        return b"done"

    gc.disable()
    try:
        async with serving(style.make(act), RateLimitPolicy(MemoryStore(), "100/minute")) as channel:
            assert (await ask(channel, GO, style.kind)).code is StatusCode.OK
            await gone.wait()
    finally:
        gc.enable()
