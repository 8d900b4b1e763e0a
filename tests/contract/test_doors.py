"""One scenario table, both doors: the same calls meet the same answers, and every code comes from ``wire.TABLE``."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI, Request, Response

from grpc_interceptors import ResilienceInterceptor
from http_middleware import install
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Policy, RateLimitPolicy, Reason, Reject, wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.testing import FaultyStore, ManualClock
from resilience.verdict import PROCEED, Outcome, Verdict


@dataclass
class Work:
    """The handler behind both doors. What it does, its payload says."""

    runs: int = 0
    running: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, payload: bytes) -> bytes:
        self.runs += 1
        self.running.set()
        if payload == b"wait":
            await self.gate.wait()
        if payload == b"crash":
            raise RuntimeError("password=hunter2")
        return b"done " * (300 if payload == b"long" else 1)


@dataclass(frozen=True)
class Answer:
    code: int
    metadata: dict[str, str]
    body: bytes


Send = Callable[..., "asyncio.Task[Answer]"]


class HttpDoor:
    """``fine`` and ``broken`` are codes of this wire, ``reason_code`` the column of the table that it has."""

    fine, broken = 200, 500

    def reason_code(self, reason: Reason) -> int:
        return wire.TABLE[reason].http

    @asynccontextmanager
    async def client(self, pipeline: Pipeline, work: Work) -> AsyncIterator[Send]:
        app = FastAPI()

        @app.post("/things")
        async def make(request: Request) -> Response:
            body = await request.body()
            return Response(await work(body), {b"busy": 503, b"wrong": 422}.get(body, 200))

        install(app, pipeline)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:

            async def send(payload: bytes, metadata: Sequence[tuple[str, str]]) -> Answer:
                reply = await http.post("/things", content=payload, headers=list(metadata))
                return Answer(reply.status_code, dict(reply.headers), reply.content)

            yield lambda payload=b"", *metadata: asyncio.create_task(send(payload, metadata))


class GrpcDoor:
    fine, broken = 0, 13

    def reason_code(self, reason: Reason) -> int:
        return wire.TABLE[reason].grpc

    @asynccontextmanager
    async def client(self, pipeline: Pipeline, work: Work) -> AsyncIterator[Send]:
        async def make(request: bytes, context: Any) -> bytes:
            codes = {b"busy": grpc.StatusCode.UNAVAILABLE, b"wrong": grpc.StatusCode.INVALID_ARGUMENT}
            if request in codes:
                await context.abort(codes[request], "No")
            return await work(request)

        server = grpc.aio.server(interceptors=[ResilienceInterceptor(pipeline)])
        handlers: dict[str, Any] = {"Make": grpc.unary_unary_rpc_method_handler(make)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("door.Things", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            make_stub: Any = channel.unary_unary("/door.Things/Make")

            async def send(payload: bytes, metadata: Sequence[tuple[str, str]]) -> Answer:
                call = make_stub(payload, metadata=tuple(metadata), timeout=10)
                code, trailers = await call.code(), await call.trailing_metadata()
                body = await call if code is grpc.StatusCode.OK else (await call.details()).encode()
                return Answer(code.value[0], {name: str(value) for name, value in trailers}, body)

            yield lambda payload=b"", *metadata: asyncio.create_task(send(payload, metadata))
        await server.stop(None)


DOORS: dict[str, HttpDoor | GrpcDoor] = {"http": HttpDoor(), "grpc": GrpcDoor()}
KEY = ("idempotency-key", "k")


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> HttpDoor | GrpcDoor:
    return DOORS[request.param]


@dataclass
class Scenario:
    """A pipeline, some calls one after the other, and what the last of them comes to.

    ``runs`` is how often the handler ran in all. ``told`` are names that must be in the last answer's metadata.
    """

    policies: Callable[[FaultyStore], list[Policy]]
    calls: list[tuple[bytes, *tuple[tuple[str, str], ...]]]
    reason: Reason | None
    runs: int
    told: set[str] = field(default_factory=set)
    down: bool = False


def limited(store: FaultyStore) -> list[Policy]:
    return [RateLimitPolicy(store, "2/minute")]


def keyed(store: FaultyStore) -> list[Policy]:
    return [IdempotencyPolicy(store, max_payload=64, max_reply=1000)]


LIMIT_NAMES = {wire.LIMIT, wire.REMAINING, wire.RESET, wire.RATELIMIT, wire.RATELIMIT_POLICY}

SCENARIOS = {
    "an admitted call is told its quota": Scenario(limited, [(b"",)], None, 1, LIMIT_NAMES),
    "a call over the quota is refused": Scenario(
        limited, [(b"",), (b"",), (b"",)], Reason.RATE_LIMITED, 2, LIMIT_NAMES | {wire.RETRY_AFTER}
    ),
    "several rules are told together": Scenario(
        lambda store: [RateLimitPolicy(store, "1/second and 100/hour")],
        [(b"",), (b"",)],
        Reason.RATE_LIMITED,
        1,
        LIMIT_NAMES | {wire.RETRY_AFTER},
    ),
    "limits are open while the store is gone": Scenario(limited, [(b"",)] * 3, None, 3, down=True),
    "limits are closed where so declared": Scenario(
        lambda store: [RateLimitPolicy(store, "2/minute", on_outage="closed")],
        [(b"",)],
        Reason.STORE_UNAVAILABLE,
        0,
        {wire.RETRY_AFTER},
        down=True,
    ),
    "a call without a key passes": Scenario(keyed, [(b"a",), (b"a",)], None, 2),
    "a required key that is missing is asked for": Scenario(
        lambda store: [IdempotencyPolicy(store, required=True)], [(b"a",)], Reason.IDEMPOTENCY_KEY_MISSING, 0
    ),
    "a key of 300 bytes is malformed": Scenario(
        keyed, [(b"a", ("idempotency-key", "k" * 300))], Reason.IDEMPOTENCY_KEY_MALFORMED, 0
    ),
    "a key with a space is malformed": Scenario(
        keyed, [(b"a", ("idempotency-key", "a b"))], Reason.IDEMPOTENCY_KEY_MALFORMED, 0
    ),
    "a key that is sent twice is malformed": Scenario(
        keyed, [(b"a", KEY, ("idempotency-key", "other"))], Reason.IDEMPOTENCY_KEY_MALFORMED, 0
    ),
    "a retry is a replay": Scenario(keyed, [(b"a", KEY), (b"a", KEY)], None, 1, {wire.REPLAYED}),
    "a quoted key is the same key": Scenario(
        keyed, [(b"a", KEY), (b"a", ("idempotency-key", '"k"'))], None, 1, {wire.REPLAYED}
    ),
    "two callers with one key are two operations": Scenario(
        keyed, [(b"a", KEY, ("x-api-key", "one")), (b"a", KEY, ("x-api-key", "two"))], None, 2
    ),
    "another payload is a mismatch": Scenario(
        keyed, [(b"a", KEY), (b"b", KEY)], Reason.IDEMPOTENCY_PAYLOAD_MISMATCH, 1
    ),
    "a payload over the bound is refused": Scenario(keyed, [(b"a" * 65, KEY)], Reason.PAYLOAD_TOO_LARGE, 0),
    "a reply too large to keep is not run again": Scenario(
        keyed, [(b"long", KEY), (b"long", KEY)], Reason.IDEMPOTENCY_NOT_REPLAYABLE, 1
    ),
    "keyed calls are refused while the store is gone": Scenario(
        keyed, [(b"a", KEY)], Reason.STORE_UNAVAILABLE, 0, {wire.RETRY_AFTER}, down=True
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
async def test_both_doors_give_the_same_answer(scenario: Scenario, door: HttpDoor | GrpcDoor) -> None:
    store = FaultyStore(MemoryStore(clock=ManualClock()))
    store.down = scenario.down
    work = Work()
    async with asyncio.timeout(10), door.client(Pipeline(scenario.policies(store)), work) as send:
        answers = [await send(*call) for call in scenario.calls]
    last = answers[-1]
    assert last.code == (door.fine if scenario.reason is None else door.reason_code(scenario.reason))
    assert work.runs == scenario.runs
    assert {wire.REQUEST_ID, wire.CORRELATION_ID} | scenario.told <= last.metadata.keys()
    assert all(earlier.code == door.fine for earlier in answers[:-1])
    if wire.REPLAYED in scenario.told:
        assert last.body == answers[0].body


class Refusing:
    def __init__(self, reason: Reason) -> None:
        self._reason = reason

    async def admit(self, _call: Call, _admission: Admission) -> Verdict:
        return Reject(self._reason, "No", 2.5 if wire.TABLE[self._reason].retry == "after" else None)


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("stage", ["edge", "core"])
async def test_every_row_of_the_table_is_rendered(reason: Reason, stage: str, door: HttpDoor | GrpcDoor) -> None:
    policies = [*Pipeline().edge, Refusing(reason)]
    pipeline = Pipeline(edge=policies) if stage == "edge" else Pipeline(policies[1:])
    work = Work()
    async with asyncio.timeout(10), door.client(pipeline, work) as send:
        answer = await send(b"a")
    assert answer.code == door.reason_code(reason)
    assert work.runs == 0
    assert b"No" in answer.body
    assert {wire.REQUEST_ID, wire.CORRELATION_ID} <= answer.metadata.keys()
    row = wire.TABLE[reason]
    assert answer.metadata.get(wire.RETRY_AFTER) == ("3" if row.retry == "after" else None)
    if isinstance(door, GrpcDoor):
        expected = {"after": "2500", "never": "-1", "changed": None}[row.retry]
        assert answer.metadata.get(wire.RETRY_PUSHBACK) == expected


async def test_a_twin_in_flight_is_told_when_to_come_back_where_so_declared(door: HttpDoor | GrpcDoor) -> None:
    work, policy = Work(), IdempotencyPolicy(MemoryStore(), in_progress="reject")
    async with asyncio.timeout(10), door.client(Pipeline([policy]), work) as send:
        first = send(b"wait", KEY)
        await work.running.wait()
        twin = await send(b"wait", KEY)
        work.gate.set()
        assert (await first).code == door.fine
    assert twin.code == door.reason_code(Reason.IDEMPOTENCY_IN_PROGRESS)
    assert wire.RETRY_AFTER in twin.metadata
    assert work.runs == 1


async def test_a_twin_in_flight_waits_for_the_reply_where_so_declared(door: HttpDoor | GrpcDoor) -> None:
    work, policy = Work(), IdempotencyPolicy(MemoryStore(), in_progress="wait")
    async with asyncio.timeout(10), door.client(Pipeline([policy]), work) as send:
        first = send(b"wait", KEY)
        await work.running.wait()
        twins = [send(b"wait", KEY) for _ in range(5)]
        work.gate.set()
        answers = [await task for task in (first, *twins)]
    assert {(answer.code, answer.body) for answer in answers} == {(door.fine, b"done ")}
    assert [answer.metadata.get(wire.REPLAYED) for answer in answers] == [None] + ["true"] * 5
    assert work.runs == 1


async def test_a_wait_that_is_over_ends_as_if_there_had_been_none(door: HttpDoor | GrpcDoor) -> None:
    work, policy = Work(), IdempotencyPolicy(MemoryStore(), in_progress="wait", max_wait=0.01)
    async with asyncio.timeout(10), door.client(Pipeline([policy]), work) as send:
        first = send(b"wait", KEY)
        await work.running.wait()
        twin = await send(b"wait", KEY)
        work.gate.set()
        await first
    assert twin.code == door.reason_code(Reason.IDEMPOTENCY_IN_PROGRESS)
    assert wire.RETRY_AFTER in twin.metadata


async def test_an_abandoned_operation_is_refused_where_so_declared(door: HttpDoor | GrpcDoor) -> None:
    clock, work = ManualClock(), Work()
    policy = IdempotencyPolicy(MemoryStore(clock=clock), takeover="refuse", lease=10)
    async with asyncio.timeout(10), door.client(Pipeline([policy]), work) as send:
        first = send(b"wait", KEY)
        await work.running.wait()
        clock.advance(11)
        later = await send(b"wait", KEY)
        work.gate.set()
        await first
    assert later.code == door.reason_code(Reason.IDEMPOTENCY_ABANDONED)
    assert work.runs == 1


async def test_an_accident_frees_the_key_and_says_nothing(door: HttpDoor | GrpcDoor) -> None:
    work = Work()
    async with asyncio.timeout(10), door.client(Pipeline(keyed(FaultyStore(MemoryStore()))), work) as send:
        answers = [await send(b"crash", KEY) for _ in range(2)]
    assert [answer.code for answer in answers] == [door.broken] * 2
    assert work.runs == 2
    for answer in answers:
        assert b"hunter2" not in answer.body
        assert {wire.REQUEST_ID, wire.CORRELATION_ID} <= answer.metadata.keys()


class Witness:
    def __init__(self) -> None:
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def admit(self, _call: Call, admission: Admission) -> Verdict:
        async def note(outcome: Outcome) -> None:
            self.ended.put_nowait(outcome.ended)

        admission.on_settle(note)
        return PROCEED


@pytest.mark.parametrize(
    ("payload", "ended"), [(b"a", "completed"), (b"busy", "failed"), (b"wrong", "completed"), (b"crash", "failed")]
)
async def test_policies_hear_whether_a_retry_may_better_an_answer(
    payload: bytes, ended: str, door: HttpDoor | GrpcDoor
) -> None:
    witness = Witness()
    async with asyncio.timeout(10), door.client(Pipeline([witness]), Work()) as send:
        await send(payload)
        assert await witness.ended.get() == ended


async def test_policies_hear_of_a_refusal(door: HttpDoor | GrpcDoor) -> None:
    witness = Witness()
    async with asyncio.timeout(10), door.client(Pipeline([witness, Refusing(Reason.DRAINING)]), Work()) as send:
        await send(b"a")
        assert await witness.ended.get() == "refused"


async def test_fifty_twins_run_once(door: HttpDoor | GrpcDoor) -> None:
    work = Work()
    async with asyncio.timeout(10), door.client(Pipeline(keyed(FaultyStore(MemoryStore()))), work) as send:
        tasks = [send(b"a", KEY) for _ in range(50)]
        answers = [await task for task in tasks]
    assert work.runs == 1
    codes = {answer.code for answer in answers}
    assert door.fine in codes
    assert codes <= {door.fine, door.reason_code(Reason.IDEMPOTENCY_IN_PROGRESS)}
    assert {answer.body for answer in answers if answer.code == door.fine} == {b"done "}


async def test_the_callers_ids_go_in_and_out(door: HttpDoor | GrpcDoor) -> None:
    async with asyncio.timeout(10), door.client(Pipeline(), Work()) as send:
        answer = await send(b"", (wire.CORRELATION_ID, "order-7"), (wire.REQUEST_ID, "req_theirs"))
    assert answer.metadata[wire.CORRELATION_ID] == "order-7"
    assert answer.metadata[wire.REQUEST_ID].startswith("req_")
    assert answer.metadata[wire.REQUEST_ID] != "req_theirs"


async def test_one_quota_is_spent_over_both_doors() -> None:
    pipeline, work = Pipeline([RateLimitPolicy(MemoryStore(clock=ManualClock()), "5/minute")]), Work()
    http_door, grpc_door, who = HttpDoor(), GrpcDoor(), ("x-api-key", "me")
    async with (
        asyncio.timeout(10),
        http_door.client(pipeline, work) as http,
        grpc_door.client(pipeline, work) as rpc,
    ):
        spent = [(await http(b"", who)).code for _ in range(3)] + [(await rpc(b"", who)).code for _ in range(2)]
        over = (await http(b"", who)).code, (await rpc(b"", who)).code
        other = (await http(b"", ("x-api-key", "you"))).code
    assert spent == [200, 200, 200, 0, 0]
    assert over == (429, 8)
    assert other == 200


@pytest.mark.parametrize("order", [("http", "grpc"), ("grpc", "http")])
async def test_one_operation_never_runs_behind_both_doors(order: tuple[str, str]) -> None:
    pipeline, work = Pipeline([IdempotencyPolicy(MemoryStore(), operation="make")]), Work()
    first, second = DOORS[order[0]], DOORS[order[1]]
    who = ("x-api-key", "me")
    async with asyncio.timeout(10), first.client(pipeline, work) as one, second.client(pipeline, work) as two:
        assert (await one(b"a", KEY, who)).code == first.fine
        assert (await two(b"a", KEY, who)).code == second.reason_code(Reason.IDEMPOTENCY_NOT_REPLAYABLE)
    assert work.runs == 1
