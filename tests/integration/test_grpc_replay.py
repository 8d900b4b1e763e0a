"""The retry of a keyed call gets the first one's answer: every byte, status and trailer; or runs, if that failed."""

import asyncio
from typing import Any

import grpc
import pytest

from examples.payments.v1 import payments_pb2 as pb
from resilience import IdempotencyPolicy, MemoryStore, RateLimitPolicy, Reply
from tests.integration.grpc_world import GO, SECRET, STYLES, Act, Counts, Pair, Told, ask, serving, start

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
REPLAYED = "x-idempotent-replayed"
CREATE = "/examples.payments.v1.PaymentService/CreatePayment"
APP: tuple[Pair, ...] = (("x-app", "one"), ("x-app", "two"), ("x-app-bin", b"\x00\xff\x80"))
OURS = {"x-request-id", "x-correlation-id", REPLAYED}
unary = STYLES["unary_unary"].make


def theirs(end: Told) -> list[Pair]:
    return [pair for pair in end.trailers if pair[0] not in OURS]


async def twice(act: Act) -> tuple[Told, Told]:
    """Send one keyed request, and then its retry."""
    async with serving(unary(act), IdempotencyPolicy(MemoryStore(), in_progress="reject")) as channel:
        return await ask(channel, GO, "unary_unary", KEY), await ask(channel, GO, "unary_unary", KEY)


async def test_a_retry_gets_the_first_reply_and_the_handler_ran_once() -> None:
    act = Counts()
    first, second = await twice(act)
    assert (first.code, first.replies) == (StatusCode.OK, [b"run 1"])
    assert (second.code, second.replies) == (StatusCode.OK, [b"run 1"])
    assert act.runs == 1


async def test_only_the_replay_says_that_it_is_one() -> None:
    first, second = await twice(Counts())
    assert (first.get(REPLAYED), second.get(REPLAYED)) == (None, "true")


async def test_a_replay_tells_its_own_ids_and_limits_and_not_the_first_ones() -> None:
    limit = RateLimitPolicy(MemoryStore(), "100/minute")
    async with serving(unary(Counts()), limit, IdempotencyPolicy(MemoryStore())) as channel:
        first, second = [await ask(channel, GO, "unary_unary", KEY) for _ in range(2)]
    assert second.get(REPLAYED) == "true"
    assert (first.get("x-ratelimit-remaining"), second.get("x-ratelimit-remaining")) == ("99", "98")
    assert second.get("x-request-id") not in (None, first.get("x-request-id"))


async def test_a_replay_brings_the_handlers_trailers_again() -> None:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata(APP)
        return b"done"

    first, second = await twice(act)
    assert theirs(first) == theirs(second) == list(APP)


async def test_a_replayed_message_is_byte_for_byte_what_was_sent_first() -> None:
    # Fields out of order, and one that the message does not know: a serialiser that is asked again writes another text.
    odd = b"\x1a\x03EUR\x10\x64\x0a\x02p1\xca\x3e\x03new"
    assert pb.Payment.FromString(odd).SerializeToString() != odd
    written = iter([odd])

    async def handle(_request: pb.CreatePaymentRequest, _context: Any) -> pb.Payment:
        return pb.Payment.FromString(odd)

    def serialize(reply: pb.Payment) -> bytes:
        return next(written, reply.SerializeToString())

    handler: Any = grpc.unary_unary_rpc_method_handler(handle, pb.CreatePaymentRequest.FromString, serialize)
    async with serving({CREATE: handler}, IdempotencyPolicy(MemoryStore())) as channel:
        ends = [await ask(channel, CREATE, "unary_unary", KEY, send=[b""]) for _ in range(3)]
    assert [end.replies for end in ends] == [[odd]] * 3
    assert [end.get(REPLAYED) for end in ends] == [None, "true", "true"]


async def test_an_empty_reply_is_replayed_too() -> None:
    async def act(_context: Any) -> bytes:
        return b""

    first, second = await twice(act)
    assert (first.replies, second.replies, second.get(REPLAYED)) == ([b""], [b""], "true")


async def refuse_by_abort(context: Any) -> bytes:
    context.set_trailing_metadata(APP[:2])
    await context.abort(StatusCode.INVALID_ARGUMENT, "Beträge > 0", APP[2:])
    return b""


async def refuse_by_code(context: Any) -> bytes:
    context.set_trailing_metadata(APP)
    context.set_code(StatusCode.INVALID_ARGUMENT)
    context.set_details("Beträge > 0")
    return b""


@pytest.mark.parametrize("act", [refuse_by_abort, refuse_by_code], ids=["abort", "set_code"])
async def test_a_domain_error_is_replayed_with_its_text_and_trailers(act: Act) -> None:
    counts = Counts(act)
    ends = await twice(counts)
    for end in ends:
        assert (end.code, end.details) == (StatusCode.INVALID_ARGUMENT, "Beträge > 0")
        assert theirs(end) == list(APP)
        assert end.get("x-request-id")
    assert [end.get(REPLAYED) for end in ends] == [None, "true"]
    assert counts.runs == 1


@pytest.mark.parametrize("metadata", [(), (KEY,)], ids=["plain", "keyed"])
async def test_a_handler_that_sets_a_code_may_return_nothing(metadata: tuple[Pair, ...]) -> None:
    async def handle(_request: bytes, context: Any) -> None:
        context.set_code(StatusCode.NOT_FOUND)
        context.set_details("Nothing there")

    handler: Any = grpc.unary_unary_rpc_method_handler(handle, None, lambda reply: reply.SerializeToString())
    async with serving(handler, IdempotencyPolicy(MemoryStore())) as channel:
        ends = [await ask(channel, GO, "unary_unary", *metadata) for _ in range(2)]
    assert [(end.code, end.details) for end in ends] == [(StatusCode.NOT_FOUND, "Nothing there")] * 2


class SlowStore(MemoryStore):
    """A store that takes its time to keep a reply."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.gate = asyncio.Event(), asyncio.Event()

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        self.asked.set()
        await self.gate.wait()
        return await super().complete(key, token, fingerprint, reply, ttl=ttl, tombstone=tombstone)


@pytest.mark.parametrize(
    ("act", "code"),
    [(Counts(), StatusCode.OK), (refuse_by_abort, StatusCode.INVALID_ARGUMENT)],
    ids=["reply", "abort"],
)
async def test_an_answer_leaves_once_it_is_stored_and_not_before(act: Act, code: grpc.StatusCode) -> None:
    store = SlowStore()
    async with serving(unary(act), IdempotencyPolicy(store, in_progress="reject")) as channel:
        call = start(channel, GO, "unary_unary", KEY)
        await store.asked.wait()
        twin = await ask(channel, GO, "unary_unary", KEY)
        assert (twin.code, call.done()) == (StatusCode.ABORTED, False)
        store.gate.set()
        assert await call.code() is code
        later = await ask(channel, GO, "unary_unary", KEY)
    assert (later.code, later.get(REPLAYED)) == (code, "true")


class Rich(grpc.Status):
    code = StatusCode.FAILED_PRECONDITION
    details = "Rich"
    trailing_metadata = (("grpc-status-details-bin", b"\x08\x09\xff"),)


async def test_a_rich_status_is_replayed_whole() -> None:
    async def act(context: Any) -> bytes:
        await context.abort_with_status(Rich())
        return b""

    counts = Counts(act)
    for end in await twice(counts):
        assert (end.code, end.details) == (StatusCode.FAILED_PRECONDITION, "Rich")
        assert end.get_all("grpc-status-details-bin") == [b"\x08\x09\xff"]
    assert counts.runs == 1


async def unavailable_by_abort(context: Any) -> bytes:
    await context.abort(StatusCode.UNAVAILABLE, "Later")
    return b""


async def unavailable_by_code(context: Any) -> bytes:
    context.set_code(StatusCode.UNAVAILABLE)
    return b""


async def crash(_context: Any) -> bytes:
    raise ValueError(SECRET)


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        (unavailable_by_abort, StatusCode.UNAVAILABLE),
        (unavailable_by_code, StatusCode.UNAVAILABLE),
        (crash, StatusCode.INTERNAL),
    ],
    ids=["abort", "set_code", "exception"],
)
async def test_a_failure_frees_the_key_so_that_the_retry_runs(fail: Act, code: grpc.StatusCode) -> None:
    runs: list[int] = []

    async def act(context: Any) -> bytes:
        runs.append(1)
        return await fail(context) if len(runs) == 1 else b"done"

    first, second = await twice(act)
    assert (first.code, SECRET in repr(first)) == (code, False)
    assert (second.code, second.replies, second.get(REPLAYED)) == (StatusCode.OK, [b"done"], None)
    assert len(runs) == 2


async def test_a_keyed_handler_that_leaks_a_cancellation_is_internal_and_its_key_waits() -> None:
    async def act(_context: Any) -> bytes:
        inner = asyncio.create_task(asyncio.Event().wait())
        inner.cancel()
        await inner
        return b""

    counts = Counts(act)
    first, second = await twice(counts)
    assert (first.code, first.details) == (StatusCode.INTERNAL, "Internal error")
    assert (second.code, counts.runs) == (StatusCode.ABORTED, 1)


async def test_a_handler_that_swallows_its_own_abort_has_aborted_all_the_same() -> None:
    async def act(context: Any) -> bytes:
        try:
            await context.abort(StatusCode.INVALID_ARGUMENT, "No")
        except Exception:
            return b"done"
        return b""

    ends = await twice(act)
    assert [(end.code, end.details) for end in ends] == [(StatusCode.INVALID_ARGUMENT, "No")] * 2


async def test_a_reply_over_its_bound_is_sent_and_its_retry_is_told_that_it_is_done() -> None:
    act = Counts()
    async with serving(unary(act), IdempotencyPolicy(MemoryStore(), max_reply=4)) as channel:
        first, second = [await ask(channel, GO, "unary_unary", KEY) for _ in range(2)]
    assert (first.code, first.replies) == (StatusCode.OK, [b"run 1"])
    assert (second.code, act.runs) == (StatusCode.ALREADY_EXISTS, 1)
    assert second.get("grpc-retry-pushback-ms") is None
