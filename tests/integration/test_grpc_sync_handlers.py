"""A handler that is a plain function is guarded like an async one: it runs in a thread, and its RPC stays ours."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import pytest

from grpc_interceptors import ResilienceInterceptor
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    get_correlation_id,
    get_request_id,
)
from resilience.decorators import idempotent, rate_limit
from resilience.testing import ManualClock
from tests.integration.grpc_world import (
    GO,
    KINDS,
    SECRET,
    SERVICE,
    STYLES,
    SYNC_STYLES,
    Pair,
    SyncAct,
    SyncStyle,
    Told,
    Witness,
    ask,
    complaints,
    connected,
    generic,
    serving,
    start,
    told,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
REPLAYED = "x-idempotent-replayed"
each_style = pytest.mark.parametrize("style", SYNC_STYLES.values(), ids=SYNC_STYLES)


def ok(_context: Any) -> bytes:
    return b"done"


def aborts(context: Any) -> bytes:
    context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")
    raise AssertionError("abort returned")


def swallows_its_abort(context: Any) -> bytes:
    with suppress(Exception):
        context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")
    return b"never"


def crashes(_context: Any) -> bytes:
    raise ValueError(SECRET)


def stops(_context: Any) -> bytes:
    raise StopIteration(SECRET)


def exits(_context: Any) -> bytes:
    raise SystemExit(SECRET)


def leaks(_context: Any) -> bytes:
    raise asyncio.CancelledError(SECRET)


def sets_code(context: Any) -> bytes:
    context.set_code(StatusCode.NOT_FOUND)
    context.set_details("Nothing there")
    return b""


@dataclass
class Waits:
    """Acts in a thread by waiting until it is released; then tries what a handler may try."""

    then: SyncAct = ok
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    gate: threading.Event = field(default_factory=threading.Event)
    found: list[Any] = field(default_factory=list)

    def __call__(self, context: Any) -> bytes:
        self.loop.call_soon_threadsafe(self.entered.set)
        try:
            assert self.gate.wait(10)
            self.found.append(self.then(context))
        except BaseException as error:
            self.found.append(error)
            raise
        finally:
            self.loop.call_soon_threadsafe(self.left.set)
        return b"done"


async def outcome(style: SyncStyle, act: SyncAct) -> Told:
    async with serving(style.make(act), RateLimitPolicy(MemoryStore(), "100/minute")) as channel:
        return await ask(channel, GO, style.kind)


# -- how it ends


@each_style
async def test_a_reply_arrives_as_the_handler_made_it(style: SyncStyle) -> None:
    end = await outcome(style, ok)
    assert (end.code, end.replies) == (StatusCode.OK, [b"done"])
    assert end.get("x-request-id")
    assert end.get("x-ratelimit-remaining") == "99"


@each_style
@pytest.mark.parametrize("act", [aborts, swallows_its_abort])
async def test_an_abort_arrives_with_its_own_code_and_text(style: SyncStyle, act: SyncAct) -> None:
    end = await outcome(style, act)
    expected = [b"never"] if act is swallows_its_abort and style.kind.endswith("_stream") else []
    assert (end.code, end.details, end.replies) == (StatusCode.FAILED_PRECONDITION, "Not yet", expected)
    assert end.get("x-request-id")
    assert end.get("x-ratelimit-remaining") == "99"


@each_style
async def test_a_code_that_was_set_arrives_with_its_text(style: SyncStyle) -> None:
    end = await outcome(style, sets_code)
    assert (end.code, end.details) == (StatusCode.NOT_FOUND, "Nothing there")


@each_style
@pytest.mark.parametrize("act", [crashes, stops, exits, leaks])
async def test_an_exception_is_internal_and_its_text_stays_here(style: SyncStyle, act: SyncAct) -> None:
    end = await outcome(style, act)
    assert (end.code, end.details, end.replies) == (StatusCode.INTERNAL, "Internal error", [])
    assert SECRET not in repr(end)
    assert end.get("x-request-id")


async def test_an_abort_carries_its_trailers_and_ours() -> None:
    def act(context: Any) -> bytes:
        context.set_trailing_metadata((("x-first", "1"),))
        context.abort_with_status(Status(StatusCode.ABORTED, "Busy", (("x-why", "busy"),)))
        return b""

    end = await outcome(SYNC_STYLES["unary_unary"], act)
    assert (end.code, end.details) == (StatusCode.ABORTED, "Busy")
    assert (end.get("x-first"), end.get("x-why"), end.get("ratelimit-policy")) == (
        "1",
        "busy",
        '"100/minute";q=100;w=60',
    )


class Status(grpc.Status):
    def __init__(self, code: StatusCode, details: str, trailing_metadata: Any) -> None:
        self.code, self.details, self.trailing_metadata = code, details, trailing_metadata


@pytest.mark.parametrize("kind", ["unary_stream", "stream_stream"])
async def test_an_abort_after_a_reply_reaches_its_client_every_time(kind: str) -> None:
    def handle(requests: Any, context: Any) -> Iterator[bytes]:
        if kind == "stream_stream":
            list(requests)
        yield b"one"
        context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")

    handler = getattr(grpc, f"{kind}_rpc_method_handler")(handle)
    async with serving(handler) as channel:
        ends = [await ask(channel, GO, kind, deadline=5) for _ in range(60)]
    assert {(end.code, end.details, tuple(end.replies)) for end in ends} == {
        (StatusCode.FAILED_PRECONDITION, "Not yet", (b"one",))
    }


async def test_a_cancelled_call_ends_at_once_though_its_handler_runs_on() -> None:
    act = Waits(then=lambda context: context.is_active())

    def handle(_request: bytes, context: Any) -> bytes:
        context.cancel()
        return act(context)

    async with serving(grpc.unary_unary_rpc_method_handler(handle)) as channel:
        end = await ask(channel)
        act.gate.set()
        await act.left.wait()
    assert (end.code, act.found) == (StatusCode.CANCELLED, [False])


async def test_a_plain_function_that_failed_is_logged_whole_and_one_that_answered_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for act in (ok, aborts, sets_code):
        await outcome(SYNC_STYLES["unary_unary"], act)
    assert complaints(caplog) == []
    end = await outcome(SYNC_STYLES["unary_unary"], crashes)
    (record,) = complaints(caplog)
    assert record.__dict__["request_id"] == end.get("x-request-id")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


# -- clients that leave


def looks(context: Any) -> bytes:
    """Use everything that reads: none of it may reach an RPC that was freed."""
    for _ in range(2):
        context.peer(), context.peer_identities(), context.peer_identity_key(), context.auth_context()
        context.invocation_metadata(), context.code(), context.details(), context.trailing_metadata()
    context.set_code(StatusCode.OK)
    context.set_details("late")
    context.set_trailing_metadata((("x-late", "1"),))
    assert not context.is_active()
    assert context.time_remaining() in (None, 0.0)
    assert not context.add_callback(lambda: None)
    assert context.peer().startswith("ipv4:127.0.0.1:")
    return b"late"


@each_style
async def test_a_client_that_cancels_ends_the_call_at_once_and_its_thread_harmlessly(
    style: SyncStyle, caplog: pytest.LogCaptureFixture
) -> None:
    act, witness = Waits(looks), Witness()
    async with serving(style.make(act), witness) as channel:
        call = start(channel, GO, style.kind)
        if style.kind.startswith("stream_"):
            await call.done_writing()
        await act.entered.wait()
        call.cancel()
        assert (await witness.outcomes.get()).ended == "cancelled"
        act.gate.set()
        await act.left.wait()
        assert (await ask(channel, "/no.such/Method")).code is StatusCode.UNIMPLEMENTED
    assert act.found == [b"late"]
    assert complaints(caplog) == []


@each_style
async def test_a_deadline_that_passes_ends_the_call_at_once_and_its_thread_harmlessly(style: SyncStyle) -> None:
    act, witness = Waits(looks), Witness()
    async with serving(style.make(act), witness) as channel:
        end = await ask(channel, GO, style.kind, deadline=0.2)
        assert end.code is StatusCode.DEADLINE_EXCEEDED
        assert (await witness.outcomes.get()).ended == "cancelled"
        act.gate.set()
        await act.left.wait()
    assert act.found == [b"late"]


@pytest.mark.parametrize("use", ["abort", "send_initial_metadata"])
async def test_a_thread_whose_client_left_can_send_nothing(use: str) -> None:
    arguments: Any = (StatusCode.ABORTED, "late") if use == "abort" else ((),)
    act, witness = Waits(lambda context: getattr(context, use)(*arguments)), Witness()
    async with serving(SYNC_STYLES["unary_unary"].make(act), witness) as channel:
        call = start(channel)
        await act.entered.wait()
        call.cancel()
        await witness.outcomes.get()
        act.gate.set()
        await act.left.wait()
    (error,) = act.found
    assert isinstance(error, grpc.aio.AbortError if use == "abort" else grpc.RpcError)


async def test_a_thread_that_waits_for_a_request_is_woken_when_its_client_leaves() -> None:
    loop, seen, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def handle(requests: Iterator[bytes], _context: Any) -> bytes:
        try:
            for _ in requests:
                loop.call_soon_threadsafe(seen.set)
        finally:
            loop.call_soon_threadsafe(ended.set)
        return b"done"

    async with serving(grpc.stream_unary_rpc_method_handler(handle)) as channel:
        for _ in range(20):
            seen.clear()
            ended.clear()
            call = start(channel, GO, "stream_unary")
            await call.write(b"one")
            await seen.wait()
            call.cancel()
            await ended.wait()


async def test_a_thread_that_asks_for_a_request_after_its_client_left_is_told_so() -> None:
    errors: list[BaseException] = []

    def handle(requests: Iterator[bytes], context: Any) -> bytes:
        act(context)
        try:
            next(requests)
        except BaseException as error:
            errors.append(error)
        asked.set()
        return b"done"

    act, witness, asked = Waits(), Witness(), threading.Event()
    async with serving(grpc.stream_unary_rpc_method_handler(handle), witness) as channel:
        call = start(channel, GO, "stream_unary")
        await act.entered.wait()
        call.cancel()
        await witness.outcomes.get()
        act.gate.set()
        assert await asyncio.to_thread(asked.wait, 5)
    assert [type(error) for error in errors] == [grpc.RpcError]


async def test_a_generator_whose_client_leaves_is_closed_in_its_own_thread() -> None:
    threads: list[int] = []
    loop, closed = asyncio.get_running_loop(), asyncio.Event()

    def handle(_request: bytes, _context: Any) -> Iterator[bytes]:
        try:
            while True:
                threads.append(threading.get_ident())
                yield b"x" * 100_000
        finally:
            threads.append(threading.get_ident())
            loop.call_soon_threadsafe(closed.set)

    async with serving(grpc.unary_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "unary_stream")
        assert await call.read() == b"x" * 100_000
        call.cancel()
        await closed.wait()
    assert len(set(threads)) == 1


async def test_a_call_whose_client_leaves_before_a_thread_is_free_never_runs() -> None:
    act, runs = Waits(), []

    def handle(request: bytes, context: Any) -> bytes:
        runs.append(request)
        return act(context)

    witness = Witness()
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(Pipeline([witness]), ThreadPoolExecutor(1))])
    server.add_generic_rpc_handlers(generic({GO: grpc.unary_unary_rpc_method_handler(handle)}))
    async with connected(server) as channel:
        first = start(channel)
        await act.entered.wait()
        late = await ask(channel, send=[b"late"], deadline=0.1)
        await witness.outcomes.get()
        act.gate.set()
        assert await first == b"done"
        assert await start(channel, send=[b"next"]) == b"done"
    assert (late.code, runs) == (StatusCode.DEADLINE_EXCEEDED, [b"one", b"next"])


async def test_a_server_that_stops_frees_the_threads_of_its_streams() -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def handle(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        try:
            yield from requests
        finally:
            loop.call_soon_threadsafe(ended.set)

    async with serving(grpc.stream_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "stream_stream")
        await call.write(b"one")
        assert await call.read() == b"one"
    await asyncio.wait_for(ended.wait(), 5)


def test_a_thread_that_outlives_its_loop_ends() -> None:
    gate, left = threading.Event(), threading.Event()
    found: list[object] = []
    tell: list[Callable[[], object]] = []

    def handle(_request: bytes, context: Any) -> Iterator[bytes]:
        tell[0]()
        gate.wait(10)
        try:
            context.peer_identities()
        except grpc.RpcError as error:
            found.append(type(error))
        try:
            yield b"late"
        finally:
            left.set()

    async def serve() -> None:
        runs = asyncio.Event()
        tell.append(partial(asyncio.get_running_loop().call_soon_threadsafe, runs.set))
        async with serving(grpc.unary_stream_rpc_method_handler(handle)) as channel:
            start(channel, GO, "unary_stream")
            await runs.wait()

    asyncio.run(serve())
    gate.set()
    assert left.wait(5)
    assert found == [grpc.RpcError]


# -- what it sees


async def test_the_ids_of_the_call_arrive_in_the_thread_and_never_mix() -> None:
    def handle(request: bytes, _context: Any) -> Iterator[bytes]:
        for _ in range(3):
            yield f"{request.decode()} {get_request_id()} {get_correlation_id()}".encode()

    async with serving(grpc.unary_stream_rpc_method_handler(handle)) as channel:
        ends = await asyncio.gather(*(ask(channel, GO, "unary_stream", send=[b"%d" % n]) for n in range(50)))
    for n, end in enumerate(ends):
        assert end.replies == [f"{n} {end.get('x-request-id')} {end.get('x-correlation-id')}".encode()] * 3


async def test_a_thread_can_ask_the_context_everything() -> None:
    found: dict[str, Any] = {}

    def handle(_request: bytes, context: Any) -> bytes:
        context.send_initial_metadata((("x-early", "1"),))
        found["metadata"] = dict(context.invocation_metadata())["x-mine"]
        found["peer"] = context.peer().startswith("ipv4:127.0.0.1:")
        found["left"] = 5 < context.time_remaining() < 11
        found["active"] = context.is_active()
        found["identities"] = (context.peer_identities(), context.peer_identity_key())
        found["auth"] = isinstance(context.auth_context(), dict)
        context.set_trailing_metadata((("x-late", "2"),))
        found["trailers"] = tuple(context.trailing_metadata())
        context.set_code(StatusCode.NOT_FOUND)
        found["code"] = context.code()
        found["registered"] = context.add_callback(over.set)
        return b""

    over = asyncio.Event()
    async with serving(grpc.unary_unary_rpc_method_handler(handle)) as channel:
        end = await ask(channel, GO, "unary_unary", ("x-mine", "yes"), deadline=10)
        await over.wait()
    assert found == {
        "metadata": "yes",
        "peer": True,
        "left": True,
        "active": True,
        "identities": (None, None),
        "auth": True,
        "trailers": (("x-late", "2"),),
        "code": StatusCode.NOT_FOUND,
        "registered": True,
    }
    assert ("x-early", "1") in end.initial
    assert (end.code, end.get("x-late")) == (StatusCode.NOT_FOUND, "2")


async def test_a_callback_tells_a_thread_that_its_client_left() -> None:
    gone = threading.Event()

    def act(context: Any) -> bytes:
        assert context.add_callback(gone.set)
        waits.loop.call_soon_threadsafe(waits.entered.set)
        assert gone.wait(10)
        waits.loop.call_soon_threadsafe(waits.left.set)
        return b""

    waits = Waits()
    async with serving(SYNC_STYLES["unary_unary"].make(act)) as channel:
        call = start(channel)
        await waits.entered.wait()
        call.cancel()
        await waits.left.wait()


# -- streams


async def test_both_sides_of_a_bidi_stream_talk_in_turns() -> None:
    def handle(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for request in requests:
            yield request + b"!"

    async with serving(grpc.stream_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "stream_stream")
        for message in (b"a", b"b", b"c"):
            await call.write(message)
            assert await call.read() == message + b"!"
        await call.done_writing()
        assert (await told(call)).code is StatusCode.OK


async def test_a_handler_may_read_in_a_thread_of_its_own_while_it_replies() -> None:
    def handle(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.extend(requests))
        reader.start()
        yield b"ready"
        reader.join()
        yield b" ".join(read)

    async with serving(grpc.stream_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "stream_stream")
        assert await call.read() == b"ready"
        await call.write(b"a")
        await call.write(b"b")
        await call.done_writing()
        assert await call.read() == b"a b"
        assert (await told(call)).code is StatusCode.OK


async def test_a_reader_that_its_handler_left_behind_ends_without_an_error() -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    read: list[object] = []

    def handle(requests: Iterator[bytes], _context: Any) -> bytes:
        def reads() -> None:
            try:
                read.extend(requests)
            except BaseException as error:
                read.append(error)
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=reads).start()
        return b"done"

    async with serving(grpc.stream_unary_rpc_method_handler(handle)) as channel:
        assert await start(channel, GO, "stream_unary") == b"done"
        await ended.wait()
    assert read == []


async def test_a_generator_makes_no_more_than_its_client_takes() -> None:
    made: list[int] = []

    def handle(_request: bytes, _context: Any) -> Iterator[bytes]:
        for n in range(1000):
            made.append(n)
            yield b"x" * 1_000_000

    async with serving(grpc.unary_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "unary_stream")
        for _ in range(3):
            await call.read()
        assert len(made) < 20
        call.cancel()


# -- plain callables around async functions


class AsyncObject:
    async def __call__(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-request", request.decode()),))
        return b"done"


class AsyncGeneratorObject:
    async def __call__(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"


def passes(inner: Callable[..., Any]) -> Any:
    def call(request: Any, context: Any) -> Any:
        return inner(request, context)

    return call


async def test_an_object_whose_call_is_async_is_an_async_handler() -> None:
    handlers: dict[str, Any] = {
        GO: grpc.unary_unary_rpc_method_handler(AsyncObject()),
        f"/{SERVICE}/Many": grpc.unary_stream_rpc_method_handler(AsyncGeneratorObject()),
    }
    async with serving(handlers) as channel:
        one, many = await ask(channel), await ask(channel, f"/{SERVICE}/Many", "unary_stream")
    assert (one.code, one.replies, one.get("x-request")) == (StatusCode.OK, [b"done"], "one")
    assert (many.code, many.replies) == (StatusCode.OK, [b"one", b"two"])


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("aborting", [False, True])
async def test_an_async_handler_behind_a_plain_decorator_is_awaited(style: Any, aborting: bool) -> None:
    async def act(context: Any) -> bytes:
        if aborting:
            await context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")
        await context.send_initial_metadata((("x-early", "1"),))
        return b"done"

    handler = style.make(act)
    inner = getattr(handler, style.kind)
    make = getattr(grpc, f"{style.kind}_rpc_method_handler")
    async with serving(make(passes(inner))) as channel:
        end = await ask(channel, GO, style.kind)
    if aborting:
        assert (end.code, end.details, end.replies) == (StatusCode.FAILED_PRECONDITION, "Not yet", [])
    else:
        assert (end.code, end.replies) == (StatusCode.OK, [b"done"])
        assert ("x-early", "1") in end.initial


async def test_a_partial_of_an_async_function_is_an_async_handler() -> None:
    async def handle(prefix: bytes, request: bytes, _context: Any) -> bytes:
        return prefix + request

    async with serving(grpc.unary_unary_rpc_method_handler(partial(handle, b"a "))) as channel:
        assert (await ask(channel)).replies == [b"a one"]


# -- policies


@each_style
async def test_a_limit_refuses_before_the_handler_runs(style: SyncStyle) -> None:
    runs: list[int] = []

    def act(_context: Any) -> bytes:
        runs.append(1)
        return b"done"

    async with serving(style.make(act), RateLimitPolicy(MemoryStore(clock=ManualClock()), "1/minute")) as channel:
        first = await ask(channel, GO, style.kind)
        second = await told(start(channel, GO, style.kind))
    assert (first.code, second.code) == (StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED)
    assert (second.get("retry-after"), runs) == ("60", [1])


async def test_a_key_runs_a_plain_function_once_and_replays_its_reply() -> None:
    runs: list[bytes] = []

    def handle(request: bytes, context: Any) -> bytes:
        runs.append(request)
        context.set_trailing_metadata((("x-receipt", str(len(runs))),))
        if request == b"refuse":
            context.abort(StatusCode.FAILED_PRECONDITION, "No money")
        return b"run %d" % len(runs)

    async with serving(grpc.unary_unary_rpc_method_handler(handle), IdempotencyPolicy(MemoryStore())) as channel:
        first, second = [await ask(channel, GO, "unary_unary", KEY) for _ in range(2)]
        other: Pair = ("idempotency-key", "key-2")
        no, again = [await ask(channel, GO, "unary_unary", other, send=[b"refuse"]) for _ in range(2)]
    assert (first.replies, second.replies, second.get(REPLAYED)) == ([b"run 1"], [b"run 1"], "true")
    assert second.get("x-receipt") == "1"
    assert (no.code, again.code, again.details) == (*[StatusCode.FAILED_PRECONDITION] * 2, "No money")
    assert (again.get(REPLAYED), again.get("x-receipt"), len(runs)) == ("true", "2", 2)


async def test_a_keyed_plain_function_whose_client_leaves_is_finished_and_its_retry_is_a_replay() -> None:
    act = Waits(looks)
    pipeline = Pipeline([IdempotencyPolicy(MemoryStore(), in_progress="reject")])
    async with serving(SYNC_STYLES["unary_unary"].make(act), pipeline=pipeline) as channel:
        left = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        left.cancel()
        await left.code()
        assert (await ask(channel, GO, "unary_unary", KEY)).code is StatusCode.ABORTED  # so its server knows
        act.gate.set()
        assert await pipeline.drained(5)
        retry = await ask(channel, GO, "unary_unary", KEY)
    assert (retry.replies, retry.get(REPLAYED), act.found) == ([b"done"], "true", [b"late"])


def plain_things(runs: list[str]) -> dict[str, Any]:
    """Return a plain handler of each kind, all of them limited, and one that is keyed."""

    def one(request: Any, _context: Any) -> bytes:
        runs.append("one")
        return request if isinstance(request, bytes) else b" ".join(request)

    def many(request: Any, _context: Any) -> Iterator[bytes]:
        runs.append("many")
        yield request if isinstance(request, bytes) else b" ".join(request)

    def pay(_request: bytes, _context: Any) -> bytes:
        runs.append("pay")
        return b"run %d" % len(runs)

    made: dict[str, Any] = {kind: rate_limit(1, 20)(many if kind.endswith("_stream") else one) for kind in KINDS}
    return {**made, "pay": idempotent(require_key=True)(pay)}


@pytest.mark.parametrize("hidden", [False, True], ids=["seen", "behind a decorator that hides it"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_limit_declared_at_a_plain_function_holds(kind: str, hidden: bool) -> None:
    runs: list[str] = []
    function = plain_things(runs)[kind]
    handler = getattr(grpc, f"{kind}_rpc_method_handler")(passes(function) if hidden else function)
    async with serving(handler, pipeline=Pipeline(store=MemoryStore(clock=ManualClock()))) as channel:
        first, second = await ask(channel, GO, kind), await told(start(channel, GO, kind))
    assert (first.code, first.replies) == (StatusCode.OK, [b"one"])
    assert first.get("x-ratelimit-remaining") == "0"
    assert (second.code, second.get("retry-after")) == (StatusCode.RESOURCE_EXHAUSTED, "20")
    assert second.get("x-request-id")
    assert len(runs) == 1


@pytest.mark.parametrize("hidden", [False, True], ids=["seen", "behind a decorator that hides it"])
async def test_a_key_declared_at_a_plain_function_never_runs_twice(hidden: bool) -> None:
    runs: list[str] = []
    function = plain_things(runs)["pay"]
    handler: Any = grpc.unary_unary_rpc_method_handler(passes(function) if hidden else function)
    async with serving(handler) as channel:
        missing = await ask(channel)
        first, second = [await ask(channel, GO, "unary_unary", KEY) for _ in range(2)]
    assert (missing.code, first.replies, runs) == (StatusCode.INVALID_ARGUMENT, [b"run 1"], ["pay"])
    # Where the key was only known inside of the thread, the reply could not be kept.
    assert second.code is (StatusCode.ALREADY_EXISTS if hidden else StatusCode.OK)
    assert second.get(REPLAYED) == (None if hidden else "true")


# -- the other kind of server


def test_a_server_that_is_not_aio_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.server(ThreadPoolExecutor(1), interceptors=[ResilienceInterceptor(Pipeline())])  # type: ignore[list-item]
    server.add_generic_rpc_handlers(generic({GO: SYNC_STYLES["unary_unary"].make(ok)}))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with caplog.at_level(logging.ERROR), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary(GO)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"one", timeout=5)
    finally:
        server.stop(None).wait()
    assert caught.value.code() is StatusCode.UNKNOWN
    assert "Serve with grpc.aio.server" in caplog.text
