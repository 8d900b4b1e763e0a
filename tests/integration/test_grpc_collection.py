"""However an RPC ends, it leaves nothing to the garbage collector, whose full rounds stop the loop."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any
from weakref import finalize

import grpc
import pytest

from grpc_interceptors import ResilienceInterceptor
from resilience import PROCEED, Admission, Call, IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy, Verdict
from tests.integration.grpc_world import (
    GO,
    STYLES,
    SYNC_STYLES,
    Act,
    Pair,
    Style,
    SyncStyle,
    Waits,
    aborts,
    ask,
    connected,
    crashes,
    generic,
    leaks,
    ok,
    serving,
    sets_code,
    start,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
ENDS = {"ok": ok, "aborts": aborts, "crashes": crashes, "sets_code": sets_code, "leaks": leaks}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
each_sync_style = pytest.mark.parametrize("style", SYNC_STYLES.values(), ids=SYNC_STYLES)
each_end = pytest.mark.parametrize("act", ENDS.values(), ids=ENDS)
unary = STYLES["unary_unary"].make


class Watch:
    """A policy that lets everything pass and knows which calls are still in memory."""

    def __init__(self) -> None:
        self._kept = 0
        self._loop = asyncio.get_running_loop()
        self._all_gone = asyncio.Event()

    async def admit(self, call: Call, _admission: Admission) -> Verdict:
        self._kept += 1
        self._all_gone.clear()
        finalize(call, self._loop.call_soon_threadsafe, self._left)  # maybe in a handler's thread
        return PROCEED

    def _left(self) -> None:
        self._kept -= 1
        if not self._kept:
            self._all_gone.set()

    async def all_gone(self) -> None:
        await self._all_gone.wait()


@pytest.fixture(autouse=True)
def _no_collection(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("CRITICAL", "resilience")  # what is logged of an error keeps its frames
    gc.disable()
    yield
    gc.enable()


@each_style
@each_end
async def test_a_call_is_freed_however_its_handler_ends(style: Style, act: Act) -> None:
    watch = Watch()
    async with serving(style.make(act), watch) as channel:
        await ask(channel, GO, style.kind)
        await watch.all_gone()


@pytest.mark.parametrize("act", [ok, aborts, crashes, sets_code])
async def test_a_keyed_call_and_its_retry_are_freed_however_they_end(act: Act) -> None:
    watch = Watch()
    async with serving(unary(act), watch, IdempotencyPolicy(MemoryStore())) as channel:
        await ask(channel, GO, "unary_unary", KEY)
        await ask(channel, GO, "unary_unary", KEY)
        await watch.all_gone()


@each_style
async def test_a_refused_call_is_freed(style: Style) -> None:
    watch = Watch()
    async with serving(style.make(ok), watch, RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        await ask(channel, GO, style.kind)
        assert (await ask(channel, GO, style.kind)).code is StatusCode.RESOURCE_EXHAUSTED
        await watch.all_gone()


@each_style
async def test_a_call_whose_client_leaves_is_freed(style: Style) -> None:
    watch, act = Watch(), Waits()
    async with serving(style.make(act), watch) as channel:
        call = start(channel, GO, style.kind)
        if style.kind.startswith("stream_"):
            await call.done_writing()
        await act.entered.wait()
        call.cancel()
        await watch.all_gone()


@each_sync_style
async def test_a_call_in_a_thread_is_freed(style: SyncStyle) -> None:
    watch = Watch()
    async with serving(style.make(lambda _context: b"done"), watch) as channel:
        assert (await ask(channel, GO, style.kind)).code is StatusCode.OK
        await watch.all_gone()


@each_sync_style
async def test_a_call_that_is_aborted_in_a_thread_is_freed(style: SyncStyle) -> None:
    def act(context: Any) -> bytes:
        context.abort(StatusCode.NOT_FOUND, "Nothing there")
        raise AssertionError("abort returned")

    watch = Watch()
    async with serving(style.make(act), watch) as channel:
        assert (await ask(channel, GO, style.kind)).code is StatusCode.NOT_FOUND
        await watch.all_gone()


@pytest.mark.parametrize("act", [ok, aborts, crashes, sets_code])
@pytest.mark.parametrize("limit", ["100/hour", "1/hour"])
async def test_a_call_that_is_asked_about_before_its_message_is_freed(act: Act, limit: str) -> None:
    watch = Watch()
    pipeline = Pipeline([watch, RateLimitPolicy(MemoryStore(), limit), IdempotencyPolicy(MemoryStore())])
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(pipeline, before_body=True)])
    server.add_generic_rpc_handlers(generic({GO: unary(act)}))
    async with connected(server) as channel:
        await ask(channel)
        await ask(channel, GO, "unary_unary", KEY)
        await ask(channel, GO, "unary_unary", KEY)
        await watch.all_gone()
