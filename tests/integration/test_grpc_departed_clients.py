"""What a client leaves behind that goes at a bad moment: no half stream taken for a whole, and no error in the log."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from resilience import IdempotencyPolicy, MemoryStore, Pipeline
from tests.integration.grpc_world import (
    GO,
    SECRET,
    STYLES,
    Act,
    Pair,
    Witness,
    aborts,
    ask,
    complaints,
    connected,
    make_server,
    ok,
    serving,
    start,
)

StatusCode = grpc.StatusCode


@pytest.mark.parametrize("name", STYLES)
async def test_an_async_handler_behind_a_plain_decorator_never_begins_once_its_client_left(name: str) -> None:
    style, witness, loop = STYLES[name], Witness(), asyncio.get_running_loop()
    entered, gate, left = asyncio.Event(), threading.Event(), threading.Event()
    began: list[Any] = []

    async def act(context: Any) -> bytes:
        began.append(context)
        return await ok(context)

    handler = style.make(act)
    inner = getattr(handler, style.kind)

    def decorated(request: Any, context: Any) -> Any:
        loop.call_soon_threadsafe(entered.set)
        assert gate.wait(10)
        try:
            return inner(request, context)
        finally:
            left.set()

    async with serving(handler._replace(**{style.kind: decorated}), witness) as channel:
        call = start(channel, GO, style.kind)
        if style.kind.startswith("stream_"):
            await call.done_writing()
        await entered.wait()
        call.cancel()
        assert (await witness.outcomes.get()).ended == "cancelled"
        gate.set()
        assert await asyncio.to_thread(left.wait, 10)
    gc.collect()  # a coroutine that nobody awaited says so when it goes, and a warning is an error
    assert began == []


# -- while it sends


@dataclass
class Books:
    """Acts on the requests that it took, once they end."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    booked: list[int] = field(default_factory=list)

    async def iterated(self, requests: Any, _context: Any) -> bytes:
        taken = 0
        async for _ in requests:
            taken += 1
            self.entered.set()
        self.booked.append(taken)  # no await in between
        return b"done"

    async def read(self, _requests: Any, context: Any) -> bytes:
        taken = 0
        while await context.read() is not grpc.aio.EOF:
            taken += 1
            self.entered.set()
        self.booked.append(taken)
        return b"done"

    async def in_a_task(self, requests: Any, context: Any) -> bytes:
        return await asyncio.create_task(self.iterated(requests, context))

    async def generated(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        yield await self.iterated(requests, context)

    async def written(self, requests: Any, context: Any) -> None:
        await context.write(await self.read(requests, context))


WAYS = ("iterated", "read", "in_a_task", "generated", "written")


def booking(books: Books, way: str) -> tuple[str, Any]:
    """Return the kind of the method and its handler."""
    kind = "stream_stream" if way in ("generated", "written") else "stream_unary"
    return kind, getattr(grpc, f"{kind}_rpc_method_handler")(getattr(books, way))


class Bounds(grpc.aio.ServerInterceptor):
    """Runs each handler of one reply in a task of its own."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        inner = await continuation(handler_call_details)
        if inner.stream_unary is None:
            return inner

        async def handle(requests: Any, context: Any) -> Any:
            return await asyncio.wait_for(inner.stream_unary(requests, context), 10)

        return inner._replace(stream_unary=handle)


@pytest.mark.parametrize("before", [(), (Bounds(),)], ids=["alone", "in a task of somebody else's"])
@pytest.mark.parametrize("way", WAYS)
async def test_half_a_stream_is_never_taken_for_the_whole(way: str, before: tuple[Bounds, ...]) -> None:
    books, witness = Books(), Witness()
    kind, handler = booking(books, way)
    async with connected(make_server(Pipeline([witness]), {GO: handler}, *before)) as channel:
        for _ in range(20):
            books.entered.clear()
            call = start(channel, GO, kind)
            await call.write(b"one")
            await books.entered.wait()
            call.cancel()
            assert (await witness.outcomes.get()).ended == "cancelled"
    assert books.booked == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_whole_stream_is_taken_whole(way: str) -> None:
    books = Books()
    kind, handler = booking(books, way)
    async with serving(handler) as channel:
        ends = [await ask(channel, GO, kind, send=[b"one"] * length) for length in (0, 1, 3)]
    assert [(end.code, end.replies) for end in ends] == [(StatusCode.OK, [b"done"])] * 3
    assert books.booked == [0, 1, 3]


async def test_a_stream_that_an_interceptor_cuts_short_ends_where_it_was_cut() -> None:
    class First(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            inner = await continuation(handler_call_details)

            async def one(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
                yield await anext(requests)

            async def handle(requests: Any, context: Any) -> Any:
                return await inner.stream_unary(one(aiter(requests)), context)

            return inner._replace(stream_unary=handle)

    books = Books()
    kind, handler = booking(books, "iterated")
    async with connected(make_server(Pipeline(), {GO: handler}, First())) as channel:
        call = start(channel, GO, kind)
        await call.write(b"one")  # and it sends no more, and doesn't say so either
        assert await call == b"done"
    assert books.booked == [1]


# -- just before its end


@pytest.mark.parametrize("way", ["abort", "write", "send_initial_metadata", "crash"])
async def test_a_client_that_left_just_before_its_end_is_no_error_of_grpcs(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    witness, called, entered = Witness(), asyncio.get_running_loop().create_future(), asyncio.Event()

    async def act(context: Any) -> bytes:
        entered.set()
        (await called).cancel()
        time.sleep(0.2)  # noqa: ASYNC251 - the RPC ends in grpc's core, and its task can't hear of it yet
        match way:
            case "abort":
                await context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")
            case "write":
                await context.write(b"x")
            case "send_initial_metadata":
                await context.send_initial_metadata((("a", "b"),))
        raise ValueError(SECRET)

    async with serving(STYLES["unary_stream_writer"].make(act), witness) as channel:
        called.set_result(start(channel, GO, "unary_stream"))
        await entered.wait()
        ended = (await witness.outcomes.get()).ended
    gc.collect()
    # What the handler itself did wrong is told, whoever is there to hear.
    assert [record.getMessage() for record in complaints(caplog)] == [f"{GO} failed"] * (way == "crash")
    assert ended == {"abort": "completed", "crash": "failed"}.get(way, "cancelled")


async def test_a_keyed_handler_that_sends_initial_metadata_when_its_client_left_is_finished(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline, called = Pipeline([IdempotencyPolicy(MemoryStore())]), asyncio.get_running_loop().create_future()

    async def act(context: Any) -> bytes:
        (await called).cancel()
        time.sleep(0.2)  # noqa: ASYNC251 - see above
        await context.send_initial_metadata((("a", "b"),))
        return b"done"

    key: Pair = ("idempotency-key", "key-1")
    async with serving(STYLES["unary_unary"].make(act), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", key)
        called.set_result(call)
        await call.code()
        end = await ask(channel, GO, "unary_unary", key)
    assert (end.replies, end.get("x-idempotent-replayed")) == ([b"done"], "true")
    assert complaints(caplog) == []


# -- ends that grpc itself could not tell


async def swallows_its_abort(context: Any) -> bytes:
    try:
        await aborts(context)
    except BaseException:
        raise ValueError(SECRET) from None
    return b"never"


async def aborts_with_ok(context: Any) -> bytes:
    await context.abort(StatusCode.OK, "Fine")
    return b"never"


def aborts_with(*trailer: Any) -> Act:
    async def act(context: Any) -> bytes:
        await context.abort(StatusCode.NOT_FOUND, "Gone", (trailer,))
        return b"never"

    return act


@pytest.mark.parametrize(
    ("act", "code", "details"),
    [
        (swallows_its_abort, StatusCode.FAILED_PRECONDITION, "Not yet"),
        (aborts_with_ok, StatusCode.INTERNAL, "Internal error"),
        (aborts_with("x-number", 7), StatusCode.INTERNAL, "Internal error"),
        (aborts_with("Bad Name", "value"), StatusCode.INTERNAL, "Internal error"),
        (aborts_with("x-line", "a\nb"), StatusCode.INTERNAL, "Internal error"),
    ],
    ids=["swallowed", "OK", "number", "name", "value"],
)
async def test_an_abort_gone_wrong_is_one_status_and_one_line_of_the_log(
    act: Act, code: StatusCode, details: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(STYLES["unary_unary"].make(act)) as channel:
        end = await ask(channel)
    assert (end.code, end.details) == (code, details)
    assert [record.getMessage() for record in complaints(caplog)] == [f"{GO} failed"]
