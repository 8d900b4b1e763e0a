"""Public: what every store must do. Subclass it, say how to make the store and how time passes, and run pytest."""

import asyncio
from abc import ABC, abstractmethod

from resilience.decisions.idempotency import Abandoned, Claim, Claimed, Completed, InProgress, Mismatched, Takeover
from resilience.decisions.quota import Algorithm, Quota
from resilience.stores.base import Store, Want
from resilience.verdict import Reply

REPLY = Reply("http", 201, (("content-type", "application/json"), ("link", "a"), ("link", "b")), b'{"id":"p_1"}')
FIVE = Quota(5, per=1)
AT_ONCE = Quota(2, per=1, algorithm="concurrency")
LEASE = 0.5
PRINT, OTHER_PRINT, FOREIGN_PRINT = b"http:" + b"1" * 32, b"http:" + b"2" * 32, b"grpc:" + b"1" * 32


class StoreContract(ABC):
    """The promises of ``stores.base``, as tests. Needs pytest with asyncio tests switched on (``asyncio_mode=auto``).

    No test keeps anything between runs but under the keys it makes up, so a shared server will do.
    """

    @abstractmethod
    async def make_store(self) -> Store:
        """Return the store under test. Called once in each test."""

    @abstractmethod
    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass on the store's clock."""

    @abstractmethod
    def unique(self, name: str) -> str:
        """Return a key or subject that no other test has used."""

    def _want(self, subject: str, quota: Quota = FIVE, cost: int = 1) -> Want:
        return Want(quota.name, subject, quota, cost)

    async def test_a_quota_admits_its_limit_and_no_more(self) -> None:
        """The sixth of five is denied, and told when to come back."""
        store, who = await self.make_store(), self.unique("limit")
        admitted = [(await store.acquire([self._want(who)]))[0] for _ in range(5)]
        assert [usage.remaining for usage in admitted] == [4, 3, 2, 1, 0]
        denied = (await store.acquire([self._want(who)]))[0]
        assert not denied.allowed
        assert 0 < denied.retry_after < 1.001

    async def test_a_retry_at_retry_after_is_admitted(self) -> None:
        """The hint is neither early nor a guess."""
        store, who = await self.make_store(), self.unique("retry")
        await store.acquire([self._want(who, cost=5)])
        denied = (await store.acquire([self._want(who)]))[0]
        await self.advance(denied.retry_after)
        assert (await store.acquire([self._want(who)]))[0].allowed

    async def test_a_denial_by_one_rule_takes_nothing_of_the_other(self) -> None:
        """Several rules are all or nothing."""
        store, who = await self.make_store(), self.unique("stacked")
        tight, wide = Quota(1, per=60), Quota(10, per=3600)
        both = [self._want(who, tight), self._want(who, wide)]
        await store.acquire(both)
        for _ in range(5):
            assert [usage.allowed for usage in await store.acquire(both)] == [False, True]
        assert (await store.acquire([self._want(who, wide, cost=0)]))[0].remaining == 9

    async def test_rules_of_different_subjects_are_all_or_nothing(self) -> None:
        """A caller's own quota is not touched by a denial of everybody's."""
        store, me, all_ = await self.make_store(), self.unique("me"), self.unique("all")
        mine, everybodys = Quota(10, per=60), Quota(2, per=60)
        both = [self._want(me, mine), self._want(all_, everybodys)]
        answers = [[usage.allowed for usage in await store.acquire(both)] for _ in range(4)]
        assert answers == [[True, True], [True, True], [True, False], [True, False]]
        assert (await store.acquire([self._want(me, mine, cost=0)]))[0].remaining == 8

    async def test_a_cost_of_zero_only_looks(self) -> None:
        """Looking is free."""
        store, who = await self.make_store(), self.unique("look")
        for _ in range(10):
            assert (await store.acquire([self._want(who, cost=0)]))[0].remaining == 5

    async def test_a_cost_over_the_limit_is_never_admitted(self) -> None:
        """It is told so, rather than to wait."""
        store, who = await self.make_store(), self.unique("never")
        usage = (await store.acquire([self._want(who, cost=6)]))[0]
        assert not usage.allowed
        assert usage.retry_after == float("inf")

    async def test_a_limit_that_was_lowered_below_what_is_used_has_nothing_left(self) -> None:
        """And never less than nothing; looking is still free."""
        store, who = await self.make_store(), self.unique("lowered")
        algorithms: tuple[Algorithm, ...] = ("sliding_window", "fixed_window")
        for algorithm in algorithms:
            await store.acquire([Want(algorithm, who, Quota(10, per=60, algorithm=algorithm), 8)])
            lowered = Want(algorithm, who, Quota(5, per=60, algorithm=algorithm), 0)
            assert [(one.allowed, one.remaining) for one in await store.acquire([lowered])] == [(True, 0)]
            denied = await store.acquire([lowered._replace(cost=1)])
            assert [(one.allowed, one.remaining) for one in denied] == [(False, 0)]
            assert 0 < denied[0].retry_after < 60.001

    async def test_nothing_is_granted_to_who_wants_nothing(self) -> None:
        """An empty call is answered empty."""
        store = await self.make_store()
        assert list(await store.acquire([])) == []

    async def test_subjects_and_rules_are_counted_apart(self) -> None:
        """One caller's use is not another's."""
        store, one, two = await self.make_store(), self.unique("one"), self.unique("two")
        await store.acquire([self._want(one, cost=5)])
        assert (await store.acquire([self._want(two)]))[0].allowed
        assert (await store.acquire([self._want(one, Quota(5, per=60))]))[0].allowed

    async def test_reset_forgets(self) -> None:
        """An operator can let a caller go on."""
        store, who = await self.make_store(), self.unique("reset")
        await store.acquire([self._want(who, cost=5)])
        await store.reset(FIVE.name, who)
        assert (await store.acquire([self._want(who)]))[0].remaining == 4

    async def test_so_many_permits_are_held_at_once(self) -> None:
        """One that is given back is free; a holder that asks again has one, not two."""
        store, who = await self.make_store(), self.unique("permits")
        one, two, three = (Want("c", who, AT_ONCE, 1, token) for token in ("1", "2", "3"))
        assert [(await store.acquire([want]))[0].remaining for want in (one, two, two)] == [1, 0, 0]
        denied = (await store.acquire([three]))[0]
        assert not denied.allowed
        assert 0 < denied.retry_after < 1.001
        await store.free([one])
        assert (await store.acquire([three]))[0].allowed
        assert not (await store.acquire([one]))[0].allowed

    async def test_the_permit_of_a_dead_worker_is_free_after_its_lease(self) -> None:
        """And one that is renewed is not."""
        store, who = await self.make_store(), self.unique("leases")
        dead, alive, late = (Want("c", who, AT_ONCE, 1, token) for token in ("1", "2", "3"))
        await store.acquire([dead])
        await store.acquire([alive])
        await self.advance(0.7)
        assert (await store.acquire([alive]))[0].allowed
        assert not (await store.acquire([late]))[0].allowed
        await self.advance(0.4)
        assert (await store.acquire([late]))[0].allowed
        assert not (await store.acquire([dead]))[0].allowed

    async def test_a_permit_and_a_quota_are_all_or_nothing(self) -> None:
        """A call that its quota denies holds no permit."""
        store, who = await self.make_store(), self.unique("both")
        once, wide = Quota(1, per=60), Want("c", who, AT_ONCE, 1, "0")
        for token in ("1", "2"):
            await store.acquire([Want("once", who, once, 1), wide._replace(token=token)])
        assert (await store.acquire([wide._replace(cost=0)]))[0].remaining == 1

    async def _claim(
        self, store: Store, key: str, token: str, print_: bytes = PRINT, *, takeover: Takeover = "reexecute"
    ) -> Claim:
        return await store.claim(key, token, print_, lease=LEASE, ttl=60.0, takeover=takeover)

    async def test_of_many_claims_one_wins(self) -> None:
        """A hundred twins at once have one owner."""
        store, key = await self.make_store(), self.unique("race")
        claims = await asyncio.gather(*(self._claim(store, key, f"token-{n}") for n in range(100)))
        assert sum(isinstance(claim, Claimed) for claim in claims) == 1
        assert sum(isinstance(claim, InProgress) for claim in claims) == 99

    async def test_a_completed_key_answers_its_reply(self) -> None:
        """Every byte, every pair of metadata, in order."""
        store, key = await self.make_store(), self.unique("replay")
        assert await self._claim(store, key, "a") == Claimed(1)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(REPLY)

    async def test_a_reply_that_was_not_kept_still_guards_the_key(self) -> None:
        """Done is done, shown or not."""
        store, key = await self.make_store(), self.unique("unkept")
        await self._claim(store, key, "a")
        await store.complete(key, "a", PRINT, None, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(None)

    async def test_another_payload_is_a_mismatch_during_and_after_the_run(self) -> None:
        """A key means one request."""
        store, key = await self.make_store(), self.unique("mismatch")
        await self._claim(store, key, "a")
        assert await self._claim(store, key, "b", OTHER_PRINT) == Mismatched()
        await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b", OTHER_PRINT) == Mismatched()

    async def test_fingerprints_of_two_doors_are_not_compared(self) -> None:
        """The same operation looks different on another wire; that alone is no mismatch."""
        store, key = await self.make_store(), self.unique("doors")
        await self._claim(store, key, "a")
        assert isinstance(await self._claim(store, key, "b", FOREIGN_PRINT), InProgress)
        await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b", FOREIGN_PRINT) == Completed(REPLY)

    async def test_a_repeated_command_never_meets_itself(self) -> None:
        """A driver may send any command twice."""
        store, key = await self.make_store(), self.unique("twice")
        assert await self._claim(store, key, "a") == Claimed(1)
        assert await self._claim(store, key, "a") == Claimed(1)
        assert await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)

    async def test_a_released_key_is_free(self) -> None:
        """A failure lets the retry run, as the first."""
        store, key = await self.make_store(), self.unique("release")
        await self._claim(store, key, "a")
        assert await store.release(key, "a")
        assert await self._claim(store, key, "b", OTHER_PRINT) == Claimed(1)

    async def test_a_dead_owners_key_is_taken_over_after_its_lease(self) -> None:
        """Not before, and with a new epoch."""
        store, key = await self.make_store(), self.unique("takeover")
        await self._claim(store, key, "a")
        assert isinstance(await self._claim(store, key, "b"), InProgress)
        await self.advance(1.2 * LEASE)
        assert await self._claim(store, key, "b", OTHER_PRINT) == Mismatched()
        assert await self._claim(store, key, "b", takeover="refuse") == Abandoned()
        assert await self._claim(store, key, "b") == Claimed(2)

    async def test_a_renewed_lease_is_not_taken_over(self) -> None:
        """A slow owner is not a dead one."""
        store, key = await self.make_store(), self.unique("renew")
        await self._claim(store, key, "a")
        await self.advance(0.7 * LEASE)
        assert await store.renew(key, "a", lease=LEASE, ttl=60.0)
        await self.advance(0.7 * LEASE)
        assert isinstance(await self._claim(store, key, "b"), InProgress)

    async def test_a_stalled_owner_can_change_nothing(self) -> None:
        """Who lost the lease can't renew, complete or free what the winner has."""
        store, key = await self.make_store(), self.unique("fence")
        await self._claim(store, key, "a")
        await self.advance(1.2 * LEASE)
        await self._claim(store, key, "b")
        assert not await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert not await store.release(key, "a")
        assert not await store.complete(key, "a", PRINT, None, ttl=60.0)
        assert await store.complete(key, "b", PRINT, REPLY, ttl=60.0)
        assert not await store.complete(key, "a", PRINT, None, ttl=60.0)
        assert not await store.release(key, "b")
        assert await self._claim(store, key, "c") == Completed(REPLY)

    async def test_an_owner_whose_lease_is_out_may_finish_if_nobody_came(self) -> None:
        """A late reply is better than a second run."""
        store, key = await self.make_store(), self.unique("late")
        await self._claim(store, key, "a")
        await self.advance(1.2 * LEASE)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(REPLY)

    async def test_a_lost_record_is_restored_by_its_completion(self) -> None:
        """A store that forgot is told again."""
        store, key = await self.make_store(), self.unique("restored")
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(REPLY)

    async def test_a_record_is_gone_after_its_ttl(self) -> None:
        """Nothing is kept for ever."""
        store, key = await self.make_store(), self.unique("ttl")
        await self._claim(store, key, "a")
        await store.complete(key, "a", PRINT, REPLY, ttl=LEASE)
        await self.advance(1.2 * LEASE)
        assert await self._claim(store, key, "b") == Claimed(1)
