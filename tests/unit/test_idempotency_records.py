"""What an operator can do with records, found as a door finds them."""

import pytest

from resilience import (
    Call,
    ConfigurationError,
    IdempotencyPolicy,
    IdempotencyRecords,
    MemoryStore,
    Outcome,
    Pipeline,
    Reason,
    Reject,
    Replay,
    Reply,
    by_user,
    set_context_user,
)
from resilience.testing import ManualClock
from tests.support.calls import Sent

OPERATION, KEY = "POST /pay", "k"
REPLY = Reply("http", 201, (("content-type", "text/plain"),), b"paid")
ALICE = by_user("alice", "shop")


async def payload(_limit: int) -> bytes:
    return b"{}"


def call() -> Call:
    return Call("http", OPERATION, Sent(idempotency_key=KEY), payload=payload)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock=clock)


async def begin(store: MemoryStore, outcome: Outcome | None) -> object:
    """Make a call as alice, which ends as told; return the verdict."""
    pipeline = Pipeline([IdempotencyPolicy(store, lease=30, takeover="refuse")])
    async with pipeline.admit(call()) as admission:
        set_context_user("alice", tenant_id="shop")
        verdict = await admission.admit(pipeline.core)
        if outcome is not None:
            await admission.settle(outcome)
        return verdict


async def test_a_finished_operation_is_shown_with_its_reply(store: MemoryStore) -> None:
    records = IdempotencyRecords(store)
    assert await records.inspect(OPERATION, ALICE, KEY) is None
    await begin(store, Outcome("completed", REPLY))
    found = await records.inspect(OPERATION, ALICE, KEY)
    assert found is not None
    assert (found.state, found.epoch, found.reply) == ("completed", 1, REPLY)
    assert await records.inspect(OPERATION, by_user("bob"), KEY) is None


async def test_a_forgotten_key_runs_anew(store: MemoryStore) -> None:
    records = IdempotencyRecords(store)
    await begin(store, Outcome("completed", REPLY))
    assert isinstance(await begin(store, None), Replay)
    assert await records.forget(OPERATION, ALICE, KEY)
    assert not await records.forget(OPERATION, ALICE, KEY)
    assert not isinstance(await begin(store, Outcome("completed", REPLY)), Replay)


async def test_a_lost_operation_is_answered_by_an_operator(store: MemoryStore, clock: ManualClock) -> None:
    records = IdempotencyRecords(store)
    await begin(store, Outcome("cancelled"))
    assert not await records.resolve(OPERATION, ALICE, KEY, REPLY)
    clock.advance(31)
    lost = await begin(store, None)
    assert isinstance(lost, Reject)
    assert lost.reason is Reason.IDEMPOTENCY_ABANDONED
    assert await records.resolve(OPERATION, ALICE, KEY, REPLY)
    assert await begin(store, None) == Replay(REPLY)


async def test_a_malformed_key_is_refused(store: MemoryStore) -> None:
    with pytest.raises(ConfigurationError, match="visible ASCII"):
        await IdempotencyRecords(store).inspect(OPERATION, ALICE, "ü")
