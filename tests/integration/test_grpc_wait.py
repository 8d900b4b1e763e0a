"""RPCs whose twin runs: they wait, within their deadline; and what a handler may know of its keyed operation."""

import asyncio
from time import monotonic
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from resilience import (
    PROCEED,
    Admission,
    Call,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Verdict,
    idempotent,
    running_operation,
)
from resilience.decisions.idempotency import Claim, Takeover
from resilience.testing import FaultyStore
from tests.integration.grpc_world import (
    GO,
    STYLES,
    SYNC_STYLES,
    Pair,
    Told,
    Waits,
    ask,
    serving,
    start,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
REPLAYED = "x-idempotent-replayed"
PUSHBACK = "grpc-retry-pushback-ms"
unary = STYLES["unary_unary"].make


class Counting(MemoryStore):
    """Counts the claims, and tells a test of each."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = 0
        self.claimed: asyncio.Queue[str] = asyncio.Queue()

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        claim = await super().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)
        self.claims += 1
        self.claimed.put_nowait(key)
        return claim


async def twin_is_here(store: Counting) -> None:
    """Wait for the claims of the first and of one twin."""
    for _ in range(2):
        await store.claimed.get()


class Arrivals:
    """A policy that tells a test when so many calls are about to claim."""

    def __init__(self, count: int) -> None:
        self.all_here = asyncio.Event()
        self._missing = count

    async def admit(self, _call: Call, _admission: Admission) -> Verdict:
        self._missing -= 1
        if not self._missing:
            self.all_here.set()
        return PROCEED


async def test_a_hundred_twins_run_once_and_all_get_the_reply_for_a_few_commands() -> None:
    act, store, arrivals = Waits(), Counting(), Arrivals(100)
    async with serving(unary(act), arrivals, IdempotencyPolicy(store)) as channel:
        twins = [asyncio.create_task(ask(channel, GO, "unary_unary", KEY)) for _ in range(100)]
        await arrivals.all_here.wait()
        act.gate.set()
        ends = await asyncio.gather(*twins)
    assert {(end.code, *end.replies) for end in ends} == {(StatusCode.OK, b"done")}
    assert sum(end.get(REPLAYED) == "true" for end in ends) == 99
    assert act.runs == 1
    assert store.claims <= 20


async def test_twins_of_a_decorated_method_run_once() -> None:
    act = Waits()

    class Things:
        @idempotent()
        async def go(self, _request: bytes, context: Any) -> bytes:
            return await act(context)

    handler: Any = grpc.unary_unary_rpc_method_handler(Things().go)
    store = Counting()
    async with serving({GO: handler}, pipeline=Pipeline(store=store)) as channel:
        twins = [asyncio.create_task(ask(channel, GO, "unary_unary", KEY)) for _ in range(10)]
        await twin_is_here(store)
        act.gate.set()
        ends = await asyncio.gather(*twins)
    assert {(end.code, *end.replies) for end in ends} == {(StatusCode.OK, b"done")}
    assert act.runs == 1


async def test_a_wait_ends_before_the_deadline_and_says_when_to_retry() -> None:
    act = Waits()
    async with serving(unary(act), IdempotencyPolicy(MemoryStore())) as channel:
        first = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        began = monotonic()
        twin = await ask(channel, GO, "unary_unary", KEY, deadline=1.0)
        waited = monotonic() - began
        act.gate.set()
        assert await first == b"done"
    assert twin.code is StatusCode.ABORTED
    assert 0.5 <= waited < 1.0
    pushback = int(twin.get(PUSHBACK) or 0)
    assert 1 <= pushback <= 5000
    (raw,) = twin.get_all("grpc-status-details-bin")
    assert isinstance(raw, bytes)
    info, retry = ErrorInfo(), RetryInfo()
    packed = {detail.type_url.rpartition(".")[2]: detail for detail in Status.FromString(raw).details}
    assert packed["ErrorInfo"].Unpack(info)
    assert packed["RetryInfo"].Unpack(retry)
    assert info.reason == "IDEMPOTENCY_IN_PROGRESS"
    assert retry.retry_delay.ToMilliseconds() == pushback


@pytest.mark.parametrize("first_leaves", [True, False])
async def test_a_client_that_leaves_while_it_waits_disturbs_nobody(first_leaves: bool) -> None:
    act, store = Waits(), Counting()
    pipeline = Pipeline([IdempotencyPolicy(store)])
    async with serving(unary(act), pipeline=pipeline) as channel:
        first = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        twins = [start(channel, GO, "unary_unary", KEY) for _ in range(3)]
        await twin_is_here(store)
        leaving = first if first_leaves else twins[0]
        leaving.cancel()
        assert await leaving.code() is StatusCode.CANCELLED
        act.gate.set()
        for call in [first, *twins]:
            assert call is leaving or await call == b"done"
        assert await pipeline.drained(5)
    assert act.runs == 1


async def test_where_the_first_fails_one_who_waits_runs_and_the_others_get_its_reply() -> None:
    waits, store = Waits(), Counting()
    runs: list[int] = []

    async def act(context: Any) -> bytes:
        runs.append(1)
        run = len(runs)
        await waits(context)
        if run == 1:
            await context.abort(StatusCode.UNAVAILABLE, "Later")
        return b"run %d" % run

    async with serving(unary(act), IdempotencyPolicy(store)) as channel:
        first = asyncio.create_task(ask(channel, GO, "unary_unary", KEY))
        await waits.entered.wait()
        twins = [asyncio.create_task(ask(channel, GO, "unary_unary", KEY)) for _ in range(10)]
        await twin_is_here(store)
        waits.gate.set()
        ends: list[Told] = await asyncio.gather(*twins)
    assert (await first).code is StatusCode.UNAVAILABLE
    assert {(end.code, *end.replies) for end in ends} == {(StatusCode.OK, b"run 2")}
    assert len(runs) == 2


async def test_a_twin_whose_store_goes_while_it_waits_is_unavailable_and_never_runs() -> None:
    act, counting = Waits(), Counting()
    store = FaultyStore(counting)
    async with serving(unary(act), IdempotencyPolicy(store, on_outage="open")) as channel:
        first = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        twin = asyncio.create_task(ask(channel, GO, "unary_unary", KEY))
        await twin_is_here(counting)
        store.down = True
        end = await twin
        store.down = False
        act.gate.set()
        assert await first == b"done"
    assert (end.code, end.get(PUSHBACK), act.runs) == (StatusCode.UNAVAILABLE, "1000", 1)


# --- the running operation


def seen() -> bytes:
    operation = running_operation()
    return b"none" if operation is None else f"{operation.epoch} {operation.derive_key('psp')}".encode()


async def look(_context: Any) -> bytes:
    return seen()


@pytest.mark.parametrize(
    "handler",
    [unary(look), SYNC_STYLES["unary_unary"].make(lambda _context: seen())],
    ids=["async", "sync"],
)
async def test_a_handler_knows_its_epoch_and_derives_keys(handler: Any) -> None:
    async with serving(handler, IdempotencyPolicy(MemoryStore())) as channel:
        one = (await ask(channel, GO, "unary_unary", KEY)).replies[0]
        two = (await ask(channel, GO, "unary_unary", ("idempotency-key", "key-2"))).replies[0]
        plain = (await ask(channel)).replies[0]
    assert one.startswith(b"1 ")
    assert two.startswith(b"1 ")
    assert (one != two, plain) == (True, b"none")
