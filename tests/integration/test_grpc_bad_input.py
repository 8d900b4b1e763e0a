"""What a client can do wrong or with intent: it is answered in our words, and the server goes on."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc import StatusCode

from grpc_interceptors import client_interceptors
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    Rule,
    get_tracing_headers,
    idempotent,
)
from tests.integration.grpc_world import (
    GO,
    SERVICE,
    STYLES,
    SYNC_STYLES,
    Counts,
    Handlers,
    Witness,
    ask,
    complaints,
    make_server,
    ok,
    serving,
)
from tests.integration.h2_client import RawClient, message, raw

GOOD = StringValue(value="fine").SerializeToString()
BAD = b"\xff\xff\xff"
KEY = ("idempotency-key", "k")


@asynccontextmanager
async def frames(handlers: Any, *policies: Policy) -> AsyncIterator[RawClient]:
    """Serve, and connect with a client that may send anything."""
    by_name: Handlers = handlers if isinstance(handlers, dict) else {GO: handlers}
    server = make_server(Pipeline(policies), by_name)
    async with asyncio.timeout(10):
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with raw(port) as client:
                yield client
        finally:
            await server.stop(None)


# -- messages


async def _unary(request: StringValue, _context: Any) -> bytes:
    return request.value.encode()


async def _unary_many(request: StringValue, _context: Any) -> AsyncIterator[bytes]:
    yield request.value.encode()


async def _iterates(requests: AsyncIterator[StringValue], _context: Any) -> bytes:
    return b"".join([request.value.encode() async for request in requests])


async def _reads(_requests: object, context: Any) -> bytes:
    parts = []
    while (request := await context.read()) is not grpc.aio.EOF:
        parts.append(request.value.encode())
    return b"".join(parts)


async def _echoes(requests: AsyncIterator[StringValue], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request.value.encode()


def _sync_unary(request: StringValue, _context: Any) -> bytes:
    return request.value.encode()


def _sync_echoes(requests: Iterator[StringValue], _context: Any) -> Iterator[bytes]:
    for request in requests:
        yield request.value.encode()


READERS: dict[str, tuple[str, Any]] = {
    "unary": ("unary_unary", _unary),
    "unary_many": ("unary_stream", _unary_many),
    "iterates": ("stream_unary", _iterates),
    "reads": ("stream_unary", _reads),
    "echoes": ("stream_stream", _echoes),
    "sync_unary": ("unary_unary", _sync_unary),
    "sync_echoes": ("stream_stream", _sync_echoes),
}


def reader(name: str) -> tuple[str, Any]:
    """Return the kind and the handler of one that decodes its requests."""
    kind, function = READERS[name]
    make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    return kind, make(function, StringValue.FromString)


@pytest.mark.parametrize("name", READERS)
async def test_bytes_that_are_no_message_end_the_call_in_our_words_with_its_ids(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, handler = reader(name)
    witness = Witness()
    async with serving(handler, witness) as channel:
        end = await ask(channel, GO, kind, send=[BAD])
        outcome = await witness.outcomes.get()
        good = await ask(channel, GO, kind, send=[GOOD])
    assert (end.code, end.details, end.replies) == (StatusCode.INTERNAL, "The request can't be decoded", [])
    assert outcome.ended == "failed"
    assert (good.code, good.replies) == (StatusCode.OK, [b"fine"])
    (record,) = complaints(caplog)
    assert record.getMessage() == f"{GO} was sent what it doesn't take: The request can't be decoded"
    assert record.exc_info is None
    assert record.__dict__["request_id"] == end.get("x-request-id")
    assert record.__dict__["correlation_id"] == end.get("x-correlation-id")


@pytest.mark.parametrize("name", ["unary", "iterates"])
async def test_a_client_that_sends_garbage_uses_up_its_limit(name: str) -> None:
    kind, handler = reader(name)
    async with serving(handler, RateLimitPolicy(MemoryStore(), "2/hour")) as channel:
        codes = [(await ask(channel, GO, kind, send=[BAD])).code for _ in range(3)]
    assert codes == [StatusCode.INTERNAL, StatusCode.INTERNAL, StatusCode.RESOURCE_EXHAUSTED]


async def test_garbage_costs_what_its_bytes_cost() -> None:
    async def weight(call: Any, _admission: Any) -> int:
        return len(await call.payload(100))

    _, handler = reader("unary")
    rule = Rule("10/hour", cost=weight)
    async with serving(handler, RateLimitPolicy(MemoryStore(), rule)) as channel:
        end = await ask(channel, send=[BAD])
    assert (end.code, end.get("x-ratelimit-remaining")) == (StatusCode.INTERNAL, "7")


async def test_messages_before_the_broken_one_are_answered() -> None:
    kind, handler = reader("echoes")
    async with serving(handler) as channel:
        end = await ask(channel, GO, kind, send=[GOOD, GOOD, BAD, GOOD])
    assert (end.code, end.replies) == (StatusCode.INTERNAL, [b"fine", b"fine"])
    assert end.details == "The request can't be decoded"


@pytest.mark.parametrize("where", ["policy", "decorator"])
async def test_a_key_that_came_with_garbage_is_free(where: str) -> None:
    policies: list[Policy] = [IdempotencyPolicy(MemoryStore())] if where == "policy" else []
    function = idempotent()(_unary) if where == "decorator" else _unary
    handler: Any = grpc.unary_unary_rpc_method_handler(function, StringValue.FromString)
    async with serving(handler, *policies) as channel:
        bad = await ask(channel, GO, "unary_unary", KEY, send=[BAD])
        ends = [await ask(channel, GO, "unary_unary", KEY, send=[GOOD]) for _ in range(2)]
    assert bad.code is StatusCode.INTERNAL
    assert [(end.code, end.get("x-idempotent-replayed")) for end in ends] == [
        (StatusCode.OK, None),
        (StatusCode.OK, "true"),
    ]


async def test_a_refused_stream_of_garbage_is_refused_all_the_same() -> None:
    kind, handler = reader("echoes")
    async with serving(handler, RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        await ask(channel, GO, kind, send=[GOOD])
        end = await ask(channel, GO, kind, send=[BAD])
    assert (end.code, end.details) == (StatusCode.RESOURCE_EXHAUSTED, "Too many requests")


@pytest.mark.parametrize("reply", [None, bytearray(b"x"), 7], ids=repr)
@pytest.mark.parametrize("metadata", [(), (KEY,)], ids=["plain", "keyed"])
async def test_a_reply_of_the_wrong_type_is_internal_in_our_words(reply: Any, metadata: Any) -> None:
    async def act(_context: Any) -> Any:
        return reply

    async with serving(STYLES["unary_unary"].make(act), IdempotencyPolicy(MemoryStore())) as channel:
        end = await ask(channel, GO, "unary_unary", *metadata)
    assert (end.code, end.details) == (StatusCode.INTERNAL, "Internal error")
    assert end.get("x-request-id")


@pytest.mark.parametrize("metadata", [(), (KEY,)], ids=["plain", "keyed"])
async def test_text_is_sent_as_bytes_as_grpc_does(metadata: Any) -> None:
    async def act(_context: Any) -> Any:
        return "text"

    async with serving(STYLES["unary_unary"].make(act), IdempotencyPolicy(MemoryStore())) as channel:
        end = await ask(channel, GO, "unary_unary", *metadata)
    assert (end.code, end.replies) == (StatusCode.OK, [b"text"])


@pytest.mark.parametrize("style", [*STYLES.values(), *SYNC_STYLES.values()], ids=lambda style: style.kind)
async def test_a_reply_of_the_wrong_type_is_internal_for_every_style(style: Any) -> None:
    class Reply:
        pass

    async def act(_context: Any) -> Any:
        return Reply()

    make: Any = style.make(act if style in STYLES.values() else lambda _context: Reply())
    async with serving(make) as channel:
        end = await ask(channel, GO, style.kind)
    assert (end.code, end.replies) == (StatusCode.INTERNAL, [])
    assert end.details.endswith("Internal error")
    assert "bytes" not in end.details
    assert end.get("x-request-id")


# -- names, values and sizes


@pytest.mark.parametrize("name", ["X-Request-ID", "X-Correlation-ID", "Idempotency-Key", ":weird"])
async def test_an_illegal_name_ends_at_grpc_and_no_policy_hears_of_it(name: str) -> None:
    witness = Witness()
    async with frames(STYLES["unary_unary"].make(ok), witness) as client:
        end = await client.call(GO, (name, "abc"))
        assert (end.status, witness.calls) == (StatusCode.INTERNAL.value[0], [])
        assert (await client.call(GO)).status == 0


ILLEGAL = {
    "utf-8": "caf\u00e9".encode(),
    "latin-1": b"caf\xe9",
    "newline": b"a\nx-admin: yes",
    "return": b"a\rb",
    "nul": b"a\x00b",
    "escape": b"\x1b[31mred",
    "7 KB": b"x" * 7000,
}


@pytest.mark.parametrize("value", ILLEGAL.values(), ids=ILLEGAL)
@pytest.mark.parametrize("name", ["x-correlation-id", "x-request-id", "traceparent"])
async def test_an_illegal_id_is_replaced_and_never_echoed(name: str, value: bytes) -> None:
    async with frames(STYLES["unary_unary"].make(ok)) as client:
        end = await client.call(GO, (name, value))
    assert end.status == 0
    assert len(end.headers["x-correlation-id"]) == 32
    assert end.headers["x-request-id"].startswith("req_")
    assert value.decode("latin-1") not in "".join(end.headers.values())


@pytest.mark.parametrize("value", [value for value in ILLEGAL.values() if len(value) < 100])
async def test_an_illegal_key_is_refused_and_never_echoed(value: bytes) -> None:
    act = Counts()
    async with frames(STYLES["unary_unary"].make(act), IdempotencyPolicy(MemoryStore())) as client:
        end = await client.call(GO, ("idempotency-key", value))
    assert (end.status, act.runs) == (StatusCode.INVALID_ARGUMENT.value[0], 0)
    assert value.decode("latin-1") not in "".join(end.headers.values())


@pytest.mark.parametrize("size", [9_000, 15_000, 17_000, 60_000])
async def test_metadata_of_any_size_is_served_or_refused_and_the_next_call_is_served(size: int) -> None:
    act, witness = Counts(), Witness()
    async with serving(STYLES["unary_unary"].make(act), witness) as channel:
        end = await ask(channel, GO, "unary_unary", ("x-big", "x" * size))
        heard = len(witness.calls)
        assert (await ask(channel)).code is StatusCode.OK
    # grpc draws lots between its soft bound of 8 KiB and its hard one of 16 KiB, before anybody of ours is asked.
    possible = {(StatusCode.RESOURCE_EXHAUSTED, 0)} | ({(StatusCode.OK, 1)} if size < 16_384 else set())
    assert (end.code, heard) in possible


@pytest.mark.parametrize(
    "path", ["", "/", "nope", "//", f"/{SERVICE}/", f"/{SERVICE}/Go/", "/\u00ff", f"/{SERVICE}/{'x' * 5000}"]
)
async def test_a_path_that_names_no_method_is_unimplemented_and_no_policy_hears_of_it(path: str) -> None:
    witness = Witness()
    async with frames(STYLES["unary_unary"].make(ok), witness) as client:
        end = await client.call(path.encode())
        assert (end.status, witness.calls) == (StatusCode.UNIMPLEMENTED.value[0], [])
        assert (await client.call(GO)).status == 0


# -- deadlines


async def test_a_deadline_of_nothing_has_passed() -> None:
    act = Counts()
    async with frames(STYLES["unary_unary"].make(act)) as client:
        end = await client.call(GO, ("grpc-timeout", "0n"))
        assert end.status == StatusCode.DEADLINE_EXCEEDED.value[0]
        assert (await client.call(GO)).status == 0


@pytest.mark.parametrize("value", ["abc", "-1S", "5", "", "1.5S"])
async def test_a_deadline_that_is_none_ends_at_grpc_and_no_policy_hears_of_it(value: str) -> None:
    witness = Witness()
    async with frames(STYLES["unary_unary"].make(ok), witness) as client:
        end = await client.call(GO, ("grpc-timeout", value))
        assert (end.status, witness.calls) == (StatusCode.INTERNAL.value[0], [])
        assert (await client.call(GO)).status == 0


@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
async def test_an_absurd_deadline_is_none_to_worry_about_and_can_be_handed_on(kind: str) -> None:
    other = f"/{SERVICE}/Other"
    seen: list[Any] = []
    ports: list[int] = []

    async def act(context: Any) -> bytes:
        seen.append((context.time_remaining(), get_tracing_headers()))
        address = f"127.0.0.1:{ports[0]}"
        async with grpc.aio.insecure_channel(address, interceptors=client_interceptors()) as channel:
            end = await ask(channel, other)
        return end.code.name.encode()

    style = next(style for style in STYLES.values() if style.kind == kind)
    server = make_server(Pipeline(), {GO: style.make(act), other: STYLES["unary_unary"].make(ok)})
    async with asyncio.timeout(10):
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        async with raw(ports[0]) as client:
            end = await client.call(GO, ("grpc-timeout", "99999999H"))
        await server.stop(None)
    assert (end.status, end.data) == (0, message(b"OK"))
    assert len(seen) == 1


# -- leaving

RULE = Rule(Quota(1000, per=60, algorithm="concurrency"), name="at once", key=lambda _call, _admission: "all")
ROUNDS = 5


class Leaves:
    """A handler's act that stays until its client has left; and what the client does until it leaves."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()

    async def __call__(self, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        if "x-large" in sent:
            self.entered.set()
            return b"x" * 1_000_000  # more than the client's window, so that it is being written for ever
        if "x-stay" in sent:
            self.entered.set()
            await asyncio.Event().wait()
        return b"done"

    async def leave(self, client: RawClient, point: str) -> None:
        """Begin a call and cancel it."""
        body = message(b"one")
        self.entered.clear()
        if point == "with the headers":
            stream = client.open(GO, ("x-stay", "1"))
        elif point == "within the message":
            stream = client.open(GO, ("x-stay", "1"), body=body[:6])
        elif point == "with the message":
            stream = client.open(GO, ("x-stay", "1"), body=body, end=True)
        else:
            name = "x-large" if point == "in the reply" else "x-stay"
            stream = client.open(GO, (name, "1"), body=body, end=True)
            await self.entered.wait()
        if point == "in the reply":
            await stream.begun.wait()
        client.cancel(stream)


POINTS = ["with the headers", "within the message", "with the message", "in the handler", "in the reply"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", STYLES)
async def test_a_client_may_leave_at_any_point_and_leaves_nothing_behind(
    name: str, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    act, witness = Leaves(), Witness()
    limit = RateLimitPolicy(MemoryStore(), RULE)
    async with frames(STYLES[name].make(act), witness, limit) as client:
        for _ in range(ROUNDS):
            await act.leave(client, point)
            assert (await client.call(GO)).status == 0
    left = asyncio.all_tasks() - before
    if left:
        _, left = await asyncio.wait(left, timeout=5)
    assert left == set()
    assert witness.outcomes.qsize() == len(witness.calls)
    usage = await limit.peek(RULE.name, "all")
    assert usage.remaining == usage.limit
    # What grpc itself writes outside of the handler, its own logger complains of where it can't.
    assert [record for record in complaints(caplog) if record.name != "grpc._cython.cygrpc"] == []
