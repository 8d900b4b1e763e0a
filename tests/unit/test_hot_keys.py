import asyncio
from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.decisions.quota import Quota, Usage
from resilience.errors import StoreUnavailableError
from resilience.stores import hot_keys
from resilience.stores.base import Want
from resilience.stores.hot_keys import Denials, Group, Merger, key_of
from resilience.stores.memory import MemoryStore
from resilience.testing import ManualClock

TEN = Quota(10, per=60)
DENIED = Usage(False, 10, 0, 0.5, 0.5)


def want(subject: str = "ann", cost: int = 1, rule: str = "r", quota: Quota = TEN) -> list[Want]:
    return [Want(rule, subject, quota, cost)]


class Requests:
    """What a merger sends. Each request is answered when a test says so."""

    def __init__(self, most: int = 64) -> None:
        self.sent: list[list[Group]] = []
        self.clock = ManualClock()
        self.merger = Merger(self._ask, self.clock, most)

    def _ask(self, groups: list[Group]) -> None:
        self.sent.append(groups)

    def acquire(self, wants: Sequence[Want]) -> "asyncio.Future[Sequence[Usage]]":
        return self.merger.acquire(key_of(wants), wants)

    async def busy(self) -> None:
        """Have a request under way, so that calls gather."""
        self.acquire(want("busy")).cancel()
        await asyncio.sleep(0)
        assert [[key_of(group.wants) for group in groups] for groups in self.sent] == [[key_of(want("busy"))]]
        self.sent.clear()


async def test_equal_calls_of_one_turn_are_one_group_of_one_request() -> None:
    requests = Requests()
    await requests.busy()
    calls = [requests.acquire(want()) for _ in range(100)]
    assert requests.sent == []
    await asyncio.sleep(0)
    assert [[len(group.futures) for group in groups] for groups in requests.sent] == [[100]]
    requests.sent[0][0].answer(100, [0, 60_000_000, 0])
    assert len(await asyncio.gather(*calls)) == 100


@pytest.mark.parametrize("other", [want("bob"), want(cost=2), want(rule="s"), [*want(), *want("bob")]])
async def test_different_calls_of_one_turn_are_groups_of_their_own_in_one_request(other: list[Want]) -> None:
    requests = Requests()
    await requests.busy()
    calls = [requests.acquire(wants) for wants in (want(), other, want())]
    await asyncio.sleep(0)
    assert [[(group.wants, len(group.futures)) for group in groups] for groups in requests.sent] == [
        [(want(), 2), (other, 1)]
    ]
    one, two = requests.sent[0]
    one.answer(2, [8, 1, 0])
    two.answer(1, [3, 2, 0] * len(other))
    assert [(await call)[0].remaining for call in calls] == [9, 3, 8]


async def test_calls_of_different_quotas_under_one_name_are_never_answered_for_each_other() -> None:
    requests = Requests()
    await requests.busy()
    calls = [requests.acquire(want(quota=quota)) for quota in (TEN, Quota(20, per=60))]
    await asyncio.sleep(0)
    for group in requests.sent[0]:
        group.answer(len(group.futures), [5, 1, 0])
    assert [(await call)[0].limit for call in calls] == [10, 20]


async def test_calls_of_two_turns_are_two_requests() -> None:
    requests = Requests()
    await requests.busy()
    for turn in (1, 2):
        requests.acquire(want())
        await asyncio.sleep(0)
        assert len(requests.sent) == turn


async def test_no_call_waits_while_nothing_is_under_way() -> None:
    requests = Requests()
    call = requests.acquire(want())
    assert len(requests.sent) == 1
    requests.sent[0][0].answer(1, [9, 60_000_000, 0])
    assert await call == [Usage(True, 10, 9, 60.0, 0.0)]
    requests.merger.answered()
    requests.acquire(want())
    assert len(requests.sent) == 2


async def test_a_crowd_gathers_and_a_handful_of_it_does_not_wait_for_the_rest() -> None:
    requests = Requests()
    await requests.busy()
    calls = [requests.acquire(want()) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(2):
        requests.merger.answered()
    requests.sent.clear()
    calls = [requests.acquire(want()) for _ in range(56)]
    assert [len(groups[0].futures) for groups in requests.sent] == [48]
    await asyncio.sleep(0)
    assert [len(groups[0].futures) for groups in requests.sent] == [48, 8]
    assert not any(call.done() for call in calls)
    await asyncio.sleep(0)
    for _ in range(2):
        requests.merger.answered()
    requests.acquire(want())
    await asyncio.sleep(0)  # the last of a crowd gathers in vain; it tells that the crowd is gone
    requests.merger.answered()
    requests.acquire(want())
    assert [len(groups[0].futures) for groups in requests.sent] == [48, 8, 1, 1]


async def test_a_request_holds_no_more_groups_than_it_may_and_all_are_sent() -> None:
    requests = Requests(most=3)
    await requests.busy()
    for n in range(8):
        requests.acquire(want(f"subject-{n}"))
    await asyncio.sleep(0)
    sent = [[group.wants[0].subject for group in groups] for groups in requests.sent]
    assert [len(groups) for groups in sent] == [3, 3, 2]
    assert [subject for groups in sent for subject in groups] == [f"subject-{n}" for n in range(8)]


@settings(deadline=None)
@given(
    st.integers(1, 12), st.integers(0, 4), st.integers(1, 8), st.integers(0, 12),
)  # fmt: skip
def test_each_caller_is_told_what_it_would_have_been_told_alone(calls: int, cost: int, limit: int, used: int) -> None:
    quota, clock = Quota(limit, per=60), ManualClock()

    async def ran() -> tuple[list[Sequence[Usage]], list[Sequence[Usage]]]:
        memory, requests = MemoryStore(clock=clock), Requests()
        await memory.acquire(want(cost=min(used, limit), quota=quota))
        await requests.busy()
        told = [requests.acquire(want(cost=cost, quota=quota)) for _ in range(calls)]
        await asyncio.sleep(0)
        alone = [await memory.acquire(want(cost=cost, quota=quota)) for _ in range(calls)]
        left = (await memory.acquire(want(cost=0, quota=quota)))[0]
        admitted = sum(usages[0].allowed for usages in alone)
        wait = 0 if admitted == calls else -1 if cost > limit else 60_000_001
        requests.sent[0][0].answer(admitted, [left.remaining, round(left.reset_after * 1e6), wait])
        return await asyncio.gather(*told), alone

    told, alone = asyncio.run(ran())
    assert told == alone


async def test_a_rule_that_did_not_deny_says_what_it_would_have_said() -> None:
    requests = Requests()
    both = [*want(cost=2), *want(rule="s", cost=2)]
    calls = [requests.acquire(both)]
    await asyncio.sleep(0)
    requests.sent[0][0].answer(0, [1, 30_000_000, 30_000_001, 7, 20_000_000, 0])
    assert await calls[0] == [Usage(False, 10, 1, 30.0, 30.000001), Usage(True, 10, 5, 20.0, 0.0)]


async def test_a_caller_who_leaves_disturbs_no_other() -> None:
    requests = Requests()
    await requests.busy()
    calls = [requests.acquire(want()) for _ in range(3)]
    calls[0].cancel()
    await asyncio.sleep(0)
    calls[1].cancel()
    requests.sent[0][0].answer(2, [0, 500_000, 500_001])
    assert calls[0].cancelled()
    assert calls[1].cancelled()
    # What the two who left asked for is spent: the server may have decided by then.
    assert await calls[2] == [Usage(False, 10, 0, 0.5, 0.500001)]


async def test_an_error_reaches_everyone_of_its_group_who_is_still_there() -> None:
    requests = Requests()
    await requests.busy()
    calls, other = [requests.acquire(want()) for _ in range(3)], requests.acquire(want("bob"))
    calls[1].cancel()
    await asyncio.sleep(0)
    error = StoreUnavailableError("gone")
    failing, fine = requests.sent[0]
    failing.fail(error)
    fine.answer(1, [9, 1, 0])
    for call in (calls[0], calls[2]):
        with pytest.raises(StoreUnavailableError, match="gone"):
            await call
    assert calls[1].cancelled()
    assert (await other)[0].allowed


# -- denials


def known(wait: float, *, asked_at: float = 0.0, now: float = 0.0, reset: float = 0.25) -> tuple[Denials, ManualClock]:
    clock = ManualClock(asked_at)
    denials = Denials(clock)
    clock.advance(now)
    denials.note(key_of(want()), asked_at, [DENIED._replace(retry_after=wait, reset_after=reset)])
    return denials, clock


def test_what_was_not_denied_is_asked_for() -> None:
    denials, _ = known(0.5)
    assert denials.find(key_of(want("bob"))) is None
    assert denials.find(key_of(want(cost=2))) is None
    assert denials.find(key_of(want(rule="s"))) is None
    assert denials.find(key_of(want())) == [DENIED._replace(reset_after=0.25)]


@pytest.mark.parametrize("wait", [0.001, 0.3, 0.999, 1.0])
def test_a_denial_is_known_until_its_wait_is_over_and_no_longer(wait: float) -> None:
    denials, clock = known(wait)
    clock.advance(wait * 0.99)
    assert denials.find(key_of(want())) is not None
    clock.now = wait
    assert denials.find(key_of(want())) is None


@pytest.mark.parametrize("wait", [1.001, 60.0, inf])
def test_a_denial_is_known_for_a_second_at_most(wait: float) -> None:
    denials, clock = known(wait)
    clock.advance(0.999)
    assert denials.find(key_of(want())) is not None
    clock.now = 1.0
    assert denials.find(key_of(want())) is None


def test_a_denials_time_counts_from_when_it_was_asked_for_and_not_from_its_answer() -> None:
    denials, clock = known(0.5, asked_at=100.0, now=0.4)
    clock.now = 100.49
    assert denials.find(key_of(want())) is not None
    clock.now = 100.5
    assert denials.find(key_of(want())) is None


def test_the_wait_and_the_reset_that_are_told_grow_shorter() -> None:
    denials, clock = known(0.5, asked_at=100.0)
    clock.now = 100.125
    assert denials.find(key_of(want())) == [DENIED._replace(retry_after=0.375, reset_after=0.125)]


def test_a_wait_for_ever_stays_one() -> None:
    denials, clock = known(inf)
    clock.advance(0.5)
    found = denials.find(key_of(want()))
    assert found is not None
    assert found[0].retry_after == inf


def test_a_denial_by_two_rules_is_known_until_the_later_of_them_admits() -> None:
    clock = ManualClock(0.0)
    denials, both = Denials(clock), [*want(), *want(rule="s")]
    denials.note(key_of(both), 0.0, [DENIED._replace(retry_after=0.2), DENIED._replace(retry_after=0.6)])
    clock.now = 0.5
    assert denials.find(key_of(both)) is not None
    clock.now = 0.6
    assert denials.find(key_of(both)) is None


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([Quota(3, per=0.9), Quota(4, per=0.9, algorithm="token_bucket", burst=2),
                     Quota(3, per=0.9, algorithm="fixed_window"), Quota(3, per=5, algorithm="sliding_log")]),
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 3)), max_size=8), st.integers(1, 4), st.floats(0, 1.2),
)  # fmt: skip
def test_a_call_that_is_known_to_be_denied_would_be_denied_by_the_store(
    quota: Quota, history: list[tuple[float, int]], cost: int, later: float
) -> None:
    clock = ManualClock(1000.0)
    store, denials = MemoryStore(clock=clock), Denials(clock)

    async def ran() -> None:
        for pause, units in history:
            clock.advance(pause)
            await store.acquire(want(cost=units, quota=quota))
        wants = want(cost=cost, quota=quota)
        usages = await store.acquire(wants)
        if usages[0].allowed:
            return
        denials.note(key_of(wants), clock(), usages)
        clock.advance(later)
        found = denials.find(key_of(wants))
        if found is None or found[0].retry_after < 3e-6:  # a wait is told a microsecond too long, and never too short
            return
        told = (await store.acquire(wants))[0]
        assert not told.allowed
        assert found[0].retry_after == pytest.approx(told.retry_after, abs=3e-6)

    asyncio.run(ran())


def test_no_more_denials_are_known_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_keys, "_MOST_DENIALS", 10)
    denials = Denials(ManualClock(0.0))
    for n in range(100):
        denials.note(key_of(want(f"subject-{n}")), 0.0, [DENIED])
    kept = [n for n in range(100) if denials.find(key_of(want(f"subject-{n}"))) is not None]
    assert kept == list(range(90, 100))


def test_what_is_forgotten_is_asked_for_and_nothing_else() -> None:
    denials = Denials(ManualClock(0.0))
    calls = [want(), want(cost=3), [*want("bob", rule="s"), *want()], want("bob"), want(rule="s")]
    for wants in calls:
        denials.note(key_of(wants), 0.0, [DENIED] * len(wants))
    denials.forget("r", "ann")
    assert [denials.find(key_of(wants)) is None for wants in calls] == [True, True, True, False, False]
