"""Redis holds to what memory says of permits: who has one, since when, and whose lease is out."""

import asyncio
from collections.abc import Iterator, Sequence
from time import time
from typing import NamedTuple, cast

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from resilience.decisions.quota import Quota
from resilience.stores.base import Want
from resilience.stores.memory import MemoryStore
from resilience.testing import ManualClock
from tests.support.redis_beside_memory import (
    ALL,
    NAMES,
    SECOND,
    STACKED,
    Back,
    TellingStore,
    World,
    a_name,
    compare_turn,
    costs,
    lasting,
    limits,
    pauses,
    quotas,
    serving,
    some,
)


@pytest.fixture(scope="module")
def redis_70() -> Iterator[World]:
    yield from serving("7.0")


@pytest.fixture(scope="module")
def redis_62() -> Iterator[World]:
    yield from serving("6.2")


@pytest.fixture(scope="module", params=["redis_70", "redis_62"])
def world(request: pytest.FixtureRequest) -> World:
    return cast("World", request.getfixturevalue(request.param))


HOLDERS = ("ann", "bob", "", "12", "é", "t")


class Move(NamedTuple):
    """What one holder does: ask for some rules at these costs, a number of times, or give their permits back."""

    holder: str
    asked: list[tuple[int, int]]
    times: int
    back: bool


class Step(NamedTuple):
    """A pause, then moves of one turn."""

    pause: float
    moves: list[Move]


class History(NamedTuple):
    quotas: list[Quota]
    steps: list[Step]

    def turns(self, subject: str) -> Iterator[tuple[float, list[Sequence[Want]]]]:
        for pause, moves in self.steps:
            turn: list[Sequence[Want]] = []
            for holder, asked, times, back in moves:
                drawn = [(NAMES[at], self.quotas[at], cost) for at, cost in asked]
                permits = [cost for _, quota, cost in drawn if quota.algorithm == "concurrency"]
                # As the policy does: every want of a call bears the call's token, if one of them is for a permit.
                wants = [Want(rule, subject, quota, cost, holder if permits else "") for rule, quota, cost in drawn]
                if back:
                    turn.append(Back(wants))
                elif any(permits):
                    # A token is one call's own, and a call doesn't ask for the same twice in one turn.
                    turn += [wants] if wants not in [one for one in turn if not isinstance(one, Back)] else []
                else:
                    turn += [wants] * times
            yield pause, turn


few = st.integers(1, 4)
brief = st.integers(1000, 15_000) | st.integers(1000, 200_000)


def permits(limit: int, lease_us: int) -> Quota:
    if lease_us >= SECOND:
        return Quota(limit, lease_us / SECOND, algorithm="concurrency")
    # A lease shorter than a quota's may be, so that it is out within the history.
    quota = Quota(limit, lease_us / SECOND, algorithm="fixed_window")
    quota._set("algorithm", "concurrency")
    return quota


permit_quotas = st.builds(permits, few | few | limits | st.just(2**31 - 1), brief | brief | lasting)


@st.composite
def histories(
    draw: st.DrawFn, *, rules: int = 1, moves: int = 1, length: int = 12, asked_twice: bool = False
) -> History:
    drawn = [draw(permit_quotas), *(draw(permit_quotas | quotas(*ALL)) for _ in range(rules - 1))]
    units = [st.sampled_from([0, 1, 1, 1]) if one.algorithm == "concurrency" else costs(one) for one in drawn]
    one = st.integers(0, rules - 1).flatmap(lambda at: st.tuples(st.just(at), units[at]))
    asked = (
        st.lists(one, min_size=1, max_size=rules + 2)
        if asked_twice
        else st.lists(one, min_size=1, max_size=rules, unique_by=lambda pair: pair[0])
    )
    holders, back = st.sampled_from(HOLDERS), st.sampled_from([False, False, True])
    move = st.builds(Move, holders, asked, st.integers(1, 3), back)
    step = st.builds(Step, pauses, st.lists(move, min_size=1, max_size=moves))
    return History(drawn, draw(st.lists(step, min_size=1, max_size=length)))


async def compare(store: TellingStore, history: History) -> None:
    clock, subject = ManualClock(), a_name()
    memory = MemoryStore(clock=clock)
    for pause, turn in history.turns(subject):
        if pause:
            await asyncio.sleep(pause)
        await compare_turn(store, memory, clock, turn)


def asks(holder: str, cost: int = 1) -> Move:
    return Move(holder, [(0, cost)], 1, back=False)


def gives_back(holder: str) -> Move:
    return Move(holder, [(0, 1)], 1, back=True)


def calls(holder: str) -> Move:
    return Move(holder, [(0, 1), (1, 1)], 1, back=False)


def one_by_one(quota: Quota, *moves: Move | float) -> History:
    return History(
        [quota], [Step(move, [asks("", 0)]) if isinstance(move, float) else Step(0.0, [move]) for move in moves]
    )


@some(25)
@given(history=histories())
@example(one_by_one(permits(1, SECOND), asks("ann"), asks("bob"), gives_back("bob"), gives_back("ann"), asks("bob")))
@example(one_by_one(permits(2, SECOND), asks("ann"), asks("bob"), asks("ann"), asks("t"), asks("t", 0), asks("ann", 0)))
@example(one_by_one(permits(2, 15_000), asks("ann"), 0.01, asks("bob"), asks("ann"), 0.01, asks("t"), 0.01, asks("t")))
def test_holders_are_told_what_memory_tells_them(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


@some(15)
@given(history=histories(rules=STACKED))
def test_permits_stacked_with_quotas_say_what_memory_says(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


@some(20)
@given(history=histories(moves=20, length=4))
def test_holders_who_come_and_go_in_one_turn_are_told_what_memory_tells_them_singly(
    world: World, history: History
) -> None:
    world.runner.run(compare(world.store, history))


@some(20)
@given(history=histories(rules=STACKED, moves=8, length=6))
@example(History([permits(2, SECOND), Quota(9, per=60)], [Step(0.0, [calls(who) for who in HOLDERS])]))
def test_calls_of_all_kinds_in_one_turn_say_what_single_ones_say_in_memory(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


@some(20)
@given(history=histories(rules=2, moves=3, length=6, asked_twice=True))
def test_one_limit_asked_twice_in_a_call_says_what_memory_says(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


# -- from any state, which real time would take days to reach


async def plant(store: TellingStore, memory: MemoryStore, subject: str, held: dict[str, int]) -> None:
    memory._permits[NAMES[0], subject] = dict(held)
    key = store._count_key(NAMES[0], subject, "C")
    members = [part for holder, ends in held.items() for part in (ends, f"t{holder}")]
    assert await store._call(key, ("ZADD", key, *members), 5.0) == len(held)


class Planted(NamedTuple):
    """Who holds a permit, and for how many microseconds from now, below zero if it is out; then calls of one turn."""

    quota: Quota
    held: dict[str, int]
    turn: list[tuple[str, int]]


@st.composite
def plants(draw: st.DrawFn) -> Planted:
    limit, lease = draw(few), draw(lasting)
    # Longer than a lease: the lease was shortened since, or the server's clock has stepped back.
    left = st.integers(-lease, 2 * lease) | st.integers(1, lease) | st.sampled_from([lease, SECOND, -1, 0, 1, 1000])
    held = draw(st.dictionaries(st.sampled_from(HOLDERS), left, min_size=1))
    call = st.tuples(st.sampled_from(HOLDERS), st.integers(0, 1))
    turn = draw(st.lists(call, min_size=1, max_size=3, unique=True))
    return Planted(permits(limit, lease), held, turn)


async def compare_from(store: TellingStore, planted: Planted) -> None:
    clock, subject = ManualClock(), a_name()
    memory = MemoryStore(clock=clock)
    now = round(time() * SECOND)
    await plant(store, memory, subject, {holder: now + left for holder, left in planted.held.items()})
    turn = [[Want(NAMES[0], subject, planted.quota, cost, holder)] for holder, cost in planted.turn]
    await compare_turn(store, memory, clock, turn)
    await compare_turn(store, memory, clock, [Back(turn[0])])
    await compare_turn(store, memory, clock, turn)


@some(60)
@given(planted=plants())
@example(Planted(permits(2, SECOND), {"ann": 2 * SECOND}, [("ann", 1), ("bob", 0)]))
def test_from_any_state_a_holder_is_told_what_memory_tells_it(world: World, planted: Planted) -> None:
    event("more than the limit" if len(planted.held) > planted.quota.limit else "within the limit")
    world.runner.run(compare_from(world.store, planted))


def test_a_permit_is_free_at_the_very_microsecond_at_which_its_lease_ends(world: World) -> None:
    async def ran(lead: int) -> int:
        store, clock, quota, holders = world.store, ManualClock(), permits(300_000, 60 * SECOND), 50_000
        memory, subject = MemoryStore(clock=clock), a_name()
        # One that ends in each microsecond to come, so that one of them ends at the instant that is asked about.
        first = round(time() * SECOND) + lead
        await plant(store, memory, subject, {f"{n}": first + n for n in range(holders)})
        await compare_turn(store, memory, clock, [[Want(NAMES[0], subject, quota, 0)]])
        late = round(clock.now * SECOND) - first
        return 0 if 0 < late < holders else lead + late

    lead = 0
    for _ in range(10):
        took = world.runner.run(ran(lead))
        if not took:
            return
        lead = took - 25_000
    pytest.fail("No call met one of the instants")


def test_the_server_forgets_the_holders_with_the_last_lease(world: World) -> None:
    async def ran() -> int:
        store, subject, quota = world.store, a_name(), permits(2, 15_000)
        key = store._count_key(NAMES[0], subject, "C")
        for holder in HOLDERS[:2]:
            await store.acquire([Want(NAMES[0], subject, quota, 1, holder)])
        await asyncio.sleep(0.025)
        kept: int = await store._call(key, ("EXISTS", key), 5.0)
        return kept

    assert world.runner.run(ran()) == 0
