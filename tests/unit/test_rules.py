"""What a rule may be told by functions, and what it may be: tiers, costs, exemptions, rules in shadow, stages."""

import logging
from typing import Any

import pytest

from resilience import (
    PROCEED,
    Admission,
    Call,
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    PayloadTooLargeError,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    Reason,
    Reject,
    Rule,
    Selective,
    StoreUnavailableError,
    Usage,
    Verdict,
    get_request_context,
    set_context_user,
)
from resilience.policies.rule import Key, address
from resilience.policies.shadow import ShadowRule
from resilience.policies.stages import split_stages
from resilience.stores.base import Want
from resilience.testing import FaultyStore, ManualClock
from tests.support.calls import Sent

LIMITS = {"free": "10/minute", "premium": "100/minute"}


def call(body: bytes = b"", operation: str = "POST /orders", **sent: str) -> Call:
    async def payload(limit: int) -> bytes:
        if len(body) > limit:
            raise PayloadTooLargeError(limit)
        return body

    return Call("http", operation, Sent(**sent), peer="10.0.0.1", payload=payload)


def tier(call_: Call, _admission: Admission) -> str | None:
    return LIMITS.get(call_.metadata.get("x-tier") or "free")


async def ask(policy: Policy, call_: Call | None = None) -> tuple[Verdict, dict[str, str]]:
    """Ask of one call; return the verdict, and what the reply would tell."""
    async with Pipeline(edge=()).admit(call_ or call()) as admission:
        return await admission.admit([policy]), dict(admission.metadata)


def always(answer: Any) -> Any:
    """Return a function of a rule that gives ``answer``."""
    return lambda _call, _admission: answer


def soon(answer: Any) -> Any:
    """Return the same, async."""

    async def function(_call: Call, _admission: Admission) -> Any:
        return answer

    return function


def refusal(verdict: Verdict) -> Reject:
    assert isinstance(verdict, Reject)
    return verdict


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FaultyStore:
    return FaultyStore(MemoryStore(clock=clock))


# --- tiers


async def test_each_caller_has_the_limit_of_its_tier_and_is_told_its_own(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule(tier))
    _, free = await ask(policy, call(x_api_key="a"))
    _, premium = await ask(policy, call(x_api_key="b", x_tier="premium"))
    assert (free["x-ratelimit-limit"], free["ratelimit-policy"]) == ("10", '"tier";q=10;w=60')
    assert (premium["x-ratelimit-limit"], premium["ratelimit-policy"]) == ("100", '"tier";q=100;w=60')
    assert premium["ratelimit"] == '"tier";r=99;t=60'


async def test_a_tier_may_depend_on_the_authenticated_user(store: FaultyStore) -> None:
    def by_user(_call: Call, _admission: Admission) -> str:
        return LIMITS["premium" if get_request_context().user_id == "ann" else "free"]

    policy = RateLimitPolicy(store, Rule(by_user))
    async with Pipeline().admit(call()) as admission:
        set_context_user("ann")
        assert await admission.admit([policy]) is PROCEED
        assert dict(admission.metadata)["x-ratelimit-limit"] == "100"


@pytest.mark.parametrize("quota", ["3/minute", Quota(3, 60)])
@pytest.mark.parametrize("style", [always, soon])
async def test_a_tier_is_a_quota_or_its_text_found_at_once_or_later(store: FaultyStore, quota: Any, style: Any) -> None:
    policy = RateLimitPolicy(store, Rule(style(quota), name="plan"))
    assert [(await ask(policy))[0] is PROCEED for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("style", [always, soon])
async def test_a_tier_of_none_exempts_and_tells_nothing(store: FaultyStore, style: Any) -> None:
    policy = RateLimitPolicy(store, [Rule(style(None), name="plan"), Rule("5/minute")])
    verdict, told = await ask(policy)
    assert verdict is PROCEED
    assert told["ratelimit-policy"] == '"5/minute";q=5;w=60'
    assert await ask(RateLimitPolicy(store, Rule(style(None), name="plan"))) == (PROCEED, {})


async def test_an_exempt_caller_is_not_looked_up(store: FaultyStore) -> None:
    async def look_up(_call: Call, _admission: Admission) -> str:
        raise AssertionError

    policy = RateLimitPolicy(store, Rule(look_up, cost=look_up_cost, key=always(None)))
    assert await ask(policy) == (PROCEED, {})


def look_up_cost(_call: Call, _admission: Admission) -> int:
    raise AssertionError


async def test_the_text_of_a_tier_is_read_once(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule(tier))
    pipeline = Pipeline([policy])
    quotas = []
    for _ in range(2):
        async with pipeline.admit(call()) as admission:
            await admission.admit(pipeline.core)
            quotas += [quota for _, quota, _ in admission.limits]
    assert quotas[0] is quotas[1]


async def test_a_fixed_rule_beside_a_tier_is_told_as_it_is(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, [Rule("1000/hour"), Rule(tier)])
    _, told = await ask(policy, call(x_tier="premium"))
    assert told["ratelimit-policy"] == '"1000/hour";q=1000;w=3600, "tier";q=100;w=60'


@pytest.mark.parametrize("algorithm", ["sliding_window", "fixed_window", "sliding_log"])
async def test_a_higher_tier_keeps_what_was_used(store: FaultyStore, algorithm: Any) -> None:
    limits = {None: Quota(10, 60, algorithm=algorithm), "premium": Quota(100, 60, algorithm=algorithm)}
    policy = RateLimitPolicy(store, Rule(lambda call_, _: limits[call_.metadata.get("x-tier")], name="plan"))
    for _ in range(10):
        await ask(policy)
    assert refusal((await ask(policy))[0]).reason is Reason.RATE_LIMITED
    verdict, told = await ask(policy, call(x_tier="premium"))
    assert verdict is PROCEED
    assert told["x-ratelimit-remaining"] == "89"


async def test_a_lower_tier_has_nothing_left_until_enough_of_it_has_passed(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = RateLimitPolicy(store, Rule(tier))
    for _ in range(50):
        await ask(policy, call(x_tier="premium"))
    assert refusal((await ask(policy))[0]).retry_after == pytest.approx(60, abs=0.001)
    clock.advance(60.001)
    assert (await ask(policy))[0] is PROCEED


async def test_a_bucket_keeps_the_share_that_is_used(store: FaultyStore) -> None:
    def plan(call_: Call, _admission: Admission) -> Quota:
        limit = 100 if call_.metadata.get("x-tier") else 10
        return Quota(limit, 60, algorithm="token_bucket", burst=limit)

    policy = RateLimitPolicy(store, Rule(plan))
    for _ in range(5):
        await ask(policy)
    assert (await ask(policy, call(x_tier="premium")))[1]["x-ratelimit-remaining"] == "49"


async def test_a_tier_of_another_algorithm_starts_anew(store: FaultyStore) -> None:
    def plan(call_: Call, _admission: Admission) -> Quota:
        return Quota(2, 60, algorithm="fixed_window" if call_.metadata.get("x-tier") else "sliding_window")

    policy = RateLimitPolicy(store, Rule(plan))
    assert [(await ask(policy))[0] is PROCEED for _ in range(3)] == [True, True, False]
    assert (await ask(policy, call(x_tier="premium")))[1]["x-ratelimit-remaining"] == "1"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("5/fortnight", "not a quota"),
        ("1/second and 5/minute", "one quota"),
        (5, "not a int"),
        (Quota(5, 60, algorithm="concurrency"), "a rule for each tier"),
    ],
)
@pytest.mark.parametrize("style", [always, soon])
async def test_an_answer_that_is_no_quota_is_an_error_that_takes_nothing(
    store: FaultyStore, answer: Any, message: str, style: Any
) -> None:
    policy = RateLimitPolicy(store, ["5/minute", Rule(style(answer), name="plan")])
    with pytest.raises(ConfigurationError, match=message):
        await ask(policy)
    assert (await policy.peek("5/minute", "addr:10.0.0.1")).remaining == 5


async def test_permits_of_a_tier_are_a_rule_of_its_own(store: FaultyStore) -> None:
    def only(wanted: str) -> Key:
        return lambda call_, admission: admission.caller() if call_.metadata.get("x-tier") == wanted else None

    at_once = {name: Quota(limit, 30, algorithm="concurrency") for name, limit in (("free", 1), ("premium", 2))}
    policy = RateLimitPolicy(store, [Rule(quota, key=only(name), name=name) for name, quota in at_once.items()])
    pipeline = Pipeline([policy])
    premium, free = call(x_tier="premium"), call(x_tier="free")
    async with pipeline.admit(premium) as one, pipeline.admit(premium) as two, pipeline.admit(free) as three:
        assert [await each.admit(pipeline.core) for each in (one, two, three)] == [PROCEED] * 3
        assert isinstance((await ask(policy, premium))[0], Reject)
        assert isinstance((await ask(policy, free))[0], Reject)


def test_a_rule_of_a_function_is_called_as_the_function_is() -> None:
    assert Rule(tier).name == "tier"
    assert Rule(tier, operations=["b", "a"]).name == "tier a b"
    with pytest.raises(ConfigurationError, match="needs a name="):
        Rule(always("1/second"))


def test_only_a_rule_for_everyone_has_a_quota_to_show() -> None:
    assert Rule("5/minute").quota == Quota(5, 60)
    with pytest.raises(ConfigurationError, match="for each call"):
        _ = Rule(tier).quota


def test_what_is_neither_quota_nor_text_nor_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a int"):
        Rule(100)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sent", "limit", "admitted"), [("free", "2", 2), ("premium", "25", 25)])
async def test_while_the_store_is_gone_each_process_counts_its_share_of_a_tier(
    store: FaultyStore, sent: str, limit: str, admitted: int
) -> None:
    policy = RateLimitPolicy(store, Rule(tier), on_outage="local", replicas=4)
    store.down = True
    for _ in range(admitted):
        verdict, told = await ask(policy, call(x_tier=sent))
        assert (verdict, told["x-ratelimit-limit"]) == (PROCEED, limit)
        assert told["ratelimit-policy"] == f'"tier";q={limit};w=60'
    assert isinstance((await ask(policy, call(x_tier=sent)))[0], Reject)


def test_a_limit_is_shared_by_one_process_at_least(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="replicas"):
        RateLimitPolicy(store, Rule(tier), replicas=0)


# --- costs


def rows(call_: Call, _admission: Admission) -> int:
    return int(call_.metadata.get("x-rows") or 1)


async def rows_in_the_payload(call_: Call, _admission: Admission) -> int:
    return len((await call_.payload(64)).splitlines())


async def test_a_call_takes_what_a_function_says(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("10/minute", cost=rows))
    assert (await ask(policy, call(x_rows="6")))[1]["x-ratelimit-remaining"] == "4"
    assert isinstance((await ask(policy, call(x_rows="5")))[0], Reject)
    assert (await ask(policy, call(x_rows="4")))[1]["x-ratelimit-remaining"] == "0"


async def test_a_call_may_cost_what_its_payload_holds(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("10/minute", cost=rows_in_the_payload))
    assert (await ask(policy, call(b"a\nb\nc")))[1]["x-ratelimit-remaining"] == "7"


@pytest.mark.parametrize("shadow", [False, True])
async def test_a_payload_larger_than_a_cost_function_reads_is_refused_as_too_large(
    store: FaultyStore, shadow: bool
) -> None:
    policy = RateLimitPolicy(store, Rule("10/minute", cost=rows_in_the_payload, shadow=shadow))
    refused = refusal((await ask(policy, call(b"a" * 65)))[0])
    assert (refused.reason, refused.message) == (Reason.PAYLOAD_TOO_LARGE, "This request may have 64 bytes")


async def test_a_call_that_a_function_finds_free_only_looks(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule("1/minute", cost=soon(0)))
    for _ in range(3):
        assert (await ask(policy))[1]["x-ratelimit-remaining"] == "1"


async def test_a_tier_and_a_cost_may_both_be_functions(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule(tier, cost=rows))
    assert (await ask(policy, call(x_tier="premium", x_rows="60")))[1]["x-ratelimit-remaining"] == "40"


@pytest.mark.parametrize(("cost", "message"), [(-1, "at least 0, not -1"), (1.0, "not a float"), (True, "not a bool")])
async def test_a_cost_that_is_no_number_of_units_is_an_error(store: FaultyStore, cost: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Rule("5/minute", cost=cost)
    for function in (always(cost), soon(cost)):
        policy = RateLimitPolicy(store, ["9/minute", Rule("5/minute", cost=function)])
        with pytest.raises(ConfigurationError, match=f"cost function of rule '5/minute'.*{message}"):
            await ask(policy)
        assert (await policy.peek("9/minute", "addr:10.0.0.1")).remaining == 9


@pytest.mark.parametrize("cost", [0, 2, rows])
def test_a_permit_costs_one(cost: Any) -> None:
    with pytest.raises(ConfigurationError, match="its cost is 1"):
        Rule(Quota(5, 60, algorithm="concurrency"), cost=cost)


# --- rules in shadow


def would_deny(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """Return what the log tells of rules in shadow."""
    lines: list[Any] = [record for record in caplog.records if hasattr(record, "would_deny")]
    assert all(line.levelno == logging.INFO for line in lines)
    return [(line.rule, line.would_deny) for line in lines]


async def test_a_rule_in_shadow_denies_nothing_tells_callers_nothing_and_logs_what_it_would_deny(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "resilience")
    policy = RateLimitPolicy(store, Rule("1/minute", shadow=True))
    assert await ask(policy) == (PROCEED, {})
    assert would_deny(caplog) == []
    assert await ask(policy, call(x_api_key="hunter2")) == (PROCEED, {})
    assert await ask(policy) == (PROCEED, {})
    assert would_deny(caplog) == [("1/minute", 1)]
    assert "10.0.0.1" not in caplog.text


async def test_a_flood_of_would_be_denials_is_a_line_a_second(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "resilience")
    pace = ManualClock()
    shadow = ShadowRule(store, Rule("1/minute"), clock=pace)

    async def observe(times: int) -> None:
        for _ in range(times):
            async with Pipeline().admit(call()) as admission:
                await shadow.observe(call(), admission)

    await observe(6)
    assert would_deny(caplog) == [("1/minute", 1)]
    pace.advance(0.999)
    await observe(3)
    assert would_deny(caplog) == [("1/minute", 1)]
    pace.advance(0.001)
    await observe(1)
    assert would_deny(caplog) == [("1/minute", 1), ("1/minute", 8)]


async def test_what_is_left_to_tell_is_told_with_the_next_call_that_fits(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "resilience")
    shadow = ShadowRule(store, Rule("1/minute"), clock=clock)
    for wait in (0.0, 0.0, 0.0, 61.0):
        clock.advance(wait)
        async with Pipeline().admit(call()) as admission:
            await shadow.observe(call(), admission)
    assert would_deny(caplog) == [("1/minute", 1), ("1/minute", 1)]


async def test_a_call_that_is_denied_is_not_counted_in_shadow(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, ["1/minute", Rule("9/minute", shadow=True)])
    assert (await ask(policy))[0] is PROCEED
    assert isinstance((await ask(policy))[0], Reject)
    assert (await policy.peek("9/minute", "addr:10.0.0.1")).remaining == 8


async def test_rules_in_shadow_hinder_neither_the_others_nor_each_other(store: FaultyStore) -> None:
    trials = [Rule("1/minute", shadow=True), Rule("8/minute", shadow=True)]
    policy = RateLimitPolicy(store, [*trials, Rule("9/minute")])
    for left in (8, 7, 6):
        verdict, told = await ask(policy)
        assert (verdict, told["ratelimit"]) == (PROCEED, f'"9/minute";r={left};t=60')
        assert told["ratelimit-policy"] == '"9/minute";q=9;w=60'
    assert (await policy.peek("8/minute", "addr:10.0.0.1")).remaining == 5


def fail(_call: Call, _admission: Admission) -> Any:
    raise RuntimeError("hunter2")


TRIALS = {
    "key": Rule("1/minute", name="trial", shadow=True, key=fail),
    "cost": Rule("1/minute", name="trial", shadow=True, cost=fail),
    "quota": Rule(fail, name="trial", shadow=True),
}


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
async def test_a_function_that_fails_in_shadow_is_logged_by_its_kind_and_hinders_nobody(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, trial: Rule
) -> None:
    policy = RateLimitPolicy(store, ["5/minute", trial])
    for _ in range(2):
        assert (await ask(policy))[0] is PROCEED
    failures = [record.getMessage() for record in caplog.records]
    assert failures == ["Shadow rule trial could not be asked: RuntimeError"]


async def test_without_a_store_a_rule_in_shadow_lets_calls_in_and_says_so_once(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = RateLimitPolicy(store, Rule("1/minute", shadow=True), on_outage="closed")
    store.down = True
    for _ in range(2):
        assert (await ask(policy))[0] is PROCEED
    assert caplog.text.count("'1/minute' is not counted") == 1
    store.down = False
    await ask(policy)
    assert "The store is back" in caplog.text


async def test_permits_in_shadow_are_held_while_a_call_runs_and_given_back(store: FaultyStore) -> None:
    rule = Rule(Quota(5, 60, algorithm="concurrency"), name="busy", shadow=True)
    policy = RateLimitPolicy(store, rule)
    pipeline = Pipeline([policy])
    async with pipeline.admit(call()) as admission:
        await admission.admit(pipeline.core)
        assert (await policy.peek("busy", "addr:10.0.0.1")).remaining == 4
    assert (await policy.peek("busy", "addr:10.0.0.1")).remaining == 5


async def test_a_tier_may_be_tried_in_shadow(store: FaultyStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "resilience")
    policy = RateLimitPolicy(store, Rule(tier, shadow=True))
    for _ in range(11):
        await ask(policy)
    assert would_deny(caplog) == [("tier", 1)]


# --- stages


def names(policy: RateLimitPolicy | None) -> list[str]:
    return [] if policy is None else [rule.name for rule in policy.rules]


def test_a_policy_is_split_into_its_stages(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, [Rule("9/second", key=address, stage="edge"), "5/minute", "50/hour"])
    assert names(policy.at_edge()) == ["9/second"]
    assert names(policy.at_core()) == ["5/minute", "50/hour"]


def test_a_policy_of_one_stage_is_not_split(store: FaultyStore) -> None:
    core = RateLimitPolicy(store, "5/minute")
    assert (core.at_edge(), core.at_core()) == (None, core)
    edge = RateLimitPolicy(store, Rule("5/minute", stage="edge"))
    assert (edge.at_edge(), edge.at_core()) == (edge, None)


@pytest.mark.parametrize("stage", ["edge", "core"])
async def test_each_part_keeps_what_the_policy_says_of_outages(store: FaultyStore, stage: str) -> None:
    rules = [Rule("8/minute", name="early", stage="edge"), Rule("8/minute", name="late")]
    policy = RateLimitPolicy(store, rules, on_outage="local", replicas=4)
    part = policy.at_edge() if stage == "edge" else policy.at_core()
    assert part is not None
    store.down = True
    assert (await ask(part))[1]["x-ratelimit-limit"] == "2"


async def test_a_policy_that_nobody_split_asks_all_of_its_rules(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, [Rule("1/minute", stage="edge"), "5/hour"])
    assert (await ask(policy))[0] is PROCEED
    assert isinstance((await ask(policy))[0], Reject)


def test_policies_are_split_in_their_order_and_others_are_left_alone(store: FaultyStore) -> None:
    mixed = RateLimitPolicy(store, [Rule("9/second", stage="edge"), "5/minute"])
    early = RateLimitPolicy(store, Rule("9/hour", stage="edge"))
    keyed, selective = IdempotencyPolicy(store), Selective(IdempotencyPolicy(store), ["POST /orders"])
    edge, core = split_stages([mixed, keyed, early, selective])
    assert [names(one) for one in edge if isinstance(one, RateLimitPolicy)] == [["9/second"], ["9/hour"]]
    assert core[1:] == (keyed, selective)
    assert isinstance(core[0], RateLimitPolicy)
    assert names(core[0]) == ["5/minute"]


async def test_a_selective_limit_is_selective_at_both_stages(store: FaultyStore) -> None:
    mixed = RateLimitPolicy(store, [Rule("1/second", stage="edge"), "1/minute"])
    only_edge = RateLimitPolicy(store, Rule("9/hour", stage="edge"))
    edge, core = split_stages([Selective(mixed, ["POST /orders"]), Selective(only_edge, ["POST /orders"])])
    assert (len(edge), len(core)) == (2, 1)
    for policy in (edge[0], core[0]):
        assert isinstance(policy, Selective)
        assert policy.operations == {"POST /orders"}
        assert [(await ask(policy))[0] is PROCEED for _ in range(2)] == [True, False]
        assert await ask(policy, call(operation="GET /orders")) == (PROCEED, {})


def test_a_stage_is_core_or_edge() -> None:
    with pytest.raises(ConfigurationError, match="'core' or 'edge', not 'outside'"):
        Rule("5/minute", stage="outside")  # type: ignore[arg-type]


# --- looking and forgetting


async def test_a_look_takes_nothing(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "5/minute")
    await ask(policy)
    for _ in range(3):
        assert await policy.peek("5/minute", "addr:10.0.0.1") == Usage(True, 5, 4, 60.0, 0.0)
    assert (await policy.peek("5/minute", "addr:10.0.0.2")).remaining == 5


async def test_a_look_at_a_tier_needs_the_subjects_quota(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, Rule(tier))
    await ask(policy)
    assert (await policy.peek("tier", "addr:10.0.0.1", quota="100/minute")).remaining == 99
    with pytest.raises(ConfigurationError, match="for each call"):
        await policy.peek("tier", "addr:10.0.0.1")


async def test_a_reset_forgets_what_was_used_of_one_rule(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, ["1/minute", "9/hour"])
    await ask(policy)
    await policy.reset("1/minute", "addr:10.0.0.1")
    assert (await ask(policy))[1]["ratelimit"] == '"1/minute";r=0;t=60, "9/hour";r=7;t=3600'


async def test_a_reset_forgets_what_was_counted_while_the_store_was_gone(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "1/minute", on_outage="local")
    store.down = True
    assert [(await ask(policy))[0] is PROCEED for _ in range(2)] == [True, False]
    with pytest.raises(StoreUnavailableError):
        await policy.reset("1/minute", "addr:10.0.0.1")
    assert (await ask(policy))[0] is PROCEED


async def test_a_rule_that_does_not_exist_can_neither_be_looked_at_nor_reset(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "5/minute")
    with pytest.raises(ConfigurationError, match="No rule is called 'other'"):
        await policy.peek("other", "all")
    with pytest.raises(ConfigurationError, match="No rule is called 'other'"):
        await policy.reset("other", "all")


async def test_the_store_of_a_limit_is_there_for_others(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "5/minute")
    assert policy.store is store
    await policy.store.acquire([Want("5/minute", "all", Quota(5, 60), 2)])
    assert (await policy.peek("5/minute", "all")).remaining == 3
