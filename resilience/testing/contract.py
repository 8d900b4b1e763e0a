"""Public: what every store must do. Subclass it, say how to make the store and how time passes, and run pytest."""

from abc import abstractmethod

from resilience.decisions.quota import Algorithm, Quota
from resilience.stores.base import Store, Want
from resilience.testing.record_contract import RecordContract

FIVE = Quota(5, per=1)
AT_ONCE = Quota(2, per=1, algorithm="concurrency")


class StoreContract(RecordContract):
    """All promises of ``stores.base``, as tests. Needs pytest with asyncio tests switched on (``asyncio_mode=auto``).

    No test keeps anything between runs but under the keys it makes up, so a shared server will do.
    """

    @abstractmethod
    async def make_store(self) -> Store:
        """Return the store under test. Called once in each test."""

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
