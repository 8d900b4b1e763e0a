"""Our trailers stay under 1 KB, whatever the rules are called; where it is too much, the tightest rules are told."""

import re
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from resilience import MemoryStore, Quota, RateLimitPolicy, Rule, rate_limit, wire
from tests.integration.grpc_world import GO, STYLES, Act, Pair, Told, aborts, ask, crashes, ok, serving

LONGEST = 128
IDS: tuple[Pair, ...] = (("x-correlation-id", "c" * 128),)


def size(end: Told) -> int:
    return sum(
        len(name) + (len(value) if isinstance(value, str) else -(-len(value) // 3) * 4) for name, value in end.trailers
    )


def named(n: int, limit: int, per: float = 3600.0, length: int = LONGEST) -> Rule:
    return Rule(Quota(limit, per=per), name=f"{n:02}".ljust(length, "x"))


def told_of(end: Told, field: str) -> list[int]:
    return [int(number) for number in re.findall(r'"(\d\d)x*"', end.get(field) or "")]


async def calls(rules: list[Rule], count: int) -> list[Told]:
    async with serving(STYLES["unary_unary"].make(ok), RateLimitPolicy(MemoryStore(), rules)) as channel:
        return [await ask(channel, GO, "unary_unary", *IDS) for _ in range(count)]


@pytest.mark.parametrize("act", [ok, aborts, crashes], ids=lambda act: act.__name__)
async def test_every_end_of_a_call_that_a_late_rule_has_joined_stays_under_a_kilobyte(act: Act) -> None:
    @rate_limit("5/hour", name="late".ljust(LONGEST, "x"))
    async def inner(_request: bytes, context: Any) -> bytes:
        return await act(context)

    async def handle(request: bytes, context: Any) -> bytes:
        return await inner(request, context)

    rules = [named(n, 9) for n in range(12)]
    handler: Any = grpc.unary_unary_rpc_method_handler(handle)
    async with serving(handler, RateLimitPolicy(MemoryStore(), rules)) as channel:
        end = await ask(channel, GO, "unary_unary", *IDS)
    assert '"late' in str(end.get(wire.RATELIMIT))
    assert size(end) <= 1024


@pytest.mark.parametrize("count", [1, 2, 3, 12, 40])
async def test_a_reply_and_a_refusal_stay_under_a_kilobyte_and_tell_of_one_rule_at_least(count: int) -> None:
    ends = await calls([named(n, 1) for n in range(count)], 2)
    assert [end.code for end in ends] == [StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]
    for end in ends:
        assert size(end) <= 1024
        assert 1 <= len(told_of(end, wire.RATELIMIT)) <= count
        assert told_of(end, wire.RATELIMIT) == told_of(end, wire.RATELIMIT_POLICY)


async def test_rules_that_fit_are_all_told_in_their_order() -> None:
    (end,) = await calls([named(n, 90 - n, length=10) for n in range(6)], 1)
    assert told_of(end, wire.RATELIMIT) == told_of(end, wire.RATELIMIT_POLICY) == list(range(6))


async def test_what_denied_is_told_first_then_what_is_nearest_to_its_end() -> None:
    limits = [1000, 500, 1, 1000, 1000, 4, 1000, 1000]
    first, second = await calls([named(n, limit) for n, limit in enumerate(limits)], 2)
    assert told_of(first, wire.RATELIMIT) == [2, 5]
    assert second.code is StatusCode.RESOURCE_EXHAUSTED
    assert 2 in told_of(second, wire.RATELIMIT)


async def test_the_rule_of_a_decorator_that_is_hidden_from_the_door_is_told_with_the_pipelines() -> None:
    @rate_limit("5/hour")
    async def inner(_request: bytes, _context: Any) -> bytes:
        return b"done"

    async def handle(request: bytes, context: Any) -> bytes:
        return await inner(request, context)

    handler: Any = grpc.unary_unary_rpc_method_handler(handle)
    async with serving(handler, RateLimitPolicy(MemoryStore(), "9/hour")) as channel:
        end = await ask(channel)
    assert (end.code, end.get("x-ratelimit-limit")) == (StatusCode.OK, "5")
    assert [name for name in ("5/hour", "9/hour") if name in (end.get(wire.RATELIMIT) or "")] == ["5/hour", "9/hour"]
