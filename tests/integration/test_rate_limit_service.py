"""A gateway that asks Envoy's rate-limit service draws on the very quotas that the services behind it enforce."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import httpx
import pytest
from fastapi import FastAPI, Request
from google.protobuf.wrappers_pb2 import UInt64Value

from grpc_interceptors.rate_limit_service import SERVICE, add_rate_limit_service
from grpc_interceptors.rls_pb2 import (
    UNIT_DAY,
    UNIT_HOUR,
    UNIT_MINUTE,
    UNIT_MONTH,
    UNIT_UNKNOWN,
    Descriptor,
    RateLimitRequest,
    RateLimitResponse,
)
from http_middleware import install
from resilience import (
    Admission,
    Call,
    MemoryStore,
    Pipeline,
    Quota,
    RateLimitPolicy,
    Rule,
    set_context_user,
)
from resilience.policies.rule import address, everyone
from resilience.testing import FaultyStore, ManualClock
from tests.integration.grpc_world import GO, ask, connected, make_server
from tests.integration.http_driver import connect, within

OK, OVER = RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT
DOMAIN = "payments"
SECRET = "sk_live_4242"
Entries: TypeAlias = Mapping[str, str]


@dataclass
class Gateway:
    """Asks as Envoy does."""

    channel: grpc.aio.Channel

    async def send(self, request: RateLimitRequest | bytes) -> RateLimitResponse:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        stub: Any = self.channel.unary_unary(f"/{SERVICE}/ShouldRateLimit")
        return RateLimitResponse.FromString(await within(stub(data)))

    async def ask(self, *told: Entries | Descriptor, hits: int = 0, domain: str = DOMAIN) -> RateLimitResponse:
        descriptors = [one if isinstance(one, Descriptor) else descriptor(one) for one in told]
        return await self.send(RateLimitRequest(domain=domain, descriptors=descriptors, hits_addend=hits))


def descriptor(entries: Entries, **more: Any) -> Descriptor:
    return Descriptor(entries=[Descriptor.Entry(key=key, value=value) for key, value in entries.items()], **more)


@asynccontextmanager
async def gateway(policy: RateLimitPolicy) -> AsyncIterator[Gateway]:
    server = grpc.aio.server()
    add_rate_limit_service(server, {DOMAIN: policy})
    async with connected(server) as channel:
        yield Gateway(channel)


def make(*rules: Rule | str, **options: Any) -> RateLimitPolicy:
    return RateLimitPolicy(MemoryStore(clock=ManualClock()), rules, **options)


def shop(policy: RateLimitPolicy) -> FastAPI:
    """Return an application with an authentication of its own, guarded by ``policy``."""
    app = FastAPI()

    @app.get("/orders/{number}")
    async def order(number: int) -> int:
        return number

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        if "x-user" in request.headers:
            set_context_user(request.headers["x-user"], request.headers.get("x-tenant"))
        return await call_next(request)

    install(app, Pipeline([policy]))
    return app


async def status(app: FastAPI, *, peer: str = "127.0.0.1", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connect(app, address=peer, headers=named) as client:
        reply: httpx.Response = await client.get("/orders/1")
    return reply.status_code


def told(reply: RateLimitResponse) -> dict[str, str]:
    return {header.key: header.value for header in reply.response_headers_to_add}


@pytest.mark.parametrize(
    ("entries", "headers", "peer"),
    [
        ({"user": "alice"}, {"x_user": "alice"}, "127.0.0.1"),
        ({"user": "alice", "tenant": "acme"}, {"x_user": "alice", "x_tenant": "acme"}, "127.0.0.1"),
        ({"remote_address": "203.0.113.9", "user": "alice"}, {"x_user": "alice"}, "198.51.100.7"),
        ({"x-api-key": SECRET}, {"x_api_key": SECRET}, "127.0.0.1"),
        ({"X-Api-Key": SECRET, "remote_address": "203.0.113.9"}, {"x_api_key": SECRET}, "198.51.100.7"),
        ({"remote_address": "203.0.113.9"}, {}, "203.0.113.9"),
        ({"remote_address": "::ffff:203.0.113.9"}, {}, "203.0.113.9"),
        ({"remote_address": "2001:db8::1"}, {}, "2001:db8::ffff:2"),
    ],
)
async def test_the_gateway_and_http_draw_on_one_quota(entries: Entries, headers: dict[str, str], peer: str) -> None:
    policy = make("2/minute")
    app = shop(policy)
    async with gateway(policy) as asking:
        assert (await asking.ask(entries)).overall_code == OK
        assert await status(app, peer=peer, **headers) == 200
        assert (await asking.ask(entries)).overall_code == OVER
        assert await status(app, peer=peer, **headers) == 429


async def test_the_gateway_and_a_grpc_service_draw_on_one_quota() -> None:
    async def go(_request: bytes, _context: Any) -> bytes:
        return b""

    policy = make("2/minute")
    server = make_server(Pipeline([policy]), {GO: grpc.unary_unary_rpc_method_handler(go)})
    async with gateway(policy) as asking, connected(server) as channel:
        assert (await ask(channel, GO, "unary_unary", ("x-api-key", SECRET))).code is grpc.StatusCode.OK
        assert (await asking.ask({"x-api-key": SECRET})).overall_code == OK
        refused = await ask(channel, GO, "unary_unary", ("x-api-key", SECRET))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await asking.ask({"x-api-key": SECRET})).overall_code == OVER


async def test_an_answer_tells_the_limit_what_is_left_and_the_headers() -> None:
    policy = make(Rule("3/minute", name="per caller"), Rule(Quota(50, per=10), name="burst"))
    async with gateway(policy) as asking:
        first = await asking.ask({"user": "alice"})
        (answer,) = first.statuses
        assert (answer.code, answer.limit_remaining, answer.duration_until_reset.seconds) == (OK, 2, 60)
        limit = answer.current_limit
        assert (limit.name, limit.requests_per_unit, limit.unit) == ("per caller", 3, UNIT_MINUTE)
        assert told(first) == {
            "x-ratelimit-limit": "3",
            "x-ratelimit-remaining": "2",
            "x-ratelimit-reset": "60",
            "ratelimit-policy": '"per caller";q=3;w=60, "burst";q=50;w=10',
            "ratelimit": '"per caller";r=2;t=60, "burst";r=49;t=10',
        }
        await asking.ask({"user": "alice"}, hits=2)
        assert told(await asking.ask({"user": "alice"}))["retry-after"] == "60"


@pytest.mark.parametrize(
    ("quota", "unit"),
    [
        (Quota(9, per=3600), UNIT_HOUR),
        (Quota(9, calendar="day"), UNIT_DAY),
        (Quota(9, calendar="month"), UNIT_MONTH),
        (Quota(9, per=10), UNIT_UNKNOWN),
    ],
)
async def test_a_window_goes_by_the_gateways_name(quota: Quota, unit: int) -> None:
    async with gateway(make(Rule(quota))) as asking:
        assert (await asking.ask({"user": "alice"})).statuses[0].current_limit.unit == unit


async def test_a_denial_of_one_descriptor_takes_nothing_of_the_others() -> None:
    policy = make(Rule("1/minute", name="tight"), Rule("5/minute", name="wide"))
    async with gateway(policy) as asking:
        both = ({"rule": "tight", "user": "alice"}, {"rule": "wide", "user": "bob"})
        assert (await asking.ask(*both)).overall_code == OK
        for _ in range(3):
            refused = await asking.ask(*both)
            assert refused.overall_code == OVER
            assert [answer.code for answer in refused.statuses] == [OVER, OK]
    assert (await policy.peek("wide", "user:0::bob")).remaining == 4


async def test_descriptors_that_meet_in_one_count_are_one_request() -> None:
    policy = make("5/minute", Rule("9/minute", key=everyone, name="total"))
    async with gateway(policy) as asking:
        reply = await asking.ask({"user": "alice"}, {"remote_address": "203.0.113.9"}, {"rule": "total"})
    assert [answer.code for answer in reply.statuses] == [OK, OK, OK]
    assert (await policy.peek("total", "all")).remaining == 8


async def test_hits_are_the_requests_unless_a_descriptor_says_its_own() -> None:
    policy = make("9/minute")
    async with gateway(policy) as asking:
        await asking.ask({"user": "alice"}, descriptor({"user": "bob"}, hits_addend=UInt64Value(value=5)), hits=3)
    assert (await policy.peek("9/minute", "user:0::alice")).remaining == 6
    assert (await policy.peek("9/minute", "user:0::bob")).remaining == 4


async def test_no_hits_only_look_and_are_refused_where_nothing_is_left() -> None:
    policy = make("2/minute")
    app = shop(policy)
    look = descriptor({"user": "alice"}, hits_addend=UInt64Value())
    async with gateway(policy) as asking:
        for _ in range(2):
            seen = await asking.ask(look)
            assert (seen.overall_code, told(seen)) == (OK, {})
            assert await status(app, x_user="alice") == 200
        refused = await asking.ask(look, {"user": "bob"})
        assert [answer.code for answer in refused.statuses] == [OVER, OK]
        assert told(refused)["retry-after"] == "60"
    assert (await policy.peek("2/minute", "user:0::bob")).remaining == 2


async def test_what_no_rule_concerns_is_ok_and_without_a_limit() -> None:
    policy = make("1/minute", Rule("1/minute", key=everyone, name="total"))
    async with gateway(policy) as asking:
        for _ in range(3):
            reply = await asking.ask({"colour": "blue"}, {"user": ""}, {"rule": "no such", "user": "alice"})
            assert reply.overall_code == OK
            assert [(answer.code, answer.HasField("current_limit")) for answer in reply.statuses] == [(OK, False)] * 3
            assert (await asking.ask({"user": "alice"}, domain="another")).overall_code == OK
    assert (await policy.peek("total", "all")).remaining == 1


async def test_requests_whose_sender_is_not_told_are_no_caller_of_their_own() -> None:
    policy = make(Rule("1/minute", name="each"), Rule("5/minute", key=everyone, name="total"))
    async with gateway(policy) as asking:
        for left in (4, 3, 2):
            assert (await asking.ask({"rule": "each"})).overall_code == OK
            assert (await asking.ask({"rule": "total"})).statuses[0].limit_remaining == left


async def test_a_rule_of_an_operation_counts_for_that_alone() -> None:
    policy = make(Rule("1/minute", operations=["GET /orders/{number}"], name="orders"))
    app = shop(policy)
    entries = {"user": "alice", "operation": "GET /orders/{number}"}
    async with gateway(policy) as asking:
        assert not (await asking.ask({"user": "alice", "operation": "GET /else"})).statuses[0].HasField("current_limit")
        assert await status(app, x_user="alice") == 200
        assert (await asking.ask(entries)).overall_code == OVER


async def test_a_rule_of_the_edge_knows_no_user_here_either() -> None:
    policy = make(Rule("1/minute", stage="edge", name="flood"))
    app = shop(policy)
    async with gateway(policy) as asking:
        assert await status(app, peer="203.0.113.9", x_user="alice") == 200
        assert (await asking.ask({"remote_address": "203.0.113.9", "user": "bob"})).overall_code == OVER


async def test_a_tier_is_looked_up_for_whom_the_gateway_names() -> None:
    def plan(_call: Call, admission: Admission) -> str:
        return "5/minute" if admission.context.tenant_id == "acme" else "1/minute"

    async with gateway(make(Rule(plan))) as asking:
        big = await asking.ask({"user": "alice", "tenant": "acme"})
        small = await asking.ask({"user": "alice"})
    assert [reply.statuses[0].current_limit.requests_per_unit for reply in (big, small)] == [5, 1]


async def test_rules_in_shadow_and_permits_are_left_to_the_services() -> None:
    policy = make(
        Rule("1/minute", shadow=True, name="trial"),
        Rule(Quota(1, per=30, algorithm="concurrency"), name="at once"),
        Rule("9/minute", name="each"),
    )
    async with gateway(policy) as asking:
        for _ in range(3):
            assert (await asking.ask({"user": "alice"})).overall_code == OK
        assert 'at once"' not in told(await asking.ask({"user": "alice"}))["ratelimit"]


async def test_the_gateways_own_limit_stands_on_the_same_count() -> None:
    policy = make("2/second and 100/minute")
    limit = Descriptor.Override(requests_per_unit=3, unit=UNIT_MINUTE)
    async with gateway(policy) as asking:
        await asking.ask({"user": "alice"}, hits=2)
        reply = await asking.ask(descriptor({"rule": "100/minute", "user": "alice"}, limit=limit))
        assert (reply.overall_code, reply.statuses[0].limit_remaining) == (OK, 0)
        reply = await asking.ask(descriptor({"rule": "100/minute", "user": "alice"}, limit=limit))
        assert (reply.overall_code, reply.statuses[0].current_limit.requests_per_unit) == (OVER, 3)
    assert (await policy.peek("100/minute", "user:0::alice")).remaining == 97


def _bad(*told: Descriptor, **fields: Any) -> RateLimitRequest:
    return RateLimitRequest(**{"domain": DOMAIN, "descriptors": told or [descriptor({"user": SECRET})], **fields})


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(_bad(domain=""), id="no domain"),
        pytest.param(RateLimitRequest(domain=DOMAIN), id="no descriptors"),
        pytest.param(_bad(*[descriptor({"user": SECRET})] * 33), id="too many descriptors"),
        pytest.param(_bad(Descriptor()), id="no entries"),
        pytest.param(_bad(descriptor({f"k{n}": SECRET for n in range(33)})), id="too many entries"),
        pytest.param(_bad(descriptor({"": SECRET})), id="an empty key"),
        pytest.param(_bad(descriptor({SECRET * 99: "v"})), id="a long key"),
        pytest.param(_bad(descriptor({"user": SECRET * 999})), id="a long value"),
        pytest.param(_bad(hits_addend=2**32 - 1), id="too many hits"),
        pytest.param(_bad(descriptor({"user": SECRET}, hits_addend=UInt64Value(value=2**63))), id="absurd hits"),
        pytest.param(_bad(descriptor({"user": SECRET}, is_negative_hits=True)), id="hits given back"),
        pytest.param(
            _bad(descriptor({"user": SECRET}, limit=Descriptor.Override(requests_per_unit=1, unit=UNIT_DAY))),
            id="a limit of another window",
        ),
        pytest.param(
            _bad(descriptor({"user": SECRET}, limit=Descriptor.Override(requests_per_unit=0, unit=UNIT_MINUTE))),
            id="a limit of nothing",
        ),
    ],
)
async def test_what_can_not_be_understood_is_refused_in_our_own_words(
    request_: RateLimitRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with gateway(make("1/minute")) as asking:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking.send(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert SECRET not in f"{caught.value.details()}{caplog.text}"
        assert (await asking.ask({"user": SECRET})).overall_code == OK  # nothing was taken


async def test_a_failing_function_of_a_rule_is_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def key(_call: Call, admission: Admission) -> str:
        raise LookupError(admission.context.user_id)

    async with gateway(make(Rule("1/minute", key=key))) as asking:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking.ask({"user": SECRET})
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "LookupError" in caplog.text
    assert SECRET not in f"{caught.value.details()}{caplog.text}"


@pytest.mark.parametrize(("way", "codes"), [("open", [OK, OK]), ("closed", [OVER, OVER]), ("local", [OK, OVER])])
async def test_without_its_store_a_rule_does_what_it_declares(way: Any, codes: list[int]) -> None:
    store = FaultyStore(MemoryStore(clock=ManualClock()))
    policy = RateLimitPolicy(store, [Rule("1/minute", on_outage=way)])
    async with gateway(policy) as asking:
        store.down = True
        assert [(await asking.ask({"user": "alice"})).overall_code for _ in codes] == codes
        store.down = False
        assert (await asking.ask({"user": "alice"})).overall_code == OK


async def test_without_the_store_the_gateway_and_http_share_this_processs_part() -> None:
    store = FaultyStore(MemoryStore(clock=ManualClock()))
    policy = RateLimitPolicy(store, [Rule("6/minute", on_outage="local")], replicas=3)
    app = shop(policy)
    async with gateway(policy) as asking:
        store.down = True
        assert (await asking.ask({"user": "alice"})).overall_code == OK
        assert await status(app, x_user="alice") == 200
        assert (await asking.ask({"user": "alice"})).overall_code == OVER
        assert await status(app, x_user="alice") == 429


async def test_one_closed_rule_closes_a_request_whose_store_is_gone() -> None:
    store = FaultyStore(MemoryStore(clock=ManualClock()))
    rules = [Rule("1/minute", on_outage="closed", name="shut"), Rule("1/minute", key=address, name="ajar")]
    async with gateway(RateLimitPolicy(store, rules)) as asking:
        store.down = True
        reply = await asking.ask({"rule": "shut", "user": "alice"}, {"rule": "none"})
        assert [answer.code for answer in reply.statuses] == [OVER, OK]
        assert told(reply) == {"retry-after": "1"}
        assert (await asking.ask({"rule": "ajar", "remote_address": "203.0.113.9"})).overall_code == OK


# As the classes that gRPC's own package generates from Envoy's files serialise them.
_ENVOYS_REQUEST = bytes.fromhex(
    "0a087061796d656e747312340a1d0a0e72656d6f74655f61646472657373120b3230332e302e3131332e390a0d0a04757365721205616c"
    "69636512040807100212130a0d0a0472756c651205746f74616c1a0208051802"
)
_ENVOYS_RESPONSE = bytes.fromhex(
    "080212020801121b0802120b080310021a05746f74616c1803220808011080cab5ee011a100a0b72657472792d6166746572120132"
)


async def test_the_bytes_are_envoys() -> None:
    request = RateLimitRequest.FromString(_ENVOYS_REQUEST)
    assert request.SerializeToString() == _ENVOYS_REQUEST
    assert (request.hits_addend, request.descriptors[1].hits_addend.value) == (2, 5)
    response = RateLimitResponse.FromString(_ENVOYS_RESPONSE)
    assert response.SerializeToString() == _ENVOYS_RESPONSE
    assert response.statuses[1].current_limit.name == "total"

    policy = make("100/minute", Rule("9/minute", key=everyone, name="total"))
    async with gateway(policy) as asking:
        assert (await asking.send(_ENVOYS_REQUEST)).overall_code == OK
    assert (await policy.peek("100/minute", "user:0::alice")).remaining == 98
    assert (await policy.peek("total", "all")).remaining == 4
