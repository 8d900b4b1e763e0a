from time import time

import pytest

from resilience.decisions.idempotency import Claim, Claimed, Completed, InProgress
from resilience.decisions.quota import Quota
from resilience.errors import StoreUnavailableError
from resilience.stores.base import Want
from resilience.stores.memory import MemoryStore
from resilience.testing import ManualClock
from resilience.verdict import Reply

FIVE = Quota(5, per=60)
PRINT = b"http:1"
RECORD = 600  # What a record counts for, beside its reply's body.


def reply(size: int) -> Reply:
    return Reply("http", 200, (), b"x" * size)


async def take(store: MemoryStore, subject: str, cost: int = 1) -> bool:
    return (await store.acquire([Want("r", subject, FIVE, cost)]))[0].allowed


async def left(store: MemoryStore, subject: str) -> int:
    return (await store.acquire([Want("r", subject, FIVE, 0)]))[0].remaining


async def claim(store: MemoryStore, key: str, owner: str = "t") -> Claim:
    return await store.claim(key, owner, PRINT, lease=1.0, ttl=60.0, takeover="reexecute")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def test_a_flood_of_fresh_subjects_never_frees_one_that_is_over_its_limit(clock: ManualClock) -> None:
    store = MemoryStore(max_subjects=100, clock=clock)
    for n in range(10_000):
        if n % 500 == 0:  # in the table's every state: empty, filling and full
            assert await take(store, f"greedy-{n}", cost=5)
        assert await take(store, f"fresh-{n}")
    for n in range(0, 10_000, 500):
        assert not await take(store, f"greedy-{n}")


async def test_a_flood_never_holds_more_subjects_than_the_bound(clock: ManualClock) -> None:
    store = MemoryStore(max_subjects=10, clock=clock)
    for n in range(100):
        await take(store, f"fresh-{n}")
        assert len(store._counts) <= 10


async def test_a_bound_of_one_subject_is_kept_too(clock: ManualClock) -> None:
    store = MemoryStore(max_subjects=1, clock=clock)
    assert await take(store, "ann", cost=5)
    assert not await take(store, "ann")
    assert await take(store, "bob", cost=5)
    assert not await take(store, "bob")
    assert len(store._counts) == 1


async def test_at_the_bound_the_least_used_goes(clock: ManualClock) -> None:
    store = MemoryStore(max_subjects=4, clock=clock)
    for subject, cost in (("ann", 4), ("bob", 2), ("cid", 3), ("dan", 5)):
        await take(store, subject, cost)
    await take(store, "eve", cost=5)
    assert [await left(store, subject) for subject in ("ann", "bob", "cid", "dan", "eve")] == [1, 5, 2, 0, 0]


async def test_use_is_weighed_against_the_limit_and_not_by_units(clock: ManualClock) -> None:
    store, wide = MemoryStore(max_subjects=2, clock=clock), Quota(1000, per=60)
    await take(store, "full", cost=5)
    await store.acquire([Want("wide", "idle", wide, 100)])
    await take(store, "fresh")
    assert await left(store, "full") == 0
    assert (await store.acquire([Want("wide", "idle", wide, 0)]))[0].remaining == 1000


async def test_a_subject_that_comes_back_makes_no_room(clock: ManualClock) -> None:
    store = MemoryStore(max_subjects=3, clock=clock)
    for subject in ("ann", "bob", "cid"):
        await take(store, subject)
    for _ in range(4):
        await take(store, "cid")
    assert [await left(store, subject) for subject in ("ann", "bob", "cid")] == [4, 4, 0]


async def test_expired_subjects_go_as_new_ones_come(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    for n in range(400):
        await take(store, f"old-{n}")
    clock.advance(60.0)
    for n in range(100):
        await take(store, f"new-{n}")
    assert len(store._counts) == 100


async def test_a_live_subject_is_not_swept_with_the_expired(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    await take(store, "early", cost=5)
    clock.advance(59.0)
    await take(store, "late", cost=5)
    clock.advance(1.0)
    for n in range(10):
        await take(store, f"new-{n}")
    assert await left(store, "late") == 0
    assert ("r", "early") not in store._counts


async def test_looking_and_being_denied_take_no_room(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    assert await left(store, "ann") == 5
    assert not await take(store, "bob", cost=6)
    assert store._counts == {}


async def test_one_request_that_names_a_rule_twice_is_held_to_its_limit(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    usages = await store.acquire([Want("r", "ann", FIVE, 3), Want("r", "ann", FIVE, 3)])
    assert not all(usage.allowed for usage in usages)


async def test_a_reset_of_nobody_is_no_error(clock: ManualClock) -> None:
    await MemoryStore(clock=clock).reset("r", "nobody")


async def test_a_full_store_refuses_new_claims_and_says_what_to_do(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=3 * RECORD, clock=clock)
    for n in range(3):
        assert await claim(store, f"k{n}", f"t{n}") == Claimed(1)
    with pytest.raises(StoreUnavailableError) as refused:
        await claim(store, "one too many")
    for word in ("1800 bytes", "max_record_bytes", "ttl", "Redis"):
        assert word in str(refused.value)


async def test_a_full_store_keeps_every_record_it_has(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=3 * RECORD, clock=clock)
    for n in range(3):
        await claim(store, f"k{n}", f"t{n}")
    for n in range(100):
        with pytest.raises(StoreUnavailableError):
            await claim(store, f"new-{n}")
    for n in range(3):
        assert isinstance(await claim(store, f"k{n}", "twin"), InProgress)
        assert await claim(store, f"k{n}", f"t{n}") == Claimed(1)
        assert await store.renew(f"k{n}", f"t{n}", lease=1.0, ttl=60.0)
        assert await store.complete(f"k{n}", f"t{n}", PRINT, None, ttl=60.0)
        assert await claim(store, f"k{n}", "late") == Completed(None)


async def test_a_full_store_lets_an_abandoned_key_be_taken_over(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=RECORD, clock=clock)
    await claim(store, "k")
    clock.advance(1.0)
    assert await claim(store, "k", "second") == Claimed(2)


async def test_a_reply_that_fits_to_the_byte_is_kept(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=RECORD + 100, clock=clock)
    await claim(store, "k")
    assert await store.complete("k", "t", PRINT, reply(100), ttl=60.0)
    assert await claim(store, "k", "twin") == Completed(reply(100))


async def test_a_reply_that_does_not_fit_still_guards_its_key(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=RECORD + 100, clock=clock)
    await claim(store, "k")
    assert await store.complete("k", "t", PRINT, reply(101), ttl=60.0)
    assert await claim(store, "k", "twin") == Completed(None)


async def test_a_completion_that_is_repeated_keeps_the_reply_though_the_store_is_nearly_full(
    clock: ManualClock,
) -> None:
    store = MemoryStore(max_record_bytes=RECORD + 100, clock=clock)
    await claim(store, "k")
    for _ in range(2):
        assert await store.complete("k", "t", PRINT, reply(80), ttl=60.0)
    assert await claim(store, "k", "twin") == Completed(reply(80))


async def test_what_is_released_or_expired_makes_room_to_the_last_byte(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=4 * RECORD, clock=clock)
    for round_ in range(5):
        for n in range(4):
            assert await claim(store, f"{round_}-{n}", "t") == Claimed(1)
        with pytest.raises(StoreUnavailableError):
            await claim(store, f"{round_}-full")
        assert await store.release(f"{round_}-0", "t")
        assert await claim(store, f"{round_}-0", "u") == Claimed(1)
        assert await store.release(f"{round_}-0", "u")
        assert await store.renew(f"{round_}-1", "t", lease=1.0, ttl=60.0)
        assert await store.complete(f"{round_}-1", "t", PRINT, reply(RECORD), ttl=60.0)
        with pytest.raises(StoreUnavailableError):
            await claim(store, f"{round_}-full")
        clock.advance(60.0)


async def test_an_expired_record_is_free_though_nobody_swept_it(clock: ManualClock) -> None:
    store = MemoryStore(max_record_bytes=RECORD, clock=clock)
    await claim(store, "k")
    await store.complete("k", "t", PRINT, reply(0), ttl=10.0)
    clock.advance(9.999)
    assert await claim(store, "k", "late") == Completed(reply(0))
    clock.advance(0.001)
    assert await claim(store, "k", "next") == Claimed(1)


async def test_expired_records_go_as_new_ones_come(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    for n in range(400):
        await claim(store, f"old-{n}")
    clock.advance(60.0)
    for n in range(100):
        await claim(store, f"new-{n}")
    assert len(store._records) == 100


def test_the_clock_of_a_store_starts_at_the_time_of_day() -> None:
    before = time()
    assert before - 60 < MemoryStore()._clock() < time() + 60


async def test_a_store_may_be_closed_twice(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock)
    await store.aclose()
    await store.aclose()
