"""What a call to another service carries, and how gRPC's own retries come back when the server has said."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import grpc
import pytest

from grpc_interceptors import client_interceptors, retry_service_config
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Quota,
    RateLimitPolicy,
    RequestContext,
    Rule,
    get_request_context,
)
from resilience.context import RestoredContext
from tests.integration.grpc_world import GO, KINDS, SERVICE, STYLES, Counts, ask, connected, make_server, serving

StatusCode = grpc.StatusCode
each_kind = pytest.mark.parametrize("kind", KINDS)
BY_KIND = {style.kind: style for style in STYLES.values()}


class Metadata:
    """A handler that remembers what each call brought."""

    def __init__(self, refuse: int = 0) -> None:
        self.seen: list[dict[str, Any]] = []
        self.left: list[float | None] = []
        self._refuse = refuse

    async def __call__(self, context: Any) -> bytes:
        self.seen.append(dict(context.invocation_metadata()))
        self.left.append(context.time_remaining())
        if len(self.seen) <= self._refuse:
            await context.abort(StatusCode.UNAVAILABLE, "Not now", (("grpc-retry-pushback-ms", "1"),))
        return b"done"


@asynccontextmanager
async def calling(act: Any, kind: str, *options: tuple[str, Any], **arguments: Any) -> AsyncIterator[grpc.aio.Channel]:
    """Serve ``act`` behind nothing, and call it with our interceptors."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Go": BY_KIND[kind].make(act)})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    interceptors = client_interceptors(**arguments)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options, interceptors=interceptors) as channel:
        yield channel
    await server.stop(None)


@each_kind
async def test_a_call_of_any_kind_carries_the_running_calls_ids(kind: str) -> None:
    act = Metadata()
    context = RequestContext("req_here", "chain", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    async with calling(act, kind) as channel:
        with RestoredContext(context):
            assert (await ask(channel, GO, kind)).code is StatusCode.OK
        await ask(channel, GO, kind)
    assert act.seen[0].items() >= {
        "x-request-id": "req_here", "x-correlation-id": "chain", "traceparent": context.traceparent,
    }.items()  # fmt: skip
    assert "x-correlation-id" not in act.seen[1]


async def test_what_the_application_sets_itself_wins() -> None:
    act = Metadata()
    async with calling(act, "unary_unary", keyed=[GO]) as channel:
        with RestoredContext(RequestContext("req_here", "chain")):
            await ask(channel, GO, "unary_unary", ("x-correlation-id", "own"), ("idempotency-key", "mine"))
    assert (act.seen[0]["x-correlation-id"], act.seen[0]["idempotency-key"]) == ("own", "mine")


@each_kind
async def test_a_call_waits_no_longer_than_the_caller_of_its_caller(kind: str) -> None:
    act = Metadata()
    context = RequestContext("req_here", "chain")
    context.set_deadline(monotonic() + 5.0, monotonic)
    async with calling(act, kind, margin=1.0) as channel:
        with RestoredContext(context):
            await ask(channel, GO, kind, deadline=60.0)
            await ask(channel, GO, kind, deadline=2.0)
    first, second = act.left
    assert first is not None
    assert second is not None
    assert first < 4.5  # on the wire a timeout is rounded up
    assert second < 2.5


async def every_reply(stub: Any, kind: str) -> None:
    call = stub(iter([b"one"]) if kind.startswith("stream_") else b"one")
    if kind.endswith("_stream"):
        async for _ in call:
            pass
    else:
        await call


@each_kind
async def test_a_call_with_no_time_left_fails_before_it_leaves(kind: str) -> None:
    act = Metadata()
    context = RequestContext("req_here", "chain")
    context.set_deadline(monotonic() - 1.0, monotonic)
    async with calling(act, kind) as channel:
        with RestoredContext(context), pytest.raises(grpc.aio.AioRpcError) as failed:
            await every_reply(getattr(channel, kind)(GO), kind)
    assert failed.value.code() is StatusCode.DEADLINE_EXCEEDED
    assert act.seen == []


async def test_a_handlers_context_knows_its_callers_deadline() -> None:
    left: list[float | None] = []

    async def act(_context: Any) -> bytes:
        left.append(get_request_context().remaining())
        return b"done"

    async with serving(BY_KIND["unary_unary"].make(act)) as channel:
        await ask(channel, GO, deadline=3.0)
        await ask(channel, GO)
    assert left[0] is not None
    assert 0 < left[0] < 3.5
    assert left[1] is None


async def test_all_of_grpcs_retries_of_a_call_carry_one_key_and_another_call_has_another() -> None:
    act = Metadata(refuse=2)
    options = retry_service_config([GO], codes=[StatusCode.UNAVAILABLE])
    async with calling(act, "unary_unary", *options, keyed=[GO]) as channel:
        assert (await ask(channel)).code is StatusCode.OK
        assert (await ask(channel)).code is StatusCode.OK
    keys = [seen["idempotency-key"] for seen in act.seen]
    assert len(keys) == 4
    assert keys[0] == keys[1] == keys[2] != keys[3]


@each_kind
async def test_a_client_over_its_limit_has_its_answer_on_the_second_attempt_with_one_execution(kind: str) -> None:
    act = Counts()
    pipeline = Pipeline([RateLimitPolicy(MemoryStore(), Rule(Quota(1, per=0.3)))])
    server = make_server(pipeline, {GO: BY_KIND[kind].make(act)})
    async with connected(server, *retry_service_config([f"/{SERVICE}"], initial_backoff=5, max_backoff=5)) as channel:
        assert (await ask(channel, GO, kind)).code is StatusCode.OK
        began = monotonic()
        assert (await ask(channel, GO, kind)).code is StatusCode.OK
        waited = monotonic() - began
    assert act.runs == 2
    assert waited < 3  # not the backoff of five seconds: the server's own word


async def test_a_retry_of_a_keyed_call_is_answered_by_its_first_run() -> None:
    act = Counts()
    pipeline = Pipeline([IdempotencyPolicy(MemoryStore())])
    server = make_server(pipeline, {GO: BY_KIND["unary_unary"].make(act)})
    async with connected(server) as channel:
        first = await ask(channel, GO, "unary_unary", ("idempotency-key", "k"))
        again = await ask(channel, GO, "unary_unary", ("idempotency-key", "k"))
    assert first.replies == again.replies
    assert again.get("x-idempotent-replayed") == "true"
    assert act.runs == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 1}, {"max_attempts": 6}, {"initial_backoff": 0.0}, {"initial_backoff": 3.0},
        {"codes": []}, {"codes": [StatusCode.OK]},
    ],
)  # fmt: skip
def test_a_retry_that_gRPC_would_not_make_is_refused(wrong: dict[str, Any]) -> None:  # noqa: N802 - its name
    with pytest.raises(ConfigurationError):
        retry_service_config([GO], **wrong)


@pytest.mark.parametrize("name", ["", "pkg.Service/Method", "/", "/a/b/c"])
def test_a_name_that_is_no_methods_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"/pkg\.Service/Method"):
        retry_service_config([name])
