"""Calls whose twin runs, what a handler knows of its operation, and ends that are recorded late."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from resilience import (
    PROCEED,
    Admission,
    Call,
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Outcome,
    Pipeline,
    Reason,
    Reject,
    Replay,
    Reply,
    RunningOperation,
    StoreUnavailableError,
    Verdict,
    get_request_id,
    running_operation,
)
from resilience.call import Protocol
from resilience.decisions.idempotency import Claim, Claimed, Completed, InProgress, Takeover
from resilience.policies.completion import LateCompletions
from resilience.policies.heartbeat import Heartbeat
from resilience.policies.waiting import Ended, OnTwin, WaitingRoom
from resilience.testing import FaultyStore, ManualClock
from tests.support.calls import Sent

REPLY = Reply("http", 201, (), b"1")
NEVER = 1000.0  # Seconds between two questions, for rooms that are to be told.
SEEN = InProgress(5.0)


class Asked(MemoryStore):
    """A store that counts the claims, and tells a test of each before it answers."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock=clock)
        self.claims = 0
        self.ids: list[str | None] = []
        self.asked = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.granted: Callable[[], object] = lambda: None

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        self.claims += 1
        self.ids.append(get_request_id())
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        claim = await super().claim(key, token, fingerprint, lease=lease, ttl=ttl, takeover=takeover)
        if isinstance(claim, Claimed):
            self.granted()
        return claim


class Scene:
    """A room over a store in which ``owner`` runs ``key``."""

    def __init__(self, store: Asked, **options: Any) -> None:
        self.store = store
        self.faulty = FaultyStore(store)
        self.room = WaitingRoom(self.ask, self.faulty.release, **options)

    async def ask(self, key: str, token: str, fingerprint: bytes) -> Claim:
        return await self.faulty.claim(key, token, fingerprint, lease=30.0, ttl=60.0, takeover="reexecute")

    def wait(self, timeout: float = 60.0, fingerprint: bytes = b"http:1") -> "asyncio.Task[Ended]":
        return asyncio.create_task(self.room.wait("key", fingerprint, SEEN, timeout))

    async def complete(self, *, by: str = "owner") -> None:
        assert await self.store.complete("key", by, b"http:1", REPLY, ttl=60.0)


async def turn() -> None:
    """Let everything that can go on go on once."""
    await asyncio.sleep(0)


async def alone() -> None:
    """Wait until this test's task is the only one; an ended poller needs some turns to be gone."""
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1:
            await turn()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@asynccontextmanager
async def scene(clock: ManualClock, **options: Any) -> AsyncIterator[Scene]:
    """Bound a test, and see to it that it leaves no task behind."""
    made = Scene(Asked(clock), **{"shortest": NEVER, "longest": NEVER, **options})
    async with asyncio.timeout(5):
        assert await made.ask("key", "owner", b"http:1") == Claimed(1)
        made.store.claims = 0
        made.store.asked.clear()
        yield made
        await alone()
    assert made.room._watches == {}
    assert made.room._waiting == 0


# --- the room


async def test_who_waits_is_told_at_once_of_what_ended_in_this_process(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twin = here.wait()
        await turn()
        await here.complete()
        here.room.wake("key")
        assert (await twin)[1] == Completed(REPLY)


async def test_who_waits_finds_out_what_ended_in_another_process(clock: ManualClock) -> None:
    async with scene(clock, shortest=0.001, longest=0.002) as here:
        twin = here.wait()
        for _ in range(5):
            await here.store.asked.wait()
            here.store.asked.clear()
        assert not twin.done()
        await here.complete()
        assert (await twin)[1] == Completed(REPLY)


async def test_all_who_wait_for_one_request_ask_as_one(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twins = [here.wait() for _ in range(100)]
        await turn()
        await here.complete()
        here.room.wake("key")
        assert {end[1] for end in await asyncio.gather(*twins)} == {Completed(REPLY)}
        assert here.store.claims == 1


async def test_pauses_grow_from_the_shortest_to_the_longest(clock: ManualClock) -> None:
    asked: list[float] = []

    def jitter(least: float, most: float) -> float:
        asked.append(most)
        assert least == most / 2
        return 0.0

    async with scene(clock, shortest=0.05, longest=0.5, jitter=jitter) as here:
        twin = here.wait()
        while here.store.claims < 6:
            here.store.asked.clear()
            await here.store.asked.wait()
        await here.complete()
        await twin
    assert asked[:6] == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]


async def test_a_wait_ends_when_its_time_is_up_with_what_the_store_said_last(clock: ManualClock) -> None:
    async with scene(clock, shortest=0.001, longest=0.001) as here:
        clock.advance(28.0)
        patient = here.wait()
        await here.store.asked.wait()
        assert (await here.wait(0.01))[1] == InProgress(2.0)
        await here.complete()
        assert (await patient)[1] == Completed(REPLY)


async def test_a_freed_key_goes_to_one_of_those_who_wait_and_the_others_wait_for_that_one(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twins = [here.wait() for _ in range(10)]
        await turn()
        await here.store.release("key", "owner")
        here.room.wake("key")
        (done,), others = await asyncio.wait(twins, return_when=asyncio.FIRST_COMPLETED)
        token, claim = done.result()
        assert claim == Claimed(1)
        await here.complete(by=token)
        here.room.wake("key")
        assert [end[1] for end in await asyncio.gather(*others)] == [Completed(REPLY)] * 9


async def test_a_key_whose_owner_died_goes_to_one_of_those_who_wait(clock: ManualClock) -> None:
    async with scene(clock, shortest=0.001, longest=0.001) as here:
        twin = here.wait()
        clock.advance(30.0)
        assert (await twin)[1] == Claimed(2)


async def test_a_key_that_is_granted_when_nobody_waits_any_more_is_given_back(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twin = here.wait()
        await turn()
        here.store.gate = asyncio.Event()
        here.room.wake("key")
        await here.store.asked.wait()
        await here.store.release("key", "owner")
        twin.cancel()
        await asyncio.wait([twin])
        here.store.gate.set()
        await alone()
        assert await here.ask("key", "next", b"http:1") == Claimed(1)


@pytest.mark.parametrize("others", [0, 1])
async def test_who_is_cut_off_with_the_key_in_hand_hands_it_on(clock: ManualClock, others: int) -> None:
    async with scene(clock) as here:
        first = here.wait()
        await turn()
        rest = [here.wait() for _ in range(others)]
        await turn()
        call_soon = asyncio.get_running_loop().call_soon
        here.store.granted = lambda: call_soon(first.cancel)
        await here.store.release("key", "owner")
        here.room.wake("key")
        with pytest.raises(asyncio.CancelledError):
            await first
        here.store.granted = lambda: None
        assert [(await other)[1] for other in rest] == [Claimed(1)] * others
        expected = InProgress if others else Claimed
        assert isinstance(await here.ask("key", "next", b"http:1"), expected)


async def test_who_leaves_does_not_disturb_the_others(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twins = [here.wait() for _ in range(3)]
        await turn()
        twins[0].cancel()
        await turn()
        await here.complete()
        here.room.wake("key")
        assert [(await twin)[1] for twin in twins[1:]] == [Completed(REPLY)] * 2


async def test_a_full_room_takes_nobody_until_somebody_leaves(clock: ManualClock) -> None:
    async with scene(clock, most=1) as here:
        twin = here.wait()
        await turn()
        assert not here.room.is_watched("key", b"http:1")
        assert (await here.wait())[1] == SEEN
        twin.cancel()
        await asyncio.wait([twin])
        next_one = here.wait()
        await turn()
        await here.complete()
        here.room.wake("key")
        assert (await next_one)[1] == Completed(REPLY)


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), RuntimeError("broken")])
async def test_nobody_waits_on_for_a_store_that_fails(clock: ManualClock, error: Exception) -> None:
    async def fails(_key: str, _token: str, _fingerprint: bytes) -> Claim:
        raise error

    async with scene(clock) as here:
        here.room.ask = fails
        twins = [here.wait() for _ in range(3)]
        await turn()
        here.room.wake("key")
        for twin in twins:
            with pytest.raises(type(error)):
                await twin


async def test_a_key_that_a_failing_store_may_have_granted_is_given_back(clock: ManualClock) -> None:
    async with scene(clock) as here:
        ask = here.ask

        async def answer_gets_lost(key: str, token: str, fingerprint: bytes) -> Claim:
            assert await ask(key, token, fingerprint) == Claimed(1)
            raise StoreUnavailableError("no answer")

        here.room.ask = answer_gets_lost
        twin = here.wait()
        await turn()
        await here.store.release("key", "owner")
        here.room.wake("key")
        with pytest.raises(StoreUnavailableError):
            await twin
        await alone()
        assert await here.ask("key", "next", b"http:1") == Claimed(1)


async def test_a_poller_that_is_cut_off_leaves_nobody_waiting(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twin = here.wait()
        await turn()
        here.room._watches["key"][b"http:1"]._task.cancel()
        with pytest.raises(StoreUnavailableError, match="cut off"):
            await twin


async def test_another_payload_is_told_so_by_a_poller_of_its_own(clock: ManualClock) -> None:
    async with scene(clock) as here:
        twin, other = here.wait(), here.wait(fingerprint=b"grpc:2")
        await turn()
        await here.complete()
        here.room.wake("key")
        assert [(await one)[1] for one in (twin, other)] == [Completed(REPLY)] * 2
        assert here.store.claims == 2


# --- the policy


def keyed(*, protocol: Protocol = "grpc", timeout_ms: int | None = None) -> Call:
    async def payload(_limit: int) -> bytes:
        return b"{}"

    sent = {"idempotency_key": "k"} | ({"x_request_timeout_ms": str(timeout_ms)} if timeout_ms is not None else {})
    return Call(protocol, "create", Sent(**sent), peer="10.0.0.1", payload=payload)


def refusal(verdict: Verdict) -> Reject:
    assert isinstance(verdict, Reject)
    return verdict


class Door:
    """Serves calls as a door does: each in a task, until ``gate`` is opened."""

    def __init__(self, *policies: IdempotencyPolicy) -> None:
        self.pipeline = Pipeline(policies)
        self.gate = asyncio.Event()
        self.running = asyncio.Event()
        self.runs = 0
        self.seen: list[RunningOperation | None] = []
        self.ended: Any = "completed"

    async def _serve(self, call: Call) -> Verdict:
        async with self.pipeline.admit(call) as admission:
            verdict = await admission.admit(self.pipeline.core)
            if verdict is PROCEED:
                self.runs += 1
                self.seen.append(running_operation())
                self.running.set()
                await self.gate.wait()
                await admission.settle(Outcome(self.ended, Reply(call.protocol, 0, (), b"1")))
            return verdict

    def serve(self, call: Call) -> "asyncio.Task[Verdict]":
        return asyncio.create_task(self._serve(call))


@pytest.fixture
def store(clock: ManualClock) -> FaultyStore:
    return FaultyStore(MemoryStore(clock=clock))


@pytest.mark.parametrize(
    ("protocol", "in_progress", "waits"),
    [
        ("http", None, False),
        ("grpc", None, True),
        ("http", "wait", True),
        ("grpc", "wait", True),
        ("http", "reject", False),
        ("grpc", "reject", False),
    ],
)
async def test_a_twin_waits_or_is_told_to_come_back_as_declared_or_as_its_door_does(
    store: FaultyStore, protocol: Protocol, in_progress: OnTwin | None, waits: bool
) -> None:
    door = Door(IdempotencyPolicy(store, in_progress=in_progress))
    async with asyncio.timeout(5):
        first = door.serve(keyed(protocol=protocol))
        await door.running.wait()
        twin = door.serve(keyed(protocol=protocol))
        if not waits:
            assert refusal(await twin).reason is Reason.IDEMPOTENCY_IN_PROGRESS
        door.gate.set()
        assert await first is PROCEED
        if waits:
            assert await twin == Replay(Reply(protocol, 0, (), b"1"))
    assert door.runs == 1
    await alone()


async def test_a_hundred_twins_cost_the_store_little_more_than_one(clock: ManualClock) -> None:
    asked = Asked(clock)
    door = Door(IdempotencyPolicy(asked))
    async with asyncio.timeout(5):
        first = door.serve(keyed())
        await door.running.wait()
        twins = [door.serve(keyed()) for _ in range(100)]
        await turn()
        await turn()
        door.gate.set()
        await first
        assert await asyncio.gather(*twins) == [Replay(Reply("grpc", 0, (), b"1"))] * 100
    assert door.runs == 1
    assert asked.claims <= 5


async def test_a_wait_ends_before_the_callers_deadline_does(store: FaultyStore) -> None:
    door = Door(IdempotencyPolicy(store))
    async with asyncio.timeout(5):
        first = door.serve(keyed())
        await door.running.wait()
        refused = refusal(await door.serve(keyed(timeout_ms=50)))
        assert refused.reason is Reason.IDEMPOTENCY_IN_PROGRESS
        assert refused.retry_after == 5.0
        door.gate.set()
        await first


@pytest.mark.parametrize(("left", "waits"), [(None, 30.0), (100.0, 30.0), (10.0, 9.8), (0.5, 0.4), (0.0, 0.0)])
def test_a_wait_is_bounded_by_the_policy_and_by_the_deadline_less_a_margin(
    store: FaultyStore, left: float | None, waits: float
) -> None:
    admission = Pipeline().admit(keyed())
    context = admission.context = type(admission.context)("req_1", "c")
    context.set_deadline(left, lambda: 0.0)
    assert IdempotencyPolicy(store)._patience(keyed(), admission) == pytest.approx(waits)


async def test_a_wait_ends_at_its_bound(store: FaultyStore) -> None:
    door = Door(IdempotencyPolicy(store, max_wait=0.01))
    async with asyncio.timeout(5):
        first = door.serve(keyed())
        await door.running.wait()
        assert refusal(await door.serve(keyed())).reason is Reason.IDEMPOTENCY_IN_PROGRESS
        door.gate.set()
        await first


async def test_twins_of_an_operation_that_failed_run_one_after_the_other(store: FaultyStore) -> None:
    door = Door(IdempotencyPolicy(store))
    door.ended = "failed"
    door.gate.set()
    async with asyncio.timeout(5):
        assert set(await asyncio.gather(*(door.serve(keyed()) for _ in range(5)))) == {PROCEED}
    assert door.runs == 5
    assert [operation and operation.epoch for operation in door.seen] == [1] * 5
    await alone()


@pytest.mark.parametrize("on_outage", ["closed", "open"])
async def test_who_waits_for_a_twin_is_refused_when_the_store_goes_and_never_runs_unprotected(
    store: FaultyStore, on_outage: Any
) -> None:
    policy = IdempotencyPolicy(store, on_outage=on_outage)
    policy._room.shortest = policy._room.longest = 0.001
    door = Door(policy)
    async with asyncio.timeout(5):
        first = door.serve(keyed())
        await door.running.wait()
        twin = door.serve(keyed())
        await turn()
        store.down = True
        refused = refusal(await twin)
        assert (refused.reason, refused.retry_after) == (Reason.STORE_UNAVAILABLE, 1.0)
        store.down = False
        door.gate.set()
        await first
    assert door.runs == 1


@pytest.mark.parametrize("max_wait", [0.0, -1.0, float("inf"), float("nan")])
def test_a_longest_wait_out_of_range_is_refused(store: FaultyStore, max_wait: float) -> None:
    with pytest.raises(ConfigurationError, match="max_wait"):
        IdempotencyPolicy(store, max_wait=max_wait)


async def test_the_poller_asks_under_nobodys_ids(clock: ManualClock) -> None:
    asked = Asked(clock)
    policy = IdempotencyPolicy(asked)
    policy._room.shortest = 0.001
    door = Door(policy)
    async with asyncio.timeout(5):
        first = door.serve(keyed())
        await door.running.wait()
        twin = door.serve(keyed())
        while len(asked.ids) < 3:
            asked.asked.clear()
            await asked.asked.wait()
        door.gate.set()
        await asyncio.gather(first, twin)
    assert None not in asked.ids[:2]
    assert set(asked.ids[2:]) == {None}


async def test_a_key_that_is_remembered_longer_than_its_reply_does_not_run_again(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = IdempotencyPolicy(store, ttl=60.0, tombstone=60.0)
    await run(policy)
    for seconds, reason in ((60.0, Reason.IDEMPOTENCY_NOT_REPLAYABLE), (59.0, Reason.IDEMPOTENCY_NOT_REPLAYABLE)):
        clock.advance(seconds)
        assert refusal(await Door(policy).serve(keyed())).reason is reason
    clock.advance(1.0)
    await run(policy)


@pytest.mark.parametrize("tombstone", [-1.0, float("inf"), float("nan")])
def test_a_tombstone_out_of_range_is_refused(store: FaultyStore, tombstone: float) -> None:
    with pytest.raises(ConfigurationError, match="tombstone"):
        IdempotencyPolicy(store, tombstone=tombstone)


# --- the running operation


async def run(
    policy: IdempotencyPolicy, look: Callable[[Admission], Any] = lambda _: None, ended: Any = "completed"
) -> Any:
    """Run one operation; return what ``look`` sees in it."""
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as admission:
        assert await admission.admit(pipeline.core) is PROCEED
        seen = look(admission)
        await admission.settle(Outcome(ended, Reply("grpc", 0, (), b"1")))
        return seen


def held() -> RunningOperation:
    operation = running_operation()
    assert operation is not None
    return operation


async def test_derived_keys_survive_retries_and_takeovers_and_the_epoch_tells_them_apart(
    store: FaultyStore, clock: ManualClock
) -> None:
    policy = IdempotencyPolicy(store)

    def look(_admission: Admission) -> tuple[int, str, str]:
        return held().epoch, held().key, held().derive_key("psp")

    failed = await run(policy, look, "failed")
    cut = await run(policy, look, "cancelled")
    clock.advance(30.0)
    taken_over = await run(policy, look)
    assert [seen[0] for seen in (failed, cut, taken_over)] == [1, 1, 2]
    assert failed[1:] == cut[1:] == taken_over[1:]
    assert await run(IdempotencyPolicy(store, operation="pay"), lambda _: held().name) == "pay"


def test_each_purpose_and_each_part_has_a_derived_key_of_its_own() -> None:
    operation, other = RunningOperation("pay", "a" * 64, 1), RunningOperation("pay", "b" * 64, 1)
    derived = [
        operation.derive_key("psp"),
        operation.derive_key("mail"),
        operation.derive_key("psp", 1),
        operation.derive_key("psp", "1"),
        operation.derive_key("ps", "p"),
        other.derive_key("psp"),
    ]
    assert len(set(derived)) == len(derived)
    assert operation.derive_key("psp", 1) == RunningOperation("pay", "a" * 64, 2).derive_key("psp", 1)
    assert all(len(key) == 64 and operation.key not in key for key in derived)


async def test_outside_of_a_keyed_call_nothing_runs(store: FaultyStore) -> None:
    assert running_operation() is None
    pipeline = Pipeline([IdempotencyPolicy(store)])
    async with pipeline.admit(Call("http", "create", Sent(), peer="10.0.0.1")) as admission:
        assert await admission.admit(pipeline.core) is PROCEED
        assert running_operation() is None
    await run(IdempotencyPolicy(store))
    assert running_operation() is None


async def test_an_operation_learns_that_its_lease_was_lost(store: FaultyStore, clock: ManualClock) -> None:
    policy = IdempotencyPolicy(store)
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed()) as stalled:
        assert await stalled.admit(pipeline.core) is PROCEED
        operation = held()
        await policy._heartbeat.beat()
        assert not operation.lost
        clock.advance(30.0)
        assert await run(policy, lambda _: held().epoch) == 2
        await policy._heartbeat.beat()
        assert operation.lost


async def test_an_operation_that_runs_unprotected_knows_that_it_does(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store, on_outage="open")
    protected = await run(policy, lambda _: held().derive_key("psp"), "failed")
    store.down = True
    assert await run(policy, lambda _: (held().epoch, held().lost, held().derive_key("psp"))) == (0, True, protected)


# --- ends that are recorded late


async def finish_without_store(policy: IdempotencyPolicy, store: FaultyStore) -> None:
    def take_away(_admission: Admission) -> None:
        store.down = True

    await run(policy, take_away)
    store.down = False


async def replayed(policy: IdempotencyPolicy) -> bool:
    pipeline = Pipeline([policy])
    async with pipeline.admit(keyed(timeout_ms=1)) as admission:
        return isinstance(await admission.admit(pipeline.core), Replay)


async def test_an_end_that_found_no_store_is_recorded_once_it_is_back(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    policy = IdempotencyPolicy(store)
    await finish_without_store(policy, store)
    assert "tried again in the background" in caplog.text
    store.down = True
    await policy._late.retry()
    store.down = False
    assert not await replayed(policy)
    clock.advance(29.0)
    await policy._heartbeat.beat()  # its lease is kept alive meanwhile
    clock.advance(29.0)
    await policy._late.retry()
    assert await replayed(policy)
    assert policy._late._pending == {}
    assert policy._heartbeat._held == {}


async def test_a_late_end_wakes_those_who_wait_for_it(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)
    policy._room.shortest = policy._room.longest = NEVER
    await finish_without_store(policy, store)
    door = Door(policy)
    twin = door.serve(keyed())
    await turn()
    await policy._late.retry()
    assert isinstance(await asyncio.wait_for(twin, 5), Replay)


async def test_a_lost_record_is_restored(clock: ManualClock) -> None:
    store = FaultyStore(MemoryStore(clock=clock))
    policy = IdempotencyPolicy(store)
    await finish_without_store(policy, store)
    store._store = MemoryStore(clock=clock)
    await policy._late.retry()
    assert await replayed(policy)


async def test_what_another_worker_took_over_stays_that_workers(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    policy, other = IdempotencyPolicy(store), IdempotencyPolicy(store)
    await finish_without_store(policy, store)
    clock.advance(30.0)
    assert await run(other, lambda _: held().epoch) == 2
    await policy._late.retry()
    assert "took the idempotency key over" in caplog.text
    assert policy._late._pending == {}


def late_completions(
    store: FaultyStore, recorded: Callable[[str], None] = lambda _: None, **options: Any
) -> LateCompletions:
    async def complete(key: str, token: str, fingerprint: bytes, reply: Reply | None, ttl: float) -> bool:
        return await store.complete(key, token, fingerprint, reply, ttl=ttl)

    return LateCompletions(complete, store.release, Heartbeat(store, 30.0, 60.0), 60.0, recorded, **options)


async def test_late_ends_are_tried_again_and_again_without_being_told(store: FaultyStore) -> None:
    recorded: asyncio.Queue[str] = asyncio.Queue()
    late = late_completions(store, recorded.put_nowait, every=0.001)
    store.down = True
    assert late.keep("one", "t1", b"http:1", REPLY)
    assert late.keep("two", "t2", b"http:1", REPLY)
    async with asyncio.timeout(5):
        while late._trying is None:
            await turn()
        await late._trying
        store.down = False
        assert {await recorded.get(), await recorded.get()} == {"one", "two"}
    await alone()
    assert late._timer is None
    assert late._bytes == 0


async def test_late_ends_are_bounded_and_at_the_bound_of_bytes_the_reply_goes_first(store: FaultyStore) -> None:
    late = late_completions(store, most=2, most_bytes=1)
    assert late.keep("one", "t1", b"http:1", REPLY)
    assert late.keep("two", "t2", b"http:1", REPLY)
    assert not late.keep("three", "t3", b"http:1", REPLY)
    await late.retry()
    for key, reply in (("one", REPLY), ("two", None)):
        claim = await store.claim(key, "next", b"http:1", lease=30.0, ttl=60.0, takeover="reexecute")
        assert claim == Completed(reply)


async def test_a_late_end_is_let_go_when_its_reply_would_have_expired(
    store: FaultyStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    late = late_completions(store, clock=clock)
    late.keep("one", "t1", b"http:1", REPLY)
    clock.advance(60.0)
    await late.retry()
    assert late._pending == {}
    assert "never recorded" in caplog.text


async def test_an_accident_with_one_late_end_keeps_no_other_back(
    store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FaultyStore):
        async def complete(self, key: str, *args: Any, **options: Any) -> bool:
            if key == "one":
                raise RuntimeError("broken")
            return await super().complete(key, *args, **options)

    recorded: list[str] = []
    broken = Broken(store)
    late = late_completions(broken, recorded.append)
    late.keep("one", "t1", b"http:1", REPLY)
    late.keep("two", "t2", b"http:1", REPLY)
    with caplog.at_level(logging.ERROR, "resilience"):
        await late.retry()
    assert recorded == ["two"]
    assert "could not be recorded" in caplog.text
    assert late._pending == {}


async def test_a_claim_without_an_answer_is_given_back_once_the_store_answers(store: FaultyStore) -> None:
    recorded: list[str] = []
    late = late_completions(store, recorded.append)
    store.down = True
    late.free("one", "ghost")
    await late.retry()
    assert recorded == []
    store.down = False
    await store.claim("one", "ghost", b"http:1", lease=30.0, ttl=60.0, takeover="refuse")  # it was on its way
    await late.retry()
    assert recorded == ["one"]
    assert late._pending == {}
    assert await store.claim("one", "next", b"http:1", lease=30.0, ttl=60.0, takeover="refuse") == Claimed(1)


async def test_what_was_never_claimed_is_let_go_after_two_answers_and_takes_nobodys_key(store: FaultyStore) -> None:
    late = late_completions(store)
    late.free("one", "ghost")
    await store.claim("one", "owner", b"http:1", lease=30.0, ttl=60.0, takeover="refuse")
    await late.retry()
    assert late._pending
    await late.retry()
    assert late._pending == {}
    claim = await store.claim("one", "next", b"http:1", lease=30.0, ttl=60.0, takeover="refuse")
    assert isinstance(claim, InProgress)


async def test_what_is_to_be_freed_is_bounded_too(store: FaultyStore, clock: ManualClock) -> None:
    late = late_completions(store, most=1, clock=clock)
    late.free("one", "t1")
    late.free("two", "t2")
    assert list(late._pending) == ["t1"]
    clock.advance(60.0)
    await late.retry()
    assert late._pending == {}


async def test_a_failed_operation_whose_store_is_gone_frees_its_key_later(store: FaultyStore) -> None:
    policy = IdempotencyPolicy(store)

    await run(policy, lambda _: setattr(store, "down", True), "failed")
    store.down = False
    await policy._late.retry()
    assert await run(policy, lambda _: held().epoch) == 1
