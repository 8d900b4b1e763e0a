"""However a handler ends, in whichever style it is written, its client gets one right status and the ids."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from resilience import IdempotencyPolicy, MemoryStore, RateLimitPolicy
from resilience.testing import FaultyStore
from tests.integration.grpc_world import (
    GO,
    SECRET,
    STYLES,
    Act,
    Style,
    Told,
    Waits,
    Witness,
    aborts,
    ask,
    complaints,
    crashes,
    leaks,
    ok,
    serving,
    sets_code,
    start,
    told,
)

StatusCode = grpc.StatusCode
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
each_end = pytest.mark.parametrize("act", [ok, aborts, crashes, sets_code, leaks], ids=lambda act: act.__name__)


def limit() -> RateLimitPolicy:
    return RateLimitPolicy(MemoryStore(), "100/minute")


async def outcome(style: Style, act: Act) -> Told:
    async with serving(style.make(act), limit()) as channel:
        return await ask(channel, GO, style.kind)


@each_style
async def test_a_reply_arrives_as_the_handler_made_it(style: Style) -> None:
    end = await outcome(style, ok)
    assert (end.code, end.replies) == (StatusCode.OK, [b"done"])


@each_style
async def test_an_abort_arrives_with_its_own_code_and_text(style: Style) -> None:
    end = await outcome(style, aborts)
    assert (end.code, end.details, end.replies) == (StatusCode.FAILED_PRECONDITION, "Not yet", [])


@each_style
async def test_a_code_that_was_set_arrives_with_its_text(style: Style) -> None:
    end = await outcome(style, sets_code)
    assert (end.code, end.details) == (StatusCode.NOT_FOUND, "Nothing there")


@each_style
async def test_an_exception_is_internal_and_its_text_stays_here(style: Style) -> None:
    end = await outcome(style, crashes)
    assert (end.code, end.details) == (StatusCode.INTERNAL, "Internal error")
    assert SECRET not in repr(end)


@each_style
async def test_a_leaked_cancellation_is_internal_and_no_hang(style: Style) -> None:
    end = await outcome(style, leaks)
    assert (end.code, end.details) == (StatusCode.INTERNAL, "Internal error")


@each_end
@each_style
async def test_every_end_carries_both_ids_and_the_limit(style: Style, act: Act) -> None:
    end = await outcome(style, act)
    assert re.fullmatch("req_[0-9a-f]{32}", end.get("x-request-id") or "")
    assert re.fullmatch("[0-9a-f]{32}", end.get("x-correlation-id") or "")
    assert (end.get("x-ratelimit-limit"), end.get("x-ratelimit-remaining")) == ("100", "99")
    assert end.get("x-ratelimit-reset") == "60"
    assert end.get("ratelimit") == '"100/minute";r=99;t=60'
    assert end.get("ratelimit-policy") == '"100/minute";q=100;w=60'


@each_style
async def test_a_client_that_cancels_cuts_the_handler(style: Style) -> None:
    act, witness = Waits(), Witness()
    async with serving(style.make(act), witness) as channel:
        call = start(channel, GO, style.kind)
        if style.kind.startswith("stream_"):
            await call.done_writing()
        await act.entered.wait()
        call.cancel()
        assert await call.code() is StatusCode.CANCELLED
        await act.cut.wait()
        assert (await witness.outcomes.get()).ended == "cancelled"


@each_style
async def test_a_deadline_that_passes_cuts_the_handler(style: Style) -> None:
    act, witness = Waits(), Witness()
    async with serving(style.make(act), witness) as channel:
        end = await ask(channel, GO, style.kind, deadline=0.2)
        assert end.code is StatusCode.DEADLINE_EXCEEDED
        await act.cut.wait()
        assert (await witness.outcomes.get()).ended == "cancelled"


@each_end
@each_style
async def test_an_admission_is_settled_exactly_once(style: Style, act: Act) -> None:
    witness = Witness()
    async with serving(style.make(act), witness) as channel:
        await ask(channel, GO, style.kind)
        await witness.outcomes.get()
        await ask(channel, GO, style.kind)
        await witness.outcomes.get()
    assert witness.outcomes.empty()


async def aborts_for_now(context: Any) -> bytes:
    await context.abort(StatusCode.UNAVAILABLE, "Later")
    return b""


async def sets_code_for_now(context: Any) -> bytes:
    context.set_code(StatusCode.UNAVAILABLE)
    return b""


ENDS: Sequence[tuple[Act, str]] = [
    (ok, "completed"),
    (aborts, "completed"),
    (sets_code, "completed"),
    (aborts_for_now, "failed"),
    (sets_code_for_now, "failed"),
    (crashes, "failed"),
    (leaks, "cancelled"),
]


@pytest.mark.parametrize(("act", "ended"), ENDS, ids=[act.__name__ for act, _ in ENDS])
async def test_policies_hear_whether_an_answer_is_final(act: Act, ended: str) -> None:
    witness = Witness()
    async with serving(STYLES["unary_unary"].make(act), witness) as channel:
        await ask(channel)
        assert (await witness.outcomes.get()).ended == ended


async def test_a_generator_that_its_client_leaves_while_it_writes_is_closed_before_its_call_is() -> None:
    closed = asyncio.Event()

    async def handle(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            closed.set()

    witness = Witness()
    async with serving(grpc.unary_stream_rpc_method_handler(handle), witness) as channel:
        call = start(channel, GO, "unary_stream")
        assert await call.read() == b"x" * 100_000
        call.cancel()
        assert (await witness.outcomes.get()).ended == "cancelled"
        assert closed.is_set()


async def test_replies_before_an_exception_still_arrive() -> None:
    async def handle(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"
        raise ValueError(SECRET)

    async with serving(grpc.unary_stream_rpc_method_handler(handle)) as channel:
        end = await ask(channel, GO, "unary_stream")
    assert (end.replies, end.code, end.details) == ([b"one", b"two"], StatusCode.INTERNAL, "Internal error")
    assert end.get("x-request-id")


async def test_both_sides_of_a_bidi_stream_talk_in_turns() -> None:
    async def handle(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request + b"!"

    async with serving(grpc.stream_stream_rpc_method_handler(handle)) as channel:
        call = start(channel, GO, "stream_stream")
        for message in (b"a", b"b", b"c"):
            await call.write(message)
            assert await call.read() == message + b"!"
        await call.done_writing()
        assert (await told(call)).code is StatusCode.OK


@pytest.mark.parametrize("metadata", [(), (("idempotency-key", "k"),)], ids=["plain", "keyed"])
async def test_a_reply_that_cannot_be_serialised_is_an_error_and_the_reason_stays_here(metadata: Any) -> None:
    async def handle(_request: bytes, _context: Any) -> bytes:
        return b"done"

    def serialize(_reply: bytes) -> bytes:
        raise ValueError(SECRET)

    handler: Any = grpc.unary_unary_rpc_method_handler(handle, None, serialize)
    async with serving(handler, IdempotencyPolicy(MemoryStore())) as channel:
        end = await ask(channel, GO, "unary_unary", *metadata)
    assert end.code in (StatusCode.INTERNAL, StatusCode.UNKNOWN)
    assert SECRET not in repr(end)
    assert end.get("x-request-id")


async def test_a_code_set_before_an_exception_is_kept_and_the_text_is_not() -> None:
    async def act(context: Any) -> bytes:
        context.set_code(StatusCode.UNAVAILABLE)
        raise ValueError(SECRET)

    end = await outcome(STYLES["unary_unary"], act)
    assert (end.code, end.details) == (StatusCode.UNAVAILABLE, "Internal error")


@pytest.mark.parametrize("act", [crashes, leaks], ids=["exception", "leaked cancellation"])
async def test_an_accident_is_logged_whole_with_the_ids_of_its_call(act: Act, caplog: pytest.LogCaptureFixture) -> None:
    end = await outcome(STYLES["unary_unary"], act)
    (record,) = complaints(caplog)
    assert (record.levelno, record.getMessage()) == (logging.ERROR, f"{GO} failed")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], (ValueError, asyncio.CancelledError))
    assert record.__dict__["request_id"] == end.get("x-request-id")
    assert record.__dict__["correlation_id"] == end.get("x-correlation-id")


@pytest.mark.parametrize("act", [ok, aborts, sets_code], ids=lambda act: act.__name__)
async def test_an_answer_on_purpose_is_no_error_in_the_log(act: Act, caplog: pytest.LogCaptureFixture) -> None:
    await outcome(STYLES["unary_unary"], act)
    assert complaints(caplog) == []


async def test_a_client_that_leaves_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    act, witness = Waits(), Witness()
    async with serving(STYLES["unary_unary"].make(act), witness) as channel:
        call = start(channel)
        await act.entered.wait()
        call.cancel()
        await witness.outcomes.get()
    assert complaints(caplog) == []


async def test_an_accident_in_a_policy_is_internal_and_carries_the_ids(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def admit(self, *_: object) -> Any:
            raise ValueError(SECRET)

    async with serving(STYLES["unary_unary"].make(ok), Broken()) as channel:
        end = await ask(channel)
    assert (end.code, end.details) == (StatusCode.INTERNAL, "Internal error")
    (record,) = complaints(caplog)
    assert end.get("x-request-id") == record.__dict__["request_id"]
    assert end.get("x-correlation-id") == record.__dict__["correlation_id"]


async def test_a_store_outage_under_a_closed_limit_is_unavailable_with_a_pushback() -> None:
    store = FaultyStore(MemoryStore())
    store.down = True
    policy = RateLimitPolicy(store, "100/minute", on_outage="closed")
    async with serving(STYLES["unary_unary"].make(ok), policy) as channel:
        end = await ask(channel)
    assert (end.code, end.get("grpc-retry-pushback-ms")) == (StatusCode.UNAVAILABLE, "1000")
    assert end.get("x-request-id")
