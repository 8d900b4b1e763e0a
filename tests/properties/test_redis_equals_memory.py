"""Redis holds to what memory says: the same calls, at the instants that the server itself tells."""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from struct import pack
from time import monotonic, time
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from resilience.decisions.algorithm import ALGORITHMS
from resilience.decisions.fixed_window import bounds
from resilience.decisions.idempotency import Claim, Claimed, Completed, InProgress, Takeover
from resilience.decisions.quota import PARTS, Algorithm, Quota
from resilience.stores.base import Want
from resilience.stores.memory import MemoryStore
from resilience.stores.nodes import SingleNode
from resilience.stores.redis import RedisStore
from resilience.testing import ManualClock
from resilience.verdict import Reply
from tests.support.redis_beside_memory import (
    ALL,
    DAY,
    NAMES,
    SECOND,
    STACKED,
    TellingStore,
    World,
    a_name,
    at_once,
    compare_turn,
    costs,
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


# -- rate limits


class Step(NamedTuple):
    """A pause, then calls of one turn; each is asked a number of times and says how much of which rules."""

    pause: float
    calls: list[tuple[int, list[tuple[int, int]]]]


class History(NamedTuple):
    quotas: list[Quota]
    steps: list[Step]

    def turns(self, subject: str) -> Iterator[tuple[float, list[list[Want]]]]:
        for pause, calls in self.steps:
            turn = []
            for times, asked in calls:
                wants = [Want(NAMES[at], subject, self.quotas[at], cost) for at, cost in asked]
                turn += [wants] * times
            yield pause, turn


@st.composite
def histories(
    draw: st.DrawFn, *algorithms: Algorithm, rules: int = 1, times: int = 1, calls: int = 1, length: int = 12
) -> History:
    drawn = [draw(quotas(*algorithms)) for _ in range(rules)]
    one = st.integers(0, rules - 1).flatmap(lambda at: st.tuples(st.just(at), costs(drawn[at])))
    asked = st.lists(one, min_size=1, max_size=rules, unique_by=lambda pair: pair[0])
    call = st.tuples(st.integers(1, times), asked)
    step = st.builds(Step, pauses, st.lists(call, min_size=1, max_size=calls))
    return History(drawn, draw(st.lists(step, min_size=1, max_size=length)))


async def compare(store: TellingStore, history: History) -> None:
    clock, subject = ManualClock(), a_name()
    memory = MemoryStore(clock=clock)
    for pause, turn in history.turns(subject):
        if pause:
            await asyncio.sleep(pause)
        await compare_turn(store, memory, clock, turn)


@pytest.mark.parametrize("algorithm", ALL)
@some(25)
@given(data=st.data())
def test_one_rule_says_what_memory_says(world: World, algorithm: Algorithm, data: st.DataObject) -> None:
    world.runner.run(compare(world.store, data.draw(histories(algorithm))))


@some(35)
@given(history=histories(*ALL, rules=STACKED))
def test_several_rules_in_one_call_say_what_memory_says(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


@pytest.mark.parametrize("algorithm", ALL)
@some(25)
@given(data=st.data())
def test_merged_calls_say_what_single_ones_say_in_memory(
    world: World, algorithm: Algorithm, data: st.DataObject
) -> None:
    world.runner.run(compare(world.store, data.draw(histories(algorithm, times=8, length=6))))


@some(35)
@given(history=histories(*ALL, rules=STACKED, times=6, calls=3, length=6))
def test_calls_of_all_kinds_in_one_turn_say_what_single_ones_say_in_memory(world: World, history: History) -> None:
    world.runner.run(compare(world.store, history))


@some(35)
@given(data=st.data())
def test_one_count_asked_twice_in_a_call_says_what_memory_says(world: World, data: st.DataObject) -> None:
    quota = data.draw(quotas(*ALL))
    asked = st.lists(st.tuples(st.just(0), costs(quota)), min_size=2, max_size=3)
    steps = data.draw(st.lists(st.builds(Step, pauses, asked.map(lambda one: [(1, one)])), min_size=1, max_size=6))
    world.runner.run(compare(world.store, History([quota], steps)))


# -- rate limits: one step from any state, which real time would take days to reach


def written(algorithm: Algorithm, state: "array[int]") -> bytes:
    """The bytes in which Redis keeps what memory keeps as ``state``."""
    if algorithm == "token_bucket":
        return b"B" + pack(">Q", state[0])
    if algorithm == "fixed_window":
        return b"F" + pack(">QI", *state)
    marks = zip(state[1::2], state[2::2], strict=True)
    return b"S" + pack(">I", state[0]) + b"".join(pack(">QI", *mark) for mark in marks)


class Planted(NamedTuple):
    """What was charged, and how long before the last of it; when that was; then one call."""

    quota: Quota
    charged: list[tuple[int, int]]
    since_last: int
    cost: int
    times: int


@st.composite
def plants(draw: st.DrawFn) -> Planted:
    quota = draw(st.sampled_from(ALL).flatmap(quotas))
    window = quota.window_us
    part = -(-window // PARTS)
    ages = st.integers(0, 2 * window) | st.integers(0, window) | st.sampled_from([0, 1, part, window - 1, window])
    amounts = st.integers(1, max(1, quota.capacity // 3)) | costs(quota).filter(bool)
    charged = sorted(draw(st.lists(st.tuples(ages, amounts), min_size=1, max_size=40)), reverse=True)
    # Below zero: the server's clock has stepped back since. A calendar is known for a window to either side.
    back = DAY if quota.calendar else window
    since_last = draw(st.integers(-back, 2 * window) | st.integers(-back, 0) | st.integers(0, window // 2))
    return Planted(quota, charged, since_last, draw(costs(quota)), draw(st.integers(1, 4)))


async def compare_from(store: TellingStore, plant: Planted) -> None:
    quota, functions = plant.quota, ALGORITHMS[plant.quota.algorithm]
    clock, subject = ManualClock(), a_name()
    memory = MemoryStore(clock=clock)
    start = round(time() * SECOND) - plant.since_last - plant.charged[-1][0]
    state = functions.empty()
    for age, cost in plant.charged:
        instant = (start - age) / SECOND
        if functions.decide(state, quota, cost, instant).allowed:
            functions.charge(state, quota, cost, instant)
    if state != functions.empty():
        memory._counts[NAMES[0], subject] = (quota, state)
        key = store._count_key(NAMES[0], subject, "B" if quota.burst else "F" if len(state) == 2 else "S")
        raw = written(quota.algorithm, state)
        assert await store._call(key, ("SET", key, raw, "PX", 60_000), 5.0) == b"OK"
    wants = [Want(NAMES[0], subject, quota, plant.cost)]
    await compare_turn(store, memory, clock, [wants] * plant.times)
    await compare_turn(store, memory, clock, [[Want(NAMES[0], subject, quota, 0)]])


@some(120)
@given(plant=plants())
def test_from_any_state_a_call_says_what_memory_says(world: World, plant: Planted) -> None:
    event("clock stepped back" if plant.since_last < 0 else "clock went on")
    world.runner.run(compare_from(world.store, plant))


def test_a_unit_is_free_at_the_very_microsecond_at_which_its_window_ends(world: World) -> None:
    async def ran(lead: int) -> int:
        store, clock, quota, marks = world.store, ManualClock(), Quota(300_000, per=60), 50_000
        memory, subject = MemoryStore(clock=clock), a_name()
        wants = [Want(NAMES[0], subject, quota, 0)]
        # One that ends in each microsecond to come, so that one of them ends at the instant that is asked about.
        now = round(time() * SECOND)
        first = now + lead - 60 * SECOND
        state = array("q", [marks, *(each for n in range(marks) for each in (first + n, 1))])
        memory._counts[NAMES[0], subject] = (quota, state)
        key = store._count_key(NAMES[0], subject, "S")
        assert await store._call(key, ("SET", key, written("sliding_window", state), "PX", 60_000), 5.0) == b"OK"
        await compare_turn(store, memory, clock, [wants])
        late = round(clock.now * SECOND) - 60 * SECOND - first
        return 0 if 0 < late < marks else lead + late

    lead = 0
    for _ in range(10):
        took = world.runner.run(ran(lead))
        if not took:
            return
        lead = took - 25_000
    pytest.fail("No call met one of the instants")


@pytest.mark.parametrize("calendar", ["day", "month"])
@pytest.mark.parametrize("windows", [-1, 0, 1])
def test_a_calendar_count_of_another_window_says_what_memory_says(world: World, calendar: Any, windows: int) -> None:
    quota = Quota(5, calendar=calendar)
    start, stop = bounds(quota, round(time() * SECOND))
    instant = {-1: start - 1, 0: start, 1: stop}[windows]
    plant = Planted(quota, [(0, 3)], round(time() * SECOND) - instant, 2, 3)
    world.runner.run(compare_from(world.store, plant))


# -- idempotency

KEYS = ("one", "two")
EDGE = 0.02  # Seconds around the end of a lease or a record in which nobody is asked.


class Attempt(NamedTuple):
    token: str
    print: bytes


ATTEMPTS = (
    Attempt("ann", b"http:" + b"1" * 32),
    Attempt("bob", b"http:" + b"1" * 32),
    Attempt("cid", b"http:" + b"2" * 32),
    Attempt("dan", b"grpc:" + b":" * 32),
    Attempt("eve", b"grpc:" + bytes(32)),
)


class Command(NamedTuple):
    kind: str
    key: str
    attempt: Attempt
    lease: float
    ttl: float
    takeover: Takeover
    reply: Reply | None
    pause: float
    times: int


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["", "\n", '"', "\0", "é", "a: b"])
replies = st.none() | st.builds(
    Reply,
    st.sampled_from(["http", "grpc"]),
    st.integers(0, 599),
    st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
    st.binary(max_size=64) | st.sampled_from([b"", b"\n", b"\n\n", bytes(range(256)), b"[1]\n"]),
)
KINDS = ("claim", "claim", "claim", "renew", "complete", "release")


def commands(*, leases: Sequence[float], ttls: Sequence[float], waits: Sequence[float]) -> st.SearchStrategy[Command]:
    return st.builds(
        Command,
        st.sampled_from(KINDS),
        st.sampled_from(KEYS[:1] * 3 + KEYS[1:]),
        st.sampled_from(ATTEMPTS[:1] * 2 + ATTEMPTS),
        st.sampled_from(leases),
        st.sampled_from(ttls),
        st.sampled_from(["reexecute", "refuse"]),
        replies,
        st.sampled_from(waits),
        st.sampled_from([1, 1, 2]),
    )


async def say(store: RedisStore | MemoryStore, key: str, command: Command) -> Claim | bool:
    token, print_ = command.attempt
    lease, ttl = command.lease, command.ttl
    match command.kind:
        case "claim":
            return await store.claim(key, token, print_, lease=lease, ttl=ttl, takeover=command.takeover)
        case "renew":
            return await store.renew(key, token, lease=lease, ttl=ttl)
        case "complete":
            return await store.complete(key, token, print_, command.reply, ttl=ttl)
        case _:
            return await store.release(key, token)


def near_an_edge(memory: MemoryStore, key: str, now: float) -> bool:
    held = memory._records.get(key)
    if held is None:
        return False
    edges = (held[0],) if held[1].done else (held[0], held[1].lease_until)
    return any(abs(edge - now) < EDGE for edge in edges)


async def compare_records(store: RedisStore, history: Sequence[Command]) -> None:
    clock, life = ManualClock(), a_name()
    memory = MemoryStore(clock=clock)
    for command in history:
        if command.pause:
            await asyncio.sleep(command.pause)
        key = command.key + life
        for _ in range(command.times):
            before = clock.now = monotonic()
            if near_an_edge(memory, key, before):
                return  # the two may rightly differ
            said = await say(store, key, command)
            if monotonic() - before > EDGE / 4:
                return  # a machine that stalls
            expected = at_once(say(memory, key, command))
            event(type(expected).__name__ if command.kind == "claim" else f"{command.kind} {expected}")
            if isinstance(expected, InProgress):
                assert isinstance(said, InProgress)
                assert 0 < said.retry_after <= command.lease
                assert said.retry_after == pytest.approx(expected.retry_after, abs=EDGE)
            else:
                assert said == expected, command


class Records(NamedTuple):
    world: World
    store: RedisStore


@pytest.fixture(scope="module", params=["SET NX GET", "script", "script on 6.2"])
def records(request: pytest.FixtureRequest) -> Iterator[Records]:
    world: World = request.getfixturevalue("redis_62" if request.param == "script on 6.2" else "redis_70")

    async def opened() -> RedisStore:
        store = RedisStore(world.server.url, limit_timeout=5, record_timeout=5)
        await store.release("nothing", "nobody")
        assert isinstance(store._nodes, SingleNode)
        assert store._nodes.native_claim == (request.param != "script on 6.2")
        if request.param == "script":
            store._nodes._server.native_claim = False
        return store

    store = world.runner.run(opened())
    yield Records(world, store)
    assert store._nodes.native_claim == (request.param == "SET NX GET")
    world.runner.run(store.aclose())


def command(kind: str, who: int = 0, pause: float = 0.0, reply: Reply | None = None) -> Command:
    return Command(kind, KEYS[0], ATTEMPTS[who], 0.1, 60.0, "reexecute", reply, pause, 1)


@some(80)
@given(history=st.lists(commands(leases=[60.0, 4.0], ttls=[60.0, 600.0], waits=[0.0]), min_size=1, max_size=25))
def test_random_commands_are_answered_as_memory_answers_them(records: Records, history: list[Command]) -> None:
    records.world.runner.run(compare_records(records.store, history))


@some(20)
@given(
    history=st.lists(
        commands(leases=[0.05, 0.05, 0.1], ttls=[0.15, 60.0, 60.0], waits=[0.0, 0.0, 0.0, 0.025, 0.08]),
        min_size=1,
        max_size=15,
    )
)
@example([command("claim"), command("renew", 0, 0.06), command("claim", 1, 0.06)])
@example([command("claim"), command("claim", 1, 0.13), command("complete"), command("complete", 1), command("claim")])
def test_leases_and_records_run_out_as_they_do_in_memory(records: Records, history: list[Command]) -> None:
    records.world.runner.run(compare_records(records.store, history))


def test_a_claim_that_its_owner_repeats_moves_the_lease_as_in_memory(records: Records) -> None:
    async def ran() -> tuple[Claim | bool, Claim | bool]:
        key, clock = a_name(), ManualClock()
        memory = MemoryStore(clock=clock)
        for owner, pause in ((0, 0.0), (0, 0.15)):
            await asyncio.sleep(pause)
            clock.advance(pause)
            for store in (records.store, memory):
                assert await say(store, key, command("claim", owner)._replace(lease=0.2)) == Claimed(1)
        await asyncio.sleep(0.1)
        clock.advance(0.1)
        return await say(records.store, key, command("claim", 1)), await say(memory, key, command("claim", 1))

    redis, memory = records.world.runner.run(ran())
    assert type(redis) is type(memory)


@some(40)
@given(reply=replies)
def test_a_completed_key_answers_every_reply_that_there_can_be(records: Records, reply: Reply | None) -> None:
    async def ran() -> tuple[Claim, bool, Claim]:
        key, (token, print_) = a_name(), ATTEMPTS[0]
        first = await records.store.claim(key, token, print_, lease=5, ttl=60, takeover="refuse")
        kept = await records.store.complete(key, token, print_, reply, ttl=60)
        return first, kept, await records.store.claim(key, "next", print_, lease=5, ttl=60, takeover="refuse")

    assert records.world.runner.run(ran()) == (Claimed(1), True, Completed(reply))
