"""Public: what every store of idempotency records must do. See ``testing.contract``, which has it and the limits."""

import asyncio
from abc import ABC, abstractmethod

from resilience.decisions.idempotency import (
    Abandoned,
    Claim,
    Claimed,
    Completed,
    Expired,
    InProgress,
    Mismatched,
    Takeover,
)
from resilience.stores.base import IdempotencyStore
from resilience.verdict import Reply

REPLY = Reply("http", 201, (("content-type", "application/json"), ("link", "a"), ("link", "b")), b'{"id":"p_1"}')
LEASE = 0.5  # Of an owner that is to be alive for as long as a slow machine may take for a command or two.
SHORT = 0.05  # Of one that is to be gone.
PRINT, OTHER_PRINT, FOREIGN_PRINT = b"http:" + b"1" * 32, b"http:" + b"2" * 32, b"grpc:" + b"1" * 32


class RecordContract(ABC):
    """The promises of ``IdempotencyStore``, as tests. See ``StoreContract`` for how to use them."""

    @abstractmethod
    async def make_store(self) -> IdempotencyStore:
        """Return the store under test. Called once in each test."""

    @abstractmethod
    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass on the store's clock."""

    @abstractmethod
    def unique(self, name: str) -> str:
        """Return a key or subject that no other test has used."""

    async def _claim(
        self,
        store: IdempotencyStore,
        key: str,
        token: str,
        print_: bytes = PRINT,
        *,
        lease: float = LEASE,
        takeover: Takeover = "reexecute",
    ) -> Claim:
        return await store.claim(key, token, print_, lease=lease, ttl=60.0, takeover=takeover)

    async def _abandon(self, store: IdempotencyStore, key: str) -> None:
        """Let "a" claim the key, and its lease run out."""
        await self._claim(store, key, "a", lease=SHORT)
        await self.advance(1.2 * SHORT)

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

    async def test_epochs_do_not_fall_when_a_successor_fails(self) -> None:
        """Who was given up may still be at work; whoever comes next, with whatever payload, has a higher epoch."""
        store, key = await self.make_store(), self.unique("failed-successor")
        await self._abandon(store, key)
        assert await self._claim(store, key, "b") == Claimed(2)
        assert await store.release(key, "b")
        assert not await store.release(key, "b")
        assert not await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert not await store.resolve(key, REPLY, ttl=60.0)
        assert await self._claim(store, key, "c", OTHER_PRINT, takeover="refuse") == Claimed(3)
        assert await self._claim(store, key, "d") == Mismatched()
        assert await store.release(key, "c")
        assert await self._claim(store, key, "b") == Claimed(4)
        assert not await store.complete(key, "a", PRINT, REPLY, ttl=60.0)

    async def test_a_stalled_owner_may_finish_after_its_successor_failed(self) -> None:
        """Its reply is better than one more run."""
        store, key = await self.make_store(), self.unique("late-after-failure")
        await self._abandon(store, key)
        await self._claim(store, key, "b")
        await store.release(key, "b")
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "c") == Completed(REPLY)
        assert await self._claim(store, key, "c", OTHER_PRINT) == Mismatched()

    async def test_a_released_key_is_remembered_for_its_ttl_or_until_it_is_forgotten(self) -> None:
        """An operator sees it, and may let epochs begin again."""
        store, key = await self.make_store(), self.unique("given-back")
        await self._abandon(store, key)
        await self._claim(store, key, "b")
        await store.release(key, "b")
        standing = await store.inspect(key)
        assert standing is not None
        assert (standing.state, standing.epoch, standing.lease_left, standing.reply) == ("released", 2, 0.0, None)
        assert 59 < standing.ttl_left <= 60
        assert await store.forget(key)
        assert await store.inspect(key) is None
        assert await self._claim(store, key, "c") == Claimed(1)
        await self._abandon(store, key := self.unique("given-back"))
        assert await store.claim(key, "b", PRINT, lease=SHORT, ttl=SHORT, takeover="reexecute") == Claimed(2)
        await store.release(key, "b")
        await self.advance(1.2 * SHORT)
        assert await self._claim(store, key, "c") == Claimed(1)

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
        await self._abandon(store, key)
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
        await self._abandon(store, key)
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
        await store.complete(key, "a", PRINT, REPLY, ttl=SHORT)
        await self.advance(1.2 * SHORT)
        assert await self._claim(store, key, "b") == Claimed(1)

    async def test_a_tombstone_remembers_a_key_after_its_ttl(self) -> None:
        """It says that the operation ran; until then the reply is replayed as ever."""
        store, key, long = await self.make_store(), self.unique("tombstone"), self.unique("long")
        await store.complete(long, "a", PRINT, REPLY, ttl=60.0, tombstone=60.0)
        assert await self._claim(store, long, "b") == Completed(REPLY)
        await self._claim(store, key, "a")
        assert await store.complete(key, "a", PRINT, REPLY, ttl=SHORT, tombstone=60.0)
        await self.advance(1.2 * SHORT)
        assert await self._claim(store, key, "b") == Expired()
        assert await self._claim(store, key, "a") == Expired()
        assert await self._claim(store, key, "b", OTHER_PRINT) == Mismatched()
        assert not await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert not await store.release(key, "a")

    async def test_a_tombstone_does_not_stay_for_ever(self) -> None:
        """After it the key is new."""
        store, key = await self.make_store(), self.unique("weathered")
        await store.complete(key, "a", PRINT, REPLY, ttl=SHORT, tombstone=SHORT)
        await self.advance(2.2 * SHORT)
        assert await store.inspect(key) is None
        assert await self._claim(store, key, "b") == Claimed(1)

    async def test_an_operator_sees_how_a_record_stands(self) -> None:
        """Its state, what it has left, and the reply that a retry would get."""
        store, key = await self.make_store(), self.unique("inspect")
        assert await store.inspect(key) is None
        await self._claim(store, key, "a")
        running = await store.inspect(key)
        assert running is not None
        assert (running.state, running.epoch, running.reply) == ("in_progress", 1, None)
        assert 0 <= running.age < 1
        assert 0 < running.lease_left <= LEASE
        assert 59 < running.ttl_left <= 60
        await self._abandon(store, key := self.unique("inspect"))
        abandoned = await store.inspect(key)
        assert abandoned is not None
        assert (abandoned.state, abandoned.lease_left, abandoned.tombstone_left) == ("abandoned", 0.0, 0.0)
        assert abandoned.age >= SHORT
        await self._claim(store, key, "b")
        await store.complete(key, "b", PRINT, REPLY, ttl=60.0, tombstone=30.0)
        done = await store.inspect(key)
        assert done is not None
        assert (done.state, done.epoch, done.lease_left, done.reply) == ("completed", 2, 0.0, REPLY)
        assert 59 < done.ttl_left <= 60
        assert 29 < done.tombstone_left <= 30.001

    async def test_an_operator_sees_a_tombstone_without_its_reply(self) -> None:
        """What is no longer answered is no longer shown."""
        store, key = await self.make_store(), self.unique("grave")
        await store.complete(key, "a", PRINT, REPLY, ttl=SHORT, tombstone=60.0)
        await self.advance(1.2 * SHORT)
        standing = await store.inspect(key)
        assert standing is not None
        assert (standing.state, standing.ttl_left, standing.reply) == ("expired", 0.0, None)
        assert 58 < standing.tombstone_left < 60

    async def test_a_forgotten_key_is_new(self) -> None:
        """For any payload, whatever it stood for."""
        store, key = await self.make_store(), self.unique("forget")
        assert not await store.forget(key)
        await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await store.forget(key)
        assert not await store.forget(key)
        assert await self._claim(store, key, "b", OTHER_PRINT) == Claimed(1)

    async def test_a_key_of_a_live_owner_is_not_forgotten(self) -> None:
        """Nothing runs twice at a time, not even by order; that of a dead one is."""
        store, key = await self.make_store(), self.unique("early")
        await self._claim(store, key, "a")
        assert not await store.forget(key)
        assert isinstance(await self._claim(store, key, "b"), InProgress)
        await self._abandon(store, key := self.unique("gone"))
        assert await store.forget(key)
        assert await self._claim(store, key, "b") == Claimed(1)

    async def test_an_operator_answers_for_an_owner_that_is_gone(self) -> None:
        """Retries get the answer, other payloads do not, and the lost owner can no longer change it."""
        store, key = await self.make_store(), self.unique("resolve")
        await self._abandon(store, key)
        assert await store.resolve(key, REPLY, ttl=60.0)
        assert not await store.complete(key, "a", PRINT, None, ttl=60.0)
        assert not await store.renew(key, "a", lease=LEASE, ttl=60.0)
        assert not await store.release(key, "a")
        assert await self._claim(store, key, "b", takeover="refuse") == Completed(REPLY)
        assert await self._claim(store, key, "b", OTHER_PRINT) == Mismatched()
        standing = await store.inspect(key)
        assert standing is not None
        assert (standing.state, standing.epoch) == ("completed", 2)

    async def test_a_live_owner_answers_itself(self) -> None:
        """And where there is nothing, there is nothing to answer for."""
        store, key = await self.make_store(), self.unique("alive")
        assert not await store.resolve(key, REPLY, ttl=60.0)
        await self._claim(store, key, "a")
        assert not await store.resolve(key, None, ttl=60.0)
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(REPLY)

    async def test_an_answer_that_was_given_is_not_resolved_otherwise(self) -> None:
        """A client may have seen it. The same resolution again is no contradiction."""
        store, key = await self.make_store(), self.unique("resolved")
        await self._abandon(store, key)
        assert await store.resolve(key, None, ttl=60.0)
        assert await store.resolve(key, None, ttl=60.0)
        assert not await store.resolve(key, REPLY, ttl=60.0)
        assert await self._claim(store, key, "b") == Completed(None)

    async def test_a_resolution_can_leave_a_tombstone(self) -> None:
        """As a completion can."""
        store, key = await self.make_store(), self.unique("resolved-grave")
        await self._abandon(store, key)
        assert await store.resolve(key, REPLY, ttl=SHORT, tombstone=60.0)
        await self.advance(1.2 * SHORT)
        assert await self._claim(store, key, "b") == Expired()
