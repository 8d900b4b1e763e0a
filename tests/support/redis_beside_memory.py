"""Redis beside memory: both are told the same, and what they answer is compared.

Ground rules
- A tap at the wire reads at which instant of the server's clock, and in which order, it decided. Memory is then asked
  one by one, in that order, at those instants. So nothing is left to tolerance: every microsecond is compared.
- Permits that are given back bear no instant, and need none: whether a lease was out by then, the permit is gone. Only
  their place among the calls counts, and the wire has it.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from itertools import count
from math import inf, isinf
from typing import Any, NamedTuple, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from resilience.decisions.quota import Algorithm, Quota, Usage
from resilience.errors import StoreUnavailableError
from resilience.stores.base import Want
from resilience.stores.hot_keys import Denials
from resilience.stores.link import Arguments
from resilience.stores.memory import MemoryStore
from resilience.stores.multiplexed import Answered
from resilience.stores.nodes import Nodes
from resilience.stores.redis import RedisStore
from resilience.testing import ManualClock
from tests.support.redis_servers import RedisServer, binary

T = TypeVar("T")
SECOND, DAY = 1_000_000, 86_400_000_000
_names = count()


def a_name() -> str:
    """Return a name that nothing else in this run has."""
    return f"name-{next(_names)}"


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run what never pauses, as a memory store."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("A memory store never pauses")


Key = tuple[str, int, str]
"""What the wire says of a want: where its count is, its cost, and who would hold the permit, if it is for one."""


class Asked(NamedTuple):
    """One request of the acquire script: when the server decided it, and how often it was asked for what."""

    now: float
    groups: list[tuple[int, tuple[Key, ...]]]


class Freed(NamedTuple):
    """A permit that was given back: where, and whose."""

    key: str
    holder: str


class Back(list[Want]):
    """Wants whose permits are given back, in a turn among those who ask."""


class Tap:
    """Stands at the wire of a store and reads along."""

    clustered = False

    def __init__(self, nodes: Nodes, digest: str) -> None:
        self.heard: list[Asked | Freed] = []
        self._nodes = nodes
        self._digest = digest

    @property
    def native_claim(self) -> bool:
        """As the nodes say."""
        return self._nodes.native_claim

    async def send(self, key: str, arguments: Arguments, timeout: float) -> Any:  # noqa: ASYNC109
        """Pass it on."""
        replied = asyncio.get_running_loop().create_future()

        def answered(reply: Any) -> None:
            if not replied.done():
                replied.set_result(reply)

        self.tell(key, arguments, timeout, answered)
        reply = await replied
        if isinstance(reply, StoreUnavailableError):
            raise reply
        return reply

    def tell(self, key: str, arguments: Arguments, timeout: float, answered: Answered) -> None:
        """Pass it on. Replies come in the order in which the server decided, and each is heard as it comes."""

        def heard(reply: Any) -> None:
            if arguments[1] == self._digest and isinstance(reply, list):
                self.heard.append(Asked(reply[0] / SECOND, list(groups(arguments))))
            elif arguments[0] == "ZREM":
                self.heard += [Freed(key, str(holder)) for holder in arguments[2:]]
            answered(reply)

        self._nodes.tell(key, arguments, timeout, heard)

    async def aclose(self) -> None:
        """Close the nodes."""
        await self._nodes.aclose()


def groups(arguments: Arguments) -> Iterator[tuple[int, tuple[Key, ...]]]:
    """Read what the acquire script is told."""
    count_of_keys = int(arguments[2])
    keys, rest = list(map(str, arguments[3 : 3 + count_of_keys])), list(arguments[3 + count_of_keys :])
    while rest:
        times, rules = int(rest.pop(0)), int(rest.pop(0))
        told = [rest[6 * at : 6 * at + 6] for at in range(rules)]
        yield (
            times,
            tuple(
                (key, int(cost), str(last) if letter == "C" else "")
                for key, (letter, _, _, cost, _, last) in zip(keys[:rules], told, strict=True)
            ),
        )
        del rest[: 6 * rules], keys[:rules]


class TellingStore(RedisStore):
    """A store whose requests can be told apart, and which asks them all: it remembers no denial."""

    def __init__(self, url: str) -> None:
        super().__init__(url, limit_timeout=5, record_timeout=5)
        self._nodes = self.tap = Tap(self._nodes, self._acquire.digest)
        self._denials = Denials(lambda: inf)

    def keys_of(self, wants: Sequence[Want]) -> tuple[Key, ...]:
        """Return what the wire should say of ``wants``."""
        letters = {"sliding_window": "S", "sliding_log": "S", "token_bucket": "B", "fixed_window": "F"}
        keys = []
        for want in wants:
            letter = letters.get(want.quota.algorithm, "C")
            holder = f"t{want.token}" if letter == "C" else ""
            keys.append((self._count_key(want.rule, want.subject, letter), want.cost, holder))
        return tuple(keys)


async def compare_turn(
    store: TellingStore, memory: MemoryStore, clock: ManualClock, turn: Sequence[Sequence[Want]]
) -> None:
    """Ask all of them in one turn of the loop; then ask memory one by one, in the order in which they were decided."""
    store.tap.heard.clear()
    told = await asyncio.gather(*(_say(store, wants) for wants in turn))
    waiting = [() if isinstance(wants, Back) else store.keys_of(wants) for wants in turn]
    back = [want for wants in turn if isinstance(wants, Back) for want in wants]
    for heard in store.tap.heard:
        if isinstance(heard, Freed):
            freed = next(want for want in back if heard == _freed(store, want))
            back.remove(freed)
            at_once(memory.free([freed]))
            continue
        clock.now = heard.now
        for times, keys in heard.groups:
            for _ in range(times):
                at = waiting.index(keys)
                waiting[at] = ()
                said = at_once(memory.acquire(turn[at]))
                assert exactly(told[at]) == exactly(said), (turn[at], heard.now)
    assert not any(waiting)
    at_once(memory.free(back))  # of other quotas: nothing is given back, and so nothing was heard
    assert not [want for want in back if want.quota.algorithm == "concurrency"]


async def _say(store: TellingStore, wants: Sequence[Want]) -> Sequence[Usage]:
    if isinstance(wants, Back):
        await store.free(wants)
        return []
    return await store.acquire(wants)


def _freed(store: TellingStore, want: Want) -> Freed:
    ((key, _, holder),) = store.keys_of([want])
    return Freed(key, holder)


def exactly(usages: Sequence[Usage]) -> list[tuple[bool, int, int, float, float]]:
    """Return them with seconds as whole microseconds, as both stores count them."""

    def us(seconds: float) -> float:
        return inf if isinf(seconds) else round(seconds * SECOND)

    return [(u.allowed, u.limit, u.remaining, us(u.reset_after), us(u.retry_after)) for u in usages]


class World:
    """A server, a loop, and stores that live in it."""

    def __init__(self, version: str) -> None:
        self.runner = asyncio.Runner()
        self.server = self.runner.run(RedisServer(binary(version)).__aenter__())
        self.store = self.runner.run(self._open())

    async def _open(self) -> TellingStore:
        store = TellingStore(self.server.url)
        await store.reset("nothing", "nobody")  # what waits for the connection to open is not heard in order
        return store

    async def _close(self) -> None:
        await self.store.aclose()
        await self.server.__aexit__()

    def close(self) -> None:
        """End all of it."""
        self.runner.run(self._close())
        self.runner.close()


def serving(version: str) -> Iterator[World]:
    """Make a world with a server of ``version``, and end it: what a fixture yields from."""
    world = World(version)
    yield world
    world.close()


def some(examples: int) -> settings:
    """Return settings for examples that take as long as they take."""
    return settings(
        deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )


# -- quotas

STACKED = 3
NAMES = tuple(f"rule-{n}" for n in range(STACKED))
ALL: tuple[Algorithm, ...] = ("sliding_window", "sliding_log", "token_bucket", "fixed_window")
"""All that keep a count; ``concurrency`` keeps names."""

limits = st.integers(1, 6) | st.integers(1, 40) | st.sampled_from([100, 256])
high = st.sampled_from([1000, 2**31 - 1])
passing = st.integers(1000, 60_000) | st.integers(1000, 200_000)
lasting = st.sampled_from([SECOND, 60 * SECOND, DAY, 31 * DAY, 366 * DAY]) | st.integers(SECOND, 366 * DAY)


@st.composite
def quotas(draw: st.DrawFn, *algorithms: Algorithm) -> Quota:
    """Draw a quota of one of ``algorithms``, with a window that passes within the history or one that does not."""
    algorithm = draw(st.sampled_from(algorithms))
    if algorithm == "fixed_window" and draw(st.integers(0, 3)) == 0:
        return Quota(draw(limits | high), calendar=draw(st.sampled_from(["day", "month"])))
    limit = draw(limits if algorithm == "sliding_log" else limits | high)
    burst = draw(st.integers(1, limit) | st.integers(1, min(limit, 8))) if algorithm == "token_bucket" else None
    window = draw(passing | passing | lasting)
    if algorithm == "token_bucket":
        limit = min(limit, window // 11)  # a bucket counts whole microseconds, so it has a highest rate
        burst = min(burst or 1, limit)
    return Quota(limit, window / SECOND, algorithm=algorithm, burst=burst)


def costs(quota: Quota) -> st.SearchStrategy[int]:
    """Draw a cost, more often one that matters to ``quota``."""
    most = quota.capacity
    return st.sampled_from([0, 1, 1, 1, 2, 3, most, most, most + 1]) | st.integers(0, most + 2)


pauses = st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0, 0.001, 0.002, 0.005, 0.01, 0.02])
