"""What callers see while the store is gone, and what the log says of it."""

import logging

import pytest

from resilience import (
    PROCEED,
    Call,
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    Reason,
    Reject,
    Rule,
    Verdict,
)
from resilience.testing import FaultyStore, ManualClock
from tests.support.calls import Sent


async def ask(policy: Policy, **metadata: str) -> Verdict:
    pipeline = Pipeline([policy])
    async with pipeline.admit(Call("http", "POST /", Sent(**metadata), peer="10.0.0.1")) as admission:
        return await admission.admit(pipeline.core)


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore(clock=ManualClock()))


async def test_a_local_limit_is_the_share_of_one_replica(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "10/minute", on_outage="local", replicas=4)
    store.down = True
    verdicts = [await ask(policy) for _ in range(3)]
    assert verdicts[:2] == [PROCEED, PROCEED]
    assert isinstance(verdicts[2], Reject)
    assert verdicts[2].reason is Reason.RATE_LIMITED


async def test_a_local_share_is_never_less_than_one(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "3/minute", on_outage="local", replicas=100)
    store.down = True
    assert await ask(policy) is PROCEED
    assert isinstance(await ask(policy), Reject)


async def test_a_local_share_of_each_algorithm_is_a_quota(store: FaultyStore) -> None:
    rules = [
        Rule(Quota(100, per=60, algorithm="token_bucket", burst=10)),
        Rule(Quota(100, calendar="month")),
        Rule(Quota(100, per=60, algorithm="sliding_log"), name="log"),
    ]
    policy = RateLimitPolicy(store, rules, on_outage="local", replicas=3)
    store.down = True
    verdicts = [await ask(policy) for _ in range(4)]
    assert [verdict is PROCEED for verdict in verdicts] == [True, True, True, False]


async def test_a_rule_may_declare_its_own_outage(store: FaultyStore) -> None:
    strict = Rule("1/minute", name="strict", on_outage="closed", operations=["POST /"])
    loose = Rule("1/minute", name="loose")
    store.down = True
    verdict = await ask(RateLimitPolicy(store, [strict, loose]))
    assert isinstance(verdict, Reject)
    assert verdict.reason is Reason.STORE_UNAVAILABLE
    assert await ask(RateLimitPolicy(store, [loose])) is PROCEED


async def test_a_local_limit_among_open_ones_still_counts(store: FaultyStore) -> None:
    rules = [Rule("1/minute", name="local", on_outage="local"), Rule("1/hour", name="open")]
    policy = RateLimitPolicy(store, rules)
    store.down = True
    assert [await ask(policy) is PROCEED for _ in range(2)] == [True, False]


async def test_the_store_counts_again_when_it_is_back(store: FaultyStore) -> None:
    policy = RateLimitPolicy(store, "2/minute", on_outage="open")
    store.down = True
    for _ in range(10):
        assert await ask(policy) is PROCEED
    store.down = False
    assert [await ask(policy) is PROCEED for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("kind", ["limit", "key"])
async def test_an_outage_is_logged_once_and_so_is_its_end(
    kind: str, store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy: Policy = RateLimitPolicy(store, "100/minute") if kind == "limit" else IdempotencyPolicy(store)
    with caplog.at_level(logging.WARNING, "resilience"):
        for down in (True, False, True):
            store.down = down
            for number in range(5):
                await ask(policy, idempotency_key=f"{down}-{number}")
    told = [record.getMessage() for record in caplog.records]
    assert ["Until the store is back" in line for line in told] == [True, False, True]
    assert told[1].startswith("The store is back")


def test_less_than_one_replica_is_refused(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="replicas"):
        RateLimitPolicy(store, "1/minute", replicas=0)
