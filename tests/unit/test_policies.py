import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from resilience import (
    PROCEED,
    Admission,
    Call,
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Outcome,
    PayloadTooLargeError,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    Reason,
    Reject,
    Replay,
    Reply,
    RequestContext,
    RequestContextPolicy,
    Rule,
    Selective,
    Verdict,
    get_request_context,
    get_request_id,
    set_context_user,
)
from resilience.call import Protocol
from resilience.decisions.idempotency import Claim, Claimed, InProgress
from resilience.policies.heartbeat import Heartbeat
from resilience.policies.request_context import IdMint
from resilience.policies.rule import address, everyone
from resilience.policies.selective import declared_operations
from resilience.settings import Settings
from resilience.stores.base import Want
from resilience.testing import FaultyStore, ManualClock

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
MINTED = re.compile(r"[0-9a-f]{32}")
REPLY = Reply("http", 201, (("content-type", "application/json"),), b'{"id":1}')


class Sent:
    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._pairs = pairs
        self.sent = dict(reversed(pairs))

    def get(self, name: str) -> str | None:
        return next(iter(self.get_all(name)), None)

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]


def call(
    *pairs: tuple[str, str],
    protocol: Protocol = "http",
    operation: str = "POST /orders",
    peer: str = "10.0.0.1",
    body: bytes = b"",
    resource: str = "",
    streaming: bool = False,
    safe: bool = False,
) -> Call:
    async def payload(limit: int) -> bytes:
        if len(body) > limit:
            raise PayloadTooLargeError(limit)
        return body

    return Call(
        protocol,
        operation,
        Sent(*pairs),
        peer=peer,
        payload=payload,
        resource=resource,
        streaming=streaming,
        safe=safe,
    )


def keyed(
    key: str = "k",
    *,
    protocol: Protocol = "http",
    operation: str = "POST /orders",
    peer: str = "10.0.0.1",
    body: bytes = b"",
    resource: str = "",
) -> Call:
    pair = ("idempotency-key", key)
    return call(pair, protocol=protocol, operation=operation, peer=peer, body=body, resource=resource)


async def ask(policies: Policy | list[Policy], call_: Call) -> tuple[Verdict, Admission]:
    """Ask core policies of one call that ends well, or is refused."""
    pipeline = Pipeline(policies if isinstance(policies, list) else [policies])
    async with pipeline.admit(call_) as admission:
        return await admission.admit(pipeline.core), admission


async def run(
    policy: Policy,
    call_: Call,
    ended: Literal["completed", "failed", "cancelled"] = "completed",
    reply: Reply | None = REPLY,
) -> Verdict:
    """Ask, and if the call may go on, run it to the given end."""
    pipeline = Pipeline([policy])
    async with pipeline.admit(call_) as admission:
        verdict = await admission.admit(pipeline.core)
        if verdict is PROCEED:
            await admission.settle(Outcome(ended, reply))
        return verdict


async def break_off(policy: Policy, call_: Call, error: BaseException) -> None:
    """Ask, and end the call with an exception."""
    pipeline = Pipeline([policy])
    async with pipeline.admit(call_) as admission:
        assert await admission.admit(pipeline.core) is PROCEED
        raise error


def refusal(verdict: Verdict) -> Reject:
    assert isinstance(verdict, Reject)
    return verdict


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FaultyStore:
    return FaultyStore(MemoryStore(clock=clock))


# --- the request context


async def test_a_call_gets_ids_that_nobody_else_has() -> None:
    async with Pipeline().admit(call()) as admission:
        context = get_request_context()
        assert context is admission.context
        assert context.request_id is not None
        assert context.correlation_id is not None
        assert context.request_id.startswith("req_")
        assert MINTED.fullmatch(context.request_id[4:])
        assert MINTED.fullmatch(context.correlation_id)
        assert context.request_id[4:] != context.correlation_id
        assert context.protocol == "http"
        assert admission.metadata == [
            ("x-request-id", context.request_id),
            ("x-correlation-id", context.correlation_id),
        ]
    assert get_request_id() is None


def test_an_id_is_never_minted_twice() -> None:
    mint = IdMint()
    ids = [mint() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(MINTED.fullmatch(one) for one in ids)


async def test_an_application_may_mint_its_own() -> None:
    names = iter(["one", "two"])
    async with Pipeline(edge=[RequestContextPolicy(lambda: next(names))]).admit(call()) as admission:
        assert (admission.context.request_id, admission.context.correlation_id) == ("req_one", "two")


async def test_a_callers_valid_ids_are_kept_and_its_request_id_becomes_the_parent() -> None:
    sent = call(("x-request-id", "theirs"), ("x-correlation-id", "chain"), protocol="grpc")
    async with Pipeline().admit(sent) as admission:
        context = admission.context
        assert context.parent_request_id == "theirs"
        assert context.request_id != "theirs"
        assert context.correlation_id == "chain"
        assert context.protocol == "grpc"
        assert ("x-correlation-id", "chain") in admission.metadata


@pytest.mark.parametrize("bad", ["", "a\x00b", "a\nb", "a\r\nx: y", "a" * 129, "a\x85b", "a b", 'a"b'])
async def test_a_callers_invalid_ids_are_replaced_and_never_echoed(bad: str) -> None:
    async with Pipeline().admit(call(("x-request-id", bad), ("x-correlation-id", bad))) as admission:
        context = admission.context
        assert context.parent_request_id is None
        assert context.correlation_id is not None
        assert MINTED.fullmatch(context.correlation_id)
        assert all(value != bad for _, value in admission.metadata)


async def test_a_trace_id_becomes_the_correlation_id_where_the_caller_sent_none() -> None:
    sent = call(("traceparent", TRACEPARENT), ("tracestate", "a=1"))
    async with Pipeline().admit(sent) as admission:
        context = admission.context
        assert context.correlation_id == TRACE_ID
        assert (context.traceparent, context.tracestate) == (TRACEPARENT, "a=1")
    sent = call(("traceparent", TRACEPARENT), ("x-correlation-id", "chain"))
    async with Pipeline().admit(sent) as admission:
        assert admission.context.correlation_id == "chain"
        assert admission.context.traceparent == TRACEPARENT
    sent = call(("traceparent", TRACEPARENT), ("x-correlation-id", "no good"))
    async with Pipeline().admit(sent) as admission:
        assert admission.context.correlation_id == TRACE_ID


async def test_an_invalid_trace_is_dropped_with_its_state() -> None:
    sent = call(("traceparent", TRACEPARENT + "\n"), ("tracestate", "a=1"))
    async with Pipeline().admit(sent) as admission:
        assert (admission.context.traceparent, admission.context.tracestate) == (None, None)
        assert admission.context.correlation_id != TRACE_ID


async def test_an_invalid_tracestate_leaves_its_trace() -> None:
    async with Pipeline().admit(call(("traceparent", TRACEPARENT), ("tracestate", "a=\x00"))) as admission:
        assert (admission.context.traceparent, admission.context.tracestate) == (TRACEPARENT, None)


async def test_a_user_that_authentication_set_before_the_door_is_adopted() -> None:
    set_context_user("ann", "acme")
    async with Pipeline().admit(call()) as admission:
        assert (admission.context.user_id, admission.context.tenant_id) == ("ann", "acme")
        assert admission.caller() == "user:4:acme:ann"


async def test_the_caller_is_who_is_known_by_now() -> None:
    async with Pipeline().admit(call(("x-api-key", "k"))) as admission:
        assert admission.caller().startswith("id:")
        set_context_user("ann")
        assert admission.caller() == "user:0::ann"
    async with Pipeline(identify=lambda _: None).admit(call(("x-api-key", "k"))) as admission:
        assert admission.caller() == "addr:10.0.0.1"


# --- the rate limit


async def test_a_limit_admits_its_number_of_calls_and_then_refuses_with_the_wait(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = RateLimitPolicy(store, "2/minute")
    assert (await ask(policy, call()))[0] is PROCEED
    clock.advance(10.0)
    assert (await ask(policy, call()))[0] is PROCEED
    clock.advance(20.0)
    refused = refusal((await ask(policy, call()))[0])
    assert refused.reason is Reason.RATE_LIMITED
    assert refused.retry_after == pytest.approx(30.0, abs=0.001)
    clock.advance(refused.retry_after or 0.0)
    assert (await ask(policy, call()))[0] is PROCEED


async def test_every_reply_tells_its_limits(store: FaultyStore, clock: ManualClock) -> None:
    policy = RateLimitPolicy(store, [Rule("2/minute", name="tight"), Rule("10/hour", name="wide")])
    _, admission = await ask(policy, call())
    assert admission.metadata[2:] == [
        ("x-ratelimit-limit", "2"),
        ("x-ratelimit-remaining", "1"),
        ("x-ratelimit-reset", "60"),
        ("ratelimit-policy", '"tight";q=2;w=60, "wide";q=10;w=3600'),
        ("ratelimit", '"tight";r=1;t=60, "wide";r=9;t=3600'),
    ]
    clock.advance(0.5)
    await ask(policy, call())
    clock.advance(29.5)
    verdict, admission = await ask(policy, call())
    assert refusal(verdict).reason is Reason.RATE_LIMITED
    assert ("x-ratelimit-remaining", "0") in admission.metadata
    assert ("ratelimit", '"tight";r=0;t=31, "wide";r=7;t=3600') in admission.metadata


async def test_a_reply_speaks_of_the_rule_that_is_nearest_to_its_end(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, [Rule("100/hour", cost=99, name="long"), Rule("10/minute", name="short")])
    _, admission = await ask(policy, call())
    assert ("x-ratelimit-limit", "100") in admission.metadata
    verdict, admission = await ask(policy, call())
    assert refusal(verdict).retry_after == pytest.approx(3600, abs=0.001)
    assert ("x-ratelimit-limit", "100") in admission.metadata
    assert ("x-ratelimit-remaining", "1") in admission.metadata


async def test_of_two_denials_the_longer_wait_is_told(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, ["1/minute", "1/hour", "1/s"])
    await ask(policy, call())
    verdict, admission = await ask(policy, call())
    assert refusal(verdict).retry_after == pytest.approx(3600, abs=0.001)
    assert ("x-ratelimit-reset", "3600") in admission.metadata


async def test_a_call_that_one_rule_denies_takes_nothing_of_another(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, [Rule("1/minute", name="tight"), Rule("10/hour", name="wide")])
    await ask(policy, call())
    for _ in range(5):
        assert refusal((await ask(policy, call()))[0]).reason is Reason.RATE_LIMITED
    (wide,) = await store.acquire([Want("wide", "addr:10.0.0.1", Quota(10, 3600), 0)])
    assert wide.remaining == 9


async def test_a_rule_counts_only_its_operations_and_all_of_them_together(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("2/minute", operations=["POST /orders", "/shop.Orders/Create"]))
    assert policy.operations == {"POST /orders", "/shop.Orders/Create"}
    verdict, admission = await ask(policy, call(operation="GET /orders"))
    assert verdict is PROCEED
    assert len(admission.metadata) == 2
    assert (await ask(policy, call()))[0] is PROCEED
    assert (await ask(policy, call(operation="/shop.Orders/Create", protocol="grpc")))[0] is PROCEED
    assert refusal((await ask(policy, call()))[0]).reason is Reason.RATE_LIMITED
    assert (await ask(policy, call(operation="GET /orders")))[0] is PROCEED


async def test_a_call_takes_what_its_rule_costs(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("10/minute", cost=4))
    _, admission = await ask(policy, call())
    assert ("x-ratelimit-remaining", "6") in admission.metadata
    assert (await ask(policy, call()))[0] is PROCEED
    assert refusal((await ask(policy, call()))[0]).reason is Reason.RATE_LIMITED


async def test_a_rule_that_costs_nothing_only_tells(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("1/minute", cost=0))
    for _ in range(3):
        verdict, admission = await ask(policy, call())
        assert verdict is PROCEED
        assert ("x-ratelimit-remaining", "1") in admission.metadata


async def test_a_call_that_can_never_fit_is_not_told_to_wait(store: FaultyStore) -> None:
    assert refusal((await ask(RateLimitPolicy(store, Rule("3/minute", cost=4)), call()))[0]).retry_after is None


async def test_each_caller_has_its_own_count(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "1/minute")
    for one in (call(), call(peer="10.0.0.2"), call(("x-api-key", "a")), call(("x-api-key", "b"))):
        assert (await ask(policy, one))[0] is PROCEED
    for one in (call(), call(("x-api-key", "a")), call(("x-api-key", "b"), peer="10.0.0.9")):
        assert refusal((await ask(policy, one))[0]).reason is Reason.RATE_LIMITED


async def test_a_rule_by_address_counts_whoever_is_behind_it(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("1/minute", key=address))
    assert (await ask(policy, call(("x-api-key", "a"), peer="2001:db8::1")))[0] is PROCEED
    assert isinstance((await ask(policy, call(("x-api-key", "b"), peer="2001:db8::2")))[0], Reject)
    assert (await ask(policy, call(peer="2001:db8:0:1::1")))[0] is PROCEED


async def test_a_rule_for_everyone_counts_all_together(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("1/minute", key=everyone))
    assert (await ask(policy, call()))[0] is PROCEED
    assert isinstance((await ask(policy, call(peer="10.0.0.2")))[0], Reject)


async def test_a_key_may_be_found_asynchronously(store: FaultyStore) -> None:
    async def tenant(call_: Call, _admission: Admission) -> str | None:
        return call_.metadata.get("x-tenant")

    policy = RateLimitPolicy(store, Rule("1/minute", key=tenant))
    assert (await ask(policy, call(("x-tenant", "a"))))[0] is PROCEED
    assert (await ask(policy, call(("x-tenant", "b"))))[0] is PROCEED
    assert isinstance((await ask(policy, call(("x-tenant", "a"))))[0], Reject)


async def test_a_key_of_none_exempts(store: FaultyStore) -> None:
    def unless_internal(call_: Call, _admission: Admission) -> Awaitable[str | None] | str | None:
        return None if call_.metadata.get("x-internal") else "all"

    policy = RateLimitPolicy(store, Rule("1/minute", key=unless_internal))
    for _ in range(3):
        verdict, admission = await ask(policy, call(("x-internal", "1")))
        assert verdict is PROCEED
        assert len(admission.metadata) == 2
    assert (await ask(policy, call()))[0] is PROCEED
    assert isinstance((await ask(policy, call()))[0], Reject)


async def test_while_the_store_is_gone_an_open_limit_lets_calls_in(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = RateLimitPolicy(store, "1/minute")
    store.down = True
    for _ in range(3):
        verdict, admission = await ask(policy, call())
        assert verdict is PROCEED
        assert len(admission.metadata) == 2
    assert "not enforced" in caplog.text
    store.down = False
    assert (await ask(policy, call()))[0] is PROCEED
    assert isinstance((await ask(policy, call()))[0], Reject)


async def test_while_the_store_is_gone_a_closed_limit_refuses(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = RateLimitPolicy(store, "1/minute", on_outage="closed")
    store.down = True
    refused = refusal((await ask(policy, call()))[0])
    assert refused.reason is Reason.STORE_UNAVAILABLE
    assert refused.retry_after == 1.0
    assert "refusing" in caplog.text


@pytest.mark.parametrize("rules", [["1/minute", "1/minute"], "1/minute; 1/minute", ["1/minute", Rule("1/60s")], []])
def test_each_rule_has_a_name_of_its_own(store: FaultyStore, rules: str | list[str | Rule]) -> None:
    with pytest.raises(ConfigurationError, match="name of its own"):
        RateLimitPolicy(store, rules)


def test_a_limit_is_written_as_text_rule_or_several(store: FaultyStore) -> None:
    rule = Rule("1/s", name="mine")
    assert [one.name for one in RateLimitPolicy(store, rule).rules] == ["mine"]
    assert [one.name for one in RateLimitPolicy(store, "10/second and 1000/hour").rules] == ["10/second", "1000/hour"]
    assert [one.name for one in RateLimitPolicy(store, ["5/10s; 9/day", rule]).rules] == ["5/10s", "9/day", "mine"]


def test_a_rule_is_called_by_its_quota_and_its_operations() -> None:
    assert Rule(Quota(5, 10)).name == "5/10s"
    assert Rule("5/10s", operations=["b", "a"]).name == "5/10s a b"


@pytest.mark.parametrize("name", ["", 'a"b', "a\\b", "é", "a\n", "a" * 129])
def test_a_name_that_does_not_fit_a_header_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="not a rule's name"):
        Rule("1/minute", name=name)


def test_a_rule_has_one_quota_and_no_negative_cost() -> None:
    with pytest.raises(ConfigurationError, match="one quota"):
        Rule("1/second and 10/minute")
    with pytest.raises(ConfigurationError, match="cost"):
        Rule("1/second", cost=-1)


# --- idempotency


async def test_a_call_without_a_key_passes_unless_one_is_required(store: FaultyStore) -> None:
    verdict, admission = await ask(IdempotencyPolicy(store), call())
    assert verdict is PROCEED
    assert admission.capture == 0
    refused = refusal((await ask(IdempotencyPolicy(store, required=True), call()))[0])
    assert refused.reason is Reason.IDEMPOTENCY_KEY_MISSING
    assert (await ask(IdempotencyPolicy(store, required=True), keyed()))[0] is PROCEED


@pytest.mark.parametrize("key", ["", "a b", "a\x00", "é", "k" * 300, '"k'])
async def test_a_malformed_key_is_refused_and_not_echoed(store: FaultyStore, key: str) -> None:
    refused = refusal((await ask(IdempotencyPolicy(store), keyed(key)))[0])
    assert refused.reason is Reason.IDEMPOTENCY_KEY_MALFORMED
    assert refused.retry_after is None
    assert key == "" or key not in refused.message


async def test_a_key_that_is_sent_twice_is_refused(store: FaultyStore) -> None:
    twice = call(("idempotency-key", "k"), ("idempotency-key", "k"))
    assert refusal((await ask(IdempotencyPolicy(store), twice))[0]).reason is Reason.IDEMPOTENCY_KEY_MALFORMED


async def test_a_stream_can_take_no_key(store: FaultyStore) -> None:
    stream = call(("idempotency-key", "k"), streaming=True)
    assert refusal((await ask(IdempotencyPolicy(store), stream))[0]).reason is Reason.IDEMPOTENCY_KEY_MALFORMED
    assert (await ask(IdempotencyPolicy(store), call(streaming=True)))[0] is PROCEED


@pytest.mark.parametrize("required", [True, False])
async def test_a_key_means_nothing_to_a_safe_operation(store: FaultyStore, required: bool) -> None:
    policy = IdempotencyPolicy(store, required=required)
    for _ in range(2):
        assert await run(policy, call(("idempotency-key", "k"), safe=True)) is PROCEED
    assert await run(policy, call(("idempotency-key", "k" * 300), safe=True)) is PROCEED
    assert await run(policy, call(safe=True)) is PROCEED


async def test_a_retry_gets_the_firsts_reply(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    assert await run(policy, keyed(body=b'{"a":1,"b":2}')) is PROCEED
    verdict, admission = await ask(policy, keyed('"k"', body=b'{ "b": 2, "a": 1 }'))
    assert verdict == Replay(REPLY)
    assert ("x-idempotent-replayed", "true") in admission.metadata


async def test_a_reply_is_kept_for_its_ttl(store: FaultyStore, clock: ManualClock) -> None:
    policy = IdempotencyPolicy(store, ttl=100.0)
    await run(policy, keyed())
    clock.advance(99.0)
    assert await run(policy, keyed()) == Replay(REPLY)
    clock.advance(1.0)
    assert await run(policy, keyed()) is PROCEED


@pytest.mark.parametrize("other", [keyed(body=b"other"), keyed(resource="id=2")])
async def test_a_key_with_another_payload_is_refused_during_the_run_and_after(store: FaultyStore, other: Call) -> None:
    policy = IdempotencyPolicy(store)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as first:
        assert await first.admit(pipeline.core) is PROCEED
        assert refusal(await run(policy, other)).reason is Reason.IDEMPOTENCY_PAYLOAD_MISMATCH
        await first.settle(Outcome("completed", REPLY))
    assert refusal(await run(policy, other)).reason is Reason.IDEMPOTENCY_PAYLOAD_MISMATCH
    assert await run(policy, keyed()) == Replay(REPLY)


async def test_a_twin_is_told_to_wait_while_the_first_runs(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store, lease=3.0)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as first:
        assert await first.admit(pipeline.core) is PROCEED
        refused = refusal(await run(policy, keyed()))
        assert refused.reason is Reason.IDEMPOTENCY_IN_PROGRESS
        assert refused.retry_after == 3.0
        await first.settle(Outcome("completed", REPLY))
    assert await run(policy, keyed()) == Replay(REPLY)


async def test_a_reply_of_another_door_is_not_shown_here(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store, operation="create")
    assert await run(policy, keyed(body=b"json")) is PROCEED
    over_grpc = keyed(protocol="grpc", operation="/shop.Orders/Create", body=b"protobuf")
    verdict, admission = await ask(policy, over_grpc)
    assert refusal(verdict).reason is Reason.IDEMPOTENCY_NOT_REPLAYABLE
    assert ("x-idempotent-replayed", "true") not in admission.metadata


async def test_a_key_is_its_operations_and_its_callers_own(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    for one in (keyed(), keyed(operation="POST /refunds"), keyed(peer="10.0.0.2"), keyed("K")):
        assert await run(policy, one) is PROCEED
    assert await run(policy, keyed(operation="POST /refunds")) == Replay(REPLY)


async def test_a_key_is_the_users_own_whatever_the_address(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    set_context_user("ann")
    assert await run(policy, keyed()) is PROCEED
    set_context_user("ann")
    assert await run(policy, keyed(peer="10.0.0.2")) == Replay(REPLY)
    set_context_user("bob")
    assert await run(policy, keyed()) is PROCEED


async def test_a_failed_operation_frees_its_key(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    assert await run(policy, keyed(), "failed") is PROCEED
    assert await run(policy, keyed(body=b"mended")) is PROCEED


async def test_a_call_that_a_later_policy_refuses_frees_its_key(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    nothing_left = RateLimitPolicy(store, Rule("1/minute", cost=2))
    verdict, _ = await ask([policy, nothing_left], keyed())
    assert refusal(verdict).reason is Reason.RATE_LIMITED
    assert await run(policy, keyed()) is PROCEED


async def test_an_exception_frees_the_key(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    with pytest.raises(RuntimeError):
        await break_off(policy, keyed(), RuntimeError())
    assert await run(policy, keyed()) is PROCEED


async def test_a_cancelled_operation_keeps_its_key_until_the_lease_is_out(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = IdempotencyPolicy(store, lease=30.0)
    with pytest.raises(asyncio.CancelledError):
        await break_off(policy, keyed(), asyncio.CancelledError())
    clock.advance(29.0)
    await policy._heartbeat.beat()  # a cancelled operation is not kept alive
    assert refusal(await run(policy, keyed())).reason is Reason.IDEMPOTENCY_IN_PROGRESS
    clock.advance(1.0)
    assert await run(policy, keyed()) is PROCEED


async def test_an_abandoned_key_is_not_run_again_where_the_policy_refuses(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = IdempotencyPolicy(store, takeover="refuse")
    await run(policy, keyed(), "cancelled")
    clock.advance(30.0)
    refused = refusal(await run(policy, keyed()))
    assert (refused.reason, refused.retry_after) == (Reason.IDEMPOTENCY_ABANDONED, None)


async def test_a_reply_over_the_bound_is_not_replayed_and_not_run_again(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store, max_reply=10)
    await run(policy, keyed("fits"), reply=Reply("http", 200, (), b"x" * 10))
    await run(policy, keyed("over"), reply=Reply("http", 200, (), b"x" * 11))
    await run(policy, keyed("none"), reply=None)
    assert isinstance(await run(policy, keyed("fits")), Replay)
    assert refusal(await run(policy, keyed("over"))).reason is Reason.IDEMPOTENCY_NOT_REPLAYABLE
    assert refusal(await run(policy, keyed("none"))).reason is Reason.IDEMPOTENCY_NOT_REPLAYABLE


async def test_a_door_is_asked_to_keep_as_much_as_the_greediest_policy_needs(store: FaultyStore) -> None:
    small, large = IdempotencyPolicy(store, operation="a", max_reply=10), IdempotencyPolicy(store, max_reply=20)
    for key, policies in (("one", [small, large]), ("other", [large, small])):
        pipeline = Pipeline(policies)
        async with pipeline.admit(keyed(key)) as admission:
            assert await admission.admit(pipeline.core) is PROCEED
            assert admission.capture == 20


async def test_a_payload_over_the_bound_is_refused_with_the_bound(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store, max_payload=10)
    assert await run(policy, keyed("fits", body=b"x" * 10)) is PROCEED
    refused = refusal(await run(policy, keyed("over", body=b"x" * 11)))
    assert refused.reason is Reason.PAYLOAD_TOO_LARGE
    assert "10 bytes" in refused.message


async def test_while_the_store_is_gone_a_closed_policy_refuses_keyed_calls_only(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = IdempotencyPolicy(store)
    store.down = True
    refused = refusal(await run(policy, keyed()))
    assert (refused.reason, refused.retry_after) == (Reason.STORE_UNAVAILABLE, 1.0)
    assert "refused" in caplog.text
    assert await run(policy, call()) is PROCEED


async def test_while_the_store_is_gone_an_open_policy_runs_them_unprotected(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = IdempotencyPolicy(store, on_outage="open")
    store.down = True
    for _ in range(2):
        verdict, admission = await ask(policy, keyed())
        assert verdict is PROCEED
        assert admission.capture == 0
    assert "unprotected" in caplog.text


@pytest.mark.parametrize("ended", ["completed", "failed"])
async def test_a_store_that_goes_before_the_end_changes_no_reply(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture, ended: Literal["completed", "failed"]
) -> None:
    policy = IdempotencyPolicy(store)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as admission:
        assert await admission.admit(pipeline.core) is PROCEED
        store.down = True
        await admission.settle(Outcome(ended, REPLY))
    assert "could not be recorded" in caplog.text
    assert "settle hook failed" not in caplog.text
    store.down = False
    assert refusal(await run(policy, keyed())).reason is Reason.IDEMPOTENCY_IN_PROGRESS
    clock.advance(30.0)
    assert await run(policy, keyed()) is PROCEED


async def test_a_worker_that_lost_its_lease_does_not_overwrite_the_winners_reply(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    policy = IdempotencyPolicy(store)
    pipeline = Pipeline([policy])
    late = Reply("http", 201, (), b"late")
    async with pipeline.admit(keyed()) as stalled:
        assert await stalled.admit(pipeline.core) is PROCEED
        clock.advance(30.0)
        assert await run(policy, keyed()) is PROCEED
        await stalled.settle(Outcome("completed", late))
    assert "took the idempotency key over" in caplog.text
    assert await run(policy, keyed()) == Replay(REPLY)


async def test_a_worker_that_lost_its_lease_does_not_free_the_winners_key(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = IdempotencyPolicy(store)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as stalled:
        await stalled.admit(pipeline.core)
        clock.advance(30.0)
        async with pipeline.admit(keyed()) as winner:
            assert await winner.admit(pipeline.core) is PROCEED
            await stalled.settle(Outcome("failed"))
            assert refusal(await run(policy, keyed())).reason is Reason.IDEMPOTENCY_IN_PROGRESS


@pytest.mark.parametrize(("lease", "ttl"), [(0.5, 60.0), (61.0, 60.0), (float("nan"), 60.0)])
def test_a_lease_out_of_range_is_refused(store: FaultyStore, lease: float, ttl: float) -> None:
    with pytest.raises(ConfigurationError, match="lease"):
        IdempotencyPolicy(store, lease=lease, ttl=ttl)


@pytest.mark.parametrize(("max_payload", "max_reply"), [(0, 1), (1, 0)])
def test_a_bound_of_nothing_is_refused(store: FaultyStore, max_payload: int, max_reply: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 byte"):
        IdempotencyPolicy(store, max_payload=max_payload, max_reply=max_reply)


# --- the heartbeat


async def claim(store: FaultyStore, key: str, token: str) -> Claim:
    return await store.claim(key, token, b"http:1", lease=3.0, ttl=60.0, takeover="reexecute")


async def test_a_beat_keeps_a_running_operations_lease(store: FaultyStore, clock: ManualClock) -> None:
    policy = IdempotencyPolicy(store, lease=30.0, ttl=60.0)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as admission:
        assert await admission.admit(pipeline.core) is PROCEED
        for _ in range(10):
            clock.advance(20.0)
            await policy._heartbeat.beat()
        clock.advance(29.0)
        assert refusal(await run(policy, keyed())).reason is Reason.IDEMPOTENCY_IN_PROGRESS
        await admission.settle(Outcome("completed", REPLY))
    assert policy._heartbeat._held == {}
    assert policy._heartbeat._timer is None


async def test_a_beat_renews_every_lease_that_is_held_and_no_other(store: FaultyStore, clock: ManualClock) -> None:
    heartbeat = Heartbeat(store, 3.0, 60.0)
    for key in ("one", "two", "dropped"):
        await claim(store, key, f"{key}-token")
        heartbeat.hold(key, f"{key}-token")
    heartbeat.drop("dropped-token")
    clock.advance(2.0)
    await heartbeat.beat()
    clock.advance(2.0)
    assert isinstance(await claim(store, "one", "twin"), InProgress)
    assert isinstance(await claim(store, "two", "twin"), InProgress)
    assert await claim(store, "dropped", "twin") == Claimed(2)
    heartbeat.drop("one-token")
    heartbeat.drop("two-token")


async def test_a_lease_that_was_lost_is_told_once_and_let_go(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat = Heartbeat(store, 3.0, 60.0)
    await claim(store, "k", "loser")
    heartbeat.hold("k", "loser")
    clock.advance(3.0)
    await claim(store, "k", "winner")
    for _ in range(2):
        await heartbeat.beat()
    assert caplog.text.count("lost its idempotency lease") == 1
    heartbeat.drop("loser")


async def test_a_store_that_is_gone_is_tried_again_at_the_next_beat(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat = Heartbeat(store, 3.0, 60.0)
    await claim(store, "k", "owner")
    heartbeat.hold("k", "owner")
    store.down = True
    clock.advance(2.0)
    await heartbeat.beat()
    assert "could not be renewed" in caplog.text
    store.down = False
    await heartbeat.beat()
    clock.advance(2.0)
    assert isinstance(await claim(store, "k", "twin"), InProgress)
    heartbeat.drop("owner")


async def test_leases_are_renewed_again_and_again_without_being_told(clock: ManualClock) -> None:
    renewed = asyncio.Event()

    class Watched(MemoryStore):
        async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
            renewed.set()
            return await super().renew(key, token, lease=lease, ttl=ttl)

    watched = FaultyStore(Watched(clock=clock))
    heartbeat = Heartbeat(watched, 0.003, 60.0)
    await claim(watched, "k", "owner")
    heartbeat.hold("k", "owner")
    for _ in range(3):
        await asyncio.wait_for(renewed.wait(), 5)
        renewed.clear()
    heartbeat.drop("owner")
    assert heartbeat._timer is None


async def test_dropping_what_is_not_held_is_no_error(store: FaultyStore) -> None:
    Heartbeat(store, 3.0, 60.0).drop("nobody")


# --- the admission and the pipeline


class Told:
    """A policy that has a hook told how its call ended."""

    def __init__(self, name: str, log: list[str], error: BaseException | None = None) -> None:
        self._name = name
        self._log = log
        self._error = error

    async def admit(self, _call: Call, admission: Admission) -> Verdict:
        async def hook(outcome: Outcome) -> None:
            self._log.append(f"{self._name} {outcome.ended}")
            if self._error is not None:
                raise self._error

        admission.on_settle(hook)
        return PROCEED


class Says:
    def __init__(self, verdict: Verdict | BaseException) -> None:
        self._verdict = verdict
        self.asked = 0

    async def admit(self, _call: Call, _admission: Admission) -> Verdict:
        self.asked += 1
        if isinstance(self._verdict, BaseException):
            raise self._verdict
        return self._verdict


NO = Reject(Reason.DRAINING, "no")


async def test_hooks_are_told_last_in_first_out() -> None:
    log: list[str] = []
    async with Pipeline().admit(call()) as admission:
        assert await admission.admit([Told("a", log), Told("b", log), Told("c", log)]) is PROCEED
        assert log == []
    assert log == ["c completed", "b completed", "a completed"]


async def test_every_hook_is_told_whatever_another_raises(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    with caplog.at_level(logging.ERROR, "resilience"):
        async with Pipeline().admit(call()) as admission:
            await admission.admit([Told("a", log), Told("b", log, RuntimeError("x")), Told("c", log, KeyError("y"))])
            request_id = admission.context.request_id
    assert log == ["c completed", "b completed", "a completed"]
    assert [record.__dict__["request_id"] for record in caplog.records] == [request_id] * 2


async def test_every_hook_is_told_though_another_is_cancelled() -> None:
    log: list[str] = []
    admission = Pipeline().admit(call())
    await admission.admit([Told("a", log), Told("b", log, asyncio.CancelledError()), Told("c", log)])
    with pytest.raises(asyncio.CancelledError):
        await admission.settle(Outcome("completed"))
    assert log == ["c completed", "b completed", "a completed"]


async def test_the_context_ends_with_the_call_though_a_hook_is_cancelled() -> None:
    log: list[str] = []
    pipeline = Pipeline(edge=[RequestContextPolicy(), Told("a", log, asyncio.CancelledError())])
    with pytest.raises(asyncio.CancelledError):
        async with pipeline.admit(call()):
            assert get_request_id() is not None
    assert log == ["a completed"]
    assert get_request_id() is None


async def test_the_first_outcome_holds() -> None:
    log: list[str] = []
    async with Pipeline().admit(call()) as admission:
        await admission.admit([Told("a", log)])
        await admission.settle(Outcome("failed"))
        await admission.settle(Outcome("completed"))
        assert admission.settled
    assert log == ["a failed"]


@pytest.mark.parametrize(
    ("error", "ended"),
    [(RuntimeError(), "failed"), (asyncio.CancelledError(), "cancelled"), (SystemExit(), "cancelled")],
)
async def test_a_call_that_an_exception_ends_is_told_so(error: BaseException, ended: str) -> None:
    log: list[str] = []
    with pytest.raises(type(error)):
        await break_off(Told("a", log), call(), error)
    assert log == [f"a {ended}"]
    assert get_request_id() is None


async def test_a_refusal_ends_the_asking_and_is_told_to_who_was_asked() -> None:
    log: list[str] = []
    after = Says(PROCEED)
    async with Pipeline().admit(call()) as admission:
        assert await admission.admit([Told("a", log), Says(NO), after]) == NO
        assert admission.verdict == NO
    assert after.asked == 0
    assert log == ["a refused"]


async def test_the_edge_has_spoken_when_the_block_is_entered() -> None:
    async with Pipeline(edge=[RequestContextPolicy(), Says(NO)]).admit(call()) as admission:
        assert admission.verdict == NO
        assert admission.context


async def test_an_accident_at_the_edge_settles_and_closes() -> None:
    log: list[str] = []
    pipeline = Pipeline(edge=[RequestContextPolicy(), Told("a", log), Says(RuntimeError("x"))])
    with pytest.raises(RuntimeError, match="x"):
        async with pipeline.admit(call()):
            raise AssertionError("never entered")
    assert log == ["a failed"]
    assert get_request_id() is None


async def test_a_call_that_is_handed_over_is_settled_by_who_took_it() -> None:
    log: list[str] = []
    async with Pipeline().admit(call()) as admission:
        await admission.admit([Told("a", log)])
        admission.hand_over()
    assert log == []
    assert get_request_id() is None
    await admission.settle(Outcome("completed"))
    assert log == ["a completed"]


async def test_a_pipeline_without_an_edge_opens_no_context() -> None:
    async with Pipeline(edge=[]).admit(call()) as admission:
        assert not admission.context
        assert admission.metadata == []
        assert not get_request_context()


async def test_a_policy_opens_the_context_that_the_admission_then_has() -> None:
    admission = Pipeline().admit(call())
    context = RequestContext("r", "c")
    admission.open(context)
    assert admission.context is context
    assert get_request_context() is context


async def test_a_selective_policy_is_asked_for_its_operations_only() -> None:
    inner = Says(NO)
    selective = Selective(inner, ["POST /orders"])
    assert (await ask(selective, call(operation="GET /orders")))[0] is PROCEED
    assert inner.asked == 0
    assert (await ask(selective, call(operation="POST /orders")))[0] == NO


def test_a_pipeline_tells_every_operation_that_its_policies_name(store: FaultyStore) -> None:
    pipeline = Pipeline(
        [
            Selective(Says(NO), ["a", "b"]),
            RateLimitPolicy(store, [Rule("1/s", operations=["c"]), Rule("1/m")]),
            Says(PROCEED),
        ],
        edge=[Selective(Says(NO), ["e"])],
    )
    assert pipeline.operations() == {"a", "b", "c", "e"}
    assert declared_operations(Says(PROCEED)) == frozenset()
    assert Pipeline().operations() == frozenset()


async def test_work_that_outlives_its_client_is_waited_for() -> None:
    pipeline, gate = Pipeline(), asyncio.Event()

    async def work() -> str:
        await gate.wait()
        return "done"

    assert await pipeline.drained(0)
    task = pipeline.outlive(work())
    assert not await pipeline.drained(0)
    assert not task.done()
    gate.set()
    assert await pipeline.drained(5)
    assert task.result() == "done"
    assert await pipeline.drained(0)


# --- settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch.setenv


@pytest.mark.usefixtures("environment")
def test_an_empty_environment_is_a_good_one() -> None:
    settings = Settings.load()
    assert settings.rate_limit_enabled is True
    assert (settings.rate_limit_requests, settings.rate_limit_window) == (100, 60.0)
    assert (settings.idempotency_ttl, settings.idempotency_lease) == (86_400.0, 30.0)


def test_a_variable_is_read_by_its_name_in_capitals(environment: Callable[[str, str], None]) -> None:
    environment("RATE_LIMIT_REQUESTS", "7")
    environment("RATE_LIMIT_ENABLED", "false")
    environment("OF_ANOTHER_PROGRAM", "x")
    settings = Settings.load()
    assert (settings.rate_limit_requests, settings.rate_limit_enabled) == (7, False)


@pytest.mark.usefixtures("environment")
def test_a_file_is_read_and_the_environment_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("RATE_LIMIT_REQUESTS=7\nRATE_LIMIT_WINDOW=8\nOTHER=1\n", encoding="utf-8")
    monkeypatch.setenv("RATE_LIMIT_WINDOW", "9")
    settings = Settings.load()
    assert (settings.rate_limit_requests, settings.rate_limit_window) == (7, 9.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RATE_LIMIT_REQUESTS", "hunter2"),
        ("RATE_LIMIT_REQUESTS", "-4242"),
        ("RATE_LIMIT_REQUESTS", "99999999999"),
        ("RATE_LIMIT_WINDOW", "0.00042"),
        ("RATE_LIMIT_WINDOW", "nan"),
        ("RATE_LIMIT_ENABLED", "hunter2"),
        ("IDEMPOTENCY_TTL", "-4242"),
        ("IDEMPOTENCY_LEASE", "hunter2"),
    ],
)
def test_a_wrong_variable_is_named_and_its_value_is_not_shown(
    environment: Callable[[str, str], None], name: str, value: str
) -> None:
    environment(name, value)
    with pytest.raises(ConfigurationError) as wrong:
        Settings.load()
    assert name in str(wrong.value)
    assert value not in str(wrong.value)
    assert wrong.value.__suppress_context__


def test_every_wrong_variable_is_named(environment: Callable[[str, str], None]) -> None:
    environment("RATE_LIMIT_REQUESTS", "none")
    environment("IDEMPOTENCY_TTL", "never")
    with pytest.raises(ConfigurationError) as wrong:
        Settings.load()
    assert "RATE_LIMIT_REQUESTS: " in str(wrong.value)
    assert "IDEMPOTENCY_TTL: " in str(wrong.value)
    assert "RATE_LIMIT_WINDOW" not in str(wrong.value)


def test_an_application_adds_its_own(environment: Callable[[str, str], None]) -> None:
    class Shop(Settings):
        shop_name: str = Field("", max_length=5)

        @model_validator(mode="after")
        def _check(self) -> "Shop":
            if self.shop_name == "both":
                raise ValueError("x")
            return self

    environment("SHOP_NAME", "mine")
    assert Shop.load().shop_name == "mine"
    environment("SHOP_NAME", "hunter2")
    with pytest.raises(ConfigurationError, match="SHOP_NAME") as wrong:
        Shop.load()
    assert "hunter2" not in str(wrong.value)
    environment("SHOP_NAME", "both")
    with pytest.raises(ConfigurationError, match="The environment is wrong"):
        Shop.load()
