"""Concurrency limits, from a policy's side: taken on admission, renewed while a call runs, given back at its end."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resilience import (
    PROCEED,
    Admission,
    Call,
    ConfigurationError,
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


def calling(pipeline: Pipeline) -> Admission:
    return pipeline.admit(Call("http", "GET /", Sent(), peer="10.0.0.1"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FaultyStore:
    return FaultyStore(MemoryStore(clock=clock))


AT_ONCE = Rule(Quota(2, per=30, algorithm="concurrency"), name="busy")


async def test_a_third_call_waits_for_one_of_two_to_end(store: FaultyStore) -> None:
    pipeline = Pipeline([RateLimitPolicy(store, AT_ONCE)])
    async with calling(pipeline) as one, calling(pipeline) as two, calling(pipeline) as three:
        assert await one.admit(pipeline.core) is PROCEED
        assert await two.admit(pipeline.core) is PROCEED
        verdict = await three.admit(pipeline.core)
        assert isinstance(verdict, Reject)
        assert verdict.reason is Reason.RATE_LIMITED
        assert ("ratelimit-policy", '"busy";q=2;qu="concurrent-requests"') in three.metadata
    async with calling(pipeline) as four:
        assert await four.admit(pipeline.core) is PROCEED


async def test_a_call_that_is_refused_later_gives_its_permit_back(store: FaultyStore) -> None:
    class No:
        async def admit(self, _call: Call, _admission: Admission) -> Verdict:
            return Reject(Reason.DRAINING, "No")

    policies: list[Policy] = [RateLimitPolicy(store, AT_ONCE), No()]
    pipeline = Pipeline(policies)
    for _ in range(5):
        async with calling(pipeline) as admission:
            verdict = await admission.admit(pipeline.core)
            assert isinstance(verdict, Reject)
            assert verdict.reason is Reason.DRAINING


async def test_a_call_that_outlasts_its_lease_keeps_its_permit(store: FaultyStore, clock: ManualClock) -> None:
    policy = RateLimitPolicy(store, AT_ONCE)
    pipeline = Pipeline([policy])
    async with calling(pipeline) as one, calling(pipeline) as two:
        await one.admit(pipeline.core)
        await two.admit(pipeline.core)
        assert policy._permits._heartbeat is not None
        for _ in range(4):
            clock.advance(20)
            await policy._permits._heartbeat.beat()
        async with calling(pipeline) as three:
            assert isinstance(await three.admit(pipeline.core), Reject)


async def test_a_dead_workers_permit_is_free_after_its_lease(store: FaultyStore, clock: ManualClock) -> None:
    pipeline, other = Pipeline([RateLimitPolicy(store, AT_ONCE)]), Pipeline([RateLimitPolicy(store, AT_ONCE)])
    async with calling(pipeline) as one, calling(pipeline) as two:
        await one.admit(pipeline.core)
        await two.admit(pipeline.core)
        clock.advance(31)  # and no heartbeat, as of a worker that died
        async with calling(other) as three:
            assert await three.admit(other.core) is PROCEED


async def test_a_store_that_goes_before_the_end_does_not_break_the_call(store: FaultyStore) -> None:
    pipeline = Pipeline([RateLimitPolicy(store, AT_ONCE)])
    async with calling(pipeline) as admission:
        await admission.admit(pipeline.core)
        store.down = True
    assert admission.settled


async def test_permits_are_held_locally_while_the_store_is_gone(store: FaultyStore) -> None:
    pipeline = Pipeline([RateLimitPolicy(store, AT_ONCE, on_outage="local", replicas=2)])
    store.down = True
    async with calling(pipeline) as one, calling(pipeline) as two:
        assert await one.admit(pipeline.core) is PROCEED
        assert isinstance(await two.admit(pipeline.core), Reject)
    async with calling(pipeline) as three:
        assert await three.admit(pipeline.core) is PROCEED


async def test_a_hundred_at_once_never_hold_more_than_the_limit(store: FaultyStore) -> None:
    pipeline = Pipeline([RateLimitPolicy(store, Rule(Quota(7, per=30, algorithm="concurrency")))])
    inside = most = 0

    async def call() -> None:
        nonlocal inside, most
        async with calling(pipeline) as admission:
            if await admission.admit(pipeline.core) is PROCEED:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    await asyncio.gather(*(call() for _ in range(100)))
    assert most == 7


def test_a_call_takes_one_permit() -> None:
    with pytest.raises(ConfigurationError, match="one permit"):
        Rule(Quota(2, per=30, algorithm="concurrency"), cost=2)
    with pytest.raises(ConfigurationError, match="lease"):
        Quota(2, per=0.5, algorithm="concurrency")


@pytest.mark.parametrize(("workers", "told"), [("4", 1), ("1", 0), ("many", 0)])
def test_one_of_several_workers_on_the_memory_store_is_told_once(workers: str, told: int) -> None:
    code = "from resilience import MemoryStore; MemoryStore(); MemoryStore()"
    environment = {**os.environ, "WEB_CONCURRENCY": workers}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("each counts alone") == told
