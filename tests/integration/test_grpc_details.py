"""A refusal tells programs what its message tells people, and nothing that its caller sent."""

from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Quota, RateLimitPolicy, RequestContextPolicy, Rule
from resilience.admission import Admission, Refused
from resilience.call import Call
from resilience.testing import ManualClock
from resilience.verdict import Reject, Verdict
from resilience.wire import TABLE, Reason
from tests.integration.grpc_world import (
    GO,
    SECRET,
    STYLES,
    Counts,
    Pair,
    Style,
    Told,
    Waits,
    aborts,
    ask,
    crashes,
    ok,
    serving,
    start,
    told,
)

StatusCode = grpc.StatusCode
DETAILS = "grpc-status-details-bin"
HANDLERS_OWN = (DETAILS, Status(code=5, message="Gone").SerializeToString())
unary = STYLES["unary_unary"].make


@dataclass
class Answers:
    """A policy that refuses every call."""

    reject: Reject

    async def admit(self, _call: Call, _admission: Admission) -> Verdict:
        return self.reject


def status_of(end: Told) -> Any:
    """Return the rich status; like a client's library, insist that it agrees with the status of the RPC."""
    (sent,) = end.get_all(DETAILS)
    assert isinstance(sent, bytes)
    status = Status.FromString(sent)
    assert (status.code, status.message) == (end.code.value[0], end.details)
    return status


def details_of(end: Told) -> dict[str, Any]:
    """Return the details by the names of their messages; each kind is there once."""
    found: dict[str, Any] = {}
    for packed in status_of(end).details:
        kinds: tuple[Any, ...] = (ErrorInfo, RetryInfo, QuotaFailure, BadRequest)
        (kind,) = (kind for kind in kinds if packed.Is(kind.DESCRIPTOR))
        assert kind.__name__ not in found
        found[kind.__name__] = kind.FromString(packed.value)
    return found


def denied(end: Told) -> list[tuple[str, str, int]]:
    violations = details_of(end)["QuotaFailure"].violations
    assert all(violation.subject == violation.quota_id for violation in violations)
    return [(violation.quota_id, violation.quota_metric, violation.quota_value) for violation in violations]


def size(end: Told) -> int:
    """Return the bytes of all trailers, binary ones as the base64 they travel in."""
    return sum(
        len(name) + ((len(value) + 2) // 3 * 4 if isinstance(value, bytes) else len(value))
        for name, value in end.trailers
    )


async def refused(reason: Reason, retry_after: float | None = None, message: str = "Not now") -> Told:
    async with serving(unary(ok), Answers(Reject(reason, message, retry_after))) as channel:
        return await ask(channel)


async def over(*rules: Rule | str, metadata: tuple[Pair, ...] = ()) -> Told:
    """Return what the second call is told."""
    async with serving(unary(ok), RateLimitPolicy(MemoryStore(clock=ManualClock()), rules)) as channel:
        assert (await ask(channel, GO, "unary_unary", *metadata)).code is StatusCode.OK
        return await ask(channel, GO, "unary_unary", *metadata)


@pytest.mark.parametrize("reason", Reason)
async def test_every_refusal_names_its_reason_and_tells_a_wait_only_where_waiting_helps(reason: Reason) -> None:
    end = await refused(reason, 1.2341)
    details = details_of(end)
    info = details.pop("ErrorInfo")
    assert (info.reason, info.domain, dict(info.metadata)) == (reason.value.upper(), "grpc-http-resilience", {})
    if TABLE[reason].retry == "after":
        assert details.pop("RetryInfo").retry_delay.ToMilliseconds() == 1235
    if reason in {Reason.IDEMPOTENCY_KEY_MISSING, Reason.IDEMPOTENCY_KEY_MALFORMED}:
        (violation,) = details.pop("BadRequest").field_violations
        assert (violation.field, violation.reason) == ("idempotency-key", info.reason)
        assert violation.description == "Not now"
    assert details == {}


@pytest.mark.parametrize("reason", Reason)
async def test_no_wait_is_made_up(reason: Reason) -> None:
    assert "RetryInfo" not in details_of(await refused(reason))


@pytest.mark.parametrize(("wait", "milliseconds"), [(0.0000001, 1), (30, 30_000), (86_400.5, 86_400_500)])
async def test_a_wait_is_told_however_short_or_long_it_is(wait: float, milliseconds: int) -> None:
    details = details_of(await refused(Reason.RATE_LIMITED, wait))
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds


async def test_a_message_of_any_letters_agrees_with_the_status() -> None:
    end = await refused(Reason.DRAINING, 1, "Später, 100 %")
    assert status_of(end).message == "Später, 100 %"


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
async def test_handlers_of_every_style_are_refused_with_details(style: Style) -> None:
    clock = ManualClock()
    async with serving(style.make(Counts()), RateLimitPolicy(MemoryStore(clock=clock), "1/second")) as channel:
        await ask(channel, GO, style.kind)
        clock.advance(0.5005)
        end = await told(start(channel, GO, style.kind))
    assert details_of(end)["RetryInfo"].retry_delay.ToMilliseconds() == 500
    assert denied(end) == [("1/second", "requests", 1)]


async def test_each_rule_that_denied_is_named_and_no_other() -> None:
    end = await over(Rule("1/minute", name="burst"), Rule("9/hour", name="steady"), Rule("1/day", name="contract"))
    assert denied(end) == [("burst", "requests", 1), ("contract", "requests", 1)]


async def test_a_limit_of_calls_at_once_counts_in_its_own_unit() -> None:
    act = Waits()
    policy = RateLimitPolicy(MemoryStore(), Rule(Quota(1, 60, algorithm="concurrency"), name="at once"))
    async with serving(unary(act), policy) as channel:
        first = start(channel)
        await act.entered.wait()
        end = await ask(channel)
        act.gate.set()
        assert await first == b"done"
    assert denied(end) == [("at once", "concurrent-requests", 1)]


async def test_a_limit_at_the_edge_is_told_alike() -> None:
    pipeline = Pipeline(edge=[RequestContextPolicy(), RateLimitPolicy(MemoryStore(), "1/hour")])
    async with serving(unary(ok), pipeline=pipeline) as channel:
        _, end = [await ask(channel) for _ in range(2)]
    assert denied(end) == [("1/hour", "requests", 1)]


async def test_what_succeeds_or_fails_by_itself_carries_none_and_neither_does_a_replay() -> None:
    policies = RateLimitPolicy(MemoryStore(), "100/minute"), IdempotencyPolicy(MemoryStore())
    key = ("idempotency-key", "key-1")
    for act in (ok, aborts, crashes):
        async with serving(unary(act), *policies) as channel:
            ends = [await ask(channel), await ask(channel, GO, "unary_unary", key)]
            ends.append(await ask(channel, GO, "unary_unary", key))
        assert [end.get_all(DETAILS) for end in ends] == [[], [], []]


async def test_a_handlers_details_never_go_with_a_status_of_ours() -> None:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata((("x-app", "kept"), HANDLERS_OWN))
        if ("x-crash", "1") in context.invocation_metadata():
            raise ValueError(SECRET)
        raise Refused(Reject(Reason.RATE_LIMITED, "Too many requests", 1))

    async with serving(unary(act)) as channel:
        late = await ask(channel)
        crashed = await ask(channel, GO, "unary_unary", ("x-crash", "1"))
    assert details_of(late)["ErrorInfo"].reason == "RATE_LIMITED"
    assert (crashed.code, crashed.get_all(DETAILS)) == (StatusCode.INTERNAL, [])
    assert late.get("x-app") == crashed.get("x-app") == "kept"


@pytest.mark.parametrize("count", [1, 3, 6, 9])
async def test_stacked_rules_are_named_while_all_trailers_fit_in_a_kilobyte(count: int) -> None:
    end = await over(*(Rule("1/minute", name=f"rule-{n}") for n in range(count)))
    named = [name for name, _, _ in denied(end)]
    assert named == [f"rule-{n}" for n in range(len(named))]
    assert 1 <= len(named) <= count
    assert size(end) <= 1024


async def test_however_many_rules_are_stacked_the_details_stay_small() -> None:
    end = await over(*(Rule("1/minute", name=f"{n:02}{'x' * 126}") for n in range(12)))
    (sent,) = end.get_all(DETAILS)
    # What is left is the reason and the wait; `ratelimit` names the rules.
    assert set(details_of(end)) == {"ErrorInfo", "RetryInfo"}
    assert len(sent) < 200


async def test_nothing_that_the_caller_sent_is_in_the_details() -> None:
    sent: tuple[Pair, ...] = (
        ("x-api-key", "key-of-alice"),
        ("x-request-id", "request-of-alice"),
        ("x-tenant", "tenant-of-alice"),
    )
    by_tenant = Rule("1/hour", key=lambda call, _: f"tenant:{call.metadata.get('x-tenant')}")
    ends = [await over("1/minute", by_tenant, metadata=sent)]
    async with serving(unary(ok), IdempotencyPolicy(MemoryStore())) as channel:
        ends.append(await ask(channel, GO, "unary_unary", *sent, ("idempotency-key", 'a"key-of-alice')))
        ends += [
            await ask(channel, GO, "unary_unary", *sent, ("idempotency-key", "alice"), send=[b"alice %d" % n])
            for n in range(2)
        ]
    codes = [end.code for end in ends]
    assert codes == [
        StatusCode.RESOURCE_EXHAUSTED,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.OK,
        StatusCode.FAILED_PRECONDITION,
    ]
    for end in (ends[0], ends[1], ends[3]):
        said = status_of(end).SerializeToString()
        assert b"alice" not in said
        assert b"127.0.0.1" not in said
