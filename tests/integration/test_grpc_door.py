"""What the interceptor lets through untouched, what it refuses at the start, and what stands around it."""

from collections.abc import Iterator
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from examples.payments.grpc_door import build_server
from examples.payments.service import CREATE_PAYMENT, PaymentService
from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc
from grpc_interceptors import ResilienceInterceptor, add_health
from resilience import (
    ConfigurationError,
    HealthChecker,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    Rule,
    Selective,
)
from tests.integration.grpc_world import (
    GO,
    KINDS,
    STYLES,
    Pair,
    Waits,
    Witness,
    ask,
    connected,
    generic,
    make_server,
    ok,
    serving,
    start,
    told,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
PAYMENTS = "/examples.payments.v1.PaymentService"
CREATE = f"{PAYMENTS}/CreatePayment"
METHODS = {
    "unary_unary": CREATE,
    "unary_stream_generator": f"{PAYMENTS}/WatchPayment",
    "stream_unary_iterator": f"{PAYMENTS}/ImportPayments",
    "stream_stream_generator": GO,
}
unary = STYLES["unary_unary"].make


@pytest.mark.parametrize("path", ["/test.Things/Nothing", "/test.Nothing/Go"])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_unknown_method_stays_unknown_and_no_policy_hears_of_it(kind: str, path: str) -> None:
    witness = Witness()
    async with serving(unary(ok), witness) as channel:
        end = await told(start(channel, path, kind))
        assert (end.code, end.get("x-request-id")) == (StatusCode.UNIMPLEMENTED, None)
        assert witness.calls == []
        await ask(channel)
        assert [call.operation for call in witness.calls] == [GO]


async def test_a_policy_sees_the_call_as_it_is() -> None:
    witness = Witness()
    async with serving({path: STYLES[name].make(ok) for name, path in METHODS.items()}, witness) as channel:
        for name, path in METHODS.items():
            await ask(channel, path, STYLES[name].kind, ("x-many", "1"), ("x-many", "2"))
    seen = {call.operation: (call.protocol, call.peer, call.streaming, call.safe) for call in witness.calls}
    assert seen == {
        CREATE: ("grpc", "127.0.0.1", False, False),
        f"{PAYMENTS}/WatchPayment": ("grpc", "127.0.0.1", True, True),
        f"{PAYMENTS}/ImportPayments": ("grpc", "127.0.0.1", True, False),
        GO: ("grpc", "127.0.0.1", True, False),
    }
    assert [call.metadata.get_all("x-many") for call in witness.calls] == [["1", "2"]] * 4
    assert witness.calls[0].metadata.get("x-many") == "1"


async def test_a_rule_for_one_method_leaves_the_others_alone() -> None:
    policy = RateLimitPolicy(MemoryStore(), Rule("1/hour", operations=[CREATE]))
    other = f"{PAYMENTS}/GetPayment"
    async with serving({CREATE: unary(ok), other: unary(ok)}, policy) as channel:
        codes = [(await ask(channel, path)).code for path in (CREATE, other, other, CREATE)]
        last = await ask(channel, other)
    assert codes == [StatusCode.OK] * 3 + [StatusCode.RESOURCE_EXHAUSTED]
    assert last.get("x-ratelimit-limit") is None


async def test_health_is_exempt_from_every_policy() -> None:
    witness = Witness()
    server = make_server(Pipeline([witness, RateLimitPolicy(MemoryStore(), "1/hour")]), {})
    add_health(server, HealthChecker())
    async with connected(server) as channel:
        ends = [await ask(channel, "/grpc.health.v1.Health/Check", send=[b""]) for _ in range(3)]
    assert [(end.code, end.get("x-request-id")) for end in ends] == [(StatusCode.OK, None)] * 3
    assert health_pb2.HealthCheckResponse.FromString(ends[0].replies[0]).status == 1
    assert witness.calls == []


async def test_reflection_is_exempt_from_every_policy() -> None:
    witness = Witness()
    server = make_server(Pipeline([witness, RateLimitPolicy(MemoryStore(), "1/hour")]), {})
    reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    path = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
    async with connected(server) as channel:
        ends = [await ask(channel, path, "stream_stream", send=[request]) for _ in range(3)]
    assert [(end.code, end.get("x-request-id")) for end in ends] == [(StatusCode.OK, None)] * 3
    assert witness.calls == []


EXEMPT = ("grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.channelz.v1.Channelz")


@pytest.mark.parametrize("service", EXEMPT)
async def test_only_the_exact_service_is_exempt(service: str) -> None:
    witness = Witness()
    similar = [f"/{service}X/Check", f"/{service}.Extra/Check", f"/x.{service}/Check", f"/{service.lower()}/Check"]
    async with serving({path: unary(ok) for path in (f"/{service}/Check", *similar)}, witness) as channel:
        exempt = await ask(channel, f"/{service}/Check")
        others = [await ask(channel, path) for path in similar]
    assert (exempt.code, exempt.get("x-request-id")) == (StatusCode.OK, None)
    assert all(end.get("x-request-id") for end in others)
    assert [call.operation for call in witness.calls] == similar


class Reads(grpc.aio.ServerInterceptor):
    """Looks at each reply of a unary method, and may put another in its place."""

    def __init__(self, replace: Any = None) -> None:
        self.replies: list[Any] = []
        self._replace = replace

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler: Any = await continuation(handler_call_details)

        async def around(request: Any, context: Any) -> Any:
            reply = await handler.unary_unary(request, context)
            self.replies.append(reply)
            return reply if self._replace is None else self._replace(reply)

        return grpc.unary_unary_rpc_method_handler(around, handler.request_deserializer, handler.response_serializer)


def creates() -> Any:
    async def handle(_request: pb.CreatePaymentRequest, _context: Any) -> pb.Payment:
        return pb.Payment(id="p1", amount=100)

    return grpc.unary_unary_rpc_method_handler(
        handle, pb.CreatePaymentRequest.FromString, lambda message: message.SerializeToString()
    )


async def test_an_interceptor_before_ours_sees_a_message_fresh_or_replayed() -> None:
    reads = Reads()
    server = make_server(Pipeline([IdempotencyPolicy(MemoryStore())]), {CREATE: creates()}, reads)
    async with connected(server) as channel:
        ends = [await ask(channel, CREATE, "unary_unary", KEY, send=[b""]) for _ in range(2)]
    assert ends[1].get("x-idempotent-replayed") == "true"
    assert ends[0].replies == ends[1].replies
    assert reads.replies == [pb.Payment(id="p1", amount=100)] * 2


async def test_a_reply_that_an_interceptor_before_ours_puts_in_place_is_what_leaves() -> None:
    reads = Reads(lambda reply: pb.Payment(id=reply.id + "-seen"))
    server = make_server(Pipeline([IdempotencyPolicy(MemoryStore())]), {CREATE: creates()}, reads)
    async with connected(server) as channel:
        ends = [await ask(channel, CREATE, "unary_unary", KEY, send=[b""]) for _ in range(2)]
    assert [pb.Payment.FromString(end.replies[0]).id for end in ends] == ["p1-seen", "p1-seen"]


async def test_a_reply_that_an_interceptor_before_ours_changes_in_place_leaves_changed() -> None:
    def stamp(reply: pb.Payment) -> pb.Payment:
        reply.status = "stamped"
        return reply

    async with connected(make_server(Pipeline(), {CREATE: creates()}, Reads(stamp))) as channel:
        end = await ask(channel, CREATE, send=[b""])
    assert pb.Payment.FromString(end.replies[0]) == pb.Payment(id="p1", amount=100, status="stamped")


async def test_an_interceptor_before_ours_sees_each_style_as_it_was_written() -> None:
    seen: dict[str, bool] = {}

    class Looks(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
            handler: Any = await continuation(handler_call_details)
            inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
            assert isasyncgenfunction(inner) != iscoroutinefunction(inner)
            seen[handler_call_details.method] = isasyncgenfunction(inner)
            return handler

    paths = {name: f"/test.Things/{name}" for name in STYLES}
    server = make_server(Pipeline(), {paths[name]: style.make(ok) for name, style in STYLES.items()}, Looks())
    async with connected(server) as channel:
        for name, style in STYLES.items():
            assert (await ask(channel, paths[name], style.kind)).code is StatusCode.OK
    assert seen == {path: name.endswith("_generator") for name, path in paths.items()}


async def test_an_interceptor_after_ours_that_makes_new_handlers_is_obeyed_each_time() -> None:
    made: Iterator[int] = iter(range(10))

    class Rebuilds(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
            await continuation(handler_call_details)
            number = next(made)

            async def handle(_request: bytes, _context: Any) -> bytes:
                return b"%d" % number

            return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server(interceptors=[ResilienceInterceptor(Pipeline()), Rebuilds()])
    server.add_generic_rpc_handlers(generic({GO: unary(ok)}))
    async with connected(server) as channel:
        ends = [await ask(channel) for _ in range(3)]
    assert [end.replies for end in ends] == [[b"0"], [b"1"], [b"2"]]
    assert all(end.get("x-request-id") for end in ends)


@pytest.mark.parametrize(
    "operation", [f"{PAYMENTS}/CreatePaymentt", f"{PAYMENTS}/", PAYMENTS, "/no.such.Service/CreatePayment"]
)
def test_a_policy_for_a_method_that_is_not_there_stops_the_start(operation: str) -> None:
    for policy in (
        Selective(IdempotencyPolicy(MemoryStore()), [operation]),
        RateLimitPolicy(MemoryStore(), Rule("1/hour", operations=[CREATE, operation])),
    ):
        with pytest.raises(ConfigurationError, match=operation):
            ResilienceInterceptor(Pipeline([policy]))
        with pytest.raises(ConfigurationError, match=operation):
            ResilienceInterceptor(Pipeline(edge=[policy]))


def test_the_message_about_a_wrong_method_names_the_right_ones() -> None:
    policy = Selective(IdempotencyPolicy(MemoryStore()), [f"{PAYMENTS}/Create"])
    with pytest.raises(ConfigurationError, match="CreatePayment, GetPayment, ImportPayments, WatchPayment"):
        ResilienceInterceptor(Pipeline([policy]))


def test_operations_of_the_other_door_are_not_ours_to_check() -> None:
    ResilienceInterceptor(Pipeline([Selective(IdempotencyPolicy(MemoryStore()), ["POST /payments", CREATE])]))


async def test_a_plain_function_is_served_and_guarded() -> None:
    ran: list[bytes] = []

    def handle(request: bytes, _context: Any) -> bytes:
        ran.append(request)
        return b"done"

    handler: Any = grpc.unary_unary_rpc_method_handler(handle)
    async with serving(handler, RateLimitPolicy(MemoryStore(), "1/hour")) as channel:
        ends = [await ask(channel) for _ in range(2)]
    assert [end.code for end in ends] == [StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]
    assert ran == [b"one"]


async def test_the_demo_takes_each_of_its_four_kinds_of_calls() -> None:
    pipeline = Pipeline([Selective(IdempotencyPolicy(MemoryStore(), operation=CREATE_PAYMENT), [CREATE])])
    async with connected(build_server(PaymentService(0), pipeline, HealthChecker())) as channel:
        stub = payments_pb2_grpc.PaymentServiceStub(channel)
        request = pb.CreatePaymentRequest(amount=100, currency="EUR")
        first = await stub.CreatePayment(request, metadata=(KEY,))
        again = await stub.CreatePayment(request, metadata=(KEY,))
        assert again == first
        watched = [payment.status async for payment in stub.WatchPayment(pb.WatchPaymentRequest(id=first.id))]
        assert watched[-1] == "settled"
        found = await stub.GetPayment(pb.GetPaymentRequest(id=first.id), metadata=(KEY,))
        assert (found.id, found.status) == (first.id, "settled")
        imported = await stub.ImportPayments(iter([request] * 3))
        assert imported.imported == 3


async def test_a_busy_server_that_refuses_by_itself_takes_nothing_from_a_limit() -> None:
    act = Waits()
    interceptor = ResilienceInterceptor(Pipeline([RateLimitPolicy(MemoryStore(), "2/hour")]))
    server = grpc.aio.server(interceptors=[interceptor], maximum_concurrent_rpcs=1)
    server.add_generic_rpc_handlers(generic({GO: unary(act)}))
    async with connected(server) as channel:
        call = start(channel)
        await act.entered.wait()
        busy = [await ask(channel) for _ in range(3)]
        act.gate.set()
        await call
        last = await ask(channel)
    assert {(end.code, end.get("x-ratelimit-limit")) for end in busy} == {(StatusCode.RESOURCE_EXHAUSTED, None)}
    assert (last.code, last.get("x-ratelimit-remaining"), act.runs) == (StatusCode.OK, "0", 2)
