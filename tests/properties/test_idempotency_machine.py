"""The table of the idempotency machine, a memory store and a Redis store are told the same, and agree on all of it.

Redis has a clock of its own, but it judges a record by nothing except what is left of its key's time to live. So before
each command that is set to what it has to be at the instant of the test's clock; from there on only the milliseconds
that the command takes are Redis's own, and no instant of the test is less than half a second before an edge.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from time import monotonic
from typing import NamedTuple, get_args

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from resilience.decisions.idempotency import (
    LONGEST_HINT,
    Abandoned,
    Claim,
    Claimed,
    Completed,
    Expired,
    InProgress,
    Mismatched,
    Takeover,
)
from resilience.decisions.idempotency_record import Standing
from resilience.decisions.idempotency_table import ROWS, Command, Row, State, find_row
from resilience.stores.memory import MemoryStore
from resilience.stores.nodes import SingleNode
from resilience.stores.redis import RedisStore
from resilience.testing import ManualClock
from resilience.verdict import Reply
from tests.support.redis_beside_memory import World, a_name, at_once, serving, some

SLACK = 0.25  # Seconds that a command may take before its answer tells nothing about the instant it was meant for.
PRINTS = {"ann": b"http:" + b"1" * 32, "bob": b"http:" + b"1" * 32, "cid": b"http:" + b"2" * 32, "dan": b"grpc:1"}
REPLIES = (None, Reply("http", 201, (("a", "1"), ("a", "2")), b'{"id":1}'), Reply("grpc", 0, (), b"\n\x00"))
TAKEOVERS: tuple[Takeover, ...] = get_args(Takeover)


class Told(NamedTuple):
    """A command as it goes over the wire: once, or again, or late."""

    kind: Command
    key: str
    token: str = ""
    print: bytes = b""
    lease: float = 10.0
    ttl: float = 60.0
    tombstone: float = 0.0
    takeover: Takeover = "reexecute"
    reply: Reply | None = None


@dataclass(frozen=True)
class Held:
    """What the model has under a key."""

    token: object
    epoch: int
    print: bytes
    written: float
    span: float
    life: float
    done: bool = False
    reply: Reply | None = None
    released: bool = False


class Model:
    """Does what the table says, and knows nothing else."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.met: list[Row] = []

    def state(self, key: str, now: float) -> State:
        held = self.held.get(key)
        if held is None or now - held.written >= held.life:
            return "absent"
        if held.released:
            return "released"
        if now - held.written < held.span:
            return "completed" if held.done else "in_progress"
        return "expired" if held.done else "abandoned"

    def tell(self, told: Told, now: float) -> Claim | bool:
        state, held = self.state(told.key, now), self.held.get(told.key)
        if state == "absent":
            held = None
        token: object = ("resolved", told.reply) if told.kind == "resolve" else told.token
        row = find_row(
            told.kind,
            state,
            owner=held is not None and held.token == token,
            same_payload=held is None or held.print == told.print or held.print[:5] != told.print[:5],
            takeover=told.takeover,
            later=held is not None and held.epoch > 1,
        )
        self.met.append(row)
        epoch = 1 if held is None else held.epoch + (row.epoch == "raised")
        answer = self._answer(row, told, held, epoch, now)
        self._write(row, told, token, epoch, now)
        return answer

    def _answer(self, row: Row, told: Told, held: Held | None, epoch: int, now: float) -> Claim | bool:
        plain: dict[str, Claim | bool] = {
            "mismatched": Mismatched(),
            "abandoned": Abandoned(),
            "expired": Expired(),
            "yes": True,
            "no": False,
        }
        match row.answer:
            case "claimed":
                return Claimed(epoch)
            case "completed":
                assert held is not None
                return Completed(held.reply)
            case "in_progress":
                assert held is not None
                return InProgress(min(held.written + held.span - now, told.lease, LONGEST_HINT))
            case _:
                return plain[row.answer]

    def _write(self, row: Row, told: Told, token: object, epoch: int, now: float) -> None:
        if row.then == "absent":
            del self.held[told.key]
        elif row.then == "in_progress":
            print_ = told.print if told.kind == "claim" else self.held[told.key].print
            self.held[told.key] = Held(token, epoch, print_, now, told.lease, told.ttl)
        elif row.then == "completed":
            print_ = told.print if told.kind == "complete" else self.held[told.key].print
            life = told.ttl + told.tombstone
            self.held[told.key] = Held(token, epoch, print_, now, told.ttl, life, done=True, reply=told.reply)

        elif row.then == "released":
            held = self.held[told.key]
            self.held[told.key] = Held(token, epoch, b"", now, held.life, held.life, released=True)

    def standing(self, key: str, now: float) -> Standing | None:
        state = self.state(key, now)
        if state == "absent":
            return None
        held = self.held[key]
        age = now - held.written
        lease_left = held.span - age if state == "in_progress" else 0.0
        ttl = held.span if held.done else held.life
        reply = held.reply if state == "completed" else None
        return Standing(state, held.epoch, age, lease_left, max(0.0, ttl - age), held.life - max(ttl, age), reply)


async def say(store: RedisStore | MemoryStore, told: Told) -> Claim | bool:
    kind, key, token, print_, lease, ttl, tombstone, takeover, reply = told
    match kind:
        case "claim":
            return await store.claim(key, token, print_, lease=lease, ttl=ttl, takeover=takeover)
        case "renew":
            return await store.renew(key, token, lease=lease, ttl=ttl)
        case "complete":
            return await store.complete(key, token, print_, reply, ttl=ttl, tombstone=tombstone)
        case "release":
            return await store.release(key, token)
        case "resolve":
            return await store.resolve(key, reply, ttl=ttl, tombstone=tombstone)
        case "forget":
            return await store.forget(key)


class Stalled(Exception):  # noqa: N818 - no error: the machine was slow, and nothing is known
    """A command took so long that its answer tells nothing."""


class Together:
    """The three of them, on one clock."""

    def __init__(self, store: RedisStore) -> None:
        self.clock, self.model, self.redis = ManualClock(), Model(), store
        self.memory = MemoryStore(clock=self.clock)
        self._life = a_name()

    async def tell(self, told: Told) -> Claim | bool:
        """Tell all three, compare what they say, and how the record stands afterwards."""
        told = told._replace(key=f"{told.key}-{self._life}")
        began = await self._set_clock(told.key)
        said = await say(self.redis, told)
        seen = await self.redis.inspect(told.key)
        if monotonic() - began > SLACK:
            raise Stalled
        expected = self.model.tell(told, self.clock())
        remembered = at_once(say(self.memory, told))
        for answer in (said, remembered):
            if isinstance(answer, InProgress) and isinstance(expected, InProgress):
                assert answer.retry_after == pytest.approx(expected.retry_after, abs=SLACK)
            else:
                assert answer == expected, told
        self._compare_standings(told.key, seen)
        return expected

    def _compare_standings(self, key: str, seen: Standing | None) -> None:
        expected = self.model.standing(key, self.clock())
        for standing in (seen, at_once(self.memory.inspect(key))):
            if standing is None or expected is None:
                assert standing is expected
                continue
            assert (standing.state, standing.epoch, standing.reply) == (expected.state, expected.epoch, expected.reply)
            assert times(standing) == pytest.approx(times(expected), abs=SLACK)

    async def _set_clock(self, key: str) -> float:
        """Let the server's clock be where the test's is, for this key; return the instant at which that was asked."""
        began, held = monotonic(), self.model.held.get(key)
        if held is not None:
            name, left_ms = self.redis._record_key(key), round((held.written + held.life - self.clock()) * 1000)
            await self.redis._call(name, ("PEXPIRE", name, left_ms), 5.0)
        return began


def times(standing: Standing) -> list[float]:
    return [standing.age, standing.lease_left, standing.ttl_left, standing.tombstone_left]


class Server(NamedTuple):
    world: World
    store: RedisStore


@pytest.fixture(scope="module")
def redis_70() -> Iterator[World]:
    yield from serving("7.0")


@pytest.fixture(scope="module")
def redis_62() -> Iterator[World]:
    yield from serving("6.2")


@pytest.fixture(scope="module", params=["SET NX GET", "script", "script on 6.2"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    world: World = request.getfixturevalue("redis_62" if request.param == "script on 6.2" else "redis_70")

    async def opened() -> RedisStore:
        store = RedisStore(world.server.url, limit_timeout=5, record_timeout=5)
        await store.release("nothing", "nobody")
        assert isinstance(store._nodes, SingleNode)
        if request.param == "script":
            store._nodes._server.native_claim = False
        assert store._nodes.native_claim is (request.param == "SET NX GET")
        return store

    store = world.runner.run(opened())
    yield Server(world, store)
    world.runner.run(store.aclose())


# -- each cell of the table

COMMANDS: tuple[Command, ...] = get_args(Command)
FIRST = Told("claim", "k", "ann", PRINTS["ann"], lease=10.0, ttl=60.0, tombstone=30.0, reply=REPLIES[1])
WAYS: dict[str, list[tuple[Told, float]]] = {
    "absent": [],
    "in progress": [(FIRST, 9.5)],
    "abandoned": [(FIRST, 10.0)],
    "completed": [(FIRST, 1.0), (FIRST._replace(kind="complete"), 59.5)],
    "completed by the second": [
        (FIRST, 10.0),
        (FIRST._replace(token="bob"), 1.0),  # noqa: S106 - a fencing token
        (FIRST._replace(kind="complete", token="bob"), 1.0),  # noqa: S106
    ],
    "in progress again": [(FIRST, 10.0), (FIRST._replace(token="bob"), 1.0)],  # noqa: S106
    "released": [
        (FIRST, 10.0),
        (FIRST._replace(token="bob"), 1.0),  # noqa: S106
        (FIRST._replace(kind="release", token="bob"), 59.5),  # noqa: S106
    ],
    "released, and gone": [
        (FIRST, 10.0),
        (FIRST._replace(token="bob"), 1.0),  # noqa: S106
        (FIRST._replace(kind="release", token="bob"), 60.0),  # noqa: S106
    ],
    "resolved": [(FIRST, 10.0), (FIRST._replace(kind="resolve"), 1.0)],
    "expired": [(FIRST, 0.0), (FIRST._replace(kind="complete"), 60.0)],
    "gone": [(FIRST._replace(kind="complete"), 90.0)],
}
"""How a record gets into each state: commands, and seconds after each."""


def variants(kind: Command) -> Iterator[Told]:
    """Return all that a command can bring with it and that the table could tell apart."""
    prints = sorted({*PRINTS.values()}) if kind == "claim" else [FIRST.print]
    takeovers = TAKEOVERS if kind == "claim" else TAKEOVERS[:1]
    replies = REPLIES if kind in ("complete", "resolve") else REPLIES[:1]
    for token, print_, takeover, reply in product((FIRST.token, "bob"), prints, takeovers, replies):
        yield FIRST._replace(kind=kind, token=token, print=print_, takeover=takeover, reply=reply)


LATE = FIRST._replace(token="late", takeover="refuse")  # noqa: S106 - a fencing token


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_cell_of_the_table_holds_in_both_stores(server: Server, way: str, kind: Command) -> None:
    async def ran(last: Told) -> None:
        together = Together(server.store)
        for told, pause in WAYS[way]:
            await together.tell(told)
            together.clock.advance(pause)
        await together.tell(last)
        await together.tell(LATE)

    for last in variants(kind):
        with suppress(Stalled):
            server.world.runner.run(ran(last))


def test_every_row_of_the_table_is_met_by_some_way_and_command() -> None:
    met: set[Row] = set()
    for way, kind in product(WAYS.values(), COMMANDS):
        for last in variants(kind):
            model, now = Model(), 0.0
            for told, pause in way:
                model.tell(told, now)
                now += pause
            model.tell(last, now)
            met.add(model.met[-1])
    assert met == set(ROWS)


# -- any of them, in any order

Names = st.sampled_from(sorted(PRINTS))
Keys = st.sampled_from(("one", "one", "one", "two"))
Leases = st.sampled_from((2.0, 10.0))
Ttls = st.sampled_from((10.0, 60.0))
Tombstones = st.sampled_from((0.0, 0.0, 30.0))
Replies = st.sampled_from(REPLIES)
NEVER_MEETS_ITSELF = frozenset({"claim", "renew", "complete", "resolve"})


class IdempotencyMachine(RuleBasedStateMachine):
    """Workers that claim, stall, come back too late and die; a driver that repeats itself; an operator; and time."""

    sent: Bundle[Told] = Bundle("sent")
    ordered: Bundle[Told] = Bundle("ordered")

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.together = Together(self.server.store)
        self.stalled = False
        self.lives = dict.fromkeys(PRINTS, 1)

    def tell(self, told: Told) -> Claim | bool | None:
        """Tell all three; None from when on the machine under the test was too slow to tell anything."""
        if not self.stalled:
            try:
                said = self.server.world.runner.run(self.together.tell(told))
            except Stalled:
                self.stalled = True
            else:
                event(self.together.model.met[-1].name)
                return said
        return None

    def token(self, name: str) -> str:
        return f"{name}-{self.lives[name]}"

    @initialize(target=sent, name=Names, key=Keys, lease=Leases)
    def somebody_is_first(self, name: str, key: str, lease: float) -> Told:
        self.tell(told := Told("claim", key, self.token(name), PRINTS[name], lease))
        return told

    @rule(target=sent, name=Names, key=Keys, lease=Leases, ttl=Ttls, takeover=st.sampled_from(TAKEOVERS))
    def claims(self, name: str, key: str, lease: float, ttl: float, takeover: Takeover) -> Told:
        self.tell(told := Told("claim", key, self.token(name), PRINTS[name], lease, ttl, takeover=takeover))
        return told

    @rule(
        target=sent, name=Names, key=Keys, lease=Leases, ttl=Ttls, tombstone=Tombstones, reply=Replies,
        kind=st.sampled_from(("renew", "complete", "release")),
    )  # fmt: skip
    def somebody_thinks_it_is_the_owner(
        self, name: str, key: str, lease: float, ttl: float, tombstone: float, reply: Reply | None, kind: Command
    ) -> Told:
        self.tell(told := Told(kind, key, self.token(name), PRINTS[name], lease, ttl, tombstone, reply=reply))
        return told

    @rule(
        target=sent, first=sent, lease=Leases, ttl=Ttls, tombstone=Tombstones, reply=Replies,
        kind=st.sampled_from(("renew", "complete", "complete", "release")),
    )  # fmt: skip
    def a_claimant_goes_on(
        self, first: Told, lease: float, ttl: float, tombstone: float, reply: Reply | None, kind: Command
    ) -> Told:
        self.tell(told := first._replace(kind=kind, lease=lease, ttl=ttl, tombstone=tombstone, reply=reply))
        return told

    @rule(target=ordered, key=Keys, ttl=Ttls, tombstone=Tombstones, reply=Replies)
    def an_operator_answers(self, key: str, ttl: float, tombstone: float, reply: Reply | None) -> Told:
        self.tell(told := Told("resolve", key, ttl=ttl, tombstone=tombstone, reply=reply))
        return told

    @rule(target=ordered, key=Keys)
    def an_operator_lets_it_be_forgotten(self, key: str) -> Told:
        self.tell(told := Told("forget", key))
        return told

    @rule(
        target=sent, first=sent, name=Names, takeover=st.sampled_from(TAKEOVERS), fails=st.booleans(),
    )  # fmt: skip
    def an_owner_is_gone_and_another_comes(self, first: Told, name: str, takeover: Takeover, fails: bool) -> Told:
        self.tell(first._replace(kind="claim"))
        self.together.clock.advance(first.lease)
        told = first._replace(kind="claim", token=self.token(name), print=PRINTS[name], takeover=takeover)
        self.tell(told)
        if fails:
            self.tell(told._replace(kind="release"))
        return told

    @rule(told=st.one_of(sent, sent, ordered))
    def a_command_comes_again(self, told: Told) -> None:
        """Late, from a driver or a worker that was stopped for a while."""
        self.tell(told)

    @rule(told=st.one_of(sent, sent, ordered))
    def a_reply_is_lost_and_the_command_is_sent_again(self, told: Told) -> None:
        first, second = self.tell(told), self.tell(told)
        if told.kind in NEVER_MEETS_ITSELF and second is not None and (first is True or isinstance(first, Claimed)):
            assert second == first

    @rule(name=Names)
    def a_worker_crashes(self, name: str) -> None:
        """The next one of its name is another; of the last, at most what was on its way arrives."""
        self.lives[name] += 1

    @rule(seconds=st.sampled_from((0.5, 1.5, 2.0, 9.5, 10.0, 30.0, 60.0)))
    def time_passes(self, seconds: float) -> None:
        self.together.clock.advance(seconds)


def agree(on: Server, examples: int, steps: int) -> None:
    class Here(IdempotencyMachine):
        server = on

    run_state_machine_as_test(Here, settings=settings(some(examples), stateful_step_count=steps))


def test_table_memory_and_redis_agree_whatever_happens(server: Server) -> None:
    agree(server, 100, 30)


@pytest.mark.slow
def test_table_memory_and_redis_agree_for_long(server: Server) -> None:
    agree(server, 300, 60)
